//! Metadata to one typed struct: the only place that knows the keys of an architecture.

use super::ModelError;
use crate::gguf::Metadata;
use crate::ops::{RopeStyle, attention};
use crate::weights::Weights;

/// Architectures that skiff runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// LLaMA 1-3.3, Mistral, TinyLlama, SmolLM2.
    Llama,
    /// Qwen2 and 2.5.
    Qwen2,
}

/// Shapes and constants of a model.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Config {
    pub architecture: Architecture,
    pub layers: usize,
    pub embedding: usize,
    pub ffn: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub vocab: usize,
    /// Longest context that the model was trained for, in tokens.
    pub trained_context: usize,
    pub norm_eps: f32,
    pub rope: RopeConfig,
}

/// Rotary embedding: base, scaling, and which elements turn.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct RopeConfig {
    pub style: RopeStyle,
    /// Elements of a head that are rotated.
    pub dimensions: usize,
    pub base: f32,
    pub scaling: RopeScaling,
}

/// How positions beyond the original context are reached.
#[derive(Clone, Copy, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum RopeScaling {
    None,
    /// Positions divided by `factor` (Chen et al. 2023).
    Linear {
        factor: f32,
    },
    /// YaRN (Peng et al. 2023): high frequencies kept, low ones divided.
    Yarn {
        factor: f32,
        original_context: f32,
        attention_factor: f32,
        beta_fast: f32,
        beta_slow: f32,
    },
}

/// Largest sane value of a shape: keeps every product of two of them far within 64 bits.
const MAX_SHAPE: usize = 1 << 24;
/// Columns of activations that are quantised together (`kernels::activations::BLOCK`).
const ACTIVATION_BLOCK: usize = 32;

impl Config {
    /// Reads and checks the metadata of a model.
    pub fn read(weights: &Weights) -> Result<Self, ModelError> {
        let meta = weights.metadata();
        let name = meta.str("general.architecture")?;
        let architecture = match name {
            "llama" => Architecture::Llama,
            "qwen2" => Architecture::Qwen2,
            _ => return Err(ModelError::Architecture { found: name.into(), known: "llama, qwen2" }),
        };
        if let Some(experts) = meta.opt_u32(&format!("{name}.expert_count"))?.filter(|&n| n > 0) {
            return Err(unexpected(
                format!("{name}.expert_count"),
                experts,
                "0: mixtures of experts are not supported",
            ));
        }
        let keys = Keys { meta, name };
        let embedding = keys.shape("embedding_length")?;
        let heads = keys.shape("attention.head_count")?;
        let kv_heads = keys.opt_shape("attention.head_count_kv")?.unwrap_or(heads);
        if heads % kv_heads != 0 {
            return Err(unexpected(
                keys.key("attention.head_count_kv"),
                kv_heads,
                "a divisor of the head count",
            ));
        }
        let head_dim = keys.head_dim(embedding, heads)?;
        if let Some(value) = keys.opt_shape("attention.value_length")?.filter(|&v| v != head_dim) {
            return Err(unexpected(keys.key("attention.value_length"), value, "the key length"));
        }
        let norm_eps = meta.f32(&keys.key("attention.layer_norm_rms_epsilon"))?;
        if !(0.0..=1.0).contains(&norm_eps) {
            return Err(unexpected(
                keys.key("attention.layer_norm_rms_epsilon"),
                norm_eps,
                "between 0 and 1",
            ));
        }
        let ffn = keys.shape("feed_forward_length")?;
        keys.whole_blocks("embedding_length", embedding)?;
        keys.whole_blocks("feed_forward_length", ffn)?;
        keys.whole_blocks("attention.key_length", heads * head_dim)?;
        Ok(Self {
            architecture,
            layers: keys.shape("block_count")?,
            embedding,
            ffn,
            heads,
            kv_heads,
            head_dim,
            vocab: vocab_size(weights)?,
            trained_context: keys.opt_shape("context_length")?.unwrap_or(2048),
            norm_eps,
            rope: keys.rope(architecture, head_dim)?,
        })
    }

    /// Shapes of its attention.
    pub fn attention(&self) -> attention::Shape {
        attention::Shape { heads: self.heads, kv_heads: self.kv_heads, head_dim: self.head_dim }
    }

