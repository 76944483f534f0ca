//! Measures of texts: answers against references, overlap of summaries, repetition.

use std::collections::{HashMap, HashSet};

/// An answer in the form that is compared, as SQuAD's evaluation does it (Rajpurkar et al. 2016): lower case, without
/// punctuation and articles, words separated by one space.
pub fn normalised(text: &str) -> String {
    let plain: String = text
        .to_lowercase()
        .chars()
        .filter(|c| c.is_alphanumeric() || c.is_whitespace() || matches!(c, '-' | '/' | '&'))
        .map(|c| if c.is_alphanumeric() { c } else { ' ' })
        .collect();
    let words: Vec<&str> = plain.split_whitespace().filter(|w| !matches!(*w, "a" | "an" | "the")).collect();
    words.join(" ")
}

/// Whether `answer` is one of `references`, both [`normalised`].
pub fn exact(answer: &str, references: &[String]) -> bool {
    let answer = normalised(answer);
    references.iter().map(|r| normalised(r)).any(|r| !r.is_empty() && r == answer)
}

/// Whether the words of one of `references` occur in `answer`, in a row, both [`normalised`].
pub fn contains(answer: &str, references: &[String]) -> bool {
    let answer = format!(" {} ", normalised(answer));
    let within = |r: String| !r.is_empty() && answer.contains(&format!(" {r} "));
    references.iter().map(|r| normalised(r)).any(within)
}

/// F1 of ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004), over lower-case runs of letters and digits, without stemming;
/// ROUGE-L takes each text as one sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[allow(missing_docs)]
pub struct Rouge {
    pub one: f64,
    pub two: f64,
    pub l: f64,
}

/// [`Rouge`] of a text against a reference; 0 where either has no n-gram.
pub fn rouge(text: &str, reference: &str) -> Rouge {
    let (text, reference) = (text.to_lowercase(), reference.to_lowercase());
    let (a, b) = (words(&text), words(&reference));
    Rouge {
        one: f1(overlap(&a, &b, 1), a.len(), b.len()),
        two: f1(overlap(&a, &b, 2), a.len().saturating_sub(1), b.len().saturating_sub(1)),
        l: f1(common_subsequence(&a, &b), a.len(), b.len()),
    }
}

fn words(text: &str) -> Vec<&str> {
    text.split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty()).collect()
}

fn f1(common: usize, a: usize, b: usize) -> f64 {
    if common == 0 { 0.0 } else { 2.0 * common as f64 / (a + b) as f64 }
}

/// N-grams that both have, each as often as in the one that has it less often.
fn overlap(a: &[&str], b: &[&str], n: usize) -> usize {
    let mut counts: HashMap<&[&str], (usize, usize)> = HashMap::new();
    a.windows(n).for_each(|gram| counts.entry(gram).or_default().0 += 1);
    b.windows(n).for_each(|gram| counts.entry(gram).or_default().1 += 1);
    counts.values().map(|&(a, b)| a.min(b)).sum()
}

/// Length of the longest common subsequence.
fn common_subsequence(a: &[&str], b: &[&str]) -> usize {
    let mut row = vec![0; b.len() + 1];
    for x in a {
        let mut diagonal = 0;
        for (j, y) in b.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = if x == y { diagonal + 1 } else { above.max(row[j]) };
            diagonal = above;
        }
    }
    row[b.len()]
}

/// Share of the n-grams that are different from all before (distinct-n, Li et al. 2016); 1 where there is none.
pub fn distinct<T: Eq + std::hash::Hash>(items: &[T], n: usize) -> f64 {
    let total = items.len().saturating_sub(n - 1);
    let different: HashSet<&[T]> = items.windows(n).collect();
    if total == 0 { 1.0 } else { different.len() as f64 / total as f64 }
}

/// Most items in a row that occur a second time; the two may overlap.
pub fn longest_repeat<T: Eq>(items: &[T]) -> usize {
    // `row[j]`: length of the common run that ends at i and at j, for j < i.
    let (mut row, mut longest) = (vec![0usize; items.len()], 0);
    for i in 0..items.len() {
        for j in (0..i).rev() {
            let before = if j == 0 { 0 } else { row[j - 1] };
            row[j] = if items[i] == items[j] { before + 1 } else { 0 };
            longest = longest.max(row[j]);
        }
    }
    longest
}

/// Whether a generation has collapsed: no word at all, or more than half of its runs of four tokens are repeats. Texts
/// below 16 tokens are too short to tell.
pub fn collapsed(text: &str, tokens: &[u32]) -> bool {
    words(text).is_empty() || tokens.len() >= 16 && distinct(tokens, 4) < 0.5
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|t| t.to_string()).collect()
    }

    #[test]
    fn answers_are_compared_without_case_articles_and_punctuation() {
        assert_eq!(normalised(" The  Beatles'  \"White-Album\"!"), "beatles white album");
        assert!(exact("The Beatles.", &strings(&["rolling stones", "beatles"])));
        assert!(!exact("It was the Beatles", &strings(&["beatles"])));
        assert!(contains("It was the Beatles, I think", &strings(&["the beatles"])));
        assert!(!contains("Beatlesmania", &strings(&["beatles"])), "whole words only");
        assert!(!contains("anything", &strings(&["", "the", "?"])), "an empty reference is in every text");
        assert!(!exact("the", &strings(&["a"])));
    }

    /// The example in the documentation of Google's `rouge_score`.
    #[test]
    fn rouge_as_published() {
        let got =
            rouge("The quick brown dog jumps on the log.", "The quick brown fox jumps over the lazy dog");
        let close = |a: f64, b: f64| (a - b).abs() < 1e-9;
        assert!(close(got.one, 0.705_882_352_941_176_5), "{got:?}");
        assert!(close(got.l, 0.588_235_294_117_647), "{got:?}");
        // Bigrams in common: "the quick", "quick brown", of 7 and 8.
        assert!(close(got.two, 4.0 / 15.0), "{got:?}");
    }

    /// Lin 2004, section 3.1: ROUGE-2 cannot tell S2 from S3, ROUGE-L can.
    #[test]
    fn the_gunman_of_the_paper() {
        let (two, three) = ("police kill the gunman", "the gunman kill police");
        let reference = "police killed the gunman";
        assert_eq!((rouge(two, reference).l, rouge(three, reference).l), (0.75, 0.5));
        assert_eq!(rouge(two, reference).two, rouge(three, reference).two);
        assert_eq!(rouge("", reference), Rouge::default());
        assert_eq!(rouge("a a a a", "a b").one, 2.0 / 6.0, "a word counts as often as the reference has it");
    }

    #[test]
    fn repetition_is_found() {
        let items = |text: &'static str| text.split(' ').collect::<Vec<_>>();
        assert_eq!(distinct(&items("a b a b"), 2), 2.0 / 3.0);
        assert_eq!(distinct(&items("a"), 2), 1.0);
        assert_eq!(longest_repeat(&items("a b c d")), 0);
        assert_eq!(longest_repeat(&items("x a b c y a b c z")), 3);
        assert_eq!(longest_repeat(&items("a a a a")), 3);
        let looping: Vec<u32> = (0..64).map(|i| i % 5).collect();
        let fresh: Vec<u32> = (0..64).collect();
        assert!(collapsed("text", &looping) && !collapsed("text", &fresh) && collapsed(" ...", &fresh));
        assert!(!collapsed("yes", &[1, 1, 1, 1]), "too short to tell");
    }
}
