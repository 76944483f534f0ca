//! `skiff eval`: every task end to end on a tiny model, a run cut short anywhere and resumed, hostile data, a judge.

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Output;

use assert_cmd::Command;
use common::models::{ModelFile, WIDE};
use skiff::eval::tasks::{Contender, Item, Record, Runner, Settings, Task};
use skiff::gguf::GgmlType;
use skiff::model::KvType;
use skiff::session::Engine;
use skiff::skip::{SkipMode, SkipOptions};

/// A folder with a tiny random model and data of each task.
struct Bench {
    folder: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut file = ModelFile::llama(WIDE, GgmlType::Q4_0);
        file.set_vocabulary();
        file.write(&folder.path().join("model.gguf"));
        let bench = Self { folder };
        bench.write(
            "qa.txt",
            "Who? | me\nWhat is it? | nothing\nWhere? | here\n\"Why \"\"so\"\"?\" | because\n",
        );
        fs::create_dir(bench.path("large")).unwrap();
        bench.write("a.story", "One thing happened.\n\n@highlight\n\nA thing");
        bench.write("large/b.story", "Another thing happened.\n\n@highlight\n\nAnother thing");
        bench.write(
            "question.jsonl",
            "{\"question_id\": 81, \"category\": \"math\", \"turns\": [\"1+1?\", \"And 2+2?\"]}\n\
             {\"question_id\": 91, \"category\": \"writing\", \"turns\": [\"Write.\", \"Again.\"]}\n",
        );
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    /// `skiff eval` with these arguments, in the folder.
    fn eval(&self, args: &str) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_skiff"));
        command.current_dir(&self.folder).env_remove("OPENAI_API_KEY").args(["eval", "-q", "-t", "1"]);
        if !args.contains("-m ") {
            command.args(["-m", "model.gguf"]);
        }
        command.args(["-c", "512", "-n", "6"]).args(args.split_whitespace());
        command.output().unwrap()
    }

    fn table(&self, args: &str) -> String {
        let output = self.eval(args);
        assert!(output.status.success(), "{args}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }
}

const QA: &str =
    "--task freebaseqa --data qa.txt --policies random,skipdecode --ratios 10,30 --skip-cold 0,2 --raw";
const CHAT: &str = "--chat-template chatml --policies random --ratios 50 --skip-cold 0,2 --skip-warmup 0";

/// The rows that are not followed by a fuller one of the same answer: which do depends on who was ready first.
fn final_rows(bytes: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(bytes);
    let waits = |line: &&str| line.contains("\"awaits_full\":true");
    let mut rows: Vec<String> = text.lines().filter(|line| !waits(line)).map(str::to_owned).collect();
    rows.sort_unstable();
    rows
}

/// Several items at a time, policies side by side, one answer after the other: it is the same.
#[test]
fn answers_do_not_depend_on_how_many_are_generated_together() {
    let bench = Bench::new();
    for (task, data) in [
        (QA, ""),
        ("--task summarize --data . --ratios 10,50", CHAT),
        ("--task mt-bench --data question.jsonl", CHAT),
        ("--task mt-bench --data question.jsonl --skip-prefill", CHAT),
    ] {
        let run = |parallel: usize| {
            let name = format!("{parallel}.jsonl");
            let data = if task.contains("--ratios") { data.replace("--ratios 50", "") } else { data.into() };
            let table = bench.table(&format!("{task} {data} --json --parallel {parallel} --out {name}"));
            let rows = fs::read(bench.path(&name)).unwrap();
            fs::remove_file(bench.path(&name)).unwrap();
            (table, rows)
        };
        let (table, rows) = run(1);
        for parallel in [2, 5, 64] {
            let (other, other_rows) = run(parallel);
            assert_eq!(other, table, "{task} --parallel {parallel}");
            assert!(final_rows(&other_rows) == final_rows(&rows), "{task} --parallel {parallel}");
        }
    }
}

#[test]
fn a_run_cut_short_anywhere_and_resumed_gives_the_same_table_and_rows() {
    let bench = Bench::new();
    let whole = bench.table(&format!("{QA} --out whole.jsonl"));
    assert_eq!(whole.lines().count(), 2 + 5, "{whole}");
    assert!(whole.lines().skip(2).all(|line| line.ends_with("| 4 |")), "{whole}");
    let bytes = fs::read(bench.path("whole.jsonl")).unwrap();
    assert_eq!(final_rows(&bytes).len(), 4 * 5);
    for cut in [0, 1, bytes.len() / 3, bytes.len() / 2, bytes.len() - 1] {
        fs::write(bench.path("cut.jsonl"), &bytes[..cut]).unwrap();
        assert_eq!(bench.table(&format!("{QA} --out cut.jsonl --resume")), whole, "cut at {cut}");
        // Rows come as answers are complete, which depends on what is still to be answered.
        assert!(
            final_rows(&fs::read(bench.path("cut.jsonl")).unwrap()) == final_rows(&bytes),
            "cut at {cut}"
        );
    }
    let again = bench.eval(&format!("{QA} --out whole.jsonl"));
    assert!(!again.status.success(), "results must not be mixed without --resume");
    // Other settings: nothing of the file fits.
    let other = bench.table(&format!("{QA} --out whole.jsonl --resume --shots 1 --limit 2"));
    assert!(other.lines().skip(2).all(|line| line.ends_with("| 2 |")), "{other}");
}

/// What `runner` hands on of an item that a policy and then the full model are to answer, one after the other, with
/// `known` answers; it is stopped after the first that it hands on if `stop`.
fn handed_on(runner: &mut Runner<'_>, known: &[Record], stop: bool) -> Vec<Record> {
    let contender =
        |policy: &str, skip: SkipOptions| Contender { policy: policy.into(), strength: String::new(), skip };
    let skip = SkipOptions {
        mode: SkipMode::Random,
        ratio: Some(0.5),
        cold: Some((0, 2)),
        warm_up: Some(0),
        ..SkipOptions::default()
    };
    let contenders = [contender("random", skip), contender("off", SkipOptions::default())];
    let item = Item { turns: vec!["a story".into()], references: vec!["a".into()], ..Item::default() };
    let (mut records, seen) = (Vec::new(), std::cell::Cell::new(0));
    let known = |_: &Item, c: &Contender| known.iter().find(|r| r.policy == c.policy).cloned();
    let answered = |record| {
        records.push(record);
        seen.set(seen.get() + 1);
        Ok(())
    };
    runner.answer_all(&[item], &contenders, known, answered, || !stop || seen.get() == 0).unwrap();
    records
}

/// An answer is handed on when it is there, though it can only be compared later; a run stopped in between goes on from it.
#[test]
fn an_answer_before_the_full_models_is_kept_at_once_and_compared_later() {
    let bench = Bench::new();
    let engine = Engine::load(&bench.path("model.gguf"), Some(1), None).unwrap();
    let settings = Settings {
        task: Task::Summarize,
        template: None,
        system: None,
        shots: Vec::new(),
        max_tokens: 6,
        context: 256,
        kv: KvType::F16,
    };
    let mut runner = Runner::new(&engine, settings, 1).unwrap();
    let whole = handed_on(&mut runner, &[], false);
    let seen: Vec<_> = whole.iter().map(|r| (r.policy.as_str(), r.awaits_full)).collect();
    assert_eq!(seen, [("random", true), ("off", false), ("random", false)]);
    assert!(!whole[0].scores.contains_key("kl") && whole[2].scores["kl"] > 0.0, "{whole:?}");
    assert_eq!((&whole[0].answers, &whole[0].tokens), (&whole[2].answers, &whole[2].tokens));

    let first = handed_on(&mut runner, &[], true);
    assert_eq!(first, whole[..1], "the full model has not answered yet");
    assert_eq!(handed_on(&mut runner, &first, false), whole[1..]);
    assert_eq!(handed_on(&mut runner, &whole[..2], false), whole[2..], "nothing is left but to compare");
}

/// A file that a kill left with an answer that waits for the full model's.
#[test]
fn an_answer_that_waits_in_the_file_is_not_generated_again() {
    let bench = Bench::new();
    let args = format!("--task summarize --data . {CHAT} --json");
    let whole = bench.table(&format!("{args} --out whole.jsonl"));
    let rows = fs::read_to_string(bench.path("whole.jsonl")).unwrap();
    let mut waiting = String::new();
    for line in rows.lines() {
        let mut row: serde_json::Value = serde_json::from_str(line).unwrap();
        if row["answer"]["policy"] == "random" {
            row["answer"]["awaits_full"] = true.into();
            row["answer"]["scores"] = serde_json::json!({});
            waiting.push_str(&format!("{row}\n"));
        }
    }
    fs::write(bench.path("killed.jsonl"), &waiting).unwrap();
    assert_eq!(bench.table(&format!("{args} --out killed.jsonl --resume")), whole);
    let resumed = fs::read_to_string(bench.path("killed.jsonl")).unwrap();
    let added = resumed.strip_prefix(&waiting).unwrap().as_bytes();
    assert!(final_rows(added) == final_rows(rows.as_bytes()), "{resumed}");
    // It is the answer of the file that counts, whatever this model would say.
    fs::write(bench.path("other.jsonl"), waiting.replace("\"answers\":[\"", "\"answers\":[\"kept ")).unwrap();
    assert_ne!(bench.table(&format!("{args} --out other.jsonl --resume")), whole);
}

/// The full model by itself, and named beside a policy: it is there once.
#[test]
fn the_full_model_can_be_the_only_one() {
    let bench = Bench::new();
    let table = |policies: &str| {
        bench.table(&format!(
            "--task freebaseqa --data qa.txt --raw --policies {policies} --ratios 10 --skip-cold 0,2"
        ))
    };
    let alone = table("off");
    assert_eq!(alone.lines().count(), 3, "{alone}");
    assert!(alone.contains("| off |") && !alone.contains("less full"), "{alone}");
    let beside = table("off,random");
    assert_eq!(beside.lines().filter(|l| l.starts_with("| off |")).count(), 1, "{beside}");
    assert!(beside.contains("| random | ratio 10") && beside.contains("contained %, less full"), "{beside}");
}

#[test]
fn every_task_has_its_table_plots_and_answers() {
    let bench = Bench::new();
    let table = bench.table(&format!("--task summarize --data . {CHAT} --by-group --plot plots"));
    for part in ["ROUGE-L", "| random | ratio 50 of layers 0 to 2 | large |", "KL"] {
        assert!(table.contains(part), "{part}: {table}");
    }
    for plot in ["quality", "layers", "groups"] {
        let svg = fs::read_to_string(bench.path(&format!("plots/summarize-{plot}.svg"))).unwrap();
        assert!(svg.starts_with("<svg"));
    }
    let args =
        format!("--task mt-bench --data question.jsonl {CHAT} --answers answers --json --out mt.jsonl");
    let lines: serde_json::Value = serde_json::from_str(&bench.table(&args)).unwrap();
    assert_eq!((&lines[0]["policy"], &lines[1]["policy"]), (&"off".into(), &"random".into()));
    assert!(lines[0]["measures"]["kl"].is_null(), "the full model is not compared with itself");
    assert!(lines[1]["measures"]["kl"]["mean"].as_f64().unwrap() > 0.0, "{lines}");
    assert!(lines[1]["skipped"].as_f64().unwrap() > 0.0, "{lines}");
    let answers = fs::read_to_string(bench.path("answers/model-off.jsonl")).unwrap();
    let answer: serde_json::Value = serde_json::from_str(answers.lines().next().unwrap()).unwrap();
    assert_eq!(answer["question_id"], 81);
    assert_eq!(answer["choices"][0]["turns"].as_array().unwrap().len(), 2);
    let csv = bench.table(&format!("{args} --resume -o csv").replace("--json", ""));
    assert!(csv.starts_with("policy,strength,group,n,") && csv.lines().count() == 3, "{csv}");
    let columns: Vec<usize> = csv.lines().map(|line| line.matches(',').count()).collect();
    assert_eq!(columns, [columns[0]; 3], "{csv}");
    assert!(!csv.contains("change"), "nothing to set against the full model without a judge: {csv}");
}

/// What a policy that skips everything leaves of a model that knows its capitals: nothing.
#[test]
fn skipping_everything_scores_near_zero() {
    let Some(model) = common::smollm2() else {
        return;
    };
    let bench = Bench::new();
    bench.write(
        "capitals.txt",
        "What is the capital of France? | Paris\nWhat is the capital of Germany? | Berlin\n\
         What is the capital of Italy? | Rome\nWhat is the capital of Japan? | Tokyo\n\
         What is the capital of Spain? | Madrid\nWhat is the capital of Russia? | Moscow\n\
         What is the capital of Egypt? | Cairo\nWhat is the capital of England? | London\n",
    );
    let args = "--task freebaseqa --data capitals.txt --shots 2 --policies random --ratios 100 --json";
    let args = format!("{args} --skip-cold 0,30 -m {}", model.display());
    let lines: serde_json::Value = serde_json::from_str(&bench.table(&args)).unwrap();
    let contained = |line: usize| lines[line]["measures"]["contained"]["mean"].as_f64().unwrap();
    assert!(contained(0) > 0.3, "{lines}");
    assert_eq!((contained(1), &lines[1]["skipped"]), (0.0, &1.0.into()), "{lines}");
    assert_eq!(lines[1]["change"]["mean"].as_f64().unwrap(), -contained(0));
}

/// A policy that skips nothing answers as the full model does.
#[test]
fn a_ratio_of_nothing_is_the_full_model() {
    let bench = Bench::new();
    let chat = CHAT.replace("--ratios 50", "--ratios 0");
    let text = bench.table(&format!("--task mt-bench --data question.jsonl {chat} --json --out mt.jsonl"));
    let lines: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert!(lines[1]["measures"]["kl"]["mean"].as_f64().unwrap() < 1e-5, "{lines}");
    assert_eq!(lines[1]["measures"]["same_top1"]["mean"], 1.0);
    let rows = fs::read_to_string(bench.path("mt.jsonl")).unwrap();
    let rows: Vec<serde_json::Value> = rows.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let tokens = |policy: &str, item: &str| {
        let row = rows.iter().find(|r| r["answer"]["policy"] == policy && r["answer"]["item"] == item);
        row.unwrap()["answer"]["tokens"].clone()
    };
    for item in ["81", "91"] {
        assert_eq!(tokens("off", item), tokens("random", item));
    }
}

#[test]
fn wrong_data_and_flags_are_one_error_line() {
    let bench = Bench::new();
    bench.write("bad.txt", "Who? | me\nnothing\n");
    bench.write("rows.jsonl", "{}\n");
    for (args, code, expected) in [
        ("--task freebaseqa --data bad.txt --raw", 1, "bad.txt: line 2"),
        ("--task freebaseqa --data none.txt --raw", 1, "none.txt"),
        ("--task freebaseqa --data qa.txt --raw --out rows.jsonl --resume", 1, "rows.jsonl: line 1"),
        ("--task mt-bench --data question.jsonl", 1, "no chat template"),
        ("--task freebaseqa --data qa.txt --shots 4", 2, "--shots 4"),
        ("--task summarize --data . --shots 1", 2, "--shots"),
        ("--task freebaseqa --data qa.txt --judge-url http://x", 2, "--judge-url"),
        ("--task freebaseqa --data qa.txt --ratios 101", 2, "--ratios 101"),
    ] {
        let output = bench.eval(args);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{args}: {error}");
        assert!(error.contains(expected) && error.trim().lines().count() == 1, "{args}: {error}");
    }
}

#[test]
fn a_policy_that_the_model_is_not_calibrated_for_is_left_out_aloud() {
    let bench = Bench::new();
    let output = bench.eval("--task freebaseqa --data qa.txt --raw --policies static --ratios 10");
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && error.contains("left out: static ratio 10"), "{error}");
    assert_eq!(String::from_utf8_lossy(&output.stdout).lines().count(), 3);
}

