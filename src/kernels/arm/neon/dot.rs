//! One token: dot products of weight rows, read in place, with one row of activations; and the
//! unpacking of rows for `gemm`, from the same block readers.
//!
//! What multiplies is compiled by [`instantiate!`] once for each way to multiply.

use std::arch::aarch64::*;

use super::blocks::{self, Block, Super};
use crate::gguf::GgmlType;
use crate::kernels::Q8Row;

/// Rows that go through the blocks together: they share the loads of the activations, and their
/// independent sums hide the latency of the adds.
pub(in crate::kernels::arm) const ROWS: usize = 4;

/// Activations for a [`Block`]: in the first lane of `start` the integer sum begins at `-zero * sum`,
/// in that of `sum` is `scale * sum`.
pub(in crate::kernels::arm) struct Acts {
    pub q: [int8x16_t; 2],
    pub start: int32x4_t,
    pub scale: f32,
    pub sum: float32x4_t,
}

/// Activations for a [`Super`]: likewise, with starts, scales and sums by group, as in [`Super`].
pub(in crate::kernels::arm) struct Acts256 {
    pub q: [int8x16_t; 16],
    pub start: [int32x4_t; 16],
    pub scale: [f32; 16],
    pub sum: [f32; 16],
}

#[inline]
#[target_feature(enable = "neon")]
fn load_q(x: &Q8Row<'_>, at: usize) -> int8x16_t {
    let q: &[i8; 16] = x.q[at..].first_chunk().expect("rows of activations are padded");
    // SAFETY: 16 readable bytes.
    unsafe { vld1q_s8(q.as_ptr()) }
}

#[inline]
#[target_feature(enable = "neon")]
pub(in crate::kernels::arm) fn load4(f: &[f32; 4]) -> float32x4_t {
    // SAFETY: four readable floats.
    unsafe { vld1q_f32(f.as_ptr()) }
}

