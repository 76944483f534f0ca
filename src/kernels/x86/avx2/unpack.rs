//! The unpacking of rows for `gemm`, from the same block readers as `dot`.

#![allow(clippy::needless_range_loop)] // an iterator's closures and adapters would not be inlined

use std::arch::x86_64::*;

use super::blocks::{self, Piece, Two};
use crate::gguf::GgmlType;
use crate::kernels::x86::{part, scales_mins_k4, scales_q3_k, word};

/// Scales and minima of a superblock: of groups of 32 in the first eight lanes, of 16 in all sixteen.
struct Scales {
    scale: [__m256; 2],
    min: [__m256; 2],
}

impl Scales {
    #[inline]
    #[target_feature(enable = "avx")]
    fn without_min(scale: [__m256; 2]) -> Self {
        Self { scale, min: [_mm256_setzero_ps(); 2] }
    }
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

/// Eight unsigned bytes as floats, times `by`.
#[inline]
#[target_feature(enable = "avx2")]
fn floats8(bytes: __m128i, by: f32) -> __m256 {
    _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)), _mm256_set1_ps(by))
}

/// Scales and minima of Q4_K and Q5_K, which begin alike.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn scales_k4(b: &[u8]) -> Scales {
    let (scales, mins) = scales_mins_k4(part::<4, 12>(b));
    let (d, dmin) = (half(word::<0>(b)), half(word::<2>(b)));
    let zero = _mm256_setzero_ps();
    Scales {
        scale: [floats8(_mm_cvtsi64_si128(scales as i64), d), zero],
        min: [floats8(_mm_cvtsi64_si128(mins as i64), -dmin), zero],
    }
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn scales_q6_k(b: &[u8; 210]) -> Scales {
    let d = _mm256_set1_ps(half(word::<208>(b)));
    let floats = |b| _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load8(b))), d);
    Scales::without_min([floats(part::<192, 8>(b)), floats(part::<200, 8>(b))])
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn scales_q2_k(b: &[u8; 84]) -> Scales {
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
    Scales { scale: [s0, s1], min: [m0, m1] }
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn scales_of_q3_k(b: &[u8; 110]) -> Scales {
    let [s0, s1, s2, s3] = scales_q3_k(part::<96, 12>(b));
    let pair =
        |first: u32, second: u32| _mm_cvtsi64_si128((u64::from(second) << 32 | u64::from(first)) as i64);
    let d = _mm256_set1_ps(half(word::<108>(b)));
    let floats = |b| {
        let scale = _mm256_sub_epi32(_mm256_cvtepu8_epi32(b), _mm256_set1_epi32(32));
        _mm256_mul_ps(_mm256_cvtepi32_ps(scale), d)
    };
    Scales::without_min([floats(pair(s0, s1)), floats(pair(s2, s3))])
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn scales_iq4_xs(b: &[u8; 136]) -> Scales {
    let low = _mm256_set1_epi32(i32::from_le_bytes(*part::<4, 4>(b)));
    let high = _mm256_set1_epi32(i32::from(word::<2>(b)));
    let low = _mm256_srlv_epi32(low, _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
    let high = _mm256_srlv_epi32(high, _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14));
    let high = _mm256_slli_epi32(_mm256_and_si256(high, _mm256_set1_epi32(3)), 4);
    let scale = _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi32(15)), high);
    let scale = _mm256_cvtepi32_ps(_mm256_sub_epi32(scale, _mm256_set1_epi32(32)));
    Scales::without_min([_mm256_mul_ps(scale, _mm256_set1_ps(half(word::<0>(b)))), _mm256_setzero_ps()])
}

#[inline]
#[target_feature(enable = "avx")]
fn store32(q: &mut [u8], at: usize, y: __m256i) {
    let q: &mut [u8; 32] = q[at..].first_chunk_mut().expect("room for the block");
    // SAFETY: 32 writable bytes; the store has no alignment.
    unsafe { _mm256_storeu_si256(q.as_mut_ptr().cast(), y) };
}

#[inline]
#[target_feature(enable = "avx")]
fn store_floats(y: __m256) -> [f32; 8] {
    let mut f = [0f32; 8];
    // SAFETY: 32 writable bytes; the store has no alignment.
    unsafe { _mm256_storeu_ps(f.as_mut_ptr(), y) };
    f
}

/// Signed bytes, 128 added.
#[inline]
#[target_feature(enable = "avx2")]
fn unsigned([a, b]: Piece) -> Piece {
    let high_bit = _mm256_set1_epi8(-128);
    [_mm256_xor_si256(a, high_bit), _mm256_xor_si256(b, high_bit)]
}

/// Two blocks in the order of the row.
#[inline]
#[target_feature(enable = "avx2")]
fn straight(w: Two) -> Piece {
    [_mm256_permute2x128_si256::<0x20>(w.low, w.high), _mm256_permute2x128_si256::<0x31>(w.low, w.high)]
}

/// Rows of blocks of 32, two of which `read` takes at a time; a block begins with its scale and, if `MIN`, its minimum.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn unpack_blocks<const BYTES: usize, const MIN: bool>(
    bytes: &[u8],
    (q, scale, min): (&mut [u8], &mut [f32], &mut [f32]),
    read: impl Fn(&[u8; BYTES]) -> Piece,
) {
    let (steps, tail) = bytes.as_chunks::<BYTES>();
    for i in 0..steps.len() {
        let [first, second] = read(&steps[i]);
        store32(q, i * 64, first);
        store32(q, i * 64 + 32, second);
    }
    if !tail.is_empty() {
        let mut padded = [0u8; BYTES];
        padded[..tail.len()].copy_from_slice(tail);
        store32(q, steps.len() * 64, read(&padded)[0]);
    }
    halves_of_blocks::<BYTES, MIN>(bytes, scale, min);
}

