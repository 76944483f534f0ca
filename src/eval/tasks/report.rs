//! Records to tables and plots.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::json;

use super::{Estimate, Judgment, Record, Task, TaskError};
use crate::eval::plot::{Plot, Series, Style};
use crate::skip::SkipChoice;

/// A number that is measured of every answer.
#[derive(Clone, Copy, Debug)]
pub struct Measure {
    /// Its name in [`Record::scores`].
    pub key: &'static str,
    /// Heading of its column.
    pub title: &'static str,
    /// How it is written.
    pub unit: Unit,
}

/// How a measure is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Yes or no of each answer: per cent, with Wilson's interval.
    Share,
    /// A mean of shares: per cent.
    Percent,
    /// A mean, with so many digits.
    Mean(usize),
}

const fn measure(key: &'static str, title: &'static str, unit: Unit) -> Measure {
    Measure { key, title, unit }
}

const QA: &[Measure] = &[
    measure("exact", "exact %", Unit::Share),
    measure("contained", "contained %", Unit::Share),
    measure("same", "as the full model %", Unit::Share),
    measure("tokens", "tokens", Unit::Mean(1)),
];

const SUMMARIES: &[Measure] = &[
    measure("rouge1", "ROUGE-1", Unit::Percent),
    measure("rouge2", "ROUGE-2", Unit::Percent),
    measure("rougeL", "ROUGE-L", Unit::Percent),
    measure("full1", "ROUGE-1 to full", Unit::Percent),
    measure("full2", "ROUGE-2 to full", Unit::Percent),
    measure("fullL", "ROUGE-L to full", Unit::Percent),
    measure("kl", "KL", Unit::Mean(3)),
    measure("same_top1", "same top 1 %", Unit::Percent),
    measure("words", "words", Unit::Mean(0)),
    measure("under150", "under 150 words %", Unit::Share),
    measure("distinct2", "distinct-2 %", Unit::Percent),
    measure("repeat", "longest repeat", Unit::Mean(1)),
    measure("collapsed", "collapsed %", Unit::Share),
    measure("judge", "judge", Unit::Mean(2)),
    measure("wins", "wins against full %", Unit::Percent),
];

const CONVERSATION: &[Measure] = &[
    measure("kl", "KL", Unit::Mean(3)),
    measure("same_top1", "same top 1 %", Unit::Percent),
    measure("words", "words", Unit::Mean(0)),
    measure("distinct1", "distinct-1 %", Unit::Percent),
    measure("distinct2", "distinct-2 %", Unit::Percent),
    measure("repeat", "longest repeat", Unit::Mean(1)),
    measure("collapsed", "collapsed %", Unit::Share),
    measure("unfinished", "cut at -n %", Unit::Share),
    measure("judge", "judge", Unit::Mean(2)),
    measure("wins", "wins against full %", Unit::Percent),
];

impl Task {
    /// What is measured; the first is what the paper's table has, or stands for it.
    pub fn measures(self) -> &'static [Measure] {
        match self {
            Self::FreebaseQa => QA,
            Self::Summarize => SUMMARIES,
            Self::MtBench => CONVERSATION,
        }
    }

    /// The measure that is plotted.
    fn main(self) -> &'static Measure {
        self.measure(match self {
            Self::FreebaseQa => "contained",
            Self::Summarize => "rougeL",
            Self::MtBench => "same_top1",
        })
    }

    /// The measure whose difference from the full model is reported: one that the full model's answers have too. What is
    /// good of a conversation only a judge can say.
    fn changed(self) -> &'static Measure {
        match self {
            Self::MtBench => self.measure("judge"),
            _ => self.main(),
        }
    }

    fn measure(self, key: &str) -> &'static Measure {
        let measures = self.measures();
        measures.iter().find(|m| m.key == key).unwrap_or(&measures[0])
    }
}

/// A row of the table.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    /// Name of the policy.
    pub policy: String,
    /// What sets its strength.
    pub strength: String,
    /// Category or length group; empty: all.
    pub group: String,
    /// Answers.
    pub n: usize,
    /// Share of FFN blocks skipped, of the tokens governed.
    pub skipped: f64,
    /// Share of FFN weight bytes left unread.
    pub bytes_skipped: f64,
    /// The task's measures, by name, as far as there are values.
    pub measures: BTreeMap<&'static str, Estimate>,
    /// What the task compares by, less the full model's on the same items.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub change: Option<Estimate>,
    /// Judgments that could not be parsed.
    pub unparsable: usize,
    /// Share of FFN weight bytes left unread in each layer.
    pub by_layer: Vec<f64>,
}

