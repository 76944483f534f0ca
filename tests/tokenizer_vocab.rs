//! llama.cpp's own tokenizer cases: every text of `*.inp` must give the ids of `*.out`, and the ids the text again.

use std::path::{Path, PathBuf};

use skiff::gguf::Gguf;
use skiff::tokenizer::{DecodeOptions, EncodeOptions, Tokenizer};

const SEPARATOR: &str = "\n__ggml_vocab_test__\n";

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data/vocab")
}

fn vocabularies() -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder()) else {
        eprintln!("SKIPPED: {} is absent, llama.cpp's tokenizer cases did not run", folder().display());
        return Vec::new();
    };
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|ext| ext == "gguf"));
    paths.sort();
    paths
}

fn load(path: &Path) -> Tokenizer {
    let bytes = std::fs::read(path).unwrap();
    let gguf = Gguf::parse(&bytes).unwrap();
    let start = std::time::Instant::now();
    let tokenizer = Tokenizer::from_gguf(&gguf.metadata).unwrap();
    eprintln!("{}: built in {:?}", path.display(), start.elapsed());
    tokenizer
}

fn cases(path: &Path) -> Vec<(String, Vec<u32>)> {
    let sibling = |suffix: &str| {
        let mut name = path.as_os_str().to_owned();
        name.push(suffix);
        std::fs::read_to_string(name).unwrap()
    };
    let (inputs, outputs) = (sibling(".inp"), sibling(".out"));
    let mut inputs: Vec<&str> = inputs.split(SEPARATOR).collect();
    if inputs.last() == Some(&"") {
        inputs.pop();
    }
    let ids = |line: &str| line.split_whitespace().map(|id| id.parse().unwrap()).collect();
    let outputs: Vec<Vec<u32>> = outputs.lines().map(ids).collect();
    assert_eq!(inputs.len(), outputs.len(), "{}", path.display());
    inputs.into_iter().map(str::to_owned).zip(outputs).collect()
}

#[test]
fn every_case_gives_the_ids_of_llama_cpp_and_its_own_text_again() {
    for path in vocabularies() {
        let tokenizer = load(&path);
        let cases = cases(&path);
        let mut failures = Vec::new();
        for (text, expected) in &cases {
            let ids = tokenizer.encode(text, EncodeOptions::default()).unwrap();
            let back = tokenizer.decode(&ids, DecodeOptions::default());
            let mut stream = tokenizer.detokenizer().whole_text();
            let mut streamed: String = ids.iter().map(|&id| stream.push(id)).collect();
            streamed += &stream.finish();
            if ids != *expected || back != text.as_bytes() || streamed != *text {
                failures.push(format!(
                    "{text:?}\n  got      {ids:?}\n  expected {expected:?}\n  decoded {streamed:?}"
                ));
            }
        }
        eprintln!("{}: {}/{}", path.display(), cases.len() - failures.len(), cases.len());
        assert_eq!(cases.len(), 46);
        assert!(failures.is_empty(), "{}", failures.join("\n"));
    }
}

#[test]
fn control_tokens_are_recognised_only_on_request() {
    for path in vocabularies() {
        let tokenizer = load(&path);
        for id in 0..tokenizer.vocab_size() as u32 {
            if !tokenizer.is_control(id) {
                continue;
            }
            let text = tokenizer.token_text(id).unwrap().into_owned();
            let encode = |parse_special| {
                tokenizer.encode(&text, EncodeOptions { add_special: false, parse_special }).unwrap()
            };
            assert_eq!(encode(true), [id]);
            assert!(encode(false).iter().all(|&id| !tokenizer.is_control(id)), "{text}");
        }
    }
}
