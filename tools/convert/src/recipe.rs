//! The type of every tensor: llama.cpp's mixes (`llama_tensor_get_type` and `llama_model_quantize_impl` in its
//! `src/llama-quant.cpp`), for architectures without experts.
//!
//! A mix gives most matrices one type, and more bits to those whose errors cost most: the output, and some layers of
//! `attn_v` and `ffn_down`. Where a row is no multiple of a type's block, a similar type with blocks of 32 steps in.

use regex::Regex;
use skiff::gguf::GgmlType::{self, *};

use crate::ConvertError;

/// What a file's matrices are quantised to: a type, or one of llama.cpp's mixes of types.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, non_camel_case_types)]
pub enum Mix {
    Only(GgmlType),
    Q2_K_S,
    Q3_K_S,
    Q3_K_M,
    Q3_K_L,
    Q4_K_S,
    Q4_K_M,
    Q5_K_S,
    Q5_K_M,
}

/// (name, mix, `general.file_type`), as llama.cpp has them; a name without suffix means the mix of that type.
const TABLE: [(&str, Mix, u32); 23] = [
    ("F32", Mix::Only(F32), 0),
    ("F16", Mix::Only(F16), 1),
    ("BF16", Mix::Only(BF16), 32),
    ("Q8_0", Mix::Only(Q8_0), 7),
    ("Q4_0", Mix::Only(Q4_0), 2),
    ("Q4_1", Mix::Only(Q4_1), 3),
    ("Q5_0", Mix::Only(Q5_0), 8),
    ("Q5_1", Mix::Only(Q5_1), 9),
    ("Q2_K", Mix::Only(Q2_K), 10),
    ("Q2_K_S", Mix::Q2_K_S, 21),
    ("Q3_K_S", Mix::Q3_K_S, 11),
    ("Q3_K_M", Mix::Q3_K_M, 12),
    ("Q3_K_L", Mix::Q3_K_L, 13),
    ("Q4_K_S", Mix::Q4_K_S, 14),
    ("Q4_K_M", Mix::Q4_K_M, 15),
    ("Q5_K_S", Mix::Q5_K_S, 16),
    ("Q5_K_M", Mix::Q5_K_M, 17),
    ("Q6_K", Mix::Only(Q6_K), 18),
    ("IQ4_NL", Mix::Only(IQ4_NL), 25),
    ("IQ4_XS", Mix::Only(IQ4_XS), 30),
    ("Q3_K", Mix::Q3_K_M, 12),
    ("Q4_K", Mix::Q4_K_M, 15),
    ("Q5_K", Mix::Q5_K_M, 17),
];

impl Mix {
    /// The mix called `name`, in any case.
    pub fn from_name(name: &str) -> Result<Self, ConvertError> {
        let row = TABLE.iter().find(|row| row.0.eq_ignore_ascii_case(name));
        row.map(|row| row.1).ok_or_else(|| ConvertError::UnknownMix {
            name: name.to_owned(),
            known: TABLE.map(|row| row.0).join(", "),
        })
    }

    fn row(self) -> &'static (&'static str, Mix, u32) {
        TABLE.iter().find(|row| row.1 == self).unwrap_or(&TABLE[0]) // all others have a row: checked by a test
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        self.row().0
    }

    /// The value of `general.file_type`.
    pub fn file_type(self) -> u32 {
        self.row().2
    }

    /// The type of most matrices.
    pub fn base(self) -> GgmlType {
        match self {
            Self::Only(ty) => ty,
            Self::Q2_K_S => Q2_K,
            Self::Q3_K_S | Self::Q3_K_M | Self::Q3_K_L => Q3_K,
            Self::Q4_K_S | Self::Q4_K_M => Q4_K,
            Self::Q5_K_S | Self::Q5_K_M => Q5_K,
        }
    }
}

/// What the rules look at besides a tensor.
#[derive(Clone, Copy, Debug)]
pub struct ModelShape {
    /// Transformer layers.
    pub layers: usize,
    /// Attention heads that share a key/value head.
    pub heads_a_kv_head: usize,
    /// Whether the file has an output matrix of its own.
    pub has_output: bool,
}

