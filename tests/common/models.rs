//! Small models made for a test: random weights, any key or tensor changed, in a file of their own.

use std::path::Path;

use skiff::gguf::{Builder, GgmlType, StringArray, Value};
use skiff::model::{Model, ModelError};
use skiff::quant;
use skiff::skip::StandIn;

/// Shapes of a model.
#[derive(Clone, Copy)]
pub struct Shape {
    pub layers: usize,
    pub embedding: usize,
    pub ffn: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub vocab: usize,
}

/// The smallest shape that has everything: several heads to a key/value head, `ffn` not a power of two.
pub const SMALL: Shape = Shape { layers: 3, embedding: 64, ffn: 96, heads: 4, kv_heads: 2, vocab: 96 };

/// The smallest shape whose rows hold whole blocks of every type.
pub const WIDE: Shape = Shape { layers: 2, embedding: 256, ffn: 512, heads: 4, kv_heads: 2, vocab: 320 };

/// What is going to be in a file.
#[derive(Clone)]
pub struct ModelFile {
    keys: Vec<(String, Value)>,
    tensors: Vec<(String, GgmlType, Vec<u64>, Vec<u8>)>,
}

/// A number of a reproducible sequence, from -1 to 1.
fn random(state: &mut u32) -> f32 {
    *state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
    (*state >> 8) as f32 / (1 << 23) as f32 - 1.0
}

/// `values` as rows of `cols` of type `ty`.
pub fn encode(ty: GgmlType, cols: usize, values: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; ty.row_bytes(cols) * (values.len() / cols)];
    for (row, bytes) in values.chunks_exact(cols).zip(bytes.chunks_exact_mut(ty.row_bytes(cols))) {
        quant::quantize_row(ty, row, bytes);
    }
    bytes
}

impl ModelFile {
    /// A valid model of architecture `llama` with random matrices of type `ty`.
    pub fn llama(shape: Shape, ty: GgmlType) -> Self {
        let mut file = Self { keys: vec![("general.architecture".into(), "llama".into())], tensors: vec![] };
        let Shape { layers, embedding, ffn, heads, kv_heads, vocab } = shape;
        let head_dim = embedding / heads;
        for (key, value) in [
            ("block_count", layers),
            ("context_length", 512),
            ("embedding_length", embedding),
            ("feed_forward_length", ffn),
            ("attention.head_count", heads),
            ("attention.head_count_kv", kv_heads),
        ] {
            file.keys.push((format!("llama.{key}"), (value as u32).into()));
        }
        file.keys.push(("llama.attention.layer_norm_rms_epsilon".into(), 1e-5f32.into()));
        let mut seed = 1;
        // The embedding is larger than what a layer adds, as in real models.
        file.random("token_embd.weight", ty, &[embedding, vocab], 4.0, &mut seed);
        for i in 0..layers {
            file.vector(&format!("blk.{i}.attn_norm.weight"), embedding);
            file.vector(&format!("blk.{i}.ffn_norm.weight"), embedding);
            for (suffix, shape) in [
                ("attn_q", [embedding, heads * head_dim]),
                ("attn_k", [embedding, kv_heads * head_dim]),
                ("attn_v", [embedding, kv_heads * head_dim]),
                ("attn_output", [heads * head_dim, embedding]),
                ("ffn_gate", [embedding, ffn]),
                ("ffn_up", [embedding, ffn]),
                ("ffn_down", [ffn, embedding]),
            ] {
                file.random(&format!("blk.{i}.{suffix}.weight"), ty, &shape, 2.0, &mut seed);
            }
        }
        file.vector("output_norm.weight", embedding);
        file
    }

    fn random(&mut self, name: &str, ty: GgmlType, shape: &[usize; 2], gain: f32, seed: &mut u32) {
        let scale = gain / (shape[0] as f32).sqrt();
        let values: Vec<f32> = (0..shape[0] * shape[1]).map(|_| scale * random(seed)).collect();
        self.set_tensor(name, ty, shape, encode(ty, shape[0], &values));
    }

    fn vector(&mut self, name: &str, n: usize) {
        let values: Vec<f32> = (0..n).map(|i| 1.0 + 0.2 * (i as f32).sin()).collect();
        self.set_tensor(name, GgmlType::F32, &[n], encode(GgmlType::F32, n, &values));
    }

    /// Sets a key, or changes it.
    pub fn set_key(&mut self, key: &str, value: impl Into<Value>) {
        self.drop_key(key);
        self.keys.push((key.into(), value.into()));
    }

    /// Leaves a key out.
    pub fn drop_key(&mut self, key: &str) {
        self.keys.retain(|(k, _)| k != key);
    }

