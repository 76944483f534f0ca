//! Attention of many queries in integers of 16 bits: see `kernels::attention`.
//!
//! Keys and queries have a scale a row, chosen by its length, so that no sum of products leaves 32 bits. Values have one too,
//! which joins the weight that they are multiplied with (as a logarithm, the score), and these products of weight and scale
//! have one for each query and 32 positions, by the greatest that the query sees among them. So nothing is lost of many small
//! weights that one large weight elsewhere would round away, and no query is touched by what it does not see.

#![allow(clippy::needless_range_loop)] // adapters over registers are calls

use std::arch::x86_64::*;

use super::transpose16;
use crate::kernels::attention::{
    AttentionTiles, GROUPS, HALF, LEAST_VALUE, LOWEST, Operand, Pairs, Running, STEP, Square,
};

type Vectors = [__m512i; HALF];

/// Greatest magnitude of a number.
const LIMIT: f32 = 32767.0;
/// Greatest length of a row of keys or queries: a sum of products of two is at most that of their lengths (Cauchy-Schwarz),
/// parts of it too, and below 2^31 even when every number was rounded up.
const LENGTH: f32 = 46_000.0;
/// The greatest weight is 2 to this.
const WEIGHT_BITS: f32 = 13.0;
/// Greatest magnitude of a value: 32 such times the greatest weight are below 2^31.
const VALUE_LIMIT: f32 = 8191.0;
/// A scale of less than this counts as nothing; the inverse of a greater one is finite.
const TINY: f32 = 1e-30;

const _: () = assert!((STEP as f32) * 8192.0 * VALUE_LIMIT < 2_147_483_648.0);

/// See `kernels::attention::Functions`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
pub(super) fn pack_rows(rows: &[f32], dim: usize, to: &mut [Operand], scale: &mut [f32; STEP]) {
    let inverse = scales_of_rows(rows, dim, scale);
    for (step, to) in to.iter_mut().enumerate() {
        for half in 0..2 {
            store(&mut to.0[0][half], pairs_of_rows(rows, dim, HALF * half, STEP * step, &inverse));
        }
    }
}

/// See `kernels::attention::Functions`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
pub(super) fn pack_columns(
    rows: &[f32],
    dim: usize,
    factor: f32,
    to: &mut [Operand],
    scale: &mut [f32; STEP],
) {
    let inverse = scales_of_rows(rows, dim, scale);
    scale.iter_mut().for_each(|scale| *scale *= factor);
    for (step, to) in to.iter_mut().enumerate() {
        for half in 0..2 {
            let pairs = pairs_of_rows(rows, dim, HALF * half, STEP * step, &inverse);
            store(&mut to.0[0][half], transpose16(pairs));
        }
    }
}

/// The scale of each row, and one over it; 0 for rows that are not there, or nothing.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn scales_of_rows(rows: &[f32], dim: usize, scale: &mut [f32; STEP]) -> [f32; STEP] {
    let mut inverse = [0.0; STEP];
    *scale = [0.0; STEP];
    for (r, row) in rows.chunks_exact(dim).enumerate() {
        let (mut squares, mut max) = (_mm512_setzero_ps(), _mm512_setzero_ps());
        for col in (0..dim).step_by(HALF) {
            let x = load(row, col);
            squares = _mm512_fmadd_ps(x, x, squares);
            max = _mm512_max_ps(max, _mm512_abs_ps(x));
        }
        let length = _mm512_reduce_add_ps(squares).sqrt();
        scale[r] = (length / LENGTH).max(_mm512_reduce_max_ps(max) / LIMIT);
        inverse[r] = if scale[r] > TINY { 1.0 / scale[r] } else { 0.0 };
    }
    inverse
}

/// 32 numbers, from `col` on, of each of 16 rows from `first` on; what is not there is 0.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn pairs_of_rows(rows: &[f32], dim: usize, first: usize, col: usize, inverse: &[f32; STEP]) -> Vectors {
    let mut out = [_mm512_setzero_si512(); HALF];
    for r in 0..HALF.min((rows.len() / dim).saturating_sub(first)) {
        let row = &rows[(first + r) * dim..][..dim];
        let inverse = _mm512_set1_ps(inverse[first + r]);
        out[r] = pair(whole(load(row, col), inverse), whole(load(row, col + HALF), inverse));
    }
    out
}

/// See `kernels::attention::Functions`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
pub(super) fn scale_values(rows: &[f32], dim: usize, scale: &mut [f32; STEP]) {
    *scale = [LEAST_VALUE; STEP];
    for (row, scale) in rows.chunks_exact(dim).zip(scale) {
        let mut max = _mm512_setzero_ps();
        for col in (0..dim).step_by(HALF) {
            max = _mm512_max_ps(max, _mm512_abs_ps(load(row, col)));
        }
        *scale = scale.max(_mm512_reduce_max_ps(max) / VALUE_LIMIT);
    }
}

