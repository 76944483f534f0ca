//! Drafts: tokens guessed cheaply, for the full model to verify together (Leviathan et al. 2023).
//!
//! Where decoding is bound by memory, a step of several tokens costs hardly more than one of a single token. So guesses
//! are evaluated along with the token that is due, and each is kept if it is what the full model's own logits,
//! sampled as always, come to. The text is thus the same as without drafts, whatever the guesses, and
//! at any temperature: a guess is a point, for which accepting it when it is drawn *is* speculative sampling.

use std::time::Duration;

use crate::ops::attention;

/// Most tokens of a draft. With the token that is due they must be few enough for attention to treat
/// each as if alone.
pub const MAX_DRAFT: usize = attention::MAX_ALONE - 1;

/// Where drafts come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DraftMode {
    /// No drafts.
    #[default]
    Off,
    /// The model itself with FFNs skipped, by the skip policy of the session; the output is the full model's
    /// (self-speculation, Zhang et al. 2024).
    Skip,
    /// What followed the last tokens where they stood before in the context (prompt lookup, Saxena 2023).
    Lookup,
}

/// How to draft.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DraftOptions {
    /// Where drafts come from.
    pub mode: DraftMode,
    /// Tokens of a draft at most; more than [`MAX_DRAFT`] are as many as that.
    pub max: usize,
    /// Draft as many tokens as have been paying, none if none do; else always `max`.
    pub adaptive: bool,
}

impl Default for DraftOptions {
    fn default() -> Self {
        Self { mode: DraftMode::Off, max: 8, adaptive: true }
    }
}

impl DraftMode {
    const NAMES: [(&'static str, Self); 3] =
        [("off", Self::Off), ("skip", Self::Skip), ("lookup", Self::Lookup)];

    /// Its name, as `--draft` takes it.
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|row| row.1 == self).map_or("", |row| row.0)
    }

    /// The mode called `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::NAMES.iter().find(|row| row.0 == name).map(|row| row.1)
    }

    /// All names.
    pub fn names() -> impl Iterator<Item = &'static str> {
        Self::NAMES.iter().map(|row| row.0)
    }
}

/// What drafts came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DraftStats {
    /// Steps of the full model, with a draft or without.
    pub steps: usize,
    /// Guessed tokens that were verified.
    pub drafted: usize,
    /// Those that were right.
    pub accepted: usize,
}

/// Longest run of tokens that a lookup compares.
const LONGEST: usize = 4;

/// The `max` tokens that followed the last tokens of `context` where they stood before, and how many tokens
/// agreed: the longest agreement, at most [`LONGEST`], the latest of equals. Past the end of the context what
/// was found is taken to repeat itself.
pub fn lookup(context: &[u32], max: usize) -> (Vec<u32>, usize) {
    let n = context.len();
    let mut best = (0, 0);
    for end in (1..n).rev() {
        let pairs = context[..end].iter().rev().zip(context.iter().rev());
        let agree = pairs.take(LONGEST).take_while(|(a, b)| a == b).count();
        if agree > best.1 {
            best = (end, agree);
        }
        if agree == LONGEST {
            break;
        }
    }
    let (end, agree) = best;
    let found = if agree == 0 { &[] } else { &context[end..] };
    (found.iter().cycle().take(max).copied().collect(), agree)
}

/// A guess less likely than this, by the model that guesses, is rarely right.
const SURE: f64 = 0.6;

/// The most likely token, if it is likely enough to be worth verifying.
pub fn sure_of(logits: &[f32]) -> Option<u32> {
    let (token, max) = (0..)
        .zip(logits)
        .fold((0, f32::NEG_INFINITY), |best, (i, &logit)| if logit > best.1 { (i, logit) } else { best });
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - max).exp()).sum();
    (1.0 / sum >= SURE).then_some(token)
}

/// Kinds of drafts that fare differently: by the tokens that agreed in a lookup; 0 for skipping.
const KINDS: usize = LONGEST + 1;
/// Weight of the latest observation in running means: old text tells little about new text.
const NEWEST: f64 = 0.1;
/// After so many tokens without a draft, one is tried: the text may have changed.
const RETRY: usize = 32;

/// Chooses the length of drafts: that which has the most tokens a second to expect, from running means of
/// what was accepted and what steps took. A wrong choice costs time and never changes the text.
pub struct Length {
    options: DraftOptions,
    /// Probability that a draft's next token is right, if those before were.
    right: [f64; KINDS],
    /// Seconds to guess a token.
    guess: Option<f64>,
    /// `[rows - 1]`: seconds of a step of the full model.
    step: [Option<f64>; MAX_DRAFT + 1],
    /// Tokens since the last draft.
    without: usize,
}

impl Length {
    /// Nothing is known yet, so drafts are taken to be good.
    pub fn new(options: DraftOptions) -> Self {
        Self { options, right: [0.8; KINDS], guess: None, step: [None; MAX_DRAFT + 1], without: 0 }
    }

    /// Tokens to draft, at most `room`, in a draft of this kind.
    pub fn choose(&self, kind: usize, room: usize) -> usize {
        let most = self.options.max.min(MAX_DRAFT).min(room);
        if !self.options.adaptive {
            return most;
        }
        let rate = |k: usize| {
            let right = self.right[kind.min(KINDS - 1)];
            let tokens: f64 = (0..=k).map(|i| right.powi(i as i32)).sum();
            tokens / (k as f64 * self.guess.unwrap_or(0.0) + self.seconds(k + 1))
        };
        let best = (0..=most).fold(0, |best, k| if rate(k) > rate(best) { k } else { best });
        if best == 0 && self.without >= RETRY { most.min(2) } else { best }
    }

