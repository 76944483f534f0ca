//! `skiff bench`: prompt and generation speed, as llama-bench measures and prints them.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use indicatif::ProgressBar;
use serde_json::{Map, Value as Json};

use super::args::{
    CpuArgs, KvArg, LoadArgs, LoadBar, MAX_CONTEXT, ModelArgs, SkipArgs, check_cache, in_range, kernel_names,
};
use super::generate::progress_bar;
use super::interrupt::Listener;
use super::{Failure, Outcome, put};
use crate::eval::bench::{BenchOptions, Report, Rival, Run, Sweep, Test};
use crate::kernels::Kernels;
use crate::model::{Model, ModelError};
use crate::ops::Compute;
use crate::threads::{Team, default_threads};

const EXAMPLES: &str = "\
Examples:
  skiff bench
  skiff bench -m model.gguf -p 128,512 -n 64 -d 0,2048 -t 1,2 -o json
  skiff bench -m model.gguf --vs llama.cpp/build/bin/llama-bench

Each test has a warm-up and -r repetitions on random tokens. t/s is mean and standard deviation, as llama-bench's. The
columns after it are ours, from the median: for generation, weight bytes read a second and the share of what reading
1 GiB of memory reaches with the same threads between the repetitions; for prompts, 1e12 integer operations a second
and the share of what the kernel's instruction reaches on registers. How many FFNs are skipped depends on the text; random tokens are not one, so measure that with `skiff ppl`.
Ctrl-C reports the tests done, with exit code 130.";

/// Measure the speed of prompts and generation
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct BenchArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Prompt lengths, with commas; 0 is none
    #[arg(short = 'p', long, value_name = "N,..", value_delimiter = ',', default_value = "512", value_parser = in_range(0, MAX_CONTEXT))]
    n_prompt: Vec<usize>,
    /// Numbers of generated tokens, with commas; 0 is none
    #[arg(short = 'n', long, value_name = "N,..", value_delimiter = ',', default_value = "128", value_parser = in_range(0, MAX_CONTEXT))]
    n_gen: Vec<usize>,
    /// Tokens in the cache before a test, with commas
    #[arg(short = 'd', long, value_name = "N,..", value_delimiter = ',', default_value = "0", value_parser = in_range(0, MAX_CONTEXT))]
    n_depth: Vec<usize>,
    /// Repetitions of each test
    #[arg(short, long, value_name = "N", default_value_t = 5, value_parser = in_range(1, 10_000))]
    repetitions: usize,
    /// Prompt tokens evaluated at a time
    #[arg(short, long = "batch-size", value_name = "N", default_value_t = 512, value_parser = in_range(1, 4096))]
    batch: usize,
    /// Numbers of threads, with commas [default: the physical cores that this process may use]
    #[arg(short, long, value_name = "N,..", value_delimiter = ',', value_parser = in_range(1, 1024))]
    threads: Vec<usize>,
    #[command(flatten)]
    cpus: CpuArgs,
    #[command(flatten)]
    load: LoadArgs,
    /// Kernel to compute with; `skiff info` lists them [default: the best for this CPU]
    #[arg(long, value_name = "NAME", value_parser = kernel_names())]
    kernel: Option<String>,
    /// How keys and values are kept
    #[arg(long, value_name = "TYPE", value_enum, default_value_t = KvArg::F16)]
    kv: KvArg,
    /// Form of the output
    #[arg(short, long, value_name = "FORM", value_enum, default_value_t = Form::Md)]
    output: Form,
    /// A llama-bench program that takes its turn after each repetition, to compare with
    #[arg(long, value_name = "PROGRAM")]
    vs: Option<PathBuf>,
    /// Print no progress
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    skip: SkipArgs,
}

/// `-o`
#[derive(Clone, Copy, ValueEnum)]
enum Form {
    Md,
    Csv,
    Json,
    Jsonl,
}

