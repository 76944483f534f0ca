//! `skiff chat`: a conversation.

use std::fs;
use std::io::{self, BufRead, IsTerminal};
use std::path::PathBuf;

use clap::Args;
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

use super::args::{ContextArgs, DraftArgs, EngineArgs, SamplingArgs, SkipArgs};
use super::generate::{
    Ended, Shown, Statistics, TemplateArgs, encode_messages, evaluate_prompt, explain_full_context, stream,
};
use super::interrupt::Listener;
use super::{Failure, Outcome, note, put};
use crate::chat::{ChatError, ChatTemplate, Message};
use crate::pull::Store;
use crate::session::{End, Engine, Sampling, Session};

const EXAMPLES: &str = "\
Examples:
  skiff chat
  skiff chat -m model.gguf --system \"You are a pirate.\" --temp 0.7
  printf 'Hello\\nAnd again?\\n' | skiff chat --temp 0

A line that ends in a backslash goes on in the next one. /help lists the commands. Ctrl-C stops a reply, Ctrl-D leaves.";

const HELP: &str = "\
/help          this list
/clear         forget the conversation
/system TEXT   set how the model is to behave (and forget the conversation); without TEXT, unset it
/undo          forget the last question and its reply
/regen         reply to the last question again
/save FILE     write the conversation to FILE, as JSON
/stats         speed, skipping, room left
/quit          leave (so does Ctrl-D)
A line that ends in a backslash goes on in the next one. Ctrl-C stops a reply.";

const COMMANDS: [&str; 8] = ["help", "clear", "system", "undo", "regen", "save", "stats", "quit"];

/// Tokens kept free for a reply before old turns are forgotten.
const RESERVE: usize = 64;

/// Talk to a model
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct ChatArgs {
    #[command(flatten)]
    template: TemplateArgs,
    /// Tokens of a reply at most; -1: until the model ends or the context is full
    #[arg(short = 'n', long = "predict", alias = "n-predict", value_name = "N", default_value_t = -1, allow_negative_numbers = true, value_parser = clap::value_parser!(i64).range(-1..))]
    predict: i64,
    /// Print nothing on stderr but errors
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

pub(super) fn run(args: &ChatArgs) -> Outcome {
    args.sampling.check()?;
    let mut engine = args.engine.load()?;
    let template = args.template.template(&engine)?.ok_or(ChatError::NoTemplate)?;
    let options = args.context.options(&mut engine, args.engine.kv, &args.skip, &args.draft)?;
    let session = Session::new(&engine, options)?;
    let seed = args.sampling.sampler(&engine, None)?.seed();
    let messages = args.template.system_message().into_iter().collect();
    let mut chat = Chat {
        args,
        engine: &engine,
        template,
        session,
        messages,
        seed,
        turns: 0,
        ended: Ended::By(End::Length),
    };
    let mut lines = Lines::open()?;
    if lines.is_interactive() && !args.quiet {
        note("/help lists the commands, Ctrl-D leaves");
    }
    while let Some(line) = lines.next()? {
        match chat.line(line.trim()) {
            Ok(true) => {}
            Ok(false) => break,
            // A conversation survives what is wrong with one line of it.
            Err(Failure::Error(message)) if lines.is_interactive() => note(&format!("error: {message}")),
            Err(Failure::Interrupted) if lines.is_interactive() => {}
            Err(failure) => return Err(failure),
        }
    }
    lines.save();
    Ok(())
}

struct Chat<'a> {
    args: &'a ChatArgs,
    engine: &'a Engine,
    template: ChatTemplate,
    session: Session<'a>,
    messages: Vec<Message>,
    seed: u64,
    /// Replies so far, for a seed of each one's own.
    turns: u64,
    ended: Ended,
}

