//! Writing GGUF version 3: a [`Builder`] collects metadata and tensor descriptions, a [`Writer`] streams the
//! data of the tensors, in the order in which they were described.

use super::value::{Array, Value};
use super::{Error, GgmlType, MAGIC, MAX_KEY_BYTES, MAX_TENSOR_NAME_BYTES, Metadata, TensorInfo};
use super::{error::Place, tensor};
use std::{collections::HashSet, io};

const VERSION: u32 = 3;

/// Why a file could not be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)] // the fields are named for what the message prints
pub enum WriteError {
    /// The file would not be a valid one.
    #[error(transparent)]
    Invalid(#[from] Error),
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("tensor {tensor:?} takes {expected} bytes, {found} were written")]
    TensorSize { tensor: String, expected: u64, found: u64 },
    #[error("all {count} tensors are written already")]
    NoTensorLeft { count: usize },
    #[error("tensor {tensor:?} is not written")]
    TensorMissing { tensor: String },
}

/// What a file is going to hold: metadata, and tensors without their data.
#[derive(Clone, Debug, Default)]
pub struct Builder {
    metadata: Metadata,
    /// Offsets are 0 until [`start`](Self::start).
    tensors: Vec<TensorInfo>,
    names: HashSet<String>,
}

impl Builder {
    /// A file without metadata and tensors.
    pub fn new() -> Self {
        Self::default()
    }

    /// A file that begins with the metadata of another.
    pub fn with_metadata(metadata: Metadata) -> Self {
        Self { metadata, ..Self::default() }
    }

    /// Appends a metadata entry. `general.alignment` sets the alignment of the data.
    pub fn insert(&mut self, key: impl Into<String>, value: impl Into<Value>) -> Result<(), Error> {
        self.metadata.insert(key, value)
    }

    /// Appends a tensor; `shape` has the contiguous dimension first.
    pub fn tensor(&mut self, name: impl Into<String>, ty: GgmlType, shape: &[u64]) -> Result<(), Error> {
        let name = name.into();
        let place = Place::TensorName(self.tensors.len() as u64);
        check_length(place, &name, MAX_TENSOR_NAME_BYTES)?;
        let n_bytes = tensor::byte_len(&name, ty, shape)?;
        if !self.names.insert(name.clone()) {
            return Err(Error::DuplicateTensor { name });
        }
        self.tensors.push(TensorInfo { name, ty, shape: shape.to_vec(), offset: 0, n_bytes });
        Ok(())
    }

    /// The tensors described so far, their offsets not yet known.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// Bytes of all tensors' data, without padding.
    pub fn data_bytes(&self) -> u64 {
        self.tensors.iter().fold(0, |sum, t| sum.saturating_add(t.n_bytes))
    }

    /// Writes everything up to the data of the first tensor.
    pub fn start<W: io::Write>(mut self, mut out: W) -> Result<Writer<W>, WriteError> {
        let alignment = self.metadata.alignment()?;
        for (i, (key, _)) in self.metadata.iter().enumerate() {
            check_length(Place::Key(i as u64), key, MAX_KEY_BYTES)?;
        }
        self.place_tensors(alignment)?;
        let header = self.encode(alignment);
        out.write_all(&header)?;
        for tensor in &mut self.tensors {
            tensor.offset += header.len() as u64;
        }
        Ok(Writer { out, tensors: self.tensors, next: 0, alignment })
    }

    /// Lays the tensors out one after the other; offsets are those within the data section.
    fn place_tensors(&mut self, alignment: u64) -> Result<(), Error> {
        let mut end = 0u64;
        for t in &mut self.tensors {
            t.offset = end;
            // Half of the range is kept for the header, so that no sum with its length can overflow.
            end = end
                .checked_add(t.n_bytes)
                .and_then(|end| end.checked_next_multiple_of(alignment))
                .filter(|&end| end <= u64::MAX / 2)
                .ok_or_else(|| Error::SizeOverflow { tensor: t.name.clone(), shape: t.shape.clone() })?;
        }
        Ok(())
    }

    /// The header, padded to where the data start.
    fn encode(&self, alignment: u64) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend(MAGIC);
        out.extend(VERSION.to_le_bytes());
        put_len(&mut out, self.tensors.len());
        put_len(&mut out, self.metadata.len());
        for (key, value) in self.metadata.iter() {
            put_bytes(&mut out, key.as_bytes());
            out.extend(value.value_type().id().to_le_bytes());
            put_value(&mut out, value);
        }
        for t in &self.tensors {
            put_bytes(&mut out, t.name.as_bytes());
            out.extend((t.shape.len() as u32).to_le_bytes());
            put_numbers(&mut out, &t.shape, u64::to_le_bytes);
            out.extend(t.ty.id().to_le_bytes());
            out.extend(t.offset.to_le_bytes());
        }
        out.resize(out.len().next_multiple_of(alignment as usize), 0);
        out
    }
}

