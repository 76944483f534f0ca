//! Answering items under policies, many at a time.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use super::{Contender, Item, Record, Task, TaskError, text};
use crate::chat::{ChatTemplate, Message};
use crate::eval::perplexity::{Exact, Score, score_rows};
use crate::model::{FfnStep, KvCache, KvType, ModelError, Part, Products, Sequence};
use crate::sampler::{Sampler, SamplerOptions, StopMatcher};
use crate::session::{Batch, End, Engine, Lane, SessionError};
use crate::skip::{SkipOptions, SkipStats};
use crate::tokenizer::EncodeOptions;

/// Tokens of a prompt in a step.
const PROMPT_ROWS: usize = 512;
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

/// Puts items to a model, several answers side by side in each step.
///
/// What is answered does not depend on how many there are: every product is made as for many rows
/// ([`Products::AsForMany`]), and prompts are cut into the same steps whatever ran before.
pub struct Runner<'e> {
    engine: &'e Engine,
    settings: Settings,
    parallel: usize,
    batch: Batch<'e>,
    /// What all prompts begin with.
    preamble: Held,
    /// Sequences that nobody needs now.
    spare: Vec<Sequence>,
}

/// A sequence that holds `tokens`, evaluated in full.
struct Held {
    tokens: Vec<u32>,
    sequence: Sequence,
}

/// The cache of a sequence that held `tokens`.
struct Shared {
    tokens: Vec<u32>,
    cache: Arc<KvCache>,
}

/// An item whose answers are awaited.
struct Case<'a> {
    item: &'a Item,
    /// The prompt of its first turn but for the last token, evaluated in full; all its sequences begin with that.
    prompt: Shared,
    /// The full model's answers, once they are there.
    full: Option<Record>,
    /// What the full model says of each turn; made when first needed.
    teachers: Vec<Teacher>,
    /// Answers that are there before the full model's.
    waiting: Vec<(&'a Contender, Record)>,
    /// Answers that are to come.
    open: usize,
}

/// What the full model says at each position of its answer to a turn.
struct Teacher {
    /// The prompt's last token; the others are in `held`.
    last: u32,
    held: Held,
    answer: Vec<u32>,
    /// `[answer, vocab]`
    probabilities: Vec<f32>,
    exact: Vec<Exact>,
}

/// A contender answering a turn.
struct Seat<'a, 'e> {
    case: usize,
    contender: &'a Contender,
    /// Of the turns before.
    record: Record,
    stats: SkipStats,
    lane: Lane<'e>,
    text: String,
    tokens: Vec<u32>,
}

impl<'e> Runner<'e> {
    /// For a model that has been made ready for the policies, by rows. `parallel`: answers in a step, at most.
    pub fn new(engine: &'e Engine, settings: Settings, parallel: usize) -> Result<Self, TaskError> {
        if settings.template.is_none() && settings.task == Task::MtBench {
            return Err(TaskError::NoTemplate);
        }
        let batch = Batch::new(engine, PROMPT_ROWS.max(parallel), Products::AsForMany);
        let sequence = batch.sequence(settings.context, settings.kv, &SkipOptions::default())?;
        let preamble = Held { tokens: Vec::new(), sequence };
        let parallel = parallel.max(1);
        let mut runner = Self { engine, settings, parallel, batch, preamble, spare: Vec::new() };
        // Whatever is asked: the same as of two items that have nothing in common.
        let [a, b] = ["A", "9"].map(|turn| Item { turns: vec![turn.into()], ..Item::default() });
        let (a, b) = (runner.encode(&a, &[])?, runner.encode(&b, &[])?);
        let tokens = a[..common(&a, &b)].to_vec();
        if tokens.len() < runner.settings.context {
            runner.batch.prompt(&mut runner.preamble.sequence, &tokens, None)?;
            runner.preamble.tokens = tokens;
        }
        Ok(runner)
    }

