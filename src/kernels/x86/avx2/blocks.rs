//! Weight blocks to registers: bytes, with the scale and minimum of each group.
//!
//! The structure is that of `avx512vnni`, in registers of 32 bytes: types with blocks of 32 come four
//! blocks at a time ([`Four`], Q8_0 as [`Bytes4`]), the K types and IQ4_XS a superblock of 256 at a time
//! ([`Super`]). The bytes are unsigned, zero point and all, for types of up to 6 bits; those of 8 bits
//! (Q8_0, IQ4) are signed, as the sign trick of `dot` wants them.

use std::arch::x86_64::*;

use crate::kernels::x86::{part, scales_mins_k4, scales_q3_k, word};
use crate::quant::IQ4_KVALUES;

/// Four blocks A, B, C, D of 32 weights: `low` holds the first halves `A0..16 B0..16` and
/// `C0..16 D0..16`, `high` the second halves; `scale` and `min` a lane a block.
pub(in crate::kernels::x86) struct Four {
    pub low: [__m256i; 2],
    pub high: [__m256i; 2],
    pub scale: __m128,
    pub min: __m128,
}

/// Four blocks of 32 weights, each in a register of its own.
pub(in crate::kernels::x86) struct Bytes4 {
    pub q: [__m256i; 4],
    pub scale: __m128,
}

/// 256 weights; scales and minima of groups of 32 in the first eight lanes, of 16 in all sixteen.
pub(in crate::kernels::x86) struct Super {
    pub q: [__m256i; 8],
    pub scale: [__m256; 2],
    pub min: [__m256; 2],
}

#[inline]
#[target_feature(enable = "avx")]
fn load32(b: &[u8; 32]) -> __m256i {
    // SAFETY: 32 readable bytes; the load has no alignment.
    unsafe { _mm256_loadu_si256(b.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "sse2")]
fn load16(b: &[u8; 16]) -> __m128i {
    // SAFETY: 16 readable bytes; the load has no alignment.
    unsafe { _mm_loadu_si128(b.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "sse2")]
fn load8(b: &[u8; 8]) -> __m128i {
    _mm_cvtsi64_si128(i64::from_le_bytes(*b))
}

#[inline]
#[target_feature(enable = "f16c")]
fn half(bits: u16) -> f32 {
    _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits))))
}