pub(super) fn run(args: &BenchArgs) -> Outcome {
    let tests = Test::all(&args.n_prompt, &args.n_gen, &args.n_depth);
    if tests.is_empty() {
        return Err(Failure::Usage("-p 0 -n 0: nothing to measure".into()));
    }
    if args.vs.is_some() && args.cpus.cpu_strict {
        // The program would inherit the one CPU of this thread.
        return Err(Failure::Usage(
            "--vs and --cpu-strict: the other program cannot be kept likewise".into(),
        ));
    }
    let kernels = Kernels::select(args.kernel.as_deref())?;
    let path = args.model.resolve()?;
    args.cpus.keep()?;
    let loading = LoadBar::default();
    let mut model = Model::load_with(&path, args.load.options(), &|done, total| loading.tell(done, total))?;
    loading.finish();
    let longest = tests.iter().map(Test::context).max().unwrap_or(0);
    check_cache(model.config(), "a test of so many tokens:", longest, args.kv)?;
    let threads = if args.threads.is_empty() { vec![default_threads()] } else { args.threads.clone() };
    let team = Team::new(threads[0]).map_err(ModelError::from)?;
    let on = Compute { team: &team, kernels };
    let skip = args.skip.options(&mut model, on)?;
    let skip = args.skip.if_it_pays(&mut model, on, skip)?;
    drop(team);
    let mlock = args.load.options().mlock;
    let options = BenchOptions { batch: args.batch, kv: args.kv.into(), skip, mlock };

    let listener = Listener::new();
    let template = "bench {wide_bar} {pos}/{len} repetitions, {eta} left, {msg}";
    let bar = progress_bar(threads.len() * tests.len() * args.repetitions, template, args.quiet);
    let bench = Bench { args, model: &model, kernels, options, sweep: Sweep::new(), listener, bar };
    let mut reports = Vec::new();
    for threads in threads {
        let team = match args.cpus.cpu_strict {
            true => Team::pinned(threads)?,
            false => Team::new(threads).map_err(ModelError::from)?,
        };
        for &test in &tests {
            if !bench.listener.raised() {
                reports.extend(bench.test(&team, test)?);
            }
        }
    }
    bench.bar.finish_and_clear();
    put(&match args.output {
        Form::Md => markdown(&reports, args.skip.skip_report),
        Form::Csv => csv(&reports)?,
        Form::Json => format!("{}\n", serde_json::to_string_pretty(&reports)?),
        Form::Jsonl => lines(&reports)?,
    })?;
    if bench.listener.raised() { Err(Failure::Interrupted) } else { Ok(()) }
}

/// What all tests have in common.
struct Bench<'a> {
    args: &'a BenchArgs,
    model: &'a Model,
    kernels: Kernels,
    options: BenchOptions,
    sweep: Sweep,
    listener: Listener,
    bar: ProgressBar,
}

impl Bench<'_> {
    /// Runs a test; with no report if Ctrl-C came first.
    fn test(&self, team: &Team, test: Test) -> Result<Option<Report>, Failure> {
        let rival = self.args.vs.as_deref().map(Rival::new);
        let mut theirs = (String::new(), Vec::new());
        let go_on = || !self.listener.raised();
        self.bar.set_message(format!("{} with {} threads", test.name(), team.threads()));
        // A bar that ticks by itself would take time from what is measured.
        self.bar.tick();
        let on = (team, self.kernels);
        let mut run = Run::new(self.model, on, test, &self.options, &self.sweep, &go_on)?;
        for _ in 0..self.args.repetitions {
            run.repeat(&go_on)?;
            if let Some(rival) = rival.as_ref().filter(|_| go_on()) {
                let path = self.model.weights().path();
                match rival.run(path, test, team.threads(), &self.options) {
                    Ok((commit, speed)) => {
                        theirs.0 = commit;
                        theirs.1.push(speed);
                    }
                    Err(_) if !go_on() => {} // Ctrl-C reached it too
                    Err(error) => return Err(error.into()),
                }
            }
            if !go_on() {
                return Ok(None);
            }
            self.bar.inc(1);
        }
        Ok(run.report().map(|mut report| {
            if !theirs.1.is_empty() {
                report.compare(theirs.0, theirs.1);
            }
            report
        }))
    }
}

