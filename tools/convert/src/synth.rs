//! Models of random weights in the shape and type of real ones, for benchmarks of speed and memory.
//!
//! Quantising 7 billion random numbers would take minutes. So some million are quantised once for each type, and
//! every row of every matrix is a copy of a random stretch of those blocks. The weights have the spread that keeps
//! activations near 1: `1 / sqrt(columns)`, less for the matrices that write to the residual stream.

use std::collections::HashMap;
use std::path::Path;

use rayon::prelude::*;
use skiff::gguf::{Builder, GgmlType, Gguf, Metadata, StringArray, Value};
use skiff::quant;

use crate::ConvertError;
use crate::output::{GgufOutput, TensorSink};
use crate::progress::Progress;
use crate::recipe::{Mix, ModelShape, Recipe};

/// Shapes of a LLaMA model.
#[derive(Clone, Copy, Debug, PartialEq)]
#[allow(missing_docs)]
pub struct Shape {
    pub layers: usize,
    pub embedding: usize,
    pub ffn: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub vocab: usize,
    pub context: usize,
}

/// The shapes with a name.
const NAMED: [(&str, Shape); 4] = [
    ("llama2-7b", shape([32, 4096, 11008, 32, 32, 32000, 4096])),
    ("llama2-13b", shape([40, 5120, 13824, 40, 40, 32000, 4096])),
    ("llama2-70b", shape([80, 8192, 28672, 64, 8, 32000, 4096])),
    ("tinyllama", shape([22, 2048, 5632, 32, 4, 32000, 2048])),
];

const fn shape([layers, embedding, ffn, heads, kv_heads, vocab, context]: [usize; 7]) -> Shape {
    Shape { layers, embedding, ffn, heads, kv_heads, vocab, context }
}

/// Far beyond any model, and far below what would overflow.
const MAX_DIMENSION: usize = 1 << 24;

impl Shape {
    /// A named shape, or `layers=2,embedding=256,...` with what is not given taken from TinyLlama.
    pub fn parse(text: &str) -> Result<Self, ConvertError> {
        if let Some((_, shape)) = NAMED.iter().find(|(name, _)| name.eq_ignore_ascii_case(text)) {
            return Ok(*shape);
        }
        let wrong = |problem: String| ConvertError::Shape { shape: text.to_owned(), problem };
        let names = || NAMED.map(|(name, _)| name).join(", ");
        let mut shape = NAMED[3].1;
        for part in text.split(',') {
            let (key, value) = part
                .split_once('=')
                .ok_or_else(|| wrong(format!("neither {} nor KEY=NUMBER,...", names())))?;
            let value = value.parse().ok().filter(|n| (1..=MAX_DIMENSION).contains(n));
            let value =
                value.ok_or_else(|| wrong(format!("{key} is no number from 1 to {MAX_DIMENSION}")))?;
            *match key.trim() {
                "layers" => &mut shape.layers,
                "embedding" => &mut shape.embedding,
                "ffn" => &mut shape.ffn,
                "heads" => &mut shape.heads,
                "kv-heads" => &mut shape.kv_heads,
                "vocab" => &mut shape.vocab,
                "context" => &mut shape.context,
                _ => {
                    let known = "layers, embedding, ffn, heads, kv-heads, vocab, context";
                    return Err(wrong(format!("{key} is none of {known}")));
                }
            } = value;
        }
        shape.check().map_err(wrong)
    }

    fn check(self) -> Result<Self, String> {
        let Self { embedding, ffn, heads, kv_heads, .. } = self;
        if !heads.is_multiple_of(kv_heads) {
            return Err(format!("{heads} heads cannot share {kv_heads} kv-heads"));
        }
        if !embedding.is_multiple_of(2 * heads) {
            return Err(format!("embedding {embedding} is not {heads} heads of even length"));
        }
        match [embedding, ffn].into_iter().find(|n| !n.is_multiple_of(32)) {
            Some(n) => Err(format!("{n} is no multiple of 32")),
            None => Ok(self),
        }
    }

