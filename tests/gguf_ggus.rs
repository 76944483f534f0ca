//! Cross-check against `ggus`, an independent implementation: on valid files both readers must agree, and
//! what its writer writes must be readable here.
//!
//! `ggus` is not safe on damaged files, so every file is first accepted by skiff's parser. It has wrong block
//! sizes for IQ4_NL and IQ4_XS, so those types stay out.

use ggus::{GGmlType, GGuf, GGufFileHeader, GGufFileWriter, GGufMetaDataValueType as Ty, GGufReader};
use skiff::gguf::{Array, Builder, GgmlType, Gguf, StringArray, Value};
use std::path::{Path, PathBuf};

/// Types whose size `ggus` knows.
fn common_types() -> impl Iterator<Item = GgmlType> {
    GgmlType::all().filter(|ty| !matches!(ty, GgmlType::IQ4_NL | GgmlType::IQ4_XS))
}

/// A file with every value type, every array type but those that `ggus` cannot hold (strings that are not
/// UTF-8), and a tensor of every common type.
fn sample() -> Vec<u8> {
    let mut b = Builder::new();
    let strings: StringArray = ["", "ab", "\u{2581}the"].iter().collect();
    let entries: Vec<(&str, Value)> = vec![
        ("general.architecture", "llama".into()),
        ("general.alignment", 64u32.into()),
        ("u8", 200u8.into()),
        ("i8", (-100i8).into()),
        ("u16", 60_000u16.into()),
        ("i16", (-30_000i16).into()),
        ("i32", i32::MIN.into()),
        ("u64", u64::MAX.into()),
        ("i64", i64::MIN.into()),
        ("f32", 1.5e-5f32.into()),
        ("f64", 1.5e-300f64.into()),
        ("yes", true.into()),
        ("no", false.into()),
        ("u8s", Array::U8(vec![1, 2, 255]).into()),
        ("i8s", vec![-1i8, 1].into()),
        ("u16s", vec![1u16, 65535].into()),
        ("i16s", vec![-1i16].into()),
        ("u32s", vec![1u32, u32::MAX].into()),
        ("i32s", vec![-1i32, 5].into()),
        ("u64s", vec![1u64, u64::MAX].into()),
        ("i64s", vec![-1i64].into()),
        ("f32s", vec![0.5f32, -0.0].into()),
        ("f64s", vec![0.1f64].into()),
        ("bools", vec![true, false, true].into()),
        ("strs", strings.into()),
        ("none", Array::F32(vec![]).into()),
    ];
    for (key, value) in entries {
        b.insert(key, value).unwrap();
    }
    for (i, ty) in common_types().enumerate() {
        let shape = [256, 1 + i as u64, 2, 1];
        b.tensor(format!("blk.{i}.weight"), ty, &shape[..1 + i % 4]).unwrap();
    }
    let mut w = b.start(Vec::new()).unwrap();
    while let Some(n) = w.next_tensor().map(|t| t.n_bytes as usize) {
        w.write_tensor(&(0..n).map(|i| i as u8).collect::<Vec<_>>()).unwrap();
    }
    w.finish().unwrap()
}

/// Asserts that both readers see the same file.
fn assert_agreement(bytes: &[u8]) {
    let ours = Gguf::parse(bytes).unwrap();
    let theirs = GGuf::new(bytes).unwrap();
    assert_eq!(ours.version, theirs.header.version);
    assert_eq!(ours.alignment, theirs.alignment as u64);

    let our_keys: Vec<&str> = ours.metadata.iter().map(|(key, _)| key).collect();
    let their_keys: Vec<&str> = theirs.meta_kvs.keys().copied().collect();
    assert_eq!(our_keys, their_keys);
    for (key, value) in ours.metadata.iter() {
        let kv = &theirs.meta_kvs[key];
        assert_eq!(value.value_type().id(), kv.ty() as u32, "{key}");
        assert!(*value == their_value(kv.ty(), &mut kv.value_reader()), "values of {key} differ");
    }

    assert_eq!(ours.tensors.len(), theirs.tensors.len());
    for (our, (name, meta)) in ours.tensors.iter().zip(&theirs.tensors) {
        let their = meta.to_info();
        assert_eq!((our.name.as_str(), our.shape.as_slice()), (*name, their.shape()));
        assert_eq!((our.ty.id(), our.n_bytes), (their.ty() as u32, their.nbytes() as u64));
        assert_eq!(our.offset - ours.data_start, their.offset() as u64);
        let our_data = &bytes[our.offset as usize..][..our.n_bytes as usize];
        assert_eq!(our_data, &theirs.data[their.offset()..][..their.nbytes()]);
    }
}

