//! config.json: the shape of a model, its keys in GGUF, and the names of its tensors on both sides.

use serde_json::Value;
use skiff::gguf::Builder;

use super::json::{JsonFile, shortened};
use crate::ConvertError;

/// Far beyond any model; keeps every product of two shapes within 64 bits.
const MAX_SHAPE: usize = 1 << 24;

/// `architectures` that are LLaMA's, and Qwen2's (biases, no permutation).
const LLAMA: [&str; 3] = ["LlamaForCausalLM", "LLaMAForCausalLM", "MistralForCausalLM"];
const QWEN2: [&str; 1] = ["Qwen2ForCausalLM"];

/// What config.json says.
#[derive(Debug)]
pub(super) struct HfConfig {
    /// `general.architecture`
    pub architecture: &'static str,
    pub name: Option<String>,
    pub layers: usize,
    embedding: usize,
    ffn: usize,
    pub heads: usize,
    pub kv_heads: usize,
    head_dim: usize,
    /// Whether the head's length is said and not derived.
    head_dim_given: bool,
    pub vocab: usize,
    context: usize,
    norm_eps: f32,
    rope_base: f32,
    rope: Rope,
    /// Whether the output matrix is the embedding.
    pub tied: bool,
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub pad: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Rope {
    Plain,
    Linear {
        factor: f32,
    },
    Yarn {
        factor: f32,
        original: Option<usize>,
        /// On top of [`yarn_magnitude`], which GGUF's readers compute themselves.
        attention: Option<f32>,
        fast: Option<f32>,
        slow: Option<f32>,
    },
    Llama3 {
        factor: f32,
        low: f32,
        high: f32,
        original: f32,
    },
}

/// A tensor's place on both sides.
pub(super) struct TensorRow {
    pub hf: String,
    pub gguf: String,
    /// Rows and columns, or the length.
    pub shape: Vec<usize>,
    /// Heads whose rows change from halves to pairs.
    pub permute_heads: Option<usize>,
    pub optional: bool,
}

impl HfConfig {
    pub(super) fn read(json: &JsonFile) -> Result<Self, ConvertError> {
        let architecture = architecture(json)?;
        let size = |key: &str| json.required_size(key, MAX_SHAPE);
        let (embedding, heads) = (size("hidden_size")?, size("num_attention_heads")?);
        let kv_heads = json.size("num_key_value_heads", MAX_SHAPE)?.unwrap_or(heads);
        let given = json.size("head_dim", MAX_SHAPE)?;
        let head_dim = given.unwrap_or(embedding / heads);
        if !heads.is_multiple_of(kv_heads) {
            return Err(json.wrong(
                "num_key_value_heads",
                format!("is {kv_heads}, which does not divide {heads} heads"),
            ));
        }
        if head_dim == 0 || !head_dim.is_multiple_of(2) || given.is_none() && head_dim * heads != embedding {
            return Err(json
                .wrong("num_attention_heads", format!("is {heads}: no even share of {embedding} columns")));
        }
        if let Some(activation) = json.str("hidden_act").filter(|&a| a != "silu") {
            return Err(json.wrong("hidden_act", format!("is {activation:?}: only silu is supported")));
        }
        let rope = json.get("rope_scaling").or_else(|| json.get("rope_parameters"));
        let base = match json.number("rope_theta")? {
            Some(base) => Some(base),
            // transformers 5 moved it.
            None => rope.map_or(Ok(None), |rope| json.number_in(rope, "rope_theta"))?,
        };
        // transformers' default where the key is missing: tied for none of these classes.
        let tied = json.bool("tie_word_embeddings").unwrap_or(false);
        let id = |key: &str| json.get(key).and_then(first_id);
        Ok(Self {
            architecture,
            name: json.str("_name_or_path").filter(|name| !name.is_empty()).map(str::to_owned),
            layers: size("num_hidden_layers")?,
            embedding,
            ffn: size("intermediate_size")?,
            heads,
            kv_heads,
            head_dim,
            head_dim_given: given.is_some_and(|n| n * heads != embedding),
            vocab: size("vocab_size")?,
            context: json.size("max_position_embeddings", usize::MAX)?.unwrap_or(2048).min(u32::MAX as usize),
            norm_eps: json.number("rms_norm_eps")?.unwrap_or(1e-6),
            rope_base: base.unwrap_or(10_000.0),
            rope: rope.map_or(Ok(Rope::Plain), |rope| Rope::read(json, rope))?,
            tied,
            bos: id("bos_token_id"),
            eos: id("eos_token_id"),
            pad: id("pad_token_id"),
        })
    }

