//! Whether skipping pays on this machine: some tokens in full and with FFNs skipped, in turn.
//!
//! What is left unread is known beforehand, what that saves is not: it depends on the CPU's kernels and on how fast it
//! reads, and is little where a full step is bound by arithmetic.

use std::time::{Duration, Instant};

use crate::model::{FfnStep, KvType, Model, ModelError, State};
use crate::ops::Compute;
use crate::skip::{Never, SkipOptions, SkipPolicy};

/// Turns that are timed: at least these, and no more once the time is up, or after the most.
const LEAST: usize = 7;
const MOST: usize = 35;
const TIME: Duration = Duration::from_millis(1000);
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
    /// Times tokens of `model`, which is prepared for each of `candidates`, in full and with each candidate, which skips from the
    /// first token on, all in turn: what else the machine does slows all of them.
    ///
    /// # Errors
    /// The options do not fit the model.
    pub fn of_each(
        model: &Model,
        on: Compute<'_>,
        candidates: &[SkipOptions],
    ) -> Result<Vec<Self>, ModelError> {
        let from_the_first = |options: &SkipOptions| SkipOptions { warm_up: Some(0), ..options.clone() };
        let mut policies: Vec<Box<dyn SkipPolicy>> = vec![Box::new(Never)];
        for options in candidates {
            policies.push(model.policy(&from_the_first(options))?);
        }
        let (turns, n) = (MOST + 1, policies.len());
        let mut state = State::new(model, on.team, (turns, 1), KvType::F16, Box::new(Never));
        let mut token = FIRST.min(model.config().vocab as u32 - 1);
        let (mut full, mut shares) = (vec![], vec![vec![]; n]);
        let started = Instant::now();
        for turn in 0..turns {
            let mut times = vec![0.0; n];
            let mut next = token;
            // Each comes first as often.
            for i in (0..n).map(|i| (i + turn) % n) {
                let (time, likeliest) = seconds(model, on, &mut state, (token, turn), &*policies[i])?;
                times[i] = time;
                if i == 0 {
                    next = likeliest;
                }
            }
            token = next;
            // The first turn brings memory in.
            if turn > 0 {
                full.push(times[0]);
                shares.iter_mut().zip(&times).for_each(|(shares, time)| shares.push(time / times[0]));
            }
            if turn >= LEAST && started.elapsed() > TIME {
                break;
            }
        }
        let full = median(full);
        Ok(shares.into_iter().skip(1).map(|shares| Self { full, share: median(shares) }).collect())
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
