//! What is kept of a run: a line of JSON for each answer and each judgment.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::TaskError;
use crate::skip::SkipOptions;

/// A policy at a strength.
#[derive(Clone, Debug)]
pub struct Contender {
    /// Name of the policy, as `--skip` takes it.
    pub policy: String,
    /// What sets its strength and its layers, in words.
    pub strength: String,
    /// How to get it.
    pub skip: SkipOptions,
}

/// An answer to an item.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Everything that the answer depends on besides the item and the policy.
    pub settings: String,
    /// Name of the task.
    pub task: String,
    /// File name of the model.
    pub model: String,
    /// Name of the policy.
    pub policy: String,
    /// What sets its strength.
    pub strength: String,
    /// Name of the item.
    pub item: String,
    /// Its category or length group.
    pub group: String,
    /// The answer to each turn.
    pub answers: Vec<String>,
    /// Their tokens.
    pub tokens: Vec<Vec<u32>>,
    /// Why each ended: `end`, `stop` or `length`.
    pub ended: Vec<String>,
    /// Share of FFN blocks skipped, of the tokens governed.
    pub skipped: f64,
    /// Share of FFN weight bytes left unread.
    pub bytes_skipped: f64,
    /// `bytes_skipped`, by layer.
    pub by_layer: Vec<f64>,
    /// Values of the task's measures.
    pub scores: BTreeMap<String, f64>,
    /// Whether it has yet to be compared with the full model's answer, which was not there when this one was.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub awaits_full: bool,
}

impl Record {
    /// Whether `answer` is this one, written once more.
    fn is_again(&self, answer: &Self) -> bool {
        let Self { settings, policy, strength, item, .. } = answer;
        (&self.settings, &self.policy, &self.strength, &self.item) == (settings, policy, strength, item)
    }
}

/// What a judge said of an answer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Judgment {
    /// [`Record::settings`] of the answer.
    pub settings: String,
    /// Name of the judging model.
    pub judge: String,
    /// Policy and strength of the answer.
    pub policy: String,
    /// What sets its strength.
    pub strength: String,
    /// Name of the item.
    pub item: String,
    /// Its category or length group.
    pub group: String,
    /// Turn, from 0.
    pub turn: usize,
    /// `rate`; or `first` or `second`: compared with the full model's answer, in which order.
    pub kind: String,
    /// The judge's words.
    pub said: String,
    /// The score, 1 to 10; of a comparison 1 if this answer won, 0 if it lost, 0.5 for a tie. `None`: unparsable.
    pub score: Option<f64>,
}

/// A line of a ledger.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum Row {
    Answer { answer: Record },
    Judgment { judgment: Judgment },
}

/// The rows of a run, in a file if there is one: appended as they come, each in one write. An answer that came before
/// the full model's has two, the second with what the comparison gave.
#[derive(Debug, Default)]
pub struct Ledger {
    file: Option<(PathBuf, File)>,
    /// Answers so far.
    pub answers: Vec<Record>,
    /// Judgments so far.
    pub judgments: Vec<Judgment>,
}

impl Ledger {
    /// At `path`; without one, rows are kept in memory. `resume`: with the rows that the file has.
    ///
    /// A line that a kill cut short at the end of the file is cut off; any other that is no row is an error.
    pub fn open(path: Option<&Path>, resume: bool) -> Result<Self, TaskError> {
        let Some(path) = path else { return Ok(Self::default()) };
        let io = |error| TaskError::Io { path: path.into(), error };
        let options = OpenOptions::new().read(true).append(true).create(true).clone();
        let mut file = options.open(path).map_err(io)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(io)?;
        if !bytes.is_empty() && !resume {
            return Err(TaskError::Exists { path: path.into() });
        }
        let whole = bytes.iter().rposition(|&b| b == b'\n').map_or(0, |at| at + 1);
        if whole < bytes.len() {
            file.set_len(whole as u64).map_err(io)?;
            file.seek(std::io::SeekFrom::End(0)).map_err(io)?;
        }
        let mut ledger = Self::default();
        for (i, line) in bytes[..whole].split(|&b| b == b'\n').enumerate().filter(|(_, l)| !l.is_empty()) {
            let row = serde_json::from_slice(line).map_err(|e| TaskError::Line {
                path: path.into(),
                line: i + 1,
                why: e.to_string(),
            })?;
            ledger.remember(row);
        }
        ledger.file = Some((path.into(), file));
        Ok(ledger)
    }

    fn remember(&mut self, row: Row) {
        match row {
            Row::Answer { answer } => {
                // The same answer comes again once it has been compared.
                self.answers.retain(|known| !(known.awaits_full && known.is_again(&answer)));
                self.answers.push(answer);
            }
            Row::Judgment { judgment } => self.judgments.push(judgment),
        }
    }

    /// Keeps a row, in memory as the file has it: a number that is read may differ from what was written in its last
    /// digit, and a table must not tell whether its run was resumed.
    pub fn push(&mut self, mut row: Row) -> Result<(), TaskError> {
        if let Some((path, file)) = &mut self.file {
            let io = |error| TaskError::Io { path: path.clone(), error };
            let mut line = serde_json::to_string(&row).map_err(|e| io(e.into()))?;
            row = serde_json::from_str(&line).map_err(|e| io(e.into()))?;
            line.push('\n');
            file.write_all(line.as_bytes()).map_err(io)?;
        }
        self.remember(row);
        Ok(())
    }

    /// The answer of a policy to an item.
    pub fn answer(&self, settings: &str, policy: &str, strength: &str, item: &str) -> Option<&Record> {
        let same = |r: &&Record| {
            r.item == item && r.policy == policy && r.strength == strength && r.settings == settings
        };
        self.answers.iter().find(same)
    }

    /// Whether `judgment` has been made, with whatever outcome.
    pub fn has(&self, judgment: &Judgment) -> bool {
        let same = |j: &Judgment| {
            let Judgment { settings, judge, policy, strength, item, turn, kind, .. } = judgment;
            (&j.settings, &j.judge, &j.policy, &j.strength, &j.item, &j.turn, &j.kind)
                == (settings, judge, policy, strength, item, turn, kind)
        };
        self.judgments.iter().any(same)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn row(item: &str) -> Row {
        Row::Answer { answer: Record { item: item.into(), policy: "off".into(), ..Record::default() } }
    }

    #[test]
    fn a_line_cut_short_is_dropped_and_written_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.jsonl");
        let mut ledger = Ledger::open(Some(&path), false).unwrap();
        ledger.push(row("1")).unwrap();
        let whole = fs::read(&path).unwrap();
        ledger.push(row("2")).unwrap();
        drop(ledger);
        let both = fs::read(&path).unwrap();
        for cut in whole.len() + 1..both.len() {
            fs::write(&path, &both[..cut]).unwrap();
            let mut ledger = Ledger::open(Some(&path), true).unwrap();
            assert_eq!(ledger.answers.len(), 1);
            ledger.push(row("2")).unwrap();
            assert_eq!(fs::read(&path).unwrap(), both, "cut at {cut}");
        }
        let again = Ledger::open(Some(&path), false).unwrap_err().to_string();
        assert!(again.contains("--resume"), "{again}");
        fs::write(&path, b"{}\n").unwrap();
        let error = Ledger::open(Some(&path), true).unwrap_err().to_string();
        assert!(error.contains("rows.jsonl: line 1"), "{error}");
    }
}
