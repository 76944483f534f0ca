//! Attention by tiles of bf16: see `kernels::attention`.

use std::arch::asm;
use std::arch::x86_64::*;
use std::mem;

use crate::kernels::attention::{
    AttentionTiles, GROUPS, HALF, LOWEST, Operand, Pairs, Running, STEP, Square, ValueScales,
};
use crate::kernels::x86::avx512vnni::attention::lanes::{
    exp2, load, load_i32, load_some, store as store_floats, store_row,
};
use crate::kernels::x86::avx512vnni::transpose16;

type Vectors = [__m512i; HALF];

/// See `kernels::attention::Functions`.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn pack_rows(rows: &[f32], dim: usize, to: &mut [Operand], _: &mut [f32; STEP]) {
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
pub(super) fn pack_columns(rows: &[f32], dim: usize, factor: f32, to: &mut [Operand], _: &mut [f32; STEP]) {
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
        let (a, b) = (load_some(row, col), load_some(row, col + HALF));
        [out[0][r], out[1][r]] = planes(_mm512_mul_ps(a, factor), _mm512_mul_ps(b, factor));
    }
    out
}

/// See `kernels::attention::Functions`.
#[target_feature(enable = "avx512f,avx512bw")]
#[allow(clippy::needless_range_loop)] // adapters over two planes are calls
pub(super) fn pack_turned(rows: &[f32], dim: usize, first: usize, _: &ValueScales, to: &mut Operand) {
    let n = rows.len() / dim;
    let row = |r: usize, col: usize| {
        if r < n { load_some(&rows[r * dim..][..dim], col) } else { _mm512_setzero_ps() }
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

#[inline]
#[target_feature(enable = "avx512f")]
fn store(to: &mut Pairs, rows: Vectors) {
    for (to, row) in to.iter_mut().zip(rows) {
        store_row(to, row);
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
///
/// The unit works beside the vector ports, so while the scores of a block become weights, it adds up the values of the
/// block before and multiplies the keys with the block after: a few rows of weights after each of its steps, because
/// the CPU looks no further ahead than a few hundred instructions.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn attend(first: usize, tiles: &mut AttentionTiles) {
    // SAFETY: `Kernels::attend`, the only caller, has a handle of this ISA.
    unsafe { super::configure() };
    let steps = tiles.steps();
    let AttentionTiles { queries, sums, running, keys, values, scores, weights, positions, .. } = tiles;
    let groups =
        |running: &[Running], block: usize| running.get(block).map_or(0, |r| r.groups(first, *positions));
    // The first blocks may see nothing of these positions.
    let Some(start) = (0..running.len()).find(|&block| groups(running, block) > 0) else { return };
    let (mut scores, mut next_scores) = scores.split_at_mut(GROUPS);
    let (mut weights, mut last_weights) = weights.split_at_mut(GROUPS);
    let (mut last, mut now) = (0, groups(running, start));
    multiply_keys(keys, &queries[start * steps..][..steps], &mut scores[..now], || ());
    for block in start..running.len() {
        let next = groups(running, block + 1);
        let (done, rest) = sums.split_at_mut(block * steps);
        let pace = (HALF * now).div_ceil(steps * (last + next).max(1)).next_power_of_two().min(HALF);
        let mut softmax = Softmax::begin(
            (first, pace),
            &scores[..now],
            &mut running[block],
            &mut rest[..steps],
            &mut weights[..now],
        );
        if last > 0 {
            let sums = &mut done[(block - 1) * steps..];
            add_values(values, &last_weights[..last], sums, || softmax.go_on());
        }
        if next > 0 {
            let queries = &queries[(block + 1) * steps..][..steps];
            multiply_keys(keys, queries, &mut next_scores[..next], || softmax.go_on());
        }
        softmax.end();
        mem::swap(&mut scores, &mut next_scores);
        mem::swap(&mut weights, &mut last_weights);
        (last, now) = (now, next);
    }
    let sums = &mut sums[(running.len() - 1) * steps..];
    add_values(values, &last_weights[..last], sums, || ());
}

/// Scores of each group of positions; `meanwhile` is called twice a step.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn multiply_keys(keys: &[Operand], queries: &[Operand], scores: &mut [Square], mut meanwhile: impl FnMut()) {
    for (keys, scores) in keys.chunks_exact(queries.len()).zip(scores) {
        multiply::<false>(keys, queries, scores, &mut meanwhile);
    }
}

/// Adds values by their weights; `meanwhile` is called twice a step.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn add_values(values: &[Operand], weights: &[Operand], sums: &mut [Square], mut meanwhile: impl FnMut()) {
    for (values, sums) in values.chunks_exact(GROUPS).zip(sums) {
        multiply::<true>(&values[..weights.len()], weights, sums, &mut meanwhile);
    }
}

/// Turns the scores of a block into weights relative to the running maximum, step by step.
struct Softmax<'a> {
    /// Position of the first score.
    first: i32,
    /// Some query does not see all positions.
    hidden: bool,
    scores: &'a [Square],
    weights: &'a mut [Operand],
    running: &'a mut Running,
    /// Pairs of rows, of which a group has 16 for each half of the queries.
    done: usize,
    /// Pairs of rows at a time: a power of 2, up to 16.
    pace: usize,
}

