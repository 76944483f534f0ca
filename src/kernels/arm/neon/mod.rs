//! NEON, which every aarch64 CPU has. Byte products are widened to 16 bits, where a few of them are
//! summed up before they are widened again: see [`widening`] for why no sum overflows.
//!
//! `dotprod` is compiled from the same source with another `multiply`.

pub(super) mod blocks;
pub(super) mod columns;
pub(super) mod dot;
pub(super) mod gemm;

use std::arch::aarch64::*;
use std::ops::Range;

use crate::gguf::GgmlType;
use crate::kernels::columns::Chosen;
use crate::kernels::float::instantiate;
use crate::kernels::{Functions, Isa, Panel, Q8Row, Q8Rows};
use crate::quant::columns::ColumnStrip;

pub(in crate::kernels) static ISA: Isa = Isa {
    name: "neon",
    needs: "NEON",
    detect: || std::arch::is_aarch64_feature_detected!("neon"),
    functions: Functions {
        quantize,
        dot,
        dot_listed,
        dot_tokens: None,
        panels_from: crate::kernels::FEW_TOKENS + 1,
        unpack: dot::unpack,
        interleave: gemm::interleave,
        gemm,
        columns,
        float: &FLOAT,
        decode_attention: &DECODE_ATTENTION,
        tiles: None,
        attention: None,
    },
};

dot::instantiate!("neon", crate::kernels::arm::neon::widening);
columns::instantiate!("neon", crate::kernels::arm::neon::widening);
gemm::instantiate!("neon", crate::kernels::arm::neon::widening);

/// Byte products by way of 16-bit sums. Weights are -128..=127, activations -127..=127.
mod widening {
    use std::arch::aarch64::*;
    use std::arch::asm;

    /// Adds to each lane of `sum` four products. Two at a time share a 16-bit lane:
    /// 2 * 128 * 127 = 32512 fits.
    #[inline]
    #[target_feature(enable = "neon")]
    pub fn dot(sum: int32x4_t, w: int8x16_t, a: int8x16_t) -> int32x4_t {
        let low = vmull_s8(vget_low_s8(w), vget_low_s8(a));
        vpadalq_s16(sum, vmlal_high_s8(low, w, a))
    }

    /// Twice [`dot`] for weights of up to 63: 4 * 63 * 127 = 32004 fits 16 bits.
    #[inline]
    #[target_feature(enable = "neon")]
    pub fn dot2(sum: int32x4_t, w: [int8x16_t; 2], a: [int8x16_t; 2]) -> int32x4_t {
        let one = vmlal_high_s8(vmull_s8(vget_low_s8(w[0]), vget_low_s8(a[0])), w[0], a[0]);
        let two = vmlal_s8(one, vget_low_s8(w[1]), vget_low_s8(a[1]));
        vpadalq_s16(sum, vmlal_high_s8(two, w[1], a[1]))
    }

    /// Registers of four rows in the micro-kernel of `gemm`.
    pub const QUADS: usize = 2;
    /// Tokens in it: 16 sums of 16 bits, of 32 registers.
    pub const TOKENS: usize = 4;
    /// Lanes in that of `columns`: 8 codes each, and for them 16 sums of 16 bits.
    pub const LANES: usize = 1;

    /// Sums of pairs of columns: rows 0 and 1, rows 2 and 3.
    pub type Sum = [int32x4_t; 2];
    /// The same in 16 bits, of single columns, as long as they fit.
    pub type Run = [int16x8_t; 2];