fn their_value(ty: Ty, reader: &mut GGufReader) -> Value {
    match ty {
        Ty::U8 => Value::U8(reader.read().unwrap()),
        Ty::I8 => Value::I8(reader.read().unwrap()),
        Ty::U16 => Value::U16(reader.read().unwrap()),
        Ty::I16 => Value::I16(reader.read().unwrap()),
        Ty::U32 => Value::U32(reader.read().unwrap()),
        Ty::I32 => Value::I32(reader.read().unwrap()),
        Ty::F32 => Value::F32(reader.read().unwrap()),
        Ty::Bool => Value::Bool(reader.read_bool().unwrap()),
        Ty::String => reader.read_str().unwrap().into(),
        Ty::Array => their_array(reader).into(),
        Ty::U64 => Value::U64(reader.read().unwrap()),
        Ty::I64 => Value::I64(reader.read().unwrap()),
        Ty::F64 => Value::F64(reader.read().unwrap()),
    }
}

fn their_array(reader: &mut GGufReader) -> Array {
    fn numbers<T: Copy + 'static>(reader: &mut GGufReader, n: usize) -> Vec<T> {
        (0..n).map(|_| reader.read().unwrap()).collect()
    }
    let (element, n) = reader.read_arr_header().unwrap();
    match element {
        Ty::U8 => Array::U8(numbers(reader, n)),
        Ty::I8 => Array::I8(numbers(reader, n)),
        Ty::U16 => Array::U16(numbers(reader, n)),
        Ty::I16 => Array::I16(numbers(reader, n)),
        Ty::U32 => Array::U32(numbers(reader, n)),
        Ty::I32 => Array::I32(numbers(reader, n)),
        Ty::F32 => Array::F32(numbers(reader, n)),
        Ty::Bool => Array::Bool((0..n).map(|_| reader.read_bool().unwrap()).collect()),
        Ty::String => Array::String((0..n).map(|_| reader.read_str().unwrap()).collect()),
        Ty::Array => panic!("skiff's parser refuses nested arrays"),
        Ty::U64 => Array::U64(numbers(reader, n)),
        Ty::I64 => Array::I64(numbers(reader, n)),
        Ty::F64 => Array::F64(numbers(reader, n)),
    }
}

#[test]
fn both_readers_agree_on_what_skiff_writes() {
    assert_agreement(&sample());
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
fn both_readers_agree_on_real_vocabularies() {
    for path in vocabularies() {
        assert_agreement(&std::fs::read(&path).unwrap());
    }
}

#[test]
fn skiff_reads_what_ggus_writes() {
    let string = |s: &str| [&(s.len() as u64).to_le_bytes(), s.as_bytes()].concat();
    let mut bytes = Vec::new();
    // The writer copies the header as it is given: the counts have to be right beforehand.
    let mut w = GGufFileWriter::new(&mut bytes, GGufFileHeader::new(3, 2, 4)).unwrap();
    w.write_alignment(64).unwrap();
    // Values are written as given too: strings need their length.
    w.write_meta_kv("general.architecture", Ty::String, &string("llama")).unwrap();
    w.write_meta_kv("llama.block_count", Ty::U32, &2u32.to_le_bytes()).unwrap();
    let strings = [&8u32.to_le_bytes()[..], &2u64.to_le_bytes(), &string("a"), &string("bc")].concat();
    w.write_meta_kv("strings", Ty::Array, &strings).unwrap();
    let mut w = w.finish(true);
    w.write_tensor("a", GGmlType::F32, &[3, 2], vec![1u8; 24]).unwrap();
    w.write_tensor("b", GGmlType::Q8_0, &[64], vec![2u8; 68]).unwrap();
    w.finish().unwrap();
    bytes.resize(bytes.len().next_multiple_of(64), 0); // it does not pad the last tensor

    let gguf = Gguf::parse(&bytes).unwrap();
    assert_eq!(gguf.alignment, 64);
    assert_eq!(gguf.metadata.str("general.architecture"), Ok("llama"));
    assert_eq!(gguf.metadata.u32("llama.block_count"), Ok(2));
    let read: Vec<&[u8]> = gguf.metadata.array_str("strings").unwrap().iter().collect();
    assert_eq!(read, [&b"a"[..], b"bc"]);
    let tensor = |name| {
        let t = gguf.tensor(name).unwrap();
        (t.ty, t.shape.as_slice(), &bytes[t.offset as usize..][..t.n_bytes as usize])
    };
    assert_eq!(tensor("a"), (GgmlType::F32, &[3, 2][..], &[1; 24][..]));
    assert_eq!(tensor("b"), (GgmlType::Q8_0, &[64][..], &[2; 68][..]));
    assert_agreement(&bytes);
}
