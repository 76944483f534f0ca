//! The other commands, on a small synthetic model.

mod common;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use common::{arg, error, names, ok, run};
use skiff::gguf::{Builder, GgmlType, Gguf};
use skiff::quant;
use skiff_convert::imatrix::Imatrix;

/// A model with rows of whole super-blocks, made once.
fn model() -> &'static Path {
    static MODEL: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = MODEL.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f16.gguf");
        let shape = "layers=8,embedding=256,ffn=512,heads=8,kv-heads=2,vocab=300,context=256";
        ok(&["synth", shape, "F16", arg(&path)]);
        (folder, path)
    });
    path
}

fn parse(path: &Path) -> (Gguf, Vec<u8>) {
    let bytes = std::fs::read(path).unwrap();
    (Gguf::parse(&bytes).unwrap(), bytes)
}

fn data<'a>(gguf: &Gguf, bytes: &'a [u8], name: &str) -> &'a [u8] {
    let t = gguf.tensor(name).unwrap();
    &bytes[t.offset as usize..][..t.n_bytes as usize]
}

fn quantize(to: &str, more: &[&str]) -> (Gguf, Vec<u8>) {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.gguf");
    ok(&[&["quantize", arg(model()), arg(&out), to], more].concat());
    assert_eq!(names(folder.path()), ["out.gguf"]);
    parse(&out)
}

#[test]
fn a_synthetic_model_runs_and_its_logits_are_sane() {
    let engine = skiff::session::Engine::load(model(), Some(2), None).unwrap();
    let options = skiff::session::SessionOptions::default();
    let mut session = skiff::session::Session::new(&engine, options).unwrap();
    session.prompt(&[1, 70, 80, 90], |_, _| true).unwrap();
    let logits = session.state_mut();
    let mut out = vec![0.0; 300];
    engine.model().logits_of(engine.compute(), logits, 0..1, &mut out);
    let rms = (out.iter().map(|x| x * x).sum::<f32>() / 300.0).sqrt();
    assert!((0.3..3.0).contains(&rms), "{rms}");
}

#[test]
fn every_type_and_mix_is_read_back() {
    for (mix, ty) in [
        ("F32", GgmlType::F32),
        ("BF16", GgmlType::BF16),
        ("Q8_0", GgmlType::Q8_0),
        ("Q4_0", GgmlType::Q4_0),
        ("Q4_1", GgmlType::Q4_1),
        ("Q5_0", GgmlType::Q5_0),
        ("Q5_1", GgmlType::Q5_1),
        ("Q2_K", GgmlType::Q2_K),
        ("Q2_K_S", GgmlType::Q2_K),
        ("Q3_K_S", GgmlType::Q3_K),
        ("Q3_K_L", GgmlType::Q3_K),
        ("Q4_K_S", GgmlType::Q4_K),
        ("Q5_K_M", GgmlType::Q5_K),
        ("Q6_K", GgmlType::Q6_K),
        ("iq4_nl", GgmlType::IQ4_NL),
        ("IQ4_XS", GgmlType::IQ4_XS),
    ] {
        let (gguf, bytes) = quantize(mix, &[]);
        assert_eq!(gguf.tensor("blk.3.ffn_gate.weight").unwrap().ty, ty, "{mix}");
        assert_eq!(gguf.tensor("output_norm.weight").unwrap().ty, GgmlType::F32, "{mix}");
        // The blocks are those of the library, of the rows of the input.
        let (source, source_bytes) = parse(model());
        let mut values = vec![0.0; 256];
        let name = "blk.3.ffn_gate.weight";
        quant::dequantize_row(
            GgmlType::F16,
            &data(&source, &source_bytes, name)[512 * 5..][..512],
            &mut values,
        );
        let mut row = vec![0; ty.row_bytes(256)];
        quant::quantize_row(ty, &values, &mut row);
        assert_eq!(data(&gguf, &bytes, name)[5 * row.len()..][..row.len()], row, "{mix}");
    }
}