    #[inline]
    #[target_feature(enable = "neon")]
    pub fn zero() -> Sum {
        [vdupq_n_s32(0); 2]
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub fn open(_sum: Sum) -> Run {
        [vdupq_n_s16(0); 2]
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub fn add(run: Run, w: int8x16_t, a: int8x16_t) -> Run {
        [vmlal_s8(run[0], vget_low_s8(w), vget_low_s8(a)), mlal_high(run[1], w, a)]
    }

    /// `vmlal_high_s8`, which is compiled to two instructions where both halves of `a` are known to be the same.
    #[inline]
    #[target_feature(enable = "neon")]
    fn mlal_high(mut sum: int16x8_t, w: int8x16_t, a: int8x16_t) -> int16x8_t {
        // SAFETY: an instruction of this function's features that touches registers only.
        unsafe {
            asm!(
                "smlal2 {sum:v}.8h, {w:v}.16b, {a:v}.16b",
                sum = inout(vreg) sum,
                w = in(vreg) w,
                a = in(vreg) a,
                options(pure, nomem, nostack, preserves_flags)
            );
        }
        sum
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub fn close(sum: Sum, run: Run) -> Sum {
        [vpadalq_s16(sum[0], run[0]), vpadalq_s16(sum[1], run[1])]
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub fn finish(sum: Sum) -> int32x4_t {
        vpaddq_s32(sum[0], sum[1])
    }
}

crate::kernels::decode_attention::instantiate!(crate::kernels::arm::neon::floats, ["neon"]);

/// Vectors of attention.
mod floats {
    use std::arch::aarch64::*;
    use std::arch::asm;

    pub const LANES: usize = 8;
    pub type V = [float32x4_t; 2];

    #[inline]
    #[target_feature(enable = "neon")]
    pub fn zero() -> V {
        [vdupq_n_f32(0.0); 2]
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub fn splat(x: f32) -> V {
        [vdupq_n_f32(x); 2]
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub fn load(from: &[f32; LANES]) -> V {
        // SAFETY: 32 readable bytes.
        unsafe { [vld1q_f32(from.as_ptr()), vld1q_f32(from.as_ptr().add(4))] }
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub fn widen(from: &[u16; LANES]) -> V {
        // SAFETY: 16 readable bytes; the load has no alignment beyond that of its elements.
        let half = unsafe { vld1q_u16(from.as_ptr()) };
        let (low, high): (float32x4_t, float32x4_t);
        // SAFETY: two instructions of the baseline that touch registers only.
        unsafe {
            asm!(
                "fcvtl {low:v}.4s, {half:v}.4h",
                "fcvtl2 {high:v}.4s, {half:v}.8h",
                low = out(vreg) low,
                high = lateout(vreg) high,
                half = in(vreg) half,
                options(pure, nomem, nostack, preserves_flags)
            );
        }
        [low, high]
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub fn store(v: V, to: &mut [f32; LANES]) {
        // SAFETY: 32 writable bytes.
        unsafe {
            vst1q_f32(to.as_mut_ptr(), v[0]);
            vst1q_f32(to.as_mut_ptr().add(4), v[1]);
        }
    }

    /// `a * b + c`
    #[inline]
    #[target_feature(enable = "neon")]
    pub fn fma(a: V, b: V, c: V) -> V {
        [vfmaq_f32(c[0], a[0], b[0]), vfmaq_f32(c[1], a[1], b[1])]
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub fn sums_of_four(v: [V; 4]) -> [f32; 4] {
        let half = |v: V| vaddq_f32(v[0], v[1]);
        let pairs = [vpaddq_f32(half(v[0]), half(v[1])), vpaddq_f32(half(v[2]), half(v[3]))];
        let mut four = [0f32; 4];
        // SAFETY: 16 writable bytes.
        unsafe { vst1q_f32(four.as_mut_ptr(), vpaddq_f32(pairs[0], pairs[1])) };
        four
    }
}

instantiate!(FLOAT, true, ["neon"], |b: &[u16; 16]| widen16(b));

#[inline]
#[target_feature(enable = "neon")]
fn widen16(bits: &[u16; 16]) -> [f32; 16] {
    let mut wide = [0f32; 16];
    for (bits, wide) in bits.as_chunks().0.iter().zip(wide.as_chunks_mut().0) {
        floats::store(floats::widen(bits), wide);
    }
    wide
}

/// See `scalar::quantize`, with which the results are identical.
#[target_feature(enable = "neon")]
pub(super) fn quantize(x: &[f32], q: &mut [i8], scale: &mut [f32], sum: &mut [i32]) {
    let blocks = x.as_chunks::<32>().0.iter().zip(q.as_chunks_mut::<32>().0);
    for ((x, q), (scale, sum)) in blocks.zip(scale.iter_mut().zip(sum.as_chunks_mut::<2>().0)) {
        // SAFETY: `x` is 32 floats.
        let x: [float32x4_t; 8] = std::array::from_fn(|i| unsafe { vld1q_f32(x.as_ptr().add(4 * i)) });
        // The maximum of numbers: a NaN does not count, as in `f32::max`.
        let mut max = vdupq_n_f32(0.0);
        for x in x {
            max = vmaxnmq_f32(max, vabsq_f32(x));
        }
        let max = vmaxnmvq_f32(max);
        let inverse = if max > 1e-30 { 127.0 / max } else { 0.0 };
        *scale = max / 127.0;
        // Rounded to the nearest, ties to even; NaN becomes 0.
        let n = x.map(|x| vcvtnq_s32_f32(vmulq_n_f32(x, inverse)));
        for h in 0..2 {
            let n = &n[4 * h..][..4];
            let low = vqmovn_high_s32(vqmovn_s32(n[0]), n[1]);
            let high = vqmovn_high_s32(vqmovn_s32(n[2]), n[3]);
            let bytes = vqmovn_high_s16(vqmovn_s16(low), high);
            // Only what is not finite could become -128, for which 16-bit sums have no room.
            let bytes = vmaxq_s8(bytes, vdupq_n_s8(-127));
            sum[h] = i32::from(vaddlvq_s8(bytes));
            // SAFETY: `q` is 32 bytes.
            unsafe { vst1q_s8(q.as_mut_ptr().add(16 * h), bytes) };
        }
    }
}