#[inline]
#[target_feature(enable = "f16c")]
fn halves(a: u16, b: u16, c: u16, d: u16) -> __m128 {
    let bits = u64::from(a) | u64::from(b) << 16 | u64::from(c) << 32 | u64::from(d) << 48;
    _mm_cvtph_ps(_mm_cvtsi64_si128(bits as i64))
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

#[inline]
#[target_feature(enable = "avx2")]
fn nibbles4(ab: __m256i, cd: __m256i, scale: __m128, min: __m128) -> Four {
    Four { low: [low_nibbles(ab), low_nibbles(cd)], high: [high_nibbles(ab), high_nibbles(cd)], scale, min }
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(in crate::kernels::x86) fn q4_0(b: &[u8; 72]) -> Four {
    let scale = halves(word::<0>(b), word::<18>(b), word::<36>(b), word::<54>(b));
    let ab = two(part::<2, 16>(b), part::<20, 16>(b));
    let cd = two(part::<38, 16>(b), part::<56, 16>(b));
    nibbles4(ab, cd, scale, _mm_setzero_ps())
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
#[target_feature(enable = "avx2,f16c")]
pub(in crate::kernels::x86) fn iq4_nl(b: &[u8; 72]) -> Four {
    let Four { low, high, scale, min } = q4_0(b);
    Four {
        low: [iq4_values(low[0]), iq4_values(low[1])],
        high: [iq4_values(high[0]), iq4_values(high[1])],
        scale,
        min,
    }
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(in crate::kernels::x86) fn q4_1(b: &[u8; 80]) -> Four {
    let scale = halves(word::<0>(b), word::<20>(b), word::<40>(b), word::<60>(b));
    let min = halves(word::<2>(b), word::<22>(b), word::<42>(b), word::<62>(b));
    let ab = two(part::<4, 16>(b), part::<24, 16>(b));
    let cd = two(part::<44, 16>(b), part::<64, 16>(b));
    nibbles4(ab, cd, scale, min)
}

/// Adds the fifth bits of two blocks, bit `i` of `a` and of `b` for weight `i`.
#[inline]
#[target_feature(enable = "avx2")]
fn fifth_bits(low: &mut __m256i, high: &mut __m256i, a: &[u8; 4], b: &[u8; 4]) {
    // Each byte of the bits eight times, of which the mask keeps a bit each.
    let bits = _mm256_setr_epi32(i32::from_le_bytes(*a), 0, 0, 0, i32::from_le_bytes(*b), 0, 0, 0);
    let mask = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
    let set = |bytes: [i64; 2]| {
        let index = _mm256_setr_epi64x(bytes[0], bytes[1], bytes[0], bytes[1]);
        let bit = _mm256_and_si256(_mm256_shuffle_epi8(bits, index), mask);
        _mm256_and_si256(_mm256_cmpeq_epi8(bit, mask), _mm256_set1_epi8(16))
    };
    const BYTE: i64 = 0x0101_0101_0101_0101;
    *low = _mm256_or_si256(*low, set([0, BYTE]));
    *high = _mm256_or_si256(*high, set([2 * BYTE, 3 * BYTE]));
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(in crate::kernels::x86) fn q5_0(b: &[u8; 88]) -> Four {
    let scale = halves(word::<0>(b), word::<22>(b), word::<44>(b), word::<66>(b));
    let ab = two(part::<6, 16>(b), part::<28, 16>(b));
    let cd = two(part::<50, 16>(b), part::<72, 16>(b));
    let mut four = nibbles4(ab, cd, scale, _mm_setzero_ps());
    fifth_bits(&mut four.low[0], &mut four.high[0], part::<2, 4>(b), part::<24, 4>(b));
    fifth_bits(&mut four.low[1], &mut four.high[1], part::<46, 4>(b), part::<68, 4>(b));
    four
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(in crate::kernels::x86) fn q5_1(b: &[u8; 96]) -> Four {
    let scale = halves(word::<0>(b), word::<24>(b), word::<48>(b), word::<72>(b));
    let min = halves(word::<2>(b), word::<26>(b), word::<50>(b), word::<74>(b));
    let ab = two(part::<8, 16>(b), part::<32, 16>(b));
    let cd = two(part::<56, 16>(b), part::<80, 16>(b));
    let mut four = nibbles4(ab, cd, scale, min);
    fifth_bits(&mut four.low[0], &mut four.high[0], part::<4, 4>(b), part::<28, 4>(b));
    fifth_bits(&mut four.low[1], &mut four.high[1], part::<52, 4>(b), part::<76, 4>(b));
    four
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(in crate::kernels::x86) fn q8_0(b: &[u8; 136]) -> Bytes4 {
    Bytes4 {
        q: [
            load32(part::<2, 32>(b)),
            load32(part::<36, 32>(b)),
            load32(part::<70, 32>(b)),
            load32(part::<104, 32>(b)),
        ],
        scale: halves(word::<0>(b), word::<34>(b), word::<68>(b), word::<102>(b)),
    }
}

/// Eight unsigned bytes as floats, times `by`.
#[inline]
#[target_feature(enable = "avx2")]
fn floats8(bytes: __m128i, by: f32) -> __m256 {
    _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)), _mm256_set1_ps(by))
}

/// Scales and minima of Q4_K and Q5_K, which begin alike.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn scales_k4(b: &[u8]) -> ([__m256; 2], [__m256; 2]) {
    let (scales, mins) = scales_mins_k4(part::<4, 12>(b));
    let (d, dmin) = (half(word::<0>(b)), half(word::<2>(b)));
    let zero = _mm256_setzero_ps();
    (
        [floats8(_mm_cvtsi64_si128(scales as i64), d), zero],
        [floats8(_mm_cvtsi64_si128(mins as i64), -dmin), zero],
    )
}

/// Q4_K in the order of the row, as all that follow but IQ4_XS.
#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(in crate::kernels::x86) fn q4_k(b: &[u8; 144]) -> Super {
    let (y0, y1) = (load32(part::<16, 32>(b)), load32(part::<48, 32>(b)));
    let (y2, y3) = (load32(part::<80, 32>(b)), load32(part::<112, 32>(b)));
    let (scale, min) = scales_k4(b);
    Super {
        q: [
            low_nibbles(y0),
            high_nibbles(y0),
            low_nibbles(y1),
            high_nibbles(y1),
            low_nibbles(y2),
            high_nibbles(y2),
            low_nibbles(y3),
            high_nibbles(y3),
        ],
        scale,
        min,
    }
}

/// In each byte of `bits`, bit `FROM` moved to bit `TO`, the others 0.
#[inline]
#[target_feature(enable = "avx2")]
fn bit<const FROM: i32, const TO: i32>(bits: __m256i) -> __m256i {
    let (left, right) = (_mm_cvtsi32_si128((TO - FROM).max(0)), _mm_cvtsi32_si128((FROM - TO).max(0)));
    let moved = if TO > FROM { _mm256_sll_epi16(bits, left) } else { _mm256_srl_epi16(bits, right) };
    _mm256_and_si256(moved, _mm256_set1_epi8(1 << TO))
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(in crate::kernels::x86) fn q5_k(b: &[u8; 176]) -> Super {
    let bits = load32(part::<16, 32>(b)); // bit `g` of byte `i`: the fifth bit of weight `i` of group `g`
    let (y0, y1) = (load32(part::<48, 32>(b)), load32(part::<80, 32>(b)));
    let (y2, y3) = (load32(part::<112, 32>(b)), load32(part::<144, 32>(b)));
    let (scale, min) = scales_k4(b);
    Super {
        q: [
            _mm256_or_si256(low_nibbles(y0), bit::<0, 4>(bits)),
            _mm256_or_si256(high_nibbles(y0), bit::<1, 4>(bits)),
            _mm256_or_si256(low_nibbles(y1), bit::<2, 4>(bits)),
            _mm256_or_si256(high_nibbles(y1), bit::<3, 4>(bits)),
            _mm256_or_si256(low_nibbles(y2), bit::<4, 4>(bits)),
            _mm256_or_si256(high_nibbles(y2), bit::<5, 4>(bits)),
            _mm256_or_si256(low_nibbles(y3), bit::<6, 4>(bits)),
            _mm256_or_si256(high_nibbles(y3), bit::<7, 4>(bits)),
        ],
        scale,
        min,
    }
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(in crate::kernels::x86) fn q6_k(b: &[u8; 210]) -> Super {
    let half_block = |low: &[u8; 64], high: &[u8; 32]| {
        let (low0, low1) = (load32(part::<0, 32>(low)), load32(part::<32, 32>(low)));
        let high = load32(high);
        let top = |moved| _mm256_and_si256(moved, _mm256_set1_epi8(0x30));
        [
            _mm256_or_si256(low_nibbles(low0), top(_mm256_slli_epi16(high, 4))),
            _mm256_or_si256(low_nibbles(low1), top(_mm256_slli_epi16(high, 2))),
            _mm256_or_si256(high_nibbles(low0), top(high)),
            _mm256_or_si256(high_nibbles(low1), top(_mm256_srli_epi16(high, 2))),
        ]
    };
    let [q0, q1, q2, q3] = half_block(part::<0, 64>(b), part::<128, 32>(b));
    let [q4, q5, q6, q7] = half_block(part::<64, 64>(b), part::<160, 32>(b));
    let d = _mm256_set1_ps(half(word::<208>(b)));
    let floats = |b| _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load8(b))), d);
    Super {
        q: [q0, q1, q2, q3, q4, q5, q6, q7],
        scale: [floats(part::<192, 8>(b)), floats(part::<200, 8>(b))],
        min: [_mm256_setzero_ps(); 2],
    }
}

/// The four pairs of bits in each of 64 bytes, in the order of the row.
#[inline]
#[target_feature(enable = "avx2")]
fn crumbs(b: &[u8; 64]) -> [__m256i; 8] {
    let (y0, y1) = (load32(part::<0, 32>(b)), load32(part::<32, 32>(b)));
    let two = |moved| _mm256_and_si256(moved, _mm256_set1_epi8(3));
    [
        two(y0),
        two(_mm256_srli_epi16(y0, 2)),
        two(_mm256_srli_epi16(y0, 4)),
        two(_mm256_srli_epi16(y0, 6)),
        two(y1),
        two(_mm256_srli_epi16(y1, 2)),
        two(_mm256_srli_epi16(y1, 4)),
        two(_mm256_srli_epi16(y1, 6)),
    ]
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(in crate::kernels::x86) fn q2_k(b: &[u8; 84]) -> Super {
    let (d, dmin) = (half(word::<80>(b)), half(word::<82>(b)));
    let nibble = _mm_set1_epi8(0x0f);
    let floats = |b| {
        let packed = load8(b);
        (
            floats8(_mm_and_si128(packed, nibble), d),
            floats8(_mm_and_si128(_mm_srli_epi16(packed, 4), nibble), -dmin),
        )
    };
    let ((s0, m0), (s1, m1)) = (floats(part::<0, 8>(b)), floats(part::<8, 8>(b)));
    Super { q: crumbs(part::<16, 64>(b)), scale: [s0, s1], min: [m0, m1] }
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(in crate::kernels::x86) fn q3_k(b: &[u8; 110]) -> Super {
    let bits = load32(part::<0, 32>(b)); // bit `i` of byte `j`: the third bit of weight `32 i + j`
    let q = crumbs(part::<32, 64>(b));
    let [s0, s1, s2, s3] = scales_q3_k(part::<96, 12>(b));
    let pair =
        |first: u32, second: u32| _mm_cvtsi64_si128((u64::from(second) << 32 | u64::from(first)) as i64);
    let d = _mm256_set1_ps(half(word::<108>(b)));
    let floats = |b| {
        let scale = _mm256_sub_epi32(_mm256_cvtepu8_epi32(b), _mm256_set1_epi32(32));
        _mm256_mul_ps(_mm256_cvtepi32_ps(scale), d)
    };
    Super {
        q: [
            _mm256_or_si256(q[0], bit::<0, 2>(bits)),
            _mm256_or_si256(q[1], bit::<1, 2>(bits)),
            _mm256_or_si256(q[2], bit::<2, 2>(bits)),
            _mm256_or_si256(q[3], bit::<3, 2>(bits)),
            _mm256_or_si256(q[4], bit::<4, 2>(bits)),
            _mm256_or_si256(q[5], bit::<5, 2>(bits)),
            _mm256_or_si256(q[6], bit::<6, 2>(bits)),
            _mm256_or_si256(q[7], bit::<7, 2>(bits)),
        ],
        scale: [floats(pair(s0, s1)), floats(pair(s2, s3))],
        min: [_mm256_setzero_ps(); 2],
    }
}

/// IQ4_XS as pairs of registers, `low` and `high` of [`Four`] in turn.
#[inline]
#[target_feature(enable = "avx2,f16c")]
pub(in crate::kernels::x86) fn iq4_xs(b: &[u8; 136]) -> Super {
    let (y0, y1) = (load32(part::<8, 32>(b)), load32(part::<40, 32>(b)));
    let (y2, y3) = (load32(part::<72, 32>(b)), load32(part::<104, 32>(b)));
    let low = _mm256_set1_epi32(i32::from_le_bytes(*part::<4, 4>(b)));
    let high = _mm256_set1_epi32(i32::from(word::<2>(b)));
    let low = _mm256_srlv_epi32(low, _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
    let high = _mm256_srlv_epi32(high, _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14));
    let high = _mm256_slli_epi32(_mm256_and_si256(high, _mm256_set1_epi32(3)), 4);
    let scale = _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi32(15)), high);
    let scale = _mm256_cvtepi32_ps(_mm256_sub_epi32(scale, _mm256_set1_epi32(32)));
    Super {
        q: [
            iq4_values(low_nibbles(y0)),
            iq4_values(high_nibbles(y0)),
            iq4_values(low_nibbles(y1)),
            iq4_values(high_nibbles(y1)),
            iq4_values(low_nibbles(y2)),
            iq4_values(high_nibbles(y2)),
            iq4_values(low_nibbles(y3)),
            iq4_values(high_nibbles(y3)),
        ],
        scale: [_mm256_mul_ps(scale, _mm256_set1_ps(half(word::<0>(b)))), _mm256_setzero_ps()],
        min: [_mm256_setzero_ps(); 2],
    }
}
