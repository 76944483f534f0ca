//! Goldens were written by `tools/reference/quant_goldens.py`.

use super::*;
use std::path::PathBuf;

fn golden(ty: GgmlType, kind: &str) -> Vec<u8> {
    let name = format!("{ty}.{kind}");
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/quant").join(name);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

/// Weights in a golden file: each takes its share of a block and 4 bytes.
fn golden_len(ty: GgmlType, bytes: &[u8]) -> usize {
    bytes.len() / (ty.block_bytes() + 4 * ty.block_len()) * ty.block_len()
}

/// Equal bits, except that any NaN equals any other: converting a signalling f16 NaN may quieten it.
fn same(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan()
}

#[test]
fn decodes_the_goldens_bit_by_bit() {
    for ty in GgmlType::all() {
        let file = golden(ty, "dequant");
        let n = golden_len(ty, &file);
        assert!(n >= 32, "{ty}");
        let (blocks, expected) = file.split_at(ty.row_bytes(n));
        let mut got = vec![0.0; n];
        dequantize_row(ty, blocks, &mut got);
        for (i, (&got, expected)) in got.iter().zip(floats(expected)).enumerate() {
            assert!(same(got, expected), "{ty} weight {i}: {got} for {expected}");
        }
    }
}

#[test]
fn encodes_the_goldens_byte_by_byte() {
    for ty in [F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1] {
        let file = golden(ty, "quant");
        let n = golden_len(ty, &file);
        let (src, expected) = file.split_at(4 * n);
        let mut got = vec![0; expected.len()];
        quantize_row(ty, &floats(src), &mut got);
        let blocks = got.chunks_exact(ty.block_bytes()).zip(expected.chunks_exact(ty.block_bytes()));
        for (i, (got, expected)) in blocks.enumerate() {
            assert_eq!(got, expected, "{ty} block {i}");
        }
    }
}

/// Evaluated apart from `dequantize_row`, in f64, so that a wrong zero point, group length or min shows.
#[test]
fn common_form_equals_the_decoded_weights() {
    for ty in GgmlType::all().filter(|&ty| is_quantised(ty)) {
        let file = golden(ty, "dequant");
        let n = golden_len(ty, &file);
        let (blocks, expected) = file.split_at(ty.row_bytes(n));
        let (mut q, groups) = (vec![0; n], n / group_len(ty));
        let (mut scale, mut min) = (vec![0.0; groups], vec![0.0; if has_min(ty) { groups } else { 0 }]);
        unpack_row(ty, blocks, &mut q, &mut scale, &mut min);
        for (i, expected) in floats(expected).into_iter().enumerate() {
            let g = i / group_len(ty);
            let code = f64::from(i32::from(q[i]) - i32::from(zero_point(ty)));
            let (product, min) = (f64::from(scale[g]) * code, f64::from(min.get(g).copied().unwrap_or(0.0)));
            // Two f32 roundings, of the product and of the sum.
            let tolerance = (product.abs() + min.abs()) * f64::from(f32::EPSILON);
            let close = (product + min - f64::from(expected)).abs() <= tolerance;
            assert!(close || expected.is_nan(), "{ty} weight {i}: {} for {expected}", product + min);
        }
    }
}

/// Deterministic, roughly normal weights, with an outlier now and then as in real rows.
fn weights(n: usize) -> Vec<f32> {
    let mut state = 1u64;
    let mut uniform = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..n).map(|i| (0..6).map(|_| uniform()).sum::<f32>() * if i % 97 == 0 { 0.1 } else { 0.03 }).collect()
}

/// Root mean square error of quantising [`weights`], relative to their root mean square.
/// A little above what was measured, so that a worse quantiser fails; a better one lowers its row.
const ROUND_TRIP_BUDGET: [(GgmlType, f32); 15] = [
    (F32, 0.0),
    (F16, 0.00022),
    (BF16, 0.0018),
    (Q8_0, 0.007),
    (Q6_K, 0.020),
    (Q5_K, 0.040),
    (Q5_1, 0.042),
    (Q5_0, 0.048),
    (IQ4_XS, 0.085),
    (IQ4_NL, 0.084),
    (Q4_K, 0.077),
    (Q4_1, 0.086),
    (Q4_0, 0.095),
    (Q3_K, 0.16),
    (Q2_K, 0.30),
];

#[test]
fn round_trips_stay_within_the_budget() {
    let src = weights(64 * 256);
    let mut report = String::new();
    for (ty, budget) in ROUND_TRIP_BUDGET {
        let mut bytes = vec![0; ty.row_bytes(src.len())];
        let mut back = vec![0.0; src.len()];
        quantize_row(ty, &src, &mut bytes);
        dequantize_row(ty, &bytes, &mut back);
        let error: f32 = src.iter().zip(&back).map(|(a, b)| (a - b).powi(2)).sum();
        let power: f32 = src.iter().map(|a| a * a).sum();
        let rmse = (error / power).sqrt();
        if rmse > budget || rmse < 0.7 * budget {
            report += &format!("{ty}: {rmse:.5}, budget {budget} (which should also not be slack)\n");
        }
    }
    assert!(report.is_empty(), "{report}");
}

/// The error, as in [`ROUND_TRIP_BUDGET`], of ggml's own quantisers on the same weights: `ggml_quantize_chunk` without
/// importances, of the llama.cpp in llama_cpp_python 0.3.36, called from Python on a copy of [`weights`].
const GGML_ERROR: [(GgmlType, f32); 7] = [
    (Q2_K, 0.29900),
    (Q3_K, 0.15625),
    (Q4_K, 0.07298),
    (Q5_K, 0.03722),
    (Q6_K, 0.01868),
    (IQ4_NL, 0.07943),
    (IQ4_XS, 0.08052),
];

