//! Products of the K types and IQ4_XS: a superblock a row.

#![allow(clippy::needless_range_loop)] // an iterator's closures and adapters would not be inlined

use std::arch::x86_64::*;

use super::super::blocks::{self, Piece, load16, load32};
use super::acts::{ActsSuper, spread};
use super::sums::{across16, add_scaled, signed_sums};
use super::{QUAD, Quad, dword, prefetch};
use crate::kernels::x86::{part, scales_q3_k, word};

#[inline]
#[target_feature(enable = "avx2")]
fn twice(x: __m128i) -> __m256i {
    _mm256_broadcastsi128_si256(x)
}

/// Double words from byte `at` on of four rows.
#[inline]
#[target_feature(enable = "avx2")]
fn dwords<const BYTES: usize>(b: &Quad<'_, BYTES>, at: usize) -> __m128i {
    _mm_setr_epi32(dword(b.rows[0], at), dword(b.rows[1], at), dword(b.rows[2], at), dword(b.rows[3], at))
}

/// A half-precision number from byte `AT` on of each of four rows, in both halves.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn halves<const BYTES: usize, const AT: usize>(b: &Quad<'_, BYTES>) -> __m256 {
    let [a, b, c, d] =
        [word::<AT>(b.rows[0]), word::<AT>(b.rows[1]), word::<AT>(b.rows[2]), word::<AT>(b.rows[3])];
    let bits = u64::from(a) | u64::from(b) << 16 | u64::from(c) << 32 | u64::from(d) << 48;
    _mm256_cvtph_ps(_mm_set1_epi64x(bits as i64))
}

/// `[row][group]` of four groups to `[group][row]`, and back.
#[inline]
#[target_feature(enable = "avx2")]
fn turn4(x: __m128i) -> __m128i {
    _mm_shuffle_epi8(x, _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15))
}

/// Eight bytes from byte `8 * (i % 2)` on of `[group][row]`, widened: groups `2 i` and `2 i + 1`.
#[inline]
#[target_feature(enable = "avx2")]
fn two_groups<const SIGNED: bool>(groups: &[__m128i], i: usize) -> __m256 {
    let four = groups[i / 2];
    let two = if i.is_multiple_of(2) { four } else { _mm_srli_si128::<8>(four) };
    _mm256_cvtepi32_ps(if SIGNED { _mm256_cvtepi8_epi32(two) } else { _mm256_cvtepu8_epi32(two) })
}

/// The 6-bit scales and minima of four rows of Q4_K or Q5_K: `[row][group]`, the first four groups and the last four. As
/// `scales_mins_k4`, for four rows at once.
#[inline]
#[target_feature(enable = "avx2")]
fn scales_mins_k4<const BYTES: usize>(b: &Quad<'_, BYTES>) -> ([__m128i; 2], [__m128i; 2]) {
    let (first, second, third) = (dwords(b, 4), dwords(b, 8), dwords(b, 12));
    let six = |x| _mm_and_si128(x, _mm_set1_epi8(0x3f));
    let nibble = |x| _mm_and_si128(x, _mm_set1_epi8(0x0f));
    let top = |x| _mm_and_si128(_mm_srli_epi16::<2>(x), _mm_set1_epi8(0x30));
    let high_scales = _mm_or_si128(nibble(third), top(first));
    let high_mins = _mm_or_si128(nibble(_mm_srli_epi16::<4>(third)), top(second));
    ([six(first), high_scales], [six(second), high_mins])
}

/// `WORDS[i]` brings byte `4 r + i` to both words of lane `r` of each half, in their low bytes.
const WORDS: [[i8; 32]; 4] = {
    let mut index = [[-1; 32]; 4];
    let mut at = 0;
    while at < 32 * 4 {
        let (i, lane) = (at / 32, at % 32 / 2);
        if at % 2 == 0 {
            index[i][at % 32] = (lane % 8 / 2 * 4 + i) as i8;
        }
        at += 1;
    }
    index
};

/// `TOPS[i]` brings byte `8 i + 4 h + r` to both words of lane `r` of half `h`, in their high bytes.
const TOPS: [[i8; 32]; 2] = {
    let mut index = [[-1; 32]; 2];
    let mut at = 0;
    while at < 32 * 2 {
        let (i, half, lane) = (at / 32, at % 32 / 16, at % 16 / 4);
        if at % 2 == 1 {
            index[i][at % 32] = (8 * i + 4 * half + lane) as i8;
        }
        at += 1;
    }
    index
};

