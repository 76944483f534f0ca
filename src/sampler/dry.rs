//! DRY ("don't repeat yourself"): a penalty for tokens that would continue a repeat.
//!
//! If the last *n* tokens also occur earlier, the token that followed them there would make the repeat
//! longer, and loses `multiplier * base ^ (n - allowed_length)` once `n >= allowed_length`.
//! A sequence breaker ends a repeat: none is followed across it, and a breaker that is one
//! token is never penalised. The definition is that of p-e-w (oobabooga/text-generation-webui#5677)
//! and, for breakers of several tokens, of koboldcpp and llama.cpp.
//!
//! ```text
//! a b c d a b c ?      the last three tokens, a b c, occurred before and d followed: n = 3 for d
//! ```
//!
//! All lengths come from one pass of the Z algorithm over the window read backwards:
//! `z[k]` is how many tokens match when going back from the end and from `k` tokens before it.

use std::collections::HashMap;

use super::candidates::Candidates;
use super::options::SamplerOptions;
use super::penalties::Window;

/// llama.cpp's limit on the tokens of a breaker; longer tails are cut, which only breaks more.
const MAX_BREAKER_TOKENS: usize = 20;

/// The state of the DRY stage.
#[derive(Clone, Debug)]
pub(super) struct Dry {
    multiplier: f32,
    base: f32,
    allowed_length: usize,
    window: Window,
    /// First token of a breaker to what must follow it.
    breakers: HashMap<u32, Vec<Vec<u32>>>,
    z: Vec<usize>,
    /// The longest repeat that each token would continue.
    repeats: HashMap<u32, usize>,
}

impl Dry {
    pub fn new(options: &SamplerOptions) -> Self {
        Self {
            multiplier: options.dry_multiplier,
            base: options.dry_base,
            allowed_length: options.dry_allowed_length as usize,
            window: Window::new(options.dry_penalty_last_n),
            breakers: HashMap::new(),
            z: Vec::new(),
            repeats: HashMap::new(),
        }
    }

    pub fn set_breakers(&mut self, sequences: &[Vec<u32>]) {
        self.breakers.clear();
        for sequence in sequences {
            if let Some((&head, tail)) = sequence.split_first() {
                let tail = &tail[..tail.len().min(MAX_BREAKER_TOKENS)];
                self.breakers.entry(head).or_default().push(tail.to_vec());
            }
        }
    }

    pub fn accept(&mut self, id: u32) {
        if self.multiplier > 0.0 {
            self.window.push(id);
        }
    }

    pub fn reset(&mut self) {
        self.window.clear();
    }

    pub fn apply(&mut self, candidates: &mut Candidates<'_>) {
        if self.multiplier <= 0.0 {
            return;
        }
        self.find_repeats();
        if self.repeats.is_empty() {
            return;
        }
        let penalty = |length: usize| {
            let growth = self.base.powf((length - self.allowed_length) as f32);
            // A long repeat overflows; an infinite penalty could meet an infinite logit.
            (self.multiplier * growth).min(f32::MAX)
        };
        candidates.adjust(&self.repeats, |logit, &length| logit - penalty(length));
    }

    /// Fills `repeats`.
    fn find_repeats(&mut self) {
        self.repeats.clear();
        if self.window.len() <= self.allowed_length {
            return;
        }
        let limit = self.tokens_since_breaker();
        if limit < self.allowed_length {
            return;
        }
        self.compute_z();
        for k in 1..self.window.len() {
            let length = self.z[k].min(limit);
            let next = self.window.back(k - 1);
            if length >= self.allowed_length && !self.is_breaker(next) {
                let longest = self.repeats.entry(next).or_default();
                *longest = length.max(*longest);
            }
        }
    }

    /// How many tokens follow the last breaker.
    fn tokens_since_breaker(&self) -> usize {
        let matched = (0..self.window.len()).find_map(|i| Some(i - self.breaker_tail_at(i)?));
        matched.unwrap_or(self.window.len())
    }

