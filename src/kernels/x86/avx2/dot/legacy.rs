//! Products of types with blocks of 32: two blocks a row.

#![allow(clippy::needless_range_loop)] // an iterator's closures and adapters would not be inlined

use std::arch::x86_64::*;

use super::super::blocks::{self, Two};
use super::acts::ActsTwo;
use super::sums::{across16, add_scaled, signed_sums, widen};
use super::{QUAD, Quad, dword, prefetch};

/// Products of unsigned weights of two blocks.
#[inline]
#[target_feature(enable = "avx2")]
fn products(w: &Two, a: &ActsTwo) -> __m256i {
    _mm256_add_epi16(_mm256_maddubs_epi16(w.low, a.low), _mm256_maddubs_epi16(w.high, a.high))
}

/// Sums of a quad's products of weights of four bits.
#[inline]
#[target_feature(enable = "avx2")]
fn sums_of_four_bits(w: &[Two; QUAD], a: &ActsTwo) -> __m256i {
    widen(across16([products(&w[0], a), products(&w[1], a), products(&w[2], a), products(&w[3], a)]))
}

/// The scales of four rows, at the beginning of their two blocks.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn scales_two<const BYTES: usize>(b: &Quad<'_, BYTES>) -> __m256 {
    let of =
        |r: usize, i: usize| i16::from_le_bytes([b.rows[r][BYTES / 2 * i], b.rows[r][BYTES / 2 * i + 1]]);
    let bits = _mm_setr_epi16(of(0, 0), of(1, 0), of(2, 0), of(3, 0), of(0, 1), of(1, 1), of(2, 1), of(3, 1));
    _mm256_cvtph_ps(bits)
}

/// The scales and minima of four rows, at the beginning of their two blocks.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn scales_mins_two<const BYTES: usize>(b: &Quad<'_, BYTES>) -> (__m256, __m256) {
    let pairs = |r: usize| {
        let (a, b) = (b.rows[r], b.rows[r + 1]);
        let second = BYTES / 2;
        _mm256_cvtph_ps(_mm_setr_epi32(dword(a, 0), dword(b, 0), dword(a, second), dword(b, second)))
    };
    let (first, second) = (pairs(0), pairs(2));
    (_mm256_shuffle_ps::<0b10_00_10_00>(first, second), _mm256_shuffle_ps::<0b11_01_11_01>(first, second))
}

/// Adds the products of a quad's two blocks a row: of Q4_0, whose zero point is 8.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn quad_q4_0<const T: usize>(b: &Quad<'_, 36>, acts: &[ActsTwo; T], acc: &mut [__m256; T]) {
    prefetch::<36>(b.ahead, 0, 1);
    let w =
        [blocks::q4_0(b.rows[0]), blocks::q4_0(b.rows[1]), blocks::q4_0(b.rows[2]), blocks::q4_0(b.rows[3])];
    let scale = scales_two(b);
    for t in 0..T {
        let a = &acts[t];
        let sums = sums_of_four_bits(&w, a);
        let sums = _mm256_sub_epi32(sums, _mm256_slli_epi32::<3>(a.count));
        add_scaled(&mut acc[t], sums, _mm256_mul_ps(scale, a.scale));
    }
}

/// Of Q4_1.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn quad_q4_1<const T: usize>(b: &Quad<'_, 40>, acts: &[ActsTwo; T], acc: &mut [__m256; T]) {
    prefetch::<40>(b.ahead, 0, 1);
    let w =
        [blocks::q4_1(b.rows[0]), blocks::q4_1(b.rows[1]), blocks::q4_1(b.rows[2]), blocks::q4_1(b.rows[3])];
    let (scale, min) = scales_mins_two(b);
    for t in 0..T {
        let a = &acts[t];
        let sums = sums_of_four_bits(&w, a);
        acc[t] = _mm256_fmadd_ps(min, a.sum, acc[t]);
        add_scaled(&mut acc[t], sums, _mm256_mul_ps(scale, a.scale));
    }
}

/// Sums of the products of weights of five bits, less 16 for each weight, so that they fit.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn sums_of_five_bits(w: &[Two; QUAD], a: &ActsTwo) -> __m256i {
    let sixteen = _mm256_set1_epi8(16);
    let zero = products(&Two { low: sixteen, high: sixteen }, a);
    let less = |w| _mm256_sub_epi16(products(w, a), zero);
    widen(across16([less(&w[0]), less(&w[1]), less(&w[2]), less(&w[3])]))
}

/// Of Q5_0, whose zero point is 16.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn quad_q5_0<const T: usize>(b: &Quad<'_, 44>, acts: &[ActsTwo; T], acc: &mut [__m256; T]) {
    prefetch::<44>(b.ahead, 0, 1);
    let w =
        [blocks::q5_0(b.rows[0]), blocks::q5_0(b.rows[1]), blocks::q5_0(b.rows[2]), blocks::q5_0(b.rows[3])];
    let scale = scales_two(b);
    for t in 0..T {
        let sums = sums_of_five_bits(&w, &acts[t]);
        add_scaled(&mut acc[t], sums, _mm256_mul_ps(scale, acts[t].scale));
    }
}

/// Of Q5_1: 16 less for each weight is 16 scales more in the minimum.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn quad_q5_1<const T: usize>(b: &Quad<'_, 48>, acts: &[ActsTwo; T], acc: &mut [__m256; T]) {
    prefetch::<48>(b.ahead, 0, 1);
    let w =
        [blocks::q5_1(b.rows[0]), blocks::q5_1(b.rows[1]), blocks::q5_1(b.rows[2]), blocks::q5_1(b.rows[3])];
    let (scale, min) = scales_mins_two(b);
    let min = _mm256_fmadd_ps(scale, _mm256_set1_ps(16.0), min);
    for t in 0..T {
        acc[t] = _mm256_fmadd_ps(min, acts[t].sum, acc[t]);
        let sums = sums_of_five_bits(&w, &acts[t]);
        add_scaled(&mut acc[t], sums, _mm256_mul_ps(scale, acts[t].scale));
    }
}

/// Of signed weights that `read` takes out of their blocks: Q8_0 and IQ4_NL.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn quad_signed<const BYTES: usize, const T: usize>(
    b: &Quad<'_, BYTES>,
    acts: &[ActsTwo; T],
    acc: &mut [__m256; T],
    read: impl Fn(&[u8; BYTES]) -> Two,
) {
    prefetch::<BYTES>(b.ahead, 0, 1);
    let w = [read(b.rows[0]), read(b.rows[1]), read(b.rows[2]), read(b.rows[3])];
    let scale = scales_two(b);
    for t in 0..T {
        let ActsTwo { low, high, scale: a_scale, .. } = acts[t];
        let sums = signed_sums(&w, low, high);
        add_scaled(&mut acc[t], sums, _mm256_mul_ps(scale, a_scale));
    }
}
