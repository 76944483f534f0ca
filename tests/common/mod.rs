//! What several test files share.
#![allow(dead_code)] // no test file uses all of it

pub mod evaluate;
pub mod models;
pub mod prompts;

use std::path::PathBuf;

/// The default model, pulled if need be. Where it cannot be had this says so loudly and returns `None`;
/// `SKIFF_REQUIRE_MODEL=1` makes that a failure.
pub fn smollm2() -> Option<PathBuf> {
    match skiff::pull::resolve(Some("smollm2")) {
        Ok(path) => Some(path),
        Err(error) if std::env::var("SKIFF_REQUIRE_MODEL").is_ok_and(|v| v == "1") => {
            panic!("SKIFF_REQUIRE_MODEL=1, but the model cannot be had: {error}")
        }
        Err(error) => {
            note_skip(&format!("the model smollm2: {error}"));
            None
        }
    }
}

/// Path of a file in `tests/data`.
pub fn data(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "data", name].iter().collect()
}

/// Says loudly that a test was skipped for want of `what`.
pub fn note_skip(what: &str) {
    // Straight to stderr: the test harness would swallow what `eprintln!` writes in a test that passes.
    use std::io::Write;
    let note = format!("\nSKIPPED: a test that needs {what}\n");
    let _ = std::io::stderr().write_all(note.as_bytes());
}
