//! Cuts: leaving single inputs and neurons out of an FFN instead of the whole block.
//!
//! Entry `j` of a vector that meets a matrix (the normed stream before gate and up, the inner activations before
//! down) is left out if
//!
//! ```text
//! |x[j] - centre[j]| * weight[j] < threshold
//! ```
//!
//! What is left out counts as `centre[j]`, whose product with the matrix is known beforehand; its column is not
//! read. Centres and weights belong to a layer and come from a calibration ([`CutPlan`]); the thresholds are the
//! policy's choice for a token ([`Cut`]).

/// What the entries of one side of an FFN are compared by. An empty vector: zeros for `centre`, ones for `weight`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CutSide {
    /// Value that stands for an entry that is left out.
    pub centre: Vec<f32>,
    /// How much a unit of an entry matters: the norm of its column, for instance.
    pub weight: Vec<f32>,
}

/// The two sides of a layer's FFN.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerCut {
    /// Inputs of gate and up, `[embedding]`.
    pub inputs: CutSide,
    /// Inputs of down, `[ffn]`: the neurons.
    pub inner: CutSide,
}

/// What may be cut in a model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CutPlan {
    /// For each layer; `None`: its FFN always runs in full.
    pub layers: Vec<Option<LayerCut>>,
}

/// Thresholds of a cut, for a layer and a token. Nothing is below a threshold of 0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cut {
    /// For the inputs of gate and up.
    pub inputs: f32,
    /// For the inputs of down.
    pub inner: f32,
}

impl CutSide {
    /// Whether anything but zero stands for what is left out.
    pub fn is_centred(&self) -> bool {
        self.centre.iter().any(|&c| c != 0.0)
    }

    /// Subtracts the centre and sets to zero what is below the threshold: the vector that the matrix then meets.
    ///
    /// # Panics
    /// If the vectors of this side are neither empty nor as long as `x`.
    pub fn apply(&self, threshold: f32, x: &mut [f32]) {
        let whole = |v: &[f32]| v.is_empty() || v.len() == x.len();
        assert!(whole(&self.centre) && whole(&self.weight));
        self.apply_from(threshold, 0, x);
    }

    /// [`apply`](Self::apply) to a part of a vector, its entries from `first` on.
    ///
    /// # Panics
    /// If the vectors of this side are neither empty nor so long.
    pub fn apply_from(&self, threshold: f32, first: usize, x: &mut [f32]) {
        if !self.centre.is_empty() {
            let centre = &self.centre[first..][..x.len()];
            x.iter_mut().zip(centre).for_each(|(x, c)| *x -= c);
        }
        if self.weight.is_empty() {
            x.iter_mut().for_each(|x| *x = if x.abs() < threshold { 0.0 } else { *x });
            return;
        }
        let weight = &self.weight[first..][..x.len()];
        for (x, w) in x.iter_mut().zip(weight) {
            *x = if x.abs() * w < threshold { 0.0 } else { *x };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_below_the_threshold_count_as_their_centre() {
        let side = CutSide { centre: vec![1.0, 0.0, 2.0, 0.0], weight: vec![1.0, 4.0, 1.0, 1.0] };
        let mut x = [1.5, 0.25, 4.0, -0.75];
        side.apply(1.0, &mut x);
        assert_eq!(x, [0.0, 0.25, 2.0, 0.0]);
        assert!(side.is_centred());
    }

    #[test]
    fn nothing_is_below_zero_and_a_nan_is_kept() {
        let mut x = [0.0, -1.0, f32::NAN];
        CutSide::default().apply(0.0, &mut x);
        assert_eq!(x[..2], [0.0, -1.0]);
        CutSide::default().apply(2.0, &mut x);
        assert_eq!(x[..2], [0.0, 0.0]);
        assert!(x[2].is_nan(), "a broken stream stays visible");
        assert!(!CutSide::default().is_centred());
    }
}
