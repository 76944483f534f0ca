//! One token or a few: dot products of weight rows, read in place, with rows of activations.
//!
//! Four rows go through a step together, a *quad*. What they share are not only the activations: their products are
//! summed up *across* the rows, until a register holds four sums of each half (`sums::across16`), and so one conversion and one
//! multiplication by scales serve four rows. Scales come out of the blocks in the same order of lanes. Without that, more
//! than half of the instructions of types with small blocks would go into scales (docs/experiments.md, "Decoding on
//! AVX2").
//!
//! 16-bit sums hold eight products of weights of up to 5 bits (8 * 31 * 127 < 2^15), or of weights of 6 bits whose zero
//! point of 32 is taken off.

#![allow(clippy::needless_range_loop)] // an iterator's closures and adapters would not be inlined

mod acts;
mod kquants;
mod legacy;
mod sums;

use std::arch::x86_64::*;

use super::blocks;
use crate::gguf::GgmlType;
use crate::kernels::fetch::{LINE, fetch_line};
use crate::kernels::rows::{Consecutive, Listed, WeightRows};
use crate::kernels::x86::each_tokens;
use crate::kernels::{Activations, Q8Row};
use acts::{acts_super, acts_two};
use kquants::{quad_iq4_xs, quad_k4, quad_q2_k, quad_q3_k, quad_q6_k};
use legacy::{quad_q4_0, quad_q4_1, quad_q5_0, quad_q5_1, quad_signed};

/// Rows of a quad.
const QUAD: usize = 4;
/// Quads of a step, which share the preparation of activations.
const QUADS: usize = 2;
/// The same where activations are of several tokens and rows are short: what is multiplied before the first bytes fetched
/// are needed, [`FEW_BYTES`] at most, waits for memory.
const QUADS_OF_TOKENS: usize = 4;
const FEW_BYTES: usize = 16 << 10;
/// Least distance in bytes between what is multiplied and what is fetched.
const PREFETCH: usize = 4096;

/// A step's bytes of four rows, and where those begin that are fetched meanwhile.
struct Quad<'w, const BYTES: usize> {
    rows: [&'w [u8; BYTES]; QUAD],
    ahead: *const u8,
}

/// Asks for part `part` of `parts` of the lines of `BYTES` bytes of four rows from `at` on. Not for all at once, which would
/// be more than a core can have under way.
#[inline(always)]
fn prefetch<const BYTES: usize>(at: *const u8, part: usize, parts: usize) {
    let lines = (QUAD * BYTES).div_ceil(LINE);
    for line in part * lines / parts..(part + 1) * lines / parts {
        fetch_line(at.wrapping_add(line * LINE));
    }
}

