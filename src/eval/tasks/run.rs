//! Answering items under policies.

use std::collections::BTreeMap;

use super::{Contender, Item, Record, Task, TaskError, text};
use crate::chat::{ChatTemplate, Message};
use crate::eval::perplexity::{Exact, Score, score_rows};
use crate::model::{FfnStep, KvType};
use crate::sampler::{Sampler, SamplerOptions, StopMatcher};
use crate::session::{End, Engine, Sampling, Session, SessionOptions};
use crate::skip::SkipOptions;
use crate::tokenizer::EncodeOptions;

/// Positions whose logits are held at a time while a policy is compared with the full model.
const ROWS: usize = 64;

/// How items are put to the model.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The task.
    pub task: Task,
    /// How messages are written; `None`: prompts are plain text to be continued.
    pub template: Option<ChatTemplate>,
    /// Text that tells the model how to behave.
    pub system: Option<String>,
    /// Questions with their answers that precede the one asked.
    pub shots: Vec<Item>,
    /// Tokens of an answer, at most.
    pub max_tokens: usize,
    /// Positions.
    pub context: usize,
    /// How keys and values are kept.
    pub kv: KvType,
}

/// Puts items to a model.
pub struct Runner<'e> {
    engine: &'e Engine,
    session: Session<'e>,
    settings: Settings,
    /// Prompt tokens in the cache that were evaluated in full: what policies of one item share.
    shared: Vec<u32>,
    /// Of the last turn that was compared: all policies are compared on it.
    teacher: Teacher,
}

/// What the full model says at each position of its answer to a turn.
#[derive(Default)]
struct Teacher {
    prompt: Vec<u32>,
    answer: Vec<u32>,
    /// `[answer, vocab]`
    probabilities: Vec<f32>,
    exact: Vec<Exact>,
}

/// An answer to a turn.
struct Answer {
    text: String,
    tokens: Vec<u32>,
    ended: &'static str,
}

impl<'e> Runner<'e> {
    /// For a model that has been made ready for the policies.
    pub fn new(engine: &'e Engine, settings: Settings) -> Result<Self, TaskError> {
        if settings.template.is_none() && settings.task == Task::MtBench {
            return Err(TaskError::NoTemplate);
        }
        let options =
            SessionOptions { context: Some(settings.context), kv: settings.kv, ..SessionOptions::default() };
        let session = Session::new(engine, options)?;
        Ok(Self { engine, session, settings, shared: Vec::new(), teacher: Teacher::default() })
    }

    /// The answers of `contender` to `item`, with their scores: against the references and, where the full model's
    /// answers are given, against those. `keep_going` is asked after each token; `None` once it says no.
    pub fn answer(
        &mut self,
        item: &Item,
        contender: &Contender,
        full: Option<&Record>,
        mut keep_going: impl FnMut() -> bool,
    ) -> Result<Option<Record>, TaskError> {
        let mut record = Record {
            task: self.settings.task.name().into(),
            policy: contender.policy.clone(),
            strength: contender.strength.clone(),
            item: item.id.clone(),
            group: item.group.clone(),
            ..Record::default()
        };
        let mut stats = crate::skip::SkipStats::default();
        let mut agreement: Vec<Score> = Vec::new();
        let compares = self.settings.task != Task::FreebaseQa;
        for turn in 0..item.turns.len() {
            // The full model's words before this turn, where they are compared on this turn's.
            if let Some(full) = full.filter(|_| compares) {
                let prompt = self.prompt(item, &full.answers[..turn])?;
                agreement.extend(self.agreement(&prompt, &full.tokens[turn], &contender.skip)?);
            }
            let prompt = self.prompt(item, &record.answers)?;
            let Some(answer) = self.generate(&prompt, &contender.skip, &mut keep_going)? else {
                return Ok(None);
            };
            stats.add(self.session.skip_stats());
            record.answers.push(answer.text);
            record.tokens.push(answer.tokens);
            record.ended.push(answer.ended.into());
        }
        let layers = self.engine.model().layers();
        record.skipped = stats.share();
        record.bytes_skipped = stats.weighted_share(|layer| layers[layer].ffn.bytes() as u64);
        record.by_layer = stats.share_by_layer();
        record.scores = scores(self.settings.task, item, &record, full);
        add_agreement(&mut record.scores, &agreement);
        Ok(Some(record))
    }

    /// The tokens of the prompt of the turn that follows `answers`.
    fn prompt(&self, item: &Item, answers: &[String]) -> Result<Vec<u32>, TaskError> {
        let room = self.settings.context.saturating_sub(self.settings.max_tokens);
        let mut item = item.clone();
        loop {
            let tokens = self.encode(&item, answers)?;
            if tokens.len() <= room {
                return Ok(tokens);
            }
            // The end of a story is cut off; anything else must fit.
            let words: Vec<&str> = item.turns[0].split_whitespace().collect();
            let keep = (words.len() * room / tokens.len()).min(words.len().saturating_sub(1));
            if self.settings.task != Task::Summarize || keep < 16 {
                let (needed, context) = (tokens.len() + self.settings.max_tokens, self.settings.context);
                return Err(TaskError::TooLong { item: item.id, needed, context });
            }
            item.turns[0] = words[..keep].join(" ");
        }
    }

