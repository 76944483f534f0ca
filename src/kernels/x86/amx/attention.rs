//! Attention by tiles of bf16: see `kernels::attention`.

use std::arch::asm;
use std::arch::x86_64::*;

use crate::kernels::attention::{Block, HALF, LOWEST, Operand, POSITIONS, Pairs, Running, STEP, Square};
use crate::kernels::x86::avx512vnni::transpose16;

type Vectors = [__m512i; HALF];

/// See `kernels::attention::Functions`.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn pack_rows(rows: &[f32], dim: usize, to: &mut [Operand]) {
    for (step, to) in to.iter_mut().enumerate() {
        for half in 0..2 {
            let planes = planes_of_rows(rows, dim, HALF * half, STEP * step, 1.0);
            store(&mut to.0[0][half], planes[0]);
            store(&mut to.0[1][half], planes[1]);
        }
    }
}

/// See `kernels::attention::Functions`.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn pack_columns(rows: &[f32], dim: usize, factor: f32, to: &mut [Operand]) {
    for (step, to) in to.iter_mut().enumerate() {
        for half in 0..2 {
            let planes = planes_of_rows(rows, dim, HALF * half, STEP * step, factor);
            store(&mut to.0[0][half], transpose16(planes[0]));
            store(&mut to.0[1][half], transpose16(planes[1]));
        }
    }
}

/// 32 numbers, from `col` on, of each of 16 rows from `first` on; what is not there is 0.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn planes_of_rows(rows: &[f32], dim: usize, first: usize, col: usize, factor: f32) -> [Vectors; 2] {
    let mut out = [[_mm512_setzero_si512(); HALF]; 2];
    let factor = _mm512_set1_ps(factor);
    for r in 0..HALF.min((rows.len() / dim).saturating_sub(first)) {
        let row = &rows[(first + r) * dim..][..dim];
        let (a, b) = (load(row, col), load(row, col + HALF));
        [out[0][r], out[1][r]] = planes(_mm512_mul_ps(a, factor), _mm512_mul_ps(b, factor));
    }
    out
}

/// See `kernels::attention::Functions`.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn pack_turned(rows: &[f32], dim: usize, first: usize, to: &mut Operand) {
    let n = rows.len() / dim;
    let row = |r: usize, col: usize| {
        if r < n { load(&rows[r * dim..][..dim], col) } else { _mm512_setzero_ps() }
    };
    for half in 0..2 {
        let (mut out, col) = ([[_mm512_setzero_si512(); HALF]; 2], first + HALF * half);
        for r in 0..HALF {
            [out[0][r], out[1][r]] = planes(row(r, col), row(HALF + r, col));
        }
        store(&mut to.0[0][half], transpose16(out[0]));
        store(&mut to.0[1][half], transpose16(out[1]));
    }
}

/// 16 numbers of a row; those behind its end are 0.
#[inline]
#[target_feature(enable = "avx512f")]
fn load(row: &[f32], col: usize) -> __m512 {
    let there = row.len().saturating_sub(col).min(HALF);
    let mask = ((1u32 << there) - 1) as u16;
    // SAFETY: only the numbers of `row` are read.
    unsafe { _mm512_maskz_loadu_ps(mask, row.as_ptr().wrapping_add(col)) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(to: &mut Pairs, rows: Vectors) {
    for (to, row) in to.iter_mut().zip(rows) {
        // SAFETY: 64 writable bytes.
        unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), row) };
    }
}

/// Pairs of two numbers each as bf16: the nearest ones, and the nearest ones of what they leave.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn planes(a: __m512, b: __m512) -> [__m512i; 2] {
    let (half, top) = (_mm512_set1_epi32(0x8000), _mm512_set1_epi32(0xffff_0000u32 as i32));
    let round = |x: __m512| _mm512_add_epi32(_mm512_castps_si512(x), half);
    let rest = |x: __m512, high: __m512i| _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_and_si512(high, top)));
    let pair = |a, b| _mm512_mask_blend_epi16(0xaaaa_aaaa, _mm512_srli_epi32::<16>(a), b);
    let (a_high, b_high) = (round(a), round(b));
    [pair(a_high, b_high), pair(round(rest(a, a_high)), round(rest(b, b_high)))]
}