    /// Name, rows and columns of every matrix, and how far its weights spread in units of `1 / sqrt(columns)`.
    fn matrices(self) -> Vec<(String, usize, usize, f32)> {
        let Self { layers, embedding: d, ffn, heads, kv_heads, vocab, .. } = self;
        let kv = d / heads * kv_heads;
        // What the layers add to the stream has, summed up, the size of the embedding (as in GPT-2's initialisation).
        let residual = 1.0 / (2.0 * layers as f32).sqrt();
        let mut all = vec![("token_embd".to_owned(), vocab, d, (d as f32).sqrt())];
        for i in 0..layers {
            let parts = [
                ("attn_q", d, d, 1.0),
                ("attn_k", kv, d, 1.0),
                ("attn_v", kv, d, 1.0),
                ("attn_output", d, d, residual),
                ("ffn_gate", ffn, d, 1.0),
                ("ffn_up", ffn, d, 1.0),
                ("ffn_down", d, ffn, 2.0 * residual),
            ];
            all.extend(parts.map(|(name, rows, cols, gain)| (format!("blk.{i}.{name}"), rows, cols, gain)));
        }
        all.push(("output".to_owned(), vocab, d, 1.0));
        all
    }
}

/// What to make.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct SynthOptions<'a> {
    pub shape: Shape,
    pub name: &'a str,
    pub mix: Mix,
    /// A GGUF file whose vocabulary is taken; without one it is made up.
    pub vocab: Option<&'a Path>,
    pub seed: u64,
    pub quiet: bool,
}

/// Writes a model of random weights to `out`; returns the bytes of its tensors.
///
/// # Errors
/// The vocabulary's file cannot be read, or `out` not be written.
pub fn synth(options: &SynthOptions<'_>, out: &Path) -> Result<u64, ConvertError> {
    let mut shape = options.shape;
    let vocabulary = match options.vocab {
        Some(path) => read_vocabulary(path)?,
        None => made_up_vocabulary(),
    };
    let vocabulary = padded(vocabulary, &mut shape.vocab)?;
    let mut builder = Builder::with_metadata(metadata(options, shape)?);
    for (key, value) in vocabulary {
        builder.insert(key, value)?;
    }
    builder.insert("general.quantization_version", 2u32)?;
    let plan = plan(&mut builder, shape, options.mix)?;
    let total = builder.data_bytes();
    let progress = Progress::new("synth", total, options.quiet);
    let pools = Pools::new(&plan, options.seed);
    let mut output = GgufOutput::create(out, builder)?;
    for (i, tensor) in plan.iter().enumerate() {
        progress.at(&tensor.name);
        let seed = options.seed.wrapping_add(1 + i as u64);
        output.tensor(|sink| pools.write(tensor, seed, sink, &progress))?;
    }
    output.finish()?;
    Ok(total)
}

/// A tensor to be written.
struct Planned {
    name: String,
    ty: GgmlType,
    rows: usize,
    cols: usize,
    /// Standard deviation of the weights; `None`: all are 1.
    spread: Option<f32>,
}

fn plan(builder: &mut Builder, shape: Shape, mix: Mix) -> Result<Vec<Planned>, ConvertError> {
    let recipe = Recipe::new(mix);
    let heads_a_kv_head = shape.heads / shape.kv_heads;
    let model = ModelShape { layers: shape.layers, heads_a_kv_head, has_output: true };
    let mut plan = Vec::new();
    let norm =
        |name: String| Planned { name, ty: GgmlType::F32, rows: 1, cols: shape.embedding, spread: None };
    for (name, rows, cols, gain) in shape.matrices() {
        let name = format!("{name}.weight");
        if name == "output.weight" {
            plan.push(norm("output_norm.weight".into()));
        }
        if let Some(layer) = name.strip_suffix("attn_q.weight") {
            plan.push(norm(format!("{layer}attn_norm.weight")));
        }
        if let Some(layer) = name.strip_suffix("ffn_gate.weight") {
            plan.push(norm(format!("{layer}ffn_norm.weight")));
        }
        let ty = recipe.type_of(&name, &[cols as u64, rows as u64], model).unwrap_or(GgmlType::F32);
        plan.push(Planned { name, ty, rows, cols, spread: Some(gain / (cols as f32).sqrt()) });
    }
    for t in &plan {
        let dims = [t.cols as u64, t.rows as u64];
        builder.tensor(&t.name, t.ty, if t.spread.is_some() { &dims } else { &dims[..1] })?;
    }
    Ok(plan)
}

