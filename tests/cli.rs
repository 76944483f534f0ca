//! The command as its users see it: stdout, stderr and exit codes.

mod common;

use std::path::{Path, PathBuf};

use assert_cmd::Command;
use common::models::{ModelFile, WIDE};
use serde_json::Value;
use skiff::gguf::{Builder, GgmlType, StringArray};

/// Runs `skiff` with these arguments and an empty stdin.
fn skiff(args: &[&str]) -> Outcome {
    skiff_with(args, "")
}

fn skiff_with(args: &[&str], stdin: &str) -> Outcome {
    let mut command = Command::cargo_bin("skiff").expect("the binary is built");
    let output = command.args(args).write_stdin(stdin).output().expect("it runs");
    Outcome {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).expect("text"),
        stderr: String::from_utf8(output.stderr).expect("text"),
    }
}

#[derive(Debug)]
struct Outcome {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Outcome {
    /// The stdout of a success.
    #[track_caller]
    fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "{self:?}");
        self.stdout
    }

    /// The error line of a failure, which must be the whole of stderr, with nothing on stdout.
    #[track_caller]
    fn error(self, code: i32) -> String {
        assert_eq!(self.code, Some(code), "{self:?}");
        assert_eq!(self.stdout, "");
        assert_eq!(self.stderr.lines().count(), 1, "{self:?}");
        self.stderr.strip_prefix("error: ").expect("`error: ...`").trim_end().to_owned()
    }
}

/// A file with nothing but a vocabulary: bytes, a few words, begin and end of text.
fn vocabulary(dir: &Path) -> PathBuf {
    let special = ["<unk>", "<s>", "</s>"].map(String::from);
    let bytes = (0..256).map(|b| format!("<0x{b:02X}>"));
    let words = ["\u{2581}", "h", "i", "\u{2581}h", "hi", "\u{2581}hi"].map(String::from);
    let tokens: StringArray = special.iter().cloned().chain(bytes).chain(words.clone()).collect();
    let kinds = [2, 3, 3].into_iter();
    let kinds: Vec<i32> = kinds.chain([6; 256]).chain([1; 6]).collect();
    let scores: Vec<f32> = (0..tokens.len()).map(|i| i as f32).collect();
    let mut builder = Builder::new();
    builder.insert("general.architecture", "none-of-ours").unwrap();
    builder.insert("tokenizer.ggml.model", "llama").unwrap();
    builder.insert("tokenizer.ggml.tokens", tokens).unwrap();
    builder.insert("tokenizer.ggml.token_type", kinds).unwrap();
    builder.insert("tokenizer.ggml.scores", scores).unwrap();
    let path = dir.join("vocabulary.gguf");
    let file = std::fs::File::create(&path).unwrap();
    builder.start(file).unwrap().finish().unwrap();
    path
}

fn as_str(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

#[test]
fn wrong_usage_exits_with_2() {
    for args in [
        &[][..],
        &["rum"],
        &["run", "--nope"],
        &["run", "--temp", "x", "hi"],
        &["run", "--top-p", "2", "hi"],
        &["run", "--logit-bias", "1", "hi"],
        &["run", "--samplers", "xtc", "hi"],
        &["run", "--skip", "sometimes", "hi"],
        &["run", "--skip-cold", "3", "hi"],
        &["run", "--kernel", "abacus", "hi"],
        &["run", "--kv", "q3", "hi"],
        &["run", "-c", "0", "hi"],
        &["run", "-c", "99999999999999999999", "hi"],
        &["run", "-t", "0", "hi"],
        &["run", "-n", "-2", "hi"],
        &["run", "--raw", "--system", "x", "hi"],
        &["run", "--json-object", "--grammar", "x", "hi"],
        &["run", "hi", "-f", "x"],
        &["ppl"],
        &["pull"],
        &["tokenize", "a", "b"],
    ] {
        let outcome = skiff(args);
        assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(2), ""), "{args:?}: {}", outcome.stderr);
        assert!(!outcome.stderr.is_empty(), "{args:?}");
    }
}

#[test]
fn a_misspelled_command_gets_a_suggestion() {
    assert!(skiff(&["tokenise"]).stderr.contains("tokenize"));
}

