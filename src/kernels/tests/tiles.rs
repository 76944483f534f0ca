//! Products by a matrix unit, and attention in tiles.

use super::*;
use crate::kernels::tiles;

/// Plain code for what a matrix unit does.
fn tile_reference() -> Kernels {
    static ISA: Isa = Isa {
        functions: Functions { tiles: Some(&tiles::reference::FUNCTIONS), ..scalar::ISA.functions },
        ..scalar::ISA
    };
    Kernels { isa: &ISA }
}

/// Rows of `x` as tiles.
fn packed(k: Kernels, x: &[f32], cols: usize) -> tiles::TileInputs {
    let mut inputs = tiles::TileInputs::default();
    inputs.reshape(x.len() / cols, cols);
    for (x, to) in x.chunks(tiles::TILE * cols).zip(inputs.groups_mut()) {
        k.pack_tiles(x, to);
    }
    inputs
}

/// `[token][row]`: the products of some rows of weights with all of `x`, chunk by chunk.
fn tile_products(
    k: Kernels,
    ty: GgmlType,
    w: &[u8],
    x: &tiles::TileInputs,
    panel: &mut tiles::TilePanel,
) -> Vec<f32> {
    let (cols, step) = (x.cols(), tiles::chunk_cols(x.cols()));
    let mut acc = vec![0f32; x.groups() * tiles::TILE * PANEL_ROWS];
    for (chunk, from) in (0..cols).step_by(step).enumerate() {
        k.unpack_tiles(ty, (w, ty.row_bytes(cols)), from..(from + step).min(cols), false, panel);
        k.multiply_tiles(panel, x, chunk, &mut acc);
    }
    k.turn_tiles(&mut acc);
    acc
}

