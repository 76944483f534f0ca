//! Runs a llama-bench for comparison.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use serde::Deserialize;

use super::{BenchOptions, Test};
use crate::model::KvType;

/// A llama-bench program.
pub struct Rival {
    program: PathBuf,
}

/// Why it cannot be compared with.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum RivalError {
    #[error("{}: cannot be run: {error}", program.display())]
    Start { program: PathBuf, error: io::Error },
    #[error("{}: {status}: {message}", program.display())]
    Failed { program: PathBuf, status: ExitStatus, message: String },
    #[error("{}: not the JSON of a llama-bench: {error}", program.display())]
    Json { program: PathBuf, error: serde_json::Error },
    #[error("{}: no result for test {test}", program.display())]
    Missing { program: PathBuf, test: String },
}

/// What is read of its output.
#[derive(Deserialize)]
struct Row {
    #[serde(default)]
    build_commit: String,
    n_prompt: usize,
    n_gen: usize,
    #[serde(default)]
    n_depth: usize,
    avg_ts: f64,
}

impl Rival {
    /// The program at `program`.
    pub fn new(program: &Path) -> Self {
        Self { program: program.to_owned() }
    }

    /// Runs `test` once: the commit that the program was built from, and its tokens a second.
    pub fn run(
        &self,
        model: &Path,
        test: Test,
        threads: usize,
        options: &BenchOptions,
    ) -> Result<(String, f64), RivalError> {
        let program = || self.program.clone();
        let mut command = Command::new(&self.program);
        command.arg("-m").arg(model).args(["-r", "1", "-o", "json"]);
        let mut numbers = vec![
            ("-p", test.prompt),
            ("-n", test.generate),
            ("-t", threads),
            ("-b", options.batch),
            ("-ub", options.batch),
            ("-ngl", 0),
        ];
        if test.depth > 0 {
            numbers.push(("-d", test.depth)); // older ones do not know it
        }
        for (flag, n) in numbers {
            command.arg(flag).arg(n.to_string());
        }
        if options.kv != KvType::F16 {
            command.args(["-ctk", options.kv.name(), "-ctv", options.kv.name(), "-fa", "1"]);
        }
        let output = command.stdin(Stdio::null()).output();
        let output = output.map_err(|error| RivalError::Start { program: program(), error })?;
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            let last = text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it says nothing");
            let message = last.to_owned();
            return Err(RivalError::Failed { program: program(), status: output.status, message });
        }
        let rows: Vec<Row> = serde_json::from_slice(&output.stdout)
            .map_err(|error| RivalError::Json { program: program(), error })?;
        let wanted = (test.prompt, test.generate, test.depth);
        let row = rows.into_iter().find(|r| (r.n_prompt, r.n_gen, r.n_depth) == wanted && r.avg_ts > 0.0);
        let missing = || RivalError::Missing { program: program(), test: test.name() };
        row.map(|row| (row.build_commit, row.avg_ts)).ok_or_else(missing)
    }
}
