//! Several sequences side by side: a step of the model evaluates a token of each and reads the weights once.

use std::ops::Range;

use super::writer::Writer;
use super::{End, Engine, Piece, SessionError};
use crate::model::{Buffers, FfnStep, KvType, ModelError, Part, Products, Sequence};
use crate::sampler::{Sampler, StopMatcher};
use crate::skip::SkipOptions;

/// What sequences that advance together share: the buffers of a step. Sequences come and go between steps.
pub struct Batch<'e> {
    engine: &'e Engine,
    buffers: Buffers,
    /// `[rows, vocab]` of the last [`logits`](Self::logits).
    logits: Vec<f32>,
}

/// A generation in progress among others.
pub struct Lane<'e> {
    /// What it continues; its policy governs every token from here on.
    pub sequence: Sequence,
    /// Evaluated in the next step.
    next: u32,
    /// Tokens that the policy has governed.
    governed: usize,
    sampler: Sampler,
    writer: Writer<'e>,
}

impl<'e> Batch<'e> {
    /// Steps of up to `rows` tokens.
    pub fn new(engine: &'e Engine, rows: usize, products: Products) -> Self {
        let buffers = Buffers::new(&engine.model, &engine.team, rows, products);
        Self { engine, buffers, logits: Vec::new() }
    }

    /// An empty sequence under the policy of `skip`.
    pub fn sequence(&self, context: usize, kv: KvType, skip: &SkipOptions) -> Result<Sequence, SessionError> {
        let policy = self.engine.model.policy(skip).map_err(ModelError::from)?;
        Ok(Sequence::new(&self.engine.model, context, kv, policy))
    }

    /// One step. Of many tokens, [`prompt`](Self::prompt) makes several.
    pub fn step(&mut self, parts: &mut [Part<'_>]) -> Result<(), SessionError> {
        let (one, several) = self.engine.threads();
        let alone = parts.len() == 1 && parts[0].tokens.len() == 1;
        self.engine.team.use_threads(if alone { one } else { several });
        Ok(self.engine.model.forward_parts(self.engine.compute(), &mut self.buffers, parts)?)
    }

    /// Logits of some rows of the last step, `[rows, vocab]`; they may be changed.
    pub fn logits(&mut self, rows: Range<usize>) -> &mut [f32] {
        let model = &self.engine.model;
        let n = rows.len() * model.config().vocab;
        if self.logits.len() < n {
            self.logits.resize(n, 0.0);
        }
        model.logits_of_parts(self.engine.compute(), &mut self.buffers, rows, &mut self.logits[..n]);
        &mut self.logits[..n]
    }

    /// Evaluates `tokens` of one sequence, as many in a step as fit; `governed`: the policy decides, and has governed so
    /// many tokens before.
    pub fn prompt(
        &mut self,
        sequence: &mut Sequence,
        tokens: &[u32],
        governed: Option<usize>,
    ) -> Result<(), SessionError> {
        let batch = self.buffers.batch();
        for (i, tokens) in tokens.chunks(batch).enumerate() {
            let step = governed.map_or(FfnStep::Full, |n| FfnStep::Governed { index: n + i * batch });
            self.step(&mut [Part { sequence: &mut *sequence, tokens, step }])?;
        }
        Ok(())
    }

    /// A generation of up to `max` tokens that goes on with `next`, which `sequence` does not hold yet. The policy starts
    /// with that token, `governed` tokens after its beginning.
    pub fn lane(
        &self,
        sequence: Sequence,
        (next, governed): (u32, usize),
        sampler: Sampler,
        stop: StopMatcher,
        max: usize,
    ) -> Lane<'e> {
        let writer = Writer::new(&self.engine.tokenizer, stop, false, max);
        Lane { sequence, next, governed, sampler, writer }
    }

    /// One token more for each of `lanes`, none of which has [ended](Lane::end); `heard(lane, piece)` gets what is to be
    /// shown of it.
    pub fn advance(
        &mut self,
        lanes: &mut [&mut Lane<'e>],
        mut heard: impl FnMut(usize, Piece),
    ) -> Result<(), SessionError> {
        let mut parts: Vec<Part<'_>> = Vec::with_capacity(lanes.len());
        for Lane { sequence, next, governed, .. } in lanes.iter_mut().map(|lane| &mut **lane) {
            let step = FfnStep::Governed { index: *governed };
            parts.push(Part { sequence, tokens: std::slice::from_ref(next), step });
        }
        self.step(&mut parts)?;
        let vocab = self.engine.model.config().vocab;
        let logits = self.logits(0..lanes.len());
        for (i, (lane, logits)) in lanes.iter_mut().zip(logits.chunks_exact_mut(vocab)).enumerate() {
            if let Some(piece) = lane.take(logits) {
                heard(i, piece);
            }
        }
        Ok(())
    }
}

impl Lane<'_> {
    /// Why the generation ended, once it has.
    pub fn end(&self) -> Option<End> {
        self.writer.end
    }

    /// The token that was sampled last and is not evaluated yet.
    pub fn next(&self) -> u32 {
        self.next
    }

    fn take(&mut self, logits: &mut [f32]) -> Option<Piece> {
        self.governed += 1;
        self.next = self.sampler.sample(logits);
        self.sampler.accept(self.next);
        let mut piece = self.writer.take(self.next);
        let full = self.sequence.position() >= self.sequence.context();
        let out_of =
            if self.writer.remaining == 0 { Some(End::Length) } else { full.then_some(End::ContextFull) };
        if let Some(end) = out_of.filter(|_| self.writer.end.is_none()) {
            // The token is the last one: what is held back after it is part of its piece.
            let rest = self.writer.finish(end, Some(self.next)).map_or(String::new(), |rest| rest.text);
            if let Some(piece) = &mut piece {
                piece.text.push_str(&rest);
            }
        }
        piece
    }
}