    /// The longest tail of a breaker that begins `i` tokens back.
    fn breaker_tail_at(&self, i: usize) -> Option<usize> {
        let tails = self.breakers.get(&self.window.back(i))?;
        let matches = |tail: &&Vec<u32>| {
            tail.len() <= i && tail.iter().enumerate().all(|(j, &id)| id == self.window.back(i - 1 - j))
        };
        tails.iter().filter(matches).map(Vec::len).max()
    }

    fn is_breaker(&self, id: u32) -> bool {
        self.breakers.get(&id).is_some_and(|tails| tails.iter().any(Vec::is_empty))
    }

    /// The Z array of the window read backwards; linear time.
    fn compute_z(&mut self) {
        let n = self.window.len();
        self.z.clear();
        self.z.resize(n, 0);
        // `[left, right)` is the match found so far that reaches furthest.
        let (mut left, mut right) = (0, 0);
        for k in 1..n {
            let mut length = if k < right { self.z[k - left].min(right - k) } else { 0 };
            while k + length < n && self.window.back(length) == self.window.back(k + length) {
                length += 1;
            }
            self.z[k] = length;
            if k + length > right {
                (left, right) = (k, k + length);
            }
        }
    }
}

/// Turns breaker strings into the token sequences in which they may appear.
///
/// A string can sit inside a token, or begin in the end of one and go on in the tokens after it:
/// with the breaker `"\n-"` that is every token containing it, and every token ending in `"\n"`
/// followed by the tokens of `"-"`. `vocabulary` yields ids with their bytes, `tokenize` gives the
/// ids of a string without special tokens.
pub fn resolve_breakers<'v>(
    breakers: &[String],
    vocabulary: impl IntoIterator<Item = (u32, &'v [u8])>,
    mut tokenize: impl FnMut(&str) -> Vec<u32>,
) -> Vec<Vec<u32>> {
    let breakers: Vec<&str> = breakers.iter().map(String::as_str).filter(|b| !b.is_empty()).collect();
    let mut tails: HashMap<&str, Vec<u32>> = HashMap::new();
    let mut sequences = Vec::new();
    for (id, piece) in vocabulary {
        for &breaker in &breakers {
            if contains(piece, breaker.as_bytes()) {
                sequences.push(vec![id]);
                continue;
            }
            for split in (1..breaker.len()).filter(|&i| breaker.is_char_boundary(i)) {
                let (head, tail) = breaker.split_at(split);
                if piece.ends_with(head.as_bytes()) {
                    let tail = tails.entry(tail).or_insert_with(|| tokenize(tail));
                    sequences.push([&[id], tail.as_slice()].concat());
                }
            }
        }
    }
    sequences
}

