//! Looking at what the matrices of a layer are multiplied with.

use crate::ops::Inputs;

/// Matrices of a layer that share their inputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Matrices {
    /// Queries, keys and values.
    Qkv,
    /// The attention's output.
    AttentionOutput,
    /// Gate and up of the FFN.
    GateUp,
    /// Down of the FFN.
    Down,
}

impl Matrices {
    /// Names of the tensors, behind `blk.N.`.
    pub fn names(self) -> &'static [&'static str] {
        match self {
            Self::Qkv => &["attn_q.weight", "attn_k.weight", "attn_v.weight"],
            Self::AttentionOutput => &["attn_output.weight"],
            Self::GateUp => &["ffn_gate.weight", "ffn_up.weight"],
            Self::Down => &["ffn_down.weight"],
        }
    }
}

/// Sees the inputs of every matrix product of the layers, in the order of the computation.
pub trait InputObserver: Send {
    /// `rows`: `[tokens, columns]`, unquantised; `columns` of each.
    fn observe(&mut self, layer: usize, matrices: Matrices, rows: &[f32], columns: usize);
}

/// The observer of a sequence, if it has one.
#[derive(Default)]
pub(super) struct Observer(Option<Box<dyn InputObserver>>);

impl Observer {
    pub(super) fn new(observer: Option<Box<dyn InputObserver>>) -> Self {
        Self(observer)
    }

    /// Shows it the inputs of `matrices`.
    pub(super) fn see(&mut self, layer: usize, matrices: Matrices, inputs: &Inputs) {
        if let Some(observer) = &mut self.0 {
            observer.observe(layer, matrices, inputs.values(), inputs.cols());
        }
    }
}
