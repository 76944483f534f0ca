//! Messages to prompt text, by the model's chat template.
//!
//! Text from a user never becomes control tokens: [`Prompt::encode`] recognises only those that the template itself
//! wrote (see the `guard` module).
#![forbid(unsafe_code)]

mod guard;
mod jinja;
mod templates;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;

use minijinja::{Value, context};

use crate::gguf::{self, Metadata};
use crate::tokenizer::{Tokenizer, TokenizerError};

/// The most bytes that a rendering may produce beyond four times its input.
const MAX_EXTRA_OUTPUT: usize = 1 << 20;

/// Templates above this size are refused; the largest known ones have 20 KB.
const MAX_SOURCE_BYTES: usize = 1 << 20;

/// Roles that are not guarded, since templates compare them.
const KNOWN_ROLES: [&str; 7] = ["system", "user", "assistant", "tool", "developer", "function", "model"];

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

impl Message {
    /// A message.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// Why messages could not be made into a prompt.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)] // the fields are named for what the message prints
pub enum ChatError {
    #[error(transparent)]
    Metadata(#[from] gguf::Error),
    #[error("the model has no chat template: name one of {}", ChatTemplate::names().join(", "))]
    NoTemplate,
    #[error("there is no chat template {name:?}: did you mean {suggestion:?}?")]
    UnknownTemplate { name: String, suggestion: &'static str },
    #[error("the chat template has {bytes} bytes (at most {max})")]
    TemplateTooLarge { bytes: usize, max: usize },
    #[error("chat template: {message}")]
    Template { message: String },
    #[error("the chat template ran for too long")]
    OutOfFuel,
    #[error("the chat template wrote more than {max} bytes")]
    OutputTooLarge { max: usize },
    #[error("the chat template refuses these messages: {message}")]
    Refused { message: String },
    #[error("the messages use every noncharacter of Unicode")]
    NoGuard,
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
}

/// How a model wants a conversation to be written.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    source: Arc<str>,
}

impl ChatTemplate {
    /// The template that the model's file carries.
    pub fn from_gguf(metadata: &Metadata) -> Result<Self, ChatError> {
        Self::from_source(metadata.opt_str("tokenizer.chat_template")?.ok_or(ChatError::NoTemplate)?)
    }

    /// A well-known template.
    pub fn named(name: &str) -> Result<Self, ChatError> {
        let wanted = name.to_ascii_lowercase();
        match templates::TEMPLATES.iter().find(|(names, _)| names.contains(&wanted.as_str())) {
            Some((_, source)) => Self::from_source(source),
            None => Err(ChatError::UnknownTemplate { name: name.to_owned(), suggestion: nearest(&wanted) }),
        }
    }

    /// The names that [`named`](Self::named) knows.
    pub fn names() -> Vec<&'static str> {
        templates::TEMPLATES.iter().flat_map(|(names, _)| names.iter().copied()).collect()
    }

    /// A template from its Jinja source.
    pub fn from_source(source: &str) -> Result<Self, ChatError> {
        if source.len() > MAX_SOURCE_BYTES {
            return Err(ChatError::TemplateTooLarge { bytes: source.len(), max: MAX_SOURCE_BYTES });
        }
        jinja::environment(0).and_then(|env| env.template_from_str(source).map(drop)).map_err(chat_error)?;
        Ok(Self { source: source.into() })
    }

    /// The Jinja source.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Writes a conversation as the template wants it; with `add_generation_prompt` it ends where the assistant
    /// is to speak.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        bos_text: &str,
        eos_text: &str,
    ) -> Result<Prompt, ChatError> {
        let mut prompt = Prompt {
            template: self.clone(),
            messages: messages.to_vec(),
            add_generation_prompt,
            bos: bos_text.to_owned(),
            eos: eos_text.to_owned(),
            text: String::new(),
        };
        prompt.text = prompt.write(&prompt.messages)?;
        Ok(prompt)
    }
}

/// A conversation, written out.
#[derive(Clone, Debug)]
pub struct Prompt {
    template: ChatTemplate,
    messages: Vec<Message>,
    add_generation_prompt: bool,
    bos: String,
    eos: String,
    text: String,
}