/// The types that llama.cpp's rules give a model of 8 layers with 4 heads to a key/value head.
#[test]
fn mixes_follow_the_rules() {
    let (gguf, _) = quantize("Q4_K_M", &[]);
    let ty = |name: &str| gguf.tensor(name).unwrap().ty;
    assert_eq!((ty("output.weight"), ty("token_embd.weight")), (GgmlType::Q6_K, GgmlType::Q4_K));
    // The first eighth (layer 0), the last (7), and every third between from layer 3 on.
    for layer in 0..8 {
        let more = [0, 3, 6, 7].contains(&layer);
        let expected = if more { GgmlType::Q6_K } else { GgmlType::Q4_K };
        assert_eq!(ty(&format!("blk.{layer}.attn_v.weight")), expected, "{layer}");
        assert_eq!(ty(&format!("blk.{layer}.ffn_down.weight")), expected, "{layer}");
        assert_eq!(ty(&format!("blk.{layer}.attn_k.weight")), GgmlType::Q4_K, "{layer}");
    }
    assert_eq!(gguf.metadata.u32("general.file_type"), Ok(15));

    let (gguf, _) = quantize("Q4_K_M", &["--pure"]);
    assert!(gguf.tensors.iter().all(|t| matches!(t.ty, GgmlType::Q4_K | GgmlType::F32)));

    let more = [
        "--tensor-type",
        "blk\\.[01]\\.ffn=q5_0",
        "--tensor-type",
        "ffn=q8_0",
        "--output-tensor-type",
        "F16",
    ];
    let (gguf, _) = quantize("Q3_K_M", &more);
    let ty = |name: &str| gguf.tensor(name).unwrap().ty;
    assert_eq!(ty("output.weight"), GgmlType::F16);
    assert_eq!((ty("blk.1.ffn_up.weight"), ty("blk.2.ffn_up.weight")), (GgmlType::Q5_0, GgmlType::Q8_0));
    assert_eq!((ty("blk.1.attn_v.weight"), ty("blk.2.attn_v.weight")), (GgmlType::Q5_K, GgmlType::Q4_K));
}

#[test]
fn an_importance_matrix_is_computed_and_used() {
    let folder = tempfile::tempdir().unwrap();
    let (text, out) = (folder.path().join("text.txt"), folder.path().join("i.gguf"));
    std::fs::write(&text, "The quick brown fox jumps over the lazy dog. ".repeat(20)).unwrap();
    ok(&["imatrix", arg(model()), "-f", arg(&text), "-o", arg(&out), "-c", "64", "--chunks", "3"]);

    let (gguf, bytes) = parse(&out);
    assert_eq!(gguf.metadata.str("general.type"), Ok("imatrix"));
    assert_eq!(gguf.metadata.u32("imatrix.chunk_count"), Ok(3));
    assert_eq!(gguf.metadata.u32("imatrix.chunk_size"), Ok(64));
    assert_eq!(gguf.tensors.len(), 2 * 7 * 8);
    let floats = |name: &str| -> Vec<f32> {
        data(&gguf, &bytes, name).as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    };
    assert_eq!(floats("blk.0.ffn_down.weight.counts"), [192.0]);
    // Norms of ones: the mean square of what they give is 1.
    let sums = floats("blk.0.attn_q.weight.in_sum2");
    let mean = sums.iter().sum::<f32>() / 192.0 / 256.0;
    assert!((mean - 1.0).abs() < 0.01, "{mean}");

    let plain = quantize("Q4_0", &[]).1;
    let (weighed, weighed_bytes) = quantize("Q4_0", &["--imatrix", arg(&out)]);
    assert_eq!(weighed.metadata.u32("quantize.imatrix.chunks_count"), Ok(3));
    assert_ne!(plain, weighed_bytes);
    // Guard of llama.cpp: with importances the first eighth of ffn_down has a min.
    assert_eq!(weighed.tensor("blk.0.ffn_down.weight").unwrap().ty, GgmlType::Q4_1);

    let means = Imatrix::read(&out).unwrap();
    let of = |name: &str| means.of(name, 256).unwrap().unwrap().to_vec();
    assert_eq!(of("blk.0.attn_q.weight"), of("blk.0.attn_v.weight"));
    assert_eq!(of("blk.0.attn_q.weight")[3], sums[3] / 192.0);
    assert!(means.of("blk.0.attn_q.weight", 512).is_err());
}

#[test]
fn importance_matrices_of_the_older_format_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("i.dat");
    let int = |n: i32| n.to_le_bytes().to_vec();
    let entry = [
        int(1),
        int(3),
        b"a.b".to_vec(),
        int(2),
        int(2),
        4f32.to_le_bytes().into(),
        6f32.to_le_bytes().into(),
    ];
    let bytes = [entry.concat(), int(7), int(4), b"text".to_vec()].concat();
    std::fs::write(&path, &bytes).unwrap();
    let imatrix = Imatrix::read(&path).unwrap();
    assert_eq!(imatrix.of("a.b", 2).unwrap().unwrap(), [2.0, 3.0]);
    assert_eq!((imatrix.chunk_count, imatrix.datasets.as_slice()), (7, &["text".to_owned()][..]));
    for end in 0..entry.concat().len() {
        std::fs::write(&path, &bytes[..end]).unwrap();
        assert!(Imatrix::read(&path).is_err(), "cut at {end}");
    }
}

