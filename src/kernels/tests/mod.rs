//! Every available kernel, every type, awkward shapes, against the scalar code on the same inputs.

mod columns;
mod tiles;

use super::decode_attention::{Next, Rows};
use super::*;
use crate::quant::{is_quantised, quantize_row};

/// A small generator: tests need no better, and the same numbers every time.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float() * self.float() * 3.0).collect()
    }
}

fn scalar() -> Kernels {
    Kernels { isa: &scalar::ISA }
}

/// The kernels to test; a missing one is named loudly, or fails if `SKIFF_REQUIRE_KERNELS` lists it.
fn kernels_under_test() -> Vec<Kernels> {
    let required = std::env::var("SKIFF_REQUIRE_KERNELS").unwrap_or_default();
    for (name, needs, available) in Kernels::list() {
        if !available {
            assert!(
                !required.split(',').any(|r| r == name),
                "kernel {name} is required but this CPU has no {needs}"
            );
            eprintln!("SKIPPED: kernel {name}: this CPU has no {needs}");
        }
    }
    for name in required.split(',').filter(|r| !r.is_empty()) {
        assert!(Kernels::list().any(|(n, ..)| n == name), "kernel {name} is required but not in this build");
    }
    Kernels::available().filter(|k| k.name() != "scalar").collect()
}

fn quantised_types() -> impl Iterator<Item = GgmlType> {
    GgmlType::all().filter(|&ty| is_quantised(ty))
}

/// Rows of weights; every third row is hostile: random bytes, whose scales may be anything finite.
fn weights(rng: &mut Rng, ty: GgmlType, rows: usize, cols: usize) -> Vec<u8> {
    let row_bytes = ty.row_bytes(cols);
    let mut bytes = vec![0; rows * row_bytes];
    for (r, row) in bytes.chunks_exact_mut(row_bytes).enumerate() {
        match r % 4 {
            3 => {} // zero scales
            2 => {
                // Quants at their extremes (-128 in Q8_0), scales as quantised.
                quantize_row(ty, &rng.floats(cols), row);
                let keep = row.to_vec();
                let mut q = vec![0u8; cols];
                let (mut s, mut m) = (vec![0f32; cols / 16], vec![0f32; cols / 16]);
                let fill = if rng.next().is_multiple_of(2) { 0x80 } else { 0xff };
                for (i, b) in row.iter_mut().enumerate() {
                    *b = if rng.next().is_multiple_of(3) { fill } else { keep[i] };
                }
                let groups = cols / quant::group_len(ty);
                quant::unpack_row(ty, row, &mut q, &mut s[..groups], &mut m[..groups]);
                if !s[..groups].iter().chain(&m[..groups]).all(|v| v.abs() < 1e4) {
                    row.copy_from_slice(&keep);
                }
            }
            _ => quantize_row(ty, &rng.floats(cols), row),
        }
    }
    bytes
}

fn activations(rng: &mut Rng, k: Kernels, rows: usize, cols: usize) -> Activations {
    let mut acts = Activations::with_capacity(rows, cols);
    for r in 0..rows {
        let mut x = rng.floats(cols);
        x[cols / 2] *= 50.0;
        if r % 3 == 1 {
            x[..32].fill(0.0);
        }
        k.quantize(&x, acts.row_mut(r));
    }
    acts
}

fn close(a: f32, b: f32, size: f32) -> bool {
    (a - b).abs() <= 2e-5 * size.max(1e-3)
}

/// Sum of the magnitudes of the terms: what rounding errors are relative to.
fn magnitude(ty: GgmlType, row: &[u8], x: Q8Row<'_>) -> f32 {
    let mut w = vec![0f32; x.cols];
    quant::dequantize_row(ty, row, &mut w);
    w.iter().enumerate().map(|(i, w)| (w * x.scale[i / 32] * f32::from(x.q[i])).abs()).sum()
}

fn columns(ty: GgmlType) -> Vec<usize> {
    [1, 2, 3, 4, 5, 9, 16, 18, 43].map(|n| n * ty.block_len()).to_vec()
}

#[test]
fn quantised_activations_equal_scalar() {
    let mut rng = Rng(7);
    for k in kernels_under_test() {
        for cols in [32, 64, 96, 576, 4096] {
            for case in 0..4 {
                let mut x = rng.floats(cols);
                match case {
                    1 => x.fill(0.0),
                    2 => x.iter_mut().for_each(|v| *v *= 1e-35),
                    3 => x.iter_mut().enumerate().for_each(|(i, v)| *v = (i as f32 - 20.0) * 0.5),
                    _ => {}
                }
                let (mut a, mut b) =
                    (Activations::with_capacity(1, cols), Activations::with_capacity(1, cols));
                k.quantize(&x, a.row_mut(0));
                scalar().quantize(&x, b.row_mut(0));
                assert_eq!(a.row(0).q, b.row(0).q, "{} {cols} {case}", k.name());
                assert_eq!(a.row(0).scale, b.row(0).scale, "{} {cols} {case}", k.name());
                assert_eq!(a.row(0).sum, b.row(0).sum, "{} {cols} {case}", k.name());
            }
        }
    }
}

