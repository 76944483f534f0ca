//! Block structs of the quantised types, scalar quantise and dequantise, and the [`Matrix`] view.
//!
//! No SIMD, no threads, no files: this is the reference that every kernel is tested against.
//!
//! # The common form
//!
//! Every quantised type is, row by row, a sequence of groups of [`group_len`] weights in which
//!
//! ```text
//! weight = scale[group] * (q - zero_point) + min[group]
//! ```
//!
//! with an unsigned 8-bit `q`, a [`zero_point`] fixed by the type, and a `min` only where [`has_min`].
//! [`unpack_row`] brings any type into this form; [`dequantize_row`] is that form evaluated in f32, in the
//! order of operations that ggml uses, so its results have ggml's bits. An integer kernel multiplies the
//! `q` of a group with quantised activations and needs nothing else to know of a type.
//!
//! # A file a family
//!
//! [`block`] has the layouts; `legacy` the types with blocks of 32 (Q8_0, Q4_0, Q4_1, Q5_0, Q5_1);
//! `kquants` those with super-blocks of 256 and quantised scales; `iq4` the two that look their values up
//! in a table; `float` the plain ones.
#![forbid(unsafe_code)]

pub mod block;
pub mod columns;
mod fit;
mod float;
mod iq4;
mod kquants;
mod legacy;
mod matrix;

pub use iq4::KVALUES as IQ4_KVALUES;
pub use matrix::{Matrix, ShapeError};

use crate::gguf::GgmlType::{self, *};

/// Elements of the largest block of any type.
pub const MAX_BLOCK_LEN: usize = 256;

/// Smallest group of any quantised type, so a row of `n` weights has at most `n / MIN_GROUP_LEN` groups.
pub const MIN_GROUP_LEN: usize = 16;

/// Whether the type has the common form of the [module](self): all but F32, F16 and BF16.
pub const fn is_quantised(ty: GgmlType) -> bool {
    !matches!(ty, F32 | F16 | BF16)
}

/// Weights that share one scale (and min): 32, or 16 for Q2_K, Q3_K and Q6_K; 1 for the float types.
pub const fn group_len(ty: GgmlType) -> usize {
    match ty {
        F32 | F16 | BF16 => 1,
        Q2_K | Q3_K | Q6_K => 16,
        _ => 32,
    }
}

/// The `q` that stands for a weight of zero (before `min`); 0 for the float types.
pub const fn zero_point(ty: GgmlType) -> u8 {
    match ty {
        Q4_0 => 8,
        Q5_0 => 16,
        Q3_K => 4,
        Q6_K => 32,
        Q8_0 | IQ4_NL | IQ4_XS => 128,
        F32 | F16 | BF16 | Q4_1 | Q5_1 | Q2_K | Q4_K | Q5_K => 0,
    }
}

/// Whether a group has an offset besides its scale.
pub const fn has_min(ty: GgmlType) -> bool {
    matches!(ty, Q4_1 | Q5_1 | Q2_K | Q4_K | Q5_K)
}

/// How many codes share their two upper bits, of the types whose matrices can be read [coarsely](coarsen): 4 of those of 4
/// bits, 16 of those of 6.
pub const fn coarse_step(ty: GgmlType) -> Option<u8> {
    match ty {
        Q4_0 | Q4_1 | Q4_K => Some(4),
        Q6_K => Some(16),
        _ => None,
    }
}

/// From the common form to what it is by the two upper bits of its codes alone: each code in the middle of those that share
/// them. It has a `min` then and no zero point, whatever the type [has](has_min). Other types than those of [`coarse_step`] are
/// left as they are.
pub fn coarsen(ty: GgmlType, q: &mut [u8], scale: &[f32], min: &mut [f32]) {
    let Some(step) = coarse_step(ty) else { return };
    if !has_min(ty) {
        min.fill(0.0);
    }
    q.iter_mut().for_each(|q| *q &= !(step - 1));
    let above = f32::from(step - 1) / 2.0 - f32::from(zero_point(ty));
    min.iter_mut().zip(scale).for_each(|(min, scale)| *min += above * scale);
}

/// Unpacks one block into the common form. The slices are exactly as long as the block needs, or `q` is empty: then codes are left
/// out.
type UnpackBlock = fn(bytes: &[u8], q: &mut [u8], scale: &mut [f32], min: &mut [f32]);

