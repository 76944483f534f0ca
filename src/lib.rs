//! skiff runs LLaMA-family models on CPUs, and can skip FFN blocks whose effect on a token is small.
//!
//! This is the way of the data; nothing downstream is known upstream, and a test checks it:
//!
//! * [`memory`] has buffers in huge pages, [`topology`] what the system says of CPUs and their memory.
//! * [`gguf`] reads the bytes of a model file into a checked header: metadata and a table of tensors. [`quant`]
//!   knows what the blocks of each tensor type mean, in plain scalar code that everything else is tested against.
//!   [`weights`] maps the file and hands out tensors of the shape that was asked for; they are never copied.
//! * [`kernels`] has the SIMD code, in one table from which a kernel is chosen when the program starts.
//!   [`threads`] keeps a team of workers awake through a forward pass. [`ops`] puts both together: matrix products,
//!   norms, rotary embedding and attention over many threads, safe to call. [`machine`] tells what the hardware
//!   allows.
//! * [`skip`] decides which FFNs run. [`model`] is the transformer: a typed config, named layers, the key/value
//!   cache and the forward pass, which asks `skip` once a layer.
//! * [`tokenizer`] turns text into ids and back, [`chat`] messages into a prompt, [`sampler`] logits into the next
//!   id, within a JSON schema or a grammar if need be.
//! * [`session`] is where all mutable state meets: prompt in, an iterator of tokens out. [`eval`] measures what comes
//!   out.
//! * [`pull`] brings models to the cache, and [`cli`] is the `skiff` command.
//!
//! ```no_run
//! use skiff::sampler::{Sampler, SamplerOptions, StopMatcher};
//! use skiff::session::{Engine, Sampling, Session, SessionOptions};
//! use skiff::tokenizer::EncodeOptions;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let path = skiff::pull::resolve(Some("smollm2"))?;
//! let engine = Engine::load(&path, None, None)?;
//! let options = EncodeOptions { add_special: true, parse_special: false };
//! let prompt = engine.tokenizer().encode("Once upon a time", options)?;
//!
//! let mut session = Session::new(&engine, SessionOptions::default())?;
//! session.prompt(&prompt, |_done, _total| true)?;
//! let mut sampler = Sampler::new(SamplerOptions::greedy())?;
//! let sampling = Sampling {
//!     sampler: &mut sampler,
//!     constraint: None,
//!     stop: StopMatcher::new(["\n\n"]),
//!     ignore_eos: false,
//! };
//! for piece in session.generate(sampling, 50) {
//!     print!("{}", piece?.text);
//! }
//! # Ok(())
//! # }
//! ```

pub mod memory;
pub mod topology;

pub mod gguf;
pub mod quant;
pub mod weights;

pub mod kernels;
pub mod threads;

pub mod machine;
pub mod ops;

pub mod skip;

pub mod model;

pub mod tokenizer;

pub mod chat;
pub mod sampler;

pub mod session;

pub mod eval;

pub mod pull;

pub mod cli;