#[test]
fn dot_products_equal_scalar() {
    let mut rng = Rng(11);
    let mut failures = Vec::new();
    for k in kernels_under_test() {
        for ty in quantised_types() {
            for cols in columns(ty) {
                for rows in [1, 2, 3, 4, 5, 8, 11] {
                    let w = weights(&mut rng, ty, rows, cols);
                    let acts = activations(&mut rng, scalar(), 1, cols);
                    let (mut got, mut want) = (vec![0f32; rows], vec![0f32; rows]);
                    k.dot(ty, &w, acts.row(0), &mut got);
                    scalar().dot(ty, &w, acts.row(0), &mut want);
                    for r in 0..rows {
                        let size =
                            magnitude(ty, &w[r * ty.row_bytes(cols)..][..ty.row_bytes(cols)], acts.row(0));
                        if !close(got[r], want[r], size) {
                            failures.push(format!(
                                "{} {ty} {rows}x{cols} row {r}: {} {}",
                                k.name(),
                                got[r],
                                want[r]
                            ));
                        }
                    }
                }
            }
        }
    }
    assert!(
        failures.is_empty(),
        "{} failures:\n{}",
        failures.len(),
        failures.iter().take(40).cloned().collect::<Vec<_>>().join("\n")
    );
}

#[test]
fn a_row_does_not_depend_on_its_neighbours() {
    let mut rng = Rng(5);
    for k in kernels_under_test() {
        for ty in quantised_types() {
            let cols = 5 * 256;
            let w = weights(&mut rng, ty, 7, cols);
            let acts = activations(&mut rng, k, 1, cols);
            let mut all = [0f32; 7];
            k.dot(ty, &w, acts.row(0), &mut all);
            for (r, row) in w.chunks_exact(ty.row_bytes(cols)).enumerate() {
                let mut one = [0f32];
                k.dot(ty, row, acts.row(0), &mut one);
                assert_eq!(one[0].to_bits(), all[r].to_bits(), "{} {ty} row {r}", k.name());
            }
        }
    }
}

#[test]
fn products_of_several_tokens_are_those_of_each() {
    let mut rng = Rng(17);
    for k in kernels_under_test() {
        for ty in quantised_types() {
            for (cols, rows) in columns(ty).into_iter().zip([1, 4, 5, 13, 9, 17, 2, 8, 7]) {
                for tokens in [1, 2, 3, 4, 7, 9] {
                    let w = weights(&mut rng, ty, rows, cols);
                    let acts = activations(&mut rng, k, tokens, cols);
                    let (mut all, mut one) = (vec![0f32; tokens * rows], vec![0f32; rows]);
                    k.dot_tokens(ty, &w, &acts, &mut all);
                    for (t, all) in all.chunks_exact(rows).enumerate() {
                        k.dot(ty, &w, acts.row(t), &mut one);
                        let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                        assert_eq!(bits(all), bits(&one), "{} {ty} {rows}x{cols} token {t}", k.name());
                    }
                }
            }
        }
    }
}

#[test]
fn unpacked_panels_equal_scalar() {
    let mut rng = Rng(13);
    let (mut a, mut b) = (Panel::default(), Panel::default());
    for k in kernels_under_test() {
        for ty in quantised_types() {
            let cols = 512.max(ty.block_len() * 3);
            for (rows, coarse) in [(1, false), (31, false), (31, true), (32, false), (32, true)] {
                let w = weights(&mut rng, ty, rows, cols);
                for range in [0..ty.block_len(), 0..512, 256..512, 256..256 + ty.block_len()] {
                    k.unpack(ty, (&w, ty.row_bytes(cols)), range.clone(), coarse, &mut a);
                    scalar().unpack(ty, (&w, ty.row_bytes(cols)), range.clone(), coarse, &mut b);
                    let n = range.len() * PANEL_ROWS;
                    let g = a.groups() * PANEL_ROWS;
                    assert!(a.q.0[..n] == b.q.0[..n], "{} {ty} {rows} {range:?}", k.name());
                    assert_eq!(a.scale[..g], b.scale[..g], "{} {ty} {rows} {range:?}", k.name());
                    assert!(!a.has_min || a.min[..g] == b.min[..g], "{} {ty} {rows} {range:?}", k.name());
                }
            }
        }
    }
}

