//! What the output matrix is multiplied with: its mean, and the directions in which it differs most from that.

use super::linear::{cross, leading};
use crate::model::Model;
use crate::ops::Compute;
use crate::skip::OutputCalibration;

/// Sums over tokens.
pub(super) struct OutputInputs {
    tokens: usize,
    /// `[embedding]`
    sum: Vec<f64>,
    /// Of products, `[embedding, embedding]`.
    squares: Vec<f32>,
}

impl OutputInputs {
    pub fn new(embedding: usize) -> Self {
        Self { tokens: 0, sum: vec![0.0; embedding], squares: vec![0.0; embedding * embedding] }
    }

    /// Adds inputs, `[tokens, embedding]`.
    pub fn add(&mut self, on: Compute<'_>, inputs: &[f32]) {
        let n = self.sum.len();
        for input in inputs.chunks_exact(n) {
            self.sum.iter_mut().zip(input).for_each(|(sum, &x)| *sum += f64::from(x));
        }
        let more = cross(on.kernels, inputs, n, inputs, n);
        self.squares.iter_mut().zip(&more).for_each(|(sum, more)| *sum += more);
        self.tokens += inputs.len() / n;
    }

    /// What they tell; nothing, where the model cannot make use of it.
    pub fn learn(self, model: &Model, on: Compute<'_>) -> Option<OutputCalibration> {
        model.shortlist_bytes().map(|_| self.calibration(on).as_stored())
    }

    fn calibration(mut self, on: Compute<'_>) -> OutputCalibration {
        let (n, tokens) = (self.sum.len(), self.tokens.max(1) as f64);
        let centre: Vec<f32> = self.sum.iter().map(|sum| (sum / tokens) as f32).collect();
        for (row, &a) in self.squares.chunks_exact_mut(n).zip(&centre) {
            row.iter_mut().zip(&centre).for_each(|(square, b)| *square = *square / tokens as f32 - a * b);
        }
        let directions = leading(on.kernels, &self.squares, n, OutputCalibration::DIRECTIONS);
        OutputCalibration { centre, directions }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Kernels;
    use crate::threads::Team;

    /// Inputs that differ from one point in a plane.
    #[test]
    fn finds_the_centre_and_where_inputs_differ_from_it() {
        let (n, tokens) = (64, 500);
        let wave = |i: usize, speed: f32| (i as f32 * speed).sin();
        let centre: Vec<f32> = (0..n).map(|i| 3.0 * wave(i, 0.7)).collect();
        let axes: [Vec<f32>; 2] = [0.31, 1.13].map(|speed| (0..n).map(|i| wave(i, speed)).collect());
        let mut inputs = Vec::new();
        for t in 0..tokens {
            let along = [wave(t, 1.7), wave(t, 2.9)];
            inputs.extend((0..n).map(|i| centre[i] + along[0] * axes[0][i] + along[1] * axes[1][i]));
        }
        let team = Team::new(1).unwrap();
        let on = Compute { team: &team, kernels: Kernels::select(None).unwrap() };
        let mut sums = OutputInputs::new(n);
        inputs.chunks(100 * n).for_each(|some| sums.add(on, some));
        let found = sums.calibration(on);
        for (found, centre) in found.centre.iter().zip(&centre) {
            assert!((found - centre).abs() < 0.02, "{found} for {centre}");
        }
        for axis in &axes {
            let along = found.directions.chunks_exact(n).map(|direction| on.kernels.dot_f32(direction, axis));
            let inside: f32 = along.map(|along| along * along).sum();
            let whole = on.kernels.dot_f32(axis, axis);
            assert!((inside / whole - 1.0).abs() < 1e-3, "{inside} of {whole}");
        }
    }
}