/// See `kernels::attention::Functions`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
pub(super) fn pack_turned(rows: &[f32], dim: usize, first: usize, scale: &[f32; STEP], to: &mut Operand) {
    let (n, inverse) = (rows.len() / dim, scale.map(|scale| 1.0 / scale));
    let row = |r: usize, col: usize| match r < n {
        true => whole(load(&rows[r * dim..][..dim], col), _mm512_set1_ps(inverse[r])),
        false => _mm512_setzero_si512(),
    };
    for half in 0..2 {
        let (mut out, col) = ([_mm512_setzero_si512(); HALF], first + HALF * half);
        for r in 0..HALF {
            out[r] = pair(row(r, col), row(HALF + r, col));
        }
        store(&mut to.0[0][half], transpose16(out));
    }
}

/// `x * by`, rounded.
#[inline]
#[target_feature(enable = "avx512f")]
fn whole(x: __m512, by: __m512) -> __m512i {
    _mm512_cvtps_epi32(_mm512_mul_ps(x, by))
}

/// Words of 16 bits side by side.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn pair(a: __m512i, b: __m512i) -> __m512i {
    _mm512_mask_blend_epi16(0xaaaa_aaaa, a, _mm512_slli_epi32::<16>(b))
}

/// 16 numbers of a row; those behind its end are 0.
#[inline]
#[target_feature(enable = "avx512f")]
pub(in crate::kernels::x86) fn load(row: &[f32], col: usize) -> __m512 {
    let there = row.len().saturating_sub(col).min(HALF);
    let mask = ((1u32 << there) - 1) as u16;
    // SAFETY: only the numbers of `row` are read.
    unsafe { _mm512_maskz_loadu_ps(mask, row.as_ptr().wrapping_add(col)) }
}

/// 16 numbers.
#[inline]
#[target_feature(enable = "avx512f")]
pub(in crate::kernels::x86) fn load_ps(from: &[f32; HALF]) -> __m512 {
    // SAFETY: 64 readable bytes.
    unsafe { _mm512_loadu_ps(from.as_ptr()) }
}

/// The rows of a tile.
#[inline]
#[target_feature(enable = "avx512f")]
pub(in crate::kernels::x86) fn store(to: &mut Pairs, rows: Vectors) {
    for (to, row) in to.iter_mut().zip(rows) {
        store_row(to, row);
    }
}

/// A row of a tile.
#[inline]
#[target_feature(enable = "avx512f")]
pub(in crate::kernels::x86) fn store_row(to: &mut [u32; HALF], row: __m512i) {
    // SAFETY: 64 writable bytes.
    unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), row) };
}

/// 16 numbers.
#[inline]
#[target_feature(enable = "avx512f")]
pub(in crate::kernels::x86) fn store_ps(to: &mut [f32; HALF], x: __m512) {
    // SAFETY: 64 writable bytes.
    unsafe { _mm512_storeu_ps(to.as_mut_ptr(), x) };
}

/// 16 integers.
#[inline]
#[target_feature(enable = "avx512f")]
pub(in crate::kernels::x86) fn load_i32(from: &[i32; HALF]) -> __m512i {
    // SAFETY: 64 readable bytes.
    unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
}

/// A row of a tile.
#[inline]
#[target_feature(enable = "avx512f")]
fn load_pairs(from: &[u32; HALF]) -> __m512i {
    // SAFETY: 64 readable bytes.
    unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
}

/// See `Kernels::attend`.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) fn attend(first: usize, tiles: &mut AttentionTiles) {
    let steps = tiles.steps();
    let AttentionTiles { queries, sums, running, keys, values, scores, weights, scales, positions, .. } =
        tiles;
    let mut of_weights = [[[0f32; HALF]; 2]; GROUPS];
    let values_inverse = scales.values.map(|scales| scales.map(|scale| 1.0 / scale));
    let values_log = scales.values.map(|scales| scales.map(f32::log2));
    let blocks = queries.chunks_exact(steps).zip(sums.chunks_exact_mut(steps));
    for ((queries, sums), (running, of_queries)) in blocks.zip(running.iter_mut().zip(&scales.queries)) {
        let groups = running.groups(first, *positions);
        let of_queries = halves(of_queries);
        for group in 0..groups {
            let keys = &keys[group * steps..][..steps];
            score(keys, (&scales.keys[group], &values_log[group]), queries, of_queries, &mut scores[group]);
        }
        weigh(first, &scores[..groups], &values_inverse, running, sums, weights, &mut of_weights);
        for (step, sums) in sums.iter_mut().enumerate() {
            for group in 0..groups {
                add_values(&values[step * GROUPS + group], &weights[group], &of_weights[group], sums);
            }
        }
    }
}

