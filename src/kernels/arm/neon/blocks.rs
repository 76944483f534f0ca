//! Weight blocks to registers: bytes in the order of the row, with the scale and minimum of each group.
//!
//! The bytes are unsigned, zero point and all, for types of up to 6 bits (at most 63, so that they are
//! signed bytes as well); those of 8 bits (Q8_0, IQ4) are signed.

use std::arch::aarch64::*;
use std::arch::asm;

use crate::kernels::layout::{part, scales_mins_k4, scales_q3_k, word};
use crate::quant::IQ4_KVALUES;

/// A block of 32 weights.
pub(in crate::kernels::arm) struct Block {
    pub q: [int8x16_t; 2],
    pub scale: f32,
    pub min: f32,
}

/// 256 weights; scales and minima of groups of 32 in the first eight elements, of 16 in all sixteen.
pub(in crate::kernels::arm) struct Super {
    pub q: [int8x16_t; 16],
    pub scale: [f32; 16],
    pub min: [f32; 16],
}

#[inline]
#[target_feature(enable = "neon")]
fn load(b: &[u8; 16]) -> uint8x16_t {
    // SAFETY: 16 readable bytes.
    unsafe { vld1q_u8(b.as_ptr()) }
}

#[inline]
#[target_feature(enable = "neon")]
fn load2(b: &[u8; 32]) -> [uint8x16_t; 2] {
    [load(part::<0, 16>(b)), load(part::<16, 16>(b))]
}