/// All rows of a task.
#[derive(Clone, Debug)]
pub struct Report {
    task: Task,
    /// In the order of policies and strengths, each policy's groups after it.
    pub lines: Vec<Line>,
}

/// An answer's values, those of its judgments with them.
struct Scored<'r> {
    record: &'r Record,
    scores: BTreeMap<&'r str, f64>,
    unparsable: usize,
}

impl Report {
    /// Of some records of one task and their judgments; `by_group`: with rows for each group.
    pub fn new(task: Task, records: &[&Record], judgments: &[&Judgment], by_group: bool) -> Self {
        let scored: Vec<Scored> = records.iter().map(|record| score(record, judgments)).collect();
        let order = |r: &Record| {
            let place = SkipChoice::names().position(|name| name == r.policy).unwrap_or(usize::MAX);
            (place, numbers(&r.strength), r.strength.clone())
        };
        let mut contenders: Vec<&Record> = Vec::new();
        for &r in records {
            if !contenders.iter().any(|c| (&c.policy, &c.strength) == (&r.policy, &r.strength)) {
                contenders.push(r);
            }
        }
        contenders.sort_by(|a, b| order(a).partial_cmp(&order(b)).unwrap_or(std::cmp::Ordering::Equal));
        let mut groups: Vec<&str> =
            records.iter().map(|r| r.group.as_str()).filter(|g| !g.is_empty()).collect();
        groups.sort_unstable();
        groups.dedup();
        let groups = std::iter::once("").chain(groups.into_iter().filter(|_| by_group));
        let mut lines = Vec::new();
        for group in groups {
            for c in &contenders {
                let of = |s: &&Scored| {
                    (&s.record.policy, &s.record.strength) == (&c.policy, &c.strength)
                        && (group.is_empty() || s.record.group == group)
                };
                let mine: Vec<&Scored> = scored.iter().filter(of).collect();
                if !mine.is_empty() {
                    lines.push(line(task, group, &mine, &scored));
                }
            }
        }
        Self { task, lines }
    }

