//! Speed, measured as llama-bench measures it: prompts (`pp`) and generation (`tg`), at a depth of the context.
//!
//! A [`Run`] prepares one test (cache filled to its depth, a warm-up) and then repeats it as often as the caller likes;
//! around each repetition it times the limit with the same threads: a read of memory, or the kernels' integer
//! instruction on registers. What else the machine does thus
//! drifts through the speed and through the limit that it is judged by alike.

mod report;
mod rival;

use std::time::{Duration, Instant, SystemTime};

pub use report::{Report, Rival as RivalReport};
pub use rival::{Rival, RivalError};

use crate::kernels::Kernels;
use crate::machine::{Memory, int8_peak, read_sweep, sweep_buffer_of};
use crate::memory::Pages;
use crate::model::{FfnStep, KvType, Model, ModelError, State};
use crate::ops::Compute;
use crate::skip::{SkipOptions, SkipStats};
use crate::threads::Team;

/// Bytes of a sweep: more than the last-level caches of large servers hold.
const SWEEP_BYTES: u64 = 1 << 30;

/// Of so many the best counts: a pass takes less than a millisecond.
const PEAK_PASSES: usize = 20;

/// One test; either `prompt` or `generate` is 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Test {
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Tokens generated one at a time.
    pub generate: usize,
    /// Tokens in the cache before.
    pub depth: usize,
}

impl Test {
    /// Every prompt length and every generation length at every depth, in llama-bench's order; lengths of 0 are none.
    pub fn all(prompts: &[usize], generations: &[usize], depths: &[usize]) -> Vec<Self> {
        let at = |&depth: &usize| {
            let prompts = prompts.iter().map(move |&prompt| Self { prompt, generate: 0, depth });
            prompts.chain(generations.iter().map(move |&generate| Self { prompt: 0, generate, depth }))
        };
        depths.iter().flat_map(at).filter(|test| test.tokens() > 0).collect()
    }

    /// Tokens that are timed.
    pub fn tokens(&self) -> usize {
        self.prompt + self.generate
    }

    /// Positions that it needs.
    pub fn context(&self) -> usize {
        self.depth + self.tokens()
    }

    /// As llama-bench writes it: `pp512`, `tg128 @ d1024`.
    pub fn name(&self) -> String {
        let name =
            if self.prompt > 0 { format!("pp{}", self.prompt) } else { format!("tg{}", self.generate) };
        if self.depth > 0 { format!("{name} @ d{}", self.depth) } else { name }
    }
}

/// How tests run.
#[derive(Clone, Debug)]
pub struct BenchOptions {
    /// Prompt tokens evaluated at a time.
    pub batch: usize,
    /// How keys and values are stored.
    pub kv: KvType,
    /// FFN skipping.
    pub skip: SkipOptions,
    /// Keep the cache in memory.
    pub mlock: bool,
}

/// Memory that is read for comparison.
pub struct Sweep {
    buffer: Option<Pages<u64>>,
}

impl Sweep {
    /// Takes 1 GiB of memory, if that is to be had.
    pub fn new() -> Self {
        Self { buffer: sweep_buffer_of(Memory::read(), SWEEP_BYTES) }
    }

    /// Bytes a second.
    fn measure(&self, team: &Team) -> Option<f64> {
        self.buffer.as_ref().map(|buffer| read_sweep(team, buffer, 1))
    }
}

impl Default for Sweep {
    fn default() -> Self {
        Self::new()
    }
}

/// A test under way.
pub struct Run<'a> {
    model: &'a Model,
    on: Compute<'a>,
    test: Test,
    options: &'a BenchOptions,
    sweep: &'a Sweep,
    tokens: Vec<u32>,
    state: State,
    samples: Vec<Duration>,
    sweeps: Vec<f64>,
    peaks: Vec<f64>,
    stats: SkipStats,
    started: SystemTime,
}

