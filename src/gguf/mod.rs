//! GGUF: bytes to header, metadata and tensor table. Nothing here knows a model or maps a file.
//!
//! A file is hostile until [`Gguf::parse`] has returned `Ok`. After that the following holds, and the
//! rest of the crate relies on it:
//!
//! * every count and length was checked against the bytes that were left before anything was allocated;
//! * metadata keys and tensor names are UTF-8, unique and short; values have known types;
//! * every tensor has a supported [`GgmlType`], 1 to 4 nonzero dimensions, rows of whole blocks, and data
//!   that is aligned, inside the file and disjoint from that of every other tensor;
//! * the tokenizer's arrays are of one length and its special tokens exist ([`validate_tokenizer`]).
//!
//! ```text
//! bytes -> reader -> Metadata, [TensorInfo] -> Gguf -> split (several files, one model)
//! Builder -> Writer -> bytes
//! ```
#![forbid(unsafe_code)]

mod error;
mod types;
mod value;

mod metadata;
mod tensor;
mod vocabulary;

mod reader;
mod split;
mod writer;

pub use error::{Error, Place};
pub use metadata::Metadata;
pub use reader::Gguf;
pub use split::{ShardName, ShardSet, SplitInfo};
pub use tensor::TensorInfo;
pub use types::GgmlType;
pub use value::{Array, StringArray, Value, ValueType};
pub use vocabulary::validate_tokenizer;
pub use writer::{Builder, WriteError, Writer};

/// The four bytes that every GGUF file starts with.
const MAGIC: [u8; 4] = *b"GGUF";

/// The longest metadata key that the format allows.
const MAX_KEY_BYTES: u64 = 65535;

/// The longest tensor name accepted: twice what ggml holds (`GGML_MAX_NAME`), less the terminating zero.
const MAX_TENSOR_NAME_BYTES: u64 = 127;
