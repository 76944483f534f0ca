//! Products with chosen columns.

use super::*;
use crate::kernels::columns;
use crate::quant::columns::{ColumnLayout, ColumnStrip, TILE, Touched};

/// Activations of which about one in `keep` is not zero (0: none, 1: all).
fn sparse(rng: &mut Rng, cols: usize, keep: u64) -> Activations {
    let mut x = rng.floats(cols);
    for x in &mut x {
        if keep == 0 || !rng.next().is_multiple_of(keep) {
            *x = 0.0;
        }
    }
    let mut acts = Activations::with_capacity(1, cols);
    scalar().quantize(&x, acts.row_mut(0));
    acts
}

/// Bits of which columns of every 32 are coarse: for `some` of them about as many as not.
fn coarse_bits(layout: &ColumnLayout, some: u32) -> impl Fn(usize) -> u32 {
    let bits = if layout.is_coarse() { some } else { 0 };
    move |n| bits.rotate_left(5 * n as u32)
}

/// All outputs, part by part.
fn by_columns(
    k: Kernels,
    strip: ColumnStrip<'_>,
    list: &ColumnList,
    groups: std::ops::Range<usize>,
    outputs: usize,
) -> Vec<f32> {
    let mut out = vec![f32::NAN; strip.width];
    for (i, out) in out.chunks_mut(outputs).enumerate() {
        let first = i * outputs;
        k.columns(strip, list, groups.clone(), first..first + out.len(), out);
        if groups == (0..strip.cols / strip.group_len) {
            columns::finish(strip, list, first, out);
        }
    }
    out
}

fn magnitude_of_mins(strip: ColumnStrip<'_>, x: Q8Row<'_>, o: usize) -> f32 {
    if !strip.has_min {
        return 0.0;
    }
    let all: f32 = x.q[..x.cols].iter().enumerate().map(|(i, &q)| x.scale[i / 32] * f32::from(q).abs()).sum();
    all * (strip.head(0, o) * strip.head(1, o)).abs() * (255.0 + strip.zeros[1])
}

#[test]
fn products_with_chosen_columns_equal_scalar() {
    let mut rng = Rng(23);
    let mut failures = Vec::new();
    for ty in quantised_types() {
        for (outputs, blocks) in [(1, 1), (100, 3), (128, 5), (129, 1), (200, 2), (256, 9), (600, 3)] {
            let cols = blocks * ty.block_len();
            let rows = weights(&mut rng, ty, outputs, cols);
            let matrix = quant::Matrix::new(ty, outputs, cols, &rows).unwrap();
            let layout = ColumnLayout::new(ty, outputs, cols).unwrap().with_coarse(blocks != 1);
            let (heads, bytes) = quant::columns::packed(&layout, &matrix, 0);
            let view = layout.view(0, &heads, &bytes);
            for (keep, coarse) in
                [(0, 0), (1, 0), (1, u32::MAX), (1, 0x35c6_0e19), (2, 0x35c6_0e19), (5, 0x5555), (40, 0)]
            {
                let acts = sparse(&mut rng, cols, keep);
                let mut list = ColumnList::default();
                list.choose(acts.row(0), layout.group_len(), coarse_bits(&layout, coarse));
                // Mins and their zeros are added up apart, and are larger than their difference.
                let size_of =
                    |(o, row)| magnitude(ty, row, acts.row(0)) + magnitude_of_mins(view, acts.row(0), o);
                let sizes: Vec<_> = rows.chunks(ty.row_bytes(cols)).enumerate().map(size_of).collect();
                let all = layout.groups();
                for (groups, parts) in
                    [(0..all, [8192, 256]), (all / 3..all, [8192, 512]), (0..all / 2, [8192, 512])]
                {
                    let want = by_columns(scalar(), view, &list, groups.clone(), 8192);
                    for (k, part) in
                        kernels_under_test().into_iter().flat_map(|k| parts.map(|part| (k, part)))
                    {
                        let got = by_columns(k, view, &list, groups.clone(), part);
                        for o in 0..outputs {
                            let factor = if groups == (0..all) { 1.0 } else { view.head(0, o).abs() };
                            if !close(got[o], want[o], sizes[o] / factor) {
                                failures.push(format!(
                                    "{} {ty} {outputs}x{cols} 1/{keep} {groups:?} output {o}: {} {}",
                                    k.name(),
                                    got[o],
                                    want[o]
                                ));
                            }
                        }
                    }
                }
            }
        }
    }
    let some: Vec<_> = failures.iter().take(40).cloned().collect();
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), some.join("\n"));
}

