//! Prompts that real models go on with.

use std::path::PathBuf;

use skiff::chat::{ChatTemplate, Message};
use skiff::session::Engine;
use skiff::tokenizer::EncodeOptions;

/// A text of the evaluation data; `None`, loudly, where it is not.
fn data(file: &str) -> Option<String> {
    let path: PathBuf = [env!("CARGO_MANIFEST_DIR"), "../shared/data", file].iter().collect();
    let text = std::fs::read_to_string(path);
    text.inspect_err(|_| super::note_skip(&format!("the data file {file}"))).ok()
}

/// Instructions of MT-Bench, trivia questions, and beginnings of source files to go on with, in turn.
pub fn real_prompts(engine: &Engine, n: usize) -> Option<Vec<Vec<u32>>> {
    let template = ChatTemplate::from_gguf(engine.metadata()).unwrap();
    let chat = |text: &str| {
        let prompt = template.render(&[Message::new("user", text.trim())], true, "", "").unwrap();
        prompt.encode(engine.tokenizer()).unwrap()
    };
    let first_turn = |line: &str| {
        let question: serde_json::Value = serde_json::from_str(line).unwrap();
        chat(question["turns"][0].as_str().unwrap())
    };
    let (tasks, trivia) = (data("mt_bench/question.jsonl")?, data("freebaseqa/dev.txt")?);
    let mut tasks = tasks.lines().map(first_turn);
    let mut trivia = trivia.lines().map(|line| chat(line.split('|').next().unwrap_or(line)));
    let mut sources = source_prompts(engine).into_iter();
    let mut prompts = Vec::new();
    while prompts.len() < n {
        let round = [tasks.next(), sources.next(), trivia.next()];
        assert!(round[2].is_some(), "fewer than {n} prompts");
        prompts.extend(round.into_iter().flatten());
    }
    prompts.truncate(n);
    Some(prompts)
}

/// Beginnings of source files.
pub fn source_prompts(engine: &Engine) -> Vec<Vec<u32>> {
    let begins = |source: &String| {
        let text: String = source.chars().take(800).collect();
        engine.tokenizer().encode(&text, EncodeOptions::default()).unwrap()
    };
    source_files().iter().map(begins).collect()
}

/// The sources of these tests and of their modules, those that a prompt can be made of.
fn source_files() -> Vec<String> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let folders = ["tests", "src/model", "src/ops", "src/sampler", "src/eval", "src/cli", "src/gguf"];
    let files = folders.iter().flat_map(|folder| std::fs::read_dir(root.join(folder)).unwrap());
    let mut paths: Vec<PathBuf> = files.map(|file| file.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|e| e == "rs"));
    paths.sort();
    paths.iter().map(|path| std::fs::read_to_string(path).unwrap()).collect()
}
