//! README.md of a checkpoint: the fields between its two `---` lines, as far as they are words and lists of words.

use std::path::Path;

use super::json::read_limited;
use crate::ConvertError;

/// Cards are text that people write.
const MAX_BYTES: u64 = 4 << 20;

/// Keys with their values: one for a word, several for a list.
#[derive(Debug, Default)]
pub(super) struct Card(Vec<(String, Vec<String>)>);

impl Card {
    /// The card of `dir`; without one, or without fields, an empty one.
    pub(super) fn read(dir: &Path) -> Result<Self, ConvertError> {
        let path = dir.join("README.md");
        if !path.is_file() {
            return Ok(Self::default());
        }
        Ok(Self::parse(&String::from_utf8_lossy(&read_limited(&path, MAX_BYTES)?)))
    }

    /// Reads `key: word`, `key: [a, b]`, and `key:` with lines `- word` below it; what is deeper is passed over.
    fn parse(text: &str) -> Self {
        let mut lines = text.trim_start_matches('\u{feff}').lines();
        let mut card = Self::default();
        if lines.next().map(str::trim_end) != Some("---") {
            return card;
        }
        let mut inside = false; // of a key at the margin
        for line in lines.take_while(|line| line.trim_end() != "---") {
            let item = line.trim_start().strip_prefix("- ").map(word);
            match (item, line.split_once(':')) {
                (Some(item), _) if inside => {
                    // `- key: value` is a list of more than words.
                    let plain = !item.is_empty() && !item.contains(": ") && !item.ends_with(':');
                    if let Some(values) = card.0.last_mut().map(|entry| &mut entry.1).filter(|_| plain) {
                        values.push(item);
                    }
                }
                (None, Some((key, value))) if !line.starts_with([' ', '\t', '#', '-']) => {
                    inside = true;
                    card.0.push((word(key), values(value.trim())));
                }
                _ => {}
            }
        }
        card
    }

    /// The words at `key`.
    pub(super) fn all(&self, key: &str) -> &[String] {
        self.0.iter().find(|(k, _)| k == key).map_or(&[], |(_, values)| values)
    }

    /// The first of several keys that has a word.
    pub(super) fn first_of(&self, keys: &[&str]) -> Option<&str> {
        keys.iter().find_map(|key| self.all(key).first()).map(String::as_str)
    }
}

fn values(text: &str) -> Vec<String> {
    let words = match text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        Some(list) => list.split(',').map(word).collect(),
        None if text.starts_with(['|', '>', '{', '&', '*', '[']) => Vec::new(), // blocks and such are no words
        None => vec![word(text)],
    };
    words.into_iter().filter(|word| !word.is_empty() && word != "null" && word != "~").collect()
}

/// A word without its quotes, or up to a comment.
fn word(text: &str) -> String {
    let text = text.trim();
    for quote in ['"', '\''] {
        if let Some((inner, _)) = text.strip_prefix(quote).and_then(|rest| rest.split_once(quote)) {
            return inner.to_owned();
        }
    }
    text.split(" #").next().unwrap_or_default().trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_a_card_are_read() {
        let card = Card::parse(
            "---\nlicense: apache-2.0 # free\nlanguage:\n- en\n- \"fr\"\ntags: [chat, 'two words']\n\
             widget:\n  - text: hello\n    other: x\nbase_model:\n  - Org/Base-1B\nnone:\n---\nlicense: mit\n",
        );
        assert_eq!(card.all("license"), ["apache-2.0"]);
        assert_eq!(card.all("language"), ["en", "fr"]);
        assert_eq!(card.all("tags"), ["chat", "two words"]);
        assert_eq!(card.first_of(&["base_models", "base_model"]), Some("Org/Base-1B"));
        assert_eq!(card.all("widget"), [""; 0]);
        for text in ["", "---", "license: mit", "---\n- a\n:\n  - b\n---"] {
            assert_eq!(Card::parse(text).all("license"), [""; 0], "{text}");
        }
    }
}
