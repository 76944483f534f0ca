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
//! policy's choice for a token ([`Cut`]), which the layer multiplies with what it sees in the token itself ([`Depth`]).
//!
//! Up can only save columns or rows. In place of its inputs' columns, the rows of neurons can be left out that the gate
//! has told to matter little: `|silu(gate[j])| * gate_weight[j] < threshold`.

/// What the entries of one side of an FFN are compared by. An empty vector: zeros for `centre`, ones for `weight`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CutSide {
    /// Value that stands for an entry that is left out.
    pub centre: Vec<f32>,
    /// How much a unit of an entry matters: the norm of its column, for instance.
    pub weight: Vec<f32>,
}

/// How deep a token may be cut: a linear guess, from the normed stream, at how much an error would change what the
/// model says. Where the next token is as good as certain, hardly anything does.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Depth {
    /// `[embedding]`; empty: all tokens alike.
    pub weight: Vec<f32>,
    /// Added to the product with the weight.
    pub bias: f32,
}

impl Depth {
    /// Largest binary logarithm of a factor: no token is cut at more than 4 times the threshold, or less than a quarter.
    const LIMIT: f32 = 2.0;

    /// What thresholds are multiplied with, where `product` is that of the weight and the token's normed stream.
    pub fn factor(&self, product: f32) -> f32 {
        (product + self.bias).clamp(-Self::LIMIT, Self::LIMIT).exp2()
    }
}

/// What is cut in a layer's FFN.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerCut {
    /// Factor of the thresholds.
    pub depth: Depth,
    /// Inputs of gate and up, `[embedding]`.
    pub inputs: CutSide,
    /// Inputs of down, `[ffn]`: the neurons.
    pub inner: CutSide,
    /// How much a unit of a neuron's `silu(gate)` matters, `[ffn]`: the weight of what it is expected to be multiplied
    /// with. Empty: ones.
    pub gate: Vec<f32>,
}

impl LayerCut {
    /// Whether `silu(gate)` of neuron `j` is not below the threshold; what is no number is not.
    pub fn wants_neuron(&self, threshold: f32, j: usize, gate: f32) -> bool {
        let below = gate.abs() * self.gate.get(j).copied().unwrap_or(1.0) < threshold;
        !below
    }

    /// From `silu(gate)` of all neurons in `inner` to what [`list_neurons`](Self::list_neurons) and `up` make of them; how
    /// many are wanted.
    pub fn meet(&self, threshold: f32, inner: &mut [f32], up: &[f32]) -> u32 {
        let mut wanted = 0;
        for (j, (inner, up)) in inner.iter_mut().zip(up).enumerate() {
            if self.wants_neuron(threshold, j, *inner) {
                *inner *= up;
                wanted += 1;
            } else {
                *inner = self.inner.centre.get(j).copied().unwrap_or(0.0);
            }
        }
        wanted
    }

    /// Lists the neurons from `first` on, as they are counted from there, that are [wanted](Self::wants_neuron), and writes
    /// what the others count as, the centre, to all of `inner`.
    pub fn list_neurons(
        &self,
        threshold: f32,
        first: usize,
        gate: &[f32],
        list: &mut Vec<u32>,
        inner: &mut [f32],
    ) {
        list.clear();
        list.extend((0..gate.len() as u32).filter(|&j| {
            let j = j as usize;
            self.wants_neuron(threshold, first + j, gate[j])
        }));
        match self.inner.centre.get(first..) {
            Some(centre) if !self.inner.centre.is_empty() => inner.copy_from_slice(&centre[..inner.len()]),
            _ => inner.fill(0.0),
        }
    }
}

/// What may be cut in a model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CutPlan {
    /// For each layer; `None`: its FFN always runs in full.
    pub layers: Vec<Option<LayerCut>>,
}

/// Thresholds of a cut, for a layer and a token. Nothing is below a threshold of 0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Cut {
    /// Columns of all three matrices.
    Columns {
        /// For the inputs of gate and up.
        inputs: f32,
        /// For the inputs of down.
        inner: f32,
    },
    /// Rows of up and columns of down.
    Neurons {
        /// For what the gate tells of the neurons.
        gate: f32,
        /// For the inputs of down.
        inner: f32,
    },
}

impl Cut {
    /// The threshold for the inputs of gate and up.
    pub fn inputs(self) -> f32 {
        match self {
            Self::Columns { inputs, .. } => inputs,
            Self::Neurons { .. } => 0.0,
        }
    }

    /// All thresholds multiplied with `factor`.
    pub fn times(self, factor: f32) -> Self {
        match self {
            Self::Columns { inputs, inner } => {
                Self::Columns { inputs: inputs * factor, inner: inner * factor }
            }
            Self::Neurons { gate, inner } => Self::Neurons { gate: gate * factor, inner: inner * factor },
        }
    }
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
    fn neurons_whose_gate_tells_little_are_not_listed_and_count_as_their_centre() {
        let inner = CutSide { centre: vec![9.0, 0.5, 0.5, 1.0, 1.0], weight: vec![1.0; 5] };
        let layer = LayerCut { inner, gate: vec![9.0, 1.0, 4.0, 1.0, 1.0], ..LayerCut::default() };
        let (mut list, mut inner) = (vec![7], [0.0; 4]);
        layer.list_neurons(2.0, 1, &[-2.0, 0.25, f32::NAN, 3.0], &mut list, &mut inner);
        assert_eq!(list, [0, 2, 3]);
        assert_eq!(inner, [0.5, 0.5, 1.0, 1.0]);
        layer.inner.apply_from(1.0, 1, &mut inner);
        assert_eq!(inner, [0.0; 4]);
        LayerCut::default().list_neurons(0.0, 3, &[0.0, -1.0], &mut list, &mut inner[..2]);
        assert_eq!((&list[..], &inner[..2]), (&[0, 1][..], &[0.0; 2][..]), "nothing is below zero");
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
