//! Super-blocks of 256 weights whose group scales are quantised themselves: Q2_K, Q3_K, Q4_K, Q5_K, Q6_K.

use super::block::*;
use super::fit::{self, nearest};

/// Weights of a super-block.
const LEN: usize = 256;

/// Two bits a weight, in the order of [`BlockQ2K::qs`].
fn two_bits(qs: &[u8; 64], i: usize) -> u8 {
    qs[32 * (i / 128) + i % 32] >> (2 * (i / 32 % 4)) & 3
}

fn pack_two_bits(q: &[u8; LEN]) -> [u8; 64] {
    std::array::from_fn(|b| {
        (0..4).fold(0, |byte, j| byte | (q[128 * (b / 32) + 32 * j + b % 32] & 3) << (2 * j))
    })
}

/// One bit a weight, in the order of [`BlockQ3K::hmask`] and [`BlockQ5K::qh`].
fn one_bit(bits: &[u8; 32], i: usize) -> u8 {
    bits[i % 32] >> (i / 32) & 1
}

fn pack_one_bit(q: &[u8; LEN], shift: u32) -> [u8; 32] {
    std::array::from_fn(|b| (0..8).fold(0, |byte, g| byte | (q[32 * g + b] >> shift & 1) << g))
}

/// Four bits a weight, in the order of [`BlockQ4K::qs`].
fn four_bits(qs: &[u8; 128], i: usize) -> u8 {
    qs[32 * (i / 64) + i % 32] >> (4 * (i / 32 % 2)) & 15
}

fn pack_four_bits(q: &[u8; LEN]) -> [u8; 128] {
    std::array::from_fn(|b| {
        let i = 64 * (b / 32) + b % 32;
        q[i] & 15 | q[i + 32] << 4
    })
}

/// Scale and min of group `g` of [`BlockQ4K::scales`].
fn scale_min(scales: &[u8; 12], g: usize) -> (u8, u8) {
    if g < 4 {
        return (scales[g] & 63, scales[4 + g] & 63);
    }
    let low = scales[4 + g];
    (low & 15 | scales[g - 4] >> 6 << 4, low >> 4 | scales[g] >> 6 << 4)
}

fn pack_scale_min(scale: &[u8; 8], min: &[u8; 8]) -> [u8; 12] {
    std::array::from_fn(|b| match b {
        0..4 => scale[b] | scale[b + 4] >> 4 << 6,
        4..8 => min[b - 4] | min[b] >> 4 << 6,
        _ => scale[b - 4] & 15 | min[b - 4] << 4,
    })
}

/// Scale of group `g` of [`BlockQ3K::scales`], still with its offset of 32.
fn scale_q3(scales: &[u8; 12], g: usize) -> u8 {
    let low = scales[g % 8] >> (4 * (g / 8)) & 15;
    low | (scales[8 + g % 4] >> (2 * (g / 4)) & 3) << 4
}

fn pack_scales_q3(scale: &[u8; 16]) -> [u8; 12] {
    std::array::from_fn(|b| match b {
        0..8 => scale[b] & 15 | scale[b + 8] << 4,
        _ => (0..4).fold(0, |byte, j| byte | (scale[4 * j + b - 8] >> 4) << (2 * j)),
    })
}

pub(super) fn unpack_q2_k(bytes: &[u8], q: &mut [u8], scale: &mut [f32], min: &mut [f32]) {
    let b = BlockQ2K::parse(bytes);
    let (d, dmin) = (f16_to_f32(b.d), f16_to_f32(b.dmin));
    for (g, s) in b.scales.into_iter().enumerate() {
        scale[g] = d * f32::from(s & 15);
        min[g] = -(dmin * f32::from(s >> 4));
    }
    for (i, q) in q.iter_mut().enumerate() {
        *q = two_bits(&b.qs, i);
    }
}