impl Chat<'_> {
    /// Does what a line says; false to leave.
    fn line(&mut self, line: &str) -> Result<bool, Failure> {
        match line.strip_prefix('/') {
            Some(command) => return self.command(command),
            None if line.is_empty() => {}
            None => {
                self.messages.push(Message::new("user", line));
                self.reply()?;
            }
        }
        Ok(true)
    }

    fn command(&mut self, line: &str) -> Result<bool, Failure> {
        let (name, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let rest = rest.trim();
        match name {
            "help" => note(HELP),
            "clear" => self.messages.retain(|m| m.role == "system"),
            "system" => {
                self.messages.clear();
                self.messages.extend((!rest.is_empty()).then(|| Message::new("system", rest)));
            }
            "undo" => self.undo(),
            "regen" => self.regenerate()?,
            "save" => self.save(rest),
            "stats" => {
                Statistics::of(&mut self.session, None, self.ended, self.args.skip.skip_report).print()
            }
            "quit" | "exit" => return Ok(false),
            _ => unknown(name),
        }
        Ok(true)
    }

    fn undo(&mut self) {
        match self.messages.iter().rposition(|m| m.role == "user") {
            Some(at) => self.messages.truncate(at),
            None => note("there is nothing to undo"),
        }
    }

    fn regenerate(&mut self) -> Outcome {
        let Some(at) = self.messages.iter().rposition(|m| m.role == "user") else {
            note("there is no question to reply to");
            return Ok(());
        };
        self.messages.truncate(at + 1);
        self.reply()
    }

    fn save(&self, path: &str) {
        if path.is_empty() {
            return note("/save FILE: which file?");
        }
        let json = serde_json::to_string_pretty(&self.messages).map_err(io::Error::from);
        match json.and_then(|json| fs::write(path, json + "\n")) {
            Ok(()) => note(&format!("saved {} messages to {path}", self.messages.len())),
            Err(error) => note(&format!("error: {path}: {error}")),
        }
    }

    /// Generates the assistant's message; without one, the question is forgotten too.
    fn reply(&mut self) -> Outcome {
        let listener = Listener::new();
        match self.generate(&listener) {
            Ok(text) => {
                self.messages.push(Message::new("assistant", text));
                explain_full_context(self.ended, self.session.context());
                if self.ended == Ended::CtrlC { Err(Failure::Interrupted) } else { Ok(()) }
            }
            Err(failure) => {
                self.messages.pop();
                Err(failure)
            }
        }
    }

    fn generate(&mut self, listener: &Listener) -> Result<String, Failure> {
        let tokens = self.fitting_tokens()?;
        let fresh = self.reuse_cache(&tokens);
        let shown = Shown { quiet: self.args.quiet, context_shift: self.args.context.context_shift };
        if evaluate_prompt(&mut self.session, &tokens[fresh..], &shown, listener)? {
            return Err(Failure::Interrupted);
        }
        let seed = self.seed.wrapping_add(self.turns);
        let mut sampler = self.args.sampling.sampler(self.engine, Some(seed))?;
        self.turns += 1;
        tokens.iter().for_each(|&id| sampler.accept(id));
        let mut constraint = self.args.sampling.constraint(self.engine)?;
        let sampling = Sampling {
            sampler: &mut sampler,
            constraint: constraint.as_mut(),
            stop: self.args.sampling.stop(),
            ignore_eos: self.args.sampling.ignore_eos(),
        };
        let max = usize::try_from(self.args.predict).unwrap_or(usize::MAX);
        let (text, ended) = stream(&mut self.session, sampling, max, listener)?;
        put("\n")?;
        self.ended = ended;
        Ok(text)
    }

    /// The conversation's tokens. While they leave no room for a reply, the oldest turn is forgotten.
    fn fitting_tokens(&mut self) -> Result<Vec<u32>, Failure> {
        let context = self.session.context();
        let reserve = RESERVE.min(context / 4);
        loop {
            let tokens = encode_messages(&self.template, &self.messages, self.engine.tokenizer())?;
            let questions = self.messages.iter().filter(|m| m.role == "user").count();
            if tokens.len() + reserve <= context || questions <= 1 {
                return Ok(tokens);
            }
            self.forget_oldest_turn();
            note("the context is full: the oldest turn was forgotten");
        }
    }

    fn forget_oldest_turn(&mut self) {
        let Some(first) = self.messages.iter().position(|m| m.role == "user") else { return };
        let next = self.messages.iter().skip(first + 1).position(|m| m.role == "user");
        let end = next.map_or(self.messages.len(), |n| first + 1 + n);
        self.messages.drain(first..end);
    }

    /// Keeps what the cache and `tokens` have in common; returns how many tokens that is.
    fn reuse_cache(&mut self, tokens: &[u32]) -> usize {
        let common = self.session.tokens().iter().zip(tokens).take_while(|(a, b)| a == b).count();
        // The last token is evaluated anew: its logits are what the reply starts from.
        let common = common.min(tokens.len().saturating_sub(1));
        self.session.truncate(common);
        common
    }
}