    /// Columns of the queries, and of the attention's output.
    pub fn q_dim(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Columns of the keys, and of the values.
    pub fn kv_dim(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}

fn unexpected(key: String, found: impl ToString, expected: &'static str) -> ModelError {
    ModelError::Config { key, found: found.to_string(), expected }
}

/// Rows of the embedding: the shape in the file, not a key, says how large the vocabulary is.
fn vocab_size(weights: &Weights) -> Result<usize, ModelError> {
    match weights.shape("token_embd.weight") {
        Some(&[_, vocab]) if vocab <= u64::from(u32::MAX) => Ok(vocab as usize),
        Some(shape) => {
            Err(unexpected("token_embd.weight".into(), format!("of shape {shape:?}"), "two dimensions"))
        }
        None => Err(unexpected("token_embd.weight".into(), "missing", "the embedding of the vocabulary")),
    }
}

struct Keys<'a> {
    meta: &'a Metadata,
    name: &'a str,
}

impl Keys<'_> {
    fn key(&self, suffix: &str) -> String {
        format!("{}.{suffix}", self.name)
    }

    fn opt_shape(&self, suffix: &str) -> Result<Option<usize>, ModelError> {
        let key = self.key(suffix);
        match self.meta.opt_usize(&key)? {
            Some(n) if n == 0 || n > MAX_SHAPE => {
                Err(unexpected(key, n, "a positive number of a model's size"))
            }
            n => Ok(n),
        }
    }

    fn shape(&self, suffix: &str) -> Result<usize, ModelError> {
        let key = self.key(suffix);
        self.opt_shape(suffix)?.ok_or_else(|| unexpected(key, "missing", "a number"))
    }

    /// Elements of a head: a key, or else the embedding's columns shared out.
    fn head_dim(&self, embedding: usize, heads: usize) -> Result<usize, ModelError> {
        let Some(head_dim) = self.opt_shape("attention.key_length")? else {
            return match embedding / heads {
                n if n > 0 && n % 2 == 0 && n * heads == embedding => Ok(n),
                _ => Err(unexpected(
                    self.key("attention.head_count"),
                    heads,
                    "a divisor of the embedding's length, for heads of even length",
                )),
            };
        };
        if head_dim % 2 != 0 {
            return Err(unexpected(self.key("attention.key_length"), head_dim, "a positive even number"));
        }
        Ok(head_dim)
    }

    /// Activations are quantised in whole blocks, so every matrix must have that many columns.
    fn whole_blocks(&self, suffix: &str, columns: usize) -> Result<(), ModelError> {
        match columns.is_multiple_of(ACTIVATION_BLOCK) {
            true => Ok(()),
            false => {
                let found = format!("for matrices of {columns} columns");
                Err(unexpected(self.key(suffix), found, "a multiple of 32 columns"))
            }
        }
    }

    fn opt_f32(&self, suffix: &str) -> Result<Option<f32>, ModelError> {
        let key = self.key(suffix);
        match self.meta.opt_f32(&key)? {
            Some(v) if !v.is_finite() || v < 0.0 => Err(unexpected(key, v, "a finite number of at least 0")),
            v => Ok(v),
        }
    }

    fn rope(&self, architecture: Architecture, head_dim: usize) -> Result<RopeConfig, ModelError> {
        let dimensions = self.opt_shape("rope.dimension_count")?.unwrap_or(head_dim);
        if dimensions > head_dim || dimensions % 2 != 0 {
            return Err(unexpected(
                self.key("rope.dimension_count"),
                dimensions,
                "an even number up to the head's",
            ));
        }
        let style = match architecture {
            Architecture::Llama => RopeStyle::Interleaved,
            Architecture::Qwen2 => RopeStyle::Halves,
        };
        let base = self.opt_f32("rope.freq_base")?.unwrap_or(10_000.0);
        Ok(RopeConfig { style, dimensions, base, scaling: self.rope_scaling()? })
    }