pub(super) fn unpack_q3_k(bytes: &[u8], q: &mut [u8], scale: &mut [f32], _min: &mut [f32]) {
    let b = BlockQ3K::parse(bytes);
    let d = f16_to_f32(b.d);
    for (g, s) in scale.iter_mut().enumerate() {
        *s = d * (f32::from(scale_q3(&b.scales, g)) - 32.0);
    }
    for (i, q) in q.iter_mut().enumerate() {
        *q = two_bits(&b.qs, i) | one_bit(&b.hmask, i) << 2;
    }
}

/// Scales and mins of Q4_K and Q5_K.
fn unpack_scale_min(d: [u8; 2], dmin: [u8; 2], scales: &[u8; 12], scale: &mut [f32], min: &mut [f32]) {
    let (d, dmin) = (f16_to_f32(d), f16_to_f32(dmin));
    for (g, (scale, min)) in scale.iter_mut().zip(min).enumerate() {
        let (s, m) = scale_min(scales, g);
        *scale = d * f32::from(s);
        *min = -(dmin * f32::from(m));
    }
}

pub(super) fn unpack_q4_k(bytes: &[u8], q: &mut [u8], scale: &mut [f32], min: &mut [f32]) {
    let b = BlockQ4K::parse(bytes);
    unpack_scale_min(b.d, b.dmin, &b.scales, scale, min);
    for (i, q) in q.iter_mut().enumerate() {
        *q = four_bits(&b.qs, i);
    }
}

pub(super) fn unpack_q5_k(bytes: &[u8], q: &mut [u8], scale: &mut [f32], min: &mut [f32]) {
    let b = BlockQ5K::parse(bytes);
    unpack_scale_min(b.d, b.dmin, &b.scales, scale, min);
    for (i, q) in q.iter_mut().enumerate() {
        *q = four_bits(&b.qs, i) | one_bit(&b.qh, i) << 4;
    }
}

pub(super) fn unpack_q6_k(bytes: &[u8], q: &mut [u8], scale: &mut [f32], _min: &mut [f32]) {
    let b = BlockQ6K::parse(bytes);
    let d = f16_to_f32(b.d);
    for (scale, s) in scale.iter_mut().zip(b.scales) {
        *scale = d * f32::from(s as i8);
    }
    for (i, q) in q.iter_mut().enumerate() {
        let (half, j) = (i / 128, i / 32 % 4);
        let low = b.ql[64 * half + 32 * (j % 2) + i % 32] >> (4 * (j / 2)) & 15;
        *q = low | two_bits(&b.qh, i) << 4;
    }
}

/// The codes of all groups for scales and mins as a reader will see them: `x ~ scale * (q - zero) + min`.
fn codes(x: &[f32], scale: &[f32], min: &[f32], zero: i32, top: i32) -> [u8; LEN] {
    let group = LEN / scale.len();
    std::array::from_fn(|i| {
        let g = i / group;
        let inverse = super::legacy::inverse(scale[g]);
        let shifted = x[i] - min.get(g).copied().unwrap_or(0.0);
        nearest(shifted * inverse + zero as f32, 0, top) as u8
    })
}

/// Fits `G` groups with minimum and quantises the fits to `0..=levels`.
/// Returns `d`, `dmin` and the integer scales and mins.
fn affine_scales<const G: usize>(x: &[f32], top: i32, levels: i32) -> ([u8; 2], [u8; 2], [u8; G], [u8; G]) {
    let fits: [_; G] = std::array::from_fn(|g| fit::affine(&x[g * LEN / G..(g + 1) * LEN / G], top));
    let (d, scale) = quantise_positive(fits.map(|f| f.0), levels);
    let (dmin, min) = quantise_positive(fits.map(|f| f.1), levels);
    (d, dmin, scale, min)
}

fn quantise_positive<const G: usize>(v: [f32; G], levels: i32) -> ([u8; 2], [u8; G]) {
    let d = f32_to_f16(v.iter().fold(0.0f32, |m, &v| m.max(v)) / levels as f32);
    let inverse = super::legacy::inverse(f16_to_f32(d));
    (d, v.map(|v| nearest(v * inverse, 0, levels) as u8))
}

