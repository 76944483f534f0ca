//! The GGUF parser on hostile bytes: whatever they are, it returns `Ok` or `Err` and does not panic, and
//! what it accepts keeps the promises that the rest of the crate relies on.

use proptest::prelude::*;
use skiff::gguf::{Array, Builder, Error, GgmlType, Gguf, ShardSet, StringArray, Value};
use std::path::{Path, PathBuf};

/// A small file that uses every value type, every array type, several tensor types and a tokenizer.
fn sample() -> Vec<u8> {
    let mut b = Builder::new();
    let tokens: StringArray = [&b"<unk>"[..], b"", b"\xe2\x96", b"a"].iter().collect();
    let strings: StringArray = ["x", ""].iter().collect();
    let entries: Vec<(&str, Value)> = vec![
        ("general.alignment", 64u32.into()),
        ("u8", 1u8.into()),
        ("i8", (-1i8).into()),
        ("u16", 2u16.into()),
        ("i16", (-2i16).into()),
        ("i32", (-3i32).into()),
        ("u64", u64::MAX.into()),
        ("i64", i64::MIN.into()),
        ("f32", 0.5f32.into()),
        ("f64", 0.25f64.into()),
        ("bool", true.into()),
        ("str", "text".into()),
        ("u8s", Array::U8(vec![1, 2]).into()),
        ("i8s", vec![-1i8].into()),
        ("u16s", vec![1u16].into()),
        ("i16s", vec![-1i16].into()),
        ("u32s", vec![1u32].into()),
        ("i32s", vec![-1i32].into()),
        ("u64s", vec![1u64].into()),
        ("i64s", vec![-1i64].into()),
        ("f32s", vec![0.5f32].into()),
        ("f64s", vec![0.5f64].into()),
        ("bools", vec![true, false].into()),
        ("strs", strings.into()),
        ("empty", Array::U32(vec![]).into()),
        ("tokenizer.ggml.tokens", tokens.into()),
        ("tokenizer.ggml.scores", vec![0f32; 4].into()),
        ("tokenizer.ggml.token_type", vec![1i32; 4].into()),
        ("tokenizer.ggml.bos_token_id", 3u32.into()),
        ("split.no", 0u16.into()),
        ("split.count", 1u16.into()),
        ("split.tensors.count", 3i32.into()),
    ];
    for (key, value) in entries {
        b.insert(key, value).unwrap();
    }
    b.tensor("a.weight", GgmlType::Q4_0, &[32, 3]).unwrap();
    b.tensor("b.weight", GgmlType::F32, &[5]).unwrap();
    b.tensor("c.weight", GgmlType::Q6_K, &[256, 1, 2, 1]).unwrap();
    finish(b)
}

fn finish(builder: Builder) -> Vec<u8> {
    let mut w = builder.start(Vec::new()).unwrap();
    while let Some(n) = w.next_tensor().map(|t| t.n_bytes as usize) {
        w.write_tensor(&vec![0x55; n]).unwrap();
    }
    w.finish().unwrap()
}

/// Parses, and holds an accepted file to the promises of the module's documentation.
fn check(bytes: &[u8]) -> Result<Gguf, Error> {
    let parsed = Gguf::parse(bytes);
    match &parsed {
        Err(error) => assert!(!error.to_string().is_empty()),
        Ok(gguf) => check_promises(gguf, bytes.len() as u64),
    }
    parsed
}

fn check_promises(gguf: &Gguf, len: u64) {
    assert!(matches!(gguf.version, 2 | 3));
    assert!(gguf.alignment.is_power_of_two() && gguf.alignment <= 1 << 20);
    assert!(gguf.data_start <= len);
    for t in &gguf.tensors {
        assert_eq!(gguf.tensor(&t.name), Some(t));
        assert!((1..=4).contains(&t.shape.len()) && !t.shape.contains(&0));
        assert_eq!(t.shape[0] % t.ty.block_len() as u64, 0);
        assert_eq!(t.n_bytes, t.n_elements() / t.ty.block_len() as u64 * t.ty.block_bytes() as u64);
        assert_eq!((t.offset - gguf.data_start) % gguf.alignment, 0);
        assert!(t.offset >= gguf.data_start && t.offset.checked_add(t.n_bytes).is_some_and(|end| end <= len));
    }
    for (key, value) in gguf.metadata.iter() {
        assert_eq!(gguf.metadata.get(key).map(Value::value_type), Some(value.value_type()));
        lookups(gguf, key);
    }
    // Names and other headers are hostile too.
    let _ = ShardSet::begin("m-00001-of-00002.gguf", gguf);
}