fn check_length(place: Place, name: &str, max: u64) -> Result<(), Error> {
    let found = name.len() as u64;
    if found <= max { Ok(()) } else { Err(Error::NameTooLong { place, found, max }) }
}

fn put_len(out: &mut Vec<u8>, len: usize) {
    out.extend((len as u64).to_le_bytes());
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_len(out, bytes.len());
    out.extend(bytes);
}

fn put_numbers<T: Copy, const N: usize>(out: &mut Vec<u8>, numbers: &[T], encode: fn(T) -> [u8; N]) {
    out.extend(numbers.iter().flat_map(|&number| encode(number)));
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::U8(v) => out.push(*v),
        Value::I8(v) => out.extend(v.to_le_bytes()),
        Value::U16(v) => out.extend(v.to_le_bytes()),
        Value::I16(v) => out.extend(v.to_le_bytes()),
        Value::U32(v) => out.extend(v.to_le_bytes()),
        Value::I32(v) => out.extend(v.to_le_bytes()),
        Value::F32(v) => out.extend(v.to_le_bytes()),
        Value::Bool(v) => out.push((*v).into()),
        Value::String(v) => put_bytes(out, v),
        Value::Array(v) => put_array(out, v),
        Value::U64(v) => out.extend(v.to_le_bytes()),
        Value::I64(v) => out.extend(v.to_le_bytes()),
        Value::F64(v) => out.extend(v.to_le_bytes()),
    }
}

fn put_array(out: &mut Vec<u8>, array: &Array) {
    out.extend(array.element_type().id().to_le_bytes());
    put_len(out, array.len());
    match array {
        Array::U8(v) => out.extend(v),
        Array::I8(v) => put_numbers(out, v, i8::to_le_bytes),
        Array::U16(v) => put_numbers(out, v, u16::to_le_bytes),
        Array::I16(v) => put_numbers(out, v, i16::to_le_bytes),
        Array::U32(v) => put_numbers(out, v, u32::to_le_bytes),
        Array::I32(v) => put_numbers(out, v, i32::to_le_bytes),
        Array::F32(v) => put_numbers(out, v, f32::to_le_bytes),
        Array::Bool(v) => out.extend(v.iter().map(|&b| u8::from(b))),
        Array::String(v) => v.iter().for_each(|string| put_bytes(out, string)),
        Array::U64(v) => put_numbers(out, v, u64::to_le_bytes),
        Array::I64(v) => put_numbers(out, v, i64::to_le_bytes),
        Array::F64(v) => put_numbers(out, v, f64::to_le_bytes),
    }
}

/// A file whose header is written and whose tensors' data are being written.
#[derive(Debug)]
pub struct Writer<W> {
    out: W,
    tensors: Vec<TensorInfo>,
    next: usize,
    alignment: u64,
}

impl<W: io::Write> Writer<W> {
    /// The tensor whose data come next.
    pub fn next_tensor(&self) -> Option<&TensorInfo> {
        self.tensors.get(self.next)
    }

    /// Writes the data of the next tensor.
    pub fn write_tensor(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        let t = self.pending()?;
        let found = bytes.len() as u64;
        if found != t.n_bytes {
            return Err(WriteError::TensorSize { tensor: t.name.clone(), expected: t.n_bytes, found });
        }
        self.write_tensor_with(|out| out.write_all(bytes))
    }

    /// Has `produce` write the data of the next tensor, piece by piece, and counts them.
    ///
    /// After an error the file is broken: the pieces before it are written already.
    pub fn write_tensor_with(
        &mut self,
        produce: impl FnOnce(&mut dyn io::Write) -> io::Result<()>,
    ) -> Result<(), WriteError> {
        let (tensor, expected) = self.pending().map(|t| (t.name.clone(), t.n_bytes))?;
        let mut counted = Counted { out: &mut self.out, written: 0 };
        produce(&mut counted)?;
        let found = counted.written;
        if found != expected {
            return Err(WriteError::TensorSize { tensor, expected, found });
        }
        self.next += 1;
        let padding = expected.next_multiple_of(self.alignment) - expected;
        io::copy(&mut io::Read::take(io::repeat(0), padding), &mut self.out)?;
        Ok(())
    }

