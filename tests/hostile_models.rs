//! Models that a well-formed GGUF file can hold and that make no sense: each is refused with an error that names
//! the datum, quickly, and nothing panics.

mod common;

use std::time::{Duration, Instant};

use common::models::{ModelFile, SMALL, Shape, WIDE, load_bytes};
use skiff::gguf::{GgmlType, StringArray, Value};
use skiff::kernels::Kernels;
use skiff::model::{FfnStep, KvType, Model, State};
use skiff::ops::Compute;
use skiff::session::Engine;
use skiff::skip::Never;
use skiff::threads::Team;

fn valid() -> ModelFile {
    ModelFile::llama(SMALL, GgmlType::F16)
}

/// The error of loading `file`, which must come at once.
fn refusal(file: &ModelFile) -> String {
    let started = Instant::now();
    let error = file.load().err().expect("the model is refused").to_string();
    assert!(started.elapsed() < Duration::from_secs(5), "took too long: {error}");
    error
}

/// Asserts that the model with `key` set to `value` is refused and the error has all of `names` in it.
#[track_caller]
fn refuses_key(key: &str, value: impl Into<Value>, names: &[&str]) {
    let mut file = valid();
    file.set_key(key, value);
    let error = refusal(&file);
    for name in names {
        assert!(error.contains(name), "{key}: {error:?} does not say {name:?}");
    }
}

/// Evaluates a prompt and a token: whatever was accepted must also run.
fn run(model: &Model) -> Vec<f32> {
    let team = Team::new(2).unwrap();
    let on = Compute { team: &team, kernels: Kernels::available().next().unwrap() };
    let mut state = State::new(model, &team, (16, 16), KvType::Q8_0, Box::new(Never));
    model.forward(on, &mut state, &[0, 1, 2, 3, 4, 5, 6], FfnStep::Full).unwrap();
    model.forward(on, &mut state, &[7], FfnStep::Full).unwrap();
    model.logits(on, &mut state, 0).to_vec()
}

#[test]
fn the_model_that_the_others_are_made_of_is_fine() {
    assert!(run(&valid().load().unwrap()).iter().all(|l| l.is_finite()));
}

#[test]
fn every_missing_tensor_is_named() {
    let names = valid().tensor_names();
    assert_eq!(names.len(), 2 + 9 * SMALL.layers);
    for name in names {
        let mut file = valid();
        file.drop_tensor(&name);
        let error = refusal(&file);
        assert!(error.contains(&name), "{name}: {error}");
    }
}

#[test]
fn every_wrong_shape_is_named_with_both_shapes() {
    for name in valid().tensor_names() {
        let mut file = valid();
        let mut shape = file.shape(&name);
        // A wrong embedding is found where a layer disagrees with it, unless its columns are wrong.
        shape[0] *= 2;
        file.set_tensor(&name, GgmlType::F16, &shape, vec![0; 2 * shape.iter().product::<usize>()]);
        let error = refusal(&file);
        assert!(error.contains(&name) && error.contains(&shape[0].to_string()), "{name}: {error}");
        let mut file = valid();
        let wanted = file.shape(&name);
        let shape = [wanted.clone(), vec![2, 3]].concat();
        file.set_tensor(&name, GgmlType::F16, &shape, vec![0; 2 * shape.iter().product::<usize>()]);
        let error = refusal(&file);
        assert!(error.contains(&name), "{name}: {error}");
    }
}

#[test]
fn transposed_and_flattened_matrices_are_refused() {
    for (name, shape) in [("blk.0.ffn_up.weight", vec![96, 64]), ("blk.2.attn_k.weight", vec![64 * 32])] {
        let mut file = valid();
        file.set_tensor(name, GgmlType::F16, &shape, vec![0; 2 * shape.iter().product::<usize>()]);
        assert!(refusal(&file).contains(name));
    }
}

#[test]
fn optional_tensors_are_checked_too() {
    for (name, n) in [("rope_freqs.weight", 9), ("blk.1.attn_q.bias", 63), ("output.weight", 5)] {
        let mut file = valid();
        file.set_tensor(name, GgmlType::F32, &[n], vec![0; 4 * n]);
        let error = refusal(&file);
        assert!(error.contains(name) && error.contains(&n.to_string()), "{error}");
    }
}

#[test]
fn every_missing_key_is_named() {
    for key in [
        "general.architecture",
        "llama.block_count",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.attention.head_count",
        "llama.attention.layer_norm_rms_epsilon",
    ] {
        let mut file = valid();
        file.drop_key(key);
        let error = refusal(&file);
        assert!(error.contains(key), "{key}: {error}");
    }
}

#[test]
fn shapes_of_zero_are_named() {
    for key in [
        "llama.block_count",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.attention.head_count",
        "llama.attention.head_count_kv",
        "llama.attention.key_length",
        "llama.context_length",
        "llama.rope.dimension_count",
    ] {
        refuses_key(key, 0u32, &[key, "0"]);
    }
}