#[test]
fn help_is_a_result_and_has_examples() {
    for command in ["run", "chat", "info", "pull", "tokenize", "detokenize", "ppl"] {
        let help = skiff(&[command, "--help"]).ok();
        assert!(help.contains("Examples:") && help.contains(&format!("skiff {command}")), "{help}");
    }
    assert!(skiff(&["--version"]).ok().starts_with("skiff "));
}

#[test]
fn errors_are_one_line_that_names_the_datum() {
    let dir = tempfile::tempdir().unwrap();
    let not_gguf = dir.path().join("x.gguf");
    std::fs::write(&not_gguf, b"not a model").unwrap();
    let vocabulary = vocabulary(dir.path());

    let error = skiff(&["run", "-m", as_str(&not_gguf), "hi"]).error(1);
    assert!(error.contains("x.gguf"), "{error}");
    let error = skiff(&["run", "-m", as_str(&vocabulary), "hi"]).error(1);
    assert!(error.contains("none-of-ours"), "{error}");
    let error = skiff(&["tokenize", "-m", as_str(&vocabulary), "-f", "absent.txt"]).error(1);
    assert!(error.contains("absent.txt"), "{error}");
    let error = skiff(&["detokenize", "-m", as_str(&vocabulary), "1", "100000"]).error(1);
    assert!(error.contains("100000"), "{error}");
    let error = skiff(&["detokenize", "-m", as_str(&vocabulary), "1", "x2"]).error(1);
    assert!(error.contains("x2"), "{error}");
    let bad = dir.path().join("bad.txt");
    std::fs::write(&bad, b"ab\xff").unwrap();
    let error = skiff(&["tokenize", "-m", as_str(&vocabulary), "-f", as_str(&bad)]).error(1);
    assert!(error.contains("bad.txt") && error.contains("byte 2"), "{error}");
}

#[test]
fn tokenize_and_detokenize_need_nothing_but_a_vocabulary() {
    let dir = tempfile::tempdir().unwrap();
    let path = vocabulary(dir.path());
    let model = ["-m", as_str(&path)];
    let run = |args: &[&str], stdin: &str| skiff_with(&[args, &model].concat(), stdin).ok();

    assert_eq!(run(&["tokenize", "hi"], ""), "[1, 264]\n");
    assert_eq!(run(&["tokenize", "--no-bos", "hi"], ""), "[264]\n");
    assert_eq!(run(&["tokenize", "--no-bos", "--parse-special", "</s>"], ""), "[2]\n");
    assert_ne!(run(&["tokenize", "--no-bos", "</s>"], ""), "[2]\n");
    for text in ["hi hi", "h\u{e9}!\n\n", "  two  spaces ", "\u{1f980}"] {
        let ids = run(&["tokenize"], text);
        assert_eq!(run(&["detokenize"], &ids), text);
        let ids: Vec<&str> = ids.trim_matches(['[', ']', '\n']).split(", ").collect();
        assert_eq!(run(&[&["detokenize"], &ids[..]].concat(), ""), text);
    }
    assert_eq!(run(&["detokenize", "--special", "1", "264"], ""), "<s>hi");
    assert_eq!(run(&["detokenize"], "[]"), "");
}

#[test]
fn info_describes_the_machine_and_a_file_that_cannot_run() {
    let info: Value = serde_json::from_str(&skiff(&["info", "--json", "--no-bandwidth"]).ok()).unwrap();
    let kernels = info["kernels"].as_array().unwrap();
    assert_eq!(kernels.iter().filter(|k| k["state"] == "chosen").count(), 1, "{info}");
    assert!(kernels.iter().any(|k| k["kernel"] == "scalar" && k["available"] == true));
    let machine = &info["machine"];
    assert!(machine["physical_cores"].as_u64() >= Some(1) && machine["allowed_cpus"].is_string(), "{info}");
    if cfg!(target_os = "linux") {
        assert!(machine["core_kinds"][0]["cores"].as_u64() >= Some(1), "{info}");
    }

    let dir = tempfile::tempdir().unwrap();
    let path = vocabulary(dir.path());
    let info: Value = serde_json::from_str(&skiff(&["info", "--json", "-m", as_str(&path)]).ok()).unwrap();
    assert!(info["model"]["cannot_run"].as_str().unwrap().contains("none-of-ours"), "{info}");
    assert_eq!(info["tokenizer"]["tokens"], 265);
    assert!(skiff(&["info", "-m", as_str(&path)]).ok().contains("none-of-ours"));
}

