//! The rule of FFN-SkipLLM (Jaiswal et al. 2024, section 3, algorithm 1).

use super::{Decision, SkipPolicy};

/// Once an FFN of the warm region changes the direction of the residual stream so little that
/// `cos(h, h') >= threshold`, the next `k` FFNs of the token are skipped.
///
/// The first `warm_up` tokens and the cold regions - layers below `cold.0` and from `cold.1` on -
/// run at full strength. The skipping state is the token's own: each token starts with none.
#[derive(Clone, Debug)]
pub struct FfnSkip {
    threshold: f32,
    k: usize,
    warm_up: usize,
    cold: (usize, usize),
    /// FFNs still to be skipped, for the current token.
    budget: usize,
    warming_up: bool,
}

impl FfnSkip {
    /// `cold`: first layer that may be skipped, and first layer after the last that may.
    pub fn new(threshold: f32, k: usize, warm_up: usize, cold: (usize, usize)) -> Self {
        Self { threshold, k, warm_up, cold, budget: 0, warming_up: true }
    }

    fn is_warm(&self, layer: usize) -> bool {
        !self.warming_up && (self.cold.0..self.cold.1).contains(&layer)
    }
}

impl SkipPolicy for FfnSkip {
    fn name(&self) -> &'static str {
        "ffn-skip"
    }

    fn begin_token(&mut self, index: usize) {
        self.warming_up = index < self.warm_up;
        self.budget = 0;
    }

    fn decide(&mut self, layer: usize) -> Decision {
        if self.is_warm(layer) && self.budget > 0 {
            self.budget -= 1;
            Decision::Skip
        } else {
            Decision::Run
        }
    }

    fn observe(&mut self, layer: usize, cosine: f32) {
        // A NaN compares false: a broken stream is never a reason to skip.
        if self.is_warm(layer) && cosine >= self.threshold {
            self.budget = self.k;
        }
    }

    fn observes(&self) -> bool {
        true
    }

    fn reset(&mut self) {
        self.budget = 0;
        self.warming_up = true;
    }

    fn boxed_clone(&self) -> Box<dyn SkipPolicy> {
        Box::new(self.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Layers that a token with these cosines skips.
    fn skipped(policy: &mut FfnSkip, index: usize, cosines: &[f32]) -> Vec<usize> {
        policy.begin_token(index);
        let mut skipped = Vec::new();
        for (layer, &cosine) in cosines.iter().enumerate() {
            match policy.decide(layer) {
                Decision::Skip => skipped.push(layer),
                _ => policy.observe(layer, cosine),
            }
        }
        skipped
    }

    #[test]
    fn skips_the_next_k_after_a_high_cosine() {
        let cosines = [0.99, 0.99, 0.5, 0.99, 0.99, 0.99, 0.99, 0.99];
        assert_eq!(skipped(&mut FfnSkip::new(0.98, 1, 0, (0, 8)), 0, &cosines), [1, 4, 6]);
        assert_eq!(skipped(&mut FfnSkip::new(0.98, 3, 0, (0, 8)), 0, &cosines), [1, 2, 3, 5, 6, 7]);
        assert!(skipped(&mut FfnSkip::new(0.999, 3, 0, (0, 8)), 0, &cosines).is_empty());
    }

    #[test]
    fn leaves_cold_regions_and_the_warm_up_alone() {
        let cosines = [0.99; 8];
        let mut policy = FfnSkip::new(0.98, 4, 2, (2, 6));
        assert!(skipped(&mut policy, 0, &cosines).is_empty());
        assert!(skipped(&mut policy, 1, &cosines).is_empty());
        assert_eq!(skipped(&mut policy, 2, &cosines), [3, 4, 5]);
        assert_eq!(skipped(&mut policy, 3, &cosines), [3, 4, 5], "no state from the token before");
    }

    #[test]
    fn a_nan_is_no_reason_to_skip() {
        let mut policy = FfnSkip::new(0.98, 4, 0, (0, 4));
        assert!(skipped(&mut policy, 0, &[f32::NAN; 4]).is_empty());
    }
}