    /// The keys of the architecture, in the converter's order.
    pub(super) fn write(&self, builder: &mut Builder, file_type: u32) -> Result<(), ConvertError> {
        let key = |suffix: &str| format!("{}.{suffix}", self.architecture);
        // All are below 2^24, or cut to 32 bits.
        for (suffix, value) in [
            ("block_count", self.layers),
            ("context_length", self.context),
            ("embedding_length", self.embedding),
            ("feed_forward_length", self.ffn),
            ("attention.head_count", self.heads),
            ("attention.head_count_kv", self.kv_heads),
        ] {
            builder.insert(key(suffix), value as u32)?;
        }
        match self.rope {
            Rope::Plain | Rope::Llama3 { .. } => {}
            Rope::Linear { factor } => {
                builder.insert(key("rope.scaling.type"), "linear")?;
                builder.insert(key("rope.scaling.factor"), factor)?;
            }
            Rope::Yarn { factor, original, attention, fast, slow } => {
                builder.insert(key("rope.scaling.type"), "yarn")?;
                builder.insert(key("rope.scaling.factor"), factor)?;
                let original = original.unwrap_or(self.context) as u32;
                builder.insert(key("rope.scaling.original_context_length"), original)?;
                for (suffix, value) in
                    [("attn_factor", attention), ("yarn_beta_fast", fast), ("yarn_beta_slow", slow)]
                {
                    if let Some(value) = value {
                        builder.insert(key(&format!("rope.scaling.{suffix}")), value)?;
                    }
                }
            }
        }
        builder.insert(key("rope.freq_base"), self.rope_base)?;
        builder.insert(key("attention.layer_norm_rms_epsilon"), self.norm_eps)?;
        if self.head_dim_given {
            builder.insert(key("attention.key_length"), self.head_dim as u32)?;
            builder.insert(key("attention.value_length"), self.head_dim as u32)?;
        }
        builder.insert("general.file_type", file_type)?;
        if self.architecture == "llama" {
            builder.insert(key("vocab_size"), self.vocab as u32)?;
            builder.insert(key("rope.dimension_count"), self.head_dim as u32)?;
        }
        Ok(())
    }

