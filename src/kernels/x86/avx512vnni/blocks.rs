//! Weight blocks to registers: unsigned bytes, and apart from them the scales and minima of their groups.
//!
//! Types with blocks of 32 come four blocks at a time ([`Four`]), the K types and IQ4_XS a superblock of 256 at a time
//! ([`Super`]). The bytes stand in whatever order takes the fewest instructions to unpack; `dot` brings the activations,
//! which several rows share, into that order. Scales come for as many rows as fill a register ([`Scales`]): taking them
//! out of their blocks and widening them costs as much for one row as for all.

#![allow(clippy::needless_range_loop)] // an iterator's closures and adapters would not be inlined

use std::arch::x86_64::*;

use crate::kernels::x86::{IQ4_VALUES, part, scales_q3_k, word};

/// Four blocks A, B, C, D of 32 weights: `low` holds the first halves `A0..16 B0..16 C0..16 D0..16`, `high` the second
/// halves, so a lane of four bytes belongs to block `lane / 4` in both.
#[derive(Clone, Copy)]
pub(super) struct Four {
    pub low: __m512i,
    pub high: __m512i,
}

/// 256 weights in the type's order.
pub(super) type Super = [__m512i; 4];

/// Scales and minima of the groups of some rows: all of the first row, then all of the second, as many rows as there is
/// room for.
pub(super) struct Scales {
    pub scale: __m512,
    pub min: __m512,
}