    /// Has every contender answer every item, unless the answer is `known`, and scores the answers: against the references
    /// and, where the full model contends, against its answers. `answered` gets each as soon as it is complete, and again
    /// when it could be compared if it came before the full model's ([`Record::awaits_full`]). True when all are there;
    /// `keep_going` is asked after each step, and what is unfinished when it says no is dropped.
    pub fn answer_all(
        &mut self,
        items: &[Item],
        contenders: &[Contender],
        known: impl Fn(&Item, &Contender) -> Option<Record>,
        mut answered: impl FnMut(Record) -> Result<(), TaskError>,
        mut keep_going: impl FnMut() -> bool,
    ) -> Result<bool, TaskError> {
        // With more, answers of the last items would be waited for with hardly any work to share.
        let most_cases = 2 + self.parallel / contenders.len().max(1);
        let mut items = items.iter().enumerate();
        let mut cases: BTreeMap<usize, Case<'_>> = BTreeMap::new();
        let mut queue: VecDeque<(usize, &Contender)> = VecDeque::new();
        let mut seats: Vec<Seat<'_, 'e>> = Vec::new();
        loop {
            while seats.len() < self.parallel {
                if let Some((case, contender)) = queue.pop_front() {
                    seats.push(self.seat(case, &cases[&case], contender, Record::default())?);
                } else if cases.len() >= most_cases {
                    break;
                } else {
                    let Some((i, item)) = items.next() else { break };
                    let (case, open) = self.open(item, contenders, &known, &mut answered)?;
                    cases.extend(case.map(|case| (i, case)));
                    queue.extend(open.into_iter().map(|contender| (i, contender)));
                }
            }
            if seats.is_empty() {
                return Ok(true);
            }
            self.advance(&mut seats)?;
            if !keep_going() {
                return Ok(false);
            }
            while let Some(at) = seats.iter().position(|seat| seat.lane.end().is_some()) {
                let seat = seats.swap_remove(at);
                let Some(case) = cases.get_mut(&seat.case) else { continue };
                let (i, contender) = (seat.case, seat.contender);
                match self.leave(seat, case.item) {
                    (record, Some(stats)) => {
                        let mut seat = self.seat(i, case, contender, record)?;
                        seat.stats = stats;
                        seats.push(seat);
                    }
                    (record, None) => self.finish(case, contender, record, contenders, &mut answered)?,
                }
                if case.open == 0
                    && let Some(case) = cases.remove(&i)
                {
                    self.spare.extend(case.teachers.into_iter().map(|teacher| teacher.held.sequence));
                }
            }
        }
    }