#[test]
fn gemm_equals_scalar() {
    let mut rng = Rng(17);
    // Nothing of a panel is left over for the next type.
    let mut panel = Panel::default();
    for k in kernels_under_test() {
        for ty in quantised_types() {
            for (tokens, cols) in [(1, 1), (2, 2), (3, 9), (5, 2), (6, 16), (7, 1), (13, 2), (32, 2)] {
                let cols = (cols * ty.block_len()).min(512);
                let w = weights(&mut rng, ty, 32, cols);
                let acts = activations(&mut rng, scalar(), tokens, cols);
                scalar().unpack(ty, (&w, ty.row_bytes(cols)), 0..cols, tokens % 2 == 0, &mut panel);
                let (mut got, mut want) = (vec![0.5; tokens * 32], vec![0.5; tokens * 32]);
                k.gemm(&panel, acts.from_col(0..acts.rows(), 0), &mut got);
                scalar().gemm(&panel, acts.from_col(0..acts.rows(), 0), &mut want);
                for (i, (g, w_)) in got.iter().zip(&want).enumerate() {
                    let row = &w[i % 32 * ty.row_bytes(cols)..][..ty.row_bytes(cols)];
                    let size = magnitude(ty, row, acts.row(i / 32)).max(1.0);
                    assert!(close(*g, *w_, size), "{} {ty} {tokens}x{cols} at {i}: {g} {w_}", k.name());
                }
            }
        }
    }
}

#[test]
fn float_functions_equal_scalar() {
    let mut rng = Rng(23);
    for k in kernels_under_test().into_iter().chain([scalar()]) {
        for n in [0, 1, 15, 16, 17, 64, 100, 128, 576] {
            let (a, b) = (rng.floats(n), rng.floats(n));
            let half: Vec<u16> = b.iter().map(|&b| half::f16::from_f32(b).to_bits()).collect();
            let wide: Vec<f32> = half.iter().map(|&b| half::f16::from_bits(b).to_f32()).collect();
            let exact = |a: &[f32], b: &[f32]| -> f64 {
                a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
            };
            assert!((f64::from(k.dot_f32(&a, &b)) - exact(&a, &b)).abs() < 1e-3);
            let mut out = vec![0.0; n];
            k.widen(&half, &mut out);
            assert_eq!(out, wide);
            let mut e = a.clone();
            let sum = k.exp_sum(&mut e, 1.5);
            let want: Vec<f64> = a.iter().map(|a| f64::from(a - 1.5).exp()).collect();
            assert!(
                e.iter().zip(&want).all(|(e, w)| (f64::from(*e) - w).abs() <= 3e-7 * w),
                "{} exp",
                k.name()
            );
            assert!((f64::from(sum) - want.iter().sum::<f64>()).abs() < 1e-4 * (n.max(1) as f64));
            let mut s = a.clone();
            k.silu_mul(&mut s, &b);
            for i in 0..n {
                let want = f64::from(a[i]) / (1.0 + (-f64::from(a[i])).exp()) * f64::from(b[i]);
                assert!((f64::from(s[i]) - want).abs() <= 1e-6 * want.abs().max(1e-6), "{} silu", k.name());
            }
        }
        let mut far = [-1e30, -200.0, -88.0, 0.0];
        let sum = k.exp_sum(&mut far, 0.0);
        assert!(far[0] < 1e-37 && (sum - 1.0).abs() < 1e-6);
    }
}

