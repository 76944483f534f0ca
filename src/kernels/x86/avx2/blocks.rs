//! Weight blocks to registers: bytes, and apart from them the scales and minima of their groups.
//!
//! Types with blocks of 32 come two blocks at a time ([`Two`]), the K types and IQ4_XS a quarter of a superblock of 256
//! at a time ([`Piece`]). The bytes are unsigned, zero point and all, for types of up to 6 bits; those of 8 bits (Q8_0,
//! IQ4) are signed, as the sign trick of `dot` wants them.

use std::arch::x86_64::*;

use crate::kernels::x86::part;
use crate::quant::IQ4_KVALUES;

/// Two blocks A and B of 32 weights: the first halves `A0..16 B0..16` and the second halves `A16..32 B16..32`.
pub(super) struct Two {
    pub low: __m256i,
    pub high: __m256i,
}

/// 64 of a superblock's weights: of its eight registers of 32 those that [`adjacent`] or, for Q6_K, [`of_q6_k`] names.
pub(super) type Piece = [__m256i; 2];

/// Which of the eight registers of a superblock piece `j` has.
#[inline(always)]
pub(super) const fn adjacent(j: usize) -> [usize; 2] {
    [2 * j, 2 * j + 1]
}

/// [`adjacent`] for Q6_K, of whose bytes each has weights that are 64 apart.
#[inline(always)]
pub(super) const fn of_q6_k(j: usize) -> [usize; 2] {
    let first = j / 2 * 4 + j % 2;
    [first, first + 2]
}

