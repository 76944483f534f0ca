//! `skiff bench` as its users see it.

mod common;

use std::path::Path;
use std::process::Output;

use assert_cmd::Command;
use common::models::{ModelFile, WIDE};
use serde_json::Value;
use skiff::gguf::GgmlType;

fn bench(model: &Path, args: &[&str]) -> Output {
    let mut command = Command::cargo_bin("skiff").expect("the binary is built");
    command.args(["bench", "-q", "-m"]).arg(model).args(args).output().expect("it runs")
}

#[track_caller]
fn stdout(output: Output) -> String {
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The error line, with nothing on stdout.
#[track_caller]
fn error(output: Output, code: i32) -> String {
    assert_eq!((output.status.code(), output.stdout.len()), (Some(code), 0), "{output:?}");
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    text
}

/// A model without a tokenizer: a benchmark needs none.
fn small(dir: &Path) -> std::path::PathBuf {
    let path = dir.join("small.gguf");
    ModelFile::llama(WIDE, GgmlType::Q4_0).write(&path);
    path
}

#[test]
fn a_real_model_has_llama_benchs_keys_and_ours() {
    let Some(model) = common::smollm2() else { return };
    let output = stdout(bench(&model, &["-p", "16", "-n", "4", "-r", "1", "-o", "json"]));
    let rows: Vec<Value> = serde_json::from_str(&output).unwrap();
    assert_eq!(rows.len(), 2);
    let (pp, tg) = (&rows[0], &rows[1]);
    assert_eq!((&pp["n_prompt"], &pp["n_gen"], &pp["test"]), (&16.into(), &0.into(), &"pp16".into()));
    assert_eq!((&tg["n_prompt"], &tg["n_gen"], &tg["test"]), (&0.into(), &4.into(), &"tg4".into()));
    for (row, tokens) in [(pp, 16.0), (tg, 4.0)] {
        for key in [
            "build_commit",
            "cpu_info",
            "backends",
            "model_filename",
            "test_time",
            "type_k",
            "type_v",
            "kernel",
        ] {
            assert!(row[key].is_string(), "{key}: {row}");
        }
        for key in ["n_batch", "n_threads", "n_depth", "avg_ns", "stddev_ns", "stddev_ts", "ffn_skipped"] {
            assert!(row[key].is_number(), "{key}: {row}");
        }
        assert_eq!(row["model_type"], "llama 135M Q4_1");
        assert_eq!(row["model_n_params"], 134_515_008);
        assert!((96_000_000..98_362_432).contains(&row["model_size"].as_u64().unwrap()), "{row}");
        let (ns, speed) = (row["samples_ns"][0].as_f64().unwrap(), row["avg_ts"].as_f64().unwrap());
        assert!((tokens * 1e9 / ns / speed - 1.0).abs() < 1e-6 && speed > 0.1, "{row}");
        assert_eq!(row["samples_ts"].as_array().map(Vec::len), Some(1));
        assert_eq!(row["ffn_skipped"], 0.0);
    }
    assert!(pp["weight_gbps"].is_null() && pp["tops"].as_f64() > Some(0.0), "{pp}");
    assert!(tg["tops"].is_null(), "{tg}");
    let gbps = tg["weight_gbps"].as_f64().unwrap();
    let per_token = gbps * 1e9 / tg["median_ts"].as_f64().unwrap();
    assert!(per_token > 90e6 && per_token < 98.4e6, "bytes a token: {per_token}");
    // Keys and values of 30 layers, 3 heads of 64 numbers in f16, and a token of n sees (n + 1) / 2 positions on average.
    let kv = tg["kv_gbps"].as_f64().unwrap();
    let seen = tg["n_depth"].as_f64().unwrap() + (tg["n_gen"].as_f64().unwrap() + 1.0) / 2.0;
    let per_position = kv * 1e9 / tg["median_ts"].as_f64().unwrap() / seen;
    assert!((per_position - 2.0 * 30.0 * 3.0 * 64.0 * 2.0).abs() < 1e-3, "bytes a position: {per_position}");
    if let Some(sweep) = tg["sweep_gbps"].as_f64() {
        assert!((tg["sweep_share"].as_f64().unwrap() * sweep / (gbps + kv) - 1.0).abs() < 1e-6, "{tg}");
    }
}

#[test]
fn every_combination_is_a_row_in_every_form() {
    let dir = tempfile::tempdir().unwrap();
    let model = small(dir.path());
    let args =
        ["-p", "8,20", "-n", "3", "-d", "0,5", "-t", "1,2", "-r", "2", "-b", "16", "--kv", "q8_0", "-o"];
    let run = |form| stdout(bench(&model, &[&args[..], &[form]].concat()));
    let names = ["pp8", "pp20", "tg3", "pp8 @ d5", "pp20 @ d5", "tg3 @ d5"];

    let rows: Vec<Value> = run("jsonl").lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let tests: Vec<&str> = rows.iter().map(|row| row["test"].as_str().unwrap()).collect();
    assert_eq!(tests, [names, names].concat());
    assert!(rows.iter().all(|row| row["type_k"] == "q8_0" && row["n_batch"] == 16));
    let threads: Vec<u64> = rows.iter().map(|row| row["n_threads"].as_u64().unwrap()).collect();
    assert_eq!((threads[0], threads[11]), (1, 2));

    let table = run("md");
    assert_eq!(table.lines().count(), 2 + 12, "{table}");
    assert!(table.contains("tg3 @ d5") && table.contains("q8_0") && table.contains("t/s"), "{table}");
    let width = |line: &str| line.chars().count();
    assert!(table.lines().all(|line| width(line) == width(table.lines().next().unwrap())), "{table}");

    let csv = run("csv");
    let columns = |line: &str| line.split(',').count();
    assert_eq!(csv.lines().count(), 1 + 12, "{csv}");
    assert!(csv.starts_with("build_commit,"), "{csv}");
    let (header, row) = (csv.lines().next().unwrap(), csv.lines().nth(1).unwrap());
    assert_eq!(columns(header), columns(row), "{csv}");
}

#[test]
fn skipped_ffns_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let model = small(dir.path());
    let flags = ["--skip", "ffn-skip", "--skip-threshold", "-1", "--skip-cold", "0,2", "--skip-warmup", "2"];
    let args = [&["-p", "4", "-n", "4", "-r", "3", "-o", "json"][..], &flags].concat();
    let rows: Vec<Value> = serde_json::from_str(&stdout(bench(&model, &args))).unwrap();
    assert_eq!(rows[0]["ffn_skipped"], 0.0, "a prompt runs in full: {}", rows[0]);
    // Of four tokens the last two skip the second of two layers: in every repetition alike.
    assert_eq!(rows[1]["ffn_skipped"], 0.25, "{}", rows[1]);
    assert_eq!(rows[1]["skip"], "ffn-skip");
    assert!(
        stdout(bench(&model, &[&flags[..], &["-n", "4", "-r", "1", "--skip-report"]].concat()))
            .contains("by layer")
    );
}

