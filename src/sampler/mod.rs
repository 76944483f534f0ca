//! Logits to token ids.
//!
//! A [`Sampler`] biases and penalises the logits, narrows the choice stage by stage, and draws from
//! what is left, with the stages, order and defaults of llama.cpp. A [`Constraint`] runs before it and
//! bans the tokens that a JSON schema or grammar does not allow; a [`StopMatcher`] runs on the
//! text after it.
//!
//! ```
//! use skiff::sampler::{Sampler, SamplerOptions};
//!
//! let options = SamplerOptions { seed: Some(1), ..SamplerOptions::default() };
//! let mut sampler = Sampler::new(options)?;
//! let mut logits = vec![0.0, 9.0, 1.0];
//! let id = sampler.sample(&mut logits);
//! sampler.accept(id);
//! assert_eq!(id, 1);
//! # Ok::<(), skiff::sampler::SamplerError>(())
//! ```

mod candidates;
mod constraint;
mod dry;
mod logprobs;
mod options;
mod penalties;
mod rng;
mod stop;
mod truncate;

#[cfg(test)]
mod tests;

pub use constraint::{Constraint, ConstraintError, TokenTable};
pub use dry::resolve_breakers;
pub use logprobs::{logprob, logprobs};
pub use options::{SamplerError, SamplerOptions, Stage};
pub use rng::Rng;
pub use stop::{StopMatcher, StopStep};

use candidates::{Buffers, Candidates, argmax};
use dry::Dry;
use penalties::Penalties;

/// Draws tokens for one sequence: options, random numbers, and the tokens seen so far.
///
/// Buffers are reused, so that sampling allocates nothing once they have grown.
#[derive(Clone, Debug)]
pub struct Sampler {
    options: SamplerOptions,
    seed: u64,
    rng: Rng,
    penalties: Penalties,
    dry: Dry,
    buffers: Buffers,
}

impl Sampler {
    /// A sampler with these options, if all are valid.
    ///
    /// DRY knows no sequence breakers until [`set_dry_breakers`](Self::set_dry_breakers) is called.
    pub fn new(options: SamplerOptions) -> Result<Self, SamplerError> {
        options.validate()?;
        let seed = options.seed.unwrap_or_else(rng::fresh_seed);
        Ok(Self {
            seed,
            rng: Rng::new(seed),
            penalties: Penalties::new(&options),
            dry: Dry::new(&options),
            buffers: Buffers::default(),
            options,
        })
    }

    /// The options in use.
    pub fn options(&self) -> &SamplerOptions {
        &self.options
    }

    /// The seed in use, also when the options named none.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Sets the token sequences over which DRY follows no repeat; see [`resolve_breakers`].
    pub fn set_dry_breakers(&mut self, sequences: &[Vec<u32>]) {
        self.dry.set_breakers(sequences);
    }

    /// Chooses the next token. It changes the logits, and does not [`accept`](Self::accept) the token.
    ///
    /// At a temperature of 0 this is the largest logit after bias and penalties, the lowest id among
    /// equals. NaN and `-inf` never win against a number; if there is nothing else, the result is
    /// an id that a constraint will refuse.
    pub fn sample(&mut self, logits: &mut [f32]) -> u32 {
        for &(id, bias) in &self.options.logit_bias {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit += bias;
            }
        }
        let mut candidates = Candidates::new(logits, &mut self.buffers);
        let greedy = self.options.temperature <= 0.0;
        for stage in &self.options.order {
            match stage {
                Stage::Penalties => self.penalties.apply(&mut candidates),
                Stage::Dry => self.dry.apply(&mut candidates),
                // What is left cannot change which token is the best.
                _ if greedy => {}
                Stage::TopK => truncate::top_k(&mut candidates, self.options.top_k),
                Stage::Typical => truncate::typical(&mut candidates, self.options.typical_p),
                Stage::TopP => truncate::top_p(&mut candidates, self.options.top_p),
                Stage::MinP => truncate::min_p(&mut candidates, self.options.min_p),
                Stage::Temperature => truncate::temperature(&mut candidates, self.options.temperature),
            }
        }
        if greedy { argmax(candidates.logits) } else { candidates.draw(&mut self.rng) }
    }

    /// Records a token of the prompt or of the reply, for the penalties.
    pub fn accept(&mut self, id: u32) {
        self.penalties.accept(id);
        self.dry.accept(id);
    }

    /// Forgets the tokens seen and starts the random numbers again.
    pub fn reset(&mut self) {
        self.rng = Rng::new(self.seed);
        self.penalties.reset();
        self.dry.reset();
    }
}
