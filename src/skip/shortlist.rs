//! What leaves most of the output matrix unread: which tokens are likely, a copy of it in 4 bits tells.

use super::{Decision, SkipPolicy};

/// What a model's output matrix is multiplied with, as calibration found it: most of the error that few bits make is where all
/// of these vectors are large.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OutputCalibration {
    /// Their mean, `[embedding]`.
    pub centre: Vec<f32>,
    /// Orthonormal directions in which they differ most from it, `[DIRECTIONS, embedding]`.
    pub directions: Vec<f32>,
}

impl OutputCalibration {
    /// How many: a block of the 4-bit type, beside those of the embedding.
    pub const DIRECTIONS: usize = 32;
}

/// What another policy decides about FFNs; of the logits only those of a shortlist, the likely tokens, need be exact.
pub struct Shortlisting {
    /// The name of both together.
    pub name: &'static str,
    /// The other policy.
    pub ffns: Box<dyn SkipPolicy>,
}

impl SkipPolicy for Shortlisting {
    fn name(&self) -> &'static str {
        self.name
    }

    fn begin_token(&mut self, index: usize) {
        self.ffns.begin_token(index);
    }

    fn runs_layer(&mut self, layer: usize) -> bool {
        self.ffns.runs_layer(layer)
    }

    fn decide(&mut self, layer: usize) -> Decision {
        self.ffns.decide(layer)
    }

    fn observe(&mut self, layer: usize, cosine: f32) {
        self.ffns.observe(layer, cosine);
    }

    fn observes(&self) -> bool {
        self.ffns.observes()
    }

    fn shortlists(&self) -> bool {
        true
    }

    fn reset(&mut self) {
        self.ffns.reset();
    }

    fn boxed_clone(&self) -> Box<dyn SkipPolicy> {
        Box::new(Self { name: self.name, ffns: self.ffns.boxed_clone() })
    }
}
