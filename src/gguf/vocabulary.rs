//! The checks on the tokenizer's metadata that make it safe to index one array with another's ids.

use super::{Error, Metadata};

const TOKENS: &str = "tokenizer.ggml.tokens";

/// Arrays with one element per token.
const PER_TOKEN: [&str; 2] = ["tokenizer.ggml.scores", "tokenizer.ggml.token_type"];

/// Checks that the arrays with an element per token are as long as the vocabulary, and that every special
/// token (`tokenizer.ggml.*_token_id`) is in it. Without a vocabulary there is nothing to check.
pub fn validate_tokenizer(metadata: &Metadata) -> Result<(), Error> {
    let Some(tokens) = metadata.opt_array_str(TOKENS)? else { return Ok(()) };
    check_lengths(metadata, tokens.len())?;
    check_special_ids(metadata, tokens.len())
}

fn check_lengths(metadata: &Metadata, expected: usize) -> Result<(), Error> {
    let scores = metadata.opt_array_f32(PER_TOKEN[0])?.map(<[f32]>::len);
    let types = metadata.opt_array_i32(PER_TOKEN[1])?.map(|types| types.len());
    for (key, found) in PER_TOKEN.into_iter().zip([scores, types]) {
        if let Some(found) = found.filter(|&found| found != expected) {
            return Err(Error::TokenArrayLength { key: key.to_owned(), expected, found });
        }
    }
    Ok(())
}

fn check_special_ids(metadata: &Metadata, vocabulary: usize) -> Result<(), Error> {
    let is_special = |key: &str| key.starts_with("tokenizer.ggml.") && key.ends_with("_token_id");
    for key in metadata.iter().map(|(key, _)| key).filter(|key| is_special(key)) {
        let id = u64::from(metadata.u32(key)?);
        if id >= vocabulary as u64 {
            return Err(Error::TokenIdOutOfRange { key: key.to_owned(), id, vocabulary });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::{StringArray, Value};
    use super::*;

    /// The verdict on three tokens and one more entry.
    fn with(key: &str, value: impl Into<Value>) -> Result<(), Error> {
        let mut m = Metadata::new();
        m.insert(TOKENS, ["<unk>", "<s>", "</s>"].iter().collect::<StringArray>()).unwrap();
        m.insert(key, value).unwrap();
        validate_tokenizer(&m)
    }

    #[test]
    fn arrays_are_as_long_as_the_vocabulary() {
        assert_eq!(with(PER_TOKEN[0], vec![0f32; 3]), Ok(()));
        assert_eq!(with(PER_TOKEN[1], vec![1i32; 3]), Ok(()));
        let length = |key: &str, found| Error::TokenArrayLength { key: key.into(), expected: 3, found };
        assert_eq!(with(PER_TOKEN[0], vec![0f32; 2]), Err(length(PER_TOKEN[0], 2)));
        assert_eq!(with(PER_TOKEN[1], vec![1i32; 4]), Err(length(PER_TOKEN[1], 4)));
        assert!(matches!(with(PER_TOKEN[1], vec![1f32; 3]), Err(Error::WrongType { .. })));
    }

    #[test]
    fn special_tokens_are_in_the_vocabulary() {
        for name in ["bos", "eos", "unknown", "padding", "eot", "fim_pre"] {
            let key = format!("tokenizer.ggml.{name}_token_id");
            assert_eq!(with(&key, 2u32), Ok(()));
            let expected = Error::TokenIdOutOfRange { key: key.clone(), id: 3, vocabulary: 3 };
            assert_eq!(with(&key, 3u32), Err(expected));
            assert!(matches!(with(&key, -1i32), Err(Error::OutOfRange { .. })));
        }
    }

    #[test]
    fn a_file_without_a_vocabulary_is_fine() {
        let mut m = Metadata::new();
        m.insert("tokenizer.ggml.bos_token_id", 1u32).unwrap();
        assert_eq!(validate_tokenizer(&m), Ok(()));
    }

    #[test]
    fn a_vocabulary_of_numbers_is_not_one() {
        let mut m = Metadata::new();
        m.insert(TOKENS, vec![1u32]).unwrap();
        assert!(matches!(validate_tokenizer(&m), Err(Error::WrongType { .. })));
    }
}