/// Runs `skiff` on the default model, or returns from the test where it is not to be had.
macro_rules! with_model {
    ($name:ident) => {
        let Some(path) = common::smollm2() else { return };
        let $name = move |args: &[&str]| skiff(&[&args[..1], &["-m", as_str(&path)], &args[1..]].concat());
    };
}

#[test]
fn greedy_text_does_not_depend_on_the_threads() {
    with_model!(on);
    let text = |threads| on(&["run", "Why is the sky blue?", "--temp", "0", "-n", "40", "-t", threads]).ok();
    let one = text("1");
    assert!(one.contains("light"), "{one}");
    assert_eq!(text("1"), one);
    assert_eq!(text("2"), one);
    let q8 = on(&["run", "Why is the sky blue?", "--temp", "0", "-n", "10", "--kv", "q8_0"]).ok();
    assert!(!q8.is_empty());
}

#[test]
fn a_seed_repeats_a_text() {
    with_model!(on);
    let text = |seed| on(&["run", "Tell me something.", "-n", "20", "--seed", seed]).ok();
    assert_eq!(text("7"), text("7"));
    assert_ne!(text("7"), text("8"));
}

#[test]
fn a_schema_and_a_grammar_are_followed() {
    with_model!(on);
    let schema = r#"{"type": "object", "additionalProperties": false, "required": ["name", "age"],
        "properties": {"name": {"type": "string", "maxLength": 12},
                       "age": {"type": "integer", "minimum": 1, "maximum": 99}}}"#;
    let run = |flags: &[&str]| on(&[&["run", "Invent a person.", "--temp", "0", "-q"], flags].concat());
    let person: Value = serde_json::from_str(&run(&["--json-schema", schema]).ok()).unwrap();
    assert!(person["name"].is_string() && (1..=99).contains(&person["age"].as_i64().unwrap()), "{person}");
    assert_eq!(person.as_object().unwrap().len(), 2);

    let dir = tempfile::tempdir().unwrap();
    let grammar = dir.path().join("g.lark");
    std::fs::write(&grammar, "start: \"yes\" | \"no\"").unwrap();
    let answer = run(&["--grammar", &format!("@{}", as_str(&grammar))]).ok();
    assert!(["yes", "no"].contains(&answer.as_str()), "{answer}");

    assert!(run(&["--grammar", "start: ("]).error(1).starts_with("grammar: "));
    assert!(run(&["--json-schema", "{"]).error(1).starts_with("JSON schema: "));
    assert!(run(&["--grammar", "@absent.lark"]).error(1).contains("absent.lark"));
}

#[test]
fn length_stops_and_context_end_a_text() {
    with_model!(on);
    let count = |flags: &[&str]| {
        on(&[&["run", "--raw", "1, 2, 3, 4, 5, 6,", "--temp", "0", "--stats-json", "-q"], flags].concat())
    };
    let statistics = |outcome: &Outcome| -> Value { serde_json::from_str(outcome.stderr.trim()).unwrap() };

    let none = count(&["-n", "0"]);
    assert_eq!((none.stdout.as_str(), &statistics(&none)["end"]), ("", &Value::from("length")));
    let some = count(&["-n", "12"]);
    assert!(some.stdout.contains("8"), "{some:?}");
    assert_eq!(statistics(&some)["generated_tokens"], 12);
    let stopped = count(&["-n", "40", "--stop", "x", "--stop", "8"]);
    assert!(stopped.stdout.contains('7') && !stopped.stdout.contains('8'), "{stopped:?}");
    assert_eq!(statistics(&stopped)["end"], "stop");
    let full = count(&["-c", "30", "--ignore-eos"]);
    assert_eq!((full.code, &statistics(&full)["end"]), (Some(0), &Value::from("context")));
    let shifted = count(&["-c", "30", "--ignore-eos", "-n", "60", "--context-shift"]);
    assert_eq!(statistics(&shifted)["generated_tokens"], 60);

    let spoken = on(&["run", "--raw", "1, 2, 3,", "--temp", "0", "-c", "30", "--ignore-eos"]);
    assert!(spoken.stderr.contains("the context of 30 tokens is full"), "{spoken:?}");
    let long = on(&["run", "Why is the sky blue?", "-c", "8"]).error(1);
    assert!(long.contains("the context is full"), "{long}");
    let huge = on(&["run", "hi", "-c", "16000000"]).error(1);
    assert!(huge.contains("16000000"), "{huge}");
}

