//! The metadata of a file: an ordered map with typed lookups whose errors name the key.

use super::{Array, Error, StringArray, Value};
use std::{borrow::Cow, collections::HashMap};

/// The key that sets the alignment of tensor data.
pub(super) const ALIGNMENT_KEY: &str = "general.alignment";
const DEFAULT_ALIGNMENT: u64 = 32;
/// Far above any alignment in use; it keeps the padding that a hostile file can ask for small.
const MAX_ALIGNMENT: u64 = 1 << 20;

/// Metadata entries in the order of the file.
#[derive(Clone, Debug, Default)]
pub struct Metadata {
    entries: Vec<(String, Value)>,
    index: HashMap<String, usize>,
}

/// Two lookups for an integer type: `opt_u32` and `u32`.
macro_rules! integer_lookups {
    ($($ty:ident $opt:ident),*) => {$(
        #[doc = concat!("The integer at `key`, of any integer type, if it fits `", stringify!($ty), "`.")]
        pub fn $opt(&self, key: &str) -> Result<Option<$ty>, Error> {
            self.lookup(key, |value| integer(key, value, stringify!($ty)))
        }

        #[doc = concat!("[`", stringify!($opt), "`](Self::", stringify!($opt), "), where a missing key is an error.")]
        pub fn $ty(&self, key: &str) -> Result<$ty, Error> {
            required(key, self.$opt(key)?)
        }
    )*};
}

impl Metadata {
    /// Metadata without entries.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends an entry; a key that exists already is an error.
    pub fn insert(&mut self, key: impl Into<String>, value: impl Into<Value>) -> Result<(), Error> {
        let key = key.into();
        if self.index.contains_key(&key) {
            return Err(Error::DuplicateKey { key });
        }
        self.index.insert(key.clone(), self.entries.len());
        self.entries.push((key, value.into()));
        Ok(())
    }

    /// The number of entries.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are no entries.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The value at `key`, of whatever type.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.index.get(key).and_then(|&i| self.entries.get(i)).map(|entry| &entry.1)
    }

    /// Whether there is an entry for `key`.
    pub fn contains(&self, key: &str) -> bool {
        self.index.contains_key(key)
    }

    /// The entries in the order of the file.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// The alignment of tensor data: `general.alignment`, or 32 where it is missing.
    pub fn alignment(&self) -> Result<u64, Error> {
        let found = self.opt_u64(ALIGNMENT_KEY)?.unwrap_or(DEFAULT_ALIGNMENT);
        if !found.is_power_of_two() || found > MAX_ALIGNMENT {
            return Err(Error::InvalidAlignment { found, max: MAX_ALIGNMENT });
        }
        Ok(found)
    }

    fn lookup<'a, T>(
        &'a self,
        key: &str,
        convert: impl FnOnce(&'a Value) -> Result<T, Error>,
    ) -> Result<Option<T>, Error> {
        self.get(key).map(convert).transpose()
    }
}

/// Typed scalars.
impl Metadata {
    integer_lookups!(u16 opt_u16, u32 opt_u32, i32 opt_i32, u64 opt_u64, i64 opt_i64, usize opt_usize);

    /// The float at `key`; an `f64` is rounded to `f32`.
    pub fn opt_f32(&self, key: &str) -> Result<Option<f32>, Error> {
        self.lookup(key, |value| match *value {
            Value::F32(v) => Ok(v),
            Value::F64(v) if v.is_finite() && !(v as f32).is_finite() => Err(out_of_range(key, "f32", v)),
            Value::F64(v) => Ok(v as f32),
            _ => Err(wrong_type(key, "f32", value)),
        })
    }

    /// [`opt_f32`](Self::opt_f32), where a missing key is an error.
    pub fn f32(&self, key: &str) -> Result<f32, Error> {
        required(key, self.opt_f32(key)?)
    }

    /// The boolean at `key`.
    pub fn opt_bool(&self, key: &str) -> Result<Option<bool>, Error> {
        self.lookup(key, |value| match *value {
            Value::Bool(v) => Ok(v),
            _ => Err(wrong_type(key, "bool", value)),
        })
    }

    /// [`opt_bool`](Self::opt_bool), where a missing key is an error.
    pub fn bool(&self, key: &str) -> Result<bool, Error> {
        required(key, self.opt_bool(key)?)
    }

    /// The string at `key`, which must be UTF-8.
    pub fn opt_str(&self, key: &str) -> Result<Option<&str>, Error> {
        self.lookup(key, |value| match value {
            Value::String(v) => {
                std::str::from_utf8(v).map_err(|_| Error::StringNotUtf8 { key: key.to_owned() })
            }
            _ => Err(wrong_type(key, "string", value)),
        })
    }

