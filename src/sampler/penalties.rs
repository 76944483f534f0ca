//! Repetition, frequency and presence penalties over a window of recent tokens.

use std::collections::{HashMap, VecDeque};

use super::candidates::Candidates;
use super::options::SamplerOptions;

/// The last tokens, up to a number of them.
#[derive(Clone, Debug)]
pub(super) struct Window {
    tokens: VecDeque<u32>,
    limit: usize,
}

impl Window {
    /// A window of `last_n` tokens, or of all when it is negative.
    pub fn new(last_n: i32) -> Self {
        Self { tokens: VecDeque::new(), limit: usize::try_from(last_n).unwrap_or(usize::MAX) }
    }

    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// The token `i` steps back; 0 is the latest.
    pub fn back(&self, i: usize) -> u32 {
        self.tokens[self.tokens.len() - 1 - i]
    }

    /// Adds a token; the one that it pushed out, if any.
    pub fn push(&mut self, id: u32) -> Option<u32> {
        let dropped = if self.tokens.len() >= self.limit { self.tokens.pop_front() } else { None };
        if self.limit > 0 {
            self.tokens.push_back(id);
        }
        dropped
    }

    pub fn clear(&mut self) {
        self.tokens.clear();
    }
}

/// The window with how often each token occurs in it.
#[derive(Clone, Debug)]
pub(super) struct Penalties {
    repeat: f32,
    frequency: f32,
    presence: f32,
    window: Window,
    counts: HashMap<u32, u32>,
}

impl Penalties {
    pub fn new(options: &SamplerOptions) -> Self {
        Self {
            repeat: options.repeat_penalty,
            frequency: options.frequency_penalty,
            presence: options.presence_penalty,
            window: Window::new(options.repeat_last_n),
            counts: HashMap::new(),
        }
    }

    fn is_active(&self) -> bool {
        self.window.limit > 0 && (self.repeat != 1.0 || self.frequency != 0.0 || self.presence != 0.0)
    }

    pub fn accept(&mut self, id: u32) {
        if !self.is_active() {
            return;
        }
        *self.counts.entry(id).or_default() += 1;
        if let Some(dropped) = self.window.push(id)
            && let Some(count) = self.counts.get_mut(&dropped)
        {
            *count -= 1;
            if *count == 0 {
                self.counts.remove(&dropped);
            }
        }
    }

    pub fn reset(&mut self) {
        self.window.clear();
        self.counts.clear();
    }

    pub fn apply(&self, candidates: &mut Candidates<'_>) {
        if self.counts.is_empty() {
            return;
        }
        candidates.adjust(&self.counts, |logit, &count| {
            // Dividing a negative logit would make the token likelier.
            let scaled = if logit <= 0.0 { logit * self.repeat } else { logit / self.repeat };
            scaled - count as f32 * self.frequency - self.presence
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::candidates::Buffers;
    use super::*;

    fn penalised(options: &SamplerOptions, history: &[u32], logits: &[f32]) -> Vec<f32> {
        let mut penalties = Penalties::new(options);
        history.iter().for_each(|&id| penalties.accept(id));
        let mut logits = logits.to_vec();
        let mut buffers = Buffers::default();
        penalties.apply(&mut Candidates::new(&mut logits, &mut buffers));
        logits
    }

    #[test]
    fn repeat_penalty_divides_positive_and_multiplies_negative_logits() {
        let options = SamplerOptions { repeat_penalty: 2.0, ..SamplerOptions::default() };
        assert_eq!(penalised(&options, &[0, 1, 1], &[4.0, -4.0, 4.0]), [2.0, -8.0, 4.0]);
    }

    #[test]
    fn frequency_counts_and_presence_does_not() {
        let options =
            SamplerOptions { frequency_penalty: 0.5, presence_penalty: 0.25, ..SamplerOptions::default() };
        assert_eq!(penalised(&options, &[0, 1, 1, 1], &[1.0, 1.0, 1.0]), [0.25, -0.75, 1.0]);
    }

    #[test]
    fn only_the_last_n_tokens_count() {
        let options = SamplerOptions { presence_penalty: 1.0, repeat_last_n: 2, ..SamplerOptions::default() };
        assert_eq!(penalised(&options, &[0, 1, 2], &[0.0; 3]), [0.0, -1.0, -1.0]);
        let all = SamplerOptions { repeat_last_n: -1, ..options.clone() };
        assert_eq!(penalised(&all, &[0, 1, 2], &[0.0; 3]), [-1.0; 3]);
        let none = SamplerOptions { repeat_last_n: 0, ..options };
        assert_eq!(penalised(&none, &[0, 1, 2], &[0.0; 3]), [0.0; 3]);
    }

    #[test]
    fn ids_beyond_the_vocabulary_are_ignored() {
        let options = SamplerOptions { presence_penalty: 1.0, ..SamplerOptions::default() };
        assert_eq!(penalised(&options, &[7, u32::MAX], &[0.0]), [0.0]);
    }
}
