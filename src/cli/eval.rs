//! `skiff eval`: the paper's tasks, policies side by side.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, ValueEnum};
use sha2::{Digest, Sha256};

use super::args::{
    EngineArgs, MAX_CONTEXT, SkipArgs, check_context, check_ratios, contending, in_range, pair, policies,
};
use super::generate::{TemplateArgs, progress_bar};
use super::interrupt::Listener;
use super::{Failure, Outcome, note, put};
use crate::chat::ChatTemplate;
use crate::eval::tasks::{
    self, Comparison, Contender, Item, Judge, Judgment, Ledger, Record, Report, Row, Task, TaskError,
};
use crate::session::Engine;
use crate::skip::{SkipChoice, SkipMode, SkipOptions};

const EXAMPLES: &str = "\
Examples:
  skiff eval --task freebaseqa --data dev.txt --limit 200 --out qa.jsonl
  skiff eval --task summarize --data stories/ --policies ffn-skip,static --ratios 15,25 --out s.jsonl --plot .
  skiff eval --task mt-bench --data question.jsonl --limit 16 --out mt.jsonl --answers answers/
  skiff eval --task mt-bench --data question.jsonl --out mt.jsonl --resume --judge-url http://localhost:8080

The full model and each policy at each ratio answer the same items from the same prompts, greedily, --parallel answers
side by side; all of an item before the next, so that a table can be had at any time. Prompts run in full, once for all
policies. Each answer is in --out as soon as its last token is there: after a kill, --resume generates anew only those
that were in progress, --parallel of them at most. A mean stands with its 95 % interval: Wilson's for shares of answers,
Student's elsewhere; `less full` is the mean difference from the full model on the same items. After Ctrl-C the
answers so far are reported, with exit code 130.";