#[test]
fn the_prompt_comes_from_an_argument_a_file_or_stdin() {
    let Some(path) = common::smollm2() else { return };
    let tail = ["-m", as_str(&path), "--temp", "0", "-n", "8", "-q"];
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("prompt.txt");
    std::fs::write(&file, "Say hello.").unwrap();
    let argument = skiff(&[&["run", "Say hello."], &tail[..]].concat()).ok();
    assert_eq!(skiff(&[&["run", "-f", as_str(&file)], &tail[..]].concat()).ok(), argument);
    assert_eq!(skiff_with(&[&["run"], &tail[..]].concat(), "Say hello.").ok(), argument);
    let pirate = skiff(&[&["run", "Say hello.", "--system", "You are a pirate."], &tail[..]].concat()).ok();
    assert_ne!(pirate, argument);
    let raw = skiff(&[&["run", "Say hello.", "--raw"], &tail[..]].concat()).ok();
    assert_ne!(raw, argument);
    let empty = skiff(&[&["run", "", "--raw"], &tail[..]].concat()).error(1);
    assert!(empty.contains("empty"), "{empty}");
}

#[test]
fn skipping_is_counted_and_off_changes_nothing() {
    with_model!(on);
    let run = |flags: &[&str]| {
        on(&[&["run", "Tell me a story.", "--temp", "0", "-n", "48", "--stats-json", "-q"], flags].concat())
    };
    let off = run(&["--skip", "off"]);
    let never = run(&["--skip", "ffn-skip", "--skip-threshold", "1"]);
    assert_eq!(off.stdout, never.stdout);
    let flags = ["--skip", "ffn-skip", "--skip-threshold", "0.9", "--skip-warmup", "8", "--skip-report"];
    let skipped = run(&flags);
    let statistics: Value = serde_json::from_str(skipped.stderr.trim()).unwrap();
    let share = statistics["ffn_skipped"].as_f64().unwrap();
    assert!(share > 0.05 && share < 0.6, "{statistics}");
    let layers = statistics["skipped_by_layer"].as_array().unwrap();
    assert_eq!((layers.len(), layers[0].as_f64(), layers[29].as_f64()), (30, Some(0.0), Some(0.0)));
    assert_ne!(skipped.stdout, off.stdout);
    let error = on(&["run", "hi", "--skip-cold", "5,99"]).error(2);
    assert!(error.contains("5,99") && error.contains("30"), "{error}");
}

const TEXT: &str = "The river rises in the hills above the town and flows east for forty miles. \
    In the last century it was used to carry timber to the mills, and the mills made the town rich. ";

#[test]
fn ppl_reports_its_keys_and_writes_logits() {
    with_model!(on);
    let dir = tempfile::tempdir().unwrap();
    let (text, logits) = (dir.path().join("text.txt"), dir.path().join("logits.npy"));
    std::fs::write(&text, TEXT.repeat(8)).unwrap();
    let common = ["ppl", "-f", as_str(&text), "-c", "64", "--chunks", "2"];
    let flags = ["--skip", "ffn-skip", "--kl", "--json", "--logits-out", as_str(&logits)];
    let report: Value = serde_json::from_str(&on(&[&common[..], &flags].concat()).ok()).unwrap();
    for key in [
        "ppl",
        "nll",
        "tokens",
        "ffn_skipped",
        "ffn_bytes_skipped",
        "output_bytes_skipped",
        "kl_mean",
        "kl_p99",
        "same_top1",
    ] {
        assert!(report[key].is_number(), "{key}: {report}");
    }
    assert_eq!(report["tokens"], 2 * 31);
    assert_eq!(report["chunks"], 2);
    let header = 128;
    assert_eq!(std::fs::metadata(&logits).unwrap().len(), header + 2 * 64 * 49152 * 4);

    let table = on(&common).ok();
    assert!(table.starts_with("perplexity"), "{table}");
    let warm = on(&["ppl", "-f", as_str(&text), "-c", "64", "--warm", "63"]).error(1);
    assert!(warm.contains("63"), "{warm}");
    let short = on(&["ppl", "-f", as_str(&text), "-c", "8000"]).error(1);
    assert!(short.contains("8000"), "{short}");
}

