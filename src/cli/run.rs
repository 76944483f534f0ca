//! `skiff run`: a prompt in, text out.

use std::io::{self, IsTerminal};
use std::path::PathBuf;

use clap::Args;

use super::args::{ContextArgs, DraftArgs, EngineArgs, SamplingArgs, SkipArgs};
use super::generate::{
    Ended, Shown, Statistics, TemplateArgs, encode_messages, evaluate_prompt, explain_full_context, stream,
};
use super::interrupt::Listener;
use super::{Failure, Outcome, put, read_stdin, read_text};
use crate::chat::Message;
use crate::session::{Engine, Sampling, Session};
use crate::tokenizer::EncodeOptions;

const EXAMPLES: &str = "\
Examples:
  skiff run \"Why is the sky blue?\"
  skiff run -f notes.txt -n 200 --temp 0
  echo \"Translate to French: cheese\" | skiff run --system \"Answer with one word.\"
  skiff run --raw -n 50 \"Once upon a time\"
  skiff run --json-schema @person.json \"Invent a person.\"
  skiff run --draft lookup -f article.txt --system \"Quote the sentences about prices.\"
  skiff run --skip ffn-skip --skip-threshold 0.985 --skip-report \"Tell me a story.\"

Stdout gets the generated text and nothing else. --temp 0 gives the same text every time and with any number of
threads. After Ctrl-C the text so far remains and the exit code is 130.";

/// Answer a prompt, or with --raw complete a text
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct RunArgs {
    /// What to answer or complete [default: stdin]
    #[arg(value_name = "PROMPT", conflicts_with = "file")]
    prompt: Option<String>,
    /// Read the prompt from a file (- is stdin)
    #[arg(short, long, value_name = "FILE", help_heading = "Prompt")]
    file: Option<PathBuf>,
    /// Tokens to generate at most; -1: until the model ends or the context is full
    #[arg(short = 'n', long = "predict", alias = "n-predict", value_name = "N", default_value_t = -1, allow_negative_numbers = true, value_parser = clap::value_parser!(i64).range(-1..))]
    predict: i64,
    /// Complete the prompt as it is, without a chat template
    #[arg(long, help_heading = "Prompt", conflicts_with_all = ["system", "chat_template"])]
    raw: bool,
    #[command(flatten)]
    template: TemplateArgs,
    /// Print the statistics as one line of JSON (on stderr)
    #[arg(long)]
    stats_json: bool,
    /// Print no progress and no statistics
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    context: ContextArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    skip: SkipArgs,
    #[command(flatten)]
    draft: DraftArgs,
}

pub(super) fn run(args: &RunArgs) -> Outcome {
    args.sampling.check()?;
    let prompt = args.prompt_text()?;
    let mut engine = args.engine.load()?;
    let options = args.context.options(&mut engine, args.engine.kv, &args.skip, &args.draft)?;
    let mut sampler = args.sampling.sampler(&engine, None)?;
    let mut constraint = args.sampling.constraint(&engine)?;
    let tokens = args.tokens(&engine, &prompt)?;
    let mut session = Session::new(&engine, options)?;

    let listener = Listener::new();
    let shown = Shown { quiet: args.quiet, context_shift: args.context.context_shift };
    let mut ended = Ended::CtrlC;
    if !evaluate_prompt(&mut session, &tokens, &shown, &listener)? {
        tokens.iter().for_each(|&id| sampler.accept(id));
        let sampling = Sampling {
            sampler: &mut sampler,
            constraint: constraint.as_mut(),
            stop: args.sampling.stop(),
            ignore_eos: args.sampling.ignore_eos(),
        };
        let max = usize::try_from(args.predict).unwrap_or(usize::MAX);
        let (text, why) = stream(&mut session, sampling, max, &listener)?;
        ended = why;
        if !text.ends_with('\n') && (io::stdout().is_terminal() || ended == Ended::CtrlC) {
            put("\n")?;
        }
    }
    if !args.quiet || args.stats_json {
        let statistics = Statistics::of(&mut session, Some(sampler.seed()), ended, args.skip.skip_report);
        args.print(&statistics, ended, session.context())?;
    }
    if ended == Ended::CtrlC { Err(Failure::Interrupted) } else { Ok(()) }
}

impl RunArgs {
    fn prompt_text(&self) -> Result<String, Failure> {
        match (&self.prompt, &self.file) {
            (Some(prompt), _) => Ok(prompt.clone()),
            (None, Some(path)) => read_text(path),
            (None, None) if io::stdin().is_terminal() => {
                Err(Failure::Usage("no prompt: give one as argument, with -f FILE, or on stdin".into()))
            }
            (None, None) => read_stdin(),
        }
    }

    fn tokens(&self, engine: &Engine, prompt: &str) -> Result<Vec<u32>, Failure> {
        let template = if self.raw { None } else { self.template.template(engine)? };
        match template {
            Some(template) => {
                let user = Message::new("user", prompt);
                let messages: Vec<_> = self.template.system_message().into_iter().chain([user]).collect();
                encode_messages(&template, &messages, engine.tokenizer())
            }
            None if self.template.system.is_some() => Err(Failure::Usage(
                "--system: the model has no chat template; name one with --chat-template".into(),
            )),
            None => {
                let options = EncodeOptions { add_special: true, parse_special: false };
                Ok(engine.tokenizer().encode(prompt, options)?)
            }
        }
    }

    fn print(&self, statistics: &Statistics, ended: Ended, context: usize) -> Outcome {
        if self.stats_json {
            return statistics.print_json();
        }
        statistics.print();
        explain_full_context(ended, context);
        Ok(())
    }
}