    /// Checks that every tensor was written, and flushes.
    pub fn finish(mut self) -> Result<W, WriteError> {
        if let Some(t) = self.next_tensor() {
            return Err(WriteError::TensorMissing { tensor: t.name.clone() });
        }
        self.out.flush()?;
        Ok(self.out)
    }

    fn pending(&self) -> Result<&TensorInfo, WriteError> {
        self.next_tensor().ok_or(WriteError::NoTensorLeft { count: self.tensors.len() })
    }
}

/// Passes bytes on and counts them.
struct Counted<'a, W> {
    out: &'a mut W,
    written: u64,
}

impl<W: io::Write> io::Write for Counted<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.out.write(bytes)?;
        self.written += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::super::Gguf;
    use super::*;

    fn two_tensors() -> Builder {
        let mut b = Builder::new();
        b.insert("general.alignment", 64u32).unwrap();
        b.tensor("a", GgmlType::F32, &[3]).unwrap();
        b.tensor("b", GgmlType::Q4_0, &[32, 2]).unwrap();
        b
    }

    #[test]
    fn what_is_written_is_read_back() {
        let mut w = two_tensors().start(Vec::new()).unwrap();
        assert_eq!(w.next_tensor().unwrap().name, "a");
        w.write_tensor(&[1; 12]).unwrap();
        w.write_tensor_with(|out| (0..36).try_for_each(|i| out.write_all(&[i]))).unwrap();
        let planned = w.tensors.clone();
        let bytes = w.finish().unwrap();
        assert_eq!(bytes.len() % 64, 0);

        let gguf = Gguf::parse(&bytes).unwrap();
        assert_eq!((gguf.version, gguf.alignment, gguf.data_start % 64), (3, 64, 0));
        assert_eq!(gguf.tensors, planned);
        let data = |name| {
            let t = gguf.tensor(name).unwrap();
            &bytes[t.offset as usize..][..t.n_bytes as usize]
        };
        assert_eq!(data("a"), [1; 12]);
        assert_eq!(data("b"), (0..36).collect::<Vec<u8>>());
        assert_eq!(gguf.tensor("c"), None);
    }

    #[test]
    fn data_of_the_wrong_size_are_refused() {
        let mut w = two_tensors().start(Vec::new()).unwrap();
        let is_size = |result, n| matches!(result, Err(WriteError::TensorSize { expected: 12, found, .. }) if found == n);
        assert!(is_size(w.write_tensor(&[0; 11]), 11));
        assert!(is_size(w.write_tensor_with(|out| out.write_all(&[0; 13])), 13));
    }

    #[test]
    fn too_few_and_too_many_tensors_are_refused() {
        let mut w = two_tensors().start(Vec::new()).unwrap();
        w.write_tensor(&[0; 12]).unwrap();
        w.write_tensor(&[0; 36]).unwrap();
        assert!(matches!(w.write_tensor(&[]), Err(WriteError::NoTensorLeft { count: 2 })));
        let w = two_tensors().start(Vec::new()).unwrap();
        assert!(matches!(w.finish(), Err(WriteError::TensorMissing { tensor }) if tensor == "a"));
    }

    #[test]
    fn invalid_files_are_not_written() {
        let mut b = two_tensors();
        assert_eq!(
            b.insert("general.alignment", 1u32).unwrap_err(),
            Error::DuplicateKey { key: "general.alignment".into() }
        );
        assert_eq!(b.tensor("a", GgmlType::F32, &[1]), Err(Error::DuplicateTensor { name: "a".into() }));
        assert!(matches!(b.tensor("x".repeat(128), GgmlType::F32, &[1]), Err(Error::NameTooLong { .. })));
        assert!(matches!(b.tensor("q", GgmlType::Q6_K, &[32]), Err(Error::PartialBlock { .. })));
        b.insert("k".repeat(65536), 1u8).unwrap();
        let invalid = |b: Builder| match b.start(Vec::new()) {
            Err(WriteError::Invalid(error)) => error,
            other => panic!("{other:?}"),
        };
        assert!(matches!(invalid(b), Error::NameTooLong { found: 65536, .. }));

        let mut b = Builder::new();
        b.insert("general.alignment", 48u32).unwrap();
        assert!(matches!(invalid(b), Error::InvalidAlignment { found: 48, .. }));

        let mut b = Builder::new();
        b.tensor("a", GgmlType::F32, &[1 << 61]).unwrap();
        b.tensor("b", GgmlType::F32, &[1 << 61]).unwrap();
        assert!(matches!(invalid(b), Error::SizeOverflow { .. }));
    }
}
