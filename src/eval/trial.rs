//! Whether skipping pays on this machine: some tokens in full and with FFNs skipped, in turn.
//!
//! What is left unread is known beforehand, what that saves is not: it depends on the CPU's kernels and on how fast it
//! reads, and is little where a full step is bound by arithmetic.

use std::time::{Duration, Instant};

use crate::model::{FfnStep, KvType, Model, ModelError, State};
use crate::ops::Compute;
use crate::skip::{Never, SkipOptions, SkipPolicy};

/// Tokens that are timed: at least these, and no more once the time is up, or after the most.
const LEAST: usize = 5;
const MOST: usize = 25;
const TIME: Duration = Duration::from_millis(500);
/// Share of the time of a full token from which on skipping is said to pay: less is within the noise.
const PAYS: f64 = 0.99;
/// The first token; what follows is what the model says. In most vocabularies this one begins a text.
const FIRST: u32 = 1;

/// Times of a token.
#[derive(Clone, Copy, Debug)]
pub struct Trial {
    /// Seconds in full, a median.
    pub full: f64,
    /// Seconds with FFNs skipped, of the full one's, the median of the turns.
    pub share: f64,
}

impl Trial {
    /// Times tokens of `model`, which is prepared for `options` and skips from the first token on.
    ///
    /// # Errors
    /// The options do not fit the model.
    pub fn of(model: &Model, on: Compute<'_>, options: &SkipOptions) -> Result<Self, ModelError> {
        let skips = model.policy(&SkipOptions { warm_up: Some(0), ..options.clone() })?;
        let turns = MOST + 1;
        let mut state = State::new(model, on.team, (turns, 1), KvType::F16, skips.boxed_clone());
        let (mut token, mut full, mut shares) = (FIRST.min(model.config().vocab as u32 - 1), vec![], vec![]);
        let started = Instant::now();
        for turn in 0..turns {
            let mut step = |policy: &dyn SkipPolicy| seconds(model, on, &mut state, (token, turn), policy);
            // Either comes first as often.
            let (in_full, skipping) = if turn.is_multiple_of(2) {
                let skipping = step(&*skips)?.0;
                (step(&Never)?, skipping)
            } else {
                let in_full = step(&Never)?;
                (in_full, step(&*skips)?.0)
            };
            token = in_full.1;
            // The first turn brings memory in.
            if turn > 0 {
                full.push(in_full.0);
                shares.push(skipping / in_full.0);
            }
            if turn >= LEAST && started.elapsed() > TIME {
                break;
            }
        }
        Ok(Self { full: median(full), share: median(shares) })
    }

    /// By how much skipping is faster, in per cent.
    pub fn gain(&self) -> f64 {
        100.0 * (1.0 / self.share - 1.0)
    }

    /// Whether skipping is faster.
    pub fn pays(&self) -> bool {
        self.share < PAYS
    }
}

/// Seconds of a step with one token at its position, and the token that is most likely to follow.
fn seconds(
    model: &Model,
    on: Compute<'_>,
    state: &mut State,
    (token, position): (u32, usize),
    policy: &dyn SkipPolicy,
) -> Result<(f64, u32), ModelError> {
    state.truncate(position);
    state.set_policy(policy.boxed_clone());
    let started = Instant::now();
    model.forward(on, state, &[token], FfnStep::Governed { index: position })?;
    let logits = model.logits(on, state, 0);
    let seconds = started.elapsed().as_secs_f64();
    let likeliest = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
    Ok((seconds, likeliest.unwrap_or(0) as u32))
}

/// Infinite for none.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::INFINITY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_hardly_faster_does_not_pay() {
        let trial = |share| Trial { full: 0.01, share };
        assert!(trial(0.9).pays() && !trial(0.995).pays() && !trial(1.1).pays());
        assert!(!Trial { full: median(vec![]), share: median(vec![]) }.pays(), "nothing was timed");
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
    }
}