/// Run the paper's tasks: factoid questions, summaries, conversations
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct EvalArgs {
    /// Which task
    #[arg(long, value_name = "TASK", value_parser = task_names())]
    task: Task,
    /// Its data: FreebaseQA text or JSON; a folder of .story files or JSON lines; MT-Bench's question.jsonl
    #[arg(long, value_name = "PATH")]
    data: PathBuf,
    /// Items at most: a sample of the questions; stories or conversations of all groups in turn
    #[arg(long, value_name = "N", value_parser = in_range(1, usize::MAX))]
    limit: Option<usize>,
    /// Seed of the sample of questions
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Policies, beside the full model; `off`: none [default: all that this model has a calibration for]
    #[arg(long, value_name = "A,B,...", value_delimiter = ',', value_parser = policies())]
    policies: Vec<SkipChoice>,
    /// Shares to skip, in percent
    #[arg(long, value_name = "P,Q,...", value_delimiter = ',', default_values_t = [5.0, 15.0, 25.0, 35.0])]
    ratios: Vec<f32>,
    /// Keep answers and judgments in this file, a line of JSON each, as they come
    #[arg(long, value_name = "FILE.jsonl")]
    out: Option<PathBuf>,
    /// Go on from what --out holds
    #[arg(long, requires = "out")]
    resume: bool,
    /// freebaseqa: answered questions that precede the one asked, as a text to be continued
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = in_range(0, 64))]
    shots: usize,
    /// Have a text continued, even if the model has a chat template
    #[arg(long)]
    raw: bool,
    /// Tokens of an answer, at most [default: freebaseqa 32, summarize 220, mt-bench 512]
    #[arg(short = 'n', long = "predict", value_name = "N", value_parser = in_range(1, 1 << 16))]
    max_tokens: Option<usize>,
    /// Tokens that fit, prompt and answer together; a longer story is cut
    #[arg(short = 'c', long = "ctx-size", value_name = "N", default_value_t = 4096, value_parser = in_range(64, MAX_CONTEXT))]
    context: usize,
    /// Answers that are generated side by side; they do not depend on it, speed and memory do
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = in_range(1, 512))]
    parallel: usize,
    /// Write the answers of each policy to DIR in FastChat's format
    #[arg(long, value_name = "DIR")]
    answers: Option<PathBuf>,
    /// mt-bench: reference answers for the judge (reference_gpt-4.jsonl)
    #[arg(long, value_name = "FILE")]
    reference: Option<PathBuf>,
    /// Have answers judged by a model behind this OpenAI-compatible API; its key is read from OPENAI_API_KEY
    #[arg(long, value_name = "URL")]
    judge_url: Option<String>,
    /// Name of the judging model
    #[arg(long, value_name = "NAME", default_value = "default")]
    judge_model: String,
    /// What the judge does
    #[arg(long, value_name = "HOW", value_enum, default_value_t = JudgeMode::Both)]
    judge_mode: JudgeMode,
    /// Rows for each category or length group too
    #[arg(long)]
    by_group: bool,
    /// Draw the plots into DIR
    #[arg(long, value_name = "DIR")]
    plot: Option<PathBuf>,
    /// Format of the table
    #[arg(short, long, value_name = "FORMAT", value_enum, default_value_t = Format::Md)]
    output: Format,
    /// The same as -o json
    #[arg(long)]
    json: bool,
    /// Print no progress
    #[arg(short, long)]
    quiet: bool,
    /// Calibration file [default: MODEL.skip.gguf beside the model]
    #[arg(long, value_name = "S.skip.gguf", help_heading = "Skipping")]
    skip_file: Option<PathBuf>,
    /// Tokens of an answer that run in full first [default: 25; freebaseqa 0, since answers are shorter than that]
    #[arg(long, value_name = "N", help_heading = "Skipping")]
    skip_warmup: Option<usize>,
    /// First layer that may be skipped and the one after the last [default: as calibrated]
    #[arg(long, value_name = "S,E", value_parser = pair, help_heading = "Skipping")]
    skip_cold: Option<(usize, usize)>,
    /// random: seed of its draws
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Skipping")]
    skip_seed: u64,
    /// Skip in prompts too, after the warm-up
    #[arg(long, help_heading = "Skipping")]
    skip_prefill: bool,
    #[command(flatten)]
    template: TemplateArgs,
    #[command(flatten)]
    engine: EngineArgs,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Format {
    Csv,
    Md,
    Json,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum JudgeMode {
    /// Rate every answer from 1 to 10
    Rate,
    /// Compare with the full model's, in both orders
    Compare,
    Both,
}

fn task_names() -> impl TypedValueParser<Value = Task> {
    PossibleValuesParser::new(Task::NAMES.map(|row| row.0))
        .try_map(|name| Task::NAMES.iter().find(|row| row.0 == name).map(|row| row.1).ok_or("no such task"))
}

/// A run: who answers what.
struct Run<'a> {
    args: &'a EvalArgs,
    settings: String,
    model: String,
    items: &'a [Item],
    contenders: &'a [Contender],
    listener: Listener,
}

pub(super) fn run(args: &EvalArgs) -> Outcome {
    args.check()?;
    let (items, shots) = args.items()?;
    let mut ledger = Ledger::open(args.out.as_deref(), args.resume)?;
    let mut engine = args.engine.load()?;
    check_context(&engine, args.context, args.engine.kv)?;
    let template = args.template(&engine)?;
    let contenders = args.contenders(&mut engine)?;
    let settings = tasks::Settings {
        task: args.task,
        template,
        system: args.template.system.clone(),
        shots,
        max_tokens: args.max_tokens(),
        context: args.context,
        kv: args.engine.kv.into(),
    };
    let run = Run {
        args,
        settings: args.fingerprint(&engine, &settings),
        model: file_name(engine.model().weights().path()),
        items: &items,
        contenders: &contenders,
        listener: Listener::new(),
    };
    let mut runner = tasks::Runner::new(&engine, settings, args.parallel)?;
    run.answer_all(&mut runner, &mut ledger)?;
    if let Some(url) = &args.judge_url {
        let key = std::env::var("OPENAI_API_KEY").ok().filter(|key| !key.is_empty());
        run.judge_all(&Judge::new(url, &args.judge_model, key), &mut ledger)?;
    }
    run.report(&ledger)?;
    if run.listener.raised() { Err(Failure::Interrupted) } else { Ok(()) }
}