    /// The case of an item, if anything is missing, and who has yet to answer. Answers that are `known` and only have to be
    /// compared with a known one of the full model are done at once.
    fn open<'a>(
        &mut self,
        item: &'a Item,
        contenders: &'a [Contender],
        known: &impl Fn(&Item, &Contender) -> Option<Record>,
        answered: &mut impl FnMut(Record) -> Result<(), TaskError>,
    ) -> Result<(Option<Case<'a>>, Vec<&'a Contender>), TaskError> {
        let (mut full, mut waiting, mut open) = (None, Vec::new(), Vec::new());
        for contender in contenders {
            match known(item, contender) {
                None => open.push(contender),
                Some(record) if record.awaits_full => waiting.push((contender, record)),
                Some(record) if contender.policy == "off" => full = Some(record),
                Some(_) => {}
            }
        }
        if open.is_empty() && waiting.is_empty() {
            return Ok((None, open));
        }
        let mut case = self.case(item)?;
        case.open = open.len() + waiting.len();
        (case.full, case.waiting) = (full, waiting);
        if case.full.is_some() {
            self.score_waiting(&mut case, answered)?;
        }
        Ok((Some(case).filter(|case| case.open > 0), open))
    }

    fn case<'a>(&mut self, item: &'a Item) -> Result<Case<'a>, TaskError> {
        let tokens = self.prompt(item, &[])?;
        let (_, before) = split_last(&tokens)?;
        // Not a spare one: its memory goes with the case.
        let Settings { context, kv, .. } = self.settings;
        let mut sequence = self.batch.sequence(context, kv, &SkipOptions::default())?;
        let shared = common(before, &self.preamble.tokens);
        sequence.copy_prefix(&self.preamble.sequence, shared);
        self.batch.prompt(&mut sequence, &before[shared..], None)?;
        let prompt = Shared { tokens: before.to_vec(), cache: sequence.into_kv() };
        Ok(Case { item, prompt, full: None, teachers: Vec::new(), waiting: Vec::new(), open: 0 })
    }

    /// A sequence without tokens.
    fn empty(&mut self) -> Result<Sequence, TaskError> {
        if let Some(mut sequence) = self.spare.pop() {
            sequence.truncate(0);
            return Ok(sequence);
        }
        let Settings { context, kv, .. } = self.settings;
        Ok(self.batch.sequence(context, kv, &SkipOptions::default())?)
    }

    /// `tokens` evaluated in full; what they share with `before` is not evaluated again.
    fn evaluated(&mut self, tokens: &[u32], before: &Shared) -> Result<Held, TaskError> {
        let shared = common(tokens, &before.tokens);
        let mut sequence = self.empty()?;
        sequence.share_prefix(&before.cache, shared);
        self.batch.prompt(&mut sequence, &tokens[shared..], None)?;
        Ok(Held { tokens: tokens.to_vec(), sequence })
    }

    /// Puts the turn that follows `record` to a contender.
    fn seat<'a>(
        &mut self,
        index: usize,
        case: &Case<'_>,
        contender: &'a Contender,
        record: Record,
    ) -> Result<Seat<'a, 'e>, TaskError> {
        let prompt = self.prompt(case.item, &record.answers)?;
        let (last, before) = split_last(&prompt)?;
        let policy = self.engine.model().policy(&contender.skip).map_err(ModelError::from)?;
        let (mut sequence, mut governed) = (self.empty()?, 0);
        if contender.skip.prefill {
            sequence.set_policy(policy);
            sequence.clear_stats();
            self.batch.prompt(&mut sequence, before, Some(0))?;
            governed = before.len();
        } else {
            self.spare.push(sequence);
            sequence = self.evaluated(before, &case.prompt)?.sequence;
            sequence.set_policy(policy);
            sequence.clear_stats();
        }
        let stop = match (self.settings.task, &self.settings.template) {
            (Task::FreebaseQa, None) => StopMatcher::new(["\n"]),
            _ => StopMatcher::new(Vec::<String>::new()),
        };
        let sampler = Sampler::new(SamplerOptions::greedy())?;
        let lane = self.batch.lane(sequence, (last, governed), sampler, stop, self.settings.max_tokens);
        let (text, tokens) = (String::new(), Vec::new());
        Ok(Seat { case: index, contender, record, stats: SkipStats::default(), lane, text, tokens })
    }

    /// One token more for each.
    fn advance(&mut self, seats: &mut [Seat<'_, 'e>]) -> Result<(), TaskError> {
        let tokenizer = self.engine.tokenizer();
        let mut lanes = Vec::with_capacity(seats.len());
        let mut answers = Vec::with_capacity(seats.len());
        for Seat { lane, text, tokens, .. } in seats {
            lanes.push(lane);
            answers.push((text, tokens));
        }
        self.batch.advance(&mut lanes, |i, piece| {
            let (text, tokens) = &mut answers[i];
            text.push_str(&piece.text);
            if !tokenizer.is_end_of_generation(piece.id) {
                tokens.push(piece.id);
            }
        })?;
        Ok(())
    }

    /// Adds the answer of a turn to those before. The counts so far, if there are more turns; else they are part of the
    /// record.
    fn leave(&mut self, seat: Seat<'_, 'e>, item: &Item) -> (Record, Option<SkipStats>) {
        let Seat { mut record, mut stats, lane, text, tokens, contender, .. } = seat;
        stats.add(lane.sequence.stats());
        record.answers.push(text.trim().to_owned());
        record.tokens.push(tokens);
        let ended = match lane.end() {
            Some(End::EndOfGeneration) => "end",
            Some(End::StopString) => "stop",
            _ => "length",
        };
        record.ended.push(ended.into());
        self.spare.push(lane.sequence);
        if record.answers.len() < item.turns.len() {
            return (record, Some(stats));
        }
        let layers = self.engine.model().layers();
        record.task = self.settings.task.name().into();
        (record.policy, record.strength) = (contender.policy.clone(), contender.strength.clone());
        (record.item, record.group) = (item.id.clone(), item.group.clone());
        let bytes = |layer: usize| layers[layer].ffn.bytes() as u64;
        record.skipped = stats.share();
        record.bytes_skipped = stats.weighted_share(bytes);
        record.by_layer = stats.weighted_share_by_layer(bytes);
        (record, None)
    }

    /// Hands an answer on. Before the full model's is there it can only be scored in part, and waits for the rest; the full
    /// model's brings that.
    fn finish<'a>(
        &mut self,
        case: &mut Case<'a>,
        contender: &'a Contender,
        mut record: Record,
        contenders: &[Contender],
        answered: &mut impl FnMut(Record) -> Result<(), TaskError>,
    ) -> Result<(), TaskError> {
        if contender.policy == "off" {
            case.full = Some(record.clone());
            self.score(case, contender, record, answered)?;
            return self.score_waiting(case, answered);
        }
        if case.full.is_some() || !contenders.iter().any(|c| c.policy == "off") {
            return self.score(case, contender, record, answered);
        }
        record.scores = scores(self.settings.task, case.item, &record, None);
        record.awaits_full = true;
        case.waiting.push((contender, record.clone()));
        answered(record)
    }

    fn score_waiting(
        &mut self,
        case: &mut Case<'_>,
        answered: &mut impl FnMut(Record) -> Result<(), TaskError>,
    ) -> Result<(), TaskError> {
        for (contender, record) in std::mem::take(&mut case.waiting) {
            self.score(case, contender, record, answered)?;
        }
        Ok(())
    }

    /// Scores an answer, also against the full model's if that is there.
    fn score(
        &mut self,
        case: &mut Case<'_>,
        contender: &Contender,
        mut record: Record,
        answered: &mut impl FnMut(Record) -> Result<(), TaskError>,
    ) -> Result<(), TaskError> {
        let full = case.full.as_ref().filter(|_| contender.policy != "off");
        record.scores = scores(self.settings.task, case.item, &record, full);
        record.awaits_full = false;
        if full.is_some() && self.settings.task != Task::FreebaseQa {
            let mut agreement = Vec::new();
            for turn in 0..case.item.turns.len() {
                agreement.extend(self.agreement(case, turn, &contender.skip)?);
            }
            add_agreement(&mut record.scores, &agreement);
        }
        case.open -= 1;
        answered(record)
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

    /// How the policy and the full model agree at each token of the full model's answer to a turn.
    fn agreement(
        &mut self,
        case: &mut Case<'_>,
        turn: usize,
        skip: &SkipOptions,
    ) -> Result<Vec<Score>, TaskError> {
        if case.teachers.len() <= turn {
            let teacher = self.teach(case, turn)?;
            case.teachers.push(teacher);
        }
        let Teacher { last, held, answer, probabilities, exact } = &mut case.teachers[turn];
        if answer.is_empty() {
            return Ok(Vec::new());
        }
        let policy = self.engine.model().policy(skip).map_err(ModelError::from)?;
        let (mut own, mut index) = (None, 0);
        let sequence = match skip.prefill {
            false => &mut held.sequence,
            true => {
                index = held.tokens.len();
                own.insert(self.empty()?)
            }
        };
        sequence.set_policy(policy);
        if skip.prefill {
            self.batch.prompt(sequence, &held.tokens, Some(0))?;
        }
        let vocab = self.engine.model().config().vocab;
        let mut scores = Vec::new();
        let step = FfnStep::Governed { index };
        self.follow(sequence, *last, answer, step, |on, from, logits, targets| {
            let exact = &exact[from..from + targets.len()];
            let probabilities = &probabilities[from * vocab..][..logits.len()];
            scores.extend(score_rows(on, logits, targets, Some((probabilities, exact))));
        })?;
        self.spare.extend(own);
        Ok(scores)
    }

    fn teach(&mut self, case: &Case<'_>, turn: usize) -> Result<Teacher, TaskError> {
        let (answers, answer) = match &case.full {
            Some(full) => (full.answers[..turn].to_vec(), full.tokens[turn].clone()),
            None => Default::default(),
        };
        let prompt = self.prompt(case.item, &answers)?;
        let (last, before) = split_last(&prompt)?;
        let mut held = self.evaluated(before, &case.prompt)?;
        let (mut exact, mut probabilities) = (Vec::new(), Vec::new());
        if !answer.is_empty() {
            self.follow(&mut held.sequence, last, &answer, FfnStep::Full, |on, _, logits, targets| {
                exact.extend(Exact::of(on, logits, targets));
                probabilities.extend_from_slice(logits);
            })?;
        }
        Ok(Teacher { last, held, answer, probabilities, exact })
    }

    /// Evaluates the prompt's `last` token and `answer` but its own last, and shows the logits of [`ROWS`] positions at a
    /// time: `show(position in the answer, logits, the tokens that came)`. The cache is left as it was.
    fn follow(
        &mut self,
        sequence: &mut Sequence,
        last: u32,
        answer: &[u32],
        step: FfnStep,
        mut show: impl FnMut(crate::ops::Compute<'_>, usize, &mut [f32], &[u32]),
    ) -> Result<(), TaskError> {
        let start = sequence.position();
        let inputs: Vec<u32> =
            std::iter::once(last).chain(answer[..answer.len() - 1].iter().copied()).collect();
        for (i, tokens) in inputs.chunks(ROWS).enumerate() {
            let step = match step {
                FfnStep::Governed { index } => FfnStep::Governed { index: index + i * ROWS },
                FfnStep::Full => FfnStep::Full,
            };
            self.batch.step(&mut [Part { sequence: &mut *sequence, tokens, step }])?;
            let logits = self.batch.logits(0..tokens.len());
            show(self.engine.compute(), i * ROWS, logits, &answer[i * ROWS..][..tokens.len()]);
        }
        sequence.truncate(start);
        Ok(())
    }
}

/// How many tokens two texts begin with alike.
fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

fn split_last(prompt: &[u32]) -> Result<(u32, &[u32]), TaskError> {
    prompt.split_last().map(|(&last, before)| (last, before)).ok_or(SessionError::EmptyPrompt.into())
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
