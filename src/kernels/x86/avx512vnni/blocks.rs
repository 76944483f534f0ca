//! Weight blocks to registers: unsigned bytes, with the scale and minimum of each group.
//!
//! Types with blocks of 32 come four blocks at a time ([`Four`]), the K types and IQ4_XS a
//! superblock of 256 at a time ([`Super`]). The bytes stand in whatever order takes the fewest
//! instructions to unpack; `dot` brings the activations, which several rows share, into that order.

use std::arch::x86_64::*;

use crate::kernels::x86::{IQ4_VALUES, part, scales_mins_k4, scales_q3_k, word};

/// Four blocks A, B, C, D of 32 weights.
///
/// `low` holds the first halves `A0..16 B0..16 C0..16 D0..16`, `high` the second halves, so a lane of
/// four bytes belongs to block `lane / 4` in both; `scale` and `min` have the block's value in each
/// of its lanes.
pub(super) struct Four {
    pub low: __m512i,
    pub high: __m512i,
    pub scale: __m512,
    pub min: __m512,
}

/// 256 weights. `q` in the type's order, scales and minima of groups of 32 in the lower 8 lanes or of
/// groups of 16 in all 16.
pub(super) struct Super {
    pub q: [__m512i; 4],
    pub scale: __m512,
    pub min: __m512,
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

#[inline]
#[target_feature(enable = "avx512f")]
fn half(bits: u16) -> f32 {
    _mm_cvtss_f32(_mm512_castps512_ps128(_mm512_cvtph_ps(_mm256_set1_epi16(bits as i16))))
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

/// Word `at` of each of four blocks, four times each (the upper half of the result is unused).
const fn spread_word(block: usize, at: usize) -> [u16; 32] {
    let mut index = [0; 32];
    let mut i = 0;
    while i < 16 {
        index[i] = place(block, i / 4 * block + at);
        i += 1;
    }
    index
}

/// Four blocks of `BLOCK` words each, as two overlapping loads.
struct Blocks4<const WORDS: usize>(__m512i, __m512i);

impl<const WORDS: usize> Blocks4<WORDS> {
    const SPREAD0: [u16; 32] = spread_word(WORDS, 0);
    const SPREAD1: [u16; 32] = spread_word(WORDS, 1);

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn load(b: &[u8]) -> Self {
        let tail = b.len() - 64;
        Self(load64(part::<0, 64>(b)), load64(b[tail..].first_chunk().expect("64 bytes from the end")))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn pick(&self, index: &[u16; 32]) -> __m512i {
        _mm512_permutex2var_epi16(self.0, words(index), self.1)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn halves(&self, index: &[u16; 32]) -> __m512 {
        _mm512_cvtph_ps(_mm512_castsi512_si256(self.pick(index)))
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn q4_0(b: &[u8; 72]) -> Four {
    const QUANTS: [u16; 32] = nibble_words(9, 1);
    let blocks = Blocks4::<9>::load(b);
    let q = blocks.pick(&QUANTS);
    let scale = blocks.halves(&Blocks4::<9>::SPREAD0);
    Four { low: low_nibbles(q), high: high_nibbles(q), scale, min: _mm512_setzero_ps() }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn iq4_nl(b: &[u8; 72]) -> Four {
    let four = q4_0(b);
    Four { low: iq4_values(four.low), high: iq4_values(four.high), ..four }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn iq4_values(nibbles: __m512i) -> __m512i {
    _mm512_shuffle_epi8(_mm512_broadcast_i32x4(load16(&IQ4_VALUES)), nibbles)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn q4_1(b: &[u8; 80]) -> Four {
    const QUANTS: [u16; 32] = nibble_words(10, 2);
    let blocks = Blocks4::<10>::load(b);
    let q = blocks.pick(&QUANTS);
    Four {
        low: low_nibbles(q),
        high: high_nibbles(q),
        scale: blocks.halves(&Blocks4::<10>::SPREAD0),
        min: blocks.halves(&Blocks4::<10>::SPREAD1),
    }
}

/// Adds the fifth bits: the words of `bits` are the low halves of the four `qh`, then the high ones.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn fifth_bits(q: __m512i, bits: __m512i) -> (__m512i, __m512i) {
    let bits = _mm512_castsi512_si128(bits);
    let (low, high) = (_mm_cvtsi128_si64(bits), _mm_extract_epi64::<1>(bits));
    let sixteen = _mm512_set1_epi8(16);
    let (q_low, q_high) = (low_nibbles(q), high_nibbles(q));
    (
        _mm512_mask_add_epi8(q_low, low as u64, q_low, sixteen),
        _mm512_mask_add_epi8(q_high, high as u64, q_high, sixteen),
    )
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
    let blocks = Blocks4::<11>::load(b);
    let (low, high) = fifth_bits(blocks.pick(&QUANTS), blocks.pick(&BITS));
    Four { low, high, scale: blocks.halves(&Blocks4::<11>::SPREAD0), min: _mm512_setzero_ps() }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn q5_1(b: &[u8; 96]) -> Four {
    const QUANTS: [u16; 32] = nibble_words(12, 4);
    const BITS: [u16; 32] = bit_words(12, 2);
    let blocks = Blocks4::<12>::load(b);
    let (low, high) = fifth_bits(blocks.pick(&QUANTS), blocks.pick(&BITS));
    Four {
        low,
        high,
        scale: blocks.halves(&Blocks4::<12>::SPREAD0),
        min: blocks.halves(&Blocks4::<12>::SPREAD1),
    }
}

/// Four blocks of Q8_0 in the order of the row, 128 greater than the file has them, and their scales
/// in each of the block's lanes.
pub(super) struct Q8 {
    pub q: [__m512i; 2],
    pub scale: [__m512; 2],
}

/// Word `17 * i` is the scale of block `i`: those of `first` and the one behind, eight times each.
const fn q8_scales(first: u16) -> [u16; 32] {
    let mut index = [0; 32];
    let mut i = 0;
    while i < 16 {
        index[i] = 17 * (first + i as u16 / 8);
        i += 1;
    }
    index
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn q8_0(b: &[u8; 136]) -> Q8 {
    const SCALES: [[u16; 32]; 2] = [q8_scales(0), q8_scales(2)];
    let (z0, z1) = (load64(part::<0, 64>(b)), load64(part::<64, 64>(b)));
    let scale = |i: usize| {
        let halves = _mm512_permutex2var_epi16(z0, words(&SCALES[i]), z1);
        _mm512_cvtph_ps(_mm512_castsi512_si256(halves))
    };
    // The second block's half from two bytes on: a masked load instead of a shuffle.
    let two = |first: &[u8; 64], second: &[u8; 64]| {
        // SAFETY: 64 readable bytes; the load has no alignment.
        let q = unsafe { _mm512_mask_loadu_epi64(load64(first), 0xf0, second.as_ptr().cast()) };
        _mm512_xor_si512(q, _mm512_set1_epi8(-128))
    };
    Q8 {
        q: [two(part::<2, 64>(b), part::<4, 64>(b)), two(part::<70, 64>(b), part::<72, 64>(b))],
        scale: [scale(0), scale(1)],
    }
}

/// Eight unsigned bytes as floats in the lower lanes.
#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
fn floats8(bytes: u64) -> __m512 {
    _mm512_cvtepi32_ps(_mm512_zextsi256_si512(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bytes as i64))))
}

/// Q4_K in the order of its bytes: groups 0 2, 1 3, 4 6, 5 7.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn q4_k(b: &[u8; 144]) -> Super {
    let (z0, z1) = (load64(part::<16, 64>(b)), load64(part::<80, 64>(b)));
    let (scale, min) = scales_k4(b);
    Super { q: [low_nibbles(z0), high_nibbles(z0), low_nibbles(z1), high_nibbles(z1)], scale, min }
}

/// Scales and minima of Q4_K and Q5_K, which begin alike.
#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
fn scales_k4(b: &[u8]) -> (__m512, __m512) {
    let (scales, mins) = scales_mins_k4(part::<4, 12>(b));
    let (d, dmin) = (half(word::<0>(b)), half(word::<2>(b)));
    (_mm512_mul_ps(floats8(scales), _mm512_set1_ps(d)), _mm512_mul_ps(floats8(mins), _mm512_set1_ps(-dmin)))
}

/// Q5_K in the order of Q4_K.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn q5_k(b: &[u8; 176]) -> Super {
    let (z0, z1) = (load64(part::<48, 64>(b)), load64(part::<112, 64>(b)));
    let bits = _mm512_broadcast_i64x4(load32(part::<16, 32>(b)));
    // Bit `g` of byte `i` is the fifth bit of weight `i` of group `g`.
    let fifth = |q, mask: i64, mask2: i64| {
        let select = _mm512_set_epi64(mask2, mask2, mask2, mask2, mask, mask, mask, mask);
        _mm512_mask_add_epi8(q, _mm512_test_epi8_mask(bits, select), q, _mm512_set1_epi8(16))
    };
    const BIT: i64 = 0x0101_0101_0101_0101;
    let (scale, min) = scales_k4(b);
    Super {
        q: [
            fifth(low_nibbles(z0), BIT, BIT << 2),
            fifth(high_nibbles(z0), BIT << 1, BIT << 3),
            fifth(low_nibbles(z1), BIT << 4, BIT << 6),
            fifth(high_nibbles(z1), BIT << 5, (0x80u64 * BIT as u64) as i64),
        ],
        scale,
        min,
    }
}

/// Two bits of each of 32 bytes, shifted by `low` in the lower half and `high` in the upper one.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn two_bits(bytes: __m512i, low: i16, high: i16) -> __m512i {
    let shift = _mm512_inserti64x4(_mm512_set1_epi16(low), _mm256_set1_epi16(high), 1);
    _mm512_and_si512(_mm512_srlv_epi16(bytes, shift), _mm512_set1_epi8(3))
}

/// Q6_K in the order of the row.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn q6_k(b: &[u8; 210]) -> Super {
    let half_block = |low: &[u8; 64], high: &[u8; 32]| {
        let (low, high) = (load64(low), _mm512_broadcast_i64x4(load32(high)));
        let top = |l, h| _mm512_slli_epi16(two_bits(high, l, h), 4);
        (_mm512_or_si512(low_nibbles(low), top(0, 2)), _mm512_or_si512(high_nibbles(low), top(4, 6)))
    };
    let (q0, q1) = half_block(part::<0, 64>(b), part::<128, 32>(b));
    let (q2, q3) = half_block(part::<64, 64>(b), part::<160, 32>(b));
    let d = _mm512_set1_ps(half(word::<208>(b)));
    let scale = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load16(part::<192, 16>(b))));
    Super { q: [q0, q1, q2, q3], scale: _mm512_mul_ps(scale, d), min: _mm512_setzero_ps() }
}

/// The four pairs of bits in 64 bytes, in the order of the row.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn crumbs(b: &[u8; 64]) -> [__m512i; 4] {
    let low = _mm512_broadcast_i64x4(load32(part::<0, 32>(b)));
    let high = _mm512_broadcast_i64x4(load32(part::<32, 32>(b)));
    [two_bits(low, 0, 2), two_bits(low, 4, 6), two_bits(high, 0, 2), two_bits(high, 4, 6)]
}

/// Q2_K in the order of the row.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn q2_k(b: &[u8; 84]) -> Super {
    let packed = load16(part::<0, 16>(b));
    let nibble = _mm_set1_epi8(0x0f);
    let floats =
        |bytes, by| _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)), _mm512_set1_ps(by));
    Super {
        q: crumbs(part::<16, 64>(b)),
        scale: floats(_mm_and_si128(packed, nibble), half(word::<80>(b))),
        min: floats(_mm_and_si128(_mm_srli_epi16(packed, 4), nibble), -half(word::<82>(b))),
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
    let [s0, s1, s2, s3] = scales_q3_k(part::<96, 12>(b));
    let scale = _mm_setr_epi32(s0 as i32, s1 as i32, s2 as i32, s3 as i32);
    let scale = _mm512_cvtepu8_epi32(scale);
    let scale = _mm512_sub_epi32(scale, _mm512_set1_epi32(32));
    let d = _mm512_set1_ps(half(word::<108>(b)));
    Super {
        q: [
            third(q[0], BIT, BIT << 1),
            third(q[1], BIT << 2, BIT << 3),
            third(q[2], BIT << 4, BIT << 5),
            third(q[3], BIT << 6, (0x80u64 * BIT as u64) as i64),
        ],
        scale: _mm512_mul_ps(_mm512_cvtepi32_ps(scale), d),
        min: _mm512_setzero_ps(),
    }
}

/// IQ4_XS in two runs of the order of [`Four`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn iq4_xs(b: &[u8; 136]) -> Super {
    let (z0, z1) = (load64(part::<8, 64>(b)), load64(part::<72, 64>(b)));
    let low = _mm256_set1_epi32(i32::from_le_bytes(*part::<4, 4>(b)));
    let high = _mm256_set1_epi32(i32::from(word::<2>(b)));
    let low = _mm256_srlv_epi32(low, _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
    let high = _mm256_srlv_epi32(high, _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14));
    let high = _mm256_slli_epi32(_mm256_and_si256(high, _mm256_set1_epi32(3)), 4);
    let scale = _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi32(15)), high);
    let scale = _mm256_cvtepi32_ps(_mm256_sub_epi32(scale, _mm256_set1_epi32(32)));
    let scale = _mm256_mul_ps(scale, _mm256_set1_ps(half(word::<0>(b))));
    Super {
        q: [
            iq4_values(low_nibbles(z0)),
            iq4_values(high_nibbles(z0)),
            iq4_values(low_nibbles(z1)),
            iq4_values(high_nibbles(z1)),
        ],
        scale: _mm512_zextps256_ps512(scale),
        min: _mm512_setzero_ps(),
    }
}
