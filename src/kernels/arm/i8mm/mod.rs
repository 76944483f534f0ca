//! The 8-bit matrix multiplication extension: `smmla` multiplies two rows of eight weights with two
//! tokens at once, twice the products of `sdot`. Only `gemm` has use for it: a single token would leave
//! half of each result empty.

use std::arch::aarch64::*;
use std::arch::asm;

use crate::kernels::arm::{dotprod, neon};
use crate::kernels::{Functions, Isa, PANEL_ROWS, Panel, Q8Rows};

pub(in crate::kernels) static ISA: Isa = Isa {
    name: "i8mm",
    needs: "NEON with the dot product and 8-bit matrix multiplication extensions",
    detect: || dotprod::detect() && std::arch::is_aarch64_feature_detected!("i8mm"),
    functions: Functions {
        quantize: neon::quantize,
        dot: dotprod::dot,
        dot_listed: dotprod::dot_listed,
        dot_tokens: None,
        panels_from: crate::kernels::FEW_TOKENS + 1,
        unpack: neon::dot::unpack,
        interleave: neon::gemm::interleave,
        gemm,
        columns: dotprod::columns,
        float: &neon::FLOAT,
        decode_attention: &neon::DECODE_ATTENTION,
        tiles: None,
        attention: None,
    },
};

/// Rows in the micro-kernel.
const ROWS: usize = 8;
/// Pairs of tokens in it: with four pairs of rows 12 sums, of 32 registers.
const PAIRS: usize = 3;