/// Scales of the column form are rounded to a part in 255 of a row's range; nothing else differs from the rows, of which coarse
/// columns count by their upper bits.
#[test]
fn chosen_columns_give_the_product_of_the_rows() {
    let mut rng = Rng(29);
    for ty in quantised_types() {
        let cols = 4 * 256;
        for (keep, coarse) in [(1, 0), (3, 0), (1, u32::MAX), (3, 0x35c6_0e19)] {
            let mut rows = vec![0; 150 * ty.row_bytes(cols)];
            quantize_row(ty, &rng.floats(150 * cols), &mut rows);
            let layout = ColumnLayout::new(ty, 150, cols).unwrap().with_coarse(true);
            let matrix = quant::Matrix::new(ty, 150, cols, &rows).unwrap();
            let (heads, bytes) = quant::columns::packed(&layout, &matrix, 0);
            let acts = sparse(&mut rng, cols, keep);
            let (mut list, bits) = (ColumnList::default(), coarse_bits(&layout, coarse));
            list.choose(acts.row(0), layout.group_len(), &bits);
            let got = by_columns(scalar(), layout.view(0, &heads, &bytes), &list, 0..layout.groups(), 256);
            let want: Vec<_> = rows
                .chunks(ty.row_bytes(cols))
                .map(|row| product_of_row(ty, row, acts.row(0), |col| bits(col / 32) >> (col % 32) & 1 == 1))
                .collect();
            let rms = (want.iter().map(|w| w * w).sum::<f32>() / 150.0).sqrt();
            let error = (got.iter().zip(&want).map(|(g, w)| (g - w).powi(2)).sum::<f32>() / 150.0).sqrt();
            assert!(error < 0.01 * rms, "{ty} 1/{keep} {coarse:#x}: {error} of {rms}");
        }
    }
}

/// In f32, coarsely for some columns.
fn product_of_row(ty: GgmlType, row: &[u8], x: Q8Row<'_>, coarse: impl Fn(usize) -> bool) -> f32 {
    let (n, group) = (x.cols, quant::group_len(ty));
    let (mut q, mut scale, mut min) = (vec![0; n], vec![0.0; n / group], vec![0.0; n / group]);
    let mut weights = [false, true].map(|coarsely| {
        quant::unpack_row(ty, row, &mut q, &mut scale, &mut min);
        let coarsely = coarsely && quant::coarse_step(ty).is_some();
        let zero = if coarsely { 0.0 } else { f32::from(quant::zero_point(ty)) };
        if coarsely {
            quant::coarsen(ty, &mut q, &scale, &mut min);
        }
        let weight = |i: usize| {
            let (scale, min) = (scale[i / group], min[i / group]);
            scale * (f32::from(q[i]) - zero) + min
        };
        (0..n).map(weight).collect::<Vec<_>>()
    });
    let [fine, upper] = &mut weights;
    (0..n).map(|i| x.scale[i / 32] * f32::from(x.q[i]) * if coarse(i) { upper[i] } else { fine[i] }).sum()
}

#[test]
#[should_panic(expected = "cannot be read coarsely")]
fn coarse_columns_are_refused_where_there_are_none() {
    let (ty, cols) = (GgmlType::Q4_0, 64);
    let rows = vec![0; 32 * ty.row_bytes(cols)];
    let layout = ColumnLayout::new(ty, 32, cols).unwrap();
    let matrix = quant::Matrix::new(ty, 32, cols, &rows).unwrap();
    let (heads, bytes) = quant::columns::packed(&layout, &matrix, 0);
    let mut list = ColumnList::default();
    list.choose(sparse(&mut Rng(3), cols, 1).row(0), 32, |_| 1);
    by_columns(scalar(), layout.view(0, &heads, &bytes), &list, 0..2, 256);
}