impl<'a> Run<'a> {
    /// Fills the cache to the depth of the test and warms up. `go_on` is asked after each step.
    pub fn new(
        model: &'a Model,
        (team, kernels): (&'a Team, Kernels),
        test: Test,
        options: &'a BenchOptions,
        sweep: &'a Sweep,
        go_on: &dyn Fn() -> bool,
    ) -> Result<Self, ModelError> {
        let config = model.config();
        let policy = model.policy(&options.skip)?;
        let mut state = State::new(model, team, (test.context(), options.batch), options.kv, policy);
        if options.mlock {
            state.lock()?;
        }
        let mut run = Self {
            model,
            on: Model::compute(team, kernels),
            test,
            options,
            sweep,
            tokens: random_tokens(test.context(), config.vocab),
            state,
            samples: Vec::new(),
            sweeps: Vec::new(),
            peaks: Vec::new(),
            stats: SkipStats::new(config.layers),
            started: SystemTime::now(),
        };
        run.prompt(0, test.depth, false, go_on)?;
        run.pass(test.prompt, test.generate.min(1), go_on)?;
        run.measure_limits();
        Ok(run)
    }

    /// Runs the test once more; without a sample if `go_on` said no.
    pub fn repeat(&mut self, go_on: &dyn Fn() -> bool) -> Result<(), ModelError> {
        self.state.clear_stats();
        let time = self.pass(self.test.prompt, self.test.generate, go_on)?;
        if let Some(time) = time {
            self.samples.push(time);
            self.stats.add(self.state.stats());
            self.measure_limits();
        }
        Ok(())
    }

    /// The samples so far; `None` if there are none.
    pub fn report(&self) -> Option<Report> {
        (!self.samples.is_empty()).then(|| Report::new(self))
    }

    /// What generation and prompts are bound by.
    fn measure_limits(&mut self) {
        match self.test.prompt {
            0 => self.sweeps.extend(self.sweep.measure(self.on.team)),
            _ => self.peaks.extend(int8_peak(self.on.team, self.on.kernels, PEAK_PASSES)),
        }
    }

    /// From the test's depth on, so many tokens of a prompt and then one by one. `None` if it was stopped.
    fn pass(
        &mut self,
        prompt: usize,
        generate: usize,
        go_on: &dyn Fn() -> bool,
    ) -> Result<Option<Duration>, ModelError> {
        let depth = self.test.depth;
        self.state.truncate(depth);
        self.state.set_policy(self.model.policy(&self.options.skip)?);
        let started = Instant::now();
        self.prompt(depth, prompt, self.options.skip.prefill, go_on)?;
        if prompt > 0 {
            self.logits();
        }
        for index in 0..generate {
            let token = self.tokens[depth + prompt + index];
            let step = FfnStep::Governed { index: prompt + index };
            self.model.forward(self.on, &mut self.state, &[token], step)?;
            self.logits();
            if !go_on() {
                return Ok(None);
            }
        }
        let time = started.elapsed();
        Ok(go_on().then_some(time))
    }

    /// `n` tokens from position `first` on, in batches.
    fn prompt(
        &mut self,
        first: usize,
        n: usize,
        governed: bool,
        go_on: &dyn Fn() -> bool,
    ) -> Result<(), ModelError> {
        let mut index = 0;
        for batch in self.tokens[first..first + n].chunks(self.state.batch()) {
            if !go_on() {
                break;
            }
            let step = if governed { FfnStep::Governed { index } } else { FfnStep::Full };
            self.model.forward(self.on, &mut self.state, batch, step)?;
            index += batch.len();
        }
        Ok(())
    }

    fn logits(&mut self) {
        if let Some(row) = self.state.last_row() {
            self.model.logits(self.on, &mut self.state, row);
        }
    }
}

/// The same tokens every time: what they are changes no speed, unless FFNs are skipped.
fn random_tokens(n: usize, vocab: usize) -> Vec<u32> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % vocab as u64) as u32
    };
    (0..n).map(|_| next()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_are_named_and_ordered_as_llama_bench_does() {
        let names: Vec<String> = Test::all(&[512, 0], &[128], &[0, 64]).iter().map(Test::name).collect();
        assert_eq!(names, ["pp512", "tg128", "pp512 @ d64", "tg128 @ d64"]);
        assert!(Test::all(&[0], &[0], &[0, 5]).is_empty());
    }

    #[test]
    fn tokens_are_in_the_vocabulary_and_repeat() {
        let tokens = random_tokens(1000, 7);
        assert!(tokens.iter().all(|&id| id < 7) && (0..7).all(|id| tokens.contains(&id)));
        assert_eq!(tokens, random_tokens(1000, 7));
    }
}