fn metadata(options: &SynthOptions<'_>, shape: Shape) -> Result<Metadata, ConvertError> {
    let mut m = Metadata::new();
    m.insert("general.architecture", "llama")?;
    m.insert("general.type", "model")?;
    m.insert("general.name", format!("random weights, {}", options.name))?;
    let head_dim = shape.embedding / shape.heads;
    for (key, value) in [
        ("block_count", shape.layers),
        ("context_length", shape.context),
        ("embedding_length", shape.embedding),
        ("feed_forward_length", shape.ffn),
        ("attention.head_count", shape.heads),
        ("attention.head_count_kv", shape.kv_heads),
        ("rope.dimension_count", head_dim),
        ("vocab_size", shape.vocab),
    ] {
        m.insert(format!("llama.{key}"), value as u32)?; // at most MAX_DIMENSION
    }
    m.insert("llama.attention.layer_norm_rms_epsilon", 1e-5f32)?;
    m.insert("llama.rope.freq_base", 10_000f32)?;
    m.insert("general.file_type", options.mix.file_type())?;
    Ok(m)
}

type Entries = Vec<(String, Value)>;

const TOKENS: &str = "tokenizer.ggml.tokens";
const SCORES: &str = "tokenizer.ggml.scores";
const TYPES: &str = "tokenizer.ggml.token_type";

/// The tokenizer of a GGUF file.
fn read_vocabulary(path: &Path) -> Result<Entries, ConvertError> {
    let bytes = std::fs::read(path).map_err(ConvertError::io(path))?;
    let gguf = Gguf::parse(&bytes).map_err(|error| ConvertError::Gguf { path: path.to_owned(), error })?;
    gguf.metadata.array_str(TOKENS)?;
    let entries = gguf.metadata.iter().filter(|(key, _)| key.starts_with("tokenizer."));
    Ok(entries.map(|(key, value)| (key.to_owned(), value.clone())).collect())
}

/// A SentencePiece vocabulary that can spell any text: the special tokens and the 256 bytes, as LLaMA's begins.
fn made_up_vocabulary() -> Entries {
    let specials = ["<unk>", "<s>", "</s>"].map(String::from).into_iter();
    let bytes = (0..=255u8).map(|b| format!("<0x{b:02X}>"));
    let tokens: StringArray = specials.chain(bytes).collect();
    let mut types = vec![2i32, 3, 3];
    types.resize(tokens.len(), 6);
    let entry = |key: &str, value: Value| (key.to_owned(), value);
    vec![
        entry("tokenizer.ggml.model", "llama".into()),
        entry("tokenizer.ggml.pre", "default".into()),
        entry(SCORES, vec![0f32; tokens.len()].into()),
        entry(TYPES, types.into()),
        entry(TOKENS, tokens.into()),
        entry("tokenizer.ggml.bos_token_id", 1u32.into()),
        entry("tokenizer.ggml.eos_token_id", 2u32.into()),
        entry("tokenizer.ggml.unknown_token_id", 0u32.into()),
        entry("tokenizer.ggml.add_bos_token", true.into()),
        entry("tokenizer.ggml.add_eos_token", false.into()),
    ]
}

