//! Checkpoints that transformers made, converted: the same ids and the same logits.

mod common;

use std::path::Path;
use std::process::Command;

use common::{arg, data, error, note_skip, ok, smollm2};
use skiff::gguf::{GgmlType, Gguf};
use skiff::model::{FfnStep, KvType, State};
use skiff::session::Engine;
use skiff::skip::Never;
use skiff::tokenizer::EncodeOptions;

const MODELS: [&str; 3] = ["llama", "qwen2", "mistral"];

/// The largest difference of a logit. Both sides compute in f32, so that nothing differs but the order of sums.
const TOLERANCE: f32 = 1e-4;

/// Converts a checkpoint to F32 and compares with what is expected beside it.
fn check(checkpoint: &Path) {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("model.gguf");
    ok(&["hf", arg(checkpoint), "-o", arg(&out), "--outtype", "F32"]);
    let engine = Engine::load(&out, Some(1), None).unwrap();

    let expected = std::fs::read(checkpoint.join("expected.json")).unwrap();
    let expected: serde_json::Value = serde_json::from_slice(&expected).unwrap();
    let mut first = Vec::new();
    for (text, ids) in expected["texts"].as_array().unwrap().iter().zip(expected["ids"].as_array().unwrap()) {
        let ids: Vec<u32> = ids.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
        // SentencePiece knows no control tokens in text.
        let parse_special = checkpoint.join("tokenizer.json").is_file();
        let options = EncodeOptions { add_special: true, parse_special };
        let text = text.as_str().unwrap();
        assert_eq!(engine.tokenizer().encode(text, options).unwrap(), ids, "{checkpoint:?} {text:?}");
        if first.is_empty() {
            first = ids;
        }
    }

    let bytes = std::fs::read(checkpoint.join("expected.logits")).unwrap();
    let want: Vec<f32> = bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    for step in [first.len(), 1] {
        let off = distance(&logits(&engine, &first, KvType::F32, step), &want);
        println!("{checkpoint:?}, {step} tokens a step: {off}");
        assert!(off < TOLERANCE, "{checkpoint:?}, {step} tokens a step: {off}");
    }
    // The test can tell: what a cache in f16 loses is more than that.
    assert!(distance(&logits(&engine, &first, KvType::F16, 1), &want) > TOLERANCE);
}

/// The logits of all `ids`, evaluated `step` at a time.
fn logits(engine: &Engine, ids: &[u32], kv: KvType, step: usize) -> Vec<f32> {
    let (model, on) = (engine.model(), engine.compute());
    let mut state = State::new(model, engine.team(), (ids.len(), ids.len()), kv, Box::new(Never));
    let vocab = model.config().vocab;
    let mut all = vec![0.0; ids.len() * vocab];
    for (ids, out) in ids.chunks(step).zip(all.chunks_mut(step * vocab)) {
        model.forward(on, &mut state, ids, FfnStep::Full).unwrap();
        model.logits_of(on, &mut state, 0..ids.len(), out);
    }
    all
}

/// The largest difference.
fn distance(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let off = |(g, w): (&f32, &f32)| if g.is_nan() { f32::INFINITY } else { (g - w).abs() };
    got.iter().zip(want).map(off).fold(0.0, f32::max)
}

#[test]
fn logits_and_ids_are_those_of_transformers() {
    for name in MODELS {
        check(&data("hf").join(name));
    }
}

/// The same with fresh random models, where Python has what it takes.
#[test]
fn logits_and_ids_are_those_of_transformers_now() {
    let python = std::env::var("SKIFF_PYTHON").unwrap_or_else(|_| "python3".into());
    let packages = "import torch, transformers, tokenizers, sentencepiece";
    let there = Command::new(&python).args(["-c", packages]).output().is_ok_and(|o| o.status.success());
    if !there {
        return note_skip(&format!(
            "Python with torch, transformers and sentencepiece ({python}; SKIFF_PYTHON sets another)"
        ));
    }
    let folder = tempfile::tempdir().unwrap();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let made = Command::new(&python)
        .arg(root.join("tests/make_checkpoints.py"))
        .args([root.join("../../tests/data/alice.txt").as_path(), folder.path()])
        .arg("2")
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    for name in MODELS {
        check(&folder.path().join(name));
    }
}