#[test]
fn split_and_merge_give_the_same_file() {
    let folder = tempfile::tempdir().unwrap();
    let prefix = folder.path().join("part");
    ok(&["split", arg(model()), arg(&prefix), "--max-tensors", "30"]);
    let expected = ["part-00001-of-00003.gguf", "part-00002-of-00003.gguf", "part-00003-of-00003.gguf"];
    assert_eq!(names(folder.path()), expected);
    let first = folder.path().join(expected[0]);
    assert!(ok(&["verify", arg(&first)]).contains("files 3"));
    let whole = folder.path().join("whole.gguf");
    ok(&["merge", arg(&first), arg(&whole)]);
    assert!(std::fs::read(&whole).unwrap() == std::fs::read(model()).unwrap());
    let message = error(&["merge", arg(&first), arg(&first)]);
    assert!(message.contains("is the input itself"), "{message}");

    let by_size = tempfile::tempdir().unwrap();
    ok(&["split", arg(model()), arg(&by_size.path().join("x")), "--max-size", "2M"]);
    let total = parse(model()).0.tensors.len();
    let mut found = 0;
    for name in names(by_size.path()) {
        let (gguf, bytes) = parse(&by_size.path().join(name));
        assert!(bytes.len() < 2_020_000, "{}", bytes.len());
        found += gguf.tensors.len();
    }
    assert_eq!(found, total);
}

/// Every type in one file, read by the Python package `gguf`, which decodes the legacy types and K-quants too.
#[test]
fn the_python_package_reads_what_is_written() {
    let python = std::env::var("SKIFF_PYTHON").unwrap_or_else(|_| "python3".into());
    let python = |args: &[&str]| std::process::Command::new(&python).args(args).output();
    if !python(&["-c", "import gguf"]).is_ok_and(|o| o.status.success()) {
        return common::note_skip("Python with the package gguf (SKIFF_PYTHON sets another)");
    }
    let types = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K"];
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("all.gguf");
    let overrides: Vec<String> =
        types.iter().enumerate().map(|(i, ty)| format!("blk.{i}.ffn_gate={ty}")).collect();
    let more = [
        ("ffn_up", "Q5_K"),
        ("ffn_down", "Q6_K"),
        ("attn_q", "IQ4_NL"),
        ("attn_k", "IQ4_XS"),
        ("attn_v", "BF16"),
    ];
    let more = more.map(|(name, ty)| format!("{name}={ty}"));
    let mut args = vec!["quantize", arg(model()), arg(&out), "Q8_0"];
    overrides.iter().chain(&more).for_each(|o| args.extend(["--tensor-type", o]));
    ok(&args);
    // Decoded there and here, and compared with the f16 weights: the error of the coarsest type is below 0.4.
    let code = "import sys, gguf, numpy as np\n\
        a, b = (gguf.GGUFReader(p) for p in sys.argv[1:3])\n\
        assert len(a.tensors) == len(b.tensors)\n\
        for s, t in zip(a.tensors, b.tensors):\n\
        \x20   x, y = (gguf.quants.dequantize(v.data, v.tensor_type).astype(float) for v in (s, t))\n\
        \x20   error = np.sqrt(((x - y) ** 2).mean() / (x ** 2).mean())\n\
        \x20   assert s.name == t.name and error < 0.4, (s.name, t.tensor_type, error)\n\
        print(len({t.tensor_type for t in b.tensors}))\n";
    let output = python(&["-c", code, arg(model()), arg(&out)]).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "14"); // and F32
}

#[test]
fn verify_finds_what_is_not_finite() {
    assert!(ok(&["verify", arg(model())]).contains(": ok, "));
    let sums = ok(&["verify", "--sums", arg(model())]);
    let (gguf, bytes) = parse(model());
    let sum: String = <sha2::Sha256 as sha2::Digest>::digest(data(&gguf, &bytes, "output.weight"))
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    assert!(sums.contains(&format!("{sum}  output.weight\n")), "{sums}");

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bad.gguf");
    let mut builder = Builder::new();
    builder.tensor("good", GgmlType::F32, &[4]).unwrap();
    builder.tensor("bad", GgmlType::Q8_0, &[64, 3]).unwrap();
    let mut writer = builder.start(Vec::new()).unwrap();
    writer.write_tensor(&[0; 16]).unwrap();
    let mut blocks = vec![0; 34 * 6];
    blocks[34 * 3..][..2].copy_from_slice(&[0x00, 0x7c]); // the scale of row 1's second block is infinite
    blocks[34 * 3 + 2] = 1;
    writer.write_tensor(&blocks).unwrap();
    std::fs::write(&path, writer.finish().unwrap()).unwrap();
    let output = run(&["verify", arg(&path)]);
    assert_eq!(output.status.code(), Some(1));
    let report = String::from_utf8(output.stdout).unwrap();
    assert!(report.contains("bad (Q8_0): 32 values") && report.contains("row 1, column 32"), "{report}");
}