#[test]
fn lists_hold_what_is_not_zero() {
    let mut rng = Rng(31);
    for cols in [32, 96, 1280] {
        for keep in [0, 1, 2, 7] {
            let acts = sparse(&mut rng, cols, keep);
            let coarse = |n: usize| 0x0ff5_a001u32.rotate_left(n as u32);
            let is_coarse = |col: usize| coarse(col / 32) >> (col % 32) & 1 == 1;
            for group_len in [16, 32] {
                let mut list = ColumnList::default();
                list.choose(acts.row(0), group_len, coarse);
                let mut dense = vec![0i8; cols];
                let mut start = 0;
                for g in &list.groups {
                    let mut coarse_sum = 0;
                    for (i, b) in list.bundles[start..g.end as usize].iter().enumerate() {
                        let in_coarse = start + i >= g.coarse as usize;
                        assert!(b.cols.iter().all(|&c| is_coarse(c as usize) == in_coarse));
                        coarse_sum +=
                            i32::from(in_coarse) * b.acts.iter().map(|&a| i32::from(a)).sum::<i32>();
                        let fill = b.acts.iter().rev().take_while(|&&a| a == 0).count();
                        assert!(b.cols[b.cols.len() - fill..].iter().all(|&c| c == b.cols[0]));
                        for (c, a) in b.cols.into_iter().zip(b.acts) {
                            assert_eq!(c as usize / group_len, g.group as usize);
                            dense[c as usize] += a;
                        }
                    }
                    assert_eq!(g.coarse_sum, coarse_sum);
                    start = g.end as usize;
                }
                assert_eq!(dense, acts.row(0).q[..cols]);
                let lines = |n: usize| dense.chunks(n).filter(|c| c.iter().any(|&q| q != 0)).count();
                let coarse = (0..cols).filter(|&c| dense[c] != 0 && is_coarse(c)).count();
                let want = Touched { groups: lines(group_len), columns: lines(1), coarse };
                assert_eq!(list.touched(), want);
                let all_fine = Touched { coarse: 0, ..want };
                assert_eq!(columns::touched(acts.row(0), None, group_len), all_fine);
                // Taken apart.
                let apart = [false, true].map(|which| {
                    let mut x = acts.row(0).q[..cols].to_vec();
                    x.iter_mut()
                        .enumerate()
                        .filter(|(c, _)| is_coarse(*c) != which)
                        .for_each(|(_, q)| *q = 0);
                    x
                });
                let [fine, upper] = apart.each_ref().map(|q| Q8Row { q, ..acts.row(0) });
                assert_eq!(columns::touched(fine, Some(upper), group_len), want);
                let [fine, upper] =
                    apart.each_ref().map(|q| q.iter().map(|&q| f32::from(q)).collect::<Vec<_>>());
                assert_eq!(columns::touched_values(&fine, Some(&upper), group_len), want);
            }
        }
    }
}

/// The same with chosen columns: all of each group, which are the longest sums.
#[test]
fn extreme_products_with_chosen_columns_are_exact() {
    let (outputs, cols) = (PANEL_ROWS, 512);
    for ty in quantised_types() {
        let layout = ColumnLayout::new(ty, outputs, cols).unwrap().with_coarse(true);
        for fill in [0x00, 0x7f, 0x80, 0xff] {
            let row = extreme_row(ty, cols, fill);
            let rows = row.repeat(outputs);
            let matrix = quant::Matrix::new(ty, outputs, cols, &rows).unwrap();
            let (heads, bytes) = quant::columns::packed(&layout, &matrix, 0);
            let view = layout.view(0, &heads, &bytes);
            let acts = extreme_activations(scalar(), cols);
            for t in 0..7 {
                let mut list = ColumnList::default();
                let coarse = [0, u32::MAX, 0x00ff_00ff][t % 3];
                list.choose(acts.row(t), layout.group_len(), coarse_bits(&layout, coarse));
                let product = |k| by_columns(k, view, &list, 0..layout.groups(), TILE);
                let want = product(scalar())[0];
                let size = magnitude(ty, &row, acts.row(t)) + magnitude_of_mins(view, acts.row(t), 0);
                for k in kernels_under_test() {
                    for v in &product(k)[..outputs] {
                        assert!(close(*v, want, size), "{} {ty} {fill:#x} {t}: {v} {want}", k.name());
                    }
                }
            }
        }
    }
}