#[inline]
#[target_feature(enable = "neon")]
pub(in crate::kernels::arm) fn acts<const ZERO: i32>(x: &Q8Row<'_>, step: usize) -> Acts {
    let (scale, sum) = (x.scale[step], x.sum[2 * step] + x.sum[2 * step + 1]);
    Acts {
        q: [load_q(x, 32 * step), load_q(x, 32 * step + 16)],
        start: vsetq_lane_s32::<0>(-ZERO * sum, vdupq_n_s32(0)),
        scale,
        sum: vsetq_lane_f32::<0>(scale * sum as f32, vdupq_n_f32(0.0)),
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn load_q16(x: &Q8Row<'_>, at: usize) -> [int8x16_t; 16] {
    let mut q = [vdupq_n_s8(0); 16];
    for (i, q) in q.iter_mut().enumerate() {
        *q = load_q(x, at + 16 * i);
    }
    q
}

/// For groups of 32, none of which has a zero point.
#[inline]
#[target_feature(enable = "neon")]
pub(in crate::kernels::arm) fn acts_groups32(x: &Q8Row<'_>, step: usize) -> Acts256 {
    let (scales, sums) = (&x.scale[8 * step..][..8], &x.sum[16 * step..][..16]);
    let (mut scale, mut sum) = ([0.0; 16], [0.0; 16]);
    for g in 0..8 {
        scale[g] = scales[g];
        sum[g] = scales[g] * (sums[2 * g] + sums[2 * g + 1]) as f32;
    }
    Acts256 { q: load_q16(x, 256 * step), start: [vdupq_n_s32(0); 16], scale, sum }
}

/// For groups of 16.
#[inline]
#[target_feature(enable = "neon")]
pub(in crate::kernels::arm) fn acts_groups16<const ZERO: i32>(x: &Q8Row<'_>, step: usize) -> Acts256 {
    let (scales, sums) = (&x.scale[8 * step..][..8], &x.sum[16 * step..][..16]);
    let (mut scale, mut sum, mut start) = ([0.0; 16], [0.0; 16], [vdupq_n_s32(0); 16]);
    for g in 0..16 {
        scale[g] = scales[g / 2];
        sum[g] = scale[g] * sums[g] as f32;
        start[g] = vsetq_lane_s32::<0>(-ZERO * sums[g], vdupq_n_s32(0));
    }
    Acts256 { q: load_q16(x, 256 * step), start, scale, sum }
}

/// A function that multiplies rows of one type, `$bytes` bytes a step: `$acts(x, step)` prepares the
/// activations and `$step(bytes, acts, acc)` adds their products.
macro_rules! dot_rows {
    ($features:literal, $name:ident, $bytes:literal, $acts:expr, $step:expr) => {
        #[target_feature(enable = $features)]
        fn $name<'w, W: WeightRows<'w>>(w: W, x: Q8Row<'_>, out: &mut [f32]) {
            #[inline]
            #[target_feature(enable = $features)]
            fn rows<const R: usize>(rows: [&[u8]; R], x: &Q8Row<'_>) -> [f32; R] {
                // A step is a block, so that none is left over.
                let steps = rows.map(|r| r.as_chunks::<$bytes>().0);
                let mut acc = [vdupq_n_f32(0.0); R];
                for s in 0..steps[0].len() {
                    let a = $acts(x, s);
                    for r in 0..R {
                        acc[r] = $step(&steps[r][s], &a, acc[r]);
                    }
                }
                acc.map(|acc| vaddvq_f32(acc))
            }
            for (group, out) in out.chunks_mut(ROWS).enumerate() {
                if let Ok(out) = <&mut [f32; ROWS]>::try_from(&mut *out) {
                    *out = rows(std::array::from_fn(|r| w.row(group * ROWS + r)), &x);
                } else {
                    for (r, out) in out.iter_mut().enumerate() {
                        [*out] = rows([w.row(group * ROWS + r)], &x);
                    }
                }
            }
        }
    };
}
pub(in crate::kernels::arm) use dot_rows;

/// The functions `dot` and `dot_listed` (see `Kernels`), compiled with `$features` and multiplying with the
/// functions of the module `$multiply`.
macro_rules! instantiate {
    ($features:literal, $multiply:path) => {
        #[target_feature(enable = $features)]
        pub(in crate::kernels::arm) fn dot(
            ty: GgmlType,
            weights: &[u8],
            row_bytes: usize,
            x: Q8Row<'_>,
            out: &mut [f32],
        ) {
            dot_rows(ty, $crate::kernels::rows::Consecutive { weights, row_bytes }, x, out);
        }

        #[target_feature(enable = $features)]
        pub(in crate::kernels::arm) fn dot_listed(
            ty: GgmlType,
            w: $crate::kernels::rows::Listed<'_>,
            x: Q8Row<'_>,
            out: &mut [f32],
        ) {
            dot_rows(ty, w, x, out);
        }

        #[target_feature(enable = $features)]
        fn dot_rows<'w, W: $crate::kernels::rows::WeightRows<'w>>(
            ty: GgmlType,
            w: W,
            x: Q8Row<'_>,
            out: &mut [f32],
        ) {
            use GgmlType::*;
            use $crate::kernels::arm::neon::blocks::{self, Block, Super};
            use $crate::kernels::arm::neon::dot::*;
            use $crate::kernels::rows::WeightRows;
            use $multiply as multiply;

            #[inline]
            #[target_feature(enable = $features)]
            fn step<const MIN: bool>(w: &Block, a: &Acts, acc: float32x4_t) -> float32x4_t {
                let sum = vcvtq_f32_s32(multiply::dot2(a.start, w.q, a.q));
                let acc = vfmaq_n_f32(acc, sum, w.scale * a.scale);
                if MIN { vfmaq_n_f32(acc, a.sum, w.min) } else { acc }
            }

            /// For weights of 8 bits.
            #[inline]
            #[target_feature(enable = $features)]
            fn step_wide(w: &Block, a: &Acts, acc: float32x4_t) -> float32x4_t {
                let sum = multiply::dot(multiply::dot(a.start, w.q[0], a.q[0]), w.q[1], a.q[1]);
                vfmaq_n_f32(acc, vcvtq_f32_s32(sum), w.scale * a.scale)
            }

            #[inline]
            #[target_feature(enable = $features)]
            fn add_mins<const GROUPS: usize>(w: &Super, a: &Acts256, mut acc: float32x4_t) -> float32x4_t {
                let (min, sum) = (w.min.as_chunks().0, a.sum.as_chunks().0);
                for i in 0..GROUPS / 4 {
                    acc = vfmaq_f32(acc, load4(&min[i]), load4(&sum[i]));
                }
                acc
            }

            #[inline]
            #[target_feature(enable = $features)]
            fn step_groups32(w: &Super, a: &Acts256, mut acc: float32x4_t) -> float32x4_t {
                for g in 0..8 {
                    let (w_q, a_q) = ([w.q[2 * g], w.q[2 * g + 1]], [a.q[2 * g], a.q[2 * g + 1]]);
                    let sum = vcvtq_f32_s32(multiply::dot2(a.start[g], w_q, a_q));
                    acc = vfmaq_n_f32(acc, sum, w.scale[g] * a.scale[g]);
                }
                add_mins::<8>(w, a, acc)
            }

            #[inline]
            #[target_feature(enable = $features)]
            fn step_groups16<const MIN: bool>(w: &Super, a: &Acts256, mut acc: float32x4_t) -> float32x4_t {
                for g in 0..16 {
                    let sum = vcvtq_f32_s32(multiply::dot(a.start[g], w.q[g], a.q[g]));
                    acc = vfmaq_n_f32(acc, sum, w.scale[g] * a.scale[g]);
                }
                if MIN { add_mins::<16>(w, a, acc) } else { acc }
            }

            #[inline]
            #[target_feature(enable = $features)]
            fn step_iq4_xs(w: &Super, a: &Acts256, mut acc: float32x4_t) -> float32x4_t {
                for g in 0..8 {
                    let sum = multiply::dot(a.start[g], w.q[2 * g], a.q[2 * g]);
                    let sum = multiply::dot(sum, w.q[2 * g + 1], a.q[2 * g + 1]);
                    acc = vfmaq_n_f32(acc, vcvtq_f32_s32(sum), w.scale[g] * a.scale[g]);
                }
                acc
            }

            dot_rows!($features, dot_q8_0, 34, acts::<0>, |b, a, acc| step_wide(&blocks::q8_0(b), a, acc));
            dot_rows!($features, dot_iq4_nl, 18, acts::<0>, |b, a, acc| step_wide(
                &blocks::iq4_nl(b),
                a,
                acc
            ));
            dot_rows!($features, dot_q4_0, 18, acts::<8>, |b, a, acc| step::<false>(
                &blocks::q4_0(b),
                a,
                acc
            ));
            dot_rows!($features, dot_q4_1, 20, acts::<0>, |b, a, acc| step::<true>(&blocks::q4_1(b), a, acc));
            dot_rows!($features, dot_q5_0, 22, acts::<16>, |b, a, acc| step::<false>(
                &blocks::q5_0(b),
                a,
                acc
            ));
            dot_rows!($features, dot_q5_1, 24, acts::<0>, |b, a, acc| step::<true>(&blocks::q5_1(b), a, acc));
            dot_rows!($features, dot_q2_k, 84, acts_groups16::<0>, |b, a, acc| step_groups16::<true>(
                &blocks::q2_k(b),
                a,
                acc
            ));
            dot_rows!($features, dot_q3_k, 110, acts_groups16::<4>, |b, a, acc| step_groups16::<false>(
                &blocks::q3_k(b),
                a,
                acc
            ));
            dot_rows!($features, dot_q4_k, 144, acts_groups32, |b, a, acc| step_groups32(
                &blocks::q4_k(b),
                a,
                acc
            ));
            dot_rows!($features, dot_q5_k, 176, acts_groups32, |b, a, acc| step_groups32(
                &blocks::q5_k(b),
                a,
                acc
            ));
            dot_rows!($features, dot_q6_k, 210, acts_groups16::<32>, |b, a, acc| step_groups16::<false>(
                &blocks::q6_k(b),
                a,
                acc
            ));
            dot_rows!($features, dot_iq4_xs, 136, acts_groups32, |b, a, acc| step_iq4_xs(
                &blocks::iq4_xs(b),
                a,
                acc
            ));

            match ty {
                Q8_0 => dot_q8_0(w, x, out),
                Q4_0 => dot_q4_0(w, x, out),
                Q4_1 => dot_q4_1(w, x, out),
                Q5_0 => dot_q5_0(w, x, out),
                Q5_1 => dot_q5_1(w, x, out),
                Q2_K => dot_q2_k(w, x, out),
                Q3_K => dot_q3_k(w, x, out),
                Q4_K => dot_q4_k(w, x, out),
                Q5_K => dot_q5_k(w, x, out),
                Q6_K => dot_q6_k(w, x, out),
                IQ4_NL => dot_iq4_nl(w, x, out),
                IQ4_XS => dot_iq4_xs(w, x, out),
                F32 | F16 | BF16 => unreachable!("unquantised types have kernels of their own"),
            }
        }
    };
}
pub(in crate::kernels::arm) use instantiate;

#[inline]
#[target_feature(enable = "neon")]
fn store(q: &mut [u8], at: usize, y: int8x16_t) {
    let q: &mut [u8; 16] = q[at..].first_chunk_mut().expect("room for the block");
    // SAFETY: 16 writable bytes.
    unsafe { vst1q_s8(q.as_mut_ptr().cast(), y) };
}

/// Blocks of 32; `FLIP` is exclusive-ored to every byte: 0x80 turns signed to unsigned, 128 added.
#[inline]
#[target_feature(enable = "neon")]
fn unpack32<const BYTES: usize, const FLIP: u8>(
    bytes: &[u8],
    q: &mut [u8],
    scale: &mut [f32],
    min: &mut [f32],
    read: impl Fn(&[u8; BYTES]) -> Block,
) {
    for (i, b) in bytes.as_chunks::<BYTES>().0.iter().enumerate() {
        let w = read(b);
        for h in 0..2 {
            store(q, 32 * i + 16 * h, veorq_s8(w.q[h], vdupq_n_s8(FLIP as i8)));
        }
        scale[i] = w.scale;
        min[i] = w.min;
    }
}

/// Superblocks of 256 in `GROUPS` groups; `FLIP` as above.
#[inline]
#[target_feature(enable = "neon")]
fn unpack256<const BYTES: usize, const GROUPS: usize, const FLIP: u8>(
    bytes: &[u8],
    q: &mut [u8],
    scale: &mut [f32],
    min: &mut [f32],
    read: impl Fn(&[u8; BYTES]) -> Super,
) {
    for (s, b) in bytes.as_chunks::<BYTES>().0.iter().enumerate() {
        let w = read(b);
        for (i, y) in w.q.into_iter().enumerate() {
            store(q, 256 * s + 16 * i, veorq_s8(y, vdupq_n_s8(FLIP as i8)));
        }
        scale[s * GROUPS..][..GROUPS].copy_from_slice(&w.scale[..GROUPS]);
        min[s * GROUPS..][..GROUPS].copy_from_slice(&w.min[..GROUPS]);
    }
}

/// See `quant::unpack_row`, with which the results are identical.
#[target_feature(enable = "neon")]
pub(in crate::kernels::arm) fn unpack(
    ty: GgmlType,
    b: &[u8],
    q: &mut [u8],
    scale: &mut [f32],
    min: &mut [f32],
) {
    use GgmlType::*;
    match ty {
        Q8_0 => unpack32::<34, 0x80>(b, q, scale, min, |b| blocks::q8_0(b)),
        Q4_0 => unpack32::<18, 0>(b, q, scale, min, |b| blocks::q4_0(b)),
        Q4_1 => unpack32::<20, 0>(b, q, scale, min, |b| blocks::q4_1(b)),
        Q5_0 => unpack32::<22, 0>(b, q, scale, min, |b| blocks::q5_0(b)),
        Q5_1 => unpack32::<24, 0>(b, q, scale, min, |b| blocks::q5_1(b)),
        IQ4_NL => unpack32::<18, 0x80>(b, q, scale, min, |b| blocks::iq4_nl(b)),
        Q2_K => unpack256::<84, 16, 0>(b, q, scale, min, |b| blocks::q2_k(b)),
        Q3_K => unpack256::<110, 16, 0>(b, q, scale, min, |b| blocks::q3_k(b)),
        Q4_K => unpack256::<144, 8, 0>(b, q, scale, min, |b| blocks::q4_k(b)),
        Q5_K => unpack256::<176, 8, 0>(b, q, scale, min, |b| blocks::q5_k(b)),
        Q6_K => unpack256::<210, 16, 0>(b, q, scale, min, |b| blocks::q6_k(b)),
        IQ4_XS => unpack256::<136, 8, 0x80>(b, q, scale, min, |b| blocks::iq4_xs(b)),
        F32 | F16 | BF16 => unreachable!("unquantised types have kernels of their own"),
    }
}
