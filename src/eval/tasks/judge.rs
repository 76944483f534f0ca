//! A judging model behind an OpenAI-compatible endpoint, asked as MT-Bench asks (Zheng et al. 2023): to rate an answer
//! from 1 to 10, and to compare two answers, in both orders, since judges favour a place. The words are ours; what must
//! be answered, `[[5]]` and `[[A]]`, `[[B]]` or `[[C]]`, is MT-Bench's. Whatever else comes back counts as unparsable.

use std::time::Duration;

use serde::Deserialize;
use serde_json::json;
use ureq::Agent;

use super::{Item, Record, Task, TaskError};

/// Most bytes of a reply that are read.
const MAX_REPLY: u64 = 4 << 20;
/// Attempts before the judge is given up, and the pause after the first, which doubles.
const ATTEMPTS: u32 = 4;
const PAUSE: Duration = Duration::from_millis(500);

/// A judge.
pub struct Judge {
    url: String,
    model: String,
    key: Option<String>,
    agent: Agent,
}

/// Two answers to an item, shown in an order.
#[derive(Clone, Copy)]
pub struct Comparison<'a> {
    /// The answer that is judged.
    pub answer: &'a Record,
    /// The full model's.
    pub full: &'a Record,
    /// Whether the judged answer is shown first.
    pub first: bool,
}

/// What the judge said.
#[derive(Clone, Debug, PartialEq)]
pub struct Judged {
    /// Its words.
    pub said: String,
    /// What they come to; `None`: unparsable.
    pub score: Option<f64>,
}

