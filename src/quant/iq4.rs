//! Four bits that index a table of 16 values, denser near zero: IQ4_NL and IQ4_XS.

use super::block::*;
use super::fit::{self, nearest};
use super::kquants::SymmetricBlock;
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

/// Cells of half a unit, from -128 on. All limits between two values' neighbourhoods lie on the edges of cells.
const CELLS: usize = 512;

/// The code of the value nearest to each cell.
const NEAREST: [u8; CELLS] = {
    let mut table = [0; CELLS];
    let mut i = 0;
    while i < CELLS {
        // Four times the middle of the cell, and of two values: whole numbers.
        let middle = 2 * (i as i32 - 256) + 1;
        let mut code = 0;
        while code < 15 && middle > 2 * (KVALUES[code] as i32 + KVALUES[code + 1] as i32) {
            code += 1;
        }
        table[i] = code as u8;
        i += 1;
    }
    table
};

/// The values of these codes.
const LEVELS: [f32; CELLS] = {
    let mut table = [0.0; CELLS];
    let mut i = 0;
    while i < CELLS {
        table[i] = KVALUES[NEAREST[i] as usize] as f32;
        i += 1;
    }
    table
};

/// The cell of `v`.
#[inline(always)]
fn cell(v: f32) -> usize {
    (nearest(2.0 * v - 0.5, -256.0, 255.0) as i32 + 256) as usize % CELLS
}

#[inline(always)]
fn level(v: f32) -> f32 {
    LEVELS[cell(v)]
}

fn codes(x: &[f32], scale: f32) -> [u8; 16] {
    let id = inverse(scale);
    pack_nibbles(&std::array::from_fn(|i| NEAREST[cell(x[i] * id)]))
}

/// The level of largest magnitude.
const EXTREME: f32 = KVALUES[0] as f32;

pub(super) fn quantize_iq4_nl(x: &[f32], w: &[f32], out: &mut [u8]) {
    let d = f32_to_f16(fit::symmetric(x, w, EXTREME, level));
    BlockIQ4NL { d, qs: codes(x, f16_to_f32(d)) }.write(out);
}

pub(super) fn quantize_iq4_xs(x: &[f32], w: &[f32], out: &mut [u8]) {
    let b = SymmetricBlock::<8>::fit(x, w, 32.0, EXTREME, level);
    let mut qs = [0; 128];
    for (g, qs) in qs.chunks_exact_mut(16).enumerate() {
        qs.copy_from_slice(&codes(&x[32 * g..32 * (g + 1)], b.group(g)));
    }
    let code = b.scale.map(|s| (s + 32) as u8);
    let high = code.iter().enumerate().fold(0, |h, (g, c)| h | u16::from(c >> 4) << (2 * g));
    let scales_l = std::array::from_fn(|i| code[2 * i] & 15 | code[2 * i + 1] << 4);
    BlockIQ4XS { d: b.d, scales_h: high.to_le_bytes(), scales_l, qs }.write(out);
}
