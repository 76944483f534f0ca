//! The command line: flags to options to a call of the library. Nothing is computed here.
//!
//! Results go to stdout, everything else to stderr. The exit code is 0 on success, 2 on bad usage, 130 after
//! Ctrl-C, and 1 on any other error, with one line `error: ...` that names the file, key, tensor or value. Whoever
//! closes the other end of stdout has seen enough: that ends a command quietly.

mod args;
mod bench;
mod calibrate;
mod chat;
mod eval;
mod generate;
mod info;
mod interrupt;
mod ppl;
mod pull;
mod run;
mod sweep;
mod tokenize;

use std::error::Error;
use std::io::{self, Read, Write};
use std::path::Path;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

const EXAMPLES: &str = "\
Examples:
  skiff run \"Why is the sky blue?\"            answer with the default model (pulled on first use)
  skiff run -m model.gguf --raw \"Once upon\"   complete a text
  skiff chat                                  talk to it
  skiff info                                  what this machine can do

-m takes the path of a GGUF file, OWNER/NAME/FILE.gguf of the hub, or the name of a pulled model.
SKIFF_CACHE sets where models are kept, SKIFF_KERNEL names the kernel to use.";

/// LLaMA inference on CPUs, with adaptive FFN skipping.
#[derive(Parser)]
#[command(name = "skiff", version, after_help = EXAMPLES, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Run(run::RunArgs),
    Chat(chat::ChatArgs),
    Info(info::InfoArgs),
    Pull(pull::PullArgs),
    Tokenize(tokenize::TokenizeArgs),
    Detokenize(tokenize::DetokenizeArgs),
    Ppl(ppl::PplArgs),
    Bench(bench::BenchArgs),
    Sweep(sweep::SweepArgs),
    Eval(eval::EvalArgs),
    Calibrate(calibrate::CalibrateArgs),
}

/// Runs the command that the process was started with.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are results and go to stdout, usage errors to stderr. Where that cannot be
            // written there is nobody to tell.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    interrupt::install();
    let outcome = match cli.command {
        Command::Run(args) => run::run(&args),
        Command::Chat(args) => chat::run(&args),
        Command::Info(args) => info::run(&args),
        Command::Pull(args) => pull::run(&args),
        Command::Tokenize(args) => tokenize::run(&args),
        Command::Detokenize(args) => tokenize::run_detokenize(&args),
        Command::Ppl(args) => ppl::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Sweep(args) => sweep::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Calibrate(args) => calibrate::run(&args),
    };
    match outcome {
        Ok(()) | Err(Failure::BrokenPipe) => ExitCode::SUCCESS,
        Err(Failure::Interrupted) => ExitCode::from(interrupt::EXIT_CODE),
        Err(Failure::Usage(message)) => report(&message, 2),
        Err(Failure::Error(message)) => report(&message, 1),
    }
}

fn report(message: &str, code: u8) -> ExitCode {
    // One line, whatever a library put into its message.
    let line = message.split_whitespace().collect::<Vec<_>>().join(" ");
    let _ = writeln!(io::stderr(), "error: {line}");
    ExitCode::from(code)
}

/// Why a command ends early.
enum Failure {
    /// Flags that cannot be.
    Usage(String),
    /// Anything else.
    Error(String),
    /// Ctrl-C.
    Interrupted,
    /// Nobody reads stdout any more.
    BrokenPipe,
}

type Outcome = Result<(), Failure>;

impl Failure {
    fn usage(error: impl ToString) -> Self {
        Self::Usage(error.to_string())
    }
}

impl<E: Error + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        let any: &(dyn Error + 'static) = &error;
        match any.downcast_ref::<io::Error>() {
            Some(io) if io.kind() == io::ErrorKind::BrokenPipe => Self::BrokenPipe,
            _ => Self::Error(error.to_string()),
        }
    }
}

/// Writes a result to stdout, now.
fn put(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// Writes a line of progress, statistics or warning to stderr; nobody reading it is no error.
fn note(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// The text of the file at `path`, or of stdin for `-`.
fn read_text(path: &Path) -> Result<String, Failure> {
    if path == Path::new("-") {
        return read_stdin();
    }
    let bytes = std::fs::read(path).map_err(|e| Failure::Error(format!("{}: {e}", path.display())))?;
    utf8(bytes, &path.display().to_string())
}

fn read_stdin() -> Result<String, Failure> {
    let mut bytes = Vec::new();
    io::stdin().lock().read_to_end(&mut bytes).map_err(|e| Failure::Error(format!("stdin: {e}")))?;
    utf8(bytes, "stdin")
}

fn utf8(bytes: Vec<u8>, name: &str) -> Result<String, Failure> {
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        Failure::Error(format!("{name}: not UTF-8 at byte {at}"))
    })
}

/// The value of a flag that takes a text or `@FILE`.
fn text_or_file(value: &str) -> Result<String, Failure> {
    match value.strip_prefix('@') {
        Some(path) => read_text(Path::new(path)),
        None => Ok(value.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_flags_do_not_contradict_each_other() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_shows_examples() {
        for command in Cli::command().get_subcommands() {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains(&format!("skiff {}", command.get_name())), "{}", command.get_name());
        }
    }

    #[test]
    fn a_broken_pipe_is_told_from_other_errors() {
        let pipe = io::Error::from(io::ErrorKind::BrokenPipe);
        assert!(matches!(Failure::from(pipe), Failure::BrokenPipe));
        let other = io::Error::from(io::ErrorKind::NotFound);
        assert!(matches!(Failure::from(other), Failure::Error(_)));
    }
}
