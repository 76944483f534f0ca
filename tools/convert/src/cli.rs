//! The command line: flags to options to a call of the library. A report goes to stdout, progress and warnings to
//! stderr. The exit code is 0 on success, 2 on bad usage, 130 after Ctrl-C, and 1 on any other error, with one line
//! `error: ...` that names the file, key, tensor or value.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use regex::Regex;
use skiff::gguf::GgmlType;

use crate::ConvertError;
use crate::hf::{self, HfOptions};
use crate::imatrix::{self, ComputeOptions, Imatrix};
use crate::progress;
use crate::quantize::{self, Report};
use crate::recipe::{Mix, Recipe};
use crate::shards::{self, Cut};
use crate::synth::{self, Shape, SynthOptions};
use crate::verify;

const EXAMPLES: &str = "\
Examples:
  skiff-convert hf CHECKPOINT -o model-f16.gguf
  skiff-convert quantize model-f16.gguf model-q4.gguf Q4_K_M
  skiff-convert imatrix model-f16.gguf -f text.txt -o model.imatrix
  skiff-convert quantize model-f16.gguf model-q3.gguf Q3_K_M --imatrix model.imatrix
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
    Hf(HfArgs),
    Quantize(QuantizeArgs),
    Imatrix(ImatrixArgs),
    Split(SplitArgs),
    Merge(MergeArgs),
    Verify(VerifyArgs),
    Synth(SynthArgs),
}

/// What every matrix becomes.
#[derive(Args)]
struct RecipeArgs {
    /// Importance matrix of the model (of the imatrix command, or of llama.cpp)
    #[arg(long, value_name = "FILE")]
    imatrix: Option<PathBuf>,
    /// Type of the tensors whose name the regular expression matches (repeatable; the first match counts)
    #[arg(long, value_name = "REGEX=TYPE", value_parser = tensor_type)]
    tensor_type: Vec<(Regex, GgmlType)>,
    /// Give all matrices the same type
    #[arg(long)]
    pure: bool,
    /// Type of the output matrix
    #[arg(long, value_name = "TYPE", value_parser = ggml_type)]
    output_tensor_type: Option<GgmlType>,
    /// Type of the token embedding
    #[arg(long, value_name = "TYPE", value_parser = ggml_type)]
    token_embedding_type: Option<GgmlType>,
}

impl RecipeArgs {
    fn recipe(&self, mix: Mix) -> Recipe {
        Recipe {
            mix,
            pure: self.pure,
            output: self.output_tensor_type,
            embedding: self.token_embedding_type,
            overrides: self.tensor_type.clone(),
            has_imatrix: self.imatrix.is_some(),
        }
    }

    fn imatrix(&self) -> Result<Option<Imatrix>, ConvertError> {
        self.imatrix.as_deref().map(Imatrix::read).transpose()
    }
}

/// Convert a Hugging Face checkpoint
#[derive(Args)]
struct HfArgs {
    /// Directory with config.json, safetensors and tokenizer files
    dir: PathBuf,
    /// The file to write
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
    /// Type or mix: F32, F16, BF16, Q8_0, Q4_K_M, ...
    #[arg(long, value_name = "TYPE", default_value = "F16", value_parser = mix)]
    outtype: Mix,
    /// Name of the pre-tokenizer (llama-bpe, qwen2, ...) [default: told from tokenizer.json]
    #[arg(long, value_name = "NAME")]
    pre: Option<String>,
    #[command(flatten)]
    recipe: RecipeArgs,
}

/// Write a GGUF model in other types
#[derive(Args)]
struct QuantizeArgs {
    /// The model (the first file of a split one)
    input: PathBuf,
    /// The file to write
    out: PathBuf,
    /// Type or mix: F32, F16, BF16, Q8_0, Q4_0, Q4_K_M, IQ4_XS, ...
    #[arg(value_name = "TYPE", value_parser = mix)]
    mix: Mix,
    #[command(flatten)]
    recipe: RecipeArgs,
}

/// Measure which inputs of each matrix are large on a text
#[derive(Args)]
struct ImatrixArgs {
    /// The model
    model: PathBuf,
    /// The text
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,
    /// The file to write
    #[arg(short, long, value_name = "FILE", default_value = "imatrix.gguf")]
    out: PathBuf,
    /// Tokens of a window
    #[arg(short = 'c', long = "ctx-size", value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(2..=1 << 20))]
    context: u32,
    /// Windows at most [default: as many as the text has]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    chunks: Option<u32>,
}

/// Cut a model into several files
#[derive(Args)]
struct SplitArgs {
    /// The model
    input: PathBuf,
    /// The files are called PREFIX-00001-of-0000N.gguf
    prefix: PathBuf,
    /// Tensors of a file at most
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..), conflicts_with = "max_size")]
    max_tensors: u32,
    /// Bytes of a file's tensors at most: 300M, 4G
    #[arg(long, value_name = "SIZE", value_parser = size)]
    max_size: Option<u64>,
}

/// Join the files of a split model
#[derive(Args)]
struct MergeArgs {
    /// The first file
    input: PathBuf,
    /// The file to write
    out: PathBuf,
}