#[test]
fn metadata_is_what_the_converter_of_llama_cpp_writes() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("model.gguf");
    ok(&["hf", arg(&data("hf/llama")), "-o", arg(&out), "--outtype", "Q8_0"]);
    let bytes = std::fs::read(&out).unwrap();
    let gguf = Gguf::parse(&bytes).unwrap();
    let meta = &gguf.metadata;
    for (key, value) in [
        ("llama.block_count", 2),
        ("llama.context_length", 512),
        ("llama.embedding_length", 32),
        ("llama.feed_forward_length", 64),
        ("llama.attention.head_count", 4),
        ("llama.attention.head_count_kv", 2),
        ("llama.vocab_size", 320),
        ("llama.rope.dimension_count", 8),
        ("general.file_type", 7),
        ("general.quantization_version", 2),
        ("tokenizer.ggml.bos_token_id", 0),
        ("tokenizer.ggml.eos_token_id", 1),
    ] {
        assert_eq!(meta.u32(key), Ok(value), "{key}");
    }
    assert_eq!(meta.str("general.architecture"), Ok("llama"));
    assert_eq!(meta.str("tokenizer.ggml.model"), Ok("gpt2"));
    assert_eq!(meta.str("tokenizer.ggml.pre"), Ok("llama-bpe"));
    assert_eq!(meta.bool("tokenizer.ggml.add_bos_token"), Ok(true));
    assert!(meta.str("tokenizer.chat_template").unwrap().starts_with("{{ bos_token }}"));
    assert_eq!(meta.f32("llama.rope.freq_base"), Ok(10_000.0));
    assert_eq!(gguf.tensor("rope_freqs.weight").unwrap().shape, [4]);
    assert_eq!(gguf.tensor("blk.1.attn_q.weight").unwrap().ty, GgmlType::Q8_0);
    assert_eq!(gguf.tensor("blk.1.attn_norm.weight").unwrap().ty, GgmlType::F32);
}

/// A checkpoint in a folder of its own, to be spoilt.
fn copy(name: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(data("hf").join(name)).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    folder
}

fn fails(folder: &Path, expected: &str) {
    let out = folder.join("out.gguf");
    let message = error(&["hf", arg(folder), "-o", arg(&out)]);
    assert!(message.contains(expected), "{message}");
    assert!(!out.exists() && !folder.join("out.gguf.unfinished").exists(), "{expected}: something was left");
}

#[test]
fn what_is_missing_or_foreign_is_named() {
    let folder = copy("qwen2");
    std::fs::rename(folder.path().join("model.safetensors"), folder.path().join("pytorch_model.bin"))
        .unwrap();
    fails(folder.path(), "PyTorch pickle");

    let edit = |file: &str, from: &str, to: &str, expected: &str| {
        let folder = copy("llama");
        let path = folder.path().join(file);
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{file} has {from}");
        std::fs::write(&path, text.replacen(from, to, 1)).unwrap();
        fails(folder.path(), expected);
    };
    edit("config.json", "LlamaForCausalLM", "T5Model", "\"architectures\" is \"T5Model\"");
    edit("config.json", "\"hidden_size\": 32", "\"hidden_size\": 64", "is of shape");
    edit("config.json", "\"hidden_size\": 32", "\"hidden_size\": -1", "\"hidden_size\" is -1");
    edit(
        "config.json",
        "\"num_hidden_layers\": 2",
        "\"num_hidden_layers\": 3",
        "\"model.layers.2.input_layernorm.weight\" is missing",
    );
    edit("config.json", "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1", "has no place");
    edit("config.json", "silu", "gelu", "only silu");
    edit("config.json", "llama3", "longrope", "\"rope_type\" is \"longrope\"");
    edit("config.json", "{", "[", "config.json");
    edit("tokenizer.json", "BPE", "WordPiece", "only BPE");
    edit("tokenizer.json", "{1,3}", "{1,4}", "--pre NAME");
    edit("model.safetensors.index.json", "model-00001", "../model-00001", "no file of this directory");
}

/// Changes config.json of a copied checkpoint.
fn edit_config(folder: &Path, change: impl FnOnce(&mut serde_json::Value)) {
    let path = folder.join("config.json");
    let mut config = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut config);
    std::fs::write(&path, serde_json::to_vec(&config).unwrap()).unwrap();
}

/// transformers multiplies by `attention_factor` instead of 1 + 0.1 ln(factor), readers of GGUF by both.
#[test]
fn the_magnitude_of_yarn_is_counted_once() {
    let magnitude = |more: serde_json::Value| {
        let folder = copy("llama");
        edit_config(folder.path(), |config| {
            let mut rope = serde_json::json!({"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0,
                "original_max_position_embeddings": 64});
            rope.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            config["rope_parameters"] = rope;
        });
        let out = folder.path().join("model.gguf");
        ok(&["hf", arg(folder.path()), "-o", arg(&out)]);
        let engine = Engine::load(&out, Some(1), None).unwrap();
        engine.model().config().rope.magnitude()
    };
    let close = |got: f32, want: f32| assert!((got - want).abs() < 1e-6, "{got} is not {want}");
    close(magnitude(serde_json::json!({})), 1.138_629_4); // 1 + 0.1 ln 4
    close(magnitude(serde_json::json!({"attention_factor": 1.0})), 1.0);
    close(magnitude(serde_json::json!({"attention_factor": 1.5})), 1.5);
    // (1 + 0.1 * 0.707 ln 4) / (1 + 0.1 ln 4), as DeepSeek's checkpoints have it.
    close(magnitude(serde_json::json!({"mscale": 0.707, "mscale_all_dim": 1.0})), 0.964_326_7);
}