/// Adds the products of piece `J`: groups `2 J` and `2 J + 1`, of unsigned weights.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_k4<const J: usize, const BYTES: usize, const T: usize>(
    b: &Quad<'_, BYTES>,
    acts: &[ActsSuper<'_>; T],
    scales: &[__m256i; 2],
    sums: &mut [__m256; T],
    piece: &impl Fn(&[u8; BYTES], usize) -> Piece,
) {
    prefetch::<BYTES>(b.ahead, J, 4);
    let w = [piece(b.rows[0], J), piece(b.rows[1], J), piece(b.rows[2], J), piece(b.rows[3], J)];
    for k in 0..2 {
        let group = 2 * J + k;
        let scale = _mm256_shuffle_epi8(scales[group / 4], load32(&WORDS[group % 4]));
        for t in 0..T {
            let a = acts[t].q(group);
            let across = across16([
                _mm256_maddubs_epi16(w[0][k], a),
                _mm256_maddubs_epi16(w[1][k], a),
                _mm256_maddubs_epi16(w[2][k], a),
                _mm256_maddubs_epi16(w[3][k], a),
            ]);
            let by = _mm256_set1_ps(acts[t].scale[group]);
            add_scaled(&mut sums[t], _mm256_madd_epi16(across, scale), by);
        }
    }
}

/// Of superblocks with eight groups of unsigned weights, `piece(bytes, j)` giving groups `2 j` and `2 j + 1`: Q4_K and
/// Q5_K. The group's scale is multiplied in as an integer.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn quad_k4<const BYTES: usize, const T: usize>(
    b: &Quad<'_, BYTES>,
    acts: &[ActsSuper<'_>; T],
    acc: &mut [__m256; T],
    piece: impl Fn(&[u8; BYTES], usize) -> Piece,
) {
    let (scales, mins) = scales_mins_k4(b);
    let scales = [twice(scales[0]), twice(scales[1])];
    let mut sums = [_mm256_setzero_ps(); T];
    add_k4::<0, BYTES, T>(b, acts, &scales, &mut sums, &piece);
    add_k4::<1, BYTES, T>(b, acts, &scales, &mut sums, &piece);
    add_k4::<2, BYTES, T>(b, acts, &scales, &mut sums, &piece);
    add_k4::<3, BYTES, T>(b, acts, &scales, &mut sums, &piece);
    let both = _mm256_cvtph_ps(dwords(b, 0));
    let (d, dmin) = (spread(both, &[0, 2, 4, 6, 0, 2, 4, 6]), spread(both, &[1, 3, 5, 7, 1, 3, 5, 7]));
    let mins = [turn4(mins[0]), turn4(mins[1])];
    for t in 0..T {
        let by = acts[t].sums32();
        let mut min = _mm256_mul_ps(two_groups::<false>(&mins, 0), by[0]);
        for i in 1..4 {
            min = _mm256_fmadd_ps(two_groups::<false>(&mins, i), by[i], min);
        }
        acc[t] = _mm256_fmadd_ps(d, sums[t], acc[t]);
        acc[t] = _mm256_fnmadd_ps(dmin, min, acc[t]);
    }
}

/// Sixteen bytes of each of four rows to `[group][row]`, four groups a register.
#[inline]
#[target_feature(enable = "avx2")]
fn turn16(r: [__m128i; QUAD]) -> [__m128i; 4] {
    let (low, high) = (_mm_unpacklo_epi8(r[0], r[1]), _mm_unpackhi_epi8(r[0], r[1]));
    let (low2, high2) = (_mm_unpacklo_epi8(r[2], r[3]), _mm_unpackhi_epi8(r[2], r[3]));
    [
        _mm_unpacklo_epi16(low, low2),
        _mm_unpackhi_epi16(low, low2),
        _mm_unpacklo_epi16(high, high2),
        _mm_unpackhi_epi16(high, high2),
    ]
}

