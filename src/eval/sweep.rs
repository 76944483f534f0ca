//! Every policy at every strength, side by side: what is left unread, what that costs, and what time it saves.
//!
//! Windows of a text are evaluated one after the other: the full model once, then each contender, compared with the
//! full model's probabilities, of which those of one window are held at a time. Speed is that of decoding the text's own
//! tokens, a contender and the full model in turn, so that what else the machine does slows both down alike.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::EvalError;
use super::perplexity::{Exact, Sums, evaluate, score_rows};
use super::plot::{Plot, PlotError, Series, Style};
use crate::model::{FfnStep, KvType, Model, ModelError, State};
use crate::session::Engine;
use crate::skip::{Never, SkipOptions, SkipPolicy, SkipStats};

/// Most bytes that the full model's probabilities may take.
const MOST_BYTES: usize = 1 << 30;
/// Policy's name of another model that is compared.
const OTHER: &str = "(off)";

/// How to measure.
#[derive(Clone, Copy, Debug)]
pub struct SweepOptions {
    /// Tokens of a window.
    pub context: usize,
    /// Windows at most.
    pub windows: usize,
    /// First scored position of a window.
    pub warm: usize,
    /// How keys and values are stored.
    pub kv: KvType,
}

/// What is measured: a policy at a strength, or another model.
pub struct Contender<'e> {
    /// File name of the model.
    pub model: String,
    /// Name of the policy; `None` for another model in full.
    pub policy: Option<&'static str>,
    /// In words: `ratio 0.1`.
    pub strength: String,
    /// The policy; `warm_up` should not exceed the first scored position.
    pub skip: SkipOptions,
    /// The other model.
    pub other: Option<&'e Engine>,
}

/// What came out for a contender. KL is in nats, shares are 0 to 1.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Row {
    pub model: String,
    pub policy: String,
    pub strength: String,
    pub windows: usize,
    pub context: usize,
    pub warm: usize,
    /// Scored tokens.
    pub tokens: usize,
    /// Share of FFN blocks skipped, of all positions (those before the first scored one run in full).
    pub blocks: f64,
    /// Share of FFN weight bytes left unread, of all positions.
    pub ffn_bytes: f64,
    pub ppl: f64,
    /// Perplexity in units of the full model's.
    pub ppl_ratio: f64,
    pub kl: f64,
    pub kl_p99: f64,
    pub same_top1: f64,
    /// Weight bytes read to decode a token past the warm-up, in units of the full model's.
    pub read: f64,
    /// Decoding; `None` where it was not timed.
    pub tokens_per_second: Option<f64>,
    pub full_tokens_per_second: Option<f64>,
    /// Median of the ratios of each round.
    pub speedup: Option<f64>,
}

impl Row {
    /// The speed-up if time were proportional to the weight bytes read.
    pub fn ideal(&self) -> f64 {
        1.0 / self.read
    }

    /// Whether this is the row of `contender`, measured as `options` say.
    pub fn is_of(&self, contender: &Contender<'_>, options: &SweepOptions) -> bool {
        (&self.model, self.policy.as_str(), &self.strength)
            == (&contender.model, contender.name(), &contender.strength)
            && (self.windows, self.context, self.warm) == (options.windows, options.context, options.warm)
    }
}

impl Contender<'_> {
    fn name(&self) -> &'static str {
        self.policy.unwrap_or(OTHER)
    }
}

/// A contender's sums so far.
struct Entry<'e> {
    contender: Contender<'e>,
    /// Index in [`Sweep::states`].
    state: usize,
    policy: Option<Box<dyn SkipPolicy>>,
    sums: Sums,
    stats: SkipStats,
    /// Of positions past the warm-up.
    decoded: SkipStats,
    /// Seconds of each round, of the contender and of the full model.
    times: Vec<(f64, f64)>,
    timed: usize,
}

/// A sweep under way.
pub struct Sweep<'e> {
    engine: &'e Engine,
    tokens: &'e [u32],
    options: SweepOptions,
    /// The full model's, then each other model's.
    states: Vec<(&'e Engine, State)>,
    entries: Vec<Entry<'e>>,
    /// `[positions, vocab]` of the current window.
    probabilities: Vec<f32>,
}