fn contains(piece: &[u8], needle: &[u8]) -> bool {
    piece.windows(needle.len()).any(|window| window == needle)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::candidates::Buffers;
    use super::*;

    fn options() -> SamplerOptions {
        SamplerOptions {
            dry_multiplier: 1.0,
            dry_base: 2.0,
            dry_allowed_length: 2,
            ..SamplerOptions::default()
        }
    }

    /// What each of six tokens loses.
    fn lost(options: &SamplerOptions, breakers: &[Vec<u32>], history: &[u32]) -> Vec<f32> {
        let mut dry = Dry::new(options);
        dry.set_breakers(breakers);
        history.iter().for_each(|&id| dry.accept(id));
        let mut logits = vec![0.0; 6];
        dry.apply(&mut Candidates::new(&mut logits, &mut Buffers::default()));
        logits.iter().map(|x| 0.0 - x).collect()
    }

    #[test]
    fn the_token_that_would_continue_a_repeat_is_penalised() {
        // 1 2 3 came before and 4 followed: length 3, 2^(3 - 2) = 2.
        assert_eq!(lost(&options(), &[], &[1, 2, 3, 4, 1, 2, 3]), [0.0, 0.0, 0.0, 0.0, 2.0, 0.0]);
        // Length 2 is the shortest that counts: 2^0 = 1.
        assert_eq!(lost(&options(), &[], &[2, 3, 4, 5, 2, 3]), [0.0, 0.0, 0.0, 0.0, 1.0, 0.0]);
        // Length 1 does not count.
        assert_eq!(lost(&options(), &[], &[3, 4, 5, 3]), [0.0; 6]);
    }

    #[test]
    fn the_longest_repeat_counts() {
        // After 1 2 came 3, after 5 1 2 came 3 too: length 3.
        assert_eq!(lost(&options(), &[], &[1, 2, 3, 5, 1, 2, 3, 0, 5, 1, 2])[3], 2.0);
    }

    #[test]
    fn overlapping_repeats_are_found() {
        // 0 0 0 0: going back one token, three match; the next 0 would continue them.
        assert_eq!(lost(&options(), &[], &[0, 0, 0, 0])[0], 2.0);
    }

    #[test]
    fn nothing_is_followed_across_a_breaker() {
        let history = [1, 2, 3, 4, 1, 2, 3];
        assert_eq!(lost(&options(), &[vec![2]], &history), [0.0; 6]);
        // Two tokens (2 3) since the breaker 1.
        assert_eq!(lost(&options(), &[vec![1]], &history)[4], 1.0);
        // The breaker 1 2 ends at 2: one token since.
        assert_eq!(lost(&options(), &[vec![1, 2]], &history), [0.0; 6]);
        // 1 5 does not occur, so it breaks nothing.
        assert_eq!(lost(&options(), &[vec![1, 5]], &history)[4], 2.0);
    }

    #[test]
    fn a_breaker_is_never_penalised() {
        assert_eq!(lost(&options(), &[vec![4]], &[1, 2, 3, 4, 1, 2, 3]), [0.0; 6]);
    }

    #[test]
    fn only_the_last_n_tokens_are_searched() {
        let history = [1, 2, 3, 4, 1, 2, 3];
        let short = SamplerOptions { dry_penalty_last_n: 5, ..options() };
        // The window is 3 4 1 2 3: only the last token, 3, matches.
        assert_eq!(lost(&short, &[], &history), [0.0; 6]);
        let off = SamplerOptions { dry_penalty_last_n: 0, ..options() };
        assert_eq!(lost(&off, &[], &history), [0.0; 6]);
    }

    #[test]
    fn a_long_repeat_stays_finite() {
        let penalty = lost(&options(), &[], &[0; 1000])[0];
        assert!(penalty.is_finite() && penalty > 1e37, "{penalty}");
    }

    #[test]
    fn breakers_are_found_in_and_across_tokens() {
        let vocabulary: [(u32, &[u8]); 5] = [(0, b"a"), (1, b"x\n-y"), (2, b"a\n"), (3, b"-"), (4, b"\n")];
        let tokenize = |text: &str| if text == "-" { vec![3] } else { vec![] };
        let found = resolve_breakers(&["\n-".into(), String::new()], vocabulary, tokenize);
        assert_eq!(found, [vec![1], vec![2, 3], vec![4, 3]]);
    }

    /// The definition, by trying every earlier position.
    fn naive_lengths(history: &[u32], breakers: &[u32], allowed: usize) -> HashMap<u32, usize> {
        let mut lengths = HashMap::new();
        let n = history.len();
        for next in 1..n {
            let same = |l: usize| l <= next && history[next - l..next] == history[n - l..];
            let broken = |l: usize| history[n - l..].iter().any(|id| breakers.contains(id));
            let length = (0..n).take_while(|&l| same(l) && !broken(l)).last().unwrap_or(0);
            if length >= allowed && !breakers.contains(&history[next]) {
                let longest = lengths.entry(history[next]).or_insert(0);
                *longest = length.max(*longest);
            }
        }
        lengths
    }

    proptest! {
        #[test]
        fn repeats_match_the_definition(
            history in prop::collection::vec(0u32..4, 0..40),
            breakers in prop::collection::vec(0u32..6, 0..2),
            allowed in 1u32..4,
        ) {
            let mut dry = Dry::new(&SamplerOptions { dry_allowed_length: allowed, ..options() });
            let sequences: Vec<Vec<u32>> = breakers.iter().map(|&id| vec![id]).collect();
            dry.set_breakers(&sequences);
            history.iter().for_each(|&id| dry.accept(id));
            dry.find_repeats();
            prop_assert_eq!(dry.repeats, naive_lengths(&history, &breakers, allowed as usize));
        }
    }
}
