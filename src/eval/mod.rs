//! How good is it: perplexity, divergence from the full model. Always through `model`'s forward pass.

mod npy;
mod perplexity;

pub use perplexity::{EvalError, PerplexityOptions, PerplexityReport, perplexity};
