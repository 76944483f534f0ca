//! `skiff ppl`: perplexity of a text.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use serde::Serialize;

use super::args::{EngineArgs, MAX_CONTEXT, SkipArgs, check_context, in_range};
use super::generate::{progress_bar, rate};
use super::interrupt::Listener;
use super::{Failure, Outcome, put, read_text};
use crate::eval::{PerplexityOptions, PerplexityReport, perplexity};
use crate::session::Engine;
use crate::tokenizer::EncodeOptions;

const EXAMPLES: &str = "\
Examples:
  skiff ppl -f wiki.txt
  skiff ppl -f wiki.txt --chunks 20 --skip ffn-skip --skip-threshold 0.985 --kl --json
  skiff ppl -f wiki.txt --chunks 1 --logits-out logits.npy

The text is tokenised as `skiff tokenize -f FILE` does and cut into windows of -c tokens; what is left over at the end
is not used. Each window starts from nothing, and the tokens after its first --warm are scored. --kl runs the full
model too. Ctrl-C reports the windows done, with exit code 130.";

/// Measure the perplexity of a text, and how far skipping is from the full model
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct PplArgs {
    /// The text (- is stdin)
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,
    /// Tokens of a window
    #[arg(short = 'c', long = "ctx-size", value_name = "N", default_value_t = 512, value_parser = in_range(2, MAX_CONTEXT))]
    context: usize,
    /// Windows at most [default: as many as the text has]
    #[arg(long, value_name = "N", value_parser = in_range(1, usize::MAX))]
    chunks: Option<usize>,
    /// First position of a window that is scored [default: half of -c]
    #[arg(long, value_name = "N")]
    warm: Option<usize>,
    /// Compare with the full model: KL(full || skipped) and how often the most likely token is the same
    #[arg(long)]
    kl: bool,
    /// Write the logits of every position, float32 [tokens, vocab]
    #[arg(long, value_name = "FILE.npy")]
    logits_out: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Print no progress
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    skip: SkipArgs,
}

/// The report with what it was measured on.
#[derive(Serialize)]
struct Output<'a> {
    #[serde(flatten)]
    report: &'a PerplexityReport,
    context: usize,
    warm: usize,
    chunks: usize,
    kernel: &'static str,
    threads: usize,
    seconds: f64,
}

pub(super) fn run(args: &PplArgs) -> Outcome {
    let text = read_text(&args.file)?;
    let mut engine = args.engine.load()?;
    check_context(&engine, args.context, args.engine.kv)?;
    let options = args.options(&mut engine)?;
    let encode = EncodeOptions { add_special: true, parse_special: false };
    let tokens = engine.tokenizer().encode(&text, encode)?;

    let listener = Listener::new();
    let template = "ppl {wide_bar} {pos}/{len} windows, {eta} left, perplexity {msg}";
    let windows = (tokens.len() / args.context).min(args.chunks.unwrap_or(usize::MAX));
    let bar = progress_bar(windows, template, args.quiet);
    bar.enable_steady_tick(Duration::from_millis(200));
    let (mut done, started) = (0, Instant::now());
    let report = perplexity(&engine, &tokens, &options, |windows, _, so_far| {
        done = windows;
        bar.set_position(windows as u64);
        bar.set_message(format!("{so_far:.4}"));
        !listener.raised()
    })
    .map_err(|e| Failure::Error(format!("{}: {e}", args.file.display())))?;
    bar.finish_and_clear();

    let output = Output {
        report: &report,
        context: args.context,
        warm: args.warm.unwrap_or(args.context / 2),
        chunks: done,
        kernel: engine.kernels().name(),
        threads: engine.team().threads(),
        seconds: started.elapsed().as_secs_f64(),
    };
    match args.json {
        true => put(&format!("{}\n", serde_json::to_string(&output)?))?,
        false => put(&table(&output, args))?,
    }
    if listener.raised() { Err(Failure::Interrupted) } else { Ok(()) }
}

impl PplArgs {
    fn options(&self, engine: &mut Engine) -> Result<PerplexityOptions, Failure> {
        Ok(PerplexityOptions {
            context: self.context,
            chunks: self.chunks,
            warm: self.warm,
            kv: self.engine.kv.into(),
            skip: self.skip.of_engine(engine)?,
            kl: self.kl,
            logits_out: self.logits_out.clone(),
        })
    }
}

fn table(output: &Output<'_>, args: &PplArgs) -> String {
    let r = output.report;
    let mut rows = vec![
        ("perplexity", format!("{:.4} +- {:.4}", r.ppl, r.ppl * r.nll_error)),
        ("nll", format!("{:.5} +- {:.5} nats a token", r.nll, r.nll_error)),
        ("tokens scored", format!("{} of {} windows of {}", r.tokens, output.chunks, output.context)),
        ("FFNs skipped", format!("{:.2} %", 100.0 * r.ffn_skipped)),
        ("FFN bytes skipped", format!("{:.2} %", 100.0 * r.ffn_bytes_skipped)),
    ];
    if r.output_bytes_skipped != 0.0 {
        rows.push((
            "output skipped",
            format!("{:.2} % of the matrix's bytes", 100.0 * r.output_bytes_skipped),
        ));
    }
    let mut optional = |name, value: Option<f64>, show: fn(f64) -> String| {
        rows.extend(value.map(|value| (name, show(value))));
    };
    optional("full model", r.ppl_full, |v| format!("{v:.4} perplexity"));
    optional("KL mean", r.kl_mean, |v| format!("{v:.5} nats"));
    optional("KL 99 %", r.kl_p99, |v| format!("{v:.5} nats"));
    optional("same top 1", r.same_top1, |v| format!("{:.2} %", 100.0 * v));
    let speed = rate(output.chunks * output.context, Duration::from_secs_f64(output.seconds));
    rows.push(("speed", format!("{speed:.1} tokens/s ({}, {} threads)", output.kernel, output.threads)));
    let mut text: String = rows.iter().map(|(name, value)| format!("{name:<18} {value}\n")).collect();
    if args.skip.skip_report {
        text.push_str("layer  skipped  mean cosine\n");
        for (layer, (share, cosine)) in r.skipped_by_layer.iter().zip(&r.cosine_by_layer).enumerate() {
            let cosine = cosine.map_or("-".into(), |c| format!("{c:.4}"));
            text.push_str(&format!("{layer:>5} {:>6.1} %  {cosine:>11}\n", 100.0 * share));
        }
    }
    text
}