impl EvalArgs {
    fn check(&self) -> Outcome {
        let usage = |message: String| Err(Failure::Usage(message));
        check_ratios(&self.ratios)?;
        let (name, qa) = (self.task.name(), self.task == Task::FreebaseQa);
        if self.shots > 0 && !qa {
            return usage(format!("--shots: not for --task {name}"));
        }
        if self.judge_url.is_some() && qa {
            return usage(format!(
                "--judge-url: not for --task {name}, whose answers are compared with the right ones"
            ));
        }
        if (self.reference.is_some() || self.answers.is_some()) && self.task != Task::MtBench {
            return usage(format!("--reference and --answers: not for --task {name}"));
        }
        let plain = self.raw || self.shots > 0;
        if plain && (self.template.system.is_some() || self.template.chat_template.is_some()) {
            return usage(
                "--system and --chat-template: a text that is continued (--raw, --shots) has neither".into(),
            );
        }
        Ok(())
    }

    fn max_tokens(&self) -> usize {
        self.max_tokens.unwrap_or(match self.task {
            Task::FreebaseQa => 32,
            Task::Summarize => 220,
            Task::MtBench => 512,
        })
    }

    /// How messages are written; without one prompts are text to be continued, which a conversation cannot be.
    fn template(&self, engine: &Engine) -> Result<Option<ChatTemplate>, Failure> {
        let plain = self.raw || self.shots > 0;
        let template = if plain { None } else { self.template.template(engine)? };
        match template {
            None if self.task == Task::MtBench => Err(TaskError::NoTemplate.into()),
            template => Ok(template),
        }
    }

    /// What is asked, and the questions that precede one.
    fn items(&self) -> Result<(Vec<Item>, Vec<Item>), Failure> {
        let mut items = match self.task {
            Task::FreebaseQa => tasks::shuffled(tasks::freebaseqa(&self.data)?, self.seed),
            Task::Summarize => tasks::interleaved(tasks::stories(&self.data)?),
            Task::MtBench => tasks::interleaved(tasks::mt_bench(&self.data)?),
        };
        if let Some(path) = &self.reference {
            tasks::add_references(&mut items, path)?;
        }
        if self.shots >= items.len() {
            let message = format!("--shots {}: there are only {} questions", self.shots, items.len());
            return Err(Failure::Usage(message));
        }
        // From the end: what is asked is the same with any number of shots.
        let shots = items.split_off(items.len() - self.shots);
        items.truncate(self.limit.unwrap_or(usize::MAX));
        Ok((items, shots))
    }

    /// The full model, and the policies at their ratios. Where none were named, those that lack a calibration are left
    /// out; a ratio that a policy does not reach is, too.
    fn contenders(&self, engine: &mut Engine) -> Result<Vec<Contender>, Failure> {
        let off = Contender { policy: "off".into(), strength: String::new(), skip: SkipOptions::default() };
        let mut contenders = vec![off];
        let named = !self.policies.is_empty();
        for choice in contending(&self.policies) {
            let ratios = match choice.mode {
                SkipMode::Auto | SkipMode::Off => vec![None],
                _ => self.ratios.iter().map(|&r| Some(r)).collect(),
            };
            for ratio in ratios {
                let mut strength = ratio.map_or(String::new(), |ratio| format!("ratio {ratio}"));
                if let Some((start, end)) = self.skip_cold {
                    strength.push_str(&format!(" of layers {start} to {end}"));
                }
                match self.skip_args(choice, ratio.map(|r| r / 100.0)).by_rows(engine, self.max_tokens()) {
                    Ok(skip) => contenders.push(Contender { policy: choice.name().into(), strength, skip }),
                    Err(Failure::Usage(why)) if !named || ratio.is_some() => {
                        note(&format!("left out: {} {strength}: {why}", choice.name()));
                    }
                    Err(failure) => return Err(failure),
                }
            }
        }
        Ok(contenders)
    }