#[test]
fn a_piped_chat_keeps_its_history() {
    let Some(path) = common::smollm2() else { return };
    let chat = |input: &str, flags: &[&str]| {
        skiff_with(&[&["chat", "-m", as_str(&path), "--temp", "0", "-n", "24"], flags].concat(), input)
    };
    let two = chat("My name is Bob.\nWhat is my name?\n", &[]).ok();
    let one = chat("My name is Bob.\n", &[]).ok();
    let with_history = two.strip_prefix(&one).expect("the first reply, unchanged");
    // Forgetting gives the same reply however it is done, and another than remembering. (A chat that began with the question
    // may part from it at a near tie: what is in the cache already was evaluated in other pieces, with other roundings.)
    let cleared = chat("My name is Bob.\n/clear\nWhat is my name?\n", &[]).ok();
    assert_ne!(cleared.strip_prefix(&one), Some(with_history), "nothing was forgotten");
    let undone = chat("My name is Bob.\n/undo\nWhat is my name?\n", &[]).ok();
    assert_eq!(undone, cleared);
    let again = chat("My name is Bob.\n/regen\n", &[]).ok();
    let opening = |text: &str| text.split_whitespace().take(2).collect::<Vec<_>>().join(" ");
    assert_eq!(again.strip_prefix(&one).map(opening), Some(opening(&one)));
    let joined = chat("What is\\\nmy name?\n", &[]).ok();
    assert_eq!(chat("What is\\\nmy name?\n/quit\nWhat is my name?\n", &[]).ok(), joined);
}

#[test]
fn chat_commands_speak_on_stderr_only() {
    let Some(path) = common::smollm2() else { return };
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("chat.json");
    let input = format!("/help\n/stast\n/undo\n/regen\n/system Be brief.\n/save {}\n/stats\n", as_str(&file));
    let outcome = skiff_with(&["chat", "-m", as_str(&path)], &input);
    assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(0), ""), "{outcome:?}");
    assert!(outcome.stderr.contains("did you mean") && outcome.stderr.contains("/stats"), "{outcome:?}");
    let saved: Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    assert_eq!(saved, serde_json::json!([{"role": "system", "content": "Be brief."}]));
}

#[test]
fn a_long_chat_forgets_its_oldest_turns() {
    let Some(path) = common::smollm2() else { return };
    let input = "Tell me about rivers, please.\nAnd what about lakes?\nAnd the sea?\nAnd rain?\n";
    let args = ["chat", "-m", as_str(&path), "--temp", "0", "-n", "24", "-c", "128"];
    let outcome = skiff_with(&args, input);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert!(outcome.stderr.contains("oldest turn was forgotten"), "{outcome:?}");
}

/// The default model's calibration is built in: `auto` works at once, and says what was measured.
#[test]
fn skip_auto_works_from_the_first_run() {
    let Some(path) = common::smollm2() else { return };
    let always = ["run", "-m", as_str(&path), "--raw", "--temp", "0", "-n", "40", "--ignore-eos"];
    let outcome = skiff(&[&always[..], &["--skip", "auto", "Once upon a time"]].concat());
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    for policy in ["cut", "neurons", "stand-in", "mixed"] {
        let announced = format!("skip auto: {policy}+output at ratio");
        let announced = outcome.stderr.lines().find(|line| line.starts_with(&announced));
        assert!(announced.is_some_and(|line| line.contains("perplexity x 1.0")), "{outcome:?}");
    }
    assert!(
        outcome.stderr.contains("skip auto: output, measured logits of likely tokens exact"),
        "{outcome:?}"
    );
    // Whether that is faster here, it found out; it runs accordingly.
    let (pays, not) =
        (outcome.stderr.contains("faster here than"), outcome.stderr.contains("no faster here"));
    assert!(pays != not, "{outcome:?}");
    let in_full = outcome.stderr.contains("(--skip off)");
    assert_eq!(in_full, not, "{outcome:?}");
    let static_ = skiff(&[&always[..], &["--skip", "static", "--skip-ratio", "0.1", "Once"]].concat());
    assert_eq!(static_.code, Some(0), "{static_:?}");
}