/// A judge that gives every answer 7, finds whatever is shown first better, and now and then forgets the form.
fn judge(requests: usize) -> (String, std::thread::JoinHandle<Vec<String>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let handle = std::thread::spawn(move || {
        let mut bodies = Vec::new();
        for i in 0..requests {
            let (mut stream, _) = listener.accept().unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let mut length = 0;
            loop {
                let mut line = String::new();
                reader.read_line(&mut line).unwrap();
                if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                    length = value.trim().parse().unwrap();
                }
                if line.trim().is_empty() {
                    break;
                }
            }
            let mut body = vec![0; length];
            reader.read_exact(&mut body).unwrap();
            let body = String::from_utf8(body).unwrap();
            let said = match (i, body.contains("Assistant A")) {
                (0, _) => "I would say 7 of 10.",
                (_, true) => "The first. [[A]]",
                _ => "Fine. Rating: [[7]]",
            };
            bodies.push(body);
            let reply = format!(
                "{{\"choices\": [{{\"message\": {{\"role\": \"assistant\", \"content\": \"{said}\"}}}}]}}"
            );
            let head =
                format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", reply.len());
            stream.write_all((head + &reply).as_bytes()).unwrap();
        }
        bodies
    });
    (url, handle)
}

#[test]
fn a_judge_rates_and_compares_in_both_orders_and_is_not_asked_twice() {
    let bench = Bench::new();
    // Two items of two turns: 4 ratings of the full model, 4 of the policy's answers, 8 comparisons.
    let (url, handle) = judge(16);
    let args =
        format!("--task mt-bench --data question.jsonl {CHAT} --out mt.jsonl --json --judge-url {url}");
    let lines: serde_json::Value = serde_json::from_str(&bench.table(&args)).unwrap();
    let bodies = handle.join().unwrap();
    assert_eq!(bodies.iter().filter(|b| b.contains("Assistant A")).count(), 8);
    assert_eq!((&lines[0]["unparsable"], &lines[1]["unparsable"]), (&1.into(), &0.into()));
    assert_eq!(lines[0]["measures"]["judge"]["mean"], 7.0);
    assert_eq!(lines[1]["measures"]["wins"]["mean"], 0.5, "whoever always prefers the first is no judge");
    assert_eq!(lines[1]["change"]["mean"], 0.0, "ratings less the full model's");
    let judged = bench.table(&format!("{args} --resume").replace("--json", ""));
    assert!(judged.contains("judge, less full | unparsable"), "{judged}");
    // Everything is known now: the judge is gone, and nobody asks for it.
    let again: serde_json::Value = serde_json::from_str(&bench.table(&format!("{args} --resume"))).unwrap();
    assert_eq!(again, lines);
    assert!(Path::new(&bench.path("mt.jsonl")).exists());
}