    fn skip_args(&self, skip: SkipChoice, ratio: Option<f32>) -> SkipArgs {
        let warm_up = if self.task == Task::FreebaseQa { 0 } else { 25 };
        SkipArgs {
            skip,
            skip_file: self.skip_file.clone(),
            skip_ratio: ratio,
            skip_warmup: Some(self.skip_warmup.unwrap_or(warm_up)),
            skip_cold: self.skip_cold,
            skip_seed: self.skip_seed,
            skip_prefill: self.skip_prefill,
            ..SkipArgs::default()
        }
    }

    /// Everything that answers depend on besides item and policy, as a hash: rows of other settings are left alone.
    fn fingerprint(&self, engine: &Engine, settings: &tasks::Settings) -> String {
        let model = engine.model();
        let warm_up = self.skip_args(SkipChoice::default(), None).skip_warmup;
        let text = format!(
            "{} {:?} {} {warm_up:?} {} {} {:?}",
            model.weights().fingerprint(),
            settings,
            engine.kernels().name(),
            self.skip_seed,
            self.skip_prefill,
            model.calibration(),
        );
        Sha256::digest(text.as_bytes())[..8].iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

impl Run<'_> {
    fn answer_all(&self, runner: &mut tasks::Runner<'_>, ledger: &mut Ledger) -> Outcome {
        let mut before: HashMap<(String, String, String), Record> = HashMap::new();
        for r in ledger.answers.iter().filter(|r| r.settings == self.settings) {
            before.insert((r.policy.clone(), r.strength.clone(), r.item.clone()), r.clone());
        }
        let known = |item: &Item, c: &Contender| {
            before.get(&(c.policy.clone(), c.strength.clone(), item.id.clone())).cloned()
        };
        let pairs = self.items.iter().flat_map(|item| self.contenders.iter().map(move |c| (item, c)));
        let open = pairs.filter(|(item, c)| known(item, c).is_none_or(|r| r.awaits_full)).count();
        let bar = progress_bar(open, "answers {wide_bar} {pos}/{len}, {eta} left, {msg}", self.args.quiet);
        bar.enable_steady_tick(Duration::from_millis(200));
        let answered = |mut record: Record| {
            (record.settings, record.model) = (self.settings.clone(), self.model.clone());
            bar.set_message(format!("{} {}", record.policy, record.strength));
            bar.inc(u64::from(!record.awaits_full));
            ledger.push(Row::Answer { answer: record })
        };
        let go = || !self.listener.raised();
        runner.answer_all(self.items, self.contenders, known, answered, go)?;
        bar.finish_and_clear();
        Ok(())
    }

    /// The answers to the items of this run.
    ///
    /// In the order of items: that in which answers were complete is not to be seen in sums.
    fn records<'l>(&self, ledger: &'l Ledger) -> Vec<&'l Record> {
        let place: HashMap<&str, usize> =
            self.items.iter().enumerate().map(|(i, item)| (item.id.as_str(), i)).collect();
        let of_run = |r: &&Record| r.settings == self.settings && place.contains_key(r.item.as_str());
        let mut records: Vec<&Record> = ledger.answers.iter().filter(of_run).collect();
        records.sort_by_key(|r| place[r.item.as_str()]);
        records
    }

    /// Has every answer judged that has not been.
    fn judge_all(&self, judge: &Judge, ledger: &mut Ledger) -> Outcome {
        let mode = self.args.judge_mode;
        let mut open: Vec<(Record, Judgment)> = Vec::new();
        for record in self.records(ledger) {
            for turn in 0..record.answers.len() {
                for kind in ["rate", "first", "second"] {
                    let wanted = match kind {
                        "rate" => mode != JudgeMode::Compare,
                        _ => mode != JudgeMode::Rate && record.policy != "off",
                    };
                    let judgment = Judgment {
                        settings: self.settings.clone(),
                        judge: judge.name().into(),
                        policy: record.policy.clone(),
                        strength: record.strength.clone(),
                        item: record.item.clone(),
                        group: record.group.clone(),
                        turn,
                        kind: kind.into(),
                        ..Judgment::default()
                    };
                    if wanted && !ledger.has(&judgment) {
                        open.push((record.clone(), judgment));
                    }
                }
            }
        }
        let bar = progress_bar(open.len(), "judge {wide_bar} {pos}/{len}, {eta} left", self.args.quiet);
        for (record, judgment) in open {
            if self.listener.raised() {
                break;
            }
            self.judge_one(judge, &record, judgment, ledger)?;
            bar.inc(1);
        }
        bar.finish_and_clear();
        Ok(())
    }

    fn judge_one(
        &self,
        judge: &Judge,
        answer: &Record,
        mut judgment: Judgment,
        ledger: &mut Ledger,
    ) -> Outcome {
        let (task, turn) = (self.args.task, judgment.turn);
        let Some(item) = self.items.iter().find(|item| item.id == answer.item) else { return Ok(()) };
        let judged = match judgment.kind.as_str() {
            "rate" => judge.rate(task, item, answer, turn)?,
            kind => {
                let Some(full) = ledger.answer(&self.settings, "off", "", &item.id) else { return Ok(()) };
                judge.compare(task, item, Comparison { answer, full, first: kind == "first" }, turn)?
            }
        };
        (judgment.said, judgment.score) = (judged.said, judged.score);
        Ok(ledger.push(Row::Judgment { judgment })?)
    }

    fn report(&self, ledger: &Ledger) -> Outcome {
        let args = self.args;
        let records = self.records(ledger);
        let of_judge = |j: &&Judgment| j.settings == self.settings && j.judge == args.judge_model;
        let judgments: Vec<&Judgment> = ledger.judgments.iter().filter(of_judge).collect();
        let report = Report::new(args.task, &records, &judgments, args.by_group);
        put(&match args.output {
            _ if args.json => serde_json::to_string_pretty(&report.lines)? + "\n",
            Format::Json => serde_json::to_string_pretty(&report.lines)? + "\n",
            Format::Csv => report.csv(),
            Format::Md => report.markdown(),
        })?;
        if let Some(folder) = &args.plot {
            let grouped = Report::new(args.task, &records, &judgments, true);
            for (name, svg) in grouped.plots()? {
                write(&folder.join(name), &svg)?;
            }
        }
        if let Some(folder) = &args.answers {
            self.write_answers(folder, &records)?;
        }
        Ok(())
    }

    /// A file for each policy and strength.
    fn write_answers(&self, folder: &Path, records: &[&Record]) -> Outcome {
        fs::create_dir_all(folder).map_err(|e| Failure::Error(format!("{}: {e}", folder.display())))?;
        for c in self.contenders {
            let mine: Vec<&Record> = (records.iter().copied())
                .filter(|r| (&r.policy, &r.strength) == (&c.policy, &c.strength))
                .collect();
            let stem = self.model.strip_suffix(".gguf").unwrap_or(&self.model);
            let id = format!("{stem}-{} {}", c.policy, c.strength).trim().replace(' ', "-");
            write(&folder.join(format!("{id}.jsonl")), &tasks::fastchat(&mine, &id))?;
        }
        Ok(())
    }
}

fn write(path: &Path, text: &str) -> Outcome {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(|e| Failure::Error(format!("{}: {e}", folder.display())))?;
    }
    fs::write(path, text).map_err(|e| Failure::Error(format!("{}: {e}", path.display())))
}

fn file_name(path: &Path) -> String {
    path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}