/// Every typed lookup answers or refuses.
fn lookups(gguf: &Gguf, key: &str) {
    let m = &gguf.metadata;
    let _ = (m.u16(key), m.u32(key), m.i32(key), m.u64(key), m.i64(key), m.usize(key));
    let _ = (m.f32(key), m.bool(key), m.str(key));
    let _ = (m.array_str(key), m.array_f32(key), m.array_bool(key));
    let _ = (m.array_i32(key), m.array_u32(key));
}

/// Where `needle` starts.
fn find(bytes: &[u8], needle: &[u8]) -> usize {
    bytes.windows(needle.len()).position(|window| window == needle).expect("the sample has it")
}

/// The sample with other bytes at `at`.
fn patched(at: usize, patch: &[u8]) -> Vec<u8> {
    let mut bytes = sample();
    bytes[at..at + patch.len()].copy_from_slice(patch);
    bytes
}

#[test]
fn the_sample_itself_is_accepted() {
    let gguf = check(&sample()).unwrap();
    assert_eq!((gguf.metadata.len(), gguf.tensors.len(), gguf.alignment), (32, 3, 64));
    let mut version_2 = sample();
    version_2[4] = 2;
    assert_eq!(check(&version_2).unwrap().version, 2);
}

#[test]
fn truncation_at_every_byte() {
    let bytes = sample();
    let last = check(&bytes).unwrap().tensors[2].clone();
    let end = (last.offset + last.n_bytes) as usize;
    for len in 0..bytes.len() {
        // Only the padding after the last tensor may be missing.
        assert_eq!(check(&bytes[..len]).is_ok(), len >= end, "truncated to {len} bytes");
    }
}

#[test]
fn every_header_byte_changed() {
    let original = sample();
    let header = check(&original).unwrap().data_start as usize;
    let mut bytes = original.clone();
    let mut refused = 0;
    for at in 0..header {
        let old = original[at];
        for new in [0, 1, 0x20, 0x7f, 0x80, 0xff, old ^ 1, old ^ 0x10, old.wrapping_add(1), !old] {
            bytes[at] = new;
            refused += usize::from(check(&bytes).is_err());
        }
        bytes[at] = old;
    }
    assert!(refused > header, "only {refused} changes were refused");
}

#[test]
fn every_length_and_count_huge() {
    // Any eight bytes of the header may be a length, a count, a dimension or an offset.
    let original = sample();
    let header = check(&original).unwrap().data_start as usize;
    let mut bytes = original.clone();
    for at in 0..header - 8 {
        for huge in [u64::MAX, u64::MAX / 2, 1 << 63, 1 << 61, 1 << 40, u64::from(u32::MAX), 0] {
            bytes[at..at + 8].copy_from_slice(&huge.to_le_bytes());
            let _ = check(&bytes);
        }
        bytes[at..at + 8].copy_from_slice(&original[at..at + 8]);
    }
}

#[test]
fn huge_counts() {
    for count in [u64::MAX, 1 << 60, 1 << 32, 100_000] {
        for at in [8, 16] {
            let bytes = patched(at, &count.to_le_bytes());
            assert!(
                matches!(check(&bytes), Err(Error::CountTooLarge { count: found, .. }) if found == count)
            );
        }
        let tokens = find(&sample(), b"tokenizer.ggml.tokens") + "tokenizer.ggml.tokens".len() + 8;
        let bytes = patched(tokens, &count.to_le_bytes());
        assert!(matches!(check(&bytes), Err(Error::CountTooLarge { count: found, .. }) if found == count));
    }
}

#[test]
fn bad_alignment_and_offsets() {
    let alignment = find(&sample(), b"general.alignment") + "general.alignment".len() + 4;
    for bad in [0u32, 3, 63, 1 << 21, u32::MAX] {
        assert!(matches!(
            check(&patched(alignment, &bad.to_le_bytes())),
            Err(Error::InvalidAlignment { .. })
        ));
    }
    // name, dimensions, one of them, type; then the offset
    let offset = find(&sample(), b"b.weight") + "b.weight".len() + 4 + 8 + 4;
    let at = |offset_value: u64| check(&patched(offset, &offset_value.to_le_bytes()));
    assert!(matches!(at(1), Err(Error::MisalignedTensor { offset: 1, .. })));
    assert!(matches!(at(u64::MAX), Err(Error::MisalignedTensor { .. })));
    assert!(matches!(at(u64::MAX - 63), Err(Error::TensorOutsideFile { .. })));
    assert!(matches!(at(1 << 40), Err(Error::TensorOutsideFile { .. })));
    assert!(matches!(at(0), Err(Error::OverlappingTensors { .. })));
}

#[test]
fn nested_arrays() {
    let element_type = find(&sample(), b"u32s") + "u32s".len() + 4;
    let nested = check(&patched(element_type, &9u32.to_le_bytes()));
    assert_eq!(nested.unwrap_err(), Error::NestedArray { key: "u32s".into() });
}