    fn encode(&self, item: &Item, answers: &[String]) -> Result<Vec<u32>, TaskError> {
        let tokenizer = self.engine.tokenizer();
        let Some(template) = &self.settings.template else {
            let text = self.ask(&item.turns[0]);
            return Ok(tokenizer.encode(&text, EncodeOptions { add_special: true, parse_special: false })?);
        };
        let mut messages: Vec<Message> = Vec::new();
        messages.extend(self.settings.system.iter().map(|text| Message::new("system", text)));
        for turn in 0..=answers.len() {
            let asked = match self.settings.task {
                Task::MtBench => item.turns[turn].clone(),
                _ => self.ask(&item.turns[turn]),
            };
            messages.push(Message::new("user", asked));
            messages.extend(answers.get(turn).map(|answer| Message::new("assistant", answer)));
        }
        let text = |id: Option<u32>| id.and_then(|id| tokenizer.token_text(id)).unwrap_or_default();
        let prompt = template.render(&messages, true, &text(tokenizer.bos()), &text(tokenizer.eos()))?;
        Ok(prompt.encode(tokenizer)?)
    }

    /// What the model is asked, in the words of the paper's appendix.
    fn ask(&self, subject: &str) -> String {
        match self.settings.task {
            Task::MtBench => subject.into(),
            Task::Summarize => {
                let end = if self.settings.template.is_none() { "\n\nSummary:" } else { "" };
                format!(
                    "Summarize the given story in less than 150 words while preserving high coherence, \
                     consistency, fluency, and relevance.\n\n{subject}{end}"
                )
            }
            Task::FreebaseQa if self.settings.shots.is_empty() => {
                format!("Please give answer to this question: {subject} The answer is")
            }
            Task::FreebaseQa => {
                let shot = |s: &Item| format!("Question: {}\nAnswer: {}\n\n", s.turns[0], s.references[0]);
                let shots: String = self.settings.shots.iter().map(shot).collect();
                format!("{shots}Question: {subject}\nAnswer:")
            }
        }
    }

    /// Brings the prompt into the cache, all but its last token, and starts `skip` from there. What the full model
    /// evaluated of the prompt before is not evaluated again.
    fn start(&mut self, prompt: &[u32], skip: &SkipOptions) -> Result<u32, TaskError> {
        let Some((&last, before)) = prompt.split_last() else {
            return Err(crate::session::SessionError::EmptyPrompt.into());
        };
        if skip.prefill {
            self.shared.clear();
            self.session.truncate(0);
            self.session.set_skip(skip)?;
            self.session.prompt(before, |_, _| true)?;
            return Ok(last);
        }
        if self.shared != before {
            // From the start: how a prompt is cut into batches must not depend on what ran before.
            self.session.truncate(0);
            self.session.set_skip(&SkipOptions::default())?;
            self.session.prompt(before, |_, _| true)?;
            self.shared = before.to_vec();
        }
        self.session.truncate(before.len());
        self.session.set_skip(skip)?;
        Ok(last)
    }

    fn generate(
        &mut self,
        prompt: &[u32],
        skip: &SkipOptions,
        keep_going: &mut impl FnMut() -> bool,
    ) -> Result<Option<Answer>, TaskError> {
        let last = self.start(prompt, skip)?;
        self.session.push(last)?;
        let stop = match (self.settings.task, &self.settings.template) {
            (Task::FreebaseQa, None) => StopMatcher::new(["\n"]),
            _ => StopMatcher::new(Vec::<String>::new()),
        };
        let mut sampler = Sampler::new(SamplerOptions::greedy())?;
        let sampling = Sampling { sampler: &mut sampler, constraint: None, stop, ignore_eos: false };
        let mut answer = Answer { text: String::new(), tokens: Vec::new(), ended: "length" };
        let mut generation = self.session.generate(sampling, self.settings.max_tokens);
        for piece in generation.by_ref() {
            let piece = piece?;
            answer.text.push_str(&piece.text);
            answer.tokens.push(piece.id);
            if !keep_going() {
                return Ok(None);
            }
        }
        answer.ended = match generation.end() {
            Some(End::EndOfGeneration) => "end",
            Some(End::StopString) => "stop",
            _ => "length",
        };
        answer.text = answer.text.trim().to_owned();
        Ok(Some(answer))
    }

    /// How the policy and the full model agree at each token of `answer`, the full model's own, after `prompt`.
    fn agreement(
        &mut self,
        prompt: &[u32],
        answer: &[u32],
        skip: &SkipOptions,
    ) -> Result<Vec<Score>, TaskError> {
        if answer.is_empty() {
            return Ok(Vec::new());
        }
        if self.teacher.prompt != prompt || self.teacher.answer != answer {
            self.teacher = self.teach(prompt, answer)?;
        }
        let last = self.start(prompt, skip)?;
        let teacher = std::mem::take(&mut self.teacher);
        let vocab = self.engine.model().config().vocab;
        let mut scores = Vec::new();
        self.follow(last, answer, FfnStep::Governed { index: 0 }, |on, from, logits, targets| {
            let exact = &teacher.exact[from..from + targets.len()];
            let probabilities = &teacher.probabilities[from * vocab..][..logits.len()];
            scores.extend(score_rows(on, logits, targets, Some((probabilities, exact))));
        })?;
        self.teacher = teacher;
        Ok(scores)
    }

