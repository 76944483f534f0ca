//! The tokens still in the running.
//!
//! Until a stage narrows the choice, the candidates *are* the logits: penalties touch the few entries
//! that they concern, and no list of the vocabulary is built. Afterwards they are a short list.
//!
//! The list is always in an order that its contents determine (by token id, or by falling logit
//! with ties by id), never one left behind by an unstable selection: the random draw walks
//! it, so the order is part of what a seed reproduces.

use std::cmp::Ordering;
use std::collections::HashMap;

use super::rng::Rng;

/// A token and its logit, which is never NaN nor `-inf`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Candidate {
    pub id: u32,
    pub logit: f32,
}

/// Most likely first, ties by the lower id: a total order, because NaN is kept out.
pub(super) fn by_rank(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.partial_cmp(&a.logit).unwrap_or(Ordering::Equal).then(a.id.cmp(&b.id))
}

/// Buffers that outlive a token.
#[derive(Clone, Debug, Default)]
pub(super) struct Buffers {
    pub items: Vec<Candidate>,
    pub weights: Vec<f64>,
    /// Candidates with the key by which typical sampling ranks them.
    pub keyed: Vec<(f64, Candidate)>,
}

/// The candidates for one token.
pub(super) struct Candidates<'a> {
    pub logits: &'a mut [f32],
    pub buffers: &'a mut Buffers,
    /// Whether `buffers.items` has taken over from `logits`.
    pub narrowed: bool,
}

impl<'a> Candidates<'a> {
    pub fn new(logits: &'a mut [f32], buffers: &'a mut Buffers) -> Self {
        buffers.items.clear();
        Self { logits, buffers, narrowed: false }
    }

    /// Moves to the list form, in id order.
    pub fn narrow(&mut self) {
        self.narrow_to(f32::NEG_INFINITY);
    }

    /// Moves to the list form with the tokens whose logit is at least `floor`, in id order.
    pub fn narrow_to(&mut self, floor: f32) {
        if self.narrowed {
            self.buffers.items.retain(|c| c.logit >= floor);
        } else {
            self.narrowed = true;
            let usable = usable(self.logits).filter(|c| c.logit >= floor);
            self.buffers.items.extend(usable);
        }
    }

    /// Replaces the logits of the tokens in `changes` by `change(logit, value)`.
    pub fn adjust<V>(&mut self, changes: &HashMap<u32, V>, change: impl Fn(f32, &V) -> f32) {
        if self.narrowed {
            for candidate in &mut self.buffers.items {
                if let Some(value) = changes.get(&candidate.id) {
                    candidate.logit = change(candidate.logit, value);
                }
            }
            self.buffers.items.retain(|c| is_usable(c.logit));
            self.buffers.items.sort_unstable_by(by_rank);
        } else {
            for (&id, value) in changes {
                if let Some(logit) = self.logits.get_mut(id as usize) {
                    *logit = change(*logit, value);
                }
            }
        }
    }

    /// The largest logit; `-inf` when there is none.
    pub fn max(&self) -> f32 {
        if self.narrowed {
            self.buffers.items.iter().fold(f32::NEG_INFINITY, |max, c| max.max(c.logit))
        } else {
            max(self.logits)
        }
    }

    /// Draws one token with probability softmax(logits).
    pub fn draw(&mut self, rng: &mut Rng) -> u32 {
        self.narrow();
        let max = self.max();
        let Buffers { items, weights, .. } = &mut *self.buffers;
        if items.is_empty() {
            return argmax(self.logits);
        }
        weights.clear();
        weights.extend(items.iter().map(|c| weight(c.logit, max)));
        items[pick(weights, rng.next_f64())].id
    }
}

/// The index at which the running sum of `weights` passes `at` (in `[0, 1)`) of the whole.
fn pick(weights: &[f64], at: f64) -> usize {
    let mut left = at * weights.iter().sum::<f64>();
    let mut last = 0;
    for (i, &weight) in weights.iter().enumerate().filter(|(_, w)| **w > 0.0) {
        // Rounding may leave a crumb after the last weight, hence `last`.
        last = i;
        left -= weight;
        if left < 0.0 {
            break;
        }
    }
    last
}

/// `exp(logit - max)`, where an infinite logit outweighs every finite one.
pub(super) fn weight(logit: f32, max: f32) -> f64 {
    if max == f32::INFINITY { f64::from(u8::from(logit == max)) } else { f64::from((logit - max).exp()) }
}

/// The tokens that may be sampled: neither NaN nor banned.
pub(super) fn usable(logits: &[f32]) -> impl Iterator<Item = Candidate> + '_ {
    let ids = 0..=u32::MAX;
    ids.zip(logits).map(|(id, &logit)| Candidate { id, logit }).filter(|c| is_usable(c.logit))
}

fn is_usable(logit: f32) -> bool {
    logit > f32::NEG_INFINITY
}

/// The largest logit, NaN aside; `-inf` when there is none.
pub(super) fn max(logits: &[f32]) -> f32 {
    // Independent lanes let the compiler use SIMD. A comparison with NaN is false, so NaN never wins.
    const LANES: usize = 16;
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = logits.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &logit) in lanes.iter_mut().zip(chunk) {
            *lane = if logit > *lane { logit } else { *lane };
        }
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |max, &x| if x > max { x } else { max })
}

/// The id of the largest logit, the lowest id among equals; 0 when there is none but NaN.
pub(super) fn argmax(logits: &[f32]) -> u32 {
    let max = max(logits);
    let id = logits.iter().position(|&logit| logit == max).unwrap_or(0);
    u32::try_from(id).unwrap_or(0)
}
