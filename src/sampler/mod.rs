//! Logits to token ids.

mod stop;

pub use stop::{StopMatcher, StopStep};
