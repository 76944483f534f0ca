//! skiff: LLaMA inference on CPUs, with adaptive FFN skipping.

pub mod chat;
pub mod cli;
pub mod eval;
pub mod gguf;
pub mod kernels;
pub mod machine;
pub mod model;
pub mod ops;
pub mod pull;
pub mod quant;
pub mod sampler;
pub mod session;
pub mod skip;
pub mod threads;
pub mod tokenizer;
pub mod weights;