    fn teach(&mut self, prompt: &[u32], answer: &[u32]) -> Result<Teacher, TaskError> {
        let last = self.start(prompt, &SkipOptions::default())?;
        let mut teacher = Teacher { prompt: prompt.to_vec(), answer: answer.to_vec(), ..Teacher::default() };
        self.follow(last, answer, FfnStep::Full, |on, _, logits, targets| {
            teacher.exact.extend(Exact::of(on, logits, targets));
            teacher.probabilities.extend_from_slice(logits);
        })?;
        Ok(teacher)
    }

    /// Evaluates the prompt's `last` token and `answer` but its own last, and shows the logits of [`ROWS`] positions at a
    /// time: `show(position in the answer, logits, the tokens that came)`. The cache is left as it was.
    fn follow(
        &mut self,
        last: u32,
        answer: &[u32],
        step: FfnStep,
        mut show: impl FnMut(crate::ops::Compute<'_>, usize, &mut [f32], &[u32]),
    ) -> Result<(), TaskError> {
        let (model, on) = (self.engine.model(), self.engine.compute());
        let state = self.session.state_mut();
        let start = state.position();
        let inputs: Vec<u32> =
            std::iter::once(last).chain(answer[..answer.len() - 1].iter().copied()).collect();
        let mut logits = Vec::new();
        for (i, tokens) in inputs.chunks(ROWS).enumerate() {
            let step = match step {
                FfnStep::Governed { index } => FfnStep::Governed { index: index + i * ROWS },
                FfnStep::Full => FfnStep::Full,
            };
            model.forward(on, state, tokens, step)?;
            logits.resize(tokens.len() * model.config().vocab, 0.0);
            model.logits_of(on, state, 0..tokens.len(), &mut logits);
            show(on, i * ROWS, &mut logits, &answer[i * ROWS..][..tokens.len()]);
        }
        state.truncate(start);
        Ok(())
    }
}

/// Divergence from the full model, nats a token, and how often the most likely token is the same.
fn add_agreement(scores: &mut BTreeMap<String, f64>, agreement: &[Score]) {
    let compared: Vec<(f64, f64, bool)> = agreement.iter().filter_map(|s| s.compared).collect();
    if compared.is_empty() {
        return;
    }
    let n = compared.len() as f64;
    scores.insert("kl".into(), compared.iter().map(|c| c.1).sum::<f64>() / n);
    scores.insert("same_top1".into(), compared.iter().filter(|c| c.2).count() as f64 / n);
}

/// The task's measures of an answer, by name; see `report::measures`.
fn scores(task: Task, item: &Item, record: &Record, full: Option<&Record>) -> BTreeMap<String, f64> {
    let mut scores = BTreeMap::new();
    let mut set = |name: &str, value: f64| {
        scores.insert(name.to_owned(), value);
    };
    let yes = |is: bool| f64::from(u8::from(is));
    let turns = record.answers.len().max(1) as f64;
    let mean = |of: &dyn Fn(&str, &[u32]) -> f64| {
        record.answers.iter().zip(&record.tokens).map(|(text, tokens)| of(text, tokens)).sum::<f64>() / turns
    };
    set("tokens", mean(&|_, tokens| tokens.len() as f64));
    if task == Task::FreebaseQa {
        let answer = &record.answers[0];
        set("exact", yes(text::exact(answer, &item.references)));
        set("contained", yes(text::contains(answer, &item.references)));
        if let Some(full) = full {
            set("same", yes(text::normalised(answer) == text::normalised(&full.answers[0])));
        }
        return scores;
    }
    let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    set("words", mean(&|text, _| words(text).len() as f64));
    for n in 1..=3 {
        set(&format!("distinct{n}"), mean(&|text, _| text::distinct(&words(text), n)));
    }
    set("repeat", mean(&|text, _| text::longest_repeat(&words(text)) as f64));
    let collapsed =
        record.answers.iter().zip(&record.tokens).any(|(text, tokens)| text::collapsed(text, tokens));
    set("collapsed", yes(collapsed));
    set("unfinished", yes(record.ended.iter().any(|e| e == "length")));
    if task == Task::Summarize {
        let rouge = text::rouge(&record.answers[0], &item.references[0]);
        for (key, value) in [("rouge1", rouge.one), ("rouge2", rouge.two), ("rougeL", rouge.l)] {
            set(key, value);
        }
        set("under150", yes(words(&record.answers[0]).len() < 150));
        if let Some(full) = full {
            let rouge = text::rouge(&record.answers[0], &full.answers[0]);
            for (key, value) in [("full1", rouge.one), ("full2", rouge.two), ("fullL", rouge.l)] {
                set(key, value);
            }
        }
    }
    scores
}
