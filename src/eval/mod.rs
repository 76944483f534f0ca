//! How good and how fast is it: perplexity, divergence from the full model, answers to tasks, tokens a second. Always
//! through `model`'s
//! forward pass.

pub mod bench;
pub mod calibrate;
mod npy;
mod perplexity;
pub mod plot;
pub mod sweep;
pub mod tasks;
mod trial;

pub use perplexity::{EvalError, PerplexityOptions, PerplexityReport, perplexity};
pub use trial::Trial;
