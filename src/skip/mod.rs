//! FFN skipping: policies that decide, token by token and layer by layer, whether an FFN runs.
//!
//! A policy belongs to one sequence. The forward pass asks [`SkipPolicy::decide`] before each FFN and
//! reports the cosine of the residual stream before and after those that ran; nothing else in the
//! model knows about skipping. Attention runs, so every token has keys and values in every layer
//! (FFN-SkipLLM, Jaiswal et al., EMNLP 2024, arXiv 2404.03865). Some of the policies that the paper
//! compares with leave out whole layers; their tokens have keys and values all the same. Beside any of them most of the
//! output matrix can be left unread ([`Shortlisting`]).

mod baselines;
mod built_in;
mod cut;
mod ffn_skip;
mod shortlist;
mod stand_in;

mod calibration;
mod options;
mod stats;
mod uniform;

pub use baselines::{Random, ShortGpt, SkipDecode, Static};
pub use built_in::BUILT_IN;
pub use calibration::{
    Calibration, CalibrationError, Curve, CutCalibration, MixedCalibration, Point, StandInCalibration,
};
pub use cut::{Cut, CutPlan, CutSide, Depth, LayerCut};
pub use ffn_skip::FfnSkip;
pub use options::{ModelFacts, SkipChoice, SkipError, SkipMode, SkipOptions};
pub use shortlist::{OutputCalibration, Shortlisting};
pub use stand_in::StandIn;
pub use stats::SkipStats;
pub use uniform::Uniform;

/// Whether an FFN runs for a token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Decision {
    /// At full strength.
    Run,
    /// Not at all: the residual stream passes unchanged, and the weights are not read.
    Skip,
    /// Without the inputs and neurons below these thresholds, in layers that the model's [`CutPlan`] has;
    /// in others as [`Run`](Self::Run).
    Cut(Cut),
    /// Not at all, its [`StandIn`] in its place, if what that costs is foretold to be below a threshold and the model has one.
    StandIn {
        /// The threshold, a binary logarithm.
        below: f32,
        /// Else as [`Cut`](Self::Cut), or as [`Run`](Self::Run).
        otherwise: Option<Cut>,
    },
}

/// Decides about the FFNs of one sequence.
pub trait SkipPolicy: Send {
    /// Short name, as `--skip` takes it.
    fn name(&self) -> &'static str;

    /// The next token begins. `index` counts the tokens that the policy governs: the generated ones,
    /// or all of the sequence where the prompt is included.
    fn begin_token(&mut self, index: usize);

    /// Whether `layer` runs at all for the current token; asked once a layer, in order, before
    /// [`decide`](Self::decide), which is only asked for layers that do. Where it does not, the residual
    /// stream passes both attention and FFN unchanged; keys and values are still computed from it.
    fn runs_layer(&mut self, _layer: usize) -> bool {
        true
    }

    /// Whether the FFN of `layer` runs for the current token. Called once a layer, in order.
    fn decide(&mut self, layer: usize) -> Decision;

    /// Reports `cos(h, h + FFN(norm(h)))` of an FFN that ran; only called if [`observes`](Self::observes).
    fn observe(&mut self, _layer: usize, _cosine: f32) {}

    /// Whether the policy wants cosines: measuring costs a little.
    fn observes(&self) -> bool {
        false
    }

    /// Whether of the logits of a token that is governed only the likely ones need be exact.
    fn shortlists(&self) -> bool {
        false
    }

    /// Back to the state at the start of a sequence.
    fn reset(&mut self) {}

    /// A copy with the same state: rows of one step are governed side by side.
    fn boxed_clone(&self) -> Box<dyn SkipPolicy>;
}

/// Every FFN runs: bit-identical to having no policy.
#[derive(Clone, Debug, Default)]
pub struct Never;

impl SkipPolicy for Never {
    fn name(&self) -> &'static str {
        "off"
    }
    fn begin_token(&mut self, _: usize) {}
    fn decide(&mut self, _: usize) -> Decision {
        Decision::Run
    }
    fn boxed_clone(&self) -> Box<dyn SkipPolicy> {
        Box::new(self.clone())
    }
}
