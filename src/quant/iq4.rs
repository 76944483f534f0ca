//! Four bits that index a table of 16 values, denser near zero: IQ4_NL and IQ4_XS.

use super::block::*;
use super::fit;
use super::legacy::{inverse, pack_nibbles, unpack_nibbles};

/// The value of each code.
pub const KVALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

fn unpack_codes(qs: &[u8], q: &mut [u8]) {
    unpack_nibbles(qs, q);
    for q in q {
        *q = KVALUES[usize::from(*q & 15)] as u8 ^ 0x80; // + 128
    }
}

pub(super) fn unpack_iq4_nl(bytes: &[u8], q: &mut [u8], scale: &mut [f32], _min: &mut [f32]) {
    let b = BlockIQ4NL::parse(bytes);
    scale[0] = f16_to_f32(b.d);
    unpack_codes(&b.qs, q);
}

pub(super) fn unpack_iq4_xs(bytes: &[u8], q: &mut [u8], scale: &mut [f32], _min: &mut [f32]) {
    let b = BlockIQ4XS::parse(bytes);
    let (d, high) = (f16_to_f32(b.d), u16::from_le_bytes(b.scales_h));
    for (g, scale) in scale.iter_mut().enumerate() {
        let s = b.scales_l[g / 2] >> (4 * (g % 2)) & 15 | ((high >> (2 * g) & 3) as u8) << 4;
        *scale = d * (f32::from(s) - 32.0);
    }
    for (qs, q) in b.qs.chunks_exact(16).zip(q.chunks_exact_mut(32)) {
        unpack_codes(qs, q);
    }
}

/// The code whose value is nearest to `v`.
fn nearest_code(v: f32) -> u8 {
    let above = KVALUES.partition_point(|&k| f32::from(k) < v).clamp(1, 15);
    let (low, high) = (f32::from(KVALUES[above - 1]), f32::from(KVALUES[above]));
    if v - low < high - v { above as u8 - 1 } else { above as u8 }
}

fn fit_scale(x: &[f32]) -> f32 {
    // The table reaches further down than up, so the largest magnitude may fit better at either end.
    fit::symmetric(x, f32::from(KVALUES[0]), |v| f32::from(KVALUES[usize::from(nearest_code(v))]))
}

fn codes(x: &[f32], scale: f32) -> [u8; 16] {
    let id = inverse(scale);
    pack_nibbles(&std::array::from_fn(|i| nearest_code(x[i] * id)))
}

pub(super) fn quantize_iq4_nl(x: &[f32], out: &mut [u8]) {
    let d = f32_to_f16(fit_scale(x));
    BlockIQ4NL { d, qs: codes(x, f16_to_f32(d)) }.write(out);
}

pub(super) fn quantize_iq4_xs(x: &[f32], out: &mut [u8]) {
    let fits: [f32; 8] = std::array::from_fn(|g| fit_scale(&x[32 * g..32 * (g + 1)]));
    let (d, scale) = super::kquants::quantise_signed(fits, 32);
    let mut qs = [0; 128];
    for (g, qs) in qs.chunks_exact_mut(16).enumerate() {
        qs.copy_from_slice(&codes(&x[32 * g..32 * (g + 1)], f16_to_f32(d) * f32::from(scale[g])));
    }
    let code = scale.map(|s| (s + 32) as u8);
    let high = code.iter().enumerate().fold(0, |h, (g, c)| h | u16::from(c >> 4) << (2 * g));
    let scales_l = std::array::from_fn(|i| code[2 * i] & 15 | code[2 * i + 1] << 4);
    BlockIQ4XS { d, scales_h: high.to_le_bytes(), scales_l, qs }.write(out);
}
