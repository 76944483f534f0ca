//! Log-probabilities, for callers that report them.

use super::candidates::{by_rank, max, usable, weight};
use super::truncate::best_of;

/// The `n` most likely tokens with the natural logarithm of their probability, most likely first.
///
/// NaN and `-inf` logits have no probability and do not appear.
pub fn logprobs(logits: &[f32], n: usize) -> Vec<(u32, f32)> {
    let mut best = Vec::new();
    if n > 0 {
        best_of(logits, n, &mut best);
        best.sort_unstable_by(by_rank);
    }
    let norm = Norm::of(logits);
    best.iter().map(|c| (c.id, norm.logprob(c.logit))).collect()
}

/// The natural logarithm of the probability of `id`; `-inf` if it has none.
pub fn logprob(logits: &[f32], id: u32) -> f32 {
    let logit = logits.get(id as usize).copied().filter(|logit| !logit.is_nan());
    logit.map_or(f32::NEG_INFINITY, |logit| Norm::of(logits).logprob(logit))
}

/// What turns logits into log-probabilities.
struct Norm {
    max: f32,
    log_total: f64,
}

impl Norm {
    fn of(logits: &[f32]) -> Self {
        let max = max(logits);
        let total: f64 = usable(logits).map(|c| weight(c.logit, max)).sum();
        Self { max, log_total: total.ln() }
    }

    fn logprob(&self, logit: f32) -> f32 {
        if logit == f32::NEG_INFINITY {
            return logit;
        }
        // Infinite logits share all the probability.
        let below = if logit == self.max { 0.0 } else { f64::from(logit) - f64::from(self.max) };
        (below - self.log_total) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn best_tokens_come_first_and_sum_to_one() {
        let top = logprobs(&[1.0, 3.0, 2.0, f32::NAN, f32::NEG_INFINITY], 9);
        assert_eq!(top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 2, 0]);
        let sum: f32 = top.iter().map(|t| t.1.exp()).sum();
        assert!((sum - 1.0).abs() < 1e-6, "{sum}");
        assert!((top[0].1 - top[1].1 - 1.0).abs() < 1e-6);
        assert_eq!(logprob(&[1.0, 3.0, 2.0], 1), top[0].1);
    }

    #[test]
    fn odd_inputs_do_no_harm() {
        assert_eq!(logprobs(&[], 3), []);
        assert_eq!(logprobs(&[1.0], 0), []);
        assert_eq!(logprobs(&[f32::NAN], 3), []);
        assert_eq!(logprobs(&[0.0, f32::INFINITY], 2), [(1, 0.0), (0, f32::NEG_INFINITY)]);
        assert_eq!(logprob(&[0.0], 5), f32::NEG_INFINITY);
        assert_eq!(logprob(&[f32::NAN, 0.0], 0), f32::NEG_INFINITY);
    }
}
