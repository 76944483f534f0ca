//! The command line: flags to options to a call of the library. A report goes to stdout, progress and warnings to
//! stderr. The exit code is 0 on success, 2 on bad usage, 130 after Ctrl-C, and 1 on any other error, with one line
//! `error: ...` that names the file, key, tensor or value.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use crate::ConvertError;
use crate::progress;
use crate::recipe::Mix;
use crate::synth::{self, Shape, SynthOptions};

const EXAMPLES: &str = "\
Examples:
  skiff-convert synth llama2-7b Q4_0 random-7b.gguf";

/// Makes GGUF files: from Hugging Face checkpoints, by quantising others, or of random weights.
#[derive(Parser)]
#[command(name = "skiff-convert", version, after_help = EXAMPLES, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Print no progress
    #[arg(short, long, global = true)]
    quiet: bool,
    /// Threads [default: as many as there are cores]
    #[arg(short, long, value_name = "N", global = true, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
}

#[derive(Subcommand)]
enum Command {
    Synth(SynthArgs),
}

/// Write a model of random weights in the shape of a real one
#[derive(Args)]
struct SynthArgs {
    /// llama2-7b, llama2-13b, llama2-70b, tinyllama, or layers=N,embedding=N,ffn=N,heads=N,kv-heads=N,vocab=N,context=N
    shape: String,
    /// Type or mix of the matrices (Q4_0, Q4_K_M, F16, ...)
    #[arg(value_name = "TYPE", value_parser = mix)]
    mix: Mix,
    /// The file to write
    out: PathBuf,
    /// Take the vocabulary of this GGUF file [default: a made-up one of bytes]
    #[arg(long, value_name = "FILE")]
    vocab: Option<PathBuf>,
    /// Seed of the random numbers
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
}

fn mix(name: &str) -> Result<Mix, String> {
    Mix::from_name(name).map_err(|e| e.to_string())
}

/// Runs the command that the process was started with.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are results and go to stdout, usage errors to stderr. Where that cannot be written
            // there is nobody to tell.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    progress::catch_interrupts();
    if let Some(threads) = cli.threads {
        // Fails only if the pool exists already, which it does not.
        let _ = rayon::ThreadPoolBuilder::new().num_threads(threads.into()).build_global();
    }
    let outcome = match &cli.command {
        Command::Synth(args) => run_synth(args, cli.quiet),
    };
    match outcome {
        Ok(report) => {
            // Whoever closed stdout has seen enough.
            let _ = io::stdout().lock().write_all(report.as_bytes());
            ExitCode::SUCCESS
        }
        Err(ConvertError::Interrupted) => ExitCode::from(130),
        Err(error) => {
            // One line, whatever a library put into its message.
            let line = error.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
            let _ = writeln!(io::stderr(), "error: {line}");
            let usage = matches!(error, ConvertError::Shape { .. } | ConvertError::UnknownMix { .. });
            ExitCode::from(if usage { 2 } else { 1 })
        }
    }
}

fn run_synth(args: &SynthArgs, quiet: bool) -> Result<String, ConvertError> {
    let started = std::time::Instant::now();
    let options = SynthOptions {
        shape: Shape::parse(&args.shape)?,
        name: &args.shape,
        mix: args.mix,
        vocab: args.vocab.as_deref(),
        seed: args.seed,
        quiet,
    };
    let bytes = synth::synth(&options, &args.out)?;
    Ok(format!("{}: {} {}, {}\n", args.out.display(), args.shape, args.mix.name(), amount(bytes, started.elapsed())))
}

/// `3.8 GB in 12.3 s, 311 MB/s`
fn amount(bytes: u64, time: Duration) -> String {
    let rate = bytes as f64 / 1e6 / time.as_secs_f64().max(1e-9);
    format!("{:.2} GB in {:.1} s, {rate:.0} MB/s", bytes as f64 / 1e9, time.as_secs_f64())
}