#[inline]
#[target_feature(enable = "avx")]
pub(super) fn load32<T: bytemuck::Pod>(b: &[T; 32]) -> __m256i {
    // SAFETY: 32 elements have 32 readable bytes; the load has no alignment.
    unsafe { _mm256_loadu_si256(b.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "sse2")]
pub(super) fn load16<T: bytemuck::Pod>(b: &[T; 16]) -> __m128i {
    // SAFETY: 16 elements have 16 readable bytes; the load has no alignment.
    unsafe { _mm_loadu_si128(b.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn low_nibbles(b: __m256i) -> __m256i {
    _mm256_and_si256(b, _mm256_set1_epi8(0x0f))
}

#[inline]
#[target_feature(enable = "avx2")]
fn high_nibbles(b: __m256i) -> __m256i {
    _mm256_and_si256(_mm256_srli_epi16(b, 4), _mm256_set1_epi8(0x0f))
}

#[inline]
#[target_feature(enable = "avx2")]
fn two(a: &[u8; 16], b: &[u8; 16]) -> __m256i {
    _mm256_inserti128_si256(_mm256_castsi128_si256(load16(a)), load16(b), 1)
}

/// The nibbles of two blocks, which begin at bytes `A` and `B`.
#[inline]
#[target_feature(enable = "avx2")]
fn nibbles<const A: usize, const B: usize>(b: &[u8]) -> Two {
    let ab = two(part::<A, 16>(b), part::<B, 16>(b));
    Two { low: low_nibbles(ab), high: high_nibbles(ab) }
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn q4_0(b: &[u8; 36]) -> Two {
    nibbles::<2, 20>(b)
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn q4_1(b: &[u8; 40]) -> Two {
    nibbles::<4, 24>(b)
}

/// Adds the fifth bits of two blocks, bit `i` of `a` and of `b` for weight `i`.
#[inline]
#[target_feature(enable = "avx2")]
fn with_fifth_bits(w: Two, a: &[u8; 4], b: &[u8; 4]) -> Two {
    // Each byte of the bits eight times, of which the mask keeps a bit each.
    let bits = _mm256_setr_epi32(i32::from_le_bytes(*a), 0, 0, 0, i32::from_le_bytes(*b), 0, 0, 0);
    let mask = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
    let set = |bytes: [i64; 2]| {
        let index = _mm256_setr_epi64x(bytes[0], bytes[1], bytes[0], bytes[1]);
        let bit = _mm256_and_si256(_mm256_shuffle_epi8(bits, index), mask);
        _mm256_and_si256(_mm256_cmpeq_epi8(bit, mask), _mm256_set1_epi8(16))
    };
    const BYTE: i64 = 0x0101_0101_0101_0101;
    Two {
        low: _mm256_or_si256(w.low, set([0, BYTE])),
        high: _mm256_or_si256(w.high, set([2 * BYTE, 3 * BYTE])),
    }
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn q5_0(b: &[u8; 44]) -> Two {
    with_fifth_bits(nibbles::<6, 28>(b), part::<2, 4>(b), part::<24, 4>(b))
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn q5_1(b: &[u8; 48]) -> Two {
    with_fifth_bits(nibbles::<8, 32>(b), part::<4, 4>(b), part::<28, 4>(b))
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn q8_0(b: &[u8; 68]) -> Two {
    Two { low: two(part::<2, 16>(b), part::<36, 16>(b)), high: two(part::<18, 16>(b), part::<52, 16>(b)) }
}

/// The signed values that `nibbles` stand for.
#[inline]
#[target_feature(enable = "avx2")]
fn iq4_values(nibbles: __m256i) -> __m256i {
    const TABLE: [u8; 16] = {
        let mut table = [0; 16];
        let mut i = 0;
        while i < 16 {
            table[i] = IQ4_KVALUES[i] as u8;
            i += 1;
        }
        table
    };
    _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load16(&TABLE)), nibbles)
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn iq4_nl(b: &[u8; 36]) -> Two {
    let Two { low, high } = q4_0(b);
    Two { low: iq4_values(low), high: iq4_values(high) }
}

/// The 32 bytes from `at` on.
#[inline]
#[target_feature(enable = "avx")]
fn load32_at(b: &[u8], at: usize) -> __m256i {
    load32::<u8>(b[at..].first_chunk().expect("a block's parts lie inside it"))
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn q4_k(b: &[u8; 144], j: usize) -> Piece {
    let y = load32_at(b, 16 + 32 * j);
    [low_nibbles(y), high_nibbles(y)]
}

/// In each byte of `bits`, bit `from` moved to bit `to`, the others 0.
#[inline]
#[target_feature(enable = "avx2")]
fn bit(bits: __m256i, from: usize, to: usize) -> __m256i {
    let by = |n: usize| _mm_cvtsi32_si128(n as i32);
    let moved =
        if to > from { _mm256_sll_epi16(bits, by(to - from)) } else { _mm256_srl_epi16(bits, by(from - to)) };
    _mm256_and_si256(moved, _mm256_set1_epi8(1 << to))
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn q5_k(b: &[u8; 176], j: usize) -> Piece {
    let bits = load32_at(b, 16); // bit `g` of byte `i`: the fifth bit of weight `i` of group `g`
    let y = load32_at(b, 48 + 32 * j);
    [
        _mm256_or_si256(low_nibbles(y), bit(bits, 2 * j, 4)),
        _mm256_or_si256(high_nibbles(y), bit(bits, 2 * j + 1, 4)),
    ]
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn q6_k(b: &[u8; 210], j: usize) -> Piece {
    let (low, high) = (load32_at(b, 32 * j), load32_at(b, 128 + j / 2 * 32));
    let top = |moved| _mm256_and_si256(moved, _mm256_set1_epi8(0x30));
    let [first, second] = match j % 2 {
        0 => [_mm256_slli_epi16(high, 4), high],
        _ => [_mm256_slli_epi16(high, 2), _mm256_srli_epi16(high, 2)],
    };
    [_mm256_or_si256(low_nibbles(low), top(first)), _mm256_or_si256(high_nibbles(low), top(second))]
}

/// Pairs of bits from bit `4 * (j % 2)` on, in the `j / 2`-th 32 bytes of `b`.
#[inline]
#[target_feature(enable = "avx2")]
fn crumbs(b: &[u8; 64], j: usize) -> Piece {
    let y = load32_at(b, j / 2 * 32);
    let y = if j.is_multiple_of(2) { y } else { _mm256_srli_epi16(y, 4) };
    let three = _mm256_set1_epi8(3);
    [_mm256_and_si256(y, three), _mm256_and_si256(_mm256_srli_epi16(y, 2), three)]
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn q2_k(b: &[u8; 84], j: usize) -> Piece {
    crumbs(part::<16, 64>(b), j)
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn q3_k(b: &[u8; 110], j: usize) -> Piece {
    let bits = load32_at(b, 0); // bit `i` of byte `j`: the third bit of weight `32 i + j`
    let [first, second] = crumbs(part::<32, 64>(b), j);
    [_mm256_or_si256(first, bit(bits, 2 * j, 2)), _mm256_or_si256(second, bit(bits, 2 * j + 1, 2))]
}

/// Groups `2 j` and `2 j + 1` as a [`Two`].
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn iq4_xs(b: &[u8; 136], j: usize) -> Two {
    let y = load32_at(b, 8 + 32 * j); // two groups of 16 bytes
    Two { low: iq4_values(low_nibbles(y)), high: iq4_values(high_nibbles(y)) }
}