/// From texts to a file beside the model, which every command finds.
#[test]
fn a_calibration_is_learnt_from_texts_and_found_again() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let mut file = ModelFile::llama(WIDE, GgmlType::Q4_0);
    file.set_vocabulary();
    file.write(&at("m.gguf"));
    let text = |n: usize, step: usize| -> String {
        (0..n).map(|i| char::from(b'a' + (i * step + i * i / 7) as u8 % 26)).collect()
    };
    for (name, text) in
        [("wiki.txt", text(2000, 3)), ("chats.txt", text(700, 11)), ("short.txt", text(99, 1))]
    {
        std::fs::write(at(name), text).unwrap();
    }
    let [model, wiki, chats, short] =
        ["m.gguf", "wiki.txt", "chats.txt", "short.txt"].map(|name| as_str(&at(name)).to_owned());
    let calibrate = |second: &str| {
        let sizes = ["--windows", "2", "--quality-windows", "1", "-q", "--json"];
        skiff(&[&["calibrate", "-m", &model, "-f", &wiki, "-f", second][..], &sizes].concat())
    };
    let error = calibrate(&short).error(1);
    assert!(error.contains("wiki.txt, short.txt: text 2 has") && error.contains("needs 512"), "{error}");
    let found: Value = serde_json::from_str(&calibrate(&chats).ok()).unwrap();
    let points = found["points"].as_array().unwrap();
    for policy in ["cut", "neurons", "stand-in", "mixed", "ffn-skip"] {
        assert!(
            points.iter().any(|p| p["policy"] == policy && p["bytes"].as_f64() > Some(0.01)),
            "{points:?}"
        );
    }
    assert!(at("m.skip.gguf").is_file());

    // On the text that it was learnt from, about the share that was asked for.
    let skipping = ["--skip", "stand-in", "--skip-ratio"];
    let ppl = ["ppl", "-m", &model, "-f", &wiki, "-c", "512", "--json"];
    let report: Value = serde_json::from_str(&skiff(&[&ppl[..], &skipping, &["0.3"]].concat()).ok()).unwrap();
    let skipped = report["ffn_skipped"].as_f64().unwrap();
    assert!((0.1..0.5).contains(&skipped), "{report}");
    let error = skiff(&[&ppl[..], &skipping, &["0.99"]].concat()).error(2);
    assert!(error.contains("0.99") && error.contains("at most"), "{error}");
}

#[test]
fn ppl_tells_how_much_of_the_output_matrix_was_left_unread() {
    let Some(model) = common::smollm2() else { return };
    let text = common::data("alice.txt");
    let ppl = ["ppl", "-m", as_str(&model), "-f", as_str(&text), "-c", "256", "--chunks", "1"];
    let report = |skip: &str| -> Value {
        serde_json::from_str(&skiff(&[&ppl[..], &["--skip", skip, "--json"]].concat()).ok()).unwrap()
    };
    assert_eq!(report("off")["output_bytes_skipped"], 0.0);
    let share = report("output")["output_bytes_skipped"].as_f64().unwrap();
    assert!((0.35..0.5).contains(&share), "{share}");
    assert!(skiff(&[&ppl[..], &["--skip", "output"]].concat()).ok().contains("output skipped"));
}

/// What the file says about sampling holds where no flag does; what makes no sense is an error that names it.
#[test]
fn the_model_says_how_it_is_sampled() {
    let dir = tempfile::tempdir().unwrap();
    let model = as_str(&dir.path().join("m.gguf")).to_owned();
    let write = |key: &str, value: f32| {
        let mut file = ModelFile::llama(WIDE, GgmlType::Q4_0);
        file.set_vocabulary();
        file.set_key(key, value);
        file.write(dir.path().join("m.gguf").as_path());
    };
    let run =
        |flags: &[&str]| skiff(&[&["run", "-m", &model, "--raw", "-n", "12", "-q"], flags, &["ab"]].concat());
    write("general.sampling.temp", 0.0);
    let greedy = run(&["--temp", "0"]).ok();
    assert_eq!([run(&["--seed", "1"]).ok(), run(&["--seed", "2"]).ok()], [greedy.clone(), greedy.clone()]);
    assert_ne!(
        run(&["--seed", "1", "--temp", "9", "--top-k", "0", "--top-p", "1", "--min-p", "0"]).ok(),
        greedy
    );
    write("general.sampling.top_p", 3.0);
    let error = run(&[]).error(2);
    assert!(error.contains("top_p") && error.contains('3'), "{error}");
    run(&["--top-p", "0.5"]).ok();
}