/// A column: title, whether numbers stand in it, and its cell.
type Column = (&'static str, bool, fn(&Report) -> String);

const COLUMNS: &[Column] = &[
    ("model", false, |r| r.model_type.clone()),
    ("size", true, |r| size(r.model_size)),
    ("params", true, |r| parameters(r.model_n_params)),
    ("backend", false, |r| r.backends.to_owned()),
    ("threads", true, |r| r.n_threads.to_string()),
    ("type_kv", false, |r| r.type_k.to_owned()),
    ("test", true, |r| r.test.clone()),
    ("t/s", true, |r| format!("{:.2} ± {:.2}", r.avg_ts, r.stddev_ts)),
    ("weight GB/s", true, |r| number(r.weight_gbps, 2)),
    ("KV GB/s", true, |r| number(r.kv_gbps, 2)),
    ("sweep GB/s", true, |r| number(r.sweep_gbps, 2)),
    ("of sweep", true, |r| share(r.sweep_share)),
    ("TOPS", true, |r| number(r.tops, 3)),
    ("of peak", true, |r| share(r.peak_share)),
    ("kernel", false, |r| r.kernel.to_owned()),
    ("FFNs skipped", true, |r| format!("{:.1} %", 100.0 * r.ffn_skipped)),
];

const COMPARISON: &[Column] = &[
    ("llama-bench t/s", true, |r| {
        r.vs.as_ref().map_or("-".into(), |v| format!("{:.2} ± {:.2}", v.vs_avg_ts, v.vs_stddev_ts))
    }),
    ("ratio", true, |r| number(r.vs.as_ref().map(|v| v.vs_ratio), 2)),
];

fn size(bytes: u64) -> String {
    let mib = bytes as f64 / f64::from(1 << 20);
    if mib < 1024.0 { format!("{mib:.2} MiB") } else { format!("{:.2} GiB", mib / 1024.0) }
}

fn parameters(n: u64) -> String {
    if n < 1_000_000_000 { format!("{:.2} M", n as f64 / 1e6) } else { format!("{:.2} B", n as f64 / 1e9) }
}

fn number(value: Option<f64>, decimals: usize) -> String {
    value.map_or("-".into(), |v| format!("{v:.decimals$}"))
}

fn share(value: Option<f64>) -> String {
    value.map_or("-".into(), |share| format!("{:.0} %", 100.0 * share))
}

fn markdown(reports: &[Report], by_layer: bool) -> String {
    let plain_cache = reports.iter().all(|r| r.type_k == "f16");
    let mut columns: Vec<&Column> = COLUMNS.iter().filter(|c| c.0 != "type_kv" || !plain_cache).collect();
    if reports.iter().any(|r| r.vs.is_some()) {
        columns.extend(COMPARISON);
    }
    let mut text = table(&columns, reports);
    for report in reports.iter().filter(|r| by_layer && r.ffn_skipped > 0.0) {
        let shares = report.skipped_by_layer.iter().map(|s| format!("{:.0}", 100.0 * s));
        let shares = shares.collect::<Vec<_>>().join(" ");
        text.push_str(&format!("\n{}, FFNs skipped by layer, %: {shares}\n", report.test));
    }
    text
}

fn table(columns: &[&Column], reports: &[Report]) -> String {
    let mut rows = vec![columns.iter().map(|c| c.0.to_owned()).collect::<Vec<_>>()];
    rows.extend(reports.iter().map(|r| columns.iter().map(|c| c.2(r)).collect()));
    let width = |i: usize| rows.iter().map(|row: &Vec<String>| row[i].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns.len()).map(width).collect();
    let cell = |i: usize, cell: &str| match (columns[i].1, widths[i]) {
        (true, width) => format!(" {cell:>width$} |"),
        (false, width) => format!(" {cell:<width$} |"),
    };
    let line = |row: &Vec<String>| -> String {
        let cells: String = row.iter().enumerate().map(|(i, text)| cell(i, text)).collect();
        format!("|{cells}\n")
    };
    let rule = |(i, column): (usize, &&Column)| {
        let dashes = "-".repeat(widths[i] - usize::from(column.1));
        if column.1 { format!(" {dashes}: |") } else { format!(" {dashes} |") }
    };
    let rule: String = columns.iter().enumerate().map(rule).collect();
    format!("{}|{rule}\n{}", line(&rows[0]), rows[1..].iter().map(line).collect::<String>())
}

/// The fields of JSON but for lists; all in quotes and yes as 1, as llama-bench has them.
fn csv(reports: &[Report]) -> Result<String, Failure> {
    let mut text = String::new();
    for report in reports {
        let Json::Object(fields) = serde_json::to_value(report)? else { continue };
        let fields: Map<_, _> = fields.into_iter().filter(|(_, value)| !value.is_array()).collect();
        if text.is_empty() {
            text = format!("{}\n", fields.keys().cloned().collect::<Vec<_>>().join(","));
        }
        let cell = |value: &Json| match value {
            Json::Null => "\"\"".into(),
            Json::Bool(yes) => format!("\"{}\"", u8::from(*yes)),
            Json::String(text) => format!("\"{}\"", text.replace('"', "\"\"")),
            other => format!("\"{other}\""),
        };
        let cells = fields.values().map(cell).collect::<Vec<_>>().join(",");
        text.push_str(&format!("{cells}\n"));
    }
    Ok(text)
}

fn lines(reports: &[Report]) -> Result<String, Failure> {
    let line = |report| Ok(format!("{}\n", serde_json::to_string(report)?));
    reports.iter().map(line).collect()
}
