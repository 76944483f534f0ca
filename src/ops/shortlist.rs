//! Logits of which only the largest are exact: estimates tell which those are.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::{Compute, Inputs, MatmulScratch};
use crate::quant::Matrix;
use crate::threads::Tile;

/// Outputs of a group, of which the largest counts for choosing a threshold.
const GROUP: usize = 16;
/// Outputs of a tile, whole groups.
const TILE: usize = 1024;

/// Buffers of [`refine_largest`].
#[derive(Default)]
pub struct ShortlistScratch {
    /// The largest estimate of each group.
    maxima: Vec<f32>,
}

impl ShortlistScratch {
    /// For `outputs` estimates.
    pub fn with_capacity(outputs: usize) -> Self {
        Self { maxima: vec![0.0; outputs.div_ceil(GROUP)] }
    }
}

/// Replaces the largest of the estimates `out` by the products of those rows of `w`, a quantised matrix, with the only row of
/// `x`, bit by bit as `matmul` gives them, and returns how many. They are all that are no smaller than the
/// `groups`-th largest of the largest of each group of 16 (fewer groups: all), so `groups` or more and seldom twice as many: that
/// finds them in two passes that never sort.
///
/// # Panics
/// If `x` has several rows or has panels made for it, or the matrix another number of rows than there are estimates.
pub fn refine_largest(
    on: Compute<'_>,
    w: Matrix<'_>,
    x: &Inputs,
    groups: usize,
    out: &mut [f32],
    shortlist: &mut ShortlistScratch,
    scratch: &mut [MatmulScratch],
) -> usize {
    assert!(x.rows() == 1 && !x.are_many() && w.rows_len() == out.len());
    let least = threshold(on, out, groups, &mut shortlist.maxima);
    let (refined, outputs) = (AtomicUsize::new(0), out.len());
    on.team.for_tiles(out, outputs, (1, TILE), scratch, |scratch, mut tile| {
        refined.fetch_add(refine_tile(on, &w, x, least, scratch, &mut tile), Ordering::Relaxed);
    });
    refined.into_inner()
}

/// The `groups`-th largest of the largest of each group of estimates.
fn threshold(on: Compute<'_>, estimates: &[f32], groups: usize, maxima: &mut Vec<f32>) -> f32 {
    maxima.resize(estimates.len().div_ceil(GROUP), 0.0);
    let n = maxima.len();
    on.team.for_plain_tiles(maxima, n, (1, TILE / GROUP), |mut tile| {
        let first = tile.cols().start;
        for (maximum, group) in tile.row(0).iter_mut().zip(estimates[first * GROUP..].chunks(GROUP)) {
            *maximum = largest(group);
        }
    });
    match groups.checked_sub(1).filter(|&last| last < maxima.len()) {
        Some(last) => *maxima.select_nth_unstable_by(last, |a, b| b.total_cmp(a)).1,
        None => f32::NEG_INFINITY,
    }
}

/// In four lanes, which compilers make one register of; a NaN is not the largest.
fn largest(group: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let (fours, rest) = group.as_chunks::<4>();
    let mut lanes = [f32::NEG_INFINITY; 4];
    for four in fours {
        lanes.iter_mut().zip(four).for_each(|(lane, &v)| *lane = larger(*lane, v));
    }
    lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, larger)
}

/// The outputs of a tile that are `least` or more; how many.
fn refine_tile(
    on: Compute<'_>,
    w: &Matrix<'_>,
    x: &Inputs,
    least: f32,
    scratch: &mut MatmulScratch,
    tile: &mut Tile<'_, f32>,
) -> usize {
    let (rows, out) = (w.rows(tile.cols()), tile.row(0));
    let MatmulScratch { acc, up: second, chosen, .. } = scratch;
    chosen.clear();
    chosen.extend((0..out.len() as u32).filter(|&i| out[i as usize] >= least));
    for sums in [&mut *acc, second] {
        sums.resize(sums.len().max(chosen.len()), 0.0);
    }
    let sums = &mut acc[..chosen.len()];
    on.kernels.dot_listed(w.ty(), rows, chosen, x.q8.row(0), sums);
    if x.two_terms {
        let second = &mut second[..chosen.len()];
        on.kernels.dot_listed(w.ty(), rows, chosen, x.q8.row(1), second);
        sums.iter_mut().zip(second).for_each(|(sum, second)| *sum += *second);
    }
    chosen.iter().zip(&*sums).for_each(|(&i, &sum)| out[i as usize] = sum);
    chosen.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::GgmlType;
    use crate::kernels::Kernels;
    use crate::ops::{Epilogue, matmul};
    use crate::quant;
    use crate::threads::Team;

    fn wave(n: usize, speed: f32) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * speed).sin()).collect()
    }

    /// Whatever the kernel, the number of threads and the shape: the largest are bit by bit the full product, the others stay.
    #[test]
    fn the_largest_become_exact_and_the_others_stay() {
        let (rows, cols) = (2500, 96);
        let ty = GgmlType::Q8_0;
        let mut bytes = vec![0; rows * ty.row_bytes(cols)];
        quant::quantize_row(ty, &wave(rows * cols, 0.61), &mut bytes);
        let w = Matrix::new(ty, rows, cols, &bytes).unwrap();
        for kernels in Kernels::available() {
            for (threads, refined) in [(1, true), (3, true), (3, false)] {
                let team = Team::new(threads).unwrap();
                let on = Compute { team: &team, kernels };
                let mut x = Inputs::with_refined_capacity(1, cols);
                x.reshape(1, cols);
                x.fill(on, |_, x| x.copy_from_slice(&wave(cols, 0.37)));
                if refined {
                    x.refine(on);
                }
                let mut scratch: Vec<_> =
                    (0..threads).map(|_| MatmulScratch::with_capacity(1, rows)).collect();
                let mut exact = vec![0.0; rows];
                matmul(on, &[w], &x, Epilogue::Store, &mut exact, &mut scratch);
                let estimates: Vec<f32> = exact.iter().map(|v| v + 100.0).collect();
                for groups in [0, 1, 7, 60, 10_000] {
                    let mut out = estimates.clone();
                    let mut shortlist = ShortlistScratch::with_capacity(rows);
                    let n = refine_largest(on, w, &x, groups, &mut out, &mut shortlist, &mut scratch);
                    let least = if groups == 0 { rows } else { groups.min(rows) };
                    assert!((least..=4 * least).contains(&n), "{n} for {groups}");
                    let mut sorted = exact.clone();
                    sorted.sort_by(|a, b| b.total_cmp(a));
                    for (i, v) in out.iter().enumerate() {
                        let expected = if exact[i] >= sorted[n - 1] { exact[i] } else { estimates[i] };
                        assert_eq!(v.to_bits(), expected.to_bits(), "{} {i}", kernels.name());
                    }
                }
            }
        }
    }

    #[test]
    fn nothing_is_listed_of_what_is_no_number() {
        assert_eq!(largest(&[f32::NAN, 1.0, f32::NAN, -2.0, 3.0, f32::NAN, 0.0]), 3.0);
        assert_eq!(largest(&[f32::NAN; 5]), f32::NEG_INFINITY);
    }
}
