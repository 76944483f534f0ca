//! The dot product extension (most CPUs since 2018): the source of `neon`, compiled with `sdot`, which
//! adds four products of signed bytes to each 32-bit lane.

use std::arch::aarch64::*;
use std::ops::Range;

use crate::gguf::GgmlType;
use crate::kernels::arm::neon;
use crate::kernels::columns::Chosen;
use crate::kernels::{Functions, Isa, Panel, Q8Row, Q8Rows};
use crate::quant::columns::ColumnStrip;

pub(in crate::kernels) static ISA: Isa = Isa {
    name: "dotprod",
    needs: "NEON with the dot product extension",
    detect,
    functions: Functions {
        quantize: neon::quantize,
        dot,
        dot_listed,
        dot_tokens: None,
        panels_from: crate::kernels::FEW_TOKENS + 1,
        unpack: neon::dot::unpack,
        interleave: neon::gemm::interleave,
        gemm,
        columns,
        float: &neon::FLOAT,
        decode_attention: &neon::DECODE_ATTENTION,
        tiles: None,
        attention: None,
    },
};

/// Also what `i8mm` builds on.
pub(super) fn detect() -> bool {
    std::arch::is_aarch64_feature_detected!("dotprod")
}

neon::dot::instantiate!("neon,dotprod", crate::kernels::arm::dotprod::sdot);
neon::columns::instantiate!("neon,dotprod", crate::kernels::arm::dotprod::sdot);
neon::gemm::instantiate!("neon,dotprod", crate::kernels::arm::dotprod::sdot);

/// The functions of `neon::widening` in one step: products go to the sum of 32 bits at once.
mod sdot {
    use std::arch::aarch64::*;
    use std::arch::asm;

    /// `vdotq_s32`, which is not stable yet.
    #[inline]
    #[target_feature(enable = "neon,dotprod")]
    pub fn dot(mut sum: int32x4_t, w: int8x16_t, a: int8x16_t) -> int32x4_t {
        // SAFETY: an instruction of this function's features that touches registers only.
        unsafe {
            asm!(
                "sdot {sum:v}.4s, {w:v}.16b, {a:v}.16b",
                sum = inout(vreg) sum,
                w = in(vreg) w,
                a = in(vreg) a,
                options(pure, nomem, nostack, preserves_flags)
            );
        }
        sum
    }

    #[inline]
    #[target_feature(enable = "neon,dotprod")]
    pub fn dot2(sum: int32x4_t, w: [int8x16_t; 2], a: [int8x16_t; 2]) -> int32x4_t {
        dot(dot(sum, w[0], a[0]), w[1], a[1])
    }

    pub const QUADS: usize = 4;
    /// 16 sums, of 32 registers.
    pub const TOKENS: usize = 4;
    pub const LANES: usize = 2;

    pub type Sum = int32x4_t;
    pub type Run = int32x4_t;

    #[inline]
    #[target_feature(enable = "neon")]
    pub fn zero() -> Sum {
        vdupq_n_s32(0)
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub fn open(sum: Sum) -> Run {
        sum
    }

    #[inline]
    #[target_feature(enable = "neon,dotprod")]
    pub fn add(run: Run, w: int8x16_t, a: int8x16_t) -> Run {
        dot(run, w, a)
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub fn close(_sum: Sum, run: Run) -> Sum {
        run
    }

    #[inline]
    #[target_feature(enable = "neon")]
    pub fn finish(sum: Sum) -> int32x4_t {
        sum
    }
}