    /// Every tensor that the model may have.
    pub(super) fn tensors(&self) -> Vec<TensorRow> {
        let (d, q, kv) = (self.embedding, self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let mut rows = Vec::new();
        let mut row = |hf: String, gguf: String, shape: Vec<usize>, permute_heads, optional| {
            rows.push(TensorRow { hf, gguf, shape, permute_heads, optional });
        };
        row("model.embed_tokens.weight".into(), "token_embd.weight".into(), vec![self.vocab, d], None, false);
        // llama.cpp turns neighbours where transformers turns halves; for `qwen2` both turn halves.
        let pairs = |heads| (self.architecture == "llama").then_some(heads);
        for i in 0..self.layers {
            for (hf, gguf, shape, permute, optional) in [
                ("input_layernorm.weight", "attn_norm.weight", vec![d], None, false),
                ("mlp.down_proj.weight", "ffn_down.weight", vec![d, self.ffn], None, false),
                ("mlp.gate_proj.weight", "ffn_gate.weight", vec![self.ffn, d], None, false),
                ("mlp.up_proj.weight", "ffn_up.weight", vec![self.ffn, d], None, false),
                ("post_attention_layernorm.weight", "ffn_norm.weight", vec![d], None, false),
                ("self_attn.k_proj.bias", "attn_k.bias", vec![kv], pairs(self.kv_heads), true),
                ("self_attn.k_proj.weight", "attn_k.weight", vec![kv, d], pairs(self.kv_heads), false),
                ("self_attn.o_proj.weight", "attn_output.weight", vec![d, q], None, false),
                ("self_attn.q_proj.bias", "attn_q.bias", vec![q], pairs(self.heads), true),
                ("self_attn.q_proj.weight", "attn_q.weight", vec![q, d], pairs(self.heads), false),
                ("self_attn.v_proj.bias", "attn_v.bias", vec![kv], None, true),
                ("self_attn.v_proj.weight", "attn_v.weight", vec![kv, d], None, false),
            ] {
                row(format!("model.layers.{i}.{hf}"), format!("blk.{i}.{gguf}"), shape, permute, optional);
            }
        }
        row("model.norm.weight".into(), "output_norm.weight".into(), vec![d], None, false);
        if !self.tied {
            row("lm_head.weight".into(), "output.weight".into(), vec![self.vocab, d], None, false);
        }
        rows
    }

    /// What LLaMA 3.1's scaling divides each frequency by (`_compute_llama3_parameters` of transformers).
    pub(super) fn rope_factors(&self) -> Result<Option<Vec<f32>>, ConvertError> {
        let Rope::Llama3 { factor, low, high, original } = self.rope else { return Ok(None) };
        let (base, n) = (f64::from(self.rope_base), self.head_dim as f64);
        let (factor, low, high, original) =
            (f64::from(factor), f64::from(low), f64::from(high), f64::from(original));
        let divisor = |i: usize| {
            let wavelength = std::f64::consts::TAU * base.powf((2 * i) as f64 / n);
            if wavelength < original / high {
                1.0
            } else if wavelength > original / low {
                factor
            } else {
                let smooth = (original / wavelength - low) / (high - low);
                1.0 / ((1.0 - smooth) / factor + smooth)
            }
        };
        Ok(Some((0..self.head_dim / 2).map(|i| divisor(i) as f32).collect()))
    }
}

fn architecture(json: &JsonFile) -> Result<&'static str, ConvertError> {
    let names = json.get("architectures").and_then(Value::as_array);
    let name = names.and_then(|names| names.first()).and_then(Value::as_str);
    match name {
        Some(name) if LLAMA.contains(&name) => Ok("llama"),
        Some(name) if QWEN2.contains(&name) => Ok("qwen2"),
        Some(name) => {
            let known = [&LLAMA[..], &QWEN2].concat().join(", ");
            Err(json.wrong("architectures", format!("is {name:?}; known are {known}")))
        }
        None => Err(json.wrong("architectures", "is missing")),
    }
}

/// An id, or the first of several.
fn first_id(value: &Value) -> Option<u32> {
    let value = value.as_array().map_or(Some(value), |ids| ids.first())?;
    value.as_u64().and_then(|id| id.try_into().ok())
}

/// What YaRN multiplies rotated elements by (Peng et al. 2023, equation 22; `get_mscale` of transformers).
fn yarn_magnitude(factor: f32, scale: f32) -> f32 {
    1.0 + 0.1 * scale * factor.ln()
}

impl Rope {
    fn read(json: &JsonFile, rope: &Value) -> Result<Self, ConvertError> {
        let number = |key: &str| json.number_in(rope, key);
        let positive = |key: &str, default: f32| match number(key)?.unwrap_or(default) {
            n if n > 0.0 => Ok(n),
            n => Err(json.wrong(key, format!("is {n}, not positive"))),
        };
        let original = || -> Result<Option<usize>, ConvertError> {
            let value = rope.get("original_max_position_embeddings").filter(|v| !v.is_null());
            let Some(value) = value else { return Ok(None) };
            let n = value.as_u64().filter(|&n| n > 0 && n <= u64::from(u32::MAX));
            let wrong = || json.wrong("original_max_position_embeddings", format!("is {}", shortened(value)));
            n.map(|n| Some(n as usize)).ok_or_else(wrong)
        };
        let kind =
            rope.get("rope_type").or_else(|| rope.get("type")).and_then(Value::as_str).unwrap_or("default");
        match kind {
            "default" => Ok(Self::Plain),
            "linear" => Ok(Self::Linear { factor: positive("factor", 1.0)? }),
            "yarn" => {
                let factor = match positive("factor", 1.0)? {
                    n if n >= 1.0 => n,
                    n => return Err(json.wrong("factor", format!("is {n}, below 1"))),
                };
                let whole = match number("attention_factor")? {
                    None => number("mscale")?
                        .zip(number("mscale_all_dim")?)
                        .map(|(this, all)| yarn_magnitude(factor, this) / yarn_magnitude(factor, all)),
                    given => given,
                };
                // transformers gives the magnitude as a whole, GGUF's readers multiply theirs by `attn_factor`.
                let attention = whole.map(|whole| whole / yarn_magnitude(factor, 1.0));
                let (fast, slow) = (number("beta_fast")?, number("beta_slow")?);
                Ok(Self::Yarn { factor, original: original()?, attention, fast, slow })
            }
            "llama3" => {
                let (low, high) = (positive("low_freq_factor", 1.0)?, positive("high_freq_factor", 4.0)?);
                if low >= high {
                    return Err(
                        json.wrong("low_freq_factor", format!("is {low}, not below high_freq_factor {high}"))
                    );
                }
                let original = original()?.unwrap_or(8192) as f32;
                Ok(Self::Llama3 { factor: positive("factor", 8.0)?, low, high, original })
            }
            other => {
                Err(json.wrong("rope_type", format!("is {other:?}; known are default, linear, yarn, llama3")))
            }
        }
    }
}
