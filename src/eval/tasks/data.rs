//! The data of the tasks, in the formats in which they are published. Files are outside bytes: every error names the
//! file and the line.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::{Item, TaskError};
use crate::sampler::Rng;

/// Largest file that is read: published ones are far smaller.
const MAX_BYTES: u64 = 1 << 30;
/// Most turns of a conversation.
const MAX_TURNS: usize = 16;
/// Words up to which a story is small, and up to which it is of middle length (FFN-SkipLLM, section 4.2).
const SMALL_WORDS: usize = 470;
const MID_WORDS: usize = 790;

/// The text of a file.
fn read(path: &Path) -> Result<String, TaskError> {
    let io = |error| TaskError::Io { path: path.into(), error };
    let file = File::open(path).map_err(io)?;
    if file.metadata().map_err(io)?.len() > MAX_BYTES {
        return Err(TaskError::TooLarge { path: path.into(), most: MAX_BYTES });
    }
    let mut bytes = Vec::new();
    file.take(MAX_BYTES).read_to_end(&mut bytes).map_err(io)?;
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let line = 1 + error.as_bytes()[..at].iter().filter(|&&b| b == b'\n').count();
        TaskError::Line { path: path.into(), line, why: "not UTF-8".into() }
    })
}

/// The lines that are not blank, with their numbers from 1.
fn lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    text.lines().enumerate().map(|(i, line)| (i + 1, line.trim())).filter(|(_, line)| !line.is_empty())
}

fn wrong(path: &Path, line: usize, why: impl Into<String>) -> TaskError {
    TaskError::Line { path: path.into(), line, why: why.into() }
}

/// The error of a JSON text that starts on line `first` of the file.
fn wrong_json(path: &Path, first: usize, error: &serde_json::Error) -> TaskError {
    let text = error.to_string();
    // serde_json counts lines within the text that it was given.
    let why = text.split(" at line ").next().unwrap_or_default();
    wrong(path, first + error.line().saturating_sub(1), why)
}

/// Refuses two items of the same name: their results could not be told apart.
fn distinct(path: &Path, items: Vec<(usize, Item)>) -> Result<Vec<Item>, TaskError> {
    let mut seen = HashSet::new();
    for (line, item) in &items {
        if !seen.insert(item.id.as_str()) {
            return Err(wrong(path, *line, format!("{:?} is there twice", item.id)));
        }
    }
    if items.is_empty() {
        return Err(TaskError::Empty { path: path.into() });
    }
    Ok(items.into_iter().map(|(_, item)| item).collect())
}

/// FreebaseQA: lines `question | answer`, or the published JSON (Jiang, Wu, Jiang, NAACL 2019).
pub fn freebaseqa(path: &Path) -> Result<Vec<Item>, TaskError> {
    let text = read(path)?;
    let items = match text.trim_start_matches('\u{feff}').trim_start().starts_with('{') {
        true => freebaseqa_json(path, &text)?,
        false => {
            let read = |(at, line)| question(path, at, line).map(|item| (at, item));
            lines(&text).map(read).collect::<Result<_, _>>()?
        }
    };
    distinct(path, items)
}

fn question(path: &Path, at: usize, line: &str) -> Result<Item, TaskError> {
    let (question, answer) =
        line.rsplit_once('|').ok_or_else(|| wrong(path, at, "expected `question | answer`"))?;
    let (question, answer) = (unquoted(question.trim()), unquoted(answer.trim()));
    if question.is_empty() || answer.is_empty() {
        return Err(wrong(path, at, "the question or the answer is empty"));
    }
    Ok(Item { id: at.to_string(), turns: vec![question], references: vec![answer], ..Item::default() })
}

