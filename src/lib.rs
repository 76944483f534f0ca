//! skiff: LLaMA inference on CPUs, with adaptive FFN skipping.

pub mod chat;
pub mod gguf;
pub mod kernels;
pub mod pull;
pub mod quant;
pub mod weights;
pub mod ops;
pub mod skip;
pub mod model;
pub mod sampler;
pub mod threads;
pub mod tokenizer;