impl Prompt {
    /// The text, for people to read. For a model use [`encode`](Self::encode): tokenising this text would take what
    /// users spelled for control tokens.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The token ids. Control tokens are those of the template alone, and begin of text comes once.
    ///
    /// The template runs again here, over guarded messages: which characters need a guard is up to the vocabulary.
    pub fn encode(&self, tokenizer: &Tokenizer) -> Result<Vec<u32>, ChatError> {
        let controls = tokenizer.control_texts();
        let contents = self.messages.iter().flat_map(|m| [m.role.as_str(), m.content.as_str()]);
        let fixed = [self.template.source(), self.bos.as_str(), self.eos.as_str()];
        let texts = contents.chain(fixed).chain(controls.iter().map(String::as_str));
        let guard = guard::choose(texts).ok_or(ChatError::NoGuard)?;
        let protect = |text: &str| guard::protect(text, controls, self.template.source(), guard);
        let guarded: Vec<Message> = self
            .messages
            .iter()
            .map(|message| Message {
                role: match KNOWN_ROLES.contains(&message.role.as_str()) {
                    true => message.role.clone(),
                    false => protect(&message.role),
                },
                content: protect(&message.content),
            })
            .collect();
        Ok(tokenizer.encode_guarded(&self.write(&guarded)?, guard)?)
    }

    fn write(&self, messages: &[Message]) -> Result<String, ChatError> {
        let input_bytes = messages.iter().map(|m| m.role.len() + m.content.len()).sum::<usize>();
        let env = jinja::environment(input_bytes).map_err(chat_error)?;
        let template = env.template_from_str(self.template.source()).map_err(chat_error)?;
        let max = input_bytes.saturating_mul(4).saturating_add(MAX_EXTRA_OUTPUT);
        let mut out = Bounded { bytes: Vec::new(), max, full: false };
        let context = context! {
            messages => messages.iter().map(value_of).collect::<Vec<_>>(),
            add_generation_prompt => self.add_generation_prompt,
            bos_token => self.bos.as_str(),
            eos_token => self.eos.as_str(),
            tools => Value::from(()),
            documents => Value::from(()),
        };
        let rendered = template.render_captured_to(context, &mut out).map(drop);
        if out.full {
            return Err(ChatError::OutputTooLarge { max });
        }
        rendered.map_err(chat_error)?;
        String::from_utf8(out.bytes).map_err(|error| ChatError::Template { message: error.to_string() })
    }
}

/// A message as templates see it.
fn value_of(message: &Message) -> Value {
    context! { role => message.role.as_str(), content => message.content.as_str() }
}

/// A buffer that refuses more than `max` bytes.
struct Bounded {
    bytes: Vec<u8>,
    max: usize,
    full: bool,
}

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > self.max {
            self.full = true;
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Tells what a template said by `raise_exception`, and running out of fuel, from faults of the template.
fn chat_error(error: minijinja::Error) -> ChatError {
    if error.kind() == minijinja::ErrorKind::OutOfFuel {
        return ChatError::OutOfFuel;
    }
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    while let Some(error) = cause {
        if let Some(jinja::Raised(message)) = error.downcast_ref() {
            return ChatError::Refused { message: message.clone() };
        }
        if error
            .downcast_ref::<minijinja::Error>()
            .is_some_and(|e| e.kind() == minijinja::ErrorKind::OutOfFuel)
        {
            return ChatError::OutOfFuel;
        }
        cause = error.source();
    }
    ChatError::Template { message: error.to_string() }
}

/// The known name with the fewest edits.
fn nearest(wanted: &str) -> &'static str {
    let short: String = wanted.chars().take(32).collect();
    ChatTemplate::names().into_iter().min_by_key(|name| edits(&short, name)).unwrap_or("chatml")
}

/// How many characters must be put in, taken out or replaced to make one text the other.
fn edits(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.chars().count()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut next = vec![i + 1];
        for (j, y) in b.chars().enumerate() {
            let at = |row: &[usize], j: usize| row.get(j).copied().unwrap_or(usize::MAX - 1);
            let replaced = at(&row, j) + usize::from(x != y);
            next.push(replaced.min(at(&row, j + 1) + 1).min(at(&next, j) + 1));
        }
        row = next;
    }
    row.last().copied().unwrap_or(usize::MAX)
}