#[test]
fn activations_in_tiles_equal_plain_code() {
    let mut rng = Rng(41);
    for k in kernels_under_test().into_iter().filter(Kernels::has_tiles) {
        for cols in [32, 64, 96, 256, 512, 576, 1536, 4096] {
            for rows in [1, 5, 16, 17, 35] {
                let mut x = rng.floats(rows * cols);
                x[cols / 2] *= 500.0;
                x[..cols / 2].fill(0.0);
                let (a, b) = (packed(k, &x, cols), packed(tile_reference(), &x, cols));
                for group in 0..a.groups() {
                    for chunk in 0..cols.div_ceil(tiles::chunk_cols(cols)) {
                        let ((a, a_scale), (b, b_scale)) = (a.part(group, chunk), b.part(group, chunk));
                        assert_eq!(a_scale, b_scale, "{k:?} {rows}x{cols}");
                        assert!(
                            a.iter().zip(b).all(|(a, b)| a.0 == b.0),
                            "{k:?} {rows}x{cols} {group} {chunk}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn weights_in_tiles_equal_plain_code() {
    let mut rng = Rng(43);
    for k in kernels_under_test().into_iter().filter(Kernels::has_tiles) {
        for ty in quantised_types() {
            for blocks in [1, 2, 3, 5, 9, 16] {
                let cols = (blocks * ty.block_len()).min(PANEL_COLS);
                for rows in [1, 7, 8, 9, 17, 32] {
                    let coarse = rows % 2 == 1;
                    let w = weights(&mut rng, ty, rows, cols);
                    let (mut a, mut b) = (tiles::TilePanel::default(), tiles::TilePanel::default());
                    k.unpack_tiles(ty, (&w, ty.row_bytes(cols)), 0..cols, coarse, &mut a);
                    tile_reference().unpack_tiles(ty, (&w, ty.row_bytes(cols)), 0..cols, coarse, &mut b);
                    assert_eq!(a.scale, b.scale, "{k:?} {ty} {rows}x{cols}");
                    for row in 0..rows {
                        for col in 0..cols {
                            let (at, place) = tiles::TilePanel::place(row, col / tiles::STEP);
                            let byte =
                                |p: &tiles::TilePanel, t: usize| p.tiles[t].0[place][col % tiles::STEP];
                            let (a, b) = (at.map(|t| byte(&a, t)), at.map(|t| byte(&b, t)));
                            assert_eq!(a, b, "{k:?} {ty} {rows}x{cols} at {row}, {col}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn products_in_tiles_equal_plain_code_and_are_nearly_exact() {
    let mut rng = Rng(47);
    for k in kernels_under_test().into_iter().filter(Kernels::has_tiles) {
        let mut panel = tiles::TilePanel::default();
        for ty in quantised_types() {
            for (tokens, blocks, rows) in [(1, 1, 1), (16, 3, 32), (17, 5, 31), (40, 18, 32), (3, 43, 9)] {
                let cols = blocks * ty.block_len();
                let (w, x) = (weights(&mut rng, ty, rows, cols), rng.floats(tokens * cols));
                let got = tile_products(k, ty, &w, &packed(k, &x, cols), &mut panel);
                let reference = tile_reference();
                let want = tile_products(
                    reference,
                    ty,
                    &w,
                    &packed(reference, &x, cols),
                    &mut tiles::TilePanel::default(),
                );
                let mut row = vec![0f32; cols];
                for r in 0..rows {
                    quant::dequantize_row(ty, &w[r * ty.row_bytes(cols)..][..ty.row_bytes(cols)], &mut row);
                    let most = row.iter().fold(0f32, |m, w| m.max(w.abs()));
                    for t in 0..tokens {
                        let (x, at) = (&x[t * cols..][..cols], t * PANEL_ROWS + r);
                        let size: f32 = x.iter().zip(&row).map(|(x, w)| (x * w).abs()).sum();
                        assert!(
                            close(got[at], want[at], size),
                            "{k:?} {ty} {}: {} {}",
                            at,
                            got[at],
                            want[at]
                        );
                        let exact: f64 = x.iter().zip(&row).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                        // What is left out of a product of the greatest numbers is 2^-16 of it; signs are mixed.
                        let x_most = x.iter().fold(0f32, |m, x| m.max(x.abs()));
                        let slack = 1.5e-4 * (most * x_most) as f64 * (cols as f64).sqrt().max(8.0);
                        assert!(
                            (f64::from(got[at]) - exact).abs() <= slack,
                            "{k:?} {ty}: {} {exact}",
                            got[at]
                        );
                    }
                }
            }
        }
    }
}

/// The greatest sums that a chunk can have: every weight and activation at its limit.
#[test]
fn the_greatest_sums_fit_tiles() {
    for k in kernels_under_test().into_iter().filter(Kernels::has_tiles) {
        let (ty, cols) = (GgmlType::Q8_0, PANEL_COLS);
        let mut w = vec![0; ty.row_bytes(cols)];
        quantize_row(ty, &vec![-1.0; cols], &mut w);
        for sign in [1.0, -1.0] {
            let x = vec![sign; cols];
            let got = tile_products(k, ty, &w, &packed(k, &x, cols), &mut tiles::TilePanel::default());
            assert!((got[0] + sign * cols as f32).abs() < 0.1, "{k:?}: {}", got[0]);
        }
    }
}

/// Plain code for attention by tiles of floats in two planes or of integers.
fn attention_reference(floats: bool) -> Kernels {
    const fn with(functions: &'static attention::Functions) -> Isa {
        Isa { functions: Functions { attention: Some(functions), ..scalar::ISA.functions }, ..scalar::ISA }
    }
    static FLOATS: Isa = with(&attention::reference::FLOATS);
    static INTEGERS: Isa = with(&attention::reference::integers::FUNCTIONS);
    Kernels { isa: if floats { &FLOATS } else { &INTEGERS } }
}

/// Rows of queries that see the positions before `begin` and one more for every three of them.
fn attended(k: Kernels, q: &[f32], keys: &[f32], values: &[f32], dim: usize, begin: usize) -> Vec<f32> {
    let (mut tiles, mut out) = (attention::AttentionTiles::default(), vec![0.0; q.len()]);
    k.begin_attention(&vec![1.0; 100 * dim], dim, |row| row, &mut tiles); // what was there before does not matter
    k.begin_attention(q, dim, |row| begin + row / 3, &mut tiles);
    let n = attention::POSITIONS * dim;
    for (i, (keys, values)) in keys.chunks(n).zip(values.chunks(n)).enumerate() {
        k.take_keys(keys, &mut tiles);
        k.take_values(values, &mut tiles);
        k.attend(i * attention::POSITIONS, &mut tiles);
    }
    k.attended(&tiles, &mut out);
    out
}

#[test]
fn attention_by_tiles_equals_plain_code_and_is_nearly_exact() {
    let mut rng = Rng(53);
    for k in kernels_under_test().into_iter().filter(Kernels::has_attention_tiles) {
        let floats = k.name() == "amx";
        let (from_exact, from_plain) = if floats { (4e-5, 2e-5) } else { (1e-3, 3e-4) };
        for (rows, dim, begin) in
            [(1, 8, 0), (32, 32, 3), (50, 64, 0), (97, 80, 130), (200, 128, 100), (33, 256, 600)]
        {
            let positions = begin + (rows - 1) / 3 + 1;
            let scale = 1.0 / (dim as f32).sqrt();
            let q: Vec<_> = rng.floats(rows * dim).into_iter().map(|q| scale * q).collect();
            let (keys, values) = (rng.floats(positions * dim), rng.floats(positions * dim));
            let got = attended(k, &q, &keys, &values, dim, begin);
            let want = attended(attention_reference(floats), &q, &keys, &values, dim, begin);
            for (row, (got, want)) in got.chunks(dim).zip(want.chunks(dim)).enumerate() {
                let query = &q[row * dim..][..dim];
                let exp = |key: &[f32]| {
                    query.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>().exp()
                };
                let weights: Vec<_> = keys.chunks(dim).take(begin + row / 3 + 1).map(exp).collect();
                let all: f64 = weights.iter().sum();
                for i in 0..dim {
                    let exact: f64 =
                        weights.iter().zip(values.chunks(dim)).map(|(w, v)| w / all * f64::from(v[i])).sum();
                    let context = format!("{k:?} {rows}x{dim} after {begin}, row {row}, {i}: {exact}");
                    assert!((f64::from(got[i]) - exact).abs() < from_exact, "{context}, not {}", got[i]);
                    assert!((got[i] - want[i]).abs() < from_plain, "{context}: {}, not {}", want[i], got[i]);
                }
            }
        }
    }
}

/// The longest rows, all alike: sums of products come as near to 32 bits as they can.
#[test]
fn attention_at_the_edge_of_integers_is_exact() {
    for k in kernels_under_test().into_iter().filter(Kernels::has_attention_tiles) {
        for (dim, long) in [(256, 1.0), (256, 1e4), (64, 3.0), (32, 1e-12)] {
            let positions = 2 * attention::POSITIONS;
            let one_number = |i: usize| if i.is_multiple_of(dim) { long } else { 0.0 };
            for keys in [vec![long; positions * dim], (0..positions * dim).map(one_number).collect()] {
                // Scores are 4 for some positions and 0 for the others.
                let length: f32 = keys[..dim].iter().map(|x| x * x).sum();
                let seen = |i: usize| if (i / dim).is_multiple_of(3) { 0.0 } else { 1.0 };
                let q: Vec<f32> = keys[..dim].iter().map(|x| 4.0 * (x / length)).collect();
                let keys: Vec<f32> = keys.iter().enumerate().map(|(i, x)| x * seen(i)).collect();
                let values: Vec<f32> = (0..positions * dim)
                    .map(|i| if i.is_multiple_of(2) { 7.0 } else { -7.0 } * (0.5 + seen(i)))
                    .collect();
                let got = attended(k, &q, &keys, &values, dim, positions - 1);
                let (likely, all) =
                    (4f32.exp(), (0..positions).map(|p| (4.0 * seen(p * dim)).exp()).sum::<f32>());
                let share = (0..positions).map(|p| seen(p * dim)).sum::<f32>() * likely / all;
                for (i, got) in got.iter().enumerate() {
                    let want = if i.is_multiple_of(2) { 7.0 } else { -7.0 } * (0.5 + share);
                    assert!((got - want).abs() < 2e-3, "{k:?} {dim} {long}, {i}: {got}, not {want}");
                }
            }
        }
    }
}

/// What lies behind a query changes no bit of what it gets.
#[test]
fn attention_in_tiles_sees_nothing_of_later_positions() {
    let (mut rng, dim, rows) = (Rng(71), 64, 300);
    let positions = (rows - 1) / 3 + 1;
    let q = rng.floats(rows * dim);
    let (keys, values) = (rng.floats(positions * dim), rng.floats(positions * dim));
    for k in kernels_under_test().into_iter().filter(Kernels::has_attention_tiles) {
        let before = attended(k, &q, &keys, &values, dim, 0);
        for seen in [1, 17, 40, 64, 99] {
            let [mut keys, mut values] = [keys.clone(), values.clone()];
            keys[seen * dim..].iter_mut().for_each(|x| *x *= -9.0);
            values[seen * dim..].iter_mut().for_each(|x| *x = 1000.0 - *x);
            let after = attended(k, &q, &keys, &values, dim, 0);
            let n = 3 * seen * dim; // a position more for every three rows
            assert!(before[..n] == after[..n], "{k:?}, {seen} positions");
            assert!(before[n..] != after[n..]);
        }
    }
}
