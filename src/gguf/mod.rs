//! GGUF: bytes to header, metadata and tensor table. Nothing here knows a model or maps a file.
#![forbid(unsafe_code)]

mod types;

pub use types::GgmlType;