#[inline]
fn halves(scale: &[f32; STEP]) -> &[[f32; HALF]; 2] {
    scale.as_chunks().0.try_into().expect("two halves")
}

/// Rows of sums that are in registers, two each: products take several cycles, and others can begin in each.
const ROWS: usize = 8;

/// Rows `first..first + ROWS` of half of a left operand times a right one, all steps.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn products(left: &[Operand], right: &[Operand], (half, first): (usize, usize)) -> [[__m512i; 2]; ROWS] {
    let mut sums = [[_mm512_setzero_si512(); 2]; ROWS];
    for (left, right) in left.iter().zip(right) {
        let (left, right) = (&left.0[0][half], &right.0[0]);
        let left: &[[u32; HALF]; ROWS] = left[first..].first_chunk().expect("whole groups of rows");
        for pair in 0..HALF {
            let columns = [load_pairs(&right[0][pair]), load_pairs(&right[1][pair])];
            for row in 0..ROWS {
                let numbers = _mm512_set1_epi32(left[row][pair].cast_signed());
                for of_right in 0..2 {
                    sums[row][of_right] =
                        _mm512_dpwssd_epi32(sums[row][of_right], numbers, columns[of_right]);
                }
            }
        }
    }
    sums
}

/// Scores of 32 positions and the queries of a block, plus something for each position.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn score(
    keys: &[Operand],
    (of_keys, plus): (&[f32; STEP], &[f32; STEP]),
    queries: &[Operand],
    of_queries: &[[f32; HALF]; 2],
    scores: &mut Square,
) {
    let of_queries = [load_ps(&of_queries[0]), load_ps(&of_queries[1])];
    for at in 0..STEP / ROWS {
        let (half, first) = (at * ROWS / HALF, at * ROWS % HALF);
        let products = products(keys, queries, (half, first));
        for row in 0..ROWS {
            let scale = _mm512_set1_ps(of_keys[at * ROWS + row]);
            let plus = _mm512_set1_ps(plus[at * ROWS + row]);
            for of_right in 0..2 {
                let scale = _mm512_mul_ps(scale, of_queries[of_right]);
                let score = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products[row][of_right]), scale, plus);
                store_ps(&mut scores.0[half][of_right][first + row], score);
            }
        }
    }
}

/// Adds 32 numbers of the values of 32 positions by their weights.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn add_values(values: &Operand, weights: &Operand, of_weights: &[[f32; HALF]; 2], sums: &mut Square) {
    let of_weights = [load_ps(&of_weights[0]), load_ps(&of_weights[1])];
    for at in 0..STEP / ROWS {
        let (half, first) = (at * ROWS / HALF, at * ROWS % HALF);
        let products = products(std::slice::from_ref(values), std::slice::from_ref(weights), (half, first));
        for row in 0..ROWS {
            for of_right in 0..2 {
                let sum = &mut sums.0[half][of_right][first + row];
                let product = _mm512_cvtepi32_ps(products[row][of_right]);
                let new = _mm512_fmadd_ps(product, of_weights[of_right], load_ps(sum));
                store_ps(sum, new);
            }
        }
    }
}

/// Turns the scores of a block into weights with a scale for each group, relative to the running maximum, and rescales what
/// was summed before.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn weigh(
    first: usize,
    scores: &[Square],
    values_inverse: &[[f32; STEP]; GROUPS],
    running: &mut Running,
    sums: &mut [Square],
    weights: &mut [Operand],
    of_weights: &mut [[[f32; HALF]; 2]; GROUPS],
) {
    let seen = Seen { first: first as i32, hidden: !running.sees_all(first, STEP * scores.len()), scores };
    for half in 0..2 {
        let (position, before) = (load_i32(&running.position[half]), load_ps(&running.max[half]));
        let (mut tops, mut max) = ([before; GROUPS], before);
        for group in 0..scores.len() {
            tops[group] = seen.greatest(group, half, position);
            max = _mm512_max_ps(max, tops[group]);
        }
        let mut sum = load_ps(&running.sum[half]);
        if _mm512_cmp_ps_mask::<_CMP_LT_OQ>(before, max) != 0 {
            let factor = exp2(_mm512_sub_ps(before, max));
            rescale(sums, half, factor);
            sum = _mm512_mul_ps(sum, factor);
            store_ps(&mut running.max[half], max);
        }
        for group in 0..scores.len() {
            let unit = _mm512_sub_ps(tops[group], _mm512_set1_ps(WEIGHT_BITS));
            let mut totals = [_mm512_setzero_ps(); 2];
            for row in 0..HALF {
                let mut two = [_mm512_setzero_si512(); 2];
                let scores = seen.pair(group, half, row, position);
                for i in 0..2 {
                    let weight = exp2(_mm512_sub_ps(scores[i], unit));
                    let inverse = _mm512_set1_ps(values_inverse[group][HALF * i + row]);
                    totals[i] = _mm512_fmadd_ps(weight, inverse, totals[i]);
                    two[i] = _mm512_cvtps_epi32(weight);
                }
                store_row(&mut weights[group].0[0][half][row], pair(two[0], two[1]));
            }
            // Where a query sees none of the group, its greatest score is `LOWEST` and this is 0.
            let scale = exp2(_mm512_sub_ps(unit, max));
            store_ps(&mut of_weights[group][half], scale);
            sum = _mm512_fmadd_ps(_mm512_add_ps(totals[0], totals[1]), scale, sum);
        }
        store_ps(&mut running.sum[half], sum);
    }
}