#[test]
fn duplicate_names() {
    let key = find(&sample(), b"u16s");
    assert_eq!(check(&patched(key, b"i16s")).unwrap_err(), Error::DuplicateKey { key: "i16s".into() });
    let tensor = find(&sample(), b"b.weight");
    let name = "a.weight".to_owned();
    assert_eq!(check(&patched(tensor, b"a")).unwrap_err(), Error::DuplicateTensor { name });
}

#[test]
fn token_ids_out_of_range() {
    let id = find(&sample(), b"bos_token_id") + "bos_token_id".len() + 4;
    for bad in [4u32, 1 << 31, u32::MAX] {
        let found = check(&patched(id, &bad.to_le_bytes()));
        assert!(matches!(found, Err(Error::TokenIdOutOfRange { vocabulary: 4, .. })));
    }
}

/// A file of a split model, by what its header says.
fn shard(no: u16, count: u16) -> Gguf {
    let mut b = Builder::new();
    b.insert("split.no", no).unwrap();
    b.insert("split.count", count).unwrap();
    b.insert("split.tensors.count", i32::from(count)).unwrap();
    b.tensor(format!("t{no}"), GgmlType::F32, &[1]).unwrap();
    check(&finish(b)).unwrap()
}

/// Loads a split model from "files" given as (name, header), the way a loader follows the names.
fn load_split(files: &[(&str, Gguf)]) -> Result<(), Error> {
    let (first, gguf) = &files[0];
    let mut set = ShardSet::begin(first, gguf)?.expect("the file is split");
    for name in set.clone().missing() {
        let (_, gguf) =
            files.iter().find(|file| file.0 == name).ok_or(Error::MissingShard { file: name.clone() })?;
        set.add(&name, gguf)?;
    }
    set.finish()
}

#[test]
fn cyclic_missing_and_duplicate_shards() {
    let names = ["m-00001-of-00003.gguf", "m-00002-of-00003.gguf", "m-00003-of-00003.gguf"];
    let load = |numbers: &[u16]| {
        let files: Vec<_> = names.iter().zip(numbers).map(|(name, &no)| (*name, shard(no, 3))).collect();
        load_split(&files)
    };
    assert_eq!(load(&[0, 1, 2]), Ok(()));
    assert_eq!(load(&[0, 1]), Err(Error::MissingShard { file: names[2].into() }));
    // The second file leads back to the first; the third is the second again; two have changed places.
    assert!(matches!(load(&[0, 0, 2]), Err(Error::DuplicateShard { no: 0, .. })));
    assert!(matches!(load(&[0, 1, 1]), Err(Error::DuplicateShard { no: 1, .. })));
    assert!(matches!(load(&[0, 2, 1]), Err(Error::ShardMismatch { .. })));
    assert!(matches!(load(&[1, 0, 2]), Err(Error::ShardMismatch { .. })));
}

/// The real vocabulary files, if this machine has them; it says so loudly if not.
fn vocabularies() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data/vocab");
    let entries = std::fs::read_dir(&folder).into_iter().flatten();
    let paths = entries.map(|entry| entry.unwrap().path());
    let found: Vec<_> = paths.filter(|p| p.extension().is_some_and(|e| e == "gguf")).collect();
    if found.is_empty() {
        eprintln!("SKIPPED: no vocabulary in {}: nothing real was tested", folder.display());
    }
    found
}

#[test]
fn real_vocabularies_truncated() {
    for path in vocabularies() {
        let bytes = std::fs::read(&path).unwrap();
        check(&bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        // These files have no tensors: their header is all of them.
        for i in 0..200 {
            let len = bytes.len() * i / 200;
            assert!(check(&bytes[..len]).is_err(), "{} truncated to {len}", path.display());
        }
        assert!(check(&bytes[..bytes.len() - 1]).is_err());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

    #[test]
    fn random_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = check(&bytes);
    }

    #[test]
    fn random_bytes_after_a_plausible_start(tensors in 0u64..4, entries in 0u64..4, rest: Vec<u8>) {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend(tensors.to_le_bytes());
        bytes.extend(entries.to_le_bytes());
        bytes.extend(rest);
        let _ = check(&bytes);
    }

    #[test]
    fn random_mutations(
        edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        removed in proptest::option::of((any::<prop::sample::Index>(), 1usize..16)),
        inserted in proptest::option::of((any::<prop::sample::Index>(), any::<[u8; 4]>())),
    ) {
        let mut bytes = sample();
        for (at, value) in edits {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Some((at, n)) = removed {
            let at = at.index(bytes.len());
            bytes.drain(at..(at + n).min(bytes.len()));
        }
        if let Some((at, new)) = inserted {
            let at = at.index(bytes.len());
            bytes.splice(at..at, new);
        }
        let _ = check(&bytes);
    }
}