/// SmolLM2, taken apart and converted back, is the model that it was.
#[test]
fn a_real_model_taken_apart_and_converted_back_says_the_same() {
    let python = std::env::var("SKIFF_PYTHON").unwrap_or_else(|_| "python3".into());
    let packages = "import gguf, numpy, safetensors";
    if !Command::new(&python).args(["-c", packages]).output().is_ok_and(|o| o.status.success()) {
        return note_skip(&format!("Python with gguf and safetensors ({python}; SKIFF_PYTHON sets another)"));
    }
    let Some(model) = smollm2() else { return };
    let folder = tempfile::tempdir().unwrap();
    let (apart, back) = (folder.path().join("apart"), folder.path().join("back.gguf"));
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/take_apart.py");
    let made = Command::new(&python).args([&script, &model, &apart]).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    ok(&["hf", arg(&apart), "-o", arg(&back), "--outtype", "F32", "--pre", "smollm"]);
    let whole = folder.path().join("f32.gguf");
    ok(&["quantize", arg(&model), arg(&whole), "F32"]);

    let text = "<|im_start|>user\nWhy is the sky blue? It's 1234 o'clock.<|im_end|>\n<|im_start|>assistant\n";
    let greedy = |path: &Path| {
        let engine = Engine::load(path, Some(2), None).unwrap();
        let options = EncodeOptions { add_special: true, parse_special: true };
        let mut ids = engine.tokenizer().encode(text, options).unwrap();
        let first = logits(&engine, &ids, KvType::F16, ids.len());
        for _ in 0..24 {
            let all = logits(&engine, &ids, KvType::F16, ids.len());
            let last = all.rchunks(engine.model().config().vocab).next().unwrap();
            ids.push((0..last.len()).max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap() as u32);
        }
        (ids, first)
    };
    let (want, got) = (greedy(&whole), greedy(&back));
    assert_eq!(got.0, want.0);
    // The same weights by the same kernels: nothing at all may differ.
    assert_eq!(distance(&got.1, &want.1), 0.0);
}

#[test]
fn the_card_and_the_name_tell_who_made_it() {
    let folder = copy("llama");
    let card = "---\nlicense: mit\nlanguage:\n- en\n- de\ntags: [tiny]\npipeline_tag: text-generation\n\
        base_model: some-org/Base-1B-v2\n---\n# Text\n";
    std::fs::write(folder.path().join("README.md"), card).unwrap();
    let dir = folder.path().join("Tiny-Llama-3.1-Instruct");
    std::fs::create_dir(&dir).unwrap();
    for entry in std::fs::read_dir(folder.path()).unwrap().map(Result::unwrap) {
        if entry.file_type().unwrap().is_file() {
            std::fs::rename(entry.path(), dir.join(entry.file_name())).unwrap();
        }
    }
    let out = folder.path().join("model.gguf");
    ok(&["hf", arg(&dir), "-o", arg(&out)]);
    let bytes = std::fs::read(&out).unwrap();
    let meta = Gguf::parse(&bytes).unwrap().metadata;
    for (key, value) in [
        ("name", "Tiny Llama 3.1 Instruct"),
        ("basename", "Tiny-Llama-3.1"),
        ("finetune", "Instruct"),
        ("size_label", "39K"),
        ("license", "mit"),
        ("base_model.0.name", "Base 1B v2"),
        ("base_model.0.organization", "Some Org"),
        ("base_model.0.version", "v2"),
        ("base_model.0.repo_url", "https://huggingface.co/some-org/Base-1B-v2"),
    ] {
        assert_eq!(meta.str(&format!("general.{key}")), Ok(value), "{key}");
    }
    assert_eq!(meta.u32("general.base_model.count"), Ok(1));
    for (key, words) in [("tags", &["tiny", "text-generation"]), ("languages", &["en", "de"])] {
        let found = meta.array_str(&format!("general.{key}")).unwrap();
        assert_eq!(found.iter().collect::<Vec<_>>(), words.map(str::as_bytes), "{key}");
    }
}