impl<'a> Softmax<'a> {
    /// Finds the maximum, and rescales what was summed before.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn begin(
        (first, pace): (usize, usize),
        scores: &'a [Square],
        running: &'a mut Running,
        sums: &mut [Square],
        weights: &'a mut [Operand],
    ) -> Self {
        let hidden = !running.sees_all(first, STEP * scores.len());
        let softmax = Self { first: first as i32, hidden, scores, weights, running, done: 0, pace };
        for half in 0..2 {
            let before = load(&softmax.running.max[half]);
            let max = softmax.greatest(half, before);
            if _mm512_cmp_ps_mask::<_CMP_LT_OQ>(before, max) != 0 {
                let factor = exp2(_mm512_sub_ps(before, max));
                rescale(sums, half, factor);
                let sum = _mm512_mul_ps(load(&softmax.running.sum[half]), factor);
                store_floats(&mut softmax.running.sum[half], sum);
                store_floats(&mut softmax.running.max[half], max);
            }
        }
        softmax
    }

    /// The greatest score of each query, `max` included.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn greatest(&self, half: usize, max: __m512) -> __m512 {
        let (mut max, position) = ([max; 2], load_i32(&self.running.position[half]));
        for group in 0..self.scores.len() {
            for row in 0..HALF {
                let pair = self.pair(group, half, row, position);
                max = [_mm512_max_ps(max[0], pair[0]), _mm512_max_ps(max[1], pair[1])];
            }
        }
        _mm512_max_ps(max[0], max[1])
    }

    /// Scores of 16 queries, where they see the positions: rows `row` and `16 + row` of a group.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn pair(&self, group: usize, half: usize, row: usize, sees: __m512i) -> [__m512; 2] {
        let scores = &self.scores[group].0;
        let mut pair = [load(&scores[0][half][row]), load(&scores[1][half][row])];
        if self.hidden {
            for (i, scores) in pair.iter_mut().enumerate() {
                let position = _mm512_set1_epi32(self.first + (group * STEP + i * HALF + row) as i32);
                let seen = _mm512_cmple_epi32_mask(position, sees);
                *scores = _mm512_mask_blend_ps(seen, _mm512_set1_ps(LOWEST), *scores);
            }
        }
        pair
    }

    /// Some more weights.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn go_on(&mut self) {
        let (group, half, first) = (self.done / STEP, self.done / HALF % 2, self.done % HALF);
        if group == self.scores.len() {
            return;
        }
        let (max, position) = (load(&self.running.max[half]), load_i32(&self.running.position[half]));
        let mut sums = [load(&self.running.sum[half]), _mm512_setzero_ps()];
        for row in first..first + self.pace {
            let mut pair = self.pair(group, half, row, position);
            for i in 0..2 {
                pair[i] = exp2(_mm512_sub_ps(pair[i], max));
                sums[i] = _mm512_add_ps(sums[i], pair[i]);
            }
            let planes = planes(pair[0], pair[1]);
            let [high, low] = &mut self.weights[group].0;
            store_row(&mut high[half][row], planes[0]);
            store_row(&mut low[half][row], planes[1]);
        }
        store_floats(&mut self.running.sum[half], _mm512_add_ps(sums[0], sums[1]));
        self.done += self.pace;
    }

    /// All that is left.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn end(mut self) {
        while self.done < STEP * self.scores.len() {
            self.go_on();
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn rescale(sums: &mut [Square], half: usize, factor: __m512) {
    for sums in sums {
        for rows in &mut sums.0 {
            for row in &mut rows[half] {
                let new = _mm512_mul_ps(load(row), factor);
                store_floats(row, new);
            }
        }
    }
}

/// See `kernels::attention::Functions`.
#[target_feature(enable = "avx512f")]
pub(super) fn divide(sums: &[Square], running: &Running, dim: usize, out: &mut [f32]) {
    for half in 0..2 {
        let inverse = _mm512_div_ps(_mm512_set1_ps(1.0), load(&running.sum[half]));
        for (i, rows) in sums.iter().flat_map(|s| &s.0).enumerate() {
            let col = i * HALF;
            if col >= dim {
                break;
            }
            let mut turned = [_mm512_setzero_si512(); HALF];
            for (to, row) in turned.iter_mut().zip(&rows[half]) {
                *to = _mm512_castps_si512(_mm512_mul_ps(load(row), inverse));
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
fn multiply<const ADD: bool>(
    left: &[Operand],
    right: &[Operand],
    sums: &mut Square,
    mut meanwhile: impl FnMut(),
) {
    assert_eq!(left.len(), right.len());
    // SAFETY: the only caller has configured the thread's tiles; the operands are 4096 bytes each, like `sums`.
    unsafe {
        if ADD {
            load_sums(sums);
        } else {
            super::zero_sums();
        }
        for (left, right) in left.iter().zip(right) {
            high_products(left, right);
            meanwhile();
            low_products(left, right);
            meanwhile();
        }
        super::store_sums(sums);
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

/// Adds the products of a step's high planes to `tmm0` to `tmm3`, and leaves these planes in `tmm4` to `tmm7`.
///
/// # Safety
/// * The CPU has AMX with bf16, and this thread's tiles are configured.
#[inline(always)]
unsafe fn high_products(left: &Operand, right: &Operand) {
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
            left = in(reg) &raw const *left,
            right = in(reg) &raw const *right,
            stride = in(reg) 64usize,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, preserves_flags, readonly),
        );
    }
}

/// Adds the products of low planes with high ones, after [`high_products`] of the same operands.
///
/// One tile is loaded twice, as eight registers hold no more; no sum is added to twice in a row.
///
/// # Safety
/// * The CPU has AMX with bf16, and this thread's tiles are configured.
/// * `tmm5` to `tmm7` are as [`high_products`] left them.
#[inline(always)]
unsafe fn low_products(left: &Operand, right: &Operand) {
    // SAFETY: as the caller says; the tiles of the operands, 1024 bytes each, are read.
    unsafe {
        asm!(
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