/// The scores of a block, where its queries see the positions.
struct Seen<'a> {
    /// Position of the first score.
    first: i32,
    /// Some query does not see all positions.
    hidden: bool,
    scores: &'a [Square],
}

impl Seen<'_> {
    /// The greatest score of each query of half a block in a group.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn greatest(&self, group: usize, half: usize, position: __m512i) -> __m512 {
        let mut max = [_mm512_set1_ps(LOWEST); 2];
        for row in 0..HALF {
            let pair = self.pair(group, half, row, position);
            max = [_mm512_max_ps(max[0], pair[0]), _mm512_max_ps(max[1], pair[1])];
        }
        _mm512_max_ps(max[0], max[1])
    }

    /// Scores of 16 queries: rows `row` and `16 + row` of a group.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn pair(&self, group: usize, half: usize, row: usize, sees: __m512i) -> [__m512; 2] {
        let scores = &self.scores[group].0;
        let mut pair = [load_ps(&scores[0][half][row]), load_ps(&scores[1][half][row])];
        if self.hidden {
            for (i, scores) in pair.iter_mut().enumerate() {
                let position = _mm512_set1_epi32(self.first + (group * STEP + i * HALF + row) as i32);
                let seen = _mm512_cmple_epi32_mask(position, sees);
                *scores = _mm512_mask_blend_ps(seen, _mm512_set1_ps(LOWEST), *scores);
            }
        }
        pair
    }
}

/// Multiplies what half of a block's queries have got.
#[inline]
#[target_feature(enable = "avx512f")]
pub(in crate::kernels::x86) fn rescale(sums: &mut [Square], half: usize, factor: __m512) {
    for sums in sums {
        for rows in &mut sums.0 {
            for row in &mut rows[half] {
                let new = _mm512_mul_ps(load_ps(row), factor);
                store_ps(row, new);
            }
        }
    }
}

/// `2^x`, by `2^r` of what rounding leaves: the polynomial through it at the zeros of the sixth Chebyshev polynomial, off by
/// 1e-7.
#[inline]
#[target_feature(enable = "avx512f")]
pub(in crate::kernels::x86) fn exp2(x: __m512) -> __m512 {
    let n = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
    let r = _mm512_sub_ps(x, n);
    let mut p = _mm512_set1_ps(1.339_086_3e-3);
    for c in [9.676_032e-3, 5.550_357e-2, 0.240_221_07, std::f32::consts::LN_2, 1.0] {
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    }
    _mm512_scalef_ps(p, n)
}

/// See `kernels::attention::Functions`.
#[target_feature(enable = "avx512f")]
pub(in crate::kernels::x86) fn divide(sums: &[Square], running: &Running, dim: usize, out: &mut [f32]) {
    for half in 0..2 {
        let inverse = _mm512_div_ps(_mm512_set1_ps(1.0), load_ps(&running.sum[half]));
        for (i, rows) in sums.iter().flat_map(|s| &s.0).enumerate() {
            let col = i * HALF;
            if col >= dim {
                break;
            }
            let mut turned = [_mm512_setzero_si512(); HALF];
            for (to, row) in turned.iter_mut().zip(&rows[half]) {
                *to = _mm512_castps_si512(_mm512_mul_ps(load_ps(row), inverse));
            }
            let turned = transpose16(turned);
            let mask = ((1u32 << (dim - col).min(HALF)) - 1) as u16;
            for (out, row) in out.chunks_exact_mut(dim).skip(half * HALF).zip(turned) {
                // SAFETY: only numbers of the row are written.
                unsafe { _mm512_mask_storeu_ps(out.as_mut_ptr().add(col), mask, _mm512_castsi512_ps(row)) };
            }
        }
    }
}