    fn rope_scaling(&self) -> Result<RopeScaling, ModelError> {
        // Older files have the linear factor alone, under another key.
        let factor = match self.opt_f32("rope.scaling.factor")? {
            Some(factor) => Some(factor),
            None => self.opt_f32("rope.scale_linear")?,
        };
        let factor = factor.filter(|&f| f > 0.0).unwrap_or(1.0);
        let key = self.key("rope.scaling.type");
        match self.meta.opt_str(&key)? {
            Some("none") => Ok(RopeScaling::None),
            None | Some("linear") if factor == 1.0 => Ok(RopeScaling::None),
            None | Some("linear") => Ok(RopeScaling::Linear { factor }),
            Some("yarn") => Ok(RopeScaling::Yarn {
                factor,
                original_context: match self.opt_shape("rope.scaling.original_context_length")? {
                    Some(n) => n as f32,
                    None => self.opt_shape("context_length")?.unwrap_or(2048) as f32,
                },
                attention_factor: self.opt_f32("rope.scaling.attn_factor")?.unwrap_or(1.0),
                beta_fast: self.opt_f32("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
                beta_slow: self.opt_f32("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
            }),
            Some(other) => Err(unexpected(key, format!("{other:?}"), "none, linear or yarn")),
        }
    }
}

impl RopeConfig {
    /// Angle per position of each rotated pair; `factors` (LLaMA 3.1's `rope_freqs`) divide it.
    pub fn frequencies(&self, factors: Option<&[f32]>) -> Vec<f32> {
        let n = self.dimensions;
        (0..n / 2)
            .map(|i| {
                let plain = self.base.powf(-((2 * i) as f32) / n as f32) / factors.map_or(1.0, |f| f[i]);
                match self.scaling {
                    RopeScaling::None => plain,
                    RopeScaling::Linear { factor } => plain / factor,
                    RopeScaling::Yarn { factor, .. } => {
                        let keep = self.yarn_kept(i);
                        plain / factor * (1.0 - keep) + plain * keep
                    }
                }
            })
            .collect()
    }

    /// What the rotated elements are multiplied by (1, except with YaRN).
    pub fn magnitude(&self) -> f32 {
        match self.scaling {
            RopeScaling::Yarn { factor, attention_factor, .. } => {
                attention_factor * (1.0 + 0.1 * factor.ln())
            }
            _ => 1.0,
        }
    }

    /// 1 where YaRN keeps the frequency of pair `i`, 0 where it divides it, a ramp between (Peng et al.
    /// 2023, section 3.2; bounds as in llama.cpp's `ggml_rope_yarn_corr_dims`).
    fn yarn_kept(&self, i: usize) -> f32 {
        let RopeScaling::Yarn { original_context, beta_fast, beta_slow, .. } = self.scaling else {
            return 1.0;
        };
        let n = self.dimensions as f32;
        let pair_of = |turns: f32| {
            n * (original_context / (turns * std::f32::consts::TAU)).ln() / (2.0 * self.base.ln())
        };
        let low = pair_of(beta_fast).floor().max(0.0);
        let high = pair_of(beta_slow).ceil().min(n - 1.0);
        1.0 - ((i as f32 - low) / (high - low).max(0.001)).clamp(0.0, 1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(scaling: RopeScaling) -> RopeConfig {
        RopeConfig { style: RopeStyle::Interleaved, dimensions: 128, base: 10_000.0, scaling }
    }

    #[test]
    fn frequencies_fall_from_one_by_powers_of_the_base() {
        let f = rope(RopeScaling::None).frequencies(None);
        assert_eq!((f.len(), f[0]), (64, 1.0));
        assert!((f[32] - 0.01).abs() < 1e-6);
        let halved = rope(RopeScaling::None).frequencies(Some(&[2.0; 64]));
        assert!((halved[32] - 0.005).abs() < 1e-6);
        let linear = rope(RopeScaling::Linear { factor: 4.0 }).frequencies(None);
        assert!((linear[0] - 0.25).abs() < 1e-7);
    }

    #[test]
    fn yarn_keeps_fast_pairs_and_divides_slow_ones() {
        let yarn = rope(RopeScaling::Yarn {
            factor: 4.0,
            original_context: 4096.0,
            attention_factor: 1.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
        });
        let (f, plain) = (yarn.frequencies(None), rope(RopeScaling::None).frequencies(None));
        assert_eq!(f[0], plain[0]);
        assert!((f[63] / plain[63] - 0.25).abs() < 1e-6);
        // 32 turns in 4096 positions: pair 20.95; one turn: pair 45.03. Half way: (1 + 1/4) / 2.
        assert!((f[33] / plain[33] - 0.625).abs() < 1e-5);
        assert!((yarn.magnitude() - 1.138_629_4).abs() < 1e-6);
    }
}
