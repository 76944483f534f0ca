//! The parser: a cursor that cannot leave the file, and the header read through it.

use super::error::Place;
use super::value::{Array, StringArray, Value, ValueType};
use super::{Error, GgmlType, MAGIC, MAX_KEY_BYTES, MAX_TENSOR_NAME_BYTES, Metadata, TensorInfo};
use super::{tensor, validate_tokenizer};
use std::collections::HashMap;

/// Fewest bytes of a metadata entry: length of the key, value type, a one-byte value.
const MIN_ENTRY_BYTES: u64 = 8 + 4 + 1;
/// Fewest bytes of a tensor description: length of the name, dimensions and one of them, type, offset.
const MIN_TENSOR_BYTES: u64 = 8 + 4 + 8 + 4 + 8;

/// The header of a GGUF file, checked against the file's length.
#[derive(Clone, Debug)]
pub struct Gguf {
    /// The version of the format: 2 or 3, which have the same layout.
    pub version: u32,
    /// The metadata, in the order of the file.
    pub metadata: Metadata,
    /// The tensors, in the order of the file.
    pub tensors: Vec<TensorInfo>,
    /// What tensor offsets within the data section are multiples of. It may be 1.
    pub alignment: u64,
    /// Where the data section starts; at most the length of the file.
    pub data_start: u64,
    index: HashMap<String, usize>,
}

impl Gguf {
    /// Parses the header of a file given whole, and checks that every tensor lies inside it.
    pub fn parse(bytes: &[u8]) -> Result<Self, Error> {
        let mut cursor = Cursor { bytes, pos: 0, place: Place::Header };
        let version = read_version(&mut cursor)?;
        let n_tensors = cursor.u64()?;
        let n_entries = cursor.u64()?;
        let tensors_bytes = cursor.check_count("tensors", n_tensors, MIN_TENSOR_BYTES, 0)?;
        cursor.check_count("metadata entries", n_entries, MIN_ENTRY_BYTES, tensors_bytes)?;

        let metadata = read_metadata(&mut cursor, n_entries)?;
        let alignment = metadata.alignment()?;
        validate_tokenizer(&metadata)?;
        let (mut tensors, index) = read_tensors(&mut cursor, n_tensors)?;

        // Without tensors nothing needs to follow the header, not even padding.
        let data_start = cursor.offset().next_multiple_of(alignment).min(bytes.len() as u64);
        tensor::place(&mut tensors, data_start, alignment, bytes.len() as u64)?;
        Ok(Self { version, metadata, tensors, alignment, data_start, index })
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.index.get(name).and_then(|&i| self.tensors.get(i))
    }
}

fn read_version(cursor: &mut Cursor) -> Result<u32, Error> {
    let found = cursor.array()?;
    if found != MAGIC {
        return Err(Error::BadMagic { found });
    }
    let version = cursor.u32()?;
    match version {
        2 | 3 => Ok(version),
        // Versions are small: one with its value in the other end of the word is byte-swapped.
        _ if (1..=0xffff).contains(&version.swap_bytes()) => {
            Err(Error::BigEndian { version: version.swap_bytes() })
        }
        found => Err(Error::UnsupportedVersion { found }),
    }
}

fn read_metadata(cursor: &mut Cursor, count: u64) -> Result<Metadata, Error> {
    let mut metadata = Metadata::new();
    for i in 0..count {
        cursor.place = Place::Key(i);
        let key = cursor.name(MAX_KEY_BYTES)?;
        cursor.place = Place::Value(key.to_owned());
        let value = read_value(cursor, key)?;
        metadata.insert(key, value)?;
    }
    Ok(metadata)
}