fn unknown(name: &str) {
    let near = COMMANDS.iter().filter(|c| c.starts_with(name.get(..1).unwrap_or("?")));
    let near: Vec<String> = near.map(|c| format!("/{c}")).collect();
    match near.is_empty() {
        true => note(&format!("there is no /{name}; /help lists the commands")),
        false => note(&format!("there is no /{name}; did you mean {}?", near.join(" or "))),
    }
}

/// Where lines come from: a terminal with editing and a history, or a pipe.
enum Lines {
    Terminal { editor: Box<DefaultEditor>, history: Option<PathBuf> },
    Pipe(io::Lines<io::StdinLock<'static>>),
}

impl Lines {
    fn open() -> Result<Self, Failure> {
        if !io::stdin().is_terminal() || !io::stdout().is_terminal() {
            return Ok(Self::Pipe(io::stdin().lock().lines()));
        }
        let mut editor = Box::new(DefaultEditor::new()?);
        let history = Store::from_env().ok().map(|store| store.cache.join("chat_history"));
        if let Some(path) = &history {
            // There is none the first time.
            let _ = editor.load_history(path);
        }
        Ok(Self::Terminal { editor, history })
    }

    fn is_interactive(&self) -> bool {
        matches!(self, Self::Terminal { .. })
    }

    /// The next line, with those that a backslash joins to it; `None` at the end.
    fn next(&mut self) -> Result<Option<String>, Failure> {
        let mut whole = String::new();
        loop {
            let Some(line) = self.physical_line(if whole.is_empty() { "> " } else { ". " })? else {
                return Ok((!whole.is_empty()).then_some(whole));
            };
            match line.strip_suffix('\\') {
                Some(part) => whole.push_str(&format!("{part}\n")),
                None => {
                    whole.push_str(&line);
                    self.remember(&whole);
                    return Ok(Some(whole));
                }
            }
        }
    }

    fn physical_line(&mut self, prompt: &str) -> Result<Option<String>, Failure> {
        match self {
            Self::Terminal { editor, .. } => loop {
                match editor.readline(prompt) {
                    Ok(line) => return Ok(Some(line)),
                    Err(ReadlineError::Interrupted) => note("(Ctrl-D leaves)"),
                    Err(ReadlineError::Eof) => return Ok(None),
                    Err(error) => return Err(error.into()),
                }
            },
            Self::Pipe(lines) => {
                Ok(lines.next().transpose().map_err(|e| Failure::Error(format!("stdin: {e}")))?)
            }
        }
    }

    fn remember(&mut self, line: &str) {
        if let Self::Terminal { editor, .. } = self {
            // Only the convenience of the next prompt depends on it.
            let _ = editor.add_history_entry(line);
        }
    }

    fn save(&mut self) {
        if let Self::Terminal { editor, history: Some(path) } = self {
            let created = path.parent().map(fs::create_dir_all).transpose();
            if let Err(error) = created.map_err(ReadlineError::from).and_then(|_| editor.save_history(path)) {
                note(&format!("warning: {}: {error}", path.display()));
            }
        }
    }
}