/// Check structure and extents, that all values are finite, and print checksums
#[derive(Args)]
struct VerifyArgs {
    /// The model (the first file of a split one)
    input: PathBuf,
    /// Print the SHA-256 of every tensor's data
    #[arg(long)]
    sums: bool,
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

/// A number with `M` or `G` (powers of ten, as llama.cpp has it) behind it.
fn size(text: &str) -> Result<u64, String> {
    let (digits, unit) = match text.strip_suffix(['M', 'm']) {
        Some(digits) => (digits, 1_000_000),
        None => {
            (text.strip_suffix(['G', 'g']).ok_or("expected a number with M or G behind it")?, 1_000_000_000)
        }
    };
    let n = digits.parse::<u64>().ok().filter(|&n| n > 0).and_then(|n| n.checked_mul(unit));
    n.ok_or_else(|| "expected a number with M or G behind it".to_owned())
}

fn ggml_type(name: &str) -> Result<GgmlType, String> {
    let known = || GgmlType::all().map(GgmlType::name).collect::<Vec<_>>().join(", ");
    GgmlType::from_name(name).ok_or_else(|| format!("unknown type; known are {}", known()))
}

fn tensor_type(text: &str) -> Result<(Regex, GgmlType), String> {
    // A regular expression may have a `=` of its own, a type has none.
    let (regex, ty) = text.rsplit_once('=').ok_or("expected REGEX=TYPE")?;
    Ok((Regex::new(regex).map_err(|e| e.to_string())?, ggml_type(ty)?))
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
        Command::Hf(args) => run_hf(args, cli.quiet),
        Command::Split(args) => run_split(args, cli.quiet),
        Command::Merge(args) => run_merge(args, cli.quiet),
        Command::Verify(args) => run_verify(args, cli.quiet),
        Command::Quantize(args) => run_quantize(args, cli.quiet),
        Command::Imatrix(args) => run_imatrix(args, cli.threads, cli.quiet),
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

fn run_hf(args: &HfArgs, quiet: bool) -> Result<String, ConvertError> {
    let imatrix = args.recipe.imatrix()?;
    let (recipe, pre) = (args.recipe.recipe(args.outtype), args.pre.as_deref());
    let report =
        hf::convert(&args.dir, &args.out, &HfOptions { recipe, imatrix: imatrix.as_ref(), pre, quiet })?;
    Ok(types_report(&args.out, args.outtype, &report))
}

fn run_split(args: &SplitArgs, quiet: bool) -> Result<String, ConvertError> {
    let cut = args.max_size.map_or(Cut::Tensors(args.max_tensors as usize), Cut::Bytes);
    let paths = shards::split(&args.input, &args.prefix, cut, quiet)?;
    Ok(paths.iter().map(|path| format!("{}\n", path.display())).collect())
}

fn run_merge(args: &MergeArgs, quiet: bool) -> Result<String, ConvertError> {
    let files = shards::merge(&args.input, &args.out, quiet)?;
    Ok(format!("{}: of {files} files\n", args.out.display()))
}

fn run_verify(args: &VerifyArgs, quiet: bool) -> Result<String, ConvertError> {
    let report = verify::verify(&args.input, quiet)?;
    let mut text = String::new();
    if args.sums {
        report.tensors.iter().for_each(|t| text += &format!("{}  {}\n", t.sha256, t.name));
    }
    for t in report.bad() {
        let (row, column) = t.first.unwrap_or_default();
        let (name, ty, n) = (&t.name, t.ty, t.not_finite);
        text +=
            &format!("{name} ({ty}): {n} values are NaN or infinite, first in row {row}, column {column}\n");
    }
    let (tensors, bad) = (report.tensors.len(), report.bad().count());
    if bad > 0 {
        let _ = io::stdout().lock().write_all(text.as_bytes());
        return Err(ConvertError::NotFinite { path: args.input.clone(), found: bad, tensors });
    }
    let gigabytes = report.bytes as f64 / 1e9;
    Ok(format!(
        "{text}{}: ok, {tensors} tensors, {gigabytes:.2} GB, files {}\n",
        args.input.display(),
        report.files
    ))
}

fn run_quantize(args: &QuantizeArgs, quiet: bool) -> Result<String, ConvertError> {
    let imatrix = args.recipe.imatrix()?;
    let recipe = args.recipe.recipe(args.mix);
    let report = quantize::quantize(&args.input, &args.out, &recipe, imatrix.as_ref(), quiet)?;
    Ok(types_report(&args.out, args.mix, &report))
}

fn types_report(out: &Path, mix: Mix, report: &Report) -> String {
    let mut text = format!("{}: {}\n", out.display(), mix.name());
    for (ty, tensors, bytes) in &report.types {
        text += &format!("  {:<7} {tensors:>5} tensors {:>10.1} MB\n", ty.name(), *bytes as f64 / 1e6);
    }
    let bits = report.bytes_out as f64 * 8.0 / report.elements.max(1) as f64;
    text += &format!("  read {}\n", amount(report.bytes_in, report.time));
    text += &format!("  wrote {:.2} GB, {bits:.2} bits a weight\n", report.bytes_out as f64 / 1e9);
    if !report.without_importance.is_empty() {
        text += &format!("  not in the importance matrix: {}\n", report.without_importance.join(", "));
    }
    text
}

fn run_imatrix(args: &ImatrixArgs, threads: Option<u16>, quiet: bool) -> Result<String, ConvertError> {
    let options = ComputeOptions {
        model: &args.model,
        text: &args.file,
        window: args.context as usize,
        chunks: args.chunks.map(|n| n as usize),
        threads: threads.map(usize::from),
        quiet,
    };
    let (chunks, matrices) = imatrix::compute(&options, &args.out)?;
    Ok(format!("{}: {matrices} matrices, {chunks} windows of {} tokens\n", args.out.display(), args.context))
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
    Ok(format!(
        "{}: {} {}, {}\n",
        args.out.display(),
        args.shape,
        args.mix.name(),
        amount(bytes, started.elapsed())
    ))
}

/// `3.8 GB in 12.3 s, 311 MB/s`
fn amount(bytes: u64, time: Duration) -> String {
    let rate = bytes as f64 / 1e6 / time.as_secs_f64().max(1e-9);
    format!("{:.2} GB in {:.1} s, {rate:.0} MB/s", bytes as f64 / 1e9, time.as_secs_f64())
}