/// Without the quotes of CSV, if there are any.
fn unquoted(text: &str) -> String {
    let inner = text.strip_prefix('"').and_then(|t| t.strip_suffix('"'));
    inner.map_or_else(|| text.to_owned(), |inner| inner.replace("\"\"", "\""))
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Published {
    questions: Vec<PublishedQuestion>,
}

#[derive(Deserialize)]
struct PublishedQuestion {
    #[serde(rename = "Question-ID")]
    id: String,
    #[serde(rename = "RawQuestion")]
    question: String,
    #[serde(rename = "Parses")]
    parses: Vec<Parse>,
}

#[derive(Deserialize)]
struct Parse {
    #[serde(rename = "Answers")]
    answers: Vec<Answers>,
}

#[derive(Deserialize)]
struct Answers {
    #[serde(rename = "AnswersName")]
    names: Vec<String>,
}

fn freebaseqa_json(path: &Path, text: &str) -> Result<Vec<(usize, Item)>, TaskError> {
    let text = text.trim_start_matches('\u{feff}');
    let published: Published = serde_json::from_str(text).map_err(|e| wrong_json(path, 1, &e))?;
    let mut items = Vec::new();
    for q in published.questions {
        let mut references: Vec<String> =
            q.parses.into_iter().flat_map(|p| p.answers).flat_map(|a| a.names).collect();
        references.retain(|name| !name.trim().is_empty());
        references.dedup();
        // The line of an item is not known here; its name says as much.
        let line = 1 + text[..text.find(&q.id).unwrap_or(0)].matches('\n').count();
        if q.question.trim().is_empty() || references.is_empty() {
            return Err(wrong(path, line, format!("{} has no question or no answer", q.id)));
        }
        items.push((line, Item { id: q.id, turns: vec![q.question], references, ..Item::default() }));
    }
    Ok(items)
}

/// Stories: a folder of `.story` files (in it, or in its folders), one such file, or JSON lines with `article` and
/// `highlights`.
pub fn stories(path: &Path) -> Result<Vec<Item>, TaskError> {
    if !path.is_dir() {
        return match path.extension().is_some_and(|e| e == "story") {
            true => Ok(vec![story(path, path.parent().unwrap_or(path))?]),
            false => story_lines(path),
        };
    }
    let mut files = story_files(path)?;
    for folder in entries(path)?.into_iter().filter(|p| p.is_dir()) {
        files.extend(story_files(&folder)?);
    }
    if files.is_empty() {
        return Err(TaskError::Empty { path: path.into() });
    }
    files.iter().map(|file| story(file, path)).collect()
}

/// What a folder holds, in the order of names.
fn entries(folder: &Path) -> Result<Vec<PathBuf>, TaskError> {
    let io = |error| TaskError::Io { path: folder.into(), error };
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(io)? {
        found.push(entry.map_err(io)?.path());
    }
    found.sort();
    Ok(found)
}

fn story_files(folder: &Path) -> Result<Vec<PathBuf>, TaskError> {
    let mut files = entries(folder)?;
    files.retain(|p| p.is_file() && p.extension().is_some_and(|e| e == "story"));
    Ok(files)
}

/// A `.story` file: the story, then paragraphs that a line `@highlight` announces.
fn story(path: &Path, root: &Path) -> Result<Item, TaskError> {
    let text = read(path)?;
    let mut parts = text.split("@highlight").map(str::trim);
    let body = parts.next().unwrap_or_default();
    let highlights: Vec<&str> = parts.filter(|h| !h.is_empty()).collect();
    if body.is_empty() {
        return Err(wrong(path, 1, "there is no story"));
    }
    if highlights.is_empty() {
        let last = text.lines().count().max(1);
        return Err(wrong(path, last, "there is no line @highlight with a text after it"));
    }
    let folder = path.parent().and_then(Path::file_name).map(|f| f.to_string_lossy());
    let group = match folder.as_deref() {
        Some(name @ ("small" | "mid" | "large")) => name,
        _ => length_group(body),
    };
    let id = path.strip_prefix(root).unwrap_or(path).display().to_string();
    Ok(Item { id, group: group.into(), turns: vec![body.into()], references: vec![highlights.join("\n")] })
}

fn length_group(story: &str) -> &'static str {
    match story.split_whitespace().count() {
        n if n <= SMALL_WORDS => "small",
        n if n <= MID_WORDS => "mid",
        _ => "large",
    }
}