/// What `output` needs is learnt alone, in one pass; then nothing else is known, and says so.
#[test]
fn the_output_matrix_is_calibrated_alone() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| as_str(&dir.path().join(name)).to_owned();
    let text: String = (0..1600).map(|i| char::from(b'a' + (i * 3 + i * i / 7) as u8 % 26)).collect();
    std::fs::write(at("text.txt"), text).unwrap();
    for (name, ty) in [("large.gguf", GgmlType::Q8_0), ("small.gguf", GgmlType::Q4_0)] {
        let mut file = ModelFile::llama(WIDE, ty);
        file.set_vocabulary();
        file.write(dir.path().join(name).as_path());
    }
    let calibrate = |model: &str| {
        let sizes = ["--windows", "2", "--quality-windows", "1", "-q", "--json"];
        let file = at("text.txt");
        skiff(&[&["calibrate", "-m", &at(model), "-f", &file, "--only-output"][..], &sizes].concat())
    };
    let error = calibrate("small.gguf").error(1);
    assert!(error.contains("text.txt: the output matrix"), "{error}");
    let found: Value = serde_json::from_str(&calibrate("large.gguf").ok()).unwrap();
    let points = found["points"].as_array().unwrap();
    assert!(points.len() == 1 && points[0]["policy"] == "output", "{points:?}");
    assert_eq!(found["auto"], points[0]);

    let run = |skip: &[&str]| {
        skiff(
            &[&["run", "-m", &at("large.gguf"), "--raw", "-n", "3", "--stats-json"], skip, &["ab"]].concat(),
        )
    };
    let outcome = run(&["--skip", "output"]);
    assert!(outcome.code == Some(0) && outcome.stderr.contains(r#""skip":"output""#), "{outcome:?}");
    let error = run(&["--skip", "cut+output", "--skip-ratio", "0.2"]).error(2);
    assert!(error.contains("--skip cut+output: the calibration file has nothing on it"), "{error}");
}

#[cfg(unix)]
#[test]
fn a_reader_that_leaves_ends_it_quietly() {
    use std::io::Read;
    use std::process::{Command, Stdio};
    let Some(path) = common::smollm2() else { return };
    let mut child = Command::new(env!("CARGO_BIN_EXE_skiff"))
        .args(["run", "-m", as_str(&path), "--raw", "Once upon a time", "-n", "200", "--ignore-eos"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0; 2]).unwrap();
    drop(stdout);
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.stderr), (Some(0), Vec::new()));
}