    /// Seconds of a step of so many rows: measured, or else between the nearest that are. Unknown ends are
    /// taken to cost nothing more, so that they are tried.
    fn seconds(&self, rows: usize) -> f64 {
        let known = |&rows: &usize| self.step[rows - 1].is_some();
        let (below, above) = ((1..=rows).rev().find(known), (rows..=MAX_DRAFT + 1).find(known));
        let at = |rows: usize| self.step[rows - 1].unwrap_or(1.0);
        match (below, above) {
            (Some(a), Some(b)) if a < b => at(a) + (at(b) - at(a)) * (rows - a) as f64 / (b - a) as f64,
            (Some(a), _) => at(a),
            (None, Some(b)) => at(b),
            (None, None) => 1.0,
        }
    }

    /// A step of the full model took so long.
    pub fn stepped(&mut self, rows: usize, time: Duration) {
        self.without = if rows > 1 { 0 } else { self.without + 1 };
        if let Some(mean) = self.step.get_mut(rows - 1) {
            *mean = Some(running(*mean, time.as_secs_f64()));
        }
    }

    /// Guessing so many tokens, at least one, took so long.
    pub fn guessed(&mut self, tokens: usize, time: Duration) {
        self.guess = Some(running(self.guess, time.as_secs_f64() / tokens as f64));
    }

    /// A guess, all before it being right, was right or wrong.
    pub fn verified(&mut self, kind: usize, right: bool) {
        let mean = &mut self.right[kind.min(KINDS - 1)];
        *mean = running(Some(*mean), f64::from(u8::from(right)));
    }
}

fn running(mean: Option<f64>, new: f64) -> f64 {
    mean.map_or(new, |mean| mean + NEWEST * (new - mean))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lookup_finds_the_longest_agreement_and_the_latest_of_equals() {
        assert_eq!(lookup(&[], 3), (vec![], 0));
        assert_eq!(lookup(&[7], 3), (vec![], 0));
        assert_eq!(lookup(&[1, 2, 3], 3), (vec![], 0));
        assert_eq!(lookup(&[5, 1, 9, 1], 3), (vec![9, 1, 9], 1), "taken to repeat itself");
        assert_eq!(lookup(&[1, 2, 8, 0, 2, 9, 1, 2], 2), (vec![8, 0], 2), "two tokens beat the later one");
        assert_eq!(lookup(&[1, 8, 1, 9, 1], 1), (vec![9], 1), "the later one");
        assert_eq!(lookup(&[4, 4, 4], 4), (vec![4; 4], 2), "a run overlaps with itself");
        let long: Vec<u32> = (0..10).chain(0..8).collect();
        assert_eq!(lookup(&long, 3), (vec![8, 9, 0], LONGEST));
    }

    fn ms(n: f64) -> Duration {
        Duration::from_secs_f64(n / 1e3)
    }

    fn length(adaptive: bool, max: usize) -> Length {
        Length::new(DraftOptions { mode: DraftMode::Lookup, max, adaptive })
    }

    #[test]
    fn drafts_are_as_long_as_they_pay() {
        let mut free = length(true, 8);
        (0..50).for_each(|_| free.verified(2, true));
        (1..=9).for_each(|rows| free.stepped(rows, ms(10.0)));
        assert_eq!(free.choose(2, 99), 8, "steps of any size cost the same and guesses are right");
        assert_eq!(free.choose(2, 3), 3);
        let mut dear = length(true, 8);
        (1..=9).for_each(|rows| dear.stepped(rows, ms(10.0 * rows as f64)));
        assert_eq!(dear.choose(2, 99), 0, "a row costs as much as a step");
        let mut wrong = length(true, 8);
        (0..50).for_each(|_| wrong.verified(1, false));
        (1..=9).for_each(|rows| wrong.stepped(rows, ms(10.0 + rows as f64)));
        assert_eq!(wrong.choose(1, 99), 0);
        assert!(wrong.choose(2, 99) > 0, "another kind");
        (0..RETRY).for_each(|_| wrong.stepped(1, ms(11.0)));
        assert_eq!(wrong.choose(1, 99), 2, "tried again");
        assert_eq!(length(false, 6).choose(1, 99), 6);
        assert_eq!(length(false, 99).choose(1, 99), MAX_DRAFT);
    }

    #[test]
    fn guessing_counts_too() {
        let mut skip = length(true, 8);
        (1..=9).for_each(|rows| skip.stepped(rows, ms(10.0)));
        skip.guessed(2, ms(18.0));
        assert_eq!(skip.choose(0, 99), 0, "a guess at 0.9 of a step, right 8 times of 10");
        let mut cheap = length(true, 8);
        (1..=9).for_each(|rows| cheap.stepped(rows, ms(10.0)));
        cheap.guessed(2, ms(4.0));
        assert!(cheap.choose(0, 99) > 0);
    }

    #[test]
    fn names() {
        for name in DraftMode::names() {
            assert_eq!(DraftMode::from_name(name).map(DraftMode::name), Some(name));
        }
        assert_eq!(DraftMode::from_name("on"), None);
    }
}