#[derive(Deserialize)]
struct StoryLine {
    #[serde(alias = "story", alias = "document", alias = "text")]
    article: String,
    #[serde(alias = "summary")]
    highlights: String,
    id: Option<String>,
}

fn story_lines(path: &Path) -> Result<Vec<Item>, TaskError> {
    let text = read(path)?;
    let mut items = Vec::new();
    for (at, line) in lines(&text) {
        let story: StoryLine = serde_json::from_str(line).map_err(|e| wrong_json(path, at, &e))?;
        if story.article.trim().is_empty() || story.highlights.trim().is_empty() {
            return Err(wrong(path, at, "the article or the highlights are empty"));
        }
        items.push((
            at,
            Item {
                id: story.id.unwrap_or_else(|| at.to_string()),
                group: length_group(&story.article).into(),
                turns: vec![story.article],
                references: vec![story.highlights],
            },
        ));
    }
    distinct(path, items)
}

#[derive(Deserialize)]
struct Question {
    question_id: u64,
    category: String,
    turns: Vec<String>,
}

/// MT-Bench's `question.jsonl` (Zheng et al. 2023).
pub fn mt_bench(path: &Path) -> Result<Vec<Item>, TaskError> {
    let text = read(path)?;
    let mut items = Vec::new();
    for (at, line) in lines(&text) {
        let q: Question = serde_json::from_str(line).map_err(|e| wrong_json(path, at, &e))?;
        if !(1..=MAX_TURNS).contains(&q.turns.len()) || q.turns.iter().any(|t| t.trim().is_empty()) {
            return Err(wrong(path, at, format!("expected 1 to {MAX_TURNS} turns, none of them empty")));
        }
        let id = q.question_id.to_string();
        items.push((at, Item { id, group: q.category, turns: q.turns, references: Vec::new() }));
    }
    distinct(path, items)
}

/// A line of answers in FastChat's format.
#[derive(Deserialize)]
struct AnswerLine {
    question_id: u64,
    choices: Vec<Choice>,
}

#[derive(Deserialize)]
struct Choice {
    turns: Vec<String>,
}

/// Gives the items the answers of a file in FastChat's format, as `reference_gpt-4.jsonl` is, for references.
pub fn add_references(items: &mut [Item], path: &Path) -> Result<(), TaskError> {
    let text = read(path)?;
    for (at, line) in lines(&text) {
        let answer: AnswerLine = serde_json::from_str(line).map_err(|e| wrong_json(path, at, &e))?;
        let choice = answer.choices.into_iter().next();
        let turns = choice.map(|c| c.turns).ok_or_else(|| wrong(path, at, "choices is empty"))?;
        let id = answer.question_id.to_string();
        items.iter_mut().filter(|item| item.id == id).for_each(|item| item.references = turns.clone());
    }
    Ok(())
}

/// In the order that `seed` draws.
pub fn shuffled(mut items: Vec<Item>, seed: u64) -> Vec<Item> {
    let mut rng = Rng::new(seed);
    for i in (1..items.len()).rev() {
        items.swap(i, (rng.next_u64() % (i as u64 + 1)) as usize);
    }
    items
}