    /// The columns that have values, besides those that every row has.
    fn columns(&self) -> Vec<&'static Measure> {
        let has = |m: &&Measure| self.lines.iter().any(|l| l.measures.contains_key(m.key));
        self.task.measures().iter().filter(has).collect()
    }

    /// Whether anything could be set against the full model.
    fn has_changes(&self) -> bool {
        self.lines.iter().any(|l| l.change.is_some())
    }

    /// As Markdown.
    pub fn markdown(&self) -> String {
        let columns = self.columns();
        let changes = self.has_changes();
        let changed = self.task.changed();
        let judged = self.lines.iter().any(|l| l.unparsable > 0);
        let grouped = self.lines.iter().any(|l| !l.group.is_empty());
        let mut heads: Vec<String> = vec!["policy".into(), "strength".into()];
        heads.extend(grouped.then(|| "group".into()));
        heads.extend(["FFNs skipped %".into(), "FFN bytes unread %".into()]);
        heads.extend(columns.iter().map(|m| m.title.to_owned()));
        heads.extend(changes.then(|| format!("{}, less full", changed.title)));
        heads.extend(judged.then(|| "unparsable".into()));
        heads.push("n".into());
        let mut text = row(&heads) + &row(&heads.iter().map(|_| "---".to_owned()).collect::<Vec<_>>());
        for line in &self.lines {
            let mut cells = vec![line.policy.clone(), line.strength.clone()];
            cells.extend(
                grouped.then(|| if line.group.is_empty() { "all".into() } else { line.group.clone() }),
            );
            cells.extend([line.skipped, line.bytes_skipped].map(|share| format!("{:.1}", 100.0 * share)));
            cells.extend(columns.iter().map(|m| cell(m.unit, line.measures.get(m.key))));
            // A difference of shares is not a share.
            let unit = if changed.unit == Unit::Share { Unit::Percent } else { changed.unit };
            cells.extend(changes.then(|| cell(unit, line.change.as_ref())));
            cells.extend(judged.then(|| line.unparsable.to_string()));
            cells.push(line.n.to_string());
            text.push_str(&row(&cells));
        }
        text
    }

    /// As CSV: every estimate with the ends of its interval.
    pub fn csv(&self) -> String {
        let columns = self.columns();
        let changes = self.has_changes();
        let mut heads = ["policy", "strength", "group", "n", "skipped", "bytes_skipped"].join(",");
        for key in columns.iter().map(|m| m.key).chain(changes.then_some("change")) {
            heads.push_str(&format!(",{key},{key}_low,{key}_high"));
        }
        let mut text = heads + ",unparsable\n";
        for l in &self.lines {
            let strength =
                if l.strength.contains(',') { format!("\"{}\"", l.strength) } else { l.strength.clone() };
            text.push_str(&format!(
                "{},{strength},{},{},{:.4},{:.4}",
                l.policy, l.group, l.n, l.skipped, l.bytes_skipped
            ));
            let change = changes.then_some(l.change.as_ref());
            for e in columns.iter().map(|m| l.measures.get(m.key)).chain(change) {
                text.push_str(
                    &e.map_or(",,,".into(), |e| format!(",{:.6},{:.6},{:.6}", e.mean, e.low, e.high)),
                );
            }
            text.push_str(&format!(",{}\n", l.unparsable));
        }
        text
    }

    /// The plots, with their names: quality against share skipped, share skipped in each layer, quality by group.
    pub fn plots(&self) -> Result<Vec<(String, String)>, TaskError> {
        let name = self.task.name();
        let mut plots = vec![(format!("{name}-quality.svg"), self.quality().svg()?)];
        let layers = self.layers();
        if !layers.series.is_empty() {
            plots.push((format!("{name}-layers.svg"), layers.svg()?));
        }
        let groups = self.groups();
        if !groups.series.is_empty() {
            plots.push((format!("{name}-groups.svg"), groups.svg()?));
        }
        Ok(plots)
    }

    fn value(&self, line: &Line) -> Option<f64> {
        line.measures.get(self.task.main().key).map(|e| 100.0 * e.mean)
    }

    fn policies(&self) -> Vec<&str> {
        let mut policies: Vec<&str> = self.lines.iter().map(|l| l.policy.as_str()).collect();
        policies.dedup();
        let mut seen = Vec::new();
        policies
            .into_iter()
            .filter(|p| {
                !seen.contains(p) && {
                    seen.push(*p);
                    true
                }
            })
            .collect()
    }

    fn quality(&self) -> Plot {
        let all = || self.lines.iter().filter(|l| l.group.is_empty());
        let series = self.policies().into_iter().map(|policy| Series {
            name: policy.into(),
            points: all()
                .filter(|l| l.policy == policy)
                .filter_map(|l| Some((100.0 * l.bytes_skipped, self.value(l)?)))
                .collect(),
            style: Style::LineAndDots,
            ..Series::default()
        });
        Plot {
            title: format!("{}: {} against what is skipped", self.task.name(), self.task.main().title),
            x_title: "FFN weight bytes left unread, of the tokens governed (%)".into(),
            y_title: self.task.main().title.into(),
            log_y: false,
            series: series.collect(),
        }
    }

    /// Of each policy the setting that leaves closest to a quarter of the bytes unread: few enough lines to read, and
    /// alike enough to compare.
    fn typical(&self) -> Vec<&Line> {
        let distance = |l: &Line| (l.bytes_skipped - 0.25).abs();
        let of = |policy: &str| {
            let mine = self.lines.iter().filter(|l| l.group.is_empty() && l.policy == policy);
            mine.min_by(|a, b| distance(a).total_cmp(&distance(b)))
        };
        self.policies().into_iter().filter_map(of).collect()
    }

    fn layers(&self) -> Plot {
        let skipping = self.typical().into_iter().filter(|l| l.bytes_skipped > 0.0);
        let series = skipping.map(|l| Series {
            name: format!("{} {}", l.policy, l.strength),
            points: l.by_layer.iter().enumerate().map(|(i, &share)| (i as f64, 100.0 * share)).collect(),
            ..Series::default()
        });
        Plot {
            title: format!("{}: where FFNs are skipped", self.task.name()),
            x_title: "layer".into(),
            y_title: "FFN weight bytes left unread (%)".into(),
            log_y: false,
            series: series.collect(),
        }
    }

    fn groups(&self) -> Plot {
        let mut groups: Vec<&str> =
            self.lines.iter().map(|l| l.group.as_str()).filter(|g| !g.is_empty()).collect();
        groups.sort_unstable();
        groups.dedup();
        let mut series: Vec<Series> = Vec::new();
        for l in self.typical() {
            let of = |group: &&str| {
                let same = |x: &&Line| {
                    (&x.policy, &x.strength, x.group.as_str()) == (&l.policy, &l.strength, *group)
                };
                self.lines.iter().find(same).and_then(|x| self.value(x))
            };
            let points: Vec<(f64, f64)> =
                groups.iter().enumerate().filter_map(|(i, g)| Some((i as f64, of(g)?))).collect();
            if !points.is_empty() {
                let labels = match series.is_empty() {
                    true => groups.iter().map(|g| g.to_string()).collect(),
                    false => Vec::new(),
                };
                let name = format!("{} {}", l.policy, l.strength);
                series.push(Series { name, points, labels, style: Style::LineAndDots });
            }
        }
        Plot {
            title: format!("{}: {} by group", self.task.name(), self.task.main().title),
            x_title: "group".into(),
            y_title: self.task.main().title.into(),
            log_y: false,
            series,
        }
    }
}

