//! The weights of a layer, by the names that GGUF files give them.

use super::{Config, ModelError};
use crate::weights::{Tensor, Weights};

/// One transformer layer.
pub struct Layer {
    /// Attention block.
    pub attention: Attention,
    /// Feed-forward block.
    pub ffn: Ffn,
}

/// Attention weights; shapes as `[outputs, inputs]`.
#[allow(missing_docs)]
pub struct Attention {
    /// `[embedding]`
    pub norm: Vec<f32>,
    /// `[q_dim, embedding]`
    pub q: Tensor,
    /// `[kv_dim, embedding]`
    pub k: Tensor,
    /// `[kv_dim, embedding]`
    pub v: Tensor,
    /// `[q_dim + 2 kv_dim]`, of q, k and v; empty where the model has none.
    pub qkv_bias: Vec<f32>,
    /// `[embedding, q_dim]`
    pub output: Tensor,
}

/// SwiGLU feed-forward weights; shapes as `[outputs, inputs]`.
#[allow(missing_docs)]
pub struct Ffn {
    /// `[embedding]`
    pub norm: Vec<f32>,
    /// `[ffn, embedding]`
    pub gate: Tensor,
    /// `[ffn, embedding]`
    pub up: Tensor,
    /// `[embedding, ffn]`
    pub down: Tensor,
}

impl Layer {
    /// Layer `index` of a model.
    pub fn read(weights: &Weights, config: &Config, index: usize) -> Result<Self, ModelError> {
        let (d, ffn) = (config.embedding, config.ffn);
        let (q, kv) = (config.q_dim(), config.kv_dim());
        let name = |suffix: &str| format!("blk.{index}.{suffix}");
        let matrix = |suffix: &str, rows, cols| weights.tensor(&name(suffix), rows, cols);
        Ok(Self {
            attention: Attention {
                norm: weights.vector(&name("attn_norm.weight"), d)?,
                q: matrix("attn_q.weight", q, d)?,
                k: matrix("attn_k.weight", kv, d)?,
                v: matrix("attn_v.weight", kv, d)?,
                qkv_bias: qkv_bias(weights, &name, q, kv)?,
                output: matrix("attn_output.weight", d, q)?,
            },
            ffn: Ffn {
                norm: weights.vector(&name("ffn_norm.weight"), d)?,
                gate: matrix("ffn_gate.weight", ffn, d)?,
                up: matrix("ffn_up.weight", ffn, d)?,
                down: matrix("ffn_down.weight", d, ffn)?,
            },
        })
    }
}

/// The biases of q, k and v as one vector; one that is missing counts as zeros.
fn qkv_bias(
    weights: &Weights,
    name: &impl Fn(&str) -> String,
    q: usize,
    kv: usize,
) -> Result<Vec<f32>, ModelError> {
    let parts = [("attn_q.bias", q), ("attn_k.bias", kv), ("attn_v.bias", kv)];
    let found = parts.map(|(suffix, n)| weights.opt_vector(&name(suffix), n));
    let mut bias = Vec::new();
    let mut any = false;
    for (part, (_, n)) in found.into_iter().zip(parts) {
        let part = part?;
        any |= part.is_some();
        bias.extend(part.unwrap_or_else(|| vec![0.0; n]));
    }
    Ok(if any { bias } else { Vec::new() })
}

impl Attention {
    /// Bytes of the matrices.
    pub fn bytes(&self) -> usize {
        [&self.q, &self.k, &self.v, &self.output].iter().map(|t| t.bytes()).sum()
    }
}

impl Ffn {
    /// Bytes of the matrices.
    pub fn bytes(&self) -> usize {
        [&self.gate, &self.up, &self.down].iter().map(|t| t.bytes()).sum()
    }
}