/// One item of each group in turn, so that the first few are of all groups.
pub fn interleaved(items: Vec<Item>) -> Vec<Item> {
    let mut seen: Vec<(String, usize)> = Vec::new();
    let mut ranked: Vec<(usize, Item)> = Vec::new();
    for item in items {
        let rank = match seen.iter_mut().find(|(group, _)| *group == item.group) {
            Some((_, n)) => {
                *n += 1;
                *n
            }
            None => {
                seen.push((item.group.clone(), 0));
                0
            }
        };
        ranked.push((rank, item));
    }
    ranked.sort_by_key(|(rank, _)| *rank);
    ranked.into_iter().map(|(_, item)| item).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str, text: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        (folder, path)
    }

    #[test]
    fn both_formats_of_freebaseqa() {
        let (_folder, path) =
            file("dev.txt", b"Who | What? | me \n\n\"Who wrote \"\"Emma\"\"?\" | jane austen\n");
        let items = freebaseqa(&path).unwrap();
        assert_eq!(items[0].turns, ["Who | What?"], "only the last bar divides");
        assert_eq!((items[1].id.as_str(), items[1].turns[0].as_str()), ("3", "Who wrote \"Emma\"?"));
        let json = br#"{"Dataset": "FreebaseQA-eval", "Questions": [{"Question-ID": "F-1", "RawQuestion": "Who?",
            "ProcessedQuestion": "who", "Parses": [{"Answers": [{"AnswersMid": "m.1", "AnswersName": ["me", "I"]}]}]}]}"#;
        let (_folder, path) = file("eval.json", json);
        let items = freebaseqa(&path).unwrap();
        assert_eq!((items[0].id.as_str(), items[0].references.len()), ("F-1", 2));
    }

    #[test]
    fn errors_name_file_and_line() {
        type Reader = fn(&Path) -> Result<Vec<Item>, TaskError>;
        let cases: [(&str, &[u8], Reader, &str); 9] = [
            ("a.txt", b"Who? | me\nno bar\n", freebaseqa, "a.txt: line 2"),
            ("b.txt", b"Who? |  \n", freebaseqa, "b.txt: line 1"),
            ("c.txt", b"x | y\nWho\xff? | me\n", freebaseqa, "c.txt: line 2: not UTF-8"),
            ("d.json", b"{\"Questions\": [\n{\"Question-ID\": 7}]}", freebaseqa, "d.json: line 2"),
            ("e.txt", b"\n \n", freebaseqa, "e.txt"),
            ("f.story", b"Only a story.\n", stories, "f.story: line 1"),
            ("g.jsonl", b"{\"article\": \"x\"}\n", stories, "g.jsonl: line 1"),
            ("h.jsonl", b"{\"question_id\": 1, \"category\": \"c\", \"turns\": []}\n", mt_bench, "h.jsonl: line 1"),
            (
                "i.jsonl",
                b"{\"question_id\": 1, \"category\": \"c\", \"turns\": [\"x\"]}\n\n{\"question_id\": 1, \"category\": \"c\", \"turns\": [\"x\"]}",
                mt_bench,
                "i.jsonl: line 3",
            ),
        ];
        for (name, text, read, expected) in cases {
            let (_folder, path) = file(name, text);
            let error = read(&path).expect_err(name).to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn stories_have_highlights_and_a_length_group() {
        let (folder, path) = file("a.story", b"A story.\n\n@highlight\n\nOne\n\n@highlight\n\nTwo");
        let items = stories(&path).unwrap();
        assert_eq!((items[0].group.as_str(), items[0].references[0].as_str()), ("small", "One\nTwo"));
        let large = folder.path().join("large");
        fs::create_dir(&large).unwrap();
        fs::copy(&path, large.join("b.story")).unwrap();
        let items = stories(folder.path()).unwrap();
        assert_eq!(items.iter().map(|i| i.group.as_str()).collect::<Vec<_>>(), ["small", "large"]);
        assert_eq!([500, 900].map(|n| length_group(&"w ".repeat(n))), ["mid", "large"]);
    }

    #[test]
    fn orders_are_reproducible_and_mix_groups() {
        let item = |id: usize| Item { id: id.to_string(), group: (id / 2).to_string(), ..Item::default() };
        let ids = |items: Vec<Item>| items.into_iter().map(|i| i.id).collect::<Vec<_>>();
        assert_eq!(ids(interleaved((0..4).map(item).collect())), ["0", "2", "1", "3"]);
        let one = ids(shuffled((0..50).map(item).collect(), 1));
        assert_eq!(one, ids(shuffled((0..50).map(item).collect(), 1)));
        assert_ne!(one, ids(shuffled((0..50).map(item).collect(), 2)));
    }
}
