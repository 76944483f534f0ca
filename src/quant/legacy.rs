//! Blocks of 32 weights with an f16 scale and perhaps an f16 minimum: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1.
//!
//! The quantisers do ggml's reference arithmetic step by step, so their bytes are equal to its. Where errors are
//! weighed (`w`), they search for the scale instead.

use super::block::*;
use super::fit::{self, nearest};

/// Weights of a block.
const LEN: usize = 32;

/// Spreads 16 bytes of nibbles of halves over 32 values, if there is room for any.
pub(super) fn unpack_nibbles(qs: &[u8], q: &mut [u8]) {
    let (low, high) = q.split_at_mut(q.len() / 2);
    for ((byte, low), high) in qs.iter().zip(low).zip(high) {
        *low = byte & 15;
        *high = byte >> 4;
    }
}

/// The reverse; bits above the fourth are dropped.
pub(super) fn pack_nibbles(q: &[u8; LEN]) -> [u8; LEN / 2] {
    std::array::from_fn(|i| q[i] & 15 | q[i + LEN / 2] << 4)
}

fn add_fifth_bits(qh: [u8; 4], q: &mut [u8]) {
    let bits = u32::from_le_bytes(qh);
    for (i, q) in q.iter_mut().enumerate() {
        *q |= ((bits >> i & 1) as u8) << 4;
    }
}

fn fifth_bits(q: &[u8; LEN]) -> [u8; 4] {
    let bits = q.iter().enumerate().fold(0, |bits, (i, &q)| bits | u32::from(q >> 4 & 1) << i);
    bits.to_le_bytes()
}

pub(super) fn unpack_q8_0(bytes: &[u8], q: &mut [u8], scale: &mut [f32], _min: &mut [f32]) {
    let b = BlockQ8_0::parse(bytes);
    scale[0] = f16_to_f32(b.d);
    for (q, w) in q.iter_mut().zip(b.qs) {
        *q = w ^ 0x80; // i8 + 128
    }
}

pub(super) fn unpack_q4_0(bytes: &[u8], q: &mut [u8], scale: &mut [f32], _min: &mut [f32]) {
    let b = BlockQ4_0::parse(bytes);
    scale[0] = f16_to_f32(b.d);
    unpack_nibbles(&b.qs, q);
}

pub(super) fn unpack_q4_1(bytes: &[u8], q: &mut [u8], scale: &mut [f32], min: &mut [f32]) {
    let b = BlockQ4_1::parse(bytes);
    scale[0] = f16_to_f32(b.d);
    min[0] = f16_to_f32(b.m);
    unpack_nibbles(&b.qs, q);
}

pub(super) fn unpack_q5_0(bytes: &[u8], q: &mut [u8], scale: &mut [f32], _min: &mut [f32]) {
    let b = BlockQ5_0::parse(bytes);
    scale[0] = f16_to_f32(b.d);
    unpack_nibbles(&b.qs, q);
    add_fifth_bits(b.qh, q);
}

pub(super) fn unpack_q5_1(bytes: &[u8], q: &mut [u8], scale: &mut [f32], min: &mut [f32]) {
    let b = BlockQ5_1::parse(bytes);
    scale[0] = f16_to_f32(b.d);
    min[0] = f16_to_f32(b.m);
    unpack_nibbles(&b.qs, q);
    add_fifth_bits(b.qh, q);
}

/// `1 / d`, and 0 for a block of zeros.
pub(super) fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

/// The value of largest magnitude with its sign; the first of equal ones, 0.0 if there is none.
pub(super) fn signed_max(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |max: f32, &v| if max.abs() < v.abs() { v } else { max })
}

fn min_max(x: &[f32]) -> (f32, f32) {
    x.iter().fold((f32::MAX, f32::MIN), |(min, max), &v| {
        (if v < min { v } else { min }, if v > max { v } else { max })
    })
}

