//! F32, F16 and BF16: plain little-endian numbers.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// Elements converted at a time: `half` is several times faster on slices than one by one.
const CHUNK: usize = 64;

pub(super) fn decode_f32(bytes: &[u8], out: &mut [f32]) {
    for (x, b) in out.iter_mut().zip(bytes.as_chunks().0) {
        *x = f32::from_le_bytes(*b);
    }
}

pub(super) fn encode_f32(src: &[f32], out: &mut [u8]) {
    for (x, b) in src.iter().zip(out.as_chunks_mut().0) {
        *b = x.to_le_bytes();
    }
}

pub(super) fn decode_f16(bytes: &[u8], out: &mut [f32]) {
    let mut halves = [f16::ZERO; CHUNK];
    for (bytes, out) in bytes.chunks(2 * CHUNK).zip(out.chunks_mut(CHUNK)) {
        let halves = &mut halves[..out.len()];
        for (h, b) in halves.iter_mut().zip(bytes.as_chunks().0) {
            *h = f16::from_le_bytes(*b);
        }
        halves.convert_to_f32_slice(out);
    }
}

pub(super) fn encode_f16(src: &[f32], out: &mut [u8]) {
    let mut halves = [f16::ZERO; CHUNK];
    for (src, out) in src.chunks(CHUNK).zip(out.chunks_mut(2 * CHUNK)) {
        let halves = &mut halves[..src.len()];
        halves.convert_from_f32_slice(src);
        for (h, b) in halves.iter().zip(out.as_chunks_mut().0) {
            *b = h.to_le_bytes();
        }
    }
}

pub(super) fn decode_bf16(bytes: &[u8], out: &mut [f32]) {
    for (x, b) in out.iter_mut().zip(bytes.as_chunks().0) {
        *x = f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
    }
}

/// Rounds to nearest even; a NaN stays one.
pub(super) fn encode_bf16(src: &[f32], out: &mut [u8]) {
    for (x, b) in src.iter().zip(out.as_chunks_mut().0) {
        *b = bf16::from_f32(*x).to_le_bytes();
    }
}
