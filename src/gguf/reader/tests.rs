//! One test per check of the parser, on headers written by hand.

use super::*;

/// A header in the making: every field can be wrong.
#[derive(Clone, Default)]
struct Raw(Vec<u8>);

impl Raw {
    fn header(version: u32, tensors: u64, entries: u64) -> Self {
        Self(b"GGUF".to_vec()).u32(version).u64(tensors).u64(entries)
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    fn u32(self, v: u32) -> Self {
        self.bytes(&v.to_le_bytes())
    }

    fn u64(self, v: u64) -> Self {
        self.bytes(&v.to_le_bytes())
    }

    fn string(self, s: impl AsRef<[u8]>) -> Self {
        self.u64(s.as_ref().len() as u64).bytes(s.as_ref())
    }

    fn key(self, key: &str, value_type: ValueType) -> Self {
        self.string(key).u32(value_type.id())
    }

    fn tensor(self, name: impl AsRef<[u8]>, id: u32, shape: &[u64], offset: u64) -> Self {
        let start = self.string(name).u32(shape.len() as u32);
        shape.iter().fold(start, |raw, &ne| raw.u64(ne)).u32(id).u64(offset)
    }

    /// Pads to the default alignment and appends `n` bytes of tensor data.
    fn data(mut self, n: usize) -> Self {
        self.0.resize(self.0.len().next_multiple_of(32) + n, 0);
        self
    }

    fn parse(&self) -> Result<Gguf, Error> {
        Gguf::parse(&self.0)
    }

    fn error(&self) -> Error {
        self.parse().expect_err("the file is invalid")
    }
}

/// The error of a file with one entry, whose value is followed by room for more.
fn entry_error(value_type: u32, value: Raw) -> Error {
    Raw::header(3, 0, 1).string("k").u32(value_type).bytes(&value.0).error()
}

/// The error of a file with one F32 tensor of a kilobyte.
fn tensor_error(id: u32, shape: &[u64], offset: u64) -> Error {
    Raw::header(3, 1, 0).tensor("t", id, shape, offset).data(1024).error()
}

#[test]
fn magic() {
    let found = *b"GGML";
    assert_eq!(Raw::default().bytes(&found).data(64).error(), Error::BadMagic { found });
    assert!(matches!(Raw::default().error(), Error::Truncated { place: Place::Header, needed: 4, .. }));
}

#[test]
fn versions_2_and_3_only() {
    for version in [2, 3] {
        assert_eq!(Raw::header(version, 0, 0).parse().unwrap().version, version);
    }
    for found in [0, 1, 4, u32::MAX] {
        assert_eq!(Raw::header(found, 0, 0).error(), Error::UnsupportedVersion { found });
    }
}

#[test]
fn big_endian() {
    let raw = Raw::default().bytes(b"GGUF").bytes(&3u32.to_be_bytes()).data(64);
    assert_eq!(raw.error(), Error::BigEndian { version: 3 });
}

#[test]
fn counts_fit_the_bytes_that_remain() {
    for count in [1, 1 << 32, u64::MAX] {
        for (raw, what) in
            [(Raw::header(3, count, 0), "tensors"), (Raw::header(3, 0, count), "metadata entries")]
        {
            let expected = Error::CountTooLarge { what, place: Place::Header, count, remaining: 0 };
            assert_eq!(raw.error(), expected);
        }
    }
    // Room for a tensor or for two entries, not for both.
    let both = Raw::header(3, 1, 2).bytes(&[0; 32]);
    assert!(matches!(both.error(), Error::CountTooLarge { what: "metadata entries", remaining: 0, .. }));
}

#[test]
fn value_types_are_known() {
    assert_eq!(
        entry_error(13, Raw::default().u64(0)),
        Error::UnknownValueType { key: "k".into(), found: 13 }
    );
    let array = Raw::default().u32(77).u64(0);
    assert_eq!(entry_error(9, array), Error::UnknownValueType { key: "k".into(), found: 77 });
}

#[test]
fn arrays_are_not_nested() {
    for count in [0, 1] {
        let array = Raw::default().u32(9).u64(count).u32(0).u64(0);
        assert_eq!(entry_error(9, array), Error::NestedArray { key: "k".into() });
    }
}

#[test]
fn bools_are_0_or_1() {
    let scalar = entry_error(7, Raw::default().bytes(&[2]));
    assert_eq!(scalar, Error::InvalidBool { key: "k".into(), offset: 37, found: 2 });
    let array = entry_error(9, Raw::default().u32(7).u64(2).bytes(&[1, 255]));
    assert!(matches!(array, Error::InvalidBool { found: 255, .. }));
}

#[test]
fn lengths_fit_the_bytes_that_remain() {
    for len in [9, 1 << 32, u64::MAX] {
        let string = entry_error(8, Raw::default().u64(len).bytes(&[0; 8]));
        let place = Place::Value("k".into());
        assert_eq!(string, Error::Truncated { place, offset: 45, needed: len, remaining: 8 });
    }
    // The first string of the array is all right, the second claims one byte too many.
    let strings = Raw::default().u32(8).u64(2).string("a").u64(2).bytes(b"b");
    assert!(matches!(entry_error(9, strings), Error::Truncated { needed: 2, remaining: 1, .. }));
}

#[test]
fn array_lengths_fit_the_bytes_that_remain() {
    for element in (0..13).filter(|&id| id != 9) {
        let min = ValueType::from_id(element).unwrap().min_bytes();
        for count in [16 / min + 1, u64::MAX / 8, u64::MAX] {
            let array = Raw::default().u32(element).u64(count).bytes(&[0; 16]);
            let expected = Error::CountTooLarge {
                what: "array elements",
                place: Place::Value("k".into()),
                count,
                remaining: 16,
            };
            assert_eq!(entry_error(9, array), expected);
        }
    }
}

#[test]
fn keys_are_short_unique_utf8() {
    let long = |len: usize| Raw::header(3, 0, 1).key(&"k".repeat(len), ValueType::U8).bytes(&[0]);
    assert!(long(65535).parse().is_ok());
    let expected = Error::NameTooLong { place: Place::Key(0), found: 65536, max: 65535 };
    assert_eq!(long(65536).error(), expected);

    let twice = Raw::header(3, 0, 2).key("k", ValueType::U8).bytes(&[0]).key("k", ValueType::U8).bytes(&[0]);
    assert_eq!(twice.error(), Error::DuplicateKey { key: "k".into() });

    let bytes = Raw::header(3, 0, 1).string([0xff, 0xfe]).u32(0).bytes(&[0]);
    assert_eq!(bytes.error(), Error::InvalidUtf8 { place: Place::Key(0), offset: 32 });
}

#[test]
fn alignment() {
    let with = |found: u32| Raw::header(3, 0, 1).key("general.alignment", ValueType::U32).u32(found);
    assert_eq!(with(4096).parse().unwrap().alignment, 4096);
    for bad in [0, 33, 1 << 21] {
        assert!(
            matches!(with(bad).error(), Error::InvalidAlignment { found, .. } if found == u64::from(bad))
        );
    }
}

#[test]
fn tokenizer_arrays() {
    let raw =
        Raw::header(3, 0, 2).key("tokenizer.ggml.tokens", ValueType::Array).u32(8).u64(1).string([0xff]);
    let id = |id| raw.clone().key("tokenizer.ggml.bos_token_id", ValueType::U32).u32(id);
    assert!(id(0).parse().is_ok(), "tokens are bytes, not UTF-8");
    assert!(matches!(id(1).error(), Error::TokenIdOutOfRange { id: 1, vocabulary: 1, .. }));
}

#[test]
fn tensor_names_are_short_unique_utf8() {
    let named = |name: &[u8]| Raw::header(3, 1, 0).tensor(name, 0, &[1], 0).data(4);
    assert!(named(&[b'n'; 127]).parse().is_ok());
    let expected = Error::NameTooLong { place: Place::TensorName(0), found: 128, max: 127 };
    assert_eq!(named(&[b'n'; 128]).error(), expected);
    assert!(matches!(named(&[0x80]).error(), Error::InvalidUtf8 { place: Place::TensorName(0), .. }));

    let twice = Raw::header(3, 2, 0).tensor("t", 0, &[1], 0).tensor("t", 0, &[1], 32).data(64);
    assert_eq!(twice.error(), Error::DuplicateTensor { name: "t".into() });
}

#[test]
fn tensor_shapes() {
    assert!(matches!(tensor_error(0, &[], 0), Error::InvalidDimensions { found: 0, .. }));
    assert!(matches!(tensor_error(0, &[1; 5], 0), Error::InvalidDimensions { found: 5, .. }));
    assert!(matches!(tensor_error(0, &[1, 1, 0], 0), Error::ZeroDimension { dimension: 2, .. }));
    assert!(matches!(tensor_error(0, &[1 << 33, 1 << 33], 0), Error::SizeOverflow { .. }));
    assert!(matches!(tensor_error(2, &[31], 0), Error::PartialBlock { row: 31, .. }));
    // A count of dimensions that would take gigabytes.
    let many = Raw::header(3, 1, 0).string("t").u32(u32::MAX).data(64);
    assert!(matches!(many.error(), Error::InvalidDimensions { found: u32::MAX, .. }));
}

#[test]
fn unsupported_types_are_named() {
    let message = |id| tensor_error(id, &[256], 0).to_string();
    for (id, name) in [(9, "Q8_1"), (16, "IQ2_XXS"), (34, "TQ1_0"), (39, "MXFP4"), (9999, "number 9999")] {
        assert_eq!(message(id), format!("tensor \"t\" has type {name}, which is not supported"));
    }
}

#[test]
fn tensor_offsets_are_aligned() {
    let expected = Error::MisalignedTensor { tensor: "t".into(), offset: 16, alignment: 32 };
    assert_eq!(tensor_error(0, &[1], 16), expected);
}

#[test]
fn tensor_data_lie_inside_the_file() {
    let at = |offset| Raw::header(3, 1, 0).tensor("t", 0, &[4], offset).data(48);
    assert_eq!(at(32).parse().unwrap().tensors[0].offset, 64 + 32);
    for outside in [64, 1 << 40, u64::MAX - 31] {
        assert!(matches!(at(outside).error(), Error::TensorOutsideFile { offset, .. } if offset == outside));
    }
    let mut short = at(32);
    short.0.pop();
    assert!(matches!(short.error(), Error::TensorOutsideFile { n_bytes: 16, file_len: 111, .. }));
}

#[test]
fn tensor_data_do_not_overlap() {
    let with = |second| Raw::header(3, 2, 0).tensor("a", 0, &[9], 0).tensor("b", 0, &[1], second).data(128);
    assert!(with(64).parse().is_ok());
    let expected = Error::OverlappingTensors { first: "a".into(), second: "b".into() };
    assert_eq!(with(32).error(), expected);
}

#[test]
fn a_header_alone_is_a_file() {
    let gguf = Raw::header(3, 0, 1).key("k", ValueType::U8).bytes(&[1]).parse().unwrap();
    assert_eq!(gguf.metadata.u32("k"), Ok(1));
    assert_eq!((gguf.tensors.len(), gguf.data_start), (0, 38));
}