/// See `Kernels::attend`.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn attend(b: Block<'_>) {
    // SAFETY: `Kernels::attend`, the only caller, has a handle of this ISA.
    unsafe { super::configure() };
    let Block { queries, sums, running, first, keys, values, scores, weights } = b;
    for (keys, scores) in keys.chunks_exact(queries.len()).zip(scores.iter_mut()) {
        multiply::<false>(keys, queries, scores);
    }
    if running.sees_all(first, STEP * scores.len()) {
        softmax::<false>(first, scores, running, weights, sums);
    } else {
        softmax::<true>(first, scores, running, weights, sums);
    }
    for (values, sums) in values.chunks_exact(POSITIONS / STEP).zip(sums) {
        multiply::<true>(&values[..weights.len()], weights, sums);
    }
}

/// Turns scores into weights relative to the running maximum, and rescales what was summed before. `HIDDEN`: not all
/// queries see all positions.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn softmax<const HIDDEN: bool>(
    first: usize,
    scores: &[Square],
    running: &mut Running,
    weights: &mut [Operand],
    sums: &mut [Square],
) {
    for half in 0..2 {
        let seen = Seen::<HIDDEN> { first: first as i32, position: load_i32(&running.position[half]) };
        let before = load(&running.max[half], 0);
        let max = greatest(scores, half, &seen, before);
        let mut sum = load(&running.sum[half], 0);
        if _mm512_cmp_ps_mask::<_CMP_LT_OQ>(before, max) != 0 {
            let factor = exp2(_mm512_sub_ps(before, max));
            rescale(sums, half, factor);
            sum = _mm512_mul_ps(sum, factor);
        }
        sum = _mm512_add_ps(sum, weigh(scores, half, &seen, max, weights));
        store_ps(&mut running.max[half], max);
        store_ps(&mut running.sum[half], sum);
    }
}

/// Who sees which positions.
struct Seen<const HIDDEN: bool> {
    first: i32,
    position: __m512i,
}

impl<const HIDDEN: bool> Seen<HIDDEN> {
    /// Scores of a position, of those queries that see it.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn scores(&self, row: &[f32; HALF], position: usize) -> __m512 {
        let scores = load(row, 0);
        if !HIDDEN {
            return scores;
        }
        let position = _mm512_set1_epi32(self.first + position as i32);
        let seen = _mm512_cmple_epi32_mask(position, self.position);
        _mm512_mask_blend_ps(seen, _mm512_set1_ps(LOWEST), scores)
    }
}

/// The greatest score of each query, `max` included.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn greatest<const HIDDEN: bool>(scores: &[Square], half: usize, seen: &Seen<HIDDEN>, max: __m512) -> __m512 {
    let mut max = [max; 2];
    for (g, scores) in scores.iter().enumerate() {
        for i in 0..HALF {
            for (h, max) in max.iter_mut().enumerate() {
                let row = seen.scores(&scores.0[h][half][i], g * STEP + h * HALF + i);
                *max = _mm512_max_ps(*max, row);
            }
        }
    }
    _mm512_max_ps(max[0], max[1])
}

/// Writes the weights of 16 queries and returns their sums.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn weigh<const HIDDEN: bool>(
    scores: &[Square],
    half: usize,
    seen: &Seen<HIDDEN>,
    max: __m512,
    weights: &mut [Operand],
) -> __m512 {
    let mut sums = [_mm512_setzero_ps(); 2];
    for (g, (scores, weights)) in scores.iter().zip(weights).enumerate() {
        for i in 0..HALF {
            let mut pair = [_mm512_setzero_ps(); 2];
            for h in 0..2 {
                let row = seen.scores(&scores.0[h][half][i], g * STEP + h * HALF + i);
                pair[h] = exp2(_mm512_sub_ps(row, max));
                sums[h] = _mm512_add_ps(sums[h], pair[h]);
            }
            let planes = planes(pair[0], pair[1]);
            for p in 0..2 {
                let to = &mut weights.0[p][half][i];
                // SAFETY: 64 writable bytes.
                unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), planes[p]) };
            }
        }
    }
    _mm512_add_ps(sums[0], sums[1])
}

#[inline]
#[target_feature(enable = "avx512f")]
fn rescale(sums: &mut [Square], half: usize, factor: __m512) {
    for sums in sums {
        for rows in &mut sums.0 {
            for row in &mut rows[half] {
                let new = _mm512_mul_ps(load(row, 0), factor);
                store_ps(row, new);
            }
        }
    }
}

