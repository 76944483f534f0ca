//! `skiff sweep`: policies side by side.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use indicatif::ProgressBar;

use super::args::{
    EngineArgs, MAX_CONTEXT, SkipArgs, check_context, check_ratios, contending, in_range, policies,
};
use super::generate::progress_bar;
use super::interrupt::Listener;
use super::{Failure, Outcome, note, put, read_text};
use crate::eval::sweep::{Contender, Row, Sweep, SweepOptions, pareto, plot};
use crate::pull;
use crate::session::Engine;
use crate::skip::{SkipChoice, SkipMode};
use crate::tokenizer::EncodeOptions;

const EXAMPLES: &str = "\
Examples:
  skiff sweep -f wiki.txt
  skiff sweep -f wiki.txt --policies ffn-skip,static --ratios 10,20 --windows 4 -o csv
  skiff sweep -m model-Q8_0.gguf -f wiki.txt --compare model-Q4_K_M.gguf --plot pareto.svg --rows sweep.jsonl

Every window of the text is evaluated by the full model and by each policy at each strength, and compared. `FFN` is the
share of FFN weight bytes left unread, of all positions; `read` what is read of all weights to decode a token past the
warm-up; `ideal` the speed-up if time went by bytes alone. Decoding is timed in turn with the full model. Rows marked
* are on the Pareto front: nothing else reads less at no more KL. With --rows, rows are kept as they come, and those
that are there already are not measured again. After Ctrl-C the windows done are reported, with exit code 130.";

/// Measure what every skip policy leaves out, costs and gains
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct SweepArgs {
    /// The text (- is stdin)
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,
    /// Policies [default: all that can be had without a calibration file, or with the one there is]
    #[arg(long, value_name = "A,B,...", value_delimiter = ',', value_parser = policies())]
    policies: Vec<SkipChoice>,
    /// Shares to skip, in percent
    #[arg(long, value_name = "P,Q,...", value_delimiter = ',', default_values_t = [5.0, 10.0, 20.0, 30.0])]
    ratios: Vec<f32>,
    /// Cosines from which `ffn-skip` skips, instead of --ratios [default without a calibration file: 0.99,0.985,0.98,0.975]
    #[arg(long, value_name = "C,D,...", value_delimiter = ',')]
    thresholds: Vec<f32>,
    /// GGUF file of the same model to compare with, in full: another quantisation (repeatable)
    #[arg(long, value_name = "MODEL")]
    compare: Vec<String>,
    /// Tokens of a window
    #[arg(short = 'c', long = "ctx-size", value_name = "N", default_value_t = 512, value_parser = in_range(2, MAX_CONTEXT))]
    context: usize,
    /// Windows at most
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = in_range(1, usize::MAX))]
    windows: usize,
    /// Tokens of a window that run in full and are not scored
    #[arg(long, value_name = "N", default_value_t = 32)]
    warm: usize,
    /// Tokens decoded to time a row, in each of three rounds; 0: no timing
    #[arg(long, value_name = "N", default_value_t = 32)]
    decode: usize,
    /// Calibration file [default: MODEL.skip.gguf beside the model]
    #[arg(long, value_name = "S.skip.gguf")]
    skip_file: Option<PathBuf>,
    /// Format of the table
    #[arg(short, long, value_name = "FORMAT", value_enum, default_value_t = Format::Md)]
    output: Format,
    /// Draw the perplexity ratio against the weight bytes left unread
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    /// Draw the perplexity ratio against the measured speed-up
    #[arg(long, value_name = "FILE.svg")]
    plot_speed: Option<PathBuf>,
    /// Keep each row in this file, a line of JSON each, and start from those in it
    #[arg(long, value_name = "FILE.jsonl")]
    rows: Option<PathBuf>,
    /// Print no progress
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    engine: EngineArgs,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Format {
    Csv,
    Md,
    Json,
}

/// Rounds of timing: the median of three survives one disturbance.
const ROUNDS: usize = 3;