    /// [`opt_str`](Self::opt_str), where a missing key is an error.
    pub fn str(&self, key: &str) -> Result<&str, Error> {
        required(key, self.opt_str(key)?)
    }
}

/// Typed arrays.
impl Metadata {
    /// The array of byte strings at `key`.
    pub fn opt_array_str(&self, key: &str) -> Result<Option<&StringArray>, Error> {
        self.lookup(key, |value| match value {
            Value::Array(Array::String(v)) => Ok(v),
            _ => Err(wrong_type(key, "array of string", value)),
        })
    }

    /// [`opt_array_str`](Self::opt_array_str), where a missing key is an error.
    pub fn array_str(&self, key: &str) -> Result<&StringArray, Error> {
        required(key, self.opt_array_str(key)?)
    }

    /// The array of `f32` at `key`.
    pub fn opt_array_f32(&self, key: &str) -> Result<Option<&[f32]>, Error> {
        self.lookup(key, |value| match value {
            Value::Array(Array::F32(v)) => Ok(v.as_slice()),
            _ => Err(wrong_type(key, "array of f32", value)),
        })
    }

    /// [`opt_array_f32`](Self::opt_array_f32), where a missing key is an error.
    pub fn array_f32(&self, key: &str) -> Result<&[f32], Error> {
        required(key, self.opt_array_f32(key)?)
    }

    /// The array of booleans at `key`.
    pub fn opt_array_bool(&self, key: &str) -> Result<Option<&[bool]>, Error> {
        self.lookup(key, |value| match value {
            Value::Array(Array::Bool(v)) => Ok(v.as_slice()),
            _ => Err(wrong_type(key, "array of bool", value)),
        })
    }

    /// [`opt_array_bool`](Self::opt_array_bool), where a missing key is an error.
    pub fn array_bool(&self, key: &str) -> Result<&[bool], Error> {
        required(key, self.opt_array_bool(key)?)
    }

    /// The array at `key`, of any integer type whose elements all fit `i32`.
    pub fn opt_array_i32(&self, key: &str) -> Result<Option<Cow<'_, [i32]>>, Error> {
        self.lookup(key, |value| match value {
            Value::Array(Array::I32(v)) => Ok(Cow::Borrowed(v.as_slice())),
            _ => integers(key, value, "i32", "array of i32").map(Cow::Owned),
        })
    }

    /// [`opt_array_i32`](Self::opt_array_i32), where a missing key is an error.
    pub fn array_i32(&self, key: &str) -> Result<Cow<'_, [i32]>, Error> {
        required(key, self.opt_array_i32(key)?)
    }

    /// The array at `key`, of any integer type whose elements all fit `u32`.
    pub fn opt_array_u32(&self, key: &str) -> Result<Option<Cow<'_, [u32]>>, Error> {
        self.lookup(key, |value| match value {
            Value::Array(Array::U32(v)) => Ok(Cow::Borrowed(v.as_slice())),
            _ => integers(key, value, "u32", "array of u32").map(Cow::Owned),
        })
    }

    /// [`opt_array_u32`](Self::opt_array_u32), where a missing key is an error.
    pub fn array_u32(&self, key: &str) -> Result<Cow<'_, [u32]>, Error> {
        required(key, self.opt_array_u32(key)?)
    }
}

fn integer<T: TryFrom<i128>>(key: &str, value: &Value, expected: &'static str) -> Result<T, Error> {
    let found = value.integer().ok_or_else(|| wrong_type(key, expected, value))?;
    T::try_from(found).map_err(|_| out_of_range(key, expected, found))
}

fn integers<T: TryFrom<i128>>(
    key: &str,
    value: &Value,
    element: &'static str,
    array: &'static str,
) -> Result<Vec<T>, Error> {
    let Value::Array(items) = value else { return Err(wrong_type(key, array, value)) };
    let items = items.integers().ok_or_else(|| wrong_type(key, array, value))?;
    items.map(|found| T::try_from(found).map_err(|_| out_of_range(key, element, found))).collect()
}

fn required<T>(key: &str, value: Option<T>) -> Result<T, Error> {
    value.ok_or_else(|| Error::MissingKey { key: key.to_owned() })
}

fn wrong_type(key: &str, expected: &'static str, found: &Value) -> Error {
    Error::WrongType { key: key.to_owned(), expected, found: found.type_name() }
}

