//! The same decision about every FFN, after a warm-up: `cut`, `neurons`, `stand-in` and `mixed`. What a token is spared, the layers
//! then find out from its normed stream.

use std::ops::Range;

use super::{Cut, Decision, SkipPolicy};

/// Decides alike about all layers of a range, by one threshold: calibration makes its units what an error costs, so that
/// one fits all layers ([`CutCalibration`](super::CutCalibration), [`StandInCalibration`](super::StandInCalibration)).
#[derive(Clone, Debug)]
pub struct Uniform {
    name: &'static str,
    decision: Decision,
    warm_up: usize,
    warm: Range<usize>,
    warming_up: bool,
}

impl Uniform {
    fn new(name: &'static str, decision: Decision, warm_up: usize, warm: Range<usize>) -> Self {
        Self { name, decision, warm_up, warm, warming_up: true }
    }

    /// Leaves out columns of the FFNs of the layers `warm` at `threshold`.
    pub fn columns(threshold: f32, warm_up: usize, warm: Range<usize>) -> Self {
        let cut = Cut::Columns { inputs: threshold, inner: threshold };
        Self::new("cut", Decision::Cut(cut), warm_up, warm)
    }

    /// Leaves out neurons of the FFNs of the layers `warm` at `threshold`.
    pub fn neurons(threshold: f32, warm_up: usize, warm: Range<usize>) -> Self {
        let cut = Cut::Neurons { gate: threshold, inner: threshold };
        Self::new("neurons", Decision::Cut(cut), warm_up, warm)
    }

    /// Has stand-ins take the place of the FFNs of the layers `warm` where what that costs is foretold to be `below` a
    /// threshold, a binary logarithm.
    pub fn stand_ins(below: f32, warm_up: usize, warm: Range<usize>) -> Self {
        Self::new("stand-in", Decision::StandIn { below, otherwise: None }, warm_up, warm)
    }

    /// [`stand_ins`](Self::stand_ins), and [`columns`](Self::columns) where none is cheap enough.
    pub fn mixed(below: f32, threshold: f32, warm_up: usize, warm: Range<usize>) -> Self {
        let cut = Cut::Columns { inputs: threshold, inner: threshold };
        Self::new("mixed", Decision::StandIn { below, otherwise: Some(cut) }, warm_up, warm)
    }
}

impl SkipPolicy for Uniform {
    fn name(&self) -> &'static str {
        self.name
    }

    fn begin_token(&mut self, index: usize) {
        self.warming_up = index < self.warm_up;
    }

    fn decide(&mut self, layer: usize) -> Decision {
        if !self.warming_up && self.warm.contains(&layer) { self.decision } else { Decision::Run }
    }

    fn boxed_clone(&self) -> Box<dyn SkipPolicy> {
        Box::new(self.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decides_after_the_warm_up_and_between_cold_regions() {
        let cut = Decision::Cut(Cut::Columns { inputs: 0.5, inner: 0.5 });
        let stand_in = Decision::StandIn { below: -2.0, otherwise: None };
        let otherwise = Some(Cut::Columns { inputs: 0.5, inner: 0.5 });
        let both = Decision::StandIn { below: -2.0, otherwise };
        let policies = [
            ("cut", Uniform::columns(0.5, 2, 1..3), cut),
            ("stand-in", Uniform::stand_ins(-2.0, 2, 1..3), stand_in),
            ("mixed", Uniform::mixed(-2.0, 0.5, 2, 1..3), both),
        ];
        for (name, mut policy, taken) in policies {
            assert_eq!(policy.name(), name);
            let mut decisions = |index| {
                policy.begin_token(index);
                [0, 1, 2, 3].map(|layer| policy.decide(layer))
            };
            assert_eq!(decisions(1), [Decision::Run; 4]);
            assert_eq!(decisions(2), [Decision::Run, taken, taken, Decision::Run]);
        }
    }
}
