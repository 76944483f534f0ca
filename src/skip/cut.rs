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
//! read. What is not far above the threshold, below [`CutPlan::coarse`] times it, meets its column coarsely: by the two upper bits of
//! each code, which is a tenth of the error of leaving it out for half of the bytes. Centres and weights belong to a layer and come from a calibration ([`CutPlan`]); the thresholds are the
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
    /// Up to how many times a threshold columns are read coarsely where that saves half of their bytes (more where it saves
    /// more); 0: none.
    pub coarse: f32,
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

impl CutPlan {
    /// The factor that is best where a coarse column has half of the bytes, and a tenth of the error of none at all, which the
    /// codes of 4 bits of common types come to.
    ///
    /// An entry whose column would add an error `e` costs `e` if it is left out, `e / 10` and half a column's bytes if that is
    /// read coarsely, and a column's bytes else. Where a column's bytes are worth `b`, the first is best up to `e = b / 1.8`, the
    /// last from `e = 5 b` on: nine times as much, and three times the entry.
    pub const COARSE: f32 = 3.0;
}

impl Cut {
    /// The threshold for the inputs of down.
    pub fn inner(self) -> f32 {
        match self {
            Self::Columns { inner, .. } | Self::Neurons { inner, .. } => inner,
        }
    }

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

    /// Of each 32 entries from `first` on, which centre and cut have been applied to, the bits of those below a threshold:
    /// `mark(n, bits)` is given those of the `n`-th 32 of all.
    ///
    /// # Panics
    /// If `first` is no multiple of 32, or the weight shorter than that.
    pub fn below(&self, threshold: f32, first: usize, x: &[f32], mut mark: impl FnMut(usize, u32)) {
        assert!(first.is_multiple_of(32));
        let weight = if self.weight.is_empty() { &[] } else { &self.weight[first..][..x.len()] };
        let mut weights = weight.chunks(32);
        for (n, x) in x.chunks(32).enumerate() {
            let mut scores = [f32::INFINITY; 32];
            scores.iter_mut().zip(x).for_each(|(score, x)| *score = x.abs());
            scores.iter_mut().zip(weights.next().unwrap_or(&[])).for_each(|(score, w)| *score *= w);
            let bits = scores.iter().enumerate();
            mark(first / 32 + n, bits.fold(0, |bits, (i, &score)| bits | u32::from(score < threshold) << i));
        }
    }

    /// Of entries that centre and cut have been applied to, those below a threshold, or the others; zero in the places of the rest.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn select(&self, threshold: f32, below: bool, x: &[f32], out: &mut [f32]) {
        assert!(x.len() == out.len() && (self.weight.is_empty() || self.weight.len() == x.len()));
        let weights = self.weight.iter().copied().chain(std::iter::repeat(1.0));
        for ((out, &x), w) in out.iter_mut().zip(x).zip(weights) {
            *out = if (x.abs() * w < threshold) == below { x } else { 0.0 };
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
    fn entries_are_told_apart_by_a_threshold() {
        let side = CutSide { centre: Vec::new(), weight: (0..70).map(|j| j as f32).collect() };
        let mut x = [1.0; 70];
        x[40] = f32::NAN;
        let mut found = Vec::new();
        side.below(35.0, 0, &x, |n, bits| found.push((n, bits)));
        assert_eq!(found, [(0, u32::MAX), (1, 7), (2, 0)], "from 35 on, and what is no number, is not below");
        found.clear();
        side.below(35.0, 32, &x[32..40], |n, bits| found.push((n, bits)));
        assert_eq!(found, [(1, 7)]);
        let [mut below, mut others] = [[f32::NAN; 70]; 2];
        side.select(35.0, true, &x, &mut below);
        side.select(35.0, false, &x, &mut others);
        for j in 0..70 {
            assert_eq!(below[j], if j < 35 { 1.0 } else { 0.0 }, "{j}");
            assert_eq!(others[j].to_bits(), if j < 35 { 0 } else { x[j].to_bits() }, "{j}");
        }
        let plain = CutSide::default();
        plain.below(2.0, 0, &[1.0, 3.0], |_, bits| assert_eq!(bits, 1));
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