/// The little-endian half-precision number at byte `O`; `half` would ask for the CPU's features first.
#[inline]
#[target_feature(enable = "neon")]
fn half<const O: usize>(b: &[u8]) -> f32 {
    let wide: f32;
    // SAFETY: an instruction of the baseline that touches registers only.
    unsafe {
        asm!(
            "fcvt {wide:s}, {half:h}",
            wide = lateout(vreg) wide,
            half = in(vreg) f32::from_bits(u32::from(word::<O>(b))),
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    wide
}

#[inline]
#[target_feature(enable = "neon")]
fn low_nibbles(b: uint8x16_t) -> uint8x16_t {
    vandq_u8(b, vdupq_n_u8(0x0f))
}

#[inline]
#[target_feature(enable = "neon")]
fn signed(b: uint8x16_t) -> int8x16_t {
    vreinterpretq_s8_u8(b)
}

/// Nibbles of halves.
#[inline]
#[target_feature(enable = "neon")]
fn nibbles(b: &[u8; 16]) -> [uint8x16_t; 2] {
    let b = load(b);
    [low_nibbles(b), vshrq_n_u8::<4>(b)]
}

#[inline]
#[target_feature(enable = "neon")]
pub(in crate::kernels::arm) fn q8_0(b: &[u8; 34]) -> Block {
    let [low, high] = load2(part::<2, 32>(b));
    Block { q: [signed(low), signed(high)], scale: half::<0>(b), min: 0.0 }
}

#[inline]
#[target_feature(enable = "neon")]
pub(in crate::kernels::arm) fn q4_0(b: &[u8; 18]) -> Block {
    let [low, high] = nibbles(part::<2, 16>(b));
    Block { q: [signed(low), signed(high)], scale: half::<0>(b), min: 0.0 }
}

#[inline]
#[target_feature(enable = "neon")]
pub(in crate::kernels::arm) fn q4_1(b: &[u8; 20]) -> Block {
    let [low, high] = nibbles(part::<4, 16>(b));
    Block { q: [signed(low), signed(high)], scale: half::<0>(b), min: half::<2>(b) }
}

/// Nibbles of halves and, on top, the fifth bits: bit `i` of `bits` for weight `i`.
#[inline]
#[target_feature(enable = "neon")]
fn five_bits(b: &[u8; 16], bits: &[u8; 4]) -> [int8x16_t; 2] {
    // Each byte of the bits eight times, of which the mask tests a bit each.
    let mask = vreinterpretq_u8_u64(vdupq_n_u64(0x8040_2010_0804_0201));
    let fifth = |first: usize| {
        let bytes = vcombine_u8(vdup_n_u8(bits[first]), vdup_n_u8(bits[first + 1]));
        vandq_u8(vtstq_u8(bytes, mask), vdupq_n_u8(16))
    };
    let [low, high] = nibbles(b);
    [signed(vorrq_u8(low, fifth(0))), signed(vorrq_u8(high, fifth(2)))]
}

#[inline]
#[target_feature(enable = "neon")]
pub(in crate::kernels::arm) fn q5_0(b: &[u8; 22]) -> Block {
    Block { q: five_bits(part::<6, 16>(b), part::<2, 4>(b)), scale: half::<0>(b), min: 0.0 }
}

#[inline]
#[target_feature(enable = "neon")]
pub(in crate::kernels::arm) fn q5_1(b: &[u8; 24]) -> Block {
    Block { q: five_bits(part::<8, 16>(b), part::<4, 4>(b)), scale: half::<0>(b), min: half::<2>(b) }
}

/// The signed values that nibbles of halves stand for.
#[inline]
#[target_feature(enable = "neon")]
fn iq4_values(b: &[u8; 16]) -> [int8x16_t; 2] {
    // SAFETY: 16 readable bytes.
    let table = unsafe { vld1q_s8(IQ4_KVALUES.as_ptr()) };
    nibbles(b).map(|n| vqtbl1q_s8(table, n))
}

#[inline]
#[target_feature(enable = "neon")]
pub(in crate::kernels::arm) fn iq4_nl(b: &[u8; 18]) -> Block {
    Block { q: iq4_values(part::<2, 16>(b)), scale: half::<0>(b), min: 0.0 }
}

#[inline]
#[target_feature(enable = "neon")]
pub(in crate::kernels::arm) fn iq4_xs(b: &[u8; 136]) -> Super {
    let d = half::<0>(b);
    let (high, low) = (word::<2>(b), u32::from_le_bytes(*part::<4, 4>(b)));
    let mut scale = [0.0; 16];
    let mut q = [vdupq_n_s8(0); 16];
    for g in 0..8 {
        let s = (low >> (4 * g) & 15) as i32 | i32::from(high >> (2 * g) & 3) << 4;
        scale[g] = d * (s - 32) as f32;
        let nibbles = b[8 + 16 * g..].first_chunk().expect("16 bytes a group");
        [q[2 * g], q[2 * g + 1]] = iq4_values(nibbles);
    }
    Super { q, scale, min: [0.0; 16] }
}

/// Bytes as floats, times `by`.
#[inline(always)]
fn floats8(bytes: u64, by: f32) -> [f32; 16] {
    let mut floats = [0.0; 16];
    for (f, b) in floats.iter_mut().zip(bytes.to_le_bytes()) {
        *f = by * f32::from(b);
    }
    floats
}

/// Scales and minima of Q4_K and Q5_K, which begin alike.
#[inline]
#[target_feature(enable = "neon")]
fn scales_k4(b: &[u8]) -> ([f32; 16], [f32; 16]) {
    let (scales, mins) = scales_mins_k4(part::<4, 12>(b));
    (floats8(scales, half::<0>(b)), floats8(mins, -half::<2>(b)))
}

/// The nibbles of Q4_K and Q5_K: the low ones of 32 bytes, then the high ones, four times.
#[inline]
#[target_feature(enable = "neon")]
fn nibbles_k(b: &[u8; 128]) -> [uint8x16_t; 16] {
    let mut q = [vdupq_n_u8(0); 16];
    for (c, b) in b.as_chunks::<32>().0.iter().enumerate() {
        let [y0, y1] = load2(b);
        q[4 * c] = low_nibbles(y0);
        q[4 * c + 1] = low_nibbles(y1);
        q[4 * c + 2] = vshrq_n_u8::<4>(y0);
        q[4 * c + 3] = vshrq_n_u8::<4>(y1);
    }
    q
}

/// Puts bit `g` of byte `i` of `bits` on top of weight `i` of group `g`, as bit `TO`.
#[inline]
#[target_feature(enable = "neon")]
fn add_bits<const TO: u8>(q: [uint8x16_t; 16], bits: &[u8; 32]) -> [int8x16_t; 16] {
    let bits = load2(bits);
    let mut out = [vdupq_n_s8(0); 16];
    for g in 0..8 {
        for h in 0..2 {
            let set = vandq_u8(vtstq_u8(bits[h], vdupq_n_u8(1 << g)), vdupq_n_u8(1 << TO));
            out[2 * g + h] = signed(vorrq_u8(q[2 * g + h], set));
        }
    }
    out
}

#[inline]
#[target_feature(enable = "neon")]
pub(in crate::kernels::arm) fn q4_k(b: &[u8; 144]) -> Super {
    let (scale, min) = scales_k4(b);
    Super { q: nibbles_k(part::<16, 128>(b)).map(|q| signed(q)), scale, min }
}

#[inline]
#[target_feature(enable = "neon")]
pub(in crate::kernels::arm) fn q5_k(b: &[u8; 176]) -> Super {
    let (scale, min) = scales_k4(b);
    Super { q: add_bits::<4>(nibbles_k(part::<48, 128>(b)), part::<16, 32>(b)), scale, min }
}

#[inline]
#[target_feature(enable = "neon")]
pub(in crate::kernels::arm) fn q6_k(b: &[u8; 210]) -> Super {
    let d = half::<208>(b);
    let mut q = [vdupq_n_s8(0); 16];
    let halves = part::<0, 128>(b).as_chunks::<64>().0.iter().zip(part::<128, 64>(b).as_chunks::<32>().0);
    for ((low, high), q) in halves.zip(q.as_chunks_mut::<8>().0) {
        let top = |moved| vandq_u8(moved, vdupq_n_u8(0x30));
        let high = load2(high);
        for h in 0..2 {
            let (low0, low1) = (load2(part::<0, 32>(low))[h], load2(part::<32, 32>(low))[h]);
            q[h] = signed(vorrq_u8(low_nibbles(low0), top(vshlq_n_u8::<4>(high[h]))));
            q[2 + h] = signed(vorrq_u8(low_nibbles(low1), top(vshlq_n_u8::<2>(high[h]))));
            q[4 + h] = signed(vorrq_u8(vshrq_n_u8::<4>(low0), top(high[h])));
            q[6 + h] = signed(vorrq_u8(vshrq_n_u8::<4>(low1), top(vshrq_n_u8::<2>(high[h]))));
        }
    }
    Super { q, scale: part::<192, 16>(b).map(|s| d * f32::from(s as i8)), min: [0.0; 16] }
}

/// The four pairs of bits in each of 64 bytes, in the order of the row.
#[inline]
#[target_feature(enable = "neon")]
fn crumbs(b: &[u8; 64]) -> [uint8x16_t; 16] {
    let mut q = [vdupq_n_u8(0); 16];
    let two = |moved| vandq_u8(moved, vdupq_n_u8(3));
    for (b, q) in b.as_chunks::<32>().0.iter().zip(q.as_chunks_mut::<8>().0) {
        for (h, y) in load2(b).into_iter().enumerate() {
            q[h] = two(y);
            q[2 + h] = two(vshrq_n_u8::<2>(y));
            q[4 + h] = two(vshrq_n_u8::<4>(y));
            q[6 + h] = vshrq_n_u8::<6>(y);
        }
    }
    q
}

#[inline]
#[target_feature(enable = "neon")]
pub(in crate::kernels::arm) fn q2_k(b: &[u8; 84]) -> Super {
    let (d, dmin) = (half::<80>(b), half::<82>(b));
    let scales = part::<0, 16>(b);
    Super {
        q: crumbs(part::<16, 64>(b)).map(|q| signed(q)),
        scale: scales.map(|s| d * f32::from(s & 15)),
        min: scales.map(|s| -dmin * f32::from(s >> 4)),
    }
}

#[inline]
#[target_feature(enable = "neon")]
pub(in crate::kernels::arm) fn q3_k(b: &[u8; 110]) -> Super {
    let scales = scales_q3_k(part::<96, 12>(b));
    let d = half::<108>(b);
    Super {
        q: add_bits::<2>(crumbs(part::<32, 64>(b)), part::<0, 32>(b)),
        scale: std::array::from_fn(|g| d * (f32::from((scales[g / 4] >> (g % 4 * 8)) as u8) - 32.0)),
        min: [0.0; 16],
    }
}