/// Not every byte is checked (weights may be anything), but none may crash it.
#[test]
fn spoilt_safetensors_are_errors() {
    let folder = copy("qwen2");
    let path = folder.path().join("model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    let out = folder.path().join("out.gguf");
    let options = || skiff_convert::hf::HfOptions {
        recipe: skiff_convert::recipe::Recipe::new(skiff_convert::recipe::Mix::Only(GgmlType::F16)),
        imatrix: None,
        pre: None,
        quiet: true,
    };
    let convert = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        skiff_convert::hf::convert(folder.path(), &out, &options())
    };
    for end in (0..whole.len()).step_by(997).chain(0..20) {
        assert!(convert(&whole[..end]).is_err(), "cut at {end}");
    }
    for at in (0..2000).step_by(7) {
        for bits in [0x01, 0x80, 0xff] {
            let mut bytes = whole.clone();
            bytes[at] ^= bits;
            let _ = convert(&bytes); // no panic
        }
    }
    convert(&whole).unwrap();
}

/// Rewrites the header of a safetensors file.
fn edit_header(path: &Path, change: impl FnOnce(&mut serde_json::Value)) {
    let bytes = std::fs::read(path).unwrap();
    let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header = serde_json::from_slice(&bytes[8..8 + n]).unwrap();
    change(&mut header);
    with_header(path, &serde_json::to_vec(&header).unwrap(), &bytes[8 + n..]);
}

fn with_header(path: &Path, header: &[u8], data: &[u8]) {
    let length = (header.len() as u64).to_le_bytes();
    std::fs::write(path, [&length, header, data].concat()).unwrap();
}

#[test]
fn hostile_headers_are_errors_that_say_what() {
    let tensor = "model.norm.weight";
    let edit = |expected: &str, change: &dyn Fn(&mut serde_json::Value)| {
        let folder = copy("qwen2");
        edit_header(&folder.path().join("model.safetensors"), |header| change(&mut header[tensor]));
        fails(folder.path(), expected);
    };
    let json = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
    for offsets in ["[0, 64]", "[18446744073709551600, 18446744073709551615]", "[64, 0]", "[-1, 63]", "[0]"] {
        edit("malformed safetensors header", &|t| t["data_offsets"] = json(offsets));
    }
    for shape in ["[18446744073709551615, 2]", "[4294967296, 4294967296]", "[-1]", "[1e9]", "[]"] {
        edit("malformed safetensors header", &|t| t["shape"] = json(shape));
    }
    edit("malformed safetensors header", &|t| t["dtype"] = json("\"F31\""));
    edit("is of type U16, not F32, F16 or BF16", &|t| {
        let size = t["data_offsets"][1].as_u64().unwrap() - t["data_offsets"][0].as_u64().unwrap();
        (t["dtype"], t["shape"]) = (json("\"U16\""), (size / 2).into());
        t["shape"] = serde_json::json!([size / 2]);
    });

    let folder = copy("qwen2");
    let path = folder.path().join("model.safetensors");
    let nested = [b"[".repeat(200_000), b"]".repeat(200_000)].concat();
    with_header(&path, &nested, &[]);
    fails(folder.path(), "malformed safetensors header: ");
    for length in [u64::MAX, 1 << 40, 9] {
        std::fs::write(&path, [&length.to_le_bytes()[..], b"{}"].concat()).unwrap();
        fails(folder.path(), "not a safetensors file");
    }
}

#[test]
fn hostile_json_is_an_error_that_says_where() {
    let nested = [b"{\"a\":".repeat(200_000), b"1".to_vec(), b"}".repeat(200_000)].concat();
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"] {
        for bytes in [&nested[..], b"", b"\xff\xfe", b"[1, 2]", b"{\"a\": 1", b"7"] {
            let folder = copy("llama");
            std::fs::write(folder.path().join(name), bytes).unwrap();
            fails(folder.path(), name);
        }
    }
    let place = |file: serde_json::Value, expected: &str| {
        let folder = copy("llama");
        let path = folder.path().join("model.safetensors.index.json");
        let mut index: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        index["weight_map"]["model.norm.weight"] = file;
        std::fs::write(&path, serde_json::to_vec(&index).unwrap()).unwrap();
        fails(folder.path(), expected);
    };
    for file in ["/etc/passwd", "../x.safetensors", "..", "a/../../x", "a\\b", ""] {
        place(file.into(), "\"model.norm.weight\" is in no file of this directory");
    }
    place(7.into(), "is in no file of this directory");
    place("gone.safetensors".into(), "gone.safetensors: No such file");
}