/// A mix with a user's wishes.
#[derive(Clone, Debug)]
pub struct Recipe {
    /// The mix.
    pub mix: Mix,
    /// Every matrix gets the mix's base type.
    pub pure: bool,
    /// The type of the output matrix.
    pub output: Option<GgmlType>,
    /// The type of the token embedding.
    pub embedding: Option<GgmlType>,
    /// Types by tensor name; the first that matches anywhere in the name counts.
    pub overrides: Vec<(Regex, GgmlType)>,
    /// Whether an importance matrix is at hand; some rules are more careful without.
    pub has_imatrix: bool,
}

impl Recipe {
    /// The mix, with nothing said about single tensors.
    pub fn new(mix: Mix) -> Self {
        Self { mix, pure: false, output: None, embedding: None, overrides: Vec::new(), has_imatrix: false }
    }

    /// The type of a tensor with rows of `cols` elements; `None`: it stays what it is.
    ///
    /// Matrices only: vectors (norms, biases, rope factors) are small and precious.
    pub fn type_of(&self, name: &str, shape: &[u64], model: ModelShape) -> Option<GgmlType> {
        let is_matrix = shape.len() >= 2 && name.ends_with("weight") && !name.contains("_norm.weight");
        if !is_matrix {
            return None;
        }
        let cols = shape[0];
        let base = self.mix.base();
        let by_rule = match self.pure || !skiff::quant::is_quantised(base) {
            true => base,
            false => self.by_rule(name, cols, model),
        };
        let named = match name {
            "output.weight" => self.output,
            "token_embd.weight" => self.embedding,
            _ => None,
        };
        let overridden = self.overrides.iter().find(|(regex, _)| regex.is_match(name)).map(|o| o.1);
        Some(fallback(named.or(overridden).unwrap_or(by_rule), cols))
    }

    fn by_rule(&self, name: &str, cols: u64, model: ModelShape) -> GgmlType {
        let base = self.mix.base();
        // An embedding that is the output too is treated as the output.
        if name == "output.weight" || name == "token_embd.weight" && !model.has_output {
            return match self.output {
                Some(ty) => ty,
                None if !cols.is_multiple_of(base.block_len() as u64) => Q8_0,
                None if base == Q8_0 => Q8_0,
                None => Q6_K,
            };
        }
        let layer = layer_of(name).unwrap_or(0);
        if name.contains("attn_v.weight") {
            self.attn_v(layer, model)
        } else if name.contains("ffn_down") {
            self.ffn_down(layer, model.layers)
        } else if name.contains("attn_output.weight") {
            match self.mix {
                Mix::Only(Q2_K) => Q3_K,
                Mix::Q3_K_M => Q4_K,
                Mix::Q3_K_L => Q5_K,
                _ => base,
            }
        } else {
            base
        }
    }

    fn attn_v(&self, layer: usize, model: ModelShape) -> GgmlType {
        let wide = model.heads_a_kv_head >= 4;
        let ty = match self.mix {
            Mix::Only(Q2_K) if wide => Q4_K,
            Mix::Only(Q2_K) => Q3_K,
            Mix::Q2_K_S if wide => Q4_K,
            Mix::Q3_K_M if layer < 2 => Q5_K,
            Mix::Q3_K_M => Q4_K,
            Mix::Q3_K_L => Q5_K,
            Mix::Only(IQ4_NL | IQ4_XS) if wide => Q5_K,
            Mix::Q4_K_M | Mix::Q5_K_M if more_bits(layer, model.layers) => Q6_K,
            Mix::Q4_K_S if layer < 4 => Q5_K,
            _ => self.mix.base(),
        };
        // The 70B models share each key/value head among 8 heads: more bits cost next to nothing there.
        match ty {
            Q3_K | Q4_K if model.layers == LAYERS_OF_70B => Q5_K,
            ty => ty,
        }
    }