/// The products of superblocks with sixteen groups, `piece(bytes, j)` giving the registers `index(j)`, in units of
/// `d / 256`. The zero point `ZERO` is taken off the weights; `scales` are signed bytes, `[group][row]`.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn groups16<const BYTES: usize, const ZERO: i8, const T: usize>(
    b: &Quad<'_, BYTES>,
    acts: &[ActsSuper<'_>; T],
    scales: &[__m128i; 4],
    index: impl Fn(usize) -> [usize; 2],
    piece: impl Fn(&[u8; BYTES], usize) -> Piece,
) -> [__m256; T] {
    let mut sums = [_mm256_setzero_ps(); T];
    add_groups16::<0, BYTES, ZERO, T>(b, acts, scales, &mut sums, &index, &piece);
    add_groups16::<1, BYTES, ZERO, T>(b, acts, scales, &mut sums, &index, &piece);
    add_groups16::<2, BYTES, ZERO, T>(b, acts, scales, &mut sums, &index, &piece);
    add_groups16::<3, BYTES, ZERO, T>(b, acts, scales, &mut sums, &index, &piece);
    sums
}

/// Adds the products of piece `J`.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn add_groups16<const J: usize, const BYTES: usize, const ZERO: i8, const T: usize>(
    b: &Quad<'_, BYTES>,
    acts: &[ActsSuper<'_>; T],
    scales: &[__m128i; 4],
    sums: &mut [__m256; T],
    index: &impl Fn(usize) -> [usize; 2],
    piece: &impl Fn(&[u8; BYTES], usize) -> Piece,
) {
    prefetch::<BYTES>(b.ahead, J, 4);
    let w = [piece(b.rows[0], J), piece(b.rows[1], J), piece(b.rows[2], J), piece(b.rows[3], J)];
    for k in 0..2 {
        let i = index(J)[k];
        let scale = _mm256_shuffle_epi8(twice(scales[i / 2]), load32(&TOPS[i % 2]));
        for t in 0..T {
            let a = acts[t].q(i);
            let zero = _mm256_maddubs_epi16(_mm256_set1_epi8(ZERO), a);
            let less = |w| {
                let products = _mm256_maddubs_epi16(w, a);
                if ZERO == 0 { products } else { _mm256_sub_epi16(products, zero) }
            };
            let across = across16([less(w[0][k]), less(w[1][k]), less(w[2][k]), less(w[3][k])]);
            let by = _mm256_set1_ps(acts[t].scale[i]);
            add_scaled(&mut sums[t], _mm256_madd_epi16(across, scale), by);
        }
    }
}

