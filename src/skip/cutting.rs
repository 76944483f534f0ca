//! Cutting every FFN by the same thresholds, after a warm-up: `cut` and `neurons`.

use std::ops::Range;

use super::{Cut, Decision, SkipPolicy};

/// Leaves out of each FFN the inputs and neurons that would add least for this token: those below thresholds in
/// units of the calibration's weights, which make one threshold fit all layers and both sides
/// ([`CutCalibration`](super::CutCalibration)).
#[derive(Clone, Debug)]
pub struct Cutting {
    cut: Cut,
    warm_up: usize,
    warm: Range<usize>,
    warming_up: bool,
}

impl Cutting {
    /// Leaves out columns of the FFNs of the layers `warm` at `threshold`.
    pub fn columns(threshold: f32, warm_up: usize, warm: Range<usize>) -> Self {
        let cut = Cut::Columns { inputs: threshold, inner: threshold };
        Self { cut, warm_up, warm, warming_up: true }
    }

    /// Leaves out neurons of the FFNs of the layers `warm` at `threshold`.
    pub fn neurons(threshold: f32, warm_up: usize, warm: Range<usize>) -> Self {
        let cut = Cut::Neurons { gate: threshold, inner: threshold };
        Self { cut, warm_up, warm, warming_up: true }
    }
}

impl SkipPolicy for Cutting {
    fn name(&self) -> &'static str {
        match self.cut {
            Cut::Columns { .. } => "cut",
            Cut::Neurons { .. } => "neurons",
        }
    }

    fn begin_token(&mut self, index: usize) {
        self.warming_up = index < self.warm_up;
    }

    fn decide(&mut self, layer: usize) -> Decision {
        let cuts = !self.warming_up && self.warm.contains(&layer);
        if cuts { Decision::Cut(self.cut) } else { Decision::Run }
    }

    fn boxed_clone(&self) -> Box<dyn SkipPolicy> {
        Box::new(self.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuts_after_the_warm_up_and_between_cold_regions() {
        let mut policy = Cutting::columns(0.5, 2, 1..3);
        let cut = Decision::Cut(Cut::Columns { inputs: 0.5, inner: 0.5 });
        let decisions = |policy: &mut Cutting, index| {
            policy.begin_token(index);
            [0, 1, 2, 3].map(|layer| policy.decide(layer))
        };
        assert_eq!(decisions(&mut policy, 1), [Decision::Run; 4]);
        assert_eq!(decisions(&mut policy, 2), [Decision::Run, cut, cut, Decision::Run]);
    }
}