/// Fills a vocabulary up with unused tokens to `size`, or sets `size` to that of a larger one: other programs want
/// a token for every row of the embedding.
fn padded(entries: Entries, size: &mut usize) -> Result<Entries, ConvertError> {
    use skiff::gguf::Array;
    let tokens = entries.iter().find_map(|(key, value)| match value {
        Value::Array(array) if key == TOKENS => Some(array.len()),
        _ => None,
    });
    let tokens = tokens.unwrap_or(0);
    *size = tokens.max(*size);
    let extra = *size - tokens;
    let pad = |(key, value): (String, Value)| {
        let value = match (key.as_str(), value) {
            (TOKENS, Value::Array(Array::String(mut v))) => {
                (0..extra).for_each(|i| v.push(format!("[PAD{i}]").as_bytes()));
                v.into()
            }
            (SCORES, Value::Array(Array::F32(mut v))) => {
                v.resize(*size, 0.0);
                v.into()
            }
            (TYPES, Value::Array(Array::I32(mut v))) => {
                v.resize(*size, 5); // unused
                v.into()
            }
            (_, value) => value,
        };
        (key, value)
    };
    Ok(entries.into_iter().map(pad).collect())
}

/// Random weights of each type and spread in use, as blocks.
struct Pools(HashMap<(GgmlType, u32), Vec<u8>>);

/// Weights of a pool: thousands of places where a row can start.
const POOL_WEIGHTS: usize = 1 << 21;
/// Weights encoded at a time.
const TILE_WEIGHTS: usize = 1 << 14;

impl Pools {
    fn new(plan: &[Planned], seed: u64) -> Self {
        let widest = plan.iter().map(|t| t.cols).max().unwrap_or(0);
        let weights = POOL_WEIGHTS.max(2 * widest).next_multiple_of(TILE_WEIGHTS);
        let random = |(ty, spread): (GgmlType, f32)| {
            let mut blocks = vec![0; ty.row_bytes(weights)];
            let tiles = blocks.par_chunks_exact_mut(ty.row_bytes(TILE_WEIGHTS)).enumerate();
            tiles.for_each(|(i, blocks)| {
                // Pools must not be multiples of each other: rows of the output would find their embedding again.
                let mut random = Random::new(seed ^ (i as u64) << 32 ^ u64::from(spread.to_bits()));
                let values: Vec<f32> = (0..TILE_WEIGHTS).map(|_| spread * random.normal()).collect();
                quant::quantize_row(ty, &values, blocks);
            });
            blocks
        };
        let mut pools = HashMap::new();
        for (ty, spread) in plan.iter().filter_map(|t| t.spread.map(|spread| (t.ty, spread))) {
            pools.entry((ty, spread.to_bits())).or_insert_with(|| random((ty, spread)));
        }
        Self(pools)
    }

    fn write(
        &self,
        tensor: &Planned,
        seed: u64,
        sink: &mut TensorSink<'_>,
        progress: &Progress,
    ) -> Result<(), ConvertError> {
        let row_bytes = tensor.ty.row_bytes(tensor.cols);
        let Some(spread) = tensor.spread else {
            let mut ones = vec![0; row_bytes];
            quant::quantize_row(tensor.ty, &vec![1.0; tensor.cols], &mut ones);
            sink.write(&ones)?;
            return progress.add(row_bytes as u64);
        };
        let pool = &self.0[&(tensor.ty, spread.to_bits())];
        let starts = (pool.len() - row_bytes) / tensor.ty.block_bytes() + 1;
        let mut random = Random::new(seed);
        for _ in 0..tensor.rows {
            let start = random.below(starts) * tensor.ty.block_bytes();
            sink.write(&pool[start..start + row_bytes])?;
            progress.add(row_bytes as u64)?;
        }
        Ok(())
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014): small, and good enough for weights that mean nothing.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    /// Nearly normal, of variance 1: the sum of 4 uniform numbers (Irwin-Hall).
    fn normal(&mut self) -> f32 {
        let bits = self.next();
        let sum: f32 = (0..4).map(|i| ((bits >> (16 * i)) & 0xffff) as f32 / 65536.0 - 0.5).sum();
        sum * 3f32.sqrt()
    }
}