#[test]
fn usage_errors_and_failures_leave_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.gguf");
    for args in [
        &["quantize", "a", "b", "Q9_9"][..],
        &["quantize", "a", "b", "Q4_0", "--tensor-type", "(=Q4_0"],
        &["synth", "llama9-7b", "Q4_0", arg(&out)],
        &["synth", "heads=3,kv-heads=2", "Q4_0", arg(&out)],
    ] {
        assert_eq!(run(args).status.code(), Some(2), "{args:?}");
    }
    error(&["quantize", "/does/not/exist", arg(&out), "Q4_0"]);
    let nowhere = folder.path().join("no").join("out.gguf");
    assert!(error(&["quantize", arg(model()), arg(&nowhere), "Q4_0"]).contains("no/out.gguf"));
    assert!(error(&["quantize", arg(model()), arg(model()), "Q4_0"]).contains("is the input itself"));
    let truncated = folder.path().join("cut.gguf");
    std::fs::write(&truncated, &std::fs::read(model()).unwrap()[..100_000]).unwrap();
    error(&["quantize", arg(&truncated), arg(&out), "Q4_0"]);
    assert_eq!(names(folder.path()), ["cut.gguf"]);
}

/// Runs `quantize` where no file may be longer than 64 kB, after the shell command `first`.
#[cfg(target_os = "linux")]
fn quantize_within_64_kb(out: &Path, first: &str) -> std::process::Output {
    let script = format!("{first}; ulimit -f 128; exec \"$0\" \"$@\""); // in blocks of 512 bytes
    let skiff_convert = assert_cmd::cargo::cargo_bin("skiff-convert");
    let mut shell = std::process::Command::new("sh");
    shell.args(["-c", &script]).arg(skiff_convert);
    shell.args(["quantize", arg(model()), arg(out), "Q4_0"]).output().unwrap()
}

/// The system kills what writes beyond its limit, at the same byte each time.
#[cfg(target_os = "linux")]
#[test]
fn a_killed_run_leaves_no_file_that_looks_whole() {
    use std::os::unix::process::ExitStatusExt;
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.gguf");
    let killed = quantize_within_64_kb(&out, ":");
    assert!(killed.status.signal().is_some(), "{killed:?}");
    assert_eq!(names(folder.path()), ["out.gguf.unfinished"]);
    // Nor does the rest stand in the way of the next run.
    ok(&["quantize", arg(model()), arg(&out), "Q4_0"]);
    assert_eq!(names(folder.path()), ["out.gguf"]);
    ok(&["verify", arg(&out)]);
}

#[cfg(target_os = "linux")]
#[test]
fn a_limit_of_file_sizes_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let output = quantize_within_64_kb(&folder.path().join("out.gguf"), "trap '' XFSZ");
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("out.gguf: ") && message.contains("File too large"), "{message}");
    assert!(names(folder.path()).is_empty());
}

#[test]
fn verify_finds_what_is_cut_off() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cut.gguf");
    let whole = std::fs::read(model()).unwrap();
    for length in [0, 3, 23, 200, 10_000, whole.len() / 2, whole.len() - 33] {
        std::fs::write(&path, &whole[..length]).unwrap();
        let output = run(&["verify", arg(&path)]);
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        assert_eq!(output.status.code(), Some(1), "{length} bytes: {said}");
        assert!(said.contains("cut.gguf"), "{length} bytes: {said}");
        // Where the tensors begin, what is missing is a tensor of its own name.
        let named = length < whole.len() / 2 || said.contains(".weight");
        assert!(named, "{length} bytes: {said}");
    }
}

/// `/dev/full` takes no byte, so that a disk that fills up need not be made.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.gguf");
    std::os::unix::fs::symlink("/dev/full", folder.path().join("out.gguf.unfinished")).unwrap();
    let message = error(&["quantize", arg(model()), arg(&out), "Q4_0"]);
    assert!(message.contains("the disk is full"), "{message}");
    assert!(names(folder.path()).is_empty());
}
