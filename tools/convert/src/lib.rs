//! From a Hugging Face checkpoint to a quantised GGUF file. GGUF and quantisation are `skiff`'s; here is what it
//! takes to get there.
//!
//! ```text
//! source (checkpoint, GGUF file, random numbers) -> rows of f32 -> encode -> output (temporary name, then the final one)
//! ```
//!
//! * [`recipe`] says which type every tensor gets, as llama.cpp's mixes do.
//! * [`encode`] turns the rows of a tensor into blocks on all cores, a few megabytes at a time: no command ever holds
//!   a whole model.
//! * [`output`] writes a GGUF file that has its name only when it is whole.
//! * [`hf`], [`quantize`], [`imatrix`], [`shards`] (split and merge), [`verify`] and [`synth`] are the commands, [`cli`]
//!   is the command line.
#![forbid(unsafe_code)]

pub mod cli;
pub mod encode;
mod error;
pub mod hf;
pub mod imatrix;
pub mod output;
pub mod progress;
pub mod quantize;
pub mod recipe;
pub mod shards;
pub mod source;
pub mod synth;
pub mod verify;

pub use error::ConvertError;
