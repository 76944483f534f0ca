//! What several test files share.
#![allow(dead_code)] // no test file uses all of it

use std::path::{Path, PathBuf};
use std::process::Output;

use assert_cmd::Command;

/// Path of a file in `tests/data`.
pub fn data(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "data", name].iter().collect()
}

/// Runs `skiff-convert` with these arguments.
pub fn run(args: &[&str]) -> Output {
    Command::cargo_bin("skiff-convert").unwrap().args(args).output().unwrap()
}

/// Runs it and expects success; what it printed.
pub fn ok(args: &[&str]) -> String {
    let output = run(args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Runs it and expects an error of exit code 1 in one line; the line.
pub fn error(args: &[&str]) -> String {
    let output = run(args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{args:?}: {stderr}");
    assert!(stderr.starts_with("error: ") && stderr.lines().count() == 1, "{args:?}: {stderr}");
    stderr
}

/// Path of the small real model (SmolLM2), pulled if need be; `None`, said loudly, where it cannot be had.
/// `SKIFF_REQUIRE_MODEL=1` makes that a failure.
pub fn smollm2() -> Option<PathBuf> {
    match skiff::pull::resolve(Some("smollm2")) {
        Ok(path) => Some(path),
        Err(error) if std::env::var("SKIFF_REQUIRE_MODEL").is_ok_and(|v| v == "1") => {
            panic!("SKIFF_REQUIRE_MODEL=1, but the model cannot be had: {error}")
        }
        Err(error) => {
            note_skip(&format!("SmolLM2 ({error})"));
            None
        }
    }
}

/// A path as an argument.
pub fn arg(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The names in a directory, sorted.
pub fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Says loudly that a test was skipped for want of `what`.
pub fn note_skip(what: &str) {
    // Straight to stderr: the test harness would swallow what `eprintln!` writes in a test that passes.
    use std::io::Write;
    let _ = std::io::stderr().write_all(format!("\nSKIPPED: a test that needs {what}\n").as_bytes());
}