impl Scales {
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn without_min(scale: __m512) -> Self {
        Self { scale, min: _mm512_setzero_ps() }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn load64(b: &[u8; 64]) -> __m512i {
    // SAFETY: 64 readable bytes; the load has no alignment.
    unsafe { _mm512_loadu_si512(b.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
fn load32(b: &[u8; 32]) -> __m256i {
    // SAFETY: 32 readable bytes; the load has no alignment.
    unsafe { _mm256_loadu_si256(b.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
fn load16(b: &[u8; 16]) -> __m128i {
    // SAFETY: 16 readable bytes; the load has no alignment.
    unsafe { _mm_loadu_si128(b.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn lanes(l: &[i32; 16]) -> __m512i {
    // SAFETY: 64 readable bytes; the load has no alignment.
    unsafe { _mm512_loadu_si512(l.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512bw")]
fn words(w: &[u16; 32]) -> __m512i {
    // SAFETY: 64 readable bytes; the load has no alignment.
    unsafe { _mm512_loadu_si512(w.as_ptr().cast()) }
}

/// A half-precision number in all lanes.
#[inline]
#[target_feature(enable = "avx512f")]
fn everywhere(bits: u16) -> __m512 {
    _mm512_cvtph_ps(_mm256_set1_epi16(bits as i16))
}

#[inline]
#[target_feature(enable = "avx512bw")]
fn low_nibbles(b: __m512i) -> __m512i {
    _mm512_and_si512(b, _mm512_set1_epi8(0x0f))
}

#[inline]
#[target_feature(enable = "avx512bw")]
fn high_nibbles(b: __m512i) -> __m512i {
    _mm512_and_si512(_mm512_srli_epi16(b, 4), _mm512_set1_epi8(0x0f))
}

/// Where the words of four blocks of `block` words lie in two loads of 64 bytes, the first at the
/// start and the second at the end of the four blocks: word `i` of the four to its place as
/// `vpermt2w` counts.
const fn place(block: usize, i: usize) -> u16 {
    let total = 4 * block;
    if i < 32 { i as u16 } else { (32 + i - (total - 32)) as u16 }
}

/// The eight words from `first` on of each of four blocks, in turn.
const fn nibble_words(block: usize, first: usize) -> [u16; 32] {
    let mut index = [0; 32];
    let mut i = 0;
    while i < 32 {
        index[i] = place(block, i / 8 * block + first + i % 8);
        i += 1;
    }
    index
}

/// The four double words from `first` on of each of four blocks, in turn; all counted in double words.
const fn nibble_dwords(block: usize, first: usize) -> [i32; 16] {
    let mut index = [0; 16];
    let mut i = 0;
    while i < 16 {
        index[i] = place(2 * block, 2 * (i / 4 * block + first + i % 4)) as i32 / 2;
        i += 1;
    }
    index
}

/// The first word of each of four blocks, over and over.
const fn first_words(block: usize) -> [u16; 32] {
    let mut index = [0; 32];
    let mut i = 0;
    while i < 32 {
        index[i] = place(block, i % 4 * block);
        i += 1;
    }
    index
}

/// The first and the last 64 bytes of four blocks.
#[inline]
#[target_feature(enable = "avx512f")]
fn ends(b: &[u8]) -> (__m512i, __m512i) {
    (load64(part::<0, 64>(b)), load64(b.last_chunk().expect("four blocks have 64 bytes")))
}

/// The lanes of row `r` of four.
#[inline(always)]
const fn row_lanes(r: usize) -> u16 {
    0xf << (4 * r)
}

/// The first word of each of the four blocks of each row, as a float.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn first_halves<const WORDS: usize, const BYTES: usize>(rows: [&[u8; BYTES]; 4]) -> __m512 {
    let index = words(&const { first_words(WORDS) });
    let mut z = index;
    for r in 0..4 {
        let ((first, last), lanes) = (ends(rows[r]), u32::from(row_lanes(r)));
        z = if 3 * WORDS < 32 {
            // All four lie in the first load, which is a third of the work.
            _mm512_mask_permutexvar_epi16(z, lanes, index, first)
        } else {
            // Lanes of other rows stay what they are: indices, or already words.
            _mm512_mask2_permutex2var_epi16(first, z, lanes, last)
        };
    }
    _mm512_cvtph_ps(_mm512_castsi512_si256(z))
}

/// Scales and minima from double words that hold one of each.
#[inline]
#[target_feature(enable = "avx512f")]
fn pairs(z: __m512i) -> Scales {
    let halves = |z| _mm512_cvtph_ps(_mm512_cvtepi32_epi16(z));
    Scales { scale: halves(z), min: halves(_mm512_srli_epi32(z, 16)) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn nibbles(q: __m512i) -> Four {
    Four { low: low_nibbles(q), high: high_nibbles(q) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn q4_0(b: &[u8; 72]) -> Four {
    const QUANTS: [u16; 32] = nibble_words(9, 1);
    let (first, last) = ends(b);
    // The last block's are the last 16 bytes; the others lie in the first load.
    nibbles(_mm512_mask_permutexvar_epi16(last, 0x00ff_ffff, words(&QUANTS), first))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn q4_0_scales(rows: [&[u8; 72]; 4]) -> Scales {
    Scales::without_min(first_halves::<9, 72>(rows))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn iq4_nl(b: &[u8; 72]) -> Four {
    let four = q4_0(b);
    Four { low: iq4_values(four.low), high: iq4_values(four.high) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn iq4_values(nibbles: __m512i) -> __m512i {
    _mm512_shuffle_epi8(_mm512_broadcast_i32x4(load16(&IQ4_VALUES)), nibbles)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn q4_1(b: &[u8; 80]) -> Four {
    const QUANTS: [i32; 16] = nibble_dwords(5, 1);
    let (first, last) = ends(b);
    nibbles(_mm512_permutex2var_epi32(first, lanes(&QUANTS), last))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn q4_1_scales(rows: [&[u8; 80]; 4]) -> Scales {
    /// The first double word of each block lies in the first 64 bytes; those of two rows, twice.
    const FIRST: [i32; 16] = {
        let mut index = [0; 16];
        let mut i = 0;
        while i < 16 {
            index[i] = (i % 4 * 5 + i / 4 % 2 * 16) as i32;
            i += 1;
        }
        index
    };
    let two = |a: &[u8; 80], b: &[u8; 80]| {
        _mm512_permutex2var_epi32(load64(part::<0, 64>(a)), lanes(&FIRST), load64(part::<0, 64>(b)))
    };
    pairs(_mm512_mask_blend_epi64(0xf0, two(rows[0], rows[1]), two(rows[2], rows[3])))
}

/// Adds the fifth bits: the words of `bits` are the low halves of the four `qh`, then the high ones.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn fifth_bits(q: __m512i, bits: __m512i) -> Four {
    let bits = _mm512_castsi512_si128(bits);
    let (low, high) = (_mm_cvtsi128_si64(bits), _mm_extract_epi64::<1>(bits));
    let sixteen = _mm512_set1_epi8(16);
    let Four { low: q_low, high: q_high } = nibbles(q);
    Four {
        low: _mm512_mask_add_epi8(q_low, low as u64, q_low, sixteen),
        high: _mm512_mask_add_epi8(q_high, high as u64, q_high, sixteen),
    }
}

/// Words `at` of four blocks and then words `at + 1`.
const fn bit_words(block: usize, at: usize) -> [u16; 32] {
    let mut index = [0; 32];
    let mut i = 0;
    while i < 8 {
        index[i] = place(block, i % 4 * block + at + i / 4);
        i += 1;
    }
    index
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn q5_0(b: &[u8; 88]) -> Four {
    const QUANTS: [u16; 32] = nibble_words(11, 3);
    const BITS: [u16; 32] = bit_words(11, 1);
    let (first, last) = ends(b);
    let pick = |index| _mm512_permutex2var_epi16(first, words(index), last);
    fifth_bits(pick(&QUANTS), pick(&BITS))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn q5_0_scales(rows: [&[u8; 88]; 4]) -> Scales {
    Scales::without_min(first_halves::<11, 88>(rows))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn q5_1(b: &[u8; 96]) -> Four {
    const QUANTS: [i32; 16] = nibble_dwords(6, 2);
    const BITS: [u16; 32] = bit_words(12, 2);
    let (first, last) = ends(b);
    let quants = _mm512_permutex2var_epi32(first, lanes(&QUANTS), last);
    fifth_bits(quants, _mm512_permutex2var_epi16(first, words(&BITS), last))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn q5_1_scales(rows: [&[u8; 96]; 4]) -> Scales {
    let first =
        |b: &[u8; 96], block: usize| i32::from_le_bytes(*b[24 * block..].first_chunk().expect("a block"));
    let row = |b: &[u8; 96]| _mm_setr_epi32(first(b, 0), first(b, 1), first(b, 2), first(b, 3));
    let two = |a, b| _mm256_inserti128_si256(_mm256_castsi128_si256(row(a)), row(b), 1);
    let low = _mm512_castsi256_si512(two(rows[0], rows[1]));
    pairs(_mm512_inserti64x4(low, two(rows[2], rows[3]), 1))
}

/// Four blocks of Q8_0 in the order of the row, 128 greater than the file has them.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn q8_0_in_order(b: &[u8; 136]) -> [__m512i; 2] {
    // The second block's half from two bytes on: a masked load instead of a shuffle.
    let two = |first: &[u8; 64], second: &[u8; 64]| {
        // SAFETY: 64 readable bytes; the load has no alignment.
        let q = unsafe { _mm512_mask_loadu_epi64(load64(first), 0xf0, second.as_ptr().cast()) };
        _mm512_xor_si512(q, _mm512_set1_epi8(-128))
    };
    [two(part::<2, 64>(b), part::<4, 64>(b)), two(part::<70, 64>(b), part::<72, 64>(b))]
}

/// Four blocks of Q8_0.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn q8_0(b: &[u8; 136]) -> Four {
    let [low, high] = halves_of_four(q8_0_in_order(b));
    Four { low, high }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn q8_0_scales(rows: [&[u8; 136]; 4]) -> Scales {
    /// Scales are words 0, 17, 34 and 51.
    const FIRST: [u16; 32] = {
        let mut index = [0; 32];
        let mut i = 0;
        while i < 32 {
            index[i] = 17 * (i % 4) as u16;
            i += 1;
        }
        index
    };
    let mut z = words(&FIRST);
    for r in 0..4 {
        let (z0, z1) = (load64(part::<0, 64>(rows[r])), load64(part::<64, 64>(rows[r])));
        z = _mm512_mask2_permutex2var_epi16(z0, z, u32::from(row_lanes(r)), z1);
    }
    Scales::without_min(_mm512_cvtph_ps(_mm512_castsi512_si256(z)))
}

/// 16 unsigned bytes as floats.
#[inline]
#[target_feature(enable = "avx512f")]
fn floats(bytes: __m128i) -> __m512 {
    _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes))
}

/// The first halves of four runs of 32 bytes, and the second ones.
#[inline]
#[target_feature(enable = "avx512f")]
fn halves_of_four([a, b]: [__m512i; 2]) -> [__m512i; 2] {
    [_mm512_shuffle_i64x2::<0b10_00_10_00>(a, b), _mm512_shuffle_i64x2::<0b11_01_11_01>(a, b)]
}

/// Q4_K: the first halves of groups 0, 2, 4 and 6, their second halves, and the same of the odd groups.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn q4_k(b: &[u8; 144]) -> Super {
    let [z0, z1] = halves_of_four([load64(part::<16, 64>(b)), load64(part::<80, 64>(b))]);
    [low_nibbles(z0), low_nibbles(z1), high_nibbles(z0), high_nibbles(z1)]
}

/// Scales and minima of Q4_K and Q5_K, which begin alike.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn k4_scales<const BYTES: usize>([a, b]: [&[u8; BYTES]; 2]) -> Scales {
    const FIRST: [i32; 16] = two_halves(0, 2);
    const SECOND: [i32; 16] = two_halves(1, 3);
    // Four double words of each row: d and dmin as halves, then three with the low six bits of what belongs to groups 0 to
    // 3 and the low four of the others', whose upper two bits are at the top of the bytes before.
    let heads = _mm256_inserti128_si256::<1>(
        _mm256_castsi128_si256(load16(part::<0, 16>(a))),
        load16(part::<0, 16>(b)),
    );
    let four = |first, second| _mm256_setr_epi32(first, second, first, second, first, second, first, second);
    let low = _mm256_shuffle_epi32::<0b11_10_11_01>(heads);
    let low = _mm256_srlv_epi32(low, _mm256_setr_epi32(0, 0, 0, 4, 0, 0, 0, 4));
    let high = _mm256_srli_epi32::<2>(_mm256_shuffle_epi32::<0b10_10_01_01>(heads));
    let groups = _mm256_or_si256(
        _mm256_and_si256(low, four(0x3f3f_3f3f, 0x0f0f_0f0f)),
        _mm256_and_si256(high, four(0, 0x3030_3030)),
    );
    // Scales of both rows, then their minima.
    let groups = _mm256_permute4x64_epi64::<0b11_01_10_00>(groups);
    // `d, -dmin` of each row.
    let d = _mm256_permutevar8x32_epi32(heads, _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4));
    let d = _mm_cvtph_ps(_mm_xor_si128(_mm256_castsi256_si128(d), _mm_set1_epi32(i32::MIN)));
    let d = _mm512_castps128_ps512(d);
    Scales {
        scale: _mm512_mul_ps(floats(_mm256_castsi256_si128(groups)), _mm512_permutexvar_ps(lanes(&FIRST), d)),
        min: _mm512_mul_ps(
            floats(_mm256_extracti128_si256::<1>(groups)),
            _mm512_permutexvar_ps(lanes(&SECOND), d),
        ),
    }
}

/// `low` in the lower eight lanes, `high` in the upper ones.
const fn two_halves(low: i32, high: i32) -> [i32; 16] {
    let mut index = [low; 16];
    let mut i = 8;
    while i < 16 {
        index[i] = high;
        i += 1;
    }
    index
}

/// Q5_K in the order of Q4_K.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn q5_k(b: &[u8; 176]) -> Super {
    let [z0, z1] = halves_of_four([load64(part::<48, 64>(b)), load64(part::<112, 64>(b))]);
    let bits = |half: &[u8; 16]| _mm512_broadcast_i32x4(load16(half));
    let (bits0, bits1) = (bits(part::<16, 16>(b)), bits(part::<32, 16>(b)));
    // Bit `g` of byte `i` is the fifth bit of weight `i` of group `g`.
    const BIT: i64 = 0x0101_0101_0101_0101;
    let even = _mm512_setr_epi64(BIT, BIT, BIT << 2, BIT << 2, BIT << 4, BIT << 4, BIT << 6, BIT << 6);
    let odd = _mm512_slli_epi64(even, 1);
    let fifth = |q, bits, groups| {
        _mm512_mask_add_epi8(q, _mm512_test_epi8_mask(bits, groups), q, _mm512_set1_epi8(16))
    };
    [
        fifth(low_nibbles(z0), bits0, even),
        fifth(low_nibbles(z1), bits1, even),
        fifth(high_nibbles(z0), bits0, odd),
        fifth(high_nibbles(z1), bits1, odd),
    ]
}

/// Q6_K in the order of the row.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn q6_k(b: &[u8; 210]) -> Super {
    let half_block = |low: &[u8; 64], high: &[u8; 32]| {
        let (low, high) = (load64(low), _mm512_broadcast_i64x4(load32(high)));
        // The two bits of each weight to their place, between bits of others.
        let first = _mm512_sllv_epi16(high, per_half(4, 2));
        let second = _mm512_srlv_epi16(high, per_half(0, 2));
        let join = |nibbles, top| _mm512_or_si512(nibbles, _mm512_and_si512(top, _mm512_set1_epi8(0x30)));
        (join(low_nibbles(low), first), join(high_nibbles(low), second))
    };
    let (q0, q1) = half_block(part::<0, 64>(b), part::<128, 32>(b));
    let (q2, q3) = half_block(part::<64, 64>(b), part::<160, 32>(b));
    [q0, q1, q2, q3]
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn q6_k_scales([b]: [&[u8; 210]; 1]) -> Scales {
    let scale = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load16(part::<192, 16>(b))));
    Scales::without_min(_mm512_mul_ps(scale, everywhere(word::<208>(b))))
}

/// `low` in the words of the lower half, `high` in those of the upper one.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn per_half(low: i16, high: i16) -> __m512i {
    _mm512_inserti64x4(_mm512_set1_epi16(low), _mm256_set1_epi16(high), 1)
}

/// The four pairs of bits in 64 bytes, in the order of the row.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn crumbs(b: &[u8; 64]) -> [__m512i; 4] {
    let low = _mm512_broadcast_i64x4(load32(part::<0, 32>(b)));
    let high = _mm512_broadcast_i64x4(load32(part::<32, 32>(b)));
    let two_bits = |bytes, shift| _mm512_and_si512(_mm512_srlv_epi16(bytes, shift), _mm512_set1_epi8(3));
    let (first, second) = (per_half(0, 2), per_half(4, 6));
    [two_bits(low, first), two_bits(low, second), two_bits(high, first), two_bits(high, second)]
}

/// Q2_K in the order of the row.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn q2_k(b: &[u8; 84]) -> Super {
    crumbs(part::<16, 64>(b))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn q2_k_scales([b]: [&[u8; 84]; 1]) -> Scales {
    let (packed, nibble) = (load16(part::<0, 16>(b)), _mm_set1_epi8(0x0f));
    let (scales, mins) = (_mm_and_si128(packed, nibble), _mm_and_si128(_mm_srli_epi16(packed, 4), nibble));
    Scales {
        scale: _mm512_mul_ps(floats(scales), everywhere(word::<80>(b))),
        min: _mm512_mul_ps(floats(mins), everywhere(word::<82>(b) ^ 0x8000)),
    }
}

/// Q3_K in the order of the row.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn q3_k(b: &[u8; 110]) -> Super {
    let bits = _mm512_broadcast_i64x4(load32(part::<0, 32>(b)));
    const BIT: i64 = 0x0101_0101_0101_0101;
    let third = |q, low: i64, high: i64| {
        let select = _mm512_set_epi64(high, high, high, high, low, low, low, low);
        _mm512_mask_add_epi8(q, _mm512_test_epi8_mask(bits, select), q, _mm512_set1_epi8(4))
    };
    let q = crumbs(part::<32, 64>(b));
    [
        third(q[0], BIT, BIT << 1),
        third(q[1], BIT << 2, BIT << 3),
        third(q[2], BIT << 4, BIT << 5),
        third(q[3], BIT << 6, (0x80u64 * BIT as u64) as i64),
    ]
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn q3_k_scales([b]: [&[u8; 110]; 1]) -> Scales {
    let [s0, s1, s2, s3] = scales_q3_k(part::<96, 12>(b));
    let scale = _mm512_cvtepu8_epi32(_mm_setr_epi32(s0 as i32, s1 as i32, s2 as i32, s3 as i32));
    let scale = _mm512_cvtepi32_ps(_mm512_sub_epi32(scale, _mm512_set1_epi32(32)));
    Scales::without_min(_mm512_mul_ps(scale, everywhere(word::<108>(b))))
}

/// IQ4_XS in two runs of the order of [`Four`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn iq4_xs(b: &[u8; 136]) -> Super {
    let (z0, z1) = (load64(part::<8, 64>(b)), load64(part::<72, 64>(b)));
    [
        iq4_values(low_nibbles(z0)),
        iq4_values(high_nibbles(z0)),
        iq4_values(low_nibbles(z1)),
        iq4_values(high_nibbles(z1)),
    ]
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn iq4_xs_scales([a, b]: [&[u8; 136]; 2]) -> Scales {
    let both = |a, b| _mm512_inserti64x4(_mm512_set1_epi32(a), _mm256_set1_epi32(b), 1);
    let low_bits = |b| i32::from_le_bytes(*part::<4, 4>(b));
    let high_bits = |b| i32::from(word::<2>(b));
    let index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7);
    let low = _mm512_srlv_epi32(both(low_bits(a), low_bits(b)), _mm512_slli_epi32(index, 2));
    let high = _mm512_srlv_epi32(both(high_bits(a), high_bits(b)), _mm512_slli_epi32(index, 1));
    let high = _mm512_slli_epi32(_mm512_and_si512(high, _mm512_set1_epi32(3)), 4);
    let scale = _mm512_or_si512(_mm512_and_si512(low, _mm512_set1_epi32(15)), high);
    let scale = _mm512_cvtepi32_ps(_mm512_sub_epi32(scale, _mm512_set1_epi32(32)));
    let d = |b| _mm256_set1_epi16(word::<0>(b) as i16);
    let d = _mm512_cvtph_ps(_mm256_inserti128_si256(d(a), _mm256_castsi256_si128(d(b)), 1));
    Scales::without_min(_mm512_mul_ps(scale, d))
}
