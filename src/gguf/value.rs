//! Metadata values: scalars, byte strings, and arrays of them.

use std::fmt;

/// The type of a metadata value, in the order of the ids in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum ValueType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

/// (type, name, fewest bytes of a value in a file), one row per id.
const TABLE: [(ValueType, &str, u64); 13] = {
    use ValueType::*;
    [
        (U8, "u8", 1),
        (I8, "i8", 1),
        (U16, "u16", 2),
        (I16, "i16", 2),
        (U32, "u32", 4),
        (I32, "i32", 4),
        (F32, "f32", 4),
        (Bool, "bool", 1),
        (String, "string", 8), // the length
        (Array, "array", 12),  // the element type and the length
        (U64, "u64", 8),
        (I64, "i64", 8),
        (F64, "f64", 8),
    ]
};

impl ValueType {
    /// The type with this id, if there is one.
    pub fn from_id(id: u32) -> Option<Self> {
        TABLE.get(usize::try_from(id).ok()?).map(|row| row.0)
    }

    /// The id in a GGUF file.
    pub fn id(self) -> u32 {
        self as u32
    }

    /// The name that error messages use.
    pub fn name(self) -> &'static str {
        TABLE[self as usize].1 // rows stand in the order of the enum: checked by a test
    }

    /// The fewest bytes that a value of this type takes in a file.
    pub(super) fn min_bytes(self) -> u64 {
        TABLE[self as usize].2
    }
}

impl fmt::Display for ValueType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A metadata value. Strings are bytes: nothing in the format makes them UTF-8.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(Vec<u8>),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

impl Value {
    /// The type that a file states for this value.
    pub fn value_type(&self) -> ValueType {
        match self {
            Self::U8(_) => ValueType::U8,
            Self::I8(_) => ValueType::I8,
            Self::U16(_) => ValueType::U16,
            Self::I16(_) => ValueType::I16,
            Self::U32(_) => ValueType::U32,
            Self::I32(_) => ValueType::I32,
            Self::F32(_) => ValueType::F32,
            Self::Bool(_) => ValueType::Bool,
            Self::String(_) => ValueType::String,
            Self::Array(_) => ValueType::Array,
            Self::U64(_) => ValueType::U64,
            Self::I64(_) => ValueType::I64,
            Self::F64(_) => ValueType::F64,
        }
    }

    /// The type in words: `u32`, `array of string`.
    pub fn type_name(&self) -> String {
        match self {
            Self::Array(array) => format!("array of {}", array.element_type()),
            scalar => scalar.value_type().name().to_owned(),
        }
    }

    /// The value of any integer type; every one of them fits an `i128`.
    pub(super) fn integer(&self) -> Option<i128> {
        Some(match *self {
            Self::U8(v) => v.into(),
            Self::I8(v) => v.into(),
            Self::U16(v) => v.into(),
            Self::I16(v) => v.into(),
            Self::U32(v) => v.into(),
            Self::I32(v) => v.into(),
            Self::U64(v) => v.into(),
            Self::I64(v) => v.into(),
            _ => return None,
        })
    }
}

/// For listings: strings quoted and escaped, arrays by type and length only.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::F32(v) => write!(f, "{v}"),
            Self::F64(v) => write!(f, "{v}"),
            Self::Bool(v) => write!(f, "{v}"),
            Self::String(bytes) => write!(f, "{:?}", String::from_utf8_lossy(bytes)),
            Self::Array(array) => write!(f, "[{}; {}]", array.element_type(), array.len()),
            other => write!(f, "{}", other.integer().unwrap_or_default()),
        }
    }
}

/// A metadata array. Arrays of arrays exist in the format, but no tool writes them.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    F32(Vec<f32>),
    Bool(Vec<bool>),
    String(StringArray),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F64(Vec<f64>),
}

/// Runs `$body` with `$items` bound to whichever collection the array holds.
macro_rules! with_items {
    ($array:expr, $items:ident => $body:expr) => {
        match $array {
            Array::U8($items) => $body,
            Array::I8($items) => $body,
            Array::U16($items) => $body,
            Array::I16($items) => $body,
            Array::U32($items) => $body,
            Array::I32($items) => $body,
            Array::F32($items) => $body,
            Array::Bool($items) => $body,
            Array::String($items) => $body,
            Array::U64($items) => $body,
            Array::I64($items) => $body,
            Array::F64($items) => $body,
        }
    };
}