/// Scales of blocks, two of which have `BYTES` bytes, and, if `MIN`, the minima behind them (else zeros). Eight at a time:
/// one conversion each would be a third of the unpacking.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn halves_of_blocks<const BYTES: usize, const MIN: bool>(bytes: &[u8], scale: &mut [f32], min: &mut [f32]) {
    let n = bytes.len() / (BYTES / 2);
    let (scale, min) = (&mut scale[..n], &mut min[..n]);
    let whole = n / 8 * 8;
    for i in (0..whole).step_by(8) {
        let eight = &bytes[i * (BYTES / 2)..][..8 * (BYTES / 2)];
        let at = |j: usize| j * (BYTES / 2);
        let (scales, mins) = if MIN {
            // Scale and minimum of a block are a dword; the order of blocks is such that halves stay in place.
            let dword = |j: usize| i32::from_le_bytes(*part::<0, 4>(&eight[at(j)..]));
            let pairs = |a, b, c, d| _mm256_cvtph_ps(_mm_setr_epi32(dword(a), dword(b), dword(c), dword(d)));
            let (first, second) = (pairs(0, 1, 4, 5), pairs(2, 3, 6, 7));
            let scales = _mm256_shuffle_ps::<0b10_00_10_00>(first, second);
            (scales, _mm256_shuffle_ps::<0b11_01_11_01>(first, second))
        } else {
            let half = |j: usize| word::<0>(&eight[at(j)..]) as i16;
            let bits = _mm_setr_epi16(half(0), half(1), half(2), half(3), half(4), half(5), half(6), half(7));
            (_mm256_cvtph_ps(bits), _mm256_setzero_ps())
        };
        let (scale, min): (&mut [f32; 8], &mut [f32; 8]) = (
            scale[i..].first_chunk_mut().expect("eight blocks"),
            min[i..].first_chunk_mut().expect("eight blocks"),
        );
        (*scale, *min) = (store_floats(scales), store_floats(mins));
    }
    for i in whole..n {
        let b = &bytes[i * (BYTES / 2)..][..BYTES / 2];
        scale[i] = half(word::<0>(b));
        min[i] = if MIN { half(word::<2>(b)) } else { 0.0 };
    }
}

/// Rows of superblocks of `GROUPS` groups, of which `piece` has the registers `index`.
#[inline]
#[target_feature(enable = "avx2")]
fn unpack_super<const BYTES: usize, const GROUPS: usize>(
    bytes: &[u8],
    (q, scale, min): (&mut [u8], &mut [f32], &mut [f32]),
    index: impl Fn(usize) -> [usize; 2],
    piece: impl Fn(&[u8; BYTES], usize) -> Piece,
    scales: impl Fn(&[u8; BYTES]) -> Scales,
) {
    for (s, b) in bytes.as_chunks::<BYTES>().0.iter().enumerate() {
        for j in 0..4 {
            let ([first, second], [y, z]) = (index(j), piece(b, j));
            store32(q, s * 256 + first * 32, y);
            store32(q, s * 256 + second * 32, z);
        }
        let w = scales(b);
        for h in 0..GROUPS / 8 {
            scale[s * GROUPS + 8 * h..][..8].copy_from_slice(&store_floats(w.scale[h]));
            min[s * GROUPS + 8 * h..][..8].copy_from_slice(&store_floats(w.min[h]));
        }
    }
}

/// See `quant::unpack_row`, with which the results are identical.
#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::kernels::x86) fn unpack(
    ty: GgmlType,
    b: &[u8],
    q: &mut [u8],
    scale: &mut [f32],
    min: &mut [f32],
) {
    use GgmlType::*;
    use blocks::*;
    let to = (q, scale, min);
    match ty {
        Q8_0 => unpack_blocks::<68, false>(b, to, |b| unsigned(straight(q8_0(b)))),
        Q4_0 => unpack_blocks::<36, false>(b, to, |b| straight(q4_0(b))),
        Q4_1 => unpack_blocks::<40, true>(b, to, |b| straight(q4_1(b))),
        Q5_0 => unpack_blocks::<44, false>(b, to, |b| straight(q5_0(b))),
        Q5_1 => unpack_blocks::<48, true>(b, to, |b| straight(q5_1(b))),
        IQ4_NL => unpack_blocks::<36, false>(b, to, |b| unsigned(straight(iq4_nl(b)))),
        Q2_K => unpack_super::<84, 16>(b, to, adjacent, |b, j| q2_k(b, j), |b| scales_q2_k(b)),
        Q3_K => unpack_super::<110, 16>(b, to, adjacent, |b, j| q3_k(b, j), |b| scales_of_q3_k(b)),
        Q4_K => unpack_super::<144, 8>(b, to, adjacent, |b, j| q4_k(b, j), |b| scales_k4(b)),
        Q5_K => unpack_super::<176, 8>(b, to, adjacent, |b, j| q5_k(b, j), |b| scales_k4(b)),
        Q6_K => unpack_super::<210, 16>(b, to, of_q6_k, |b, j| q6_k(b, j), |b| scales_q6_k(b)),
        IQ4_XS => unpack_super::<136, 8>(
            b,
            to,
            adjacent,
            |b, j| unsigned(straight(iq4_xs(b, j))),
            |b| scales_iq4_xs(b),
        ),
        F32 | F16 | BF16 => unreachable!("unquantised types have kernels of their own"),
    }
}