fn read_value(cursor: &mut Cursor, key: &str) -> Result<Value, Error> {
    Ok(match read_value_type(cursor, key)? {
        ValueType::U8 => Value::U8(u8::from_le_bytes(cursor.array()?)),
        ValueType::I8 => Value::I8(i8::from_le_bytes(cursor.array()?)),
        ValueType::U16 => Value::U16(u16::from_le_bytes(cursor.array()?)),
        ValueType::I16 => Value::I16(i16::from_le_bytes(cursor.array()?)),
        ValueType::U32 => Value::U32(cursor.u32()?),
        ValueType::I32 => Value::I32(i32::from_le_bytes(cursor.array()?)),
        ValueType::F32 => Value::F32(f32::from_le_bytes(cursor.array()?)),
        ValueType::Bool => Value::Bool(read_bool(cursor, key)?),
        ValueType::String => Value::String(cursor.string()?.to_vec()),
        ValueType::Array => Value::Array(read_array(cursor, key)?),
        ValueType::U64 => Value::U64(cursor.u64()?),
        ValueType::I64 => Value::I64(i64::from_le_bytes(cursor.array()?)),
        ValueType::F64 => Value::F64(f64::from_le_bytes(cursor.array()?)),
    })
}

fn read_value_type(cursor: &mut Cursor, key: &str) -> Result<ValueType, Error> {
    let found = cursor.u32()?;
    ValueType::from_id(found).ok_or_else(|| Error::UnknownValueType { key: key.to_owned(), found })
}

fn read_bool(cursor: &mut Cursor, key: &str) -> Result<bool, Error> {
    let offset = cursor.offset();
    match cursor.array()? {
        [0] => Ok(false),
        [1] => Ok(true),
        [found] => Err(Error::InvalidBool { key: key.to_owned(), offset, found }),
    }
}

fn read_array(cursor: &mut Cursor, key: &str) -> Result<Array, Error> {
    let element = read_value_type(cursor, key)?;
    let count = cursor.u64()?;
    cursor.check_count("array elements", count, element.min_bytes(), 0)?;
    Ok(match element {
        ValueType::U8 => Array::U8(read_numbers(cursor, count, u8::from_le_bytes)?),
        ValueType::I8 => Array::I8(read_numbers(cursor, count, i8::from_le_bytes)?),
        ValueType::U16 => Array::U16(read_numbers(cursor, count, u16::from_le_bytes)?),
        ValueType::I16 => Array::I16(read_numbers(cursor, count, i16::from_le_bytes)?),
        ValueType::U32 => Array::U32(read_numbers(cursor, count, u32::from_le_bytes)?),
        ValueType::I32 => Array::I32(read_numbers(cursor, count, i32::from_le_bytes)?),
        ValueType::F32 => Array::F32(read_numbers(cursor, count, f32::from_le_bytes)?),
        ValueType::Bool => Array::Bool((0..count).map(|_| read_bool(cursor, key)).collect::<Result<_, _>>()?),
        ValueType::String => Array::String(read_strings(cursor, count)?),
        ValueType::Array => return Err(Error::NestedArray { key: key.to_owned() }),
        ValueType::U64 => Array::U64(read_numbers(cursor, count, u64::from_le_bytes)?),
        ValueType::I64 => Array::I64(read_numbers(cursor, count, i64::from_le_bytes)?),
        ValueType::F64 => Array::F64(read_numbers(cursor, count, f64::from_le_bytes)?),
    })
}

/// Reads `count` numbers of `N` bytes; `count * N` bytes are known to remain.
fn read_numbers<const N: usize, T>(
    cursor: &mut Cursor,
    count: u64,
    decode: fn([u8; N]) -> T,
) -> Result<Vec<T>, Error> {
    let bytes = cursor.take(count.saturating_mul(N as u64))?;
    Ok(bytes.as_chunks().0.iter().map(|&number| decode(number)).collect())
}

/// Reads `count` strings into one buffer: once over the lengths to size it, once to fill it.
fn read_strings(cursor: &mut Cursor, count: u64) -> Result<StringArray, Error> {
    let start = cursor.pos;
    let mut total = 0;
    for _ in 0..count {
        total += cursor.string()?.len();
    }
    cursor.pos = start;

    let mut bytes = Vec::with_capacity(total);
    let mut ends = Vec::with_capacity(count as usize);
    for _ in 0..count {
        bytes.extend_from_slice(cursor.string()?);
        ends.push(bytes.len());
    }
    Ok(StringArray::from_parts(bytes, ends))
}