impl Array {
    /// The number of elements.
    pub fn len(&self) -> usize {
        with_items!(self, items => items.len())
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The type of the elements.
    pub fn element_type(&self) -> ValueType {
        match self {
            Self::U8(_) => ValueType::U8,
            Self::I8(_) => ValueType::I8,
            Self::U16(_) => ValueType::U16,
            Self::I16(_) => ValueType::I16,
            Self::U32(_) => ValueType::U32,
            Self::I32(_) => ValueType::I32,
            Self::F32(_) => ValueType::F32,
            Self::Bool(_) => ValueType::Bool,
            Self::String(_) => ValueType::String,
            Self::U64(_) => ValueType::U64,
            Self::I64(_) => ValueType::I64,
            Self::F64(_) => ValueType::F64,
        }
    }

    /// The elements of any integer type, one by one.
    pub(super) fn integers(&self) -> Option<Box<dyn Iterator<Item = i128> + '_>> {
        Some(match self {
            Self::U8(v) => Box::new(v.iter().map(|&x| x.into())),
            Self::I8(v) => Box::new(v.iter().map(|&x| x.into())),
            Self::U16(v) => Box::new(v.iter().map(|&x| x.into())),
            Self::I16(v) => Box::new(v.iter().map(|&x| x.into())),
            Self::U32(v) => Box::new(v.iter().map(|&x| x.into())),
            Self::I32(v) => Box::new(v.iter().map(|&x| x.into())),
            Self::U64(v) => Box::new(v.iter().map(|&x| x.into())),
            Self::I64(v) => Box::new(v.iter().map(|&x| x.into())),
            Self::F32(_) | Self::F64(_) | Self::Bool(_) | Self::String(_) => return None,
        })
    }
}

/// Many byte strings in two allocations: a vocabulary has some hundred thousand of them.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct StringArray {
    /// All strings, one after the other.
    bytes: Vec<u8>,
    /// Where each string ends in `bytes`; it starts where the one before ends.
    ends: Vec<usize>,
}

impl StringArray {
    /// Builds the array from its parts: `ends` never decreases and stays within `bytes`.
    pub(super) fn from_parts(bytes: Vec<u8>, ends: Vec<usize>) -> Self {
        debug_assert!(ends.is_sorted() && ends.last().is_none_or(|&end| end == bytes.len()));
        Self { bytes, ends }
    }

    /// The number of strings.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there are no strings.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The string at `index`.
    pub fn get(&self, index: usize) -> Option<&[u8]> {
        let end = *self.ends.get(index)?;
        let start = index.checked_sub(1).and_then(|before| self.ends.get(before)).copied().unwrap_or(0);
        self.bytes.get(start..end)
    }

    /// The strings in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &[u8]> + Clone {
        (0..self.len()).map(|i| self.get(i).unwrap_or_default())
    }

    /// Appends a string.
    pub fn push(&mut self, string: &[u8]) {
        self.bytes.extend_from_slice(string);
        self.ends.push(self.bytes.len());
    }
}

impl<S: AsRef<[u8]>> FromIterator<S> for StringArray {
    fn from_iter<I: IntoIterator<Item = S>>(strings: I) -> Self {
        let mut array = Self::default();
        strings.into_iter().for_each(|string| array.push(string.as_ref()));
        array
    }
}

impl fmt::Debug for StringArray {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter().map(String::from_utf8_lossy)).finish()
    }
}

/// `From` for a scalar and for a vector of it.
macro_rules! from_scalar {
    ($($scalar:ty => $variant:ident),*) => {$(
        impl From<$scalar> for Value {
            fn from(v: $scalar) -> Self {
                Self::$variant(v)
            }
        }
        impl From<Vec<$scalar>> for Value {
            fn from(v: Vec<$scalar>) -> Self {
                Self::Array(Array::$variant(v))
            }
        }
    )*};
}

from_scalar!(i8 => I8, u16 => U16, i16 => I16, u32 => U32, i32 => I32, f32 => F32, bool => Bool);
from_scalar!(u64 => U64, i64 => I64, f64 => F64);

// No `From<Vec<u8>>`: it could mean a string as well as an array.
impl From<u8> for Value {
    fn from(v: u8) -> Self {
        Self::U8(v)
    }
}

impl From<&str> for Value {
    fn from(v: &str) -> Self {
        Self::String(v.as_bytes().to_vec())
    }
}

impl From<String> for Value {
    fn from(v: String) -> Self {
        Self::String(v.into_bytes())
    }
}

impl From<Array> for Value {
    fn from(v: Array) -> Self {
        Self::Array(v)
    }
}

impl From<StringArray> for Value {
    fn from(v: StringArray) -> Self {
        Self::Array(Array::String(v))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_stands_in_enum_order_and_ids_round_trip() {
        for (i, row) in TABLE.iter().enumerate() {
            assert_eq!(row.0 as usize, i);
            assert_eq!(ValueType::from_id(row.0.id()), Some(row.0));
        }
        assert_eq!(ValueType::from_id(13), None);
        assert_eq!(ValueType::from_id(u32::MAX), None);
    }

    #[test]
    fn string_array_keeps_empty_and_non_utf8_strings() {
        let strings: [&[u8]; 4] = [b"", b"ab", &[0xff, 0x00], b""];
        let array: StringArray = strings.iter().collect();
        assert_eq!(array.len(), 4);
        assert_eq!(array.iter().collect::<Vec<_>>(), strings);
        assert_eq!(array.get(1), Some(&b"ab"[..]));
        assert_eq!(array.get(4), None);
        assert_eq!(StringArray::default().get(0), None);
    }

    #[test]
    fn listings_escape_strings_and_shorten_arrays() {
        assert_eq!(Value::from("a\u{1b}[2J").to_string(), r#""a\u{1b}[2J""#);
        assert_eq!(Value::from(vec![1u32, 2]).to_string(), "[u32; 2]");
        assert_eq!(Value::I8(-3).to_string(), "-3");
    }
}