pub(super) fn run(args: &SweepArgs) -> Outcome {
    args.check()?;
    let text = read_text(&args.file)?;
    let mut engine = args.engine.load()?;
    check_context(&engine, args.context, args.engine.kv)?;
    let encode = EncodeOptions { add_special: true, parse_special: false };
    let tokens = engine.tokenizer().encode(&text, encode)?;
    let windows = args.windows.min(tokens.len() / args.context);
    let options = SweepOptions { context: args.context, windows, warm: args.warm, kv: args.engine.kv.into() };

    let others: Vec<(String, Engine)> =
        args.compare.iter().map(|m| args.other(m)).collect::<Result<_, _>>()?;
    let mut contenders = args.contenders(&mut engine)?;
    contenders.extend(others.iter().map(|(name, other)| Contender {
        model: name.clone(),
        policy: None,
        strength: String::new(),
        skip: Default::default(),
        other: Some(other),
    }));
    let mut rows = args.known_rows()?;
    contenders.retain(|contender| !rows.iter().any(|row| row.is_of(contender, &options)));

    let listener = Listener::new();
    if !contenders.is_empty() {
        let failed = |e| Failure::Error(format!("{}: {e}", args.file.display()));
        let mut sweep = Sweep::new(&engine, &tokens, options, contenders).map_err(failed)?;
        args.measure(&mut sweep, &mut rows, &listener)?;
    }
    put(&table(&rows, args.output)?)?;
    for (path, speed) in [(&args.plot, false), (&args.plot_speed, true)] {
        if let Some(path) = path {
            let written = fs::write(path, plot(&rows, speed)?);
            written.map_err(|e| Failure::Error(format!("{}: {e}", path.display())))?;
        }
    }
    if listener.raised() { Err(Failure::Interrupted) } else { Ok(()) }
}

impl SweepArgs {
    fn check(&self) -> Outcome {
        check_ratios(&self.ratios)?;
        if self.plot_speed.is_some() && self.decode == 0 {
            return Err(Failure::Usage("--plot-speed: --decode 0 times nothing".into()));
        }
        Ok(())
    }

    /// The policies at their strengths. Where none were named, those that lack a calibration are left out; a strength
    /// that a policy does not reach is, too.
    fn contenders<'e>(&self, engine: &mut Engine) -> Result<Vec<Contender<'e>>, Failure> {
        let named = !self.policies.is_empty();
        let mut contenders = Vec::new();
        for choice in contending(&self.policies) {
            for (ratio, threshold) in self.strengths(choice, engine) {
                let strength = match (ratio, threshold) {
                    (Some(ratio), _) => format!("ratio {ratio}"),
                    (_, Some(threshold)) => format!("threshold {threshold}"),
                    _ => String::new(),
                };
                match self.skip_args(choice, ratio, threshold).of_engine(engine) {
                    Ok(skip) => contenders.push(Contender {
                        model: file_name(engine.model().weights().path()),
                        policy: Some(choice.name()),
                        strength,
                        skip,
                        other: None,
                    }),
                    Err(Failure::Usage(why)) if !named || ratio.is_some() => {
                        note(&format!("left out: {} {strength}: {why}", choice.name()));
                    }
                    Err(failure) => return Err(failure),
                }
            }
        }
        match contenders.is_empty() && self.compare.is_empty() {
            true => Err(Failure::Usage("--policies: there is nothing to measure".into())),
            false => Ok(contenders),
        }
    }

    /// What to ask of a policy: a ratio or a threshold.
    fn strengths(&self, choice: SkipChoice, engine: &mut Engine) -> Vec<(Option<f32>, Option<f32>)> {
        // Loads the calibration, if there is one.
        let _ = self.skip_args(SkipMode::FfnSkip.into(), None, None).of_engine(engine);
        let thresholds = match (self.thresholds.is_empty(), engine.model().calibration()) {
            (true, None) => vec![0.99, 0.985, 0.98, 0.975],
            _ => self.thresholds.clone(),
        };
        match choice.mode {
            SkipMode::Auto | SkipMode::Off => vec![(None, None)],
            SkipMode::FfnSkip if !thresholds.is_empty() => {
                thresholds.iter().map(|&t| (None, Some(t))).collect()
            }
            _ => self.ratios.iter().map(|&percent| (Some(percent / 100.0), None)).collect(),
        }
    }

    fn skip_args(&self, skip: SkipChoice, ratio: Option<f32>, threshold: Option<f32>) -> SkipArgs {
        SkipArgs {
            skip,
            skip_file: self.skip_file.clone(),
            skip_ratio: ratio,
            skip_threshold: threshold,
            skip_warmup: Some(self.warm),
            ..SkipArgs::default()
        }
    }

    fn other(&self, model: &str) -> Result<(String, Engine), Failure> {
        let path = pull::resolve(Some(model))?;
        let engine = Engine::load(&path, self.engine.threads, self.engine.kernel.as_deref())?;
        Ok((file_name(&path), engine))
    }

    /// The rows of an earlier run.
    fn known_rows(&self) -> Result<Vec<Row>, Failure> {
        let Some(path) = self.rows.as_deref().filter(|path| path.exists()) else { return Ok(Vec::new()) };
        let lines = read_text(path)?;
        let row = |(i, line)| {
            serde_json::from_str(line)
                .map_err(|e| Failure::Error(format!("{}: line {}: {e}", path.display(), i + 1)))
        };
        lines.lines().enumerate().map(row).collect()
    }