/// `levels` values around zero. The largest magnitude maps to the lowest level (which has no positive
/// counterpart), so it is met exactly. Returns the scale and the codes.
fn symmetric(x: &[f32], levels: u8) -> (f32, [u8; LEN]) {
    let half = f32::from(levels / 2);
    let d = signed_max(x) / -half;
    let id = inverse(d);
    let q = std::array::from_fn(|i| ((x[i] * id + (half + 0.5)) as u8).min(levels - 1));
    (d, q)
}

/// `levels` values from the minimum to the maximum. Returns the scale, the minimum and the codes.
fn affine(x: &[f32], levels: u8) -> (f32, f32, [u8; LEN]) {
    let (min, max) = min_max(x);
    let d = (max - min) / f32::from(levels - 1);
    let id = inverse(d);
    let q = std::array::from_fn(|i| (((x[i] - min) * id + 0.5) as u8).min(levels - 1));
    (d, min, q)
}

pub(super) fn quantize_q8_0(x: &[f32], out: &mut [u8]) {
    let d = signed_max(x).abs() / 127.0;
    let id = inverse(d);
    let qs = std::array::from_fn(|i| (x[i] * id).round() as i8 as u8);
    BlockQ8_0 { d: f32_to_f16(d), qs }.write(out);
}

/// [`symmetric`] with the smallest weighed error.
fn symmetric_weighed(x: &[f32], w: &[f32], levels: u8) -> (f32, [u8; LEN]) {
    let half = f32::from(levels / 2);
    let d = rounded(fit::symmetric(x, w, -half, |v| nearest(v, -half, half - 1.0)));
    let id = inverse(d);
    (d, std::array::from_fn(|i| (nearest(x[i] * id, -half, half - 1.0) + half) as u8))
}

/// [`affine`] with the smallest weighed error.
fn affine_weighed(x: &[f32], w: &[f32], levels: u8) -> (f32, f32, [u8; LEN]) {
    let top = f32::from(levels - 1);
    let fit = fit::affine(x, w, top);
    let (d, min) = (rounded(fit.scale), rounded(fit.min));
    let id = inverse(d);
    (d, -min, std::array::from_fn(|i| nearest((x[i] + min) * id, 0.0, top) as u8))
}

/// As a reader will see it.
fn rounded(x: f32) -> f32 {
    f16_to_f32(f32_to_f16(x))
}

pub(super) fn quantize_q4_0(x: &[f32], w: Option<&[f32]>, out: &mut [u8]) {
    let (d, q) = w.map_or_else(|| symmetric(x, 16), |w| symmetric_weighed(x, w, 16));
    BlockQ4_0 { d: f32_to_f16(d), qs: pack_nibbles(&q) }.write(out);
}

pub(super) fn quantize_q4_1(x: &[f32], w: Option<&[f32]>, out: &mut [u8]) {
    let (d, m, q) = w.map_or_else(|| affine(x, 16), |w| affine_weighed(x, w, 16));
    BlockQ4_1 { d: f32_to_f16(d), m: f32_to_f16(m), qs: pack_nibbles(&q) }.write(out);
}

pub(super) fn quantize_q5_0(x: &[f32], w: Option<&[f32]>, out: &mut [u8]) {
    let (d, q) = w.map_or_else(|| symmetric(x, 32), |w| symmetric_weighed(x, w, 32));
    BlockQ5_0 { d: f32_to_f16(d), qh: fifth_bits(&q), qs: pack_nibbles(&q) }.write(out);
}

pub(super) fn quantize_q5_1(x: &[f32], w: Option<&[f32]>, out: &mut [u8]) {
    let (d, m, q) = w.map_or_else(|| affine(x, 32), |w| affine_weighed(x, w, 32));
    BlockQ5_1 { d: f32_to_f16(d), m: f32_to_f16(m), qh: fifth_bits(&q), qs: pack_nibbles(&q) }.write(out);
}
