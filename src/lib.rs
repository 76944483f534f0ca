//! skiff: LLaMA inference on CPUs, with adaptive FFN skipping.

pub mod gguf;
pub mod quant;
pub mod threads;
pub mod tokenizer;
pub mod sampler;
pub mod chat;
pub mod pull;
