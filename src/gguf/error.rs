//! What can be wrong with a GGUF file. Every variant carries the datum that a user needs to find the fault.

use super::GgmlType;

/// A fault in the bytes of a GGUF file, or in a set of split files.
///
/// Keys and names come from the file, so messages print them escaped.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)] // the fields are named for what the message prints
pub enum Error {
    #[error("not a GGUF file: it starts with \"{}\" instead of \"GGUF\"", found.escape_ascii())]
    BadMagic { found: [u8; 4] },
    #[error("GGUF version {version} in big-endian byte order: only little-endian files are supported")]
    BigEndian { version: u32 },
    #[error("GGUF version {found} is not supported (expected 2 or 3)")]
    UnsupportedVersion { found: u32 },

    #[error("file ends {place}: {needed} bytes needed at offset {offset}, {remaining} remain")]
    Truncated { place: Place, offset: u64, needed: u64, remaining: u64 },
    #[error("{count} {what} {place} cannot fit into the {remaining} bytes that remain")]
    CountTooLarge { what: &'static str, place: Place, count: u64, remaining: u64 },
    #[error("invalid UTF-8 {place} (offset {offset})")]
    InvalidUtf8 { place: Place, offset: u64 },
    #[error("string {place} is {found} bytes long (at most {max})")]
    NameTooLong { place: Place, found: u64, max: u64 },

    #[error("metadata key {key:?} appears twice")]
    DuplicateKey { key: String },
    #[error("metadata key {key:?} has the unknown value type {found}")]
    UnknownValueType { key: String, found: u32 },
    #[error("metadata key {key:?} is an array of arrays, which is not supported")]
    NestedArray { key: String },
    #[error("metadata key {key:?} holds a boolean of value {found} at offset {offset} (expected 0 or 1)")]
    InvalidBool { key: String, offset: u64, found: u8 },
    #[error("general.alignment is {found} (expected a power of two up to {max})")]
    InvalidAlignment { found: u64, max: u64 },

    #[error("metadata key {key:?} is missing")]
    MissingKey { key: String },
    #[error("metadata key {key:?} is of type {found} (expected {expected})")]
    WrongType { key: String, expected: &'static str, found: String },
    #[error("metadata key {key:?} holds {found}, which is no {expected}")]
    OutOfRange { key: String, expected: &'static str, found: String },
    #[error("the string of metadata key {key:?} is not UTF-8")]
    StringNotUtf8 { key: String },

    #[error("tensor name {name:?} appears twice")]
    DuplicateTensor { name: String },
    #[error("tensor {tensor:?} has {found} dimensions (expected 1 to 4)")]
    InvalidDimensions { tensor: String, found: u32 },
    #[error("dimension {dimension} of tensor {tensor:?} is zero")]
    ZeroDimension { tensor: String, dimension: usize },
    #[error("tensor {tensor:?} has more elements than can be counted: shape {shape:?}")]
    SizeOverflow { tensor: String, shape: Vec<u64> },
    #[error("tensor {tensor:?} has type {}, which is not supported", type_name(*id))]
    UnsupportedType { tensor: String, id: u32 },
    #[error("rows of tensor {tensor:?} have {row} elements, not a multiple of the {} in a block of {ty}", ty.block_len())]
    PartialBlock { tensor: String, ty: GgmlType, row: u64 },
    #[error("data of tensor {tensor:?} is at offset {offset}, not a multiple of the alignment {alignment}")]
    MisalignedTensor { tensor: String, offset: u64, alignment: u64 },
    #[error(
        "data of tensor {tensor:?} lies outside the file: {n_bytes} bytes at data offset {offset}, data starts at {data_start}, file length {file_len}"
    )]
    TensorOutsideFile { tensor: String, offset: u64, n_bytes: u64, data_start: u64, file_len: u64 },
    #[error("data of tensors {first:?} and {second:?} overlap")]
    OverlappingTensors { first: String, second: String },

    #[error("metadata key {key:?} has {found} elements for a vocabulary of {expected} tokens")]
    TokenArrayLength { key: String, expected: usize, found: usize },
    #[error("metadata key {key:?} is token {id}, but the vocabulary has {vocabulary} tokens")]
    TokenIdOutOfRange { key: String, id: u64, vocabulary: usize },

    #[error("split.no is {no} in a model split into {count} files")]
    InvalidSplit { no: u64, count: u64 },
    #[error("{file:?} belongs to a split model, but is not named like \"name-00001-of-00003.gguf\"")]
    ShardName { file: String },
    #[error("{file:?} is not part of a split model (no split.count)")]
    NotAShard { file: String },
    #[error(
        "{file:?} is file {found_no} of {found_count} by its header (numbered from 0), by its name {no} of {count}"
    )]
    ShardMismatch { file: String, no: u32, count: u32, found_no: u32, found_count: u32 },
    #[error(
        "{file:?} says that it is file {no} (numbered from 0) of the split model, as {first:?} already does"
    )]
    DuplicateShard { file: String, no: u32, first: String },
    #[error("{file:?} is from another split model: {what} is {found} (expected {expected})")]
    ForeignShard { file: String, what: &'static str, expected: String, found: String },
    #[error("tensor {tensor:?} of {file:?} is already in {first:?}")]
    TensorInTwoShards { tensor: String, file: String, first: String },
    #[error("file {file:?} of the split model is missing")]
    MissingShard { file: String },
    #[error("split.tensors.count promises {expected} tensors, the files hold {found}")]
    SplitTensorCount { expected: u64, found: u64 },
}

/// The part of the header that an error is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// The fixed fields at the start.
    Header,
    /// The key of the metadata entry with this number.
    Key(u64),
    /// The value of the metadata entry with this key.
    Value(String),
    /// The name of the tensor with this number.
    TensorName(u64),
    /// The description of the tensor with this name.
    Tensor(String),
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Header => write!(f, "in the header"),
            Self::Key(i) => write!(f, "in the key of metadata entry {i}"),
            Self::Value(key) => write!(f, "in the value of metadata key {key:?}"),
            Self::TensorName(i) => write!(f, "in the name of tensor {i}"),
            Self::Tensor(name) => write!(f, "in the description of tensor {name:?}"),
        }
    }
}

/// ggml's name of a type id, or the number if ggml does not know it either.
fn type_name(id: u32) -> String {
    GgmlType::ggml_name(id).map_or_else(|| format!("number {id}"), String::from)
}