fn row(cells: &[String]) -> String {
    format!("| {} |\n", cells.join(" | "))
}

fn cell(unit: Unit, estimate: Option<&Estimate>) -> String {
    let Some(e) = estimate else { return String::new() };
    match unit {
        Unit::Share => format!("{:.1} [{:.1}, {:.1}]", 100.0 * e.mean, 100.0 * e.low, 100.0 * e.high),
        Unit::Percent if e.n == 1 => format!("{:.1}", 100.0 * e.mean),
        Unit::Mean(digits) if e.n == 1 => format!("{:.digits$}", e.mean),
        Unit::Percent => format!("{:.1} ±{:.1}", 100.0 * e.mean, 50.0 * (e.high - e.low)),
        Unit::Mean(digits) => format!("{:.digits$} ±{:.digits$}", e.mean, 0.5 * (e.high - e.low)),
    }
}

/// The first number in a text, to order strengths by.
fn numbers(text: &str) -> f64 {
    let digits = text.split(|c: char| !c.is_ascii_digit() && c != '.').find(|part| !part.is_empty());
    digits.and_then(|d| d.parse().ok()).unwrap_or(0.0)
}

/// Adds what the judge said: the mean rating of all turns; and of each turn's comparison in both orders, a win or a loss
/// where both agree, and a tie otherwise, as in MT-Bench.
fn score<'r>(record: &'r Record, judgments: &[&'r Judgment]) -> Scored<'r> {
    let mut scores: BTreeMap<&str, f64> = record.scores.iter().map(|(k, v)| (k.as_str(), *v)).collect();
    let of = |j: &&&Judgment| {
        (&j.settings, &j.policy, &j.strength, &j.item)
            == (&record.settings, &record.policy, &record.strength, &record.item)
    };
    let mine: Vec<&&Judgment> = judgments.iter().filter(of).collect();
    let ratings: Vec<f64> = mine.iter().filter(|j| j.kind == "rate").filter_map(|j| j.score).collect();
    if let Some(mean) = Estimate::mean(&ratings) {
        scores.insert("judge", mean.mean);
    }
    let mut wins = Vec::new();
    for turn in 0..record.answers.len() {
        let in_order =
            |kind: &str| mine.iter().find(|j| j.turn == turn && j.kind == kind).and_then(|j| j.score);
        if let (Some(first), Some(second)) = (in_order("first"), in_order("second")) {
            wins.push(if first == second { first } else { 0.5 });
        }
    }
    if let Some(mean) = Estimate::mean(&wins) {
        scores.insert("wins", mean.mean);
    }
    let unparsable = mine.iter().filter(|j| j.score.is_none()).count();
    Scored { record, scores, unparsable }
}

fn line(task: Task, group: &str, mine: &[&Scored], all: &[Scored]) -> Line {
    let first = mine[0].record;
    // Shares weigh answers by their tokens.
    let weight = |s: &Scored| s.record.tokens.iter().map(Vec::len).sum::<usize>().max(1) as f64;
    let total: f64 = mine.iter().map(|s| weight(s)).sum();
    let weighted =
        |of: &dyn Fn(&Record) -> f64| mine.iter().map(|s| weight(s) * of(s.record)).sum::<f64>() / total;
    let measures = task.measures().iter().filter_map(|m| {
        let values: Vec<f64> = mine.iter().filter_map(|s| s.scores.get(m.key).copied()).collect();
        let estimate = match m.unit {
            Unit::Share => Estimate::share(values.iter().filter(|&&v| v > 0.5).count(), values.len()),
            _ => Estimate::mean(&values),
        };
        estimate.map(|estimate| (m.key, estimate))
    });
    let key = task.changed().key;
    let change = |s: &&Scored| {
        let full = |f: &&Scored| f.record.policy == "off" && f.record.item == s.record.item;
        let full = all.iter().find(full)?.scores.get(key)?;
        Some(s.scores.get(key)? - full)
    };
    let changes: Vec<f64> = match first.policy.as_str() {
        "off" => Vec::new(),
        _ => mine.iter().filter_map(change).collect(),
    };
    Line {
        policy: first.policy.clone(),
        strength: first.strength.clone(),
        group: group.into(),
        n: mine.len(),
        skipped: weighted(&|r| r.skipped),
        bytes_skipped: weighted(&|r| r.bytes_skipped),
        measures: measures.collect(),
        change: Estimate::mean(&changes),
        unparsable: mine.iter().map(|s| s.unparsable).sum(),
        by_layer: (0..first.by_layer.len())
            .map(|i| weighted(&|r| r.by_layer.get(i).copied().unwrap_or(0.0)))
            .collect(),
    }
}

/// Answers in FastChat's format, a line each, as its judge reads them; `model_id` names model and policy.
pub fn fastchat(records: &[&Record], model_id: &str) -> String {
    let mut text = String::new();
    for r in records {
        let id: serde_json::Value = r.item.parse::<u64>().map_or(json!(r.item), |id| json!(id));
        let line = json!({
            "question_id": id,
            "answer_id": format!("{model_id}-{}", r.item),
            "model_id": model_id,
            "choices": [{"index": 0, "turns": r.answers}],
            "tstamp": 0.0,
        });
        text.push_str(&format!("{line}\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(policy: &str, strength: &str, item: usize, contained: f64) -> Record {
        Record {
            policy: policy.into(),
            strength: strength.into(),
            item: item.to_string(),
            group: ["x", "y"][item % 2].into(),
            answers: vec!["text".into()],
            tokens: vec![vec![1; 1 + item]],
            skipped: 0.2,
            bytes_skipped: 0.2,
            by_layer: vec![0.0, 0.4],
            scores: [("contained".to_owned(), contained)].into(),
            ..Record::default()
        }
    }

    #[test]
    fn rows_are_in_order_with_paired_changes() {
        let mut records = vec![];
        for item in 0..4 {
            records.push(record("random", "ratio 15", item, 0.0));
            records.push(record("random", "ratio 5", item, 1.0));
            records.push(record("off", "", item, f64::from(u8::from(item > 0))));
        }
        let records: Vec<&Record> = records.iter().collect();
        let report = Report::new(Task::FreebaseQa, &records, &[], true);
        let names: Vec<String> =
            report.lines.iter().map(|l| format!("{} {} {}", l.policy, l.strength, l.group)).collect();
        assert_eq!(names[..3], ["off  ", "random ratio 5 ", "random ratio 15 "]);
        assert_eq!(report.lines.len(), 9);
        assert_eq!(report.lines[0].measures["contained"].mean, 0.75);
        let changes: Vec<_> = report.lines.iter().map(|l| l.change.map(|c| c.mean)).collect();
        assert_eq!(changes[..3], [None, Some(0.25), Some(-0.75)]);
        assert!(report.markdown().contains("| random | ratio 15 | all | 20.0 |"), "{}", report.markdown());
        assert_eq!(report.csv().lines().count(), 10);
        for (_, svg) in report.plots().unwrap() {
            assert!(svg.contains("random"));
        }
    }

    #[test]
    fn judgments_of_both_orders_make_a_win_a_loss_or_a_tie() {
        let r = record("random", "ratio 5", 0, 1.0);
        let judged = |kind: &str, score| Judgment {
            policy: r.policy.clone(),
            strength: r.strength.clone(),
            item: r.item.clone(),
            kind: kind.into(),
            score,
            ..Judgment::default()
        };
        let wins = |first, second| {
            let (a, b, c) = (judged("first", first), judged("second", second), judged("rate", Some(4.0)));
            let scored = score(&r, &[&a, &b, &c]);
            (scored.scores.get("wins").copied(), scored.unparsable, scored.scores["judge"])
        };
        assert_eq!(wins(Some(1.0), Some(1.0)), (Some(1.0), 0, 4.0));
        assert_eq!(wins(Some(1.0), Some(0.0)), (Some(0.5), 0, 4.0));
        assert_eq!(wins(Some(1.0), None), (None, 1, 4.0));
    }

    #[test]
    fn answers_as_fastchat_has_them() {
        let mut r = record("off", "", 81, 0.0);
        r.answers = vec!["one".into(), "two\n".into()];
        let line: serde_json::Value = serde_json::from_str(fastchat(&[&r], "m").trim()).unwrap();
        assert_eq!((&line["question_id"], &line["choices"][0]["turns"][1]), (&json!(81), &json!("two\n")));
    }
}