fn unpack_block(ty: GgmlType) -> UnpackBlock {
    match ty {
        F32 | F16 | BF16 => panic!("{ty} has no quantised form"),
        Q8_0 => legacy::unpack_q8_0,
        Q4_0 => legacy::unpack_q4_0,
        Q4_1 => legacy::unpack_q4_1,
        Q5_0 => legacy::unpack_q5_0,
        Q5_1 => legacy::unpack_q5_1,
        Q2_K => kquants::unpack_q2_k,
        Q3_K => kquants::unpack_q3_k,
        Q4_K => kquants::unpack_q4_k,
        Q5_K => kquants::unpack_q5_k,
        Q6_K => kquants::unpack_q6_k,
        IQ4_NL => iq4::unpack_iq4_nl,
        IQ4_XS => iq4::unpack_iq4_xs,
    }
}

/// Brings a row (or any whole number of blocks) into the common form of the [module](self).
///
/// `min` is written if [`has_min`]`(ty)`, and may be empty otherwise.
///
/// # Panics
/// If `ty` is a float type, or the lengths do not belong together: `bytes` to `q.len()` weights,
/// `scale` (and `min`) to `q.len() / group_len(ty)` groups.
pub fn unpack_row(ty: GgmlType, bytes: &[u8], q: &mut [u8], scale: &mut [f32], min: &mut [f32]) {
    assert_row(ty, bytes.len(), q.len());
    let mut blocks = q.chunks_exact_mut(ty.block_len());
    unpack_blocks(ty, bytes, || blocks.next().unwrap_or_default(), scale, min);
}

/// The scales and minima of [`unpack_row`] alone.
///
/// # Panics
/// As `unpack_row`.
pub fn unpack_scales(ty: GgmlType, bytes: &[u8], scale: &mut [f32], min: &mut [f32]) {
    unpack_blocks(ty, bytes, || &mut [], scale, min);
}

/// Unpacks blocks, the codes of each to what `q` gives next.
fn unpack_blocks<'q>(
    ty: GgmlType,
    bytes: &[u8],
    mut q: impl FnMut() -> &'q mut [u8],
    scale: &mut [f32],
    min: &mut [f32],
) {
    let unpack = unpack_block(ty);
    let (blocks, per_block) = (bytes.chunks_exact(ty.block_bytes()), ty.block_len() / group_len(ty));
    assert_eq!(scale.len(), blocks.len() * per_block, "{ty}: scales of {} blocks", blocks.len());
    if has_min(ty) {
        assert_eq!(min.len(), scale.len(), "{ty}: mins of {} blocks", blocks.len());
    }
    for (i, block) in blocks.enumerate() {
        let g = i * per_block..(i + 1) * per_block;
        let min = if has_min(ty) { &mut min[g.clone()] } else { &mut [] };
        unpack(block, q(), &mut scale[g], min);
    }
}

/// Decodes a row (or any whole number of blocks) to f32, bit by bit as ggml does.
///
/// # Panics
/// If `bytes` is not exactly `out.len()` weights of this type.
pub fn dequantize_row(ty: GgmlType, bytes: &[u8], out: &mut [f32]) {
    assert_row(ty, bytes.len(), out.len());
    match ty {
        F32 => float::decode_f32(bytes, out),
        F16 => float::decode_f16(bytes, out),
        BF16 => float::decode_bf16(bytes, out),
        _ => dequantize_quantised(ty, bytes, out),
    }
}

fn dequantize_quantised(ty: GgmlType, bytes: &[u8], out: &mut [f32]) {
    let unpack = unpack_block(ty);
    let len = ty.block_len();
    let mut q = [0; MAX_BLOCK_LEN];
    let mut scale = [0.0; MAX_BLOCK_LEN / MIN_GROUP_LEN];
    let mut min = [0.0; MAX_BLOCK_LEN / MIN_GROUP_LEN];
    let groups = len / group_len(ty);
    let zero = i32::from(zero_point(ty));
    for (block, out) in bytes.chunks_exact(ty.block_bytes()).zip(out.chunks_exact_mut(len)) {
        unpack(block, &mut q[..len], &mut scale[..groups], &mut min[..groups]);
        for (i, (w, &q)) in out.iter_mut().zip(&q[..len]).enumerate() {
            let g = i / group_len(ty);
            *w = scale[g] * (i32::from(q) - zero) as f32;
            if has_min(ty) {
                *w += min[g]; // never for the others: -0.0 + 0.0 would lose a sign that ggml keeps
            }
        }
    }
}

