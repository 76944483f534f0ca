//! Sums of products across the rows of a quad.

use std::arch::x86_64::*;

use super::super::blocks::Two;
use super::QUAD;

/// Halves of four registers of 16-bit lanes added up, to two lanes of each register in each half:
/// `r0 r0 r1 r1 r2 r2 r3 r3`, for `madd` to add up.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn across16(r: [__m256i; QUAD]) -> __m256i {
    let two = |a, b| {
        let outer = _mm256_blend_epi32::<0b1100_1100>(a, b);
        _mm256_add_epi16(outer, _mm256_alignr_epi8::<8>(b, a))
    };
    let (first, second) = even_odd(two(r[0], r[1]), two(r[2], r[3]));
    _mm256_add_epi16(first, second)
}

/// Likewise of 32-bit lanes, to one lane of each register in each half.
#[inline]
#[target_feature(enable = "avx2")]
fn across32(r: [__m256i; QUAD]) -> __m256i {
    let two = |a, b| {
        let outer = _mm256_blend_epi32::<0b1100_1100>(a, b);
        _mm256_add_epi32(outer, _mm256_alignr_epi8::<8>(b, a))
    };
    let (first, second) = even_odd(two(r[0], r[1]), two(r[2], r[3]));
    _mm256_add_epi32(first, second)
}

/// The even lanes of each half of `a` and `b`, and the odd ones.
#[inline]
#[target_feature(enable = "avx2")]
fn even_odd(a: __m256i, b: __m256i) -> (__m256i, __m256i) {
    let (a, b) = (_mm256_castsi256_ps(a), _mm256_castsi256_ps(b));
    let (even, odd) = (_mm256_shuffle_ps::<0b10_00_10_00>(a, b), _mm256_shuffle_ps::<0b11_01_11_01>(a, b));
    (_mm256_castps_si256(even), _mm256_castps_si256(odd))
}

/// 16-bit lanes added up to 32 bits.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn widen(sums: __m256i) -> __m256i {
    _mm256_madd_epi16(sums, _mm256_set1_epi16(1))
}

/// Sums of a quad's products of signed weights: |w| times the activation with the sign of `w`. A weight of -128 is right
/// too, an activation of -128 would not be and does not occur.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn signed_sums(w: &[Two; QUAD], low: __m256i, high: __m256i) -> __m256i {
    let signed = |w, a| widen(_mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w)));
    let row = |w: &Two| _mm256_add_epi32(signed(w.low, low), signed(w.high, high));
    across32([row(&w[0]), row(&w[1]), row(&w[2]), row(&w[3])])
}

#[inline]
#[target_feature(enable = "avx2,fma")]
pub(super) fn add_scaled(acc: &mut __m256, sums: __m256i, scale: __m256) {
    *acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), scale, *acc);
}