#[test]
fn attention_products_equal_exact_ones() {
    let mut rng = Rng(31);
    for k in kernels_under_test().into_iter().chain([scalar()]) {
        for (dim, n) in [(64, 9), (128, 4), (80, 6), (96, 3), (48, 1), (20, 5), (160, 7), (64, 0)] {
            let (q, w) = (rng.floats(dim), rng.floats(n));
            let half: Vec<u16> =
                rng.floats(dim * n).iter().map(|&b| half::f16::from_f32(b).to_bits()).collect();
            let wide: Vec<f32> = half.iter().map(|&b| half::f16::from_bits(b).to_f32()).collect();
            let (mut scores, mut scores_f16) = (vec![0.0; n], vec![0.0; n]);
            k.dots(&q, &wide, &mut scores);
            k.dots_f16(&q, &half, &mut scores_f16);
            assert_eq!(scores, scores_f16);
            let (mut out, mut out_f16) = (q.clone(), q.clone());
            k.add_weighted(&mut out, &w, &wide);
            k.add_weighted_f16(&mut out_f16, &w, &half);
            assert_eq!(out, out_f16);
            let product = |a: f32, b: f32| f64::from(a) * f64::from(b);
            for (key, score) in wide.chunks(dim).zip(&scores) {
                let want: f64 = key.iter().zip(&q).map(|(a, b)| product(*a, *b)).sum();
                assert!((f64::from(*score) - want).abs() < 1e-4, "{} {dim}x{n}: {score} {want}", k.name());
                let mut alone = [0.0];
                k.dots(&q, key, &mut alone);
                assert_eq!(alone[0].to_bits(), score.to_bits(), "a score depends on its neighbours");
            }
            for (i, out) in out.iter().enumerate() {
                let sum: f64 = (0..n).map(|j| product(w[j], wide[j * dim + i])).sum();
                assert!((f64::from(*out) - f64::from(q[i]) - sum).abs() < 1e-4, "{} {dim}x{n}", k.name());
            }
        }
    }
}

/// Heads of a group share keys and values; none sees that it is not alone.
#[test]
fn attention_products_of_several_rows_are_those_of_each() {
    let mut rng = Rng(37);
    for k in kernels_under_test().into_iter().chain([scalar()]) {
        for (rows, dim, n) in
            [(1, 64, 9), (2, 64, 7), (3, 128, 4), (4, 80, 6), (6, 64, 5), (7, 20, 5), (3, 64, 0)]
        {
            let stride = n + 3;
            let (q, w) = (rng.floats(rows * dim), rng.floats(rows * stride));
            let half: Vec<u16> =
                rng.floats(dim * n).iter().map(|&b| half::f16::from_f32(b).to_bits()).collect();
            let wide: Vec<f32> = half.iter().map(|&b| half::f16::from_bits(b).to_f32()).collect();
            let queries = Rows { data: &q, rows, cols: dim, stride: dim };
            let weights = Rows { data: &w, rows, cols: n, stride };
            // What is fetched may be longer or shorter than what is read.
            let bytes: &[u8] = bytemuck::cast_slice(&half);
            let (mut scores, mut scores_f16) = (vec![0.0; rows * stride], vec![0.0; rows * stride]);
            k.dots_of_rows(queries, &wide, (&mut scores, stride), Next(bytes));
            k.dots_f16_of_rows(queries, &half, (&mut scores_f16, stride), Next(bytes));
            let (mut out, mut out_f16) = (q.clone(), q.clone());
            k.add_weighted_rows(&mut out, weights, &wide, Next(bytes));
            k.add_weighted_f16_rows(&mut out_f16, weights, &half, Next(&bytes[..bytes.len() / 2]));
            assert!(scores == scores_f16 && out == out_f16, "{} {rows}x{dim}x{n}", k.name());
            for r in 0..rows {
                let (mut alone, mut sum) = (vec![0.0; n], q[r * dim..][..dim].to_vec());
                k.dots(&q[r * dim..][..dim], &wide, &mut alone);
                k.add_weighted(&mut sum, &w[r * stride..][..n], &wide);
                assert!(alone == scores[r * stride..][..n], "{} {rows}x{dim}x{n}", k.name());
                assert!(sum == out[r * dim..][..dim], "{} {rows}x{dim}x{n}", k.name());
            }
        }
    }
}