impl Judge {
    /// The judge `model` at `url`: the base of an API (`http://host:8080`, with `/v1` or without), or the whole address of
    /// its chat completions.
    pub fn new(url: &str, model: &str, key: Option<String>) -> Self {
        let base = url.trim_end_matches('/');
        let url = match base {
            _ if base.ends_with("/chat/completions") => base.to_owned(),
            _ if base.ends_with("/v1") => format!("{base}/chat/completions"),
            _ => format!("{base}/v1/chat/completions"),
        };
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .user_agent(concat!("skiff/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(Duration::from_secs(20)))
            // A judge on a CPU takes its time.
            .timeout_global(Some(Duration::from_secs(900)));
        Self { url, model: model.into(), key, agent: config.build().new_agent() }
    }

    /// Its model's name.
    pub fn name(&self) -> &str {
        &self.model
    }

    /// Has the answer to a turn rated, 1 to 10.
    pub fn rate(&self, task: Task, item: &Item, answer: &Record, turn: usize) -> Result<Judged, TaskError> {
        let said = self.ask(&rating_prompt(task, item, &answer.answers, turn))?;
        let score = rating(&said);
        Ok(Judged { said, score })
    }

    /// Has an answer compared with the full model's: 1 if it won, 0 if it lost, 0.5 for a tie.
    pub fn compare(
        &self,
        task: Task,
        item: &Item,
        pair: Comparison<'_>,
        turn: usize,
    ) -> Result<Judged, TaskError> {
        let said = self.ask(&comparison_prompt(task, item, pair, turn))?;
        let score = verdict(&said).map(|verdict| match (verdict, pair.first) {
            ('C', _) => 0.5,
            ('A', true) | ('B', false) => 1.0,
            _ => 0.0,
        });
        Ok(Judged { said, score })
    }

    /// The reply to a prompt, greedy.
    fn ask(&self, prompt: &str) -> Result<String, TaskError> {
        let body = json!({
            "model": self.model,
            "messages": [
                {"role": "system", "content": "You are a fair and exacting judge of texts."},
                {"role": "user", "content": prompt},
            ],
            "temperature": 0,
            "max_tokens": 1024,
        });
        let mut pause = PAUSE;
        for attempt in 1.. {
            match self.post(&body.to_string()) {
                Ok(said) => return Ok(said),
                Err((why, again)) if !again || attempt == ATTEMPTS => {
                    return Err(TaskError::Judge { url: self.url.clone(), why });
                }
                Err(_) => std::thread::sleep(pause),
            }
            pause *= 2;
        }
        unreachable!("attempts are counted")
    }

    /// One request; an error says whether another may help.
    fn post(&self, body: &str) -> Result<String, (String, bool)> {
        let mut request = self.agent.post(&self.url).header("Content-Type", "application/json");
        if let Some(key) = &self.key {
            request = request.header("Authorization", format!("Bearer {key}"));
        }
        let mut response = request.send(body).map_err(|e| (e.to_string(), true))?;
        let status = response.status().as_u16();
        let text = response.body_mut().with_config().limit(MAX_REPLY).read_to_string();
        if status != 200 {
            let said: String = text.unwrap_or_default().chars().take(200).collect();
            return Err((format!("HTTP {status}: {said}"), status == 429 || status >= 500));
        }
        let text = text.map_err(|e| (e.to_string(), true))?;
        let reply: Reply = serde_json::from_str(&text).map_err(|e| (format!("its reply: {e}"), false))?;
        let choice = reply.choices.into_iter().next();
        choice
            .map(|c| c.message.content.unwrap_or_default())
            .ok_or(("its reply has no choices".into(), false))
    }
}

#[derive(Deserialize)]
struct Reply {
    choices: Vec<ReplyChoice>,
}

#[derive(Deserialize)]
struct ReplyChoice {
    message: ReplyMessage,
}

#[derive(Deserialize)]
struct ReplyMessage {
    content: Option<String>,
}

/// What is in the only `[[...]]` of a reply; `None` if there is none, or if there are several that differ.
fn bracketed(said: &str) -> Option<&str> {
    let mut found =
        said.split("[[").skip(1).filter_map(|rest| rest.split_once("]]")).map(|(inner, _)| inner.trim());
    let first = found.next()?;
    found.all(|other| other == first).then_some(first)
}

fn rating(said: &str) -> Option<f64> {
    let digits = bracketed(said)?;
    let plain = !digits.is_empty() && digits.chars().all(|c| c.is_ascii_digit() || c == '.');
    let score: f64 = digits.parse().ok().filter(|_| plain)?;
    (1.0..=10.0).contains(&score).then_some(score)
}

fn verdict(said: &str) -> Option<char> {
    match bracketed(said)? {
        "A" => Some('A'),
        "B" => Some('B'),
        "C" => Some('C'),
        _ => None,
    }
}

/// What a good answer is, by task.
fn criteria(task: Task) -> &'static str {
    match task {
        Task::Summarize => {
            "The assistant was to summarise a story in less than 150 words. Consider coherence, consistency with the \
             story, fluency and relevance."
        }
        _ => "Consider helpfulness, relevance, accuracy, depth, creativity and level of detail.",
    }
}

/// The conversation up to a turn, with the answers to be judged, and reference answers where there are any.
fn conversation(task: Task, item: &Item, who: &str, answers: &[String], turn: usize) -> String {
    let mut text = format!("<|Start of the conversation with {who}|>\n\n");
    for i in 0..=turn {
        let (user, answer) = (item.turns.get(i), answers.get(i));
        let (user, answer) = (user.map_or("", String::as_str), answer.map_or("", String::as_str));
        text.push_str(&format!("### User:\n{user}\n\n### {who}:\n{answer}\n\n"));
        if task == Task::MtBench && who != "Assistant B" {
            let reference = item.references.get(i);
            text.push_str(&reference.map_or(String::new(), |r| format!("### Reference answer:\n{r}\n\n")));
        }
    }
    text + &format!("<|End of the conversation with {who}|>\n")
}

fn rating_prompt(task: Task, item: &Item, answers: &[String], turn: usize) -> String {
    let last = if turn > 0 {
        " Judge the assistant's last answer, in the light of what was said before."
    } else {
        ""
    };
    format!(
        "Rate the answer of an AI assistant to its user. {}{last} Where a reference answer is given, compare with it, and \
         point out mistakes. First explain your judgement in a few sentences. Then give a rating from 1 to 10, strictly \
         in this form: [[rating]], for example: Rating: [[5]].\n\n{}",
        criteria(task),
        conversation(task, item, "Assistant", answers, turn)
    )
}

fn comparison_prompt(task: Task, item: &Item, pair: Comparison<'_>, turn: usize) -> String {
    let (a, b) = if pair.first { (pair.answer, pair.full) } else { (pair.full, pair.answer) };
    let last = if turn > 0 { " Judge the last answers, in the light of what was said before." } else { "" };
    format!(
        "Compare the answers of two AI assistants to the same user. {}{last} Neither the order of the answers, nor their \
         length, nor the assistants' names may matter. First explain your judgement in a few sentences. Then give your \
         verdict, strictly in this form: [[A]] if assistant A is better, [[B]] if assistant B is better, [[C]] for a tie.\
         \n\n{}\n{}",
        criteria(task),
        conversation(task, item, "Assistant A", &a.answers, turn),
        conversation(task, item, "Assistant B", &b.answers, turn)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_are_taken_strictly() {
        for (said, expected) in [
            ("Good. Rating: [[7]]", Some(7.0)),
            ("[[7.5]] and so [[7.5]]", Some(7.5)),
            ("[[7]] or [[8]]", None),
            ("Rating: 7", None),
            ("[[11]]", None),
            ("[[0]]", None),
            ("[[seven]]", None),
            ("[[1e1]]", None),
            ("[[inf]]", None),
            ("[[5", None),
            ("", None),
        ] {
            assert_eq!(rating(said), expected, "{said}");
        }
        assert_eq!(verdict("A is better: [[A]]"), Some('A'));
        assert_eq!(verdict("[[A]] [[B]]"), None);
        assert_eq!(verdict("[[a]]"), None);
    }

    #[test]
    fn addresses() {
        for given in ["http://x", "http://x/", "http://x/v1", "http://x/v1/chat/completions"] {
            assert_eq!(Judge::new(given, "m", None).url, "http://x/v1/chat/completions");
        }
    }

    #[test]
    fn prompts_hold_the_turns_up_to_the_one_judged_and_both_orders() {
        let texts = |a: &str, b: &str| vec![a.to_owned(), b.to_owned()];
        let item = Item { turns: texts("Q1", "Q2"), references: texts("R1", "R2"), ..Item::default() };
        let answer = Record { answers: texts("mine1", "mine2"), ..Record::default() };
        let full = Record { answers: texts("full1", "full2"), ..Record::default() };
        let first = rating_prompt(Task::MtBench, &item, &answer.answers, 0);
        assert!(first.contains("mine1") && first.contains("R1") && !first.contains("Q2"), "{first}");
        assert!(rating_prompt(Task::MtBench, &item, &answer.answers, 1).contains("mine2"));
        let place = |first: bool| {
            let text = comparison_prompt(
                Task::MtBench,
                &item,
                Comparison { answer: &answer, full: &full, first },
                0,
            );
            text.find("mine1") < text.find("full1")
        };
        assert!(place(true) && !place(false));
    }
}
