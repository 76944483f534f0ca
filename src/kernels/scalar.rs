//! Plain code for every CPU: the reference of the other kernels' tests, written to be read.

use super::rows::{Listed, WeightRows};
use super::{Functions, Isa, PANEL_ROWS, Panel, Q8Row, Q8Rows, decode_attention, float};
use crate::gguf::GgmlType;
use crate::quant;

pub(super) static ISA: Isa = Isa {
    name: "scalar",
    needs: "nothing special",
    detect: || true,
    functions: Functions {
        quantize,
        dot,
        dot_listed,
        dot_tokens: None,
        panels_from: crate::kernels::FEW_TOKENS + 1,
        unpack: quant::unpack_row,
        interleave,
        gemm,
        columns: super::columns::scalar,
        float: &float::PORTABLE,
        decode_attention: &decode_attention::DECODE_ATTENTION,
        tiles: None,
        attention: None,
    },
};

/// Quantises blocks of 32: `scale = max |x| / 127`, `q` rounded to the nearest, ties to even.
pub(super) fn quantize(x: &[f32], q: &mut [i8], scale: &mut [f32], sum: &mut [i32]) {
    for (i, x) in x.chunks_exact(32).enumerate() {
        let max = x.iter().fold(0f32, |m, v| m.max(v.abs()));
        // An infinite inverse (subnormal maximum) would make 0 * inf: such a block counts as zero.
        let inverse = if max > 1e-30 { 127.0 / max } else { 0.0 };
        scale[i] = max / 127.0;
        let q = &mut q[i * 32..][..32];
        for (q, x) in q.iter_mut().zip(x) {
            *q = (x * inverse).round_ties_even() as i8;
        }
        for h in 0..2 {
            sum[2 * i + h] = q[16 * h..][..16].iter().map(|&q| i32::from(q)).sum();
        }
    }
}

fn dot(ty: GgmlType, weights: &[u8], row_bytes: usize, x: Q8Row<'_>, out: &mut [f32]) {
    for (row, out) in weights.chunks_exact(row_bytes).zip(out) {
        *out = dot_row(ty, row, x);
    }
}

fn dot_listed(ty: GgmlType, w: Listed<'_>, x: Q8Row<'_>, out: &mut [f32]) {
    for (i, out) in out.iter_mut().enumerate() {
        *out = dot_row(ty, w.row(i), x);
    }
}

fn dot_row(ty: GgmlType, row: &[u8], x: Q8Row<'_>) -> f32 {
    let (block, group, zero) = (ty.block_len(), quant::group_len(ty), i32::from(quant::zero_point(ty)));
    let (mut q, mut scale, mut min) = ([0u8; 256], [0f32; 16], [0f32; 16]);
    let groups = block / group;
    let mut total = 0f32;
    for (b, bytes) in row.chunks_exact(ty.block_bytes()).enumerate() {
        quant::unpack_row(ty, bytes, &mut q[..block], &mut scale[..groups], &mut min[..groups]);
        for g in 0..groups {
            let first = b * block + g * group;
            let a = &x.q[first..][..group];
            let product: i32 =
                a.iter().zip(&q[g * group..]).map(|(&a, &q)| i32::from(a) * (i32::from(q) - zero)).sum();
            let sum: i32 = a.iter().map(|&a| i32::from(a)).sum();
            total += x.scale[first / 32] * (scale[g] * product as f32 + min[g] * sum as f32);
        }
    }
    total
}

/// `[row][col]` to `[col / 4][row][col % 4]`.
pub(super) fn interleave(plain: &[u8], cols: usize, q: &mut [u8]) {
    for (r, row) in plain.chunks_exact(cols).enumerate() {
        for (c, four) in row.chunks_exact(4).enumerate() {
            q[(c * PANEL_ROWS + r) * 4..][..4].copy_from_slice(four);
        }
    }
}

fn gemm(panel: &Panel, x: Q8Rows<'_>, acc: &mut [f32]) {
    let (group, zero) = (panel.group_len, i32::from(panel.zero));
    for (t, acc) in acc.chunks_exact_mut(PANEL_ROWS).enumerate() {
        for (r, acc) in acc.iter_mut().enumerate() {
            for g in 0..panel.groups() {
                let a = &x.q[t * x.stride + g * group..][..group];
                let weight = |i: usize| {
                    let col = g * group + i;
                    i32::from(panel.q.0[(col / 4 * PANEL_ROWS + r) * 4 + col % 4]) - zero
                };
                let product: i32 = a.iter().enumerate().map(|(i, &a)| i32::from(a) * weight(i)).sum();
                let sum: i32 = a.iter().map(|&a| i32::from(a)).sum();
                let at = g * PANEL_ROWS + r;
                let a_scale = x.scale[t * (x.stride / 32) + g * group / 32];
                let min = if panel.has_min { panel.min[at] * sum as f32 } else { 0.0 };
                *acc += a_scale * (panel.scale[at] * product as f32 + min);
            }
        }
    }
}