#[test]
fn float_rows_equal_exact_products() {
    let mut rng = Rng(29);
    for k in kernels_under_test().into_iter().chain([scalar()]) {
        for ty in [GgmlType::F32, GgmlType::F16, GgmlType::BF16] {
            for cols in [1, 16, 33, 64, 200] {
                let (x, w) = (rng.floats(cols), rng.floats(3 * cols));
                let mut bytes = vec![0; 3 * ty.row_bytes(cols)];
                quantize_row(ty, &w, &mut bytes);
                let mut wide = vec![0f32; 3 * cols];
                quant::dequantize_row(ty, &bytes, &mut wide);
                let mut out = [0f32; 3];
                k.dot_float(ty, &bytes, &x, &mut out);
                for (row, out) in wide.chunks(cols).zip(out) {
                    let want: f64 = row.iter().zip(&x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
                    assert!((f64::from(out) - want).abs() < 1e-4, "{} {ty} {cols}", k.name());
                }
            }
        }
    }
}

#[test]
fn selection_names_what_is_wrong() {
    let error = Kernels::select(Some("avx9000")).unwrap_err().to_string();
    assert!(error.contains("avx9000") && error.contains("scalar"), "{error}");
    assert_eq!(Kernels::select(Some("scalar")).unwrap().name(), "scalar");
}

/// A row all of whose bytes are `fill` but for the 16-bit floats, for which a quantised row is the pattern.
fn extreme_row(ty: GgmlType, cols: usize, fill: u8) -> Vec<u8> {
    let mut row = vec![0; ty.row_bytes(cols)];
    let ramp: Vec<f32> = (0..cols).map(|i| (i % 32) as f32 - 15.5).collect();
    quantize_row(ty, &ramp, &mut row);
    let floats: &[usize] = match ty {
        GgmlType::Q4_1 | GgmlType::Q5_1 | GgmlType::Q4_K | GgmlType::Q5_K => &[0, 1, 2, 3],
        GgmlType::Q2_K => &[80, 81, 82, 83],
        GgmlType::Q3_K => &[108, 109],
        GgmlType::Q6_K => &[208, 209],
        _ => &[0, 1],
    };
    for block in row.chunks_exact_mut(ty.block_bytes()) {
        for (i, b) in block.iter_mut().enumerate() {
            if !floats.contains(&i) {
                *b = fill;
            }
        }
    }
    row
}

/// Seven rows of activations: all 127, all -127, and pairs of each sign.
fn extreme_activations(k: Kernels, cols: usize) -> Activations {
    let mut acts = Activations::with_capacity(7, cols);
    for t in 0..7 {
        let sign =
            |i: usize| [false, true, i.is_multiple_of(2), i % 4 < 2, i % 16 < 8, i % 32 < 16, i < 256][t];
        let x: Vec<f32> = (0..cols).map(|i| if sign(i) { -1.0 } else { 1.0 }).collect();
        k.quantize(&x, acts.row_mut(t));
        assert!(acts.row(t).q.iter().all(|q| q.abs() == 127));
    }
    acts
}

/// Weights and activations at the ends of their ranges: what would saturate 16-bit sums of products.
#[test]
fn extreme_products_are_exact() {
    for k in kernels_under_test() {
        for ty in quantised_types() {
            let cols = 512;
            for fill in [0x00, 0x7f, 0x80, 0xff] {
                let row = extreme_row(ty, cols, fill);
                let w = row.repeat(PANEL_ROWS);
                let acts = extreme_activations(k, cols);
                let mut panel = Panel::default();
                k.unpack(ty, (&w, row.len()), 0..cols, false, &mut panel);
                let mut got = vec![0.0; 7 * PANEL_ROWS];
                k.gemm(&panel, acts.from_col(0..acts.rows(), 0), &mut got);
                for t in 0..7 {
                    let (mut one, mut want) = ([0f32; 5], [0f32; 5]);
                    k.dot(ty, &w[..5 * row.len()], acts.row(t), &mut one);
                    scalar().dot(ty, &w[..5 * row.len()], acts.row(t), &mut want);
                    let size = magnitude(ty, &row, acts.row(t));
                    let many = &got[t * PANEL_ROWS..][..PANEL_ROWS];
                    for v in one.iter().chain(many) {
                        assert!(close(*v, want[0], size), "{} {ty} {fill:#x} {t}: {v} {}", k.name(), want[0]);
                    }
                }
            }
        }
    }
}

#[test]
fn products_with_listed_rows_are_those_of_all_rows() {
    let mut rng = Rng(17);
    let mut all = kernels_under_test();
    all.push(scalar());
    for (k, ty) in all.into_iter().flat_map(|k| quantised_types().map(move |ty| (k, ty))) {
        for cols in columns(ty) {
            let w = weights(&mut rng, ty, 23, cols);
            let x = activations(&mut rng, k, 1, cols);
            let mut dense = vec![0.0; 23];
            k.dot(ty, &w, x.row(0), &mut dense);
            for left_out in [0, 1, 3, 20] {
                let rows: Vec<u32> = (0..23).filter(|r| r * 7 % 23 >= left_out).collect();
                let mut out = vec![f32::NAN; rows.len()];
                k.dot_listed(ty, &w, &rows, x.row(0), &mut out);
                let bits: Vec<u32> = out.iter().map(|v| v.to_bits()).collect();
                let want: Vec<u32> = rows.iter().map(|&r| dense[r as usize].to_bits()).collect();
                assert_eq!(bits, want, "{} {ty} {cols} {left_out}", k.name());
            }
        }
    }
}

#[test]
#[should_panic]
fn rows_that_are_not_there_are_refused() {
    let k = scalar();
    let x = activations(&mut Rng(1), k, 1, 32);
    k.dot_listed(GgmlType::Q4_0, &[0; 36], &[0, 2], x.row(0), &mut [0.0; 2]);
}