/// `vmmlaq_s32`, which is not stable yet: `w` is two rows of eight, `a` two tokens; the sums are those
/// of row 0 with tokens 0 and 1, then of row 1.
#[inline]
#[target_feature(enable = "neon,i8mm")]
fn smmla(mut sum: int32x4_t, w: int8x16_t, a: int8x16_t) -> int32x4_t {
    // SAFETY: an instruction of this function's features that touches registers only.
    unsafe {
        asm!(
            "smmla {sum:v}.4s, {w:v}.16b, {a:v}.16b",
            sum = inout(vreg) sum,
            w = in(vreg) w,
            a = in(vreg) a,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sum
}

/// See `Kernels::gemm`.
#[target_feature(enable = "neon,i8mm")]
fn gemm(panel: &Panel, x: Q8Rows<'_>, acc: &mut [f32]) {
    let mut t = 0;
    while t < x.rows {
        let n = (x.rows - t).min(2 * PAIRS);
        let acc = &mut acc[t * PANEL_ROWS..][..n * PANEL_ROWS];
        match n.div_ceil(2) {
            3 => tokens::<3>(panel, x, t, acc),
            2 => tokens::<2>(panel, x, t, acc),
            _ => tokens::<1>(panel, x, t, acc),
        }
        t += n;
    }
}

#[inline]
#[target_feature(enable = "neon,i8mm")]
fn tokens<const P: usize>(panel: &Panel, x: Q8Rows<'_>, t: usize, acc: &mut [f32]) {
    match (panel.group_len, panel.has_min) {
        _ if panel.max > 63 => {
            // The signed form has no minimum, and 128 subtracted is the high bit flipped.
            assert!(panel.zero == 128 && panel.group_len == 32 && !panel.has_min);
            kernel::<P, 32, false, true>(panel, x, t, acc)
        }
        (32, false) => kernel::<P, 32, false, false>(panel, x, t, acc),
        (32, true) => kernel::<P, 32, true, false>(panel, x, t, acc),
        (_, false) => kernel::<P, 16, false, false>(panel, x, t, acc),
        (_, true) => kernel::<P, 16, true, false>(panel, x, t, acc),
    }
}

/// `P` pairs of tokens from `t` on by 32 rows, in groups of `G` columns. `SIGNED` weights are of 8 bits.
/// `acc` may lack the last token: that before it stands in for it, and the result is dropped.
#[target_feature(enable = "neon,i8mm")]
#[allow(clippy::needless_range_loop)] // an iterator's closures would not be inlined
fn kernel<const P: usize, const G: usize, const MIN: bool, const SIGNED: bool>(
    panel: &Panel,
    x: Q8Rows<'_>,
    t: usize,
    acc: &mut [f32],
) {
    let groups = panel.cols / G;
    let n = acc.len() / PANEL_ROWS;
    let last = t + n - 1;
    assert!(acc.len() == n * PANEL_ROWS && n.div_ceil(2) == P);
    assert!(panel.q.0.len() >= panel.cols * PANEL_ROWS);
    assert!(panel.scale.len() >= groups * PANEL_ROWS && panel.min.len() >= groups * PANEL_ROWS);
    assert!(last * x.stride + panel.cols <= x.q.len());
    assert!(last * (x.stride / 32) + panel.cols / 32 <= x.scale.len());
    assert!(last * (x.stride / 16) + panel.cols / 16 <= x.sum.len());
    let zero = -i32::from(panel.zero);
    let flip = vdupq_n_s8(-128);
    // SAFETY: every offset below is within the lengths just asserted: token `t + i` with `i < n`,
    // column below `panel.cols`, group below `groups`, 32 rows a group of the panel and of `acc`.
    unsafe {
        let q = x.q.as_ptr().add(t * x.stride);
        let scale = x.scale.as_ptr().add(t * (x.stride / 32));
        let sum = x.sum.as_ptr().add(t * (x.stride / 16));
        for row in (0..PANEL_ROWS).step_by(ROWS) {
            for g in 0..groups {
                let mut dots = [[vdupq_n_s32(0); ROWS / 2]; P];
                for eight in 0..G / 8 {
                    let col = g * G + eight * 8;
                    let mut w = [flip; ROWS / 2];
                    for j in 0..ROWS / 4 {
                        // Two column groups of four rows, to eight columns of two rows twice.
                        let at = panel.q.0.as_ptr().add((col / 4 * PANEL_ROWS + row + 4 * j) * 4);
                        let low = vld1q_s32(at.cast());
                        let high = vld1q_s32(at.add(PANEL_ROWS * 4).cast());
                        w[2 * j] = vreinterpretq_s8_s32(vzip1q_s32(low, high));
                        w[2 * j + 1] = vreinterpretq_s8_s32(vzip2q_s32(low, high));
                    }
                    if SIGNED {
                        for w in &mut w {
                            *w = veorq_s8(*w, flip);
                        }
                    }
                    for p in 0..P {
                        let one = vld1_s8(q.add(2 * p * x.stride + col));
                        let two = vld1_s8(q.add((2 * p + 1).min(n - 1) * x.stride + col));
                        let a = vcombine_s8(one, two);
                        for j in 0..ROWS / 2 {
                            dots[p][j] = smmla(dots[p][j], w[j], a);
                        }
                    }
                }
                let w_scale = panel.scale.as_ptr().add(g * PANEL_ROWS + row);
                let w_min = panel.min.as_ptr().add(g * PANEL_ROWS + row);
                for p in 0..P {
                    for h in 0..2.min(n - 2 * p) {
                        let i = 2 * p + h;
                        let a_scale = *scale.add(i * (x.stride / 32) + g * G / 32);
                        let at = sum.add(i * (x.stride / 16) + g * G / 16);
                        let group_sum = if G == 32 { *at + *at.add(1) } else { *at };
                        for j in 0..ROWS / 4 {
                            let (a, b) = (dots[p][2 * j], dots[p][2 * j + 1]);
                            let mut products = if h == 0 { vuzp1q_s32(a, b) } else { vuzp2q_s32(a, b) };
                            if !MIN && !SIGNED {
                                products = vaddq_s32(products, vdupq_n_s32(zero * group_sum));
                            }
                            let at = acc.as_mut_ptr().add(i * PANEL_ROWS + row + 4 * j);
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
}