#[inline(always)]
fn dword(b: &[u8], at: usize) -> i32 {
    i32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

/// Products of `4 * Q` rows from `first` on, of which `left` are there, with all tokens: `[quad][token]`, lane `r` of both halves
/// together the sum of row `r`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn rows<'w, 'x, W: WeightRows<'w>, A: Copy, const BYTES: usize, const Q: usize, const T: usize>(
    w: W,
    (first, left): (usize, usize),
    x: &[Q8Row<'x>; T],
    acts: impl Fn(&Q8Row<'x>, usize) -> A,
    quad: impl Fn(&Quad<'_, BYTES>, &[A; T], &mut [__m256; T]),
) -> [[__m256; T]; Q] {
    let row_bytes = w.row_bytes();
    let (whole, tail) = (row_bytes / BYTES, row_bytes % BYTES);
    let mut steps = [[[].as_slice(); QUAD]; Q];
    // Fewer blocks than a step takes have zeros behind them.
    let mut padded = [[[0u8; BYTES]; QUAD]; Q];
    for q in 0..Q {
        for r in 0..QUAD {
            // The last row takes the place of those that are missing.
            let row = w.row(first + (QUAD * q + r).min(left - 1));
            steps[q][r] = &row.as_chunks::<BYTES>().0[..whole];
            if tail > 0 {
                padded[q][r][..tail].copy_from_slice(&row[whole * BYTES..]);
            }
        }
    }
    // The next rows: fetched one after the other, so that their beginnings, where every stream is new, do not wait for
    // memory.
    let ahead = (QUAD * Q * row_bytes).max(PREFETCH);
    let mut acc = [[_mm256_setzero_ps(); T]; Q];
    for s in 0..row_bytes.div_ceil(BYTES) {
        let mut a = [acts(&x[0], s); T];
        for t in 1..T {
            a[t] = acts(&x[t], s);
        }
        for q in 0..Q {
            let rows = if s < whole {
                let [r0, r1, r2, r3] = steps[q];
                [&r0[s], &r1[s], &r2[s], &r3[s]]
            } else {
                padded[q].each_ref()
            };
            let ahead = w.behind(first, ahead + (s * Q + q) * QUAD * BYTES);
            quad(&Quad { rows, ahead }, &a, &mut acc[q]);
        }
    }
    acc
}

/// Products of rows of a type, `BYTES` bytes a step: `acts(x, step)` prepares a token's activations, `quad(bytes, acts,
/// acc)` adds the products of a step.
// Not inlined: one function for all types would run out of registers.
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c")]
fn multiply<'w, 'x, W: WeightRows<'w>, A: Copy, const BYTES: usize, const T: usize>(
    w: W,
    x: &[Q8Row<'x>; T],
    mut out: [&mut [f32]; T],
    acts: impl Fn(&Q8Row<'x>, usize) -> A,
    quad: impl Fn(&Quad<'_, BYTES>, &[A; T], &mut [__m256; T]),
) {
    let (n, mut done) = (out[0].len(), 0);
    while done < n {
        let (from, left) = ((done, n - done), n - done);
        if T > 1 && left > QUAD * QUADS && QUAD * QUADS_OF_TOKENS * w.row_bytes() <= FEW_BYTES {
            let sums = rows::<W, _, BYTES, QUADS_OF_TOKENS, T>(w, from, x, &acts, &quad);
            store(&sums, done, &mut out);
            done += QUAD * QUADS_OF_TOKENS;
        } else if left > QUAD {
            let sums = rows::<W, _, BYTES, QUADS, T>(w, from, x, &acts, &quad);
            store(&sums, done, &mut out);
            done += QUAD * QUADS;
        } else {
            let sums = rows::<W, _, BYTES, 1, T>(w, from, x, &acts, &quad);
            store(&sums, done, &mut out);
            done += QUAD;
        }
    }
}

/// From the halves' sums of some quads to the outputs from `first` on, as far as those are there.
#[inline]
#[target_feature(enable = "avx")]
fn store<const Q: usize, const T: usize>(sums: &[[__m256; T]; Q], first: usize, out: &mut [&mut [f32]; T]) {
    for q in 0..Q {
        for t in 0..T {
            let sums = sums[q][t];
            let sums = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps::<1>(sums));
            let mut four = [0f32; QUAD];
            // SAFETY: 16 writable bytes; the store has no alignment.
            unsafe { _mm_storeu_ps(four.as_mut_ptr(), sums) };
            let first = (first + QUAD * q).min(out[t].len());
            let out = &mut out[t][first..];
            match out.first_chunk_mut() {
                Some(all) => *all = four,
                None => out.copy_from_slice(&four[..out.len()]),
            }
        }
    }
}

/// `T` tokens.
#[target_feature(enable = "avx2,fma,f16c")]
fn tokens<'w, W: WeightRows<'w>, const T: usize>(
    ty: GgmlType,
    w: W,
    x: &[Q8Row<'_>; T],
    out: [&mut [f32]; T],
) {
    use GgmlType::*;
    let two = |x: &Q8Row<'_>, s| acts_two(x, s);
    match ty {
        Q4_0 => multiply(w, x, out, two, |b, a, acc| quad_q4_0(b, a, acc)),
        Q4_1 => multiply(w, x, out, two, |b, a, acc| quad_q4_1(b, a, acc)),
        Q5_0 => multiply(w, x, out, two, |b, a, acc| quad_q5_0(b, a, acc)),
        Q5_1 => multiply(w, x, out, two, |b, a, acc| quad_q5_1(b, a, acc)),
        Q8_0 => multiply(w, x, out, two, |b, a, acc| quad_signed(b, a, acc, |b| blocks::q8_0(b))),
        IQ4_NL => multiply(w, x, out, two, |b, a, acc| quad_signed(b, a, acc, |b| blocks::iq4_nl(b))),
        Q2_K => multiply(w, x, out, acts_super, |b, a, acc| quad_q2_k(b, a, acc)),
        Q3_K => multiply(w, x, out, acts_super, |b, a, acc| quad_q3_k(b, a, acc)),
        Q4_K => multiply(w, x, out, acts_super, |b, a, acc| quad_k4(b, a, acc, |b, j| blocks::q4_k(b, j))),
        Q5_K => multiply(w, x, out, acts_super, |b, a, acc| quad_k4(b, a, acc, |b, j| blocks::q5_k(b, j))),
        Q6_K => multiply(w, x, out, acts_super, |b, a, acc| quad_q6_k(b, a, acc)),
        IQ4_XS => multiply(w, x, out, acts_super, |b, a, acc| quad_iq4_xs(b, a, acc)),
        F32 | F16 | BF16 => unreachable!("unquantised types have kernels of their own"),
    }
}

/// See `Kernels::dot`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::kernels::x86) fn dot(
    ty: GgmlType,
    weights: &[u8],
    row_bytes: usize,
    x: Q8Row<'_>,
    out: &mut [f32],
) {
    tokens(ty, Consecutive { weights, row_bytes }, &[x], [out]);
}

/// See `Kernels::dot_listed`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::kernels::x86) fn dot_listed(ty: GgmlType, w: Listed<'_>, x: Q8Row<'_>, out: &mut [f32]) {
    tokens(ty, w, &[x], [out]);
}

/// See `Kernels::dot_tokens`: the weights are unpacked once for four tokens.
#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::kernels::x86) fn dot_tokens(
    ty: GgmlType,
    weights: &[u8],
    row_bytes: usize,
    x: &Activations,
    out: &mut [f32],
) {
    let w = Consecutive { weights, row_bytes };
    each_tokens!(tokens, ty, w, x, out, 4 2 1);
}
