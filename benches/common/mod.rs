//! What the benchmarks share: random weights, a synthetic model larger than caches, how results are checked.
#![allow(dead_code)] // no benchmark uses all of it

use std::path::{Path, PathBuf};
use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, SamplingMode};
use skiff::gguf::{Builder, GgmlType};
use skiff::kernels::Kernels;
use skiff::model::{FfnStep, KvType, Model, State};
use skiff::ops::Compute;
use skiff::quant::{is_quantised, quantize_row};
use skiff::skip::SkipPolicy;

/// Few samples: each is milliseconds long, and there are many benchmarks.
pub fn criterion() -> Criterion {
    Criterion::default()
        .sample_size(10)
        .nresamples(2_000)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_secs(1))
        .configure_from_args()
}

const NAMES: [&str; 4] = ["kernels", "forward", "load", "skip"];

/// Whether the benchmarks of `name` may be wanted. `cargo bench kernels` (or `kernels/dot`) hands the word to all four
/// programs, as a pattern; those that it does not mean have nothing to prepare.
pub fn wanted(name: &str) -> bool {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let means = |name: &str| words.iter().any(|word| word.split(['/', ',']).next() == Some(name));
    means(name) || !NAMES.iter().any(|name| means(name))
}

/// A group whose iterations are long: every sample has as many.
pub fn group<'c>(criterion: &'c mut Criterion, name: &str) -> BenchmarkGroup<'c, WallTime> {
    let mut group = criterion.benchmark_group(name);
    group.sampling_mode(SamplingMode::Flat);
    group
}

pub fn quantised_types() -> impl Iterator<Item = GgmlType> {
    GgmlType::all().filter(|&ty| is_quantised(ty))
}

pub fn scalar() -> Kernels {
    Kernels::select(Some("scalar")).expect("scalar code runs everywhere")
}

pub fn best() -> Kernels {
    Kernels::select(None).expect("some kernel runs")
}

/// Reproducible numbers from -1 to 1.
pub struct Random(pub u64);