#[cfg(unix)]
#[test]
fn ctrl_c_keeps_the_text_so_far() {
    use std::io::Read;
    use std::process::{Command, Stdio};
    let Some(path) = common::smollm2() else { return };
    let mut child = Command::new(env!("CARGO_BIN_EXE_skiff"))
        .args(["run", "-m", as_str(&path), "--raw", "Once upon a time", "--ignore-eos", "--stats-json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0; 8]).unwrap();
    let sent = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(sent.success());
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    assert!(rest.ends_with('\n'), "{rest:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("interrupted"));
}

/// The model of `bench` tests with a vocabulary, so that it can be run.
fn runnable(dir: &Path) -> PathBuf {
    let mut file = ModelFile::llama(WIDE, GgmlType::Q4_0);
    let special = ["<unk>", "<s>", "</s>"].map(String::from);
    let bytes = (0..256).map(|b| format!("<0x{b:02X}>"));
    let tokens: StringArray = special.into_iter().chain(bytes).collect();
    let kinds: Vec<i32> = [2, 3, 3].into_iter().chain([6; 256]).collect();
    file.set_key("tokenizer.ggml.model", "llama");
    file.set_key("tokenizer.ggml.scores", vec![0f32; kinds.len()]);
    file.set_key("tokenizer.ggml.token_type", kinds);
    file.set_key("tokenizer.ggml.tokens", tokens);
    let path = dir.join("runnable.gguf");
    file.write(&path);
    path
}

fn run_raw(model: &Path, flags: &[&str]) -> Outcome {
    let always =
        ["run", "-m", as_str(model), "--raw", "--temp", "0", "-n", "8", "--ignore-eos", "--stats-json"];
    skiff(&[&always, flags, &["ab ab ab"]].concat())
}

#[test]
fn threads_and_memory_change_no_text() {
    let dir = tempfile::tempdir().unwrap();
    let model = runnable(dir.path());
    let text = run_raw(&model, &["-t", "1"]).ok();
    let first = skiff::topology::Topology::detect().allowed.iter().next().unwrap_or(0);
    let mask = format!("{:x}{}", 1 << (first % 4), "0".repeat(first / 4));
    let range = format!("{first}-{first}");
    for flags in [
        &["--no-mmap"][..],
        &["-t", "1", "--threads-batch", "3"],
        &["-t", "3", "--threads-batch", "1", "--cpu-strict"],
        &["--cpu-mask", &mask],
        &["--cpu-range", &range, "-t", "2"],
    ] {
        let outcome = run_raw(&model, flags);
        assert_eq!((outcome.code, &outcome.stdout), (Some(0), &text), "{flags:?}: {outcome:?}");
    }
    let statistics = run_raw(&model, &["-t", "1", "--threads-batch", "3"]).stderr;
    assert!(statistics.contains("\"threads\":1,\"threads_batch\":3"), "{statistics}");
    // One CPU, so one thread unasked.
    let statistics = run_raw(&model, &["--cpu-mask", &mask]).stderr;
    assert!(statistics.contains("\"threads\":1,\"threads_batch\":1"), "{statistics}");
}

#[test]
fn cpus_that_are_not_there_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let model = runnable(dir.path());
    let far = format!("8{}", "0".repeat(2047));
    let error = run_raw(&model, &["--cpu-mask", &far]).error(1);
    assert!(error.starts_with("CPU 8191 is not among those that this process may use ("), "{error}");
    for wrong in
        [&["--cpu-mask", "0"][..], &["--cpu-mask", "xyz"], &["--cpu-range", "3"], &["--cpu-range", "4-2"]]
    {
        assert_eq!(run_raw(&model, wrong).code, Some(2), "{wrong:?}");
    }
}

/// Without the right to lock (which root has) and with a limit of 64 KiB, `--mlock` fails and tells what to do; where
/// locking is allowed, the text is the same.
#[test]
#[cfg(target_os = "linux")]
fn mlock_locks_or_says_why_not() {
    let dir = tempfile::tempdir().unwrap();
    let model = runnable(dir.path());
    let command = format!(
        "ulimit -l 64 || exit; drop='setpriv --bounding-set -ipc_lock --inh-caps -ipc_lock'
         test $(id -u) = 0 || drop=
         exec $drop '{}' run -m '{}' -n 2 --raw --mlock hi",
        env!("CARGO_BIN_EXE_skiff"),
        as_str(&model)
    );
    let output = std::process::Command::new("sh").args(["-c", &command]).output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    if !error.starts_with("error: ") {
        common::note_skip(&format!("setpriv and the right to lower a limit: {error}"));
    } else {
        assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0), "{error}");
        assert!(error.starts_with("error: --mlock: ") && error.contains("runnable.gguf"), "{error}");
        assert!(
            error.contains("RLIMIT_MEMLOCK is 65536 bytes: raise it with `ulimit -l unlimited`"),
            "{error}"
        );
    }
    let locked = run_raw(&model, &["-t", "1", "--mlock"]);
    match locked.code {
        Some(0) => assert_eq!(locked.stdout, run_raw(&model, &["-t", "1"]).ok()),
        _ => assert!(locked.error(1).contains("RLIMIT_MEMLOCK")),
    }
}

/// A file of a terabyte of holes is refused before memory is asked for.
#[test]
#[cfg(target_os = "linux")]
fn no_mmap_refuses_what_does_not_fit_in_memory() {
    let dir = tempfile::tempdir().unwrap();
    let model = runnable(dir.path());
    let file = std::fs::File::options().write(true).open(&model).unwrap();
    if file.set_len(1 << 42).is_err() {
        return common::note_skip("a file system with files of 4 TiB");
    }
    let error = run_raw(&model, &["--no-mmap"]).error(1);
    assert!(error.contains("runnable.gguf: 4398046511104 bytes are more than the "), "{error}");
}