/// Encodes `src` (a whole number of blocks) as `ty`.
///
/// F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0 and Q5_1 give the bytes of ggml's reference quantisers. The
/// K-quants and the IQ4 types search for the scales that leave the smallest error, as ggml does.
///
/// Values that are not finite make no sense in a block; they give some bytes and never a panic.
///
/// # Panics
/// If `out` is not exactly as long as `src.len()` weights of this type need.
pub fn quantize_row(ty: GgmlType, src: &[f32], out: &mut [u8]) {
    quantize_row_weighed(ty, src, None, out);
}

/// [`quantize_row`], where the error of each weight counts as much as `importance` says (the mean square of the
/// activation that it is multiplied with). The float types and Q8_0 make no use of it.
///
/// # Panics
/// As [`quantize_row`]; if there are not as many importances as weights.
pub fn quantize_row_weighed(ty: GgmlType, src: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    assert_row(ty, out.len(), src.len());
    if let Some(importance) = importance {
        assert_eq!(importance.len(), src.len(), "{ty}: importances of {} weights", src.len());
    }
    match ty {
        F32 => return float::encode_f32(src, out),
        F16 => return float::encode_f16(src, out),
        BF16 => return float::encode_bf16(src, out),
        _ => {}
    }
    let mut weights = [0.0; MAX_BLOCK_LEN];
    let weights = &mut weights[..ty.block_len()];
    let blocks = src.chunks_exact(ty.block_len()).zip(out.chunks_exact_mut(ty.block_bytes()));
    for (i, (src, block)) in blocks.enumerate() {
        let importance = importance.map(|all| &all[i * ty.block_len()..][..ty.block_len()]);
        quantize_block(ty, src, importance, weights, block);
    }
}

/// Encodes one block; `w` has room for the weights of its errors.
fn quantize_block(ty: GgmlType, x: &[f32], importance: Option<&[f32]>, w: &mut [f32], out: &mut [u8]) {
    if ty.block_len() == MAX_BLOCK_LEN || ty == IQ4_NL {
        weigh(x, importance, w); // the others search only where importances are given
    }
    match ty {
        F32 | F16 | BF16 => panic!("{ty} has no blocks"),
        Q8_0 => legacy::quantize_q8_0(x, out),
        Q4_0 => legacy::quantize_q4_0(x, importance, out),
        Q4_1 => legacy::quantize_q4_1(x, importance, out),
        Q5_0 => legacy::quantize_q5_0(x, importance, out),
        Q5_1 => legacy::quantize_q5_1(x, importance, out),
        Q2_K => kquants::quantize_q2_k(x, w, out),
        Q3_K => kquants::quantize_q3_k(x, w, out),
        Q4_K => kquants::quantize_q4_k(x, w, out),
        Q5_K => kquants::quantize_q5_k(x, w, out),
        Q6_K => kquants::quantize_q6_k(x, w, out),
        IQ4_NL => iq4::quantize_iq4_nl(x, w, out),
        IQ4_XS => iq4::quantize_iq4_xs(x, w, out),
    }
}

/// How much the error of each weight of a block counts: its importance, or where that is not known, large weights
/// somewhat more than small ones (docs/quantisation.md has what was tried).
fn weigh(x: &[f32], importance: Option<&[f32]>, w: &mut [f32]) {
    if let Some(importance) = importance {
        return w.copy_from_slice(importance);
    }
    let mean = x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32;
    for (w, x) in w.iter_mut().zip(x) {
        *w = (mean + x * x).sqrt();
    }
}

fn assert_row(ty: GgmlType, bytes: usize, weights: usize) {
    assert!(
        weights.is_multiple_of(ty.block_len()) && bytes == weights / ty.block_len() * ty.block_bytes(),
        "{bytes} bytes are not {weights} weights of {ty}"
    );
}

#[cfg(test)]
mod tests;