/// Neither memory nor time may be spent on a number in the header before the file's tensors bear it out.
#[test]
fn absurd_sizes_cost_nothing() {
    for key in [
        "llama.block_count",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.attention.head_count",
        "llama.attention.head_count_kv",
        "llama.attention.key_length",
        "llama.context_length",
        "llama.rope.dimension_count",
    ] {
        for value in [1u64 << 31, u64::from(u32::MAX), 1 << 40, u64::MAX] {
            refuses_key(key, value, &[key]);
        }
        refuses_key(key, -1i32, &[key]);
        refuses_key(key, 1.5f32, &[key]);
        refuses_key(key, "64", &[key]);
    }
    // Just below the limit: the first layer that the file lacks ends it.
    refuses_key("llama.block_count", 1u32 << 20, &["blk.3."]);
    refuses_key("llama.attention.head_count_kv", vec![2u32, 2, 2], &["llama.attention.head_count_kv"]);
}

#[test]
fn a_long_context_is_only_a_number() {
    let mut file = valid();
    file.set_key("llama.context_length", 1u32 << 24);
    assert_eq!(file.load().unwrap().config().trained_context, 1 << 24);
}

#[test]
fn heads_must_divide() {
    refuses_key("llama.attention.head_count_kv", 3u32, &["llama.attention.head_count_kv", "3"]);
    refuses_key("llama.attention.head_count_kv", 8u32, &["llama.attention.head_count_kv", "8"]);
    // 64 / 5 = 12: the query's matrix has other rows.
    refuses_key("llama.attention.head_count", 5u32, &["head_count"]);
    refuses_key("llama.attention.key_length", 15u32, &["llama.attention.key_length", "15"]);
    refuses_key("llama.attention.value_length", 32u32, &["llama.attention.value_length", "32"]);
    // More heads than columns leave heads of no elements.
    refuses_key("llama.attention.head_count", 128u32, &["head_count"]);
}

/// Activations are quantised in blocks of 32 columns, so a matrix of floats with other columns cannot run; such
/// a model must be refused at load, not fail at the first token.
#[test]
fn columns_that_are_no_whole_blocks_are_refused() {
    for (shape, key) in [
        (Shape { embedding: 48, heads: 2, kv_heads: 1, ..SMALL }, "llama.embedding_length"),
        (Shape { ffn: 80, ..SMALL }, "llama.feed_forward_length"),
    ] {
        let error = refusal(&ModelFile::llama(shape, GgmlType::F16));
        assert!(error.contains(key), "{error}");
    }
    let mut file = valid();
    file.set_key("llama.attention.key_length", 12u32);
    for i in 0..SMALL.layers {
        for (part, shape) in [("q", [64, 48]), ("k", [64, 24]), ("v", [64, 24]), ("output", [48, 64])] {
            let bytes = vec![0; 2 * shape[0] * shape[1]];
            file.set_tensor(&format!("blk.{i}.attn_{part}.weight"), GgmlType::F16, &shape, bytes);
        }
    }
    assert!(refusal(&file).contains("key_length"));
}

#[test]
fn numbers_that_are_none_are_named() {
    for key in [
        "llama.attention.layer_norm_rms_epsilon",
        "llama.rope.freq_base",
        "llama.rope.scaling.factor",
        "llama.rope.scale_linear",
    ] {
        for value in [f32::NAN, f32::INFINITY, -1.0] {
            refuses_key(key, value, &[key]);
        }
        refuses_key(key, "1", &[key]);
    }
    for key in ["attn_factor", "yarn_beta_fast", "yarn_beta_slow"] {
        let key = format!("llama.rope.scaling.{key}");
        let mut file = valid();
        file.set_key("llama.rope.scaling.type", "yarn");
        file.set_key("llama.rope.scaling.factor", 4f32);
        assert!(file.load().is_ok());
        file.set_key(&key, f32::NAN);
        assert!(refusal(&file).contains(&key));
    }
}

/// Values that are numbers but make no sense may give senseless logits; they may not bring anything down.
#[test]
fn odd_numbers_do_not_panic() {
    for (key, value) in [
        ("llama.rope.freq_base", 0f32),
        ("llama.rope.freq_base", 1.0),
        ("llama.rope.freq_base", f32::MAX),
        ("llama.rope.scaling.factor", f32::MIN_POSITIVE),
        ("llama.rope.scaling.factor", f32::MAX),
        ("llama.rope.scaling.yarn_beta_fast", 0.0),
        ("llama.rope.scaling.yarn_beta_slow", f32::MAX),
        ("llama.attention.layer_norm_rms_epsilon", 0.0),
        ("llama.attention.layer_norm_rms_epsilon", 1.0),
    ] {
        for kind in ["linear", "yarn"] {
            let mut file = valid();
            file.set_key("llama.rope.scaling.type", kind);
            file.set_key("llama.rope.scaling.factor", 4f32);
            file.set_key(key, value);
            if let Ok(model) = file.load() {
                run(&model);
            }
        }
    }
    let mut file = valid();
    file.set_tensor("rope_freqs.weight", GgmlType::F32, &[8], vec![0; 32]);
    if let Ok(model) = file.load() {
        run(&model);
    }
}