    fn ffn_down(&self, layer: usize, layers: usize) -> GgmlType {
        let first_eighth = layer < layers / 8;
        match self.mix {
            Mix::Only(Q2_K) => Q3_K,
            Mix::Q2_K_S if first_eighth => Q4_K,
            Mix::Q3_K_M if layer < layers / 16 => Q5_K,
            Mix::Q3_K_M => Q4_K,
            Mix::Q3_K_L => Q5_K,
            Mix::Q4_K_M | Mix::Q5_K_M if more_bits(layer, layers) => Q6_K,
            Mix::Only(IQ4_NL | IQ4_XS) if first_eighth && !self.has_imatrix => Q5_K,
            Mix::Q4_K_S if first_eighth => Q5_K,
            Mix::Only(Q4_0) if first_eighth && self.has_imatrix => Q4_1,
            Mix::Only(Q5_0) if first_eighth && self.has_imatrix => Q5_1,
            _ => self.mix.base(),
        }
    }
}

/// llama.cpp tells its 70B models by this.
const LAYERS_OF_70B: usize = 80;

/// The first and last eighth of the layers, and every third of the others.
fn more_bits(layer: usize, layers: usize) -> bool {
    layer < layers / 8 || layer >= 7 * layers / 8 || (layer - layers / 8) % 3 == 2
}

/// The number in `blk.N.`.
fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix("blk.")?.split('.').next()?.parse().ok()
}

/// `ty`, or what stands in for it where rows of `cols` elements are no whole blocks.
pub fn fallback(ty: GgmlType, cols: u64) -> GgmlType {
    let fits = |ty: GgmlType| cols.is_multiple_of(ty.block_len() as u64);
    let other = match ty {
        Q2_K | Q3_K | IQ4_XS => IQ4_NL,
        Q4_K => Q5_0,
        Q5_K => Q5_1,
        Q6_K => Q8_0,
        ty => ty,
    };
    [ty, other].into_iter().find(|&ty| fits(ty)).unwrap_or(F16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mix_has_a_name_that_leads_back() {
        let all = GgmlType::all().map(Mix::Only).filter(|m| !matches!(m, Mix::Only(Q3_K | Q4_K | Q5_K)));
        let mixes =
            [Mix::Q2_K_S, Mix::Q3_K_S, Mix::Q3_K_M, Mix::Q3_K_L, Mix::Q4_K_S, Mix::Q4_K_M, Mix::Q5_K_S];
        for mix in all.chain(mixes).chain([Mix::Q5_K_M]) {
            assert_eq!(Mix::from_name(mix.name()).unwrap(), mix);
        }
        assert!(Mix::from_name("Q9_9").unwrap_err().to_string().contains("Q4_K_M"));
    }

    #[test]
    fn rows_of_partial_blocks_fall_back() {
        assert_eq!([Q2_K, Q4_K, Q5_K, Q6_K].map(|ty| fallback(ty, 576)), [IQ4_NL, Q5_0, Q5_1, Q8_0]);
        assert_eq!((fallback(Q4_K, 512), fallback(Q4_0, 100)), (Q4_K, F16));
    }

    #[test]
    fn a_tied_embedding_is_treated_as_the_output() {
        let recipe = Recipe::new(Mix::Q4_K_M);
        let model = |has_output| ModelShape { layers: 32, heads_a_kv_head: 1, has_output };
        let ty = |has_output| recipe.type_of("token_embd.weight", &[4096, 32000], model(has_output));
        assert_eq!((ty(true), ty(false)), (Some(Q4_K), Some(Q6_K)));
        assert_eq!(recipe.type_of("blk.0.attn_norm.weight", &[4096], model(true)), None);
        // The 70B rule.
        let large = ModelShape { layers: 80, heads_a_kv_head: 8, has_output: true };
        assert_eq!(recipe.type_of("blk.10.attn_v.weight", &[8192, 1024], large), Some(Q5_K));
    }
}