#[test]
fn wrong_flags_are_usage_errors() {
    let dir = tempfile::tempdir().unwrap();
    let model = small(dir.path());
    for args in [
        &["-p", "x"][..],
        &["-p", "1,"],
        &["-r", "0"],
        &["-t", "0"],
        &["-b", "0"],
        &["-d", "-1"],
        &["-o", "sql"],
        &["--kernel", "abacus"],
    ] {
        assert_eq!(bench(&model, args).status.code(), Some(2), "{args:?}");
    }
    assert!(error(bench(&model, &["-p", "0", "-n", "0"]), 2).contains("nothing to measure"));
    assert!(error(bench(&model, &["--skip-cold", "0,9"]), 2).contains("0,9"));
    assert!(error(bench(Path::new("/nowhere/x.gguf"), &[]), 1).contains("/nowhere/x.gguf"));
}

#[test]
fn a_cache_that_cannot_be_is_refused() {
    let Some(model) = common::smollm2() else { return };
    assert!(error(bench(&model, &["-d", "16000000"]), 1).contains("16000512"));
}

/// A program that prints its arguments to a file and `output` to stdout, and exits with `code`.
#[cfg(unix)]
fn program(dir: &Path, output: &str, code: i32) -> std::path::PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let path = dir.join(format!("llama-bench-{code}-{}", output.len()));
    let log = dir.join("log");
    let text = format!("#!/bin/sh\necho \"$@\" >> '{}'\n{output}\nexit {code}\n", log.display());
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[test]
#[cfg(unix)]
fn another_program_takes_its_turns_and_the_ratio_is_printed() {
    let dir = tempfile::tempdir().unwrap();
    let model = small(dir.path());
    // It answers for the test that its arguments ask for.
    let script = r#"for a; do [ "$last" = -p ] && p=$a; [ "$last" = -n ] && n=$a; last=$a; done
echo '[{"build_commit":"abc123","n_prompt":'$p',"n_gen":'$n',"n_depth":0,"avg_ts":50.0,"stddev_ts":0}]'"#;
    let fake = program(dir.path(), script, 0);
    let vs = |form| ["-p", "8", "-n", "3", "-r", "2", "-t", "1", "-o", form, "--vs", fake.to_str().unwrap()];
    let rows: Vec<Value> = serde_json::from_str(&stdout(bench(&model, &vs("json")))).unwrap();
    for row in &rows {
        assert_eq!(row["vs_samples_ts"], serde_json::json!([50.0, 50.0]));
        assert_eq!((&row["vs_build_commit"], &row["vs_avg_ts"]), (&"abc123".into(), &50.0.into()));
        let ratio = row["median_ts"].as_f64().unwrap() / 50.0;
        assert!((row["vs_ratio"].as_f64().unwrap() / ratio - 1.0).abs() < 1e-9, "{row}");
    }
    let log = std::fs::read_to_string(dir.path().join("log")).unwrap();
    let calls: Vec<&str> = log.lines().collect();
    assert_eq!(calls.len(), 4, "a turn a repetition: {log}");
    assert!(
        calls[0].contains("-r 1 -o json -p 8 -n 0 -t 1 -b 512") && calls[3].contains("-p 0 -n 3"),
        "{log}"
    );
    let table = stdout(bench(&model, &vs("md")));
    assert!(table.contains("ratio") && table.contains("50.00 ± 0.00"), "{table}");
}

#[test]
#[cfg(unix)]
fn another_program_that_fails_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let model = small(dir.path());
    let run = |path: &Path| {
        error(bench(&model, &["-p", "0", "-n", "2", "-r", "1", "--vs", path.to_str().unwrap()]), 1)
    };
    let failing = run(&program(dir.path(), "echo 'loading' >&2; echo 'no such model' >&2", 3));
    assert!(failing.contains("llama-bench-3") && failing.contains("no such model"), "{failing}");
    let text = run(&program(dir.path(), "echo hello", 0));
    assert!(text.contains("JSON of a llama-bench"), "{text}");
    let empty = run(&program(dir.path(), "echo '[]'", 0));
    assert!(empty.contains("no result for test tg2"), "{empty}");
    assert!(run(Path::new("/nowhere/llama-bench")).contains("/nowhere/llama-bench: cannot be run"));
}