    /// All windows, then all timings; rows are kept as soon as they are whole.
    fn measure(&self, sweep: &mut Sweep<'_>, rows: &mut Vec<Row>, listener: &Listener) -> Outcome {
        let rounds = if self.decode == 0 { 0 } else { ROUNDS };
        let steps = sweep.windows() * (sweep.len() + 1) + sweep.len() * rounds;
        let bar = progress_bar(steps, "sweep {wide_bar} {pos}/{len} steps, {eta} left, {msg}", self.quiet);
        bar.enable_steady_tick(Duration::from_millis(200));
        let mut step = || {
            bar.inc(1);
            !listener.raised()
        };
        let mut done = 0;
        for index in 0..sweep.windows() {
            bar.set_message(format!("window {} of {}", index + 1, sweep.windows()));
            if !sweep.window(index, &mut step)? {
                break;
            }
            done += 1;
        }
        if done == 0 {
            bar.finish_and_clear();
            return Err(Failure::Interrupted);
        }
        for i in 0..sweep.len() {
            if rounds > 0 && !listener.raised() {
                bar.set_message(format!("timing {} of {}", i + 1, sweep.len()));
                sweep.time(i, self.decode, rounds, &mut step)?;
            }
            let whole = done == sweep.windows() && !listener.raised();
            rows.push(self.keep(sweep.row(i, done), whole, &bar)?);
        }
        bar.finish_and_clear();
        Ok(())
    }

    fn keep(&self, row: Row, whole: bool, bar: &ProgressBar) -> Result<Row, Failure> {
        if let Some(path) = self.rows.as_ref().filter(|_| whole) {
            let line = serde_json::to_string(&row)? + "\n";
            let file = OpenOptions::new().create(true).append(true).open(path);
            let kept = file.and_then(|mut file| file.write_all(line.as_bytes()));
            kept.map_err(|e| Failure::Error(format!("{}: {e}", path.display())))?;
        }
        bar.suspend(|| {
            if !self.quiet {
                note(&format!(
                    "{} {}: perplexity x {:.3}, KL {:.4}",
                    row.policy, row.strength, row.ppl_ratio, row.kl
                ));
            }
        });
        Ok(row)
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}

const COLUMNS: [&str; 17] = [
    "pareto",
    "model",
    "policy",
    "strength",
    "blocks_%",
    "ffn_%",
    "read_%",
    "ppl",
    "ppl_x",
    "kl",
    "kl_p99",
    "same_top1_%",
    "t/s",
    "full_t/s",
    "speedup",
    "ideal",
    "tokens",
];

fn table(rows: &[Row], format: Format) -> Result<String, Failure> {
    let (mut text, front) = (String::new(), pareto(rows));
    if format == Format::Json {
        return Ok(serde_json::to_string_pretty(rows)? + "\n");
    }
    let mut line = |cells: &[String]| {
        let quoted = |cell: &String| match cell.contains([',', '"', '\n']) {
            true => format!("\"{}\"", cell.replace('"', "\"\"")),
            false => cell.clone(),
        };
        text.push_str(&match format {
            Format::Csv => cells.iter().map(quoted).collect::<Vec<_>>().join(","),
            _ => format!("| {} |", cells.join(" | ")),
        });
        text.push('\n');
    };
    line(&COLUMNS.map(String::from));
    if format == Format::Md {
        line(&COLUMNS.map(|_| "---".into()));
    }
    for (row, on_front) in rows.iter().zip(front) {
        line(&cells(row, on_front));
    }
    Ok(text)
}

fn cells(row: &Row, on_front: bool) -> [String; 17] {
    let percent = |share: f64| format!("{:.1}", 100.0 * share);
    let optional =
        |value: Option<f64>, digits: usize| value.map_or(String::new(), |v| format!("{v:.digits$}"));
    [
        if on_front { "*".into() } else { String::new() },
        row.model.clone(),
        row.policy.clone(),
        row.strength.clone(),
        percent(row.blocks),
        percent(row.ffn_bytes),
        percent(row.read),
        format!("{:.3}", row.ppl),
        format!("{:.4}", row.ppl_ratio),
        format!("{:.4}", row.kl),
        format!("{:.3}", row.kl_p99),
        percent(row.same_top1),
        optional(row.tokens_per_second, 2),
        optional(row.full_tokens_per_second, 2),
        optional(row.speedup, 3),
        format!("{:.3}", row.ideal()),
        row.tokens.to_string(),
    ]
}