fn out_of_range(key: &str, expected: &'static str, found: impl ToString) -> Error {
    Error::OutOfRange { key: key.to_owned(), expected, found: found.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Metadata {
        let mut m = Metadata::new();
        m.insert("u8", 7u8).unwrap();
        m.insert("i64", -1i64).unwrap();
        m.insert("u64", u64::MAX).unwrap();
        m.insert("f32", 0.5f32).unwrap();
        m.insert("f64", 0.25f64).unwrap();
        m.insert("huge", 1e300f64).unwrap();
        m.insert("bool", true).unwrap();
        m.insert("str", "text").unwrap();
        m.insert("bytes", Value::String(vec![0xff])).unwrap();
        m.insert("u32s", vec![1u32, 2]).unwrap();
        m.insert("i32s", vec![-1i32, 2]).unwrap();
        m.insert("f32s", vec![1f32]).unwrap();
        m.insert("strs", ["a", "b"].iter().collect::<StringArray>()).unwrap();
        m.insert("bools", vec![true, false]).unwrap();
        m
    }

    #[test]
    fn integers_of_any_type_that_fit_are_accepted() {
        let m = sample();
        assert_eq!(m.u32("u8"), Ok(7));
        assert_eq!(m.i32("i64"), Ok(-1));
        assert_eq!(m.u64("u64"), Ok(u64::MAX));
        assert_eq!(m.usize("u8"), Ok(7));
        assert_eq!(m.u16("u8"), Ok(7));
        assert_eq!(m.i64("i64"), Ok(-1));
        assert_eq!(m.opt_u32("none"), Ok(None));
    }

    #[test]
    fn integers_that_do_not_fit_name_key_type_and_value() {
        let expected = Error::OutOfRange { key: "i64".into(), expected: "u32", found: "-1".into() };
        assert_eq!(sample().u32("i64"), Err(expected));
        assert!(matches!(sample().opt_i32("u64"), Err(Error::OutOfRange { .. })));
    }

    #[test]
    fn wrong_types_and_missing_keys_name_the_key() {
        let m = sample();
        let wrong = |key: &str, expected, found: &str| Error::WrongType {
            key: key.into(),
            expected,
            found: found.into(),
        };
        assert_eq!(m.opt_u32("str"), Err(wrong("str", "u32", "string")));
        assert_eq!(m.u32("bool"), Err(wrong("bool", "u32", "bool")));
        assert_eq!(m.f32("u8"), Err(wrong("u8", "f32", "u8")));
        assert_eq!(m.bool("u8"), Err(wrong("u8", "bool", "u8")));
        assert_eq!(m.str("u32s"), Err(wrong("u32s", "string", "array of u32")));
        assert_eq!(m.array_str("str"), Err(wrong("str", "array of string", "string")));
        assert_eq!(m.array_i32("f32s"), Err(wrong("f32s", "array of i32", "array of f32")));
        assert_eq!(m.u32("none"), Err(Error::MissingKey { key: "none".into() }));
    }

    #[test]
    fn floats_strings_and_arrays() {
        let m = sample();
        assert_eq!((m.f32("f32"), m.f32("f64")), (Ok(0.5), Ok(0.25)));
        assert!(matches!(m.f32("huge"), Err(Error::OutOfRange { .. })));
        assert_eq!((m.bool("bool"), m.str("str")), (Ok(true), Ok("text")));
        assert_eq!(m.str("bytes"), Err(Error::StringNotUtf8 { key: "bytes".into() }));
        assert_eq!(m.array_i32("u32s").unwrap()[..], [1, 2]);
        assert_eq!(m.array_i32("i32s").unwrap()[..], [-1, 2]);
        assert_eq!(m.array_u32("u32s").unwrap()[..], [1, 2]);
        assert!(matches!(m.array_u32("i32s"), Err(Error::OutOfRange { .. })));
        assert_eq!(m.array_f32("f32s").unwrap(), [1.0]);
        assert_eq!(m.array_bool("bools").unwrap(), [true, false]);
        assert_eq!(m.array_str("strs").unwrap().get(1), Some(&b"b"[..]));
    }

    #[test]
    fn order_is_kept_and_duplicates_are_refused() {
        let mut m = sample();
        assert_eq!(m.iter().next().unwrap().0, "u8");
        assert_eq!(m.iter().len(), m.len());
        assert_eq!(m.insert("u8", 1u8), Err(Error::DuplicateKey { key: "u8".into() }));
    }

    #[test]
    fn alignment_is_a_power_of_two_up_to_the_limit() {
        let with = |value: Value| {
            let mut m = Metadata::new();
            m.insert(ALIGNMENT_KEY, value).unwrap();
            m.alignment()
        };
        assert_eq!(Metadata::new().alignment(), Ok(32));
        assert_eq!(with(Value::U32(64)), Ok(64));
        assert_eq!(with(Value::U32(1 << 20)), Ok(1 << 20));
        for bad in [0u64, 3, 48, 1 << 21, u64::MAX] {
            assert!(
                matches!(with(Value::U64(bad)), Err(Error::InvalidAlignment { found, .. }) if found == bad)
            );
        }
        assert!(matches!(with(Value::F32(32.0)), Err(Error::WrongType { .. })));
    }
}
