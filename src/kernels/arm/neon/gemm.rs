//! Many tokens: a panel of 32 unpacked weight rows times blocks of activations.
//!
//! The micro-kernel takes a few registers of four rows and a few tokens, with a sum for each pair.
//!
//! Sums of 16 bits, where they are used, are widened once a *run* of column groups of four: each lane
//! takes one product a column group, so weights of up to 6 bits can wait for the end of their group
//! (8 * 31 * 127 for groups of 32, 4 * 63 * 127 for groups of 16) and those of 8 bits can take two
//! (2 * 128 * 127): all below 2^15.

use std::arch::aarch64::*;

use crate::kernels::PANEL_ROWS;

/// `[row][col]` to `[col / 4][row][col % 4]`: 4 x 4 transpositions of four-byte elements.
#[target_feature(enable = "neon")]
pub(in crate::kernels::arm) fn interleave(plain: &[u8], cols: usize, q: &mut [u8]) {
    assert!(plain.len() == PANEL_ROWS * cols && q.len() == plain.len() && cols.is_multiple_of(16));
    for row in (0..PANEL_ROWS).step_by(4) {
        for col in (0..cols).step_by(16) {
            // SAFETY: rows `row..row + 4` have 16 columns from `col` on, and the destination of column
            // group `c` of these rows is 16 bytes inside `q`.
            unsafe {
                let y: [int32x4_t; 4] = std::array::from_fn(|r| {
                    vreinterpretq_s32_u8(vld1q_u8(plain.as_ptr().add((row + r) * cols + col)))
                });
                for (c, y) in transpose4(y).into_iter().enumerate() {
                    let at = ((col / 4 + c) * PANEL_ROWS + row) * 4;
                    vst1q_u8(q.as_mut_ptr().add(at), vreinterpretq_u8_s64(y));
                }
            }
        }
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn transpose4(y: [int32x4_t; 4]) -> [int64x2_t; 4] {
    let even = |a, b| vreinterpretq_s64_s32(vtrn1q_s32(a, b));
    let odd = |a, b| vreinterpretq_s64_s32(vtrn2q_s32(a, b));
    let (a, b) = ([even(y[0], y[1]), odd(y[0], y[1])], [even(y[2], y[3]), odd(y[2], y[3])]);
    [vtrn1q_s64(a[0], b[0]), vtrn1q_s64(a[1], b[1]), vtrn2q_s64(a[0], b[0]), vtrn2q_s64(a[1], b[1])]
}

/// The function `gemm` (see `Kernels::gemm`), compiled with `$features` and multiplying with the
/// functions of the module `$multiply`.
macro_rules! instantiate {
    ($features:literal, $multiply:path) => {
        #[target_feature(enable = $features)]
        fn gemm(panel: &Panel, x: Q8Rows<'_>, acc: &mut [f32]) {
            use $crate::kernels::PANEL_ROWS;
            use $multiply::{self as multiply, QUADS, TOKENS};

            #[inline]
            #[target_feature(enable = $features)]
            fn tokens<const T: usize>(panel: &Panel, x: Q8Rows<'_>, t: usize, acc: &mut [f32]) {
                match (panel.group_len, panel.has_min) {
                    _ if panel.max > 63 => {
                        // The signed form has no minimum, and 128 subtracted is the high bit flipped.
                        assert!(panel.zero == 128 && panel.group_len == 32 && !panel.has_min);
                        kernel::<T, 32, false, true>(panel, x, t, acc)
                    }
                    (32, false) => kernel::<T, 32, false, false>(panel, x, t, acc),
                    (32, true) => kernel::<T, 32, true, false>(panel, x, t, acc),
                    (_, false) => kernel::<T, 16, false, false>(panel, x, t, acc),
                    (_, true) => kernel::<T, 16, true, false>(panel, x, t, acc),
                }
            }

            /// `T` tokens from `t` on by 32 rows, in groups of `G` columns. `SIGNED` weights are of 8 bits.
            #[target_feature(enable = $features)]
            #[allow(clippy::needless_range_loop)] // an iterator's closures would not be inlined
            fn kernel<const T: usize, const G: usize, const MIN: bool, const SIGNED: bool>(
                panel: &Panel,
                x: Q8Rows<'_>,
                t: usize,
                acc: &mut [f32],
            ) {
                let groups = panel.cols / G;
                let last = t + T - 1;
                assert!(acc.len() == T * PANEL_ROWS && panel.q.0.len() >= panel.cols * PANEL_ROWS);
                assert!(panel.scale.len() >= groups * PANEL_ROWS && panel.min.len() >= groups * PANEL_ROWS);
                assert!(last * x.stride + panel.cols <= x.q.len());
                assert!(last * (x.stride / 32) + panel.cols / 32 <= x.scale.len());
                assert!(last * (x.stride / 16) + panel.cols / 16 <= x.sum.len());
                let zero = -i32::from(panel.zero);
                let flip = vdupq_n_s8(if SIGNED { -128 } else { 0 });
                let run_len = if SIGNED { 2 } else { G / 4 };
                // SAFETY: every offset below is within the lengths just asserted: token
                // `t + i < t + T`, column below `panel.cols`, group below `groups`, 32 rows a group of
                // the panel and of `acc`.
                unsafe {
                    let q = x.q.as_ptr().add(t * x.stride);
                    let scale = x.scale.as_ptr().add(t * (x.stride / 32));
                    let sum = x.sum.as_ptr().add(t * (x.stride / 16));
                    for row in (0..PANEL_ROWS).step_by(4 * QUADS) {
                        for g in 0..groups {
                            let mut dots = [[multiply::zero(); QUADS]; T];
                            for run in 0..G / 4 / run_len {
                                let mut sums = [[multiply::open(multiply::zero()); QUADS]; T];
                                for i in 0..T {
                                    for j in 0..QUADS {
                                        sums[i][j] = multiply::open(dots[i][j]);
                                    }
                                }
                                for c in 0..run_len {
                                    let quad = g * (G / 4) + run * run_len + c;
                                    let at = panel.q.0.as_ptr().add((quad * PANEL_ROWS + row) * 4);
                                    let mut w = [flip; QUADS];
                                    for j in 0..QUADS {
                                        w[j] = vld1q_s8(at.add(16 * j).cast());
                                        if SIGNED {
                                            w[j] = veorq_s8(w[j], flip);
                                        }
                                    }
                                    for i in 0..T {
                                        let four = q.add(i * x.stride + quad * 4).cast::<i32>();
                                        let a = vreinterpretq_s8_s32(vdupq_n_s32(four.read_unaligned()));
                                        for j in 0..QUADS {
                                            sums[i][j] = multiply::add(sums[i][j], w[j], a);
                                        }
                                    }
                                }
                                for i in 0..T {
                                    for j in 0..QUADS {
                                        dots[i][j] = multiply::close(dots[i][j], sums[i][j]);
                                    }
                                }
                            }
                            let w_scale = panel.scale.as_ptr().add(g * PANEL_ROWS + row);
                            let w_min = panel.min.as_ptr().add(g * PANEL_ROWS + row);
                            for i in 0..T {
                                let a_scale = *scale.add(i * (x.stride / 32) + g * G / 32);
                                let at = sum.add(i * (x.stride / 16) + g * G / 16);
                                let group_sum = if G == 32 { *at + *at.add(1) } else { *at };
                                for j in 0..QUADS {
                                    let at = acc.as_mut_ptr().add(i * PANEL_ROWS + row + 4 * j);
                                    let mut products = multiply::finish(dots[i][j]);
                                    if !MIN && !SIGNED {
                                        products = vaddq_s32(products, vdupq_n_s32(zero * group_sum));
                                    }
                                    let both = vmulq_n_f32(vld1q_f32(w_scale.add(4 * j)), a_scale);
                                    let mut total = vfmaq_f32(vld1q_f32(at), vcvtq_f32_s32(products), both);
                                    if MIN {
                                        let min = vld1q_f32(w_min.add(4 * j));
                                        total = vfmaq_n_f32(total, min, a_scale * group_sum as f32);
                                    }
                                    vst1q_f32(at, total);
                                }
                            }
                        }
                    }
                }
            }

            const { assert!(TOKENS <= 6 && PANEL_ROWS.is_multiple_of(4 * QUADS)) };
            let mut t = 0;
            while t < x.rows {
                let n = (x.rows - t).min(TOKENS);
                let acc = &mut acc[t * PANEL_ROWS..][..n * PANEL_ROWS];
                match n {
                    6 => tokens::<6>(panel, x, t, acc),
                    5 => tokens::<5>(panel, x, t, acc),
                    4 => tokens::<4>(panel, x, t, acc),
                    3 => tokens::<3>(panel, x, t, acc),
                    2 => tokens::<2>(panel, x, t, acc),
                    _ => tokens::<1>(panel, x, t, acc),
                }
                t += n;
            }
        }
    };
}
pub(in crate::kernels::arm) use instantiate;