/// Root mean square error of a round trip, each error weighed, relative to the root mean square of `src`.
fn weighed_error(ty: GgmlType, src: &[f32], importance: Option<&[f32]>, weigh: impl Fn(usize) -> f32) -> f32 {
    let mut bytes = vec![0; ty.row_bytes(src.len())];
    let mut back = vec![0.0; src.len()];
    quantize_row_weighed(ty, src, importance, &mut bytes);
    dequantize_row(ty, &bytes, &mut back);
    let sum = |of: &dyn Fn(usize) -> f32| (0..src.len()).map(|i| f64::from(weigh(i) * of(i))).sum::<f64>();
    (sum(&|i| (src[i] - back[i]).powi(2)) / sum(&|i| src[i] * src[i])).sqrt() as f32
}

#[test]
fn errors_are_at_most_those_of_ggml() {
    let src = weights(64 * 256);
    for (ty, ggml) in GGML_ERROR {
        let ours = weighed_error(ty, &src, None, |_| 1.0);
        assert!(ours <= 1.01 * ggml, "{ty}: {ours}, ggml {ggml}");
    }
}

/// Where importances differ, the error that they weigh must get smaller; types that make no use of them keep theirs.
#[test]
fn importances_lower_the_error_that_they_weigh() {
    let src = weights(16 * 256);
    let importance: Vec<f32> = (0..src.len()).map(|i| if i % 5 == 0 { 8.0 } else { 0.2 }).collect();
    for ty in GgmlType::all().filter(|&ty| is_quantised(ty)) {
        let [plain, weighed] =
            [None, Some(&*importance)].map(|given| weighed_error(ty, &src, given, |i| importance[i]));
        let bound = if ty == Q8_0 { plain } else { 0.97 * plain };
        assert!(weighed <= bound, "{ty}: {weighed}, without importances {plain}");
    }
}

#[test]
fn odd_importances_encode_without_a_panic() {
    let src = weights(256);
    for odd in [0.0, f32::NAN, f32::INFINITY, 1e38, 1e-45] {
        for ty in GgmlType::all() {
            let mut bytes = vec![0; ty.row_bytes(src.len())];
            quantize_row_weighed(ty, &src, Some(&vec![odd; src.len()]), &mut bytes);
        }
    }
}

#[test]
fn odd_values_encode_without_a_panic() {
    let mut src = weights(256);
    for odd in [0.0, -0.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, 1e-45] {
        for all in [false, true] {
            if all {
                src.fill(odd)
            } else {
                src[7] = odd
            }
            for ty in GgmlType::all() {
                let mut bytes = vec![0; ty.row_bytes(src.len())];
                let mut back = vec![1.0; src.len()];
                quantize_row(ty, &src, &mut bytes);
                dequantize_row(ty, &bytes, &mut back);
                if all && odd == 0.0 {
                    assert!(back.iter().all(|&w| w == 0.0), "{ty}: zeros came back as {:?}", &back[..4]);
                }
            }
        }
    }
}

#[test]
fn nan_survives_the_float_types() {
    for ty in [F32, F16, BF16] {
        let mut bytes = vec![0; ty.row_bytes(1)];
        let mut back = [0.0];
        quantize_row(ty, &[f32::from_bits(0x7f80_0001)], &mut bytes); // all its set bits are cut off
        dequantize_row(ty, &bytes, &mut back);
        assert!(back[0].is_nan(), "{ty}");
    }
}

/// Packing and unpacking are written apart, so a field in the wrong place would show as a large error.
#[test]
fn packed_fields_come_back() {
    for ty in GgmlType::all().filter(|&ty| is_quantised(ty)) {
        let n = 256;
        let zero = i32::from(zero_point(ty));
        let mut q = vec![0; n];
        let mut bytes = vec![0; ty.row_bytes(n)];
        let mut scale = vec![0.0; n / group_len(ty)];
        let mut min = scale.clone();
        quantize_row(ty, &weights(n), &mut bytes);
        let mut once = vec![0.0; n];
        dequantize_row(ty, &bytes, &mut once);
        unpack_row(ty, &bytes, &mut q, &mut scale, &mut min);
        let worst = once.iter().zip(weights(n)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        let widest = scale.iter().fold(0.0f32, |m, s| m.max(s.abs()));
        // No weight lies further off than two steps (26 of the IQ4 table's units).
        let steps = if zero == 128 && ty != Q8_0 { 52.0 } else { 2.0 };
        assert!(worst <= steps * widest, "{ty}: {worst} with steps of {widest}");
    }
}

#[test]
fn matrix_checks_its_shape() {
    let bytes = [0; 4 * 36];
    let m = Matrix::new(Q4_0, 4, 64, &bytes).unwrap();
    assert_eq!((m.row_bytes(), m.row(3).len(), m.rows(1..3).len(), m.rows(4..4).len()), (36, 36, 72, 0));
    assert!(Matrix::new(Q4_0, 4, 65, &bytes).is_err());
    assert!(Matrix::new(Q4_0, 3, 64, &bytes).is_err());
    assert!(Matrix::new(F32, usize::MAX, usize::MAX, &bytes).is_err());
    assert!(Matrix::new(F32, 0, usize::MAX, &[]).is_err(), "a row that overflows");
    let error = Matrix::new(Q4_K, 4, 64, &bytes).unwrap_err().to_string();
    assert_eq!(error, "144 bytes are not a Q4_K matrix of 4 rows and 64 columns");
}

#[test]
#[should_panic(expected = "35 bytes are not 32 weights of Q8_0")]
fn lengths_are_checked() {
    dequantize_row(Q8_0, &[0; 35], &mut [0.0; 32]);
}