/// `2^x`, by `2^r` of what rounding leaves: the polynomial through it at the zeros of the sixth Chebyshev polynomial, off by
/// 1e-7.
#[inline]
#[target_feature(enable = "avx512f")]
fn exp2(x: __m512) -> __m512 {
    let n = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
    let r = _mm512_sub_ps(x, n);
    let mut p = _mm512_set1_ps(1.339_086_3e-3);
    for c in [9.676_032e-3, 5.550_357e-2, 0.240_221_07, 0.693_147_2, 1.0] {
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    }
    _mm512_scalef_ps(p, n)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_i32(from: &[i32; HALF]) -> __m512i {
    // SAFETY: 64 readable bytes.
    unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store_ps(to: &mut [f32; HALF], x: __m512) {
    // SAFETY: 64 writable bytes.
    unsafe { _mm512_storeu_ps(to.as_mut_ptr(), x) };
}

/// See `kernels::attention::Functions`.
#[target_feature(enable = "avx512f")]
pub(super) fn divide(sums: &[Square], running: &Running, dim: usize, out: &mut [f32]) {
    for half in 0..2 {
        let sum = load(&running.sum[half], 0);
        for (i, rows) in sums.iter().flat_map(|s| &s.0).enumerate() {
            let col = i * HALF;
            if col >= dim {
                break;
            }
            let mut turned = [_mm512_setzero_si512(); HALF];
            for (to, row) in turned.iter_mut().zip(&rows[half]) {
                *to = _mm512_castps_si512(_mm512_div_ps(load(row, 0), sum));
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

/// The sums of the products of all steps of two operands, added to those before or not.
#[inline]
#[target_feature(enable = "avx512f")]
fn multiply<const ADD: bool>(left: &[Operand], right: &[Operand], sums: &mut Square) {
    assert_eq!(left.len(), right.len());
    // SAFETY: the only caller has configured the thread's tiles; the operands are 4096 bytes each, like `sums`.
    unsafe {
        if ADD {
            load_sums(sums);
        } else {
            super::gemm::zero();
        }
        for (left, right) in left.iter().zip(right) {
            step(left, right);
        }
        store_sums(sums);
    }
}

/// Brings `sums` to `tmm0` to `tmm3`.
///
/// # Safety
/// * The CPU has AMX, and this thread's tiles are configured.
#[inline(always)]
unsafe fn load_sums(sums: &Square) {
    // SAFETY: as the caller says; four tiles of 1024 bytes are read.
    unsafe {
        asm!(
            "tileloadd tmm0, [{sums} + {stride}*1]",
            "tileloadd tmm1, [{sums} + {stride}*1 + 1024]",
            "tileloadd tmm2, [{sums} + {stride}*1 + 2048]",
            "tileloadd tmm3, [{sums} + {stride}*1 + 3072]",
            sums = in(reg) &raw const *sums,
            stride = in(reg) 64usize,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            options(nostack, preserves_flags, readonly),
        );
    }
}

/// Adds the products of a step to `tmm0` to `tmm3`: high with high, low with high, high with low.
///
/// One tile is loaded twice, as eight registers hold no more; no sum is added to again before three others.
///
/// # Safety
/// * The CPU has AMX with bf16, and this thread's tiles are configured.
#[inline(always)]
unsafe fn step(left: &Operand, right: &Operand) {
    // SAFETY: as the caller says; the tiles of the operands, 1024 bytes each, are read.
    unsafe {
        asm!(
            "tileloadd tmm4, [{left} + {stride}*1]",
            "tileloadd tmm6, [{right} + {stride}*1]",
            "tileloadd tmm7, [{right} + {stride}*1 + 1024]",
            "tileloadd tmm5, [{left} + {stride}*1 + 1024]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "tileloadd tmm4, [{left} + {stride}*1 + 2048]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm4, [{left} + {stride}*1 + 3072]",
            "tdpbf16ps tmm2, tmm4, tmm6",
            "tdpbf16ps tmm3, tmm4, tmm7",
            "tileloadd tmm4, [{left} + {stride}*1]",
            "tileloadd tmm6, [{right} + {stride}*1 + 2048]",
            "tileloadd tmm7, [{right} + {stride}*1 + 3072]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            left = in(reg) &raw const *left,
            right = in(reg) &raw const *right,
            stride = in(reg) 64usize,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, preserves_flags, readonly),
        );
    }
}

/// Writes `tmm0` to `tmm3`.
///
/// # Safety
/// * The CPU has AMX, and this thread's tiles are configured.
#[inline(always)]
unsafe fn store_sums(sums: &mut Square) {
    // SAFETY: as the caller says; four tiles of 1024 bytes are written.
    unsafe {
        asm!(
            "tilestored [{sums} + {stride}*1], tmm0",
            "tilestored [{sums} + {stride}*1 + 1024], tmm1",
            "tilestored [{sums} + {stride}*1 + 2048], tmm2",
            "tilestored [{sums} + {stride}*1 + 3072], tmm3",
            sums = in(reg) &raw mut *sums,
            stride = in(reg) 64usize,
            options(nostack, preserves_flags),
        );
    }
}
