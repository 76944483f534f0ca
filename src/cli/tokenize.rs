//! `skiff tokenize` and `skiff detokenize`: only the vocabulary of a file is used.

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;

use clap::Args;

use super::args::ModelArgs;
use super::{Failure, Outcome, note, put, read_stdin, read_text};
use crate::tokenizer::{DecodeOptions, EncodeOptions, Tokenizer};
use crate::weights::Weights;

const TOKENIZE_EXAMPLES: &str = "\
Examples:
  skiff tokenize \"Hello world\"
  skiff tokenize -f book.txt --no-bos
  skiff tokenize --pretty --parse-special \"<|im_start|>user\"";

const DETOKENIZE_EXAMPLES: &str = "\
Examples:
  skiff detokenize 19556 905
  skiff tokenize \"Hello world\" | skiff detokenize";

/// Print the token ids of a text, as [1, 2, 3]
#[derive(Args)]
#[command(after_help = TOKENIZE_EXAMPLES)]
pub(super) struct TokenizeArgs {
    /// The text [default: stdin]
    #[arg(value_name = "TEXT", conflicts_with = "file")]
    text: Option<String>,
    /// Read the text from a file (- is stdin)
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Recognise control tokens by their text
    #[arg(long)]
    parse_special: bool,
    /// Do not add the begin-of-text (or end-of-text) token that the model wants
    #[arg(long)]
    no_bos: bool,
    /// Also print each token's text (on stderr)
    #[arg(long)]
    pretty: bool,
    #[command(flatten)]
    model: ModelArgs,
}

/// Print the text of token ids
#[derive(Args)]
#[command(after_help = DETOKENIZE_EXAMPLES)]
pub(super) struct DetokenizeArgs {
    /// Ids, separated by blanks or commas, with or without brackets [default: stdin]
    #[arg(value_name = "ID")]
    ids: Vec<String>,
    /// Also print control tokens
    #[arg(long)]
    special: bool,
    #[command(flatten)]
    model: ModelArgs,
}

pub(super) fn run(args: &TokenizeArgs) -> Outcome {
    let text = match (&args.text, &args.file) {
        (Some(text), _) => text.clone(),
        (None, Some(path)) => read_text(path)?,
        (None, None) if io::stdin().is_terminal() => {
            return Err(Failure::Usage("no text: give it as argument, with -f FILE, or on stdin".into()));
        }
        (None, None) => read_stdin()?,
    };
    let tokenizer = tokenizer(&args.model)?;
    let options = EncodeOptions { add_special: !args.no_bos, parse_special: args.parse_special };
    let ids = tokenizer.encode(&text, options)?;
    if args.pretty {
        for &id in &ids {
            let bytes = tokenizer.token_bytes(id);
            note(&format!("{id:>8}  {:?}", String::from_utf8_lossy(bytes)));
        }
    }
    let list: Vec<String> = ids.iter().map(u32::to_string).collect();
    Ok(put(&format!("[{}]\n", list.join(", ")))?)
}

pub(super) fn run_detokenize(args: &DetokenizeArgs) -> Outcome {
    let text = match args.ids.is_empty() {
        false => args.ids.join(" "),
        true if io::stdin().is_terminal() => {
            return Err(Failure::Usage("no ids: give them as arguments or on stdin".into()));
        }
        true => read_stdin()?,
    };
    let ids = parse_ids(&text)?;
    let tokenizer = tokenizer(&args.model)?;
    let vocab = tokenizer.vocab_size();
    if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
        return Err(Failure::Error(format!("token id {id} is outside the vocabulary of {vocab}")));
    }
    let bytes = tokenizer.decode(&ids, DecodeOptions { show_control: args.special });
    let mut out = io::stdout().lock();
    out.write_all(&bytes)?;
    Ok(out.flush()?)
}

/// The tokenizer alone; mapping a file reads none of its weights.
fn tokenizer(model: &ModelArgs) -> Result<Tokenizer, Failure> {
    let path = model.resolve()?;
    let weights = Weights::open(&path)?;
    Tokenizer::from_gguf(weights.metadata()).map_err(|e| Failure::Error(format!("{}: {e}", path.display())))
}

fn parse_ids(text: &str) -> Result<Vec<u32>, Failure> {
    let words = text.split(|c: char| c.is_whitespace() || ",[]".contains(c)).filter(|word| !word.is_empty());
    let parse = |word: &str| word.parse().map_err(|_| Failure::Error(format!("{word:?} is not a token id")));
    words.map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_in_any_form() {
        for text in ["1 2 3", "[1, 2, 3]", "1,2,3\n", "[1 2] 3"] {
            assert_eq!(parse_ids(text).ok(), Some(vec![1, 2, 3]), "{text}");
        }
        assert_eq!(parse_ids("[]").ok(), Some(vec![]));
        for bad in ["x", "-1", "1.5", "4294967296"] {
            assert!(matches!(parse_ids(bad), Err(Failure::Error(e)) if e.contains(bad)), "{bad}");
        }
    }
}