/// What [`groups16`] counts in.
const TOP: f32 = 1.0 / 256.0;

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn quad_q6_k<const T: usize>(b: &Quad<'_, 210>, acts: &[ActsSuper<'_>; T], acc: &mut [__m256; T]) {
    let of = |r: usize| load16(part::<192, 16>(b.rows[r]));
    let scales = turn16([of(0), of(1), of(2), of(3)]);
    let sums = groups16::<210, 32, T>(b, acts, &scales, blocks::of_q6_k, |b, j| blocks::q6_k(b, j));
    let d = _mm256_mul_ps(halves::<210, 208>(b), _mm256_set1_ps(TOP));
    for t in 0..T {
        acc[t] = _mm256_fmadd_ps(d, sums[t], acc[t]);
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn quad_q3_k<const T: usize>(b: &Quad<'_, 110>, acts: &[ActsSuper<'_>; T], acc: &mut [__m256; T]) {
    let of = |r: usize| {
        let [s0, s1, s2, s3] = scales_q3_k(part::<96, 12>(b.rows[r]));
        let scales = _mm_setr_epi32(s0 as i32, s1 as i32, s2 as i32, s3 as i32);
        _mm_sub_epi8(scales, _mm_set1_epi8(32))
    };
    let scales = turn16([of(0), of(1), of(2), of(3)]);
    let sums = groups16::<110, 4, T>(b, acts, &scales, blocks::adjacent, |b, j| blocks::q3_k(b, j));
    let d = _mm256_mul_ps(halves::<110, 108>(b), _mm256_set1_ps(TOP));
    for t in 0..T {
        acc[t] = _mm256_fmadd_ps(d, sums[t], acc[t]);
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn quad_q2_k<const T: usize>(b: &Quad<'_, 84>, acts: &[ActsSuper<'_>; T], acc: &mut [__m256; T]) {
    let of = |r: usize| load16(part::<0, 16>(b.rows[r]));
    let nibble = |x| _mm_and_si128(x, _mm_set1_epi8(0x0f));
    let both = turn16([of(0), of(1), of(2), of(3)]);
    let (mut scales, mut mins) = (both, both);
    for i in 0..4 {
        (scales[i], mins[i]) = (nibble(both[i]), nibble(_mm_srli_epi16::<4>(both[i])));
    }
    let sums = groups16::<84, 0, T>(b, acts, &scales, blocks::adjacent, |b, j| blocks::q2_k(b, j));
    let d = _mm256_mul_ps(halves::<84, 80>(b), _mm256_set1_ps(TOP));
    let dmin = halves::<84, 82>(b);
    for t in 0..T {
        let by = acts[t].sums16();
        let mut min = _mm256_setzero_ps();
        for i in 0..8 {
            min = _mm256_fmadd_ps(two_groups::<false>(&mins, i), by[i], min);
        }
        acc[t] = _mm256_fmadd_ps(d, sums[t], acc[t]);
        acc[t] = _mm256_fnmadd_ps(dmin, min, acc[t]);
    }
}

/// The 6-bit scales of four rows of IQ4_XS, 32 taken off: `[group][row]`, four groups a register.
///
/// The low nibbles are those of four bytes; the high bits of group `g` are bits `2 g` and `2 g + 1` of a word.
#[inline]
#[target_feature(enable = "avx2")]
fn scales_iq4_xs(b: &Quad<'_, 136>) -> [__m128i; 2] {
    let (low, head) = (dwords(b, 4), dwords(b, 0));
    // Each byte of the word twice: the fields of the even groups are at bits 0, 4, 0, 4, those of the odd ones above.
    let high = _mm_shuffle_epi8(head, _mm_setr_epi8(2, 2, 3, 3, 6, 6, 7, 7, 10, 10, 11, 11, 14, 14, 15, 15));
    let high = _mm_blendv_epi8(high, _mm_srli_epi16::<4>(high), _mm_set1_epi16(0xff00_u16 as i16));
    let nibble = |x| _mm_and_si128(x, _mm_set1_epi8(0x0f));
    let top = |x| _mm_and_si128(x, _mm_set1_epi8(0x30));
    let even = _mm_or_si128(nibble(low), top(_mm_slli_epi16::<4>(high)));
    let odd = _mm_or_si128(nibble(_mm_srli_epi16::<4>(low)), top(_mm_slli_epi16::<2>(high)));
    let less = |x| turn4(_mm_sub_epi8(x, _mm_set1_epi8(32)));
    let (even, odd) = (less(even), less(odd));
    [_mm_unpacklo_epi32(even, odd), _mm_unpackhi_epi32(even, odd)]
}

/// Adds the products of groups `2 J` and `2 J + 1`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_iq4_xs<const J: usize, const T: usize>(
    b: &Quad<'_, 136>,
    acts: &[ActsSuper<'_>; T],
    scales: &[__m128i; 2],
    sums: &mut [__m256; T],
) {
    prefetch::<136>(b.ahead, J, 4);
    let of = |r: usize| blocks::iq4_xs(b.rows[r], J);
    let w = [of(0), of(1), of(2), of(3)];
    let scale = two_groups::<true>(scales, J);
    for t in 0..T {
        let (low, high, by) = acts[t].two(J);
        let across = signed_sums(&w, low, high);
        add_scaled(&mut sums[t], across, _mm256_mul_ps(scale, by));
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn quad_iq4_xs<const T: usize>(
    b: &Quad<'_, 136>,
    acts: &[ActsSuper<'_>; T],
    acc: &mut [__m256; T],
) {
    let scales = scales_iq4_xs(b);
    let mut sums = [_mm256_setzero_ps(); T];
    add_iq4_xs::<0, T>(b, acts, &scales, &mut sums);
    add_iq4_xs::<1, T>(b, acts, &scales, &mut sums);
    add_iq4_xs::<2, T>(b, acts, &scales, &mut sums);
    add_iq4_xs::<3, T>(b, acts, &scales, &mut sums);
    let d = halves::<136, 0>(b);
    for t in 0..T {
        acc[t] = _mm256_fmadd_ps(d, sums[t], acc[t]);
    }
}