impl<'e> Sweep<'e> {
    /// Checks everything that can be wrong. Windows are at most as many as the text has.
    pub fn new(
        engine: &'e Engine,
        tokens: &'e [u32],
        options: SweepOptions,
        contenders: Vec<Contender<'e>>,
    ) -> Result<Self, EvalError> {
        let SweepOptions { context, warm, windows, kv } = options;
        if warm + 1 >= context {
            return Err(EvalError::Warm { warm, context });
        }
        let windows = windows.min(tokens.len() / context);
        if windows == 0 {
            return Err(EvalError::TooShort { tokens: tokens.len(), context });
        }
        let bytes = (context - warm).saturating_mul(4 * engine.model().config().vocab);
        if bytes > MOST_BYTES {
            return Err(EvalError::TooLarge { context, bytes, most: MOST_BYTES });
        }
        let options = SweepOptions { windows, ..options };
        let state = |engine: &'e Engine| {
            let shape = (context, context.min(512));
            (engine, State::new(engine.model(), engine.team(), shape, kv, Box::new(Never)))
        };
        let mut sweep = Self {
            engine,
            tokens,
            options,
            states: vec![state(engine)],
            entries: Vec::new(),
            probabilities: Vec::new(),
        };
        for contender in contenders {
            let model = contender.other.unwrap_or(engine).model();
            let policy = model.policy(&contender.skip).map_err(ModelError::from)?;
            if let Some(other) = contender.other {
                check_vocabulary(engine, other, &contender.model)?;
                sweep.states.push(state(other));
            }
            let stats = || SkipStats::new(model.config().layers);
            let (state, policy) = (contender.other.map_or(0, |_| sweep.states.len() - 1), Some(policy));
            let (stats, decoded, sums) = (stats(), stats(), Sums::default());
            sweep.entries.push(Entry {
                contender,
                state,
                policy,
                sums,
                stats,
                decoded,
                times: Vec::new(),
                timed: 0,
            });
        }
        Ok(sweep)
    }

    /// Windows that will be evaluated.
    pub fn windows(&self) -> usize {
        self.options.windows
    }

    /// Contenders.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is no contender.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Evaluates window `index` for everyone. `step()` is called after each, the full model included, and stops the
    /// evaluation by returning false; false is then returned, and nothing of this window counts.
    pub fn window(&mut self, index: usize, step: &mut dyn FnMut() -> bool) -> Result<bool, EvalError> {
        let SweepOptions { context, warm, .. } = self.options;
        let window = &self.tokens[index * context..][..context];
        let scored = context - 1 - warm;
        let vocab = self.engine.model().config().vocab;
        let mut probabilities = std::mem::take(&mut self.probabilities);
        probabilities.resize(scored * vocab, 0.0);
        let mut exact = Vec::with_capacity(scored);
        let on = self.engine.compute();
        self.evaluate(0, window, false, |at, targets, logits| {
            let part = &mut probabilities[at * vocab..][..logits.len()];
            part.copy_from_slice(logits);
            exact.extend(Exact::of(on, part, targets));
        })?;
        let mut scores = Vec::new();
        let mut go_on = step();
        for i in 0..self.entries.len() {
            if !go_on {
                break;
            }
            self.enter(i);
            let (mut of_entry, on) = (Vec::new(), self.states[self.entries[i].state].0.compute());
            self.evaluate(self.entries[i].state, window, true, |at, targets, logits| {
                let n = targets.len();
                let full = (&probabilities[at * vocab..][..n * vocab], &exact[at..at + n]);
                of_entry.extend(score_rows(on, logits, targets, Some(full)));
            })?;
            scores.push((of_entry, self.leave(i)));
            go_on = step();
        }
        if scores.len() == self.entries.len() {
            for (entry, (scores, stats)) in self.entries.iter_mut().zip(scores) {
                scores.iter().for_each(|score| entry.sums.add(score));
                entry.stats.add(&stats);
            }
        }
        self.probabilities = probabilities;
        Ok(go_on)
    }

    /// Gives the entry's policy to the state that it runs on.
    fn enter(&mut self, i: usize) {
        let entry = &mut self.entries[i];
        let state = &mut self.states[entry.state].1;
        if let Some(policy) = entry.policy.take() {
            state.set_policy(policy);
        }
        state.clear_stats();
    }

    /// Takes it back; what it did.
    fn leave(&mut self, i: usize) -> SkipStats {
        let entry = &mut self.entries[i];
        let state = &mut self.states[entry.state].1;
        entry.policy = Some(state.set_policy(Box::new(Never)));
        state.stats().clone()
    }

    /// Evaluates a window with the policy that the state has, or in full: [`evaluate`] at the scored positions.
    fn evaluate(
        &mut self,
        state: usize,
        window: &[u32],
        governed: bool,
        each: impl FnMut(usize, &[u32], &mut [f32]),
    ) -> Result<(), EvalError> {
        let (engine, state) = &mut self.states[state];
        let scored = self.options.warm..window.len() - 1;
        evaluate(engine.model(), engine.compute(), state, (window, scored), governed, each)
    }

    /// Times contender `i`: in each of some windows, `n` tokens after the warm-up, decoded one by one by the full model and
    /// by the contender in turn. False if `step`, called after each, said to stop.
    pub fn time(
        &mut self,
        i: usize,
        n: usize,
        rounds: usize,
        step: &mut dyn FnMut() -> bool,
    ) -> Result<bool, EvalError> {
        let SweepOptions { context, warm, .. } = self.options;
        let n = n.min(context - warm.max(1));
        self.entries[i].timed = n;
        for round in 0..rounds {
            let window = &self.tokens[round % self.options.windows * context..][..context];
            let full = self.decode(0, window, n, FfnStep::Full)?;
            self.enter(i);
            let own = self.decode(self.entries[i].state, window, n, FfnStep::Governed { index: warm.max(1) });
            let stats = self.leave(i);
            self.entries[i].decoded.add(&stats);
            self.entries[i].times.push((own?.as_secs_f64(), full.as_secs_f64()));
            if !step() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Time to decode `n` tokens of a window, those up to the first scored position evaluated before.
    fn decode(
        &mut self,
        state: usize,
        window: &[u32],
        n: usize,
        step: FfnStep,
    ) -> Result<Duration, EvalError> {
        let (engine, state) = &mut self.states[state];
        let (model, on) = (engine.model(), engine.compute());
        let first = self.options.warm.max(1);
        state.truncate(0);
        for tokens in window[..first].chunks(state.batch()) {
            model.forward(on, state, tokens, FfnStep::Full)?;
        }
        let started = Instant::now();
        for (i, token) in window[first..first + n].iter().enumerate() {
            let step = match step {
                FfnStep::Governed { index } => FfnStep::Governed { index: index + i },
                FfnStep::Full => FfnStep::Full,
            };
            model.forward(on, state, &[*token], step)?;
            model.logits(on, state, 0);
        }
        Ok(started.elapsed())
    }

    /// The row of contender `i`, of `windows` windows evaluated so far.
    pub fn row(&self, i: usize, windows: usize) -> Row {
        let entry = &self.entries[i];
        let (full, model) = (self.engine.model(), self.states[entry.state].0.model());
        let report = entry.sums.clone().report(&entry.stats, model);
        let full_ppl = report.ppl_full.unwrap_or(f64::NAN);
        let decoded = if entry.times.is_empty() { &entry.stats } else { &entry.decoded };
        let mut speedups: Vec<f64> = entry.times.iter().map(|(own, full)| full / own).collect();
        let median = |times: &mut Vec<f64>| {
            times.sort_by(f64::total_cmp);
            times.get(times.len() / 2).copied()
        };
        let rate = |of: fn(&(f64, f64)) -> f64| {
            let mut times: Vec<f64> = entry.times.iter().map(of).collect();
            median(&mut times).map(|seconds| entry.timed as f64 / seconds)
        };
        Row {
            model: entry.contender.model.clone(),
            policy: entry.contender.name().into(),
            strength: entry.contender.strength.clone(),
            windows,
            context: self.options.context,
            warm: self.options.warm,
            tokens: report.tokens,
            blocks: report.ffn_skipped,
            ffn_bytes: report.ffn_bytes_skipped,
            ppl: report.ppl,
            ppl_ratio: report.ppl / full_ppl,
            kl: report.kl_mean.unwrap_or(f64::NAN),
            kl_p99: report.kl_p99.unwrap_or(f64::NAN),
            same_top1: report.same_top1.unwrap_or(f64::NAN),
            read: bytes_read(model, decoded) / full.decode_bytes() as f64,
            tokens_per_second: rate(|t| t.0),
            full_tokens_per_second: rate(|t| t.1),
            speedup: median(&mut speedups),
        }
    }
}

/// Weight bytes that a token read.
fn bytes_read(model: &Model, stats: &SkipStats) -> f64 {
    let ffn =
        model.ffn_bytes() as f64 * stats.weighted_share(|layer| model.layers()[layer].ffn.bytes() as u64);
    // Layers that are left out compute keys and values all the same.
    let attention = model.layers().iter().map(|l| l.attention.q.bytes() + l.attention.output.bytes());
    let layers = ffn + attention.sum::<usize>() as f64 * stats.layer_share();
    model.decode_bytes() as f64 - layers - stats.output_unread_by_token()
}

fn check_vocabulary(engine: &Engine, other: &Engine, name: &str) -> Result<(), EvalError> {
    let same = engine.model().config().vocab == other.model().config().vocab
        && engine.tokenizer().vocab_size() == other.tokenizer().vocab_size()
        && (0..engine.tokenizer().vocab_size() as u32)
            .all(|id| engine.tokenizer().token_bytes(id) == other.tokenizer().token_bytes(id));
    let model = engine.model().weights().path().display().to_string();
    if same { Ok(()) } else { Err(EvalError::OtherVocabulary { model, other: name.into() }) }
}

/// Whether each row is on the Pareto front: no other reads less at no more KL, or the same at less.
pub fn pareto(rows: &[Row]) -> Vec<bool> {
    let dominates = |a: &Row, b: &Row| a.read <= b.read && a.kl <= b.kl && (a.read < b.read || a.kl < b.kl);
    rows.iter().map(|row| !rows.iter().any(|other| dominates(other, row))).collect()
}

/// A picture of the rows: weight bytes read against the perplexity ratio, or with `speed` the speed-up.
pub fn plot(rows: &[Row], speed: bool) -> Result<String, PlotError> {
    let mut series: Vec<Series> = Vec::new();
    for row in rows {
        let name = if row.policy == OTHER { "another file, in full" } else { row.policy.as_str() };
        let x = if speed { row.speedup.unwrap_or(f64::NAN) } else { 100.0 * (1.0 - row.read) };
        let at = series.iter().position(|s| s.name == name).unwrap_or_else(|| {
            series.push(Series { name: name.into(), style: Style::LineAndDots, ..Default::default() });
            series.len() - 1
        });
        let series = &mut series[at];
        series.points.push((x, row.ppl_ratio));
        series.labels.push(if row.policy == OTHER { row.model.clone() } else { String::new() });
        if row.policy == OTHER {
            series.style = Style::Dots;
        }
    }
    let model = rows.iter().find(|row| row.policy != OTHER).map_or("", |row| row.model.as_str());
    let x_title = if speed { "decoding speed-up" } else { "weight bytes of a decoded token left unread, %" };
    let plot = Plot {
        title: format!("What skipping costs: {model}"),
        x_title: x_title.into(),
        y_title: "perplexity / full model's".into(),
        log_y: true,
        series,
    };
    plot.svg()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(policy: &str, read: f64, kl: f64) -> Row {
        Row {
            model: "m.gguf".into(),
            policy: policy.into(),
            strength: "ratio 0.1".into(),
            windows: 1,
            context: 512,
            warm: 32,
            tokens: 479,
            blocks: 0.1,
            ffn_bytes: 0.1,
            ppl: 20.0,
            ppl_ratio: 1.0 + kl,
            kl,
            kl_p99: kl,
            same_top1: 0.9,
            read,
            tokens_per_second: None,
            full_tokens_per_second: None,
            speedup: None,
        }
    }

    #[test]
    fn the_front_has_what_nothing_beats() {
        let rows = [
            row("a", 0.9, 0.1),
            row("b", 0.8, 0.1),
            row("c", 0.7, 0.3),
            row("d", 0.95, 0.01),
            row("e", 0.7, 0.4),
        ];
        assert_eq!(pareto(&rows), [false, true, true, true, false]);
        assert_eq!(pareto(&[row("a", 0.9, 0.1), row("b", 0.9, 0.1)]), [true, true]);
    }

    #[test]
    fn the_picture_has_every_policy_and_other_file() {
        let other = Row { model: "smaller.gguf".into(), ..row(OTHER, 0.85, 0.02) };
        let svg = plot(&[row("static", 0.9, 0.1), row("ffn-skip", 0.9, 0.2), other], false).unwrap();
        for text in ["static", "ffn-skip", "another file", "smaller.gguf", "m.gguf"] {
            assert!(svg.contains(text), "{text}");
        }
        assert!(plot(&[row("static", 0.9, 0.1)], true).is_err(), "nothing was timed");
    }
}