    /// Sets a tensor, or changes it; `shape` has the contiguous dimension first.
    pub fn set_tensor(&mut self, name: &str, ty: GgmlType, shape: &[usize], bytes: Vec<u8>) {
        self.drop_tensor(name);
        self.tensors.push((name.into(), ty, shape.iter().map(|&n| n as u64).collect(), bytes));
    }

    /// Fills a tensor with `value`, in f32.
    pub fn fill_tensor(&mut self, name: &str, value: f32) {
        let shape = self.shape(name);
        let n = shape.iter().product();
        self.set_tensor(name, GgmlType::F32, &shape, encode(GgmlType::F32, n, &vec![value; n]));
    }

    /// The same weights, as they are dequantised, in f32.
    pub fn in_f32(&self) -> Self {
        let mut file = self.clone();
        for (_, ty, shape, bytes) in &mut file.tensors {
            let mut values = vec![0.0; shape.iter().product::<u64>() as usize];
            quant::dequantize_row(*ty, bytes, &mut values);
            *bytes = encode(GgmlType::F32, values.len(), &values);
            *ty = GgmlType::F32;
        }
        file
    }

    /// Shape of a tensor.
    pub fn shape(&self, name: &str) -> Vec<usize> {
        let tensor = self.tensors.iter().find(|t| t.0 == name).expect("the model has the tensor");
        tensor.2.iter().map(|&n| n as usize).collect()
    }

    /// Names of all tensors.
    pub fn tensor_names(&self) -> Vec<String> {
        self.tensors.iter().map(|t| t.0.clone()).collect()
    }

    /// Leaves a tensor out.
    pub fn drop_tensor(&mut self, name: &str) {
        self.tensors.retain(|t| t.0 != name);
    }

    /// The bytes of the file.
    pub fn bytes(&self) -> Vec<u8> {
        let mut builder = Builder::new();
        for (key, value) in &self.keys {
            builder.insert(key.clone(), value.clone()).unwrap();
        }
        for (name, ty, shape, _) in &self.tensors {
            builder.tensor(name.clone(), *ty, shape).unwrap();
        }
        let mut writer = builder.start(Vec::new()).unwrap();
        for (.., bytes) in &self.tensors {
            writer.write_tensor(bytes).unwrap();
        }
        writer.finish().unwrap()
    }

    /// Writes the file to `path`.
    pub fn write(&self, path: &Path) {
        std::fs::write(path, self.bytes()).unwrap();
    }

    /// Loads it, from a file that is gone afterwards (its map stays).
    pub fn load(&self) -> Result<Model, ModelError> {
        load_bytes(&self.bytes())
    }
}

/// Loads a model from bytes.
pub fn load_bytes(bytes: &[u8]) -> Result<Model, ModelError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    Model::load(&path)
}

impl ModelFile {
    /// Gives the model a vocabulary, with which an engine can load it: `<unk>`, begin and end, every byte, and words.
    pub fn set_vocabulary(&mut self) {
        let vocab = self.shape("token_embd.weight")[1];
        let special = ["<unk>", "<s>", "</s>"].map(String::from);
        let bytes = (0..256).map(|b| format!("<0x{b:02X}>"));
        let words = (0..vocab - 259).map(|i| format!("w{i}"));
        let tokens: StringArray = special.into_iter().chain(bytes).chain(words).collect();
        let kind = |i: usize| [2, 3, 3].get(i).copied().unwrap_or(if i < 259 { 6 } else { 1 });
        self.set_key("tokenizer.ggml.model", "llama");
        self.set_key("tokenizer.ggml.tokens", tokens);
        self.set_key("tokenizer.ggml.token_type", (0..vocab).map(kind).collect::<Vec<i32>>());
        self.set_key("tokenizer.ggml.scores", (0..vocab).map(|i| i as f32).collect::<Vec<f32>>());
        self.set_key("tokenizer.ggml.eos_token_id", 2u32);
    }
}

/// Stand-ins that take the place of about half the FFNs where what is foretold has to be below 0. `size`: of what they add.
pub fn stand_ins(shape: Shape, size: f32) -> Vec<StandIn> {
    let (d, rank) = (shape.embedding, 32);
    let wave = |n: usize, step: f32| (0..n).map(|i| (i as f32 * step).sin()).collect::<Vec<f32>>();
    let scaled = |n, step| wave(n, step).into_iter().map(|v| size * v).collect::<Vec<f32>>();
    let of = |i: usize| {
        let probe = wave(d, 1.1 + i as f32);
        StandIn::new(&probe, 0.0, &scaled(d, 0.3), &scaled(rank * d, 0.7), &wave(d * rank, 0.9))
    };
    (0..shape.layers).map(of).collect()
}