impl Random {
    pub fn float(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    pub fn floats(&mut self, n: usize, scale: f32) -> Vec<f32> {
        (0..n).map(|_| scale * self.float()).collect()
    }
}

/// Rows that are quantised; a matrix repeats them, which is quick to make and no quicker to read.
const DISTINCT_ROWS: usize = 64;

/// `rows` rows of `cols` weights of type `ty`.
pub fn matrix(random: &mut Random, ty: GgmlType, rows: usize, cols: usize, scale: f32) -> Vec<u8> {
    let mut distinct = vec![0; DISTINCT_ROWS * ty.row_bytes(cols)];
    for row in distinct.chunks_exact_mut(ty.row_bytes(cols)) {
        quantize_row(ty, &random.floats(cols, scale), row);
    }
    let bytes = rows * ty.row_bytes(cols);
    let mut matrix = distinct.repeat(bytes.div_ceil(distinct.len()));
    matrix.truncate(bytes);
    matrix
}

/// Layers of the synthetic model.
pub const LAYERS: usize = 4;
const EMBEDDING: usize = 2048;
const FFN: usize = 8192;
const HEADS: usize = 32;
const KV_HEADS: usize = 8;
const VOCAB: usize = 32_000;

/// Writes four layers of LLaMA-3.2-1B's shape with random Q4_0 weights: 173 MB, more than most caches hold.
pub fn write_synthetic(folder: &Path) -> PathBuf {
    let kv = EMBEDDING / HEADS * KV_HEADS;
    let ty = GgmlType::Q4_0;
    let mut tensors = vec![("token_embd.weight".to_owned(), ty, [EMBEDDING, VOCAB])];
    for i in 0..LAYERS {
        let mut add = |name: &str, ty, shape| tensors.push((format!("blk.{i}.{name}.weight"), ty, shape));
        add("attn_norm", GgmlType::F32, [EMBEDDING, 1]);
        add("attn_q", ty, [EMBEDDING, EMBEDDING]);
        add("attn_k", ty, [EMBEDDING, kv]);
        add("attn_v", ty, [EMBEDDING, kv]);
        add("attn_output", ty, [EMBEDDING, EMBEDDING]);
        add("ffn_norm", GgmlType::F32, [EMBEDDING, 1]);
        add("ffn_gate", ty, [EMBEDDING, FFN]);
        add("ffn_up", ty, [EMBEDDING, FFN]);
        add("ffn_down", ty, [FFN, EMBEDDING]);
    }
    tensors.push(("output_norm.weight".to_owned(), GgmlType::F32, [EMBEDDING, 1]));

    let mut builder = Builder::new();
    builder.insert("general.architecture", "llama").unwrap();
    for (key, value) in [
        ("block_count", LAYERS),
        ("context_length", 4096),
        ("embedding_length", EMBEDDING),
        ("feed_forward_length", FFN),
        ("attention.head_count", HEADS),
        ("attention.head_count_kv", KV_HEADS),
    ] {
        builder.insert(format!("llama.{key}"), value as u32).unwrap();
    }
    builder.insert("llama.attention.layer_norm_rms_epsilon", 1e-5f32).unwrap();
    for (name, ty, shape) in &tensors {
        let shape: Vec<u64> = shape.iter().map(|&n| n as u64).collect();
        let dims = if shape[1] == 1 { 1 } else { 2 };
        builder.tensor(name.clone(), *ty, &shape[..dims]).unwrap();
    }
    let path = folder.join("synthetic.gguf");
    let mut writer = builder.start(std::fs::File::create(&path).unwrap()).unwrap();
    let mut random = Random(0x5eed);
    for (name, ty, [cols, rows]) in tensors {
        let bytes = match ty {
            GgmlType::F32 => 1f32.to_le_bytes().repeat(cols),
            _ if name.starts_with("token") => matrix(&mut random, ty, rows, cols, 0.1),
            _ => matrix(&mut random, ty, rows, cols, 1.0 / (cols as f32).sqrt()),
        };
        writer.write_tensor(&bytes).unwrap();
    }
    writer.finish().unwrap();
    path
}

/// The default model if it was pulled already.
pub fn smollm2() -> Option<PathBuf> {
    let pulled = skiff::pull::models().unwrap_or_default();
    let found = pulled.into_iter().find(|model| model.name == "smollm2").and_then(|model| model.path);
    if found.is_none() {
        eprintln!("SKIPPED: SmolLM2 is not in the cache; `skiff pull smollm2` brings it there");
    }
    found
}

/// Token ids without a pattern.
pub fn ids(n: usize, vocab: usize) -> Vec<u32> {
    (0..n).map(|i| ((i * 7919 + i * i / 3 + 5) % vocab) as u32).collect()
}

pub fn state(model: &Model, on: Compute<'_>, context: usize, policy: Box<dyn SkipPolicy>) -> State {
    State::new(model, on.team, (context, 512), KvType::F16, policy)
}

/// Evaluates a prompt.
pub fn prompt(model: &Model, on: Compute<'_>, state: &mut State, tokens: &[u32]) {
    for batch in tokens.chunks(state.batch()) {
        model.forward(on, state, batch, FfnStep::Full).unwrap();
    }
}

/// Evaluates a token and returns its logits.
pub fn decode<'s>(
    model: &Model,
    on: Compute<'_>,
    state: &'s mut State,
    token: u32,
    index: usize,
) -> &'s mut [f32] {
    model.forward(on, state, &[token], FfnStep::Governed { index }).unwrap();
    model.logits(on, state, 0)
}

/// Root mean square of the difference in units of that of `want`.
pub fn distance(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let square = |v: f32| v * v;
    let difference: f32 = got.iter().zip(want).map(|(g, w)| square(g - w)).sum();
    (difference / want.iter().copied().map(square).sum::<f32>()).sqrt()
}

/// Panics unless `got` is `want` up to `limit`; NaN is not.
pub fn assert_close(what: &str, got: &[f32], want: &[f32], limit: f32) {
    let distance = distance(got, want);
    assert!(distance <= limit, "{what}: the result is wrong: relative distance {distance}");
}