/// Reads the tensor table; offsets are still those within the data section.
fn read_tensors(cursor: &mut Cursor, count: u64) -> Result<(Vec<TensorInfo>, HashMap<String, usize>), Error> {
    let mut tensors = Vec::new();
    let mut index = HashMap::new();
    for i in 0..count {
        cursor.place = Place::TensorName(i);
        let name = cursor.name(MAX_TENSOR_NAME_BYTES)?;
        cursor.place = Place::Tensor(name.to_owned());
        if index.insert(name.to_owned(), tensors.len()).is_some() {
            return Err(Error::DuplicateTensor { name: name.to_owned() });
        }
        tensors.push(read_tensor(cursor, name)?);
    }
    Ok((tensors, index))
}

fn read_tensor(cursor: &mut Cursor, name: &str) -> Result<TensorInfo, Error> {
    let n_dimensions = cursor.u32()?;
    tensor::check_dimensions(name, n_dimensions)?;
    let shape = (0..n_dimensions).map(|_| cursor.u64()).collect::<Result<Vec<_>, _>>()?;
    let id = cursor.u32()?;
    let ty = GgmlType::from_id(id).ok_or_else(|| Error::UnsupportedType { tensor: name.to_owned(), id })?;
    let offset = cursor.u64()?;
    let n_bytes = tensor::byte_len(name, ty, &shape)?;
    Ok(TensorInfo { name: name.to_owned(), ty, shape, offset, n_bytes })
}

/// A position in the file, and what is being read there, for errors.
struct Cursor<'a> {
    bytes: &'a [u8],
    /// Never more than `bytes.len()`.
    pos: usize,
    place: Place,
}

impl<'a> Cursor<'a> {
    fn offset(&self) -> u64 {
        self.pos as u64
    }

    fn remaining(&self) -> u64 {
        (self.bytes.len() - self.pos) as u64
    }

    fn take(&mut self, needed: u64) -> Result<&'a [u8], Error> {
        let rest = &self.bytes[self.pos..];
        let taken = usize::try_from(needed).ok().and_then(|n| rest.get(..n));
        let taken = taken.ok_or_else(|| self.truncated(needed))?;
        self.pos += taken.len();
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let taken = self.bytes[self.pos..].first_chunk::<N>();
        let taken = *taken.ok_or_else(|| self.truncated(N as u64))?;
        self.pos += N;
        Ok(taken)
    }

    fn truncated(&self, needed: u64) -> Error {
        let (place, offset, remaining) = (self.place.clone(), self.offset(), self.remaining());
        Error::Truncated { place, offset, needed, remaining }
    }

    fn u32(&mut self) -> Result<u32, Error> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, Error> {
        self.array().map(u64::from_le_bytes)
    }

    /// A string: its length, then that many bytes.
    fn string(&mut self) -> Result<&'a [u8], Error> {
        let len = self.u64()?;
        self.take(len)
    }

    /// A string that serves as a name: UTF-8, at most `max` bytes long.
    fn name(&mut self, max: u64) -> Result<&'a str, Error> {
        let found = self.u64()?;
        if found > max {
            return Err(Error::NameTooLong { place: self.place.clone(), found, max });
        }
        let offset = self.offset();
        std::str::from_utf8(self.take(found)?)
            .map_err(|_| Error::InvalidUtf8 { place: self.place.clone(), offset })
    }

    /// Checks that `count` items of at least `min_bytes` fit into what remains after `reserved` bytes, and
    /// returns the bytes that they take at least.
    fn check_count(
        &self,
        what: &'static str,
        count: u64,
        min_bytes: u64,
        reserved: u64,
    ) -> Result<u64, Error> {
        let remaining = self.remaining().saturating_sub(reserved);
        match count.checked_mul(min_bytes) {
            Some(bytes) if bytes <= remaining => Ok(bytes),
            _ => Err(Error::CountTooLarge { what, place: self.place.clone(), count, remaining }),
        }
    }
}

#[cfg(test)]
mod tests;