/// Fits `G` groups around zero with codes in `-zero..zero` and quantises the scales to `-limit..limit`.
fn symmetric_scales<const G: usize>(x: &[f32], zero: i32, limit: i32) -> ([u8; 2], [i8; G]) {
    let level = |v| nearest(v, -zero, zero - 1) as f32;
    let fits: [_; G] =
        std::array::from_fn(|g| fit::symmetric(&x[g * LEN / G..(g + 1) * LEN / G], -zero as f32, level));
    quantise_signed(fits, limit)
}

/// Quantises scales to `-limit..limit`; the largest one maps to `-limit` and is met exactly.
pub(super) fn quantise_signed<const G: usize>(v: [f32; G], limit: i32) -> ([u8; 2], [i8; G]) {
    let d = f32_to_f16(super::legacy::signed_max(&v) / -limit as f32);
    let inverse = super::legacy::inverse(f16_to_f32(d));
    (d, v.map(|v| nearest(v * inverse, -limit, limit - 1) as i8))
}

pub(super) fn quantize_q2_k(x: &[f32], out: &mut [u8]) {
    let (d, dmin, scale, min) = affine_scales::<16>(x, 3, 15);
    let scales = std::array::from_fn(|g| scale[g] | min[g] << 4);
    let q = affine_codes(x, d, dmin, &scale, &min, 3);
    BlockQ2K { scales, qs: pack_two_bits(&q), d, dmin }.write(out);
}

fn affine_codes<const G: usize>(
    x: &[f32],
    d: [u8; 2],
    dmin: [u8; 2],
    scale: &[u8; G],
    min: &[u8; G],
    top: i32,
) -> [u8; LEN] {
    let (d, dmin) = (f16_to_f32(d), f16_to_f32(dmin));
    codes(x, &scale.map(|s| d * f32::from(s)), &min.map(|m| -dmin * f32::from(m)), 0, top)
}

pub(super) fn quantize_q3_k(x: &[f32], out: &mut [u8]) {
    let (d, scale) = symmetric_scales::<16>(x, 4, 32);
    let q = codes(x, &scale.map(|s| f16_to_f32(d) * f32::from(s)), &[], 4, 7);
    let scales = pack_scales_q3(&scale.map(|s| (s + 32) as u8));
    BlockQ3K { hmask: pack_one_bit(&q, 2), qs: pack_two_bits(&q), scales, d }.write(out);
}

pub(super) fn quantize_q4_k(x: &[f32], out: &mut [u8]) {
    let (d, dmin, scale, min) = affine_scales::<8>(x, 15, 63);
    let q = affine_codes(x, d, dmin, &scale, &min, 15);
    BlockQ4K { d, dmin, scales: pack_scale_min(&scale, &min), qs: pack_four_bits(&q) }.write(out);
}

pub(super) fn quantize_q5_k(x: &[f32], out: &mut [u8]) {
    let (d, dmin, scale, min) = affine_scales::<8>(x, 31, 63);
    let q = affine_codes(x, d, dmin, &scale, &min, 31);
    let (qh, qs) = (pack_one_bit(&q, 4), pack_four_bits(&q));
    BlockQ5K { d, dmin, scales: pack_scale_min(&scale, &min), qh, qs }.write(out);
}

pub(super) fn quantize_q6_k(x: &[f32], out: &mut [u8]) {
    let (d, scale) = symmetric_scales::<16>(x, 32, 128);
    let q = codes(x, &scale.map(|s| f16_to_f32(d) * f32::from(s)), &[], 32, 63);
    let ql = std::array::from_fn(|b| {
        let i = 128 * (b / 64) + b % 64;
        q[i] & 15 | q[i + 64] << 4
    });
    let qh = pack_two_bits(&q.map(|q| q >> 4));
    BlockQ6K { ql, qh, scales: scale.map(|s| s as u8), d }.write(out);
}