/// Weights are bytes: any of them, NaN and infinite scales included, give logits of some kind.
#[test]
fn hostile_weights_do_not_panic() {
    for ty in GgmlType::all() {
        let mut file = ModelFile::llama(WIDE, ty);
        for name in file.tensor_names().iter().filter(|n| !n.contains("norm")) {
            let shape = file.shape(name);
            let n = ty.row_bytes(shape[0]) * shape[1];
            let bytes = (0..n as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 11) as u8);
            file.set_tensor(name, ty, &shape, bytes.collect());
        }
        run(&file.load().unwrap());
    }
}

#[test]
fn rope_dimensions_are_even_and_fit_the_head() {
    refuses_key("llama.rope.dimension_count", 15u32, &["llama.rope.dimension_count", "15"]);
    refuses_key("llama.rope.dimension_count", 18u32, &["llama.rope.dimension_count", "18"]);
    let mut file = valid();
    file.set_key("llama.rope.dimension_count", 8u32);
    assert!(run(&file.load().unwrap()).iter().all(|l| l.is_finite()));
    refuses_key("llama.rope.scaling.type", "longrope", &["llama.rope.scaling.type", "longrope"]);
}

#[test]
fn other_architectures_and_experts_are_named() {
    refuses_key("general.architecture", "gpt2", &["gpt2", "llama"]);
    refuses_key("general.architecture", "", &["\"\""]);
    refuses_key("general.architecture", 7u32, &["general.architecture"]);
    refuses_key("llama.expert_count", 8u32, &["llama.expert_count", "8"]);
    let mut file = valid();
    file.set_key("llama.expert_count", 0u32);
    assert!(file.load().is_ok());
    // A qwen2 file has its keys under its own name.
    refuses_key("general.architecture", "qwen2", &["qwen2."]);
}

#[test]
fn a_tensor_of_an_unsupported_type_is_named() {
    let bytes = valid().bytes();
    let name = b"blk.1.ffn_up.weight";
    let at = bytes.windows(name.len()).position(|w| w == name).unwrap() + name.len();
    // After the name: the number of dimensions, the two dimensions, the type.
    let ty = at + 4 + 16;
    assert_eq!(bytes[ty..ty + 4], GgmlType::F16.id().to_le_bytes());
    for (id, shown) in [(39u32, "MXFP4"), (9999, "9999"), (u32::MAX, "4294967295")] {
        let mut bytes = bytes.clone();
        bytes[ty..ty + 4].copy_from_slice(&id.to_le_bytes());
        let error = load_bytes(&bytes).err().unwrap().to_string();
        assert!(error.contains("blk.1.ffn_up.weight") && error.contains(shown), "{error}");
    }
}

#[test]
fn a_cut_file_is_refused_wherever_it_is_cut() {
    let bytes = ModelFile::llama(Shape { layers: 1, ..SMALL }, GgmlType::F16).bytes();
    for len in (0..bytes.len()).step_by(997).chain([bytes.len() - 1000]) {
        assert!(load_bytes(&bytes[..len]).is_err(), "{len} of {}", bytes.len());
    }
}

#[test]
fn a_tokenizer_larger_than_the_embedding_is_refused() {
    let with_tokens = |n: usize| {
        let mut file = valid();
        let tokens: Vec<String> = (0..n).map(|i| format!("<0x{i:02X}>")).collect();
        file.set_key("tokenizer.ggml.model", "llama");
        file.set_key("tokenizer.ggml.tokens", tokens.iter().map(String::as_str).collect::<StringArray>());
        file.set_key("tokenizer.ggml.scores", vec![0f32; n]);
        file.set_key("tokenizer.ggml.token_type", vec![1i32; n]);
        file.set_key("tokenizer.ggml.unknown_token_id", 0u32);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        file.write(&path);
        Engine::load(&path, Some(1), None).map(drop).map_err(|e| e.to_string())
    };
    // Padded embeddings have rows without tokens.
    assert_eq!(with_tokens(SMALL.vocab), Ok(()));
    assert_eq!(with_tokens(SMALL.vocab - 5), Ok(()));
    let error = with_tokens(SMALL.vocab + 1).unwrap_err();
    assert!(error.contains("97") && error.contains("96"), "{error}");
}
