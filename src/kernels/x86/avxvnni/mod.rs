//! AVX-VNNI: the source of `avx2`, compiled with `vpdpbusd`, which adds four products of unsigned and
//! signed bytes to each 32-bit lane exactly.

use std::arch::x86_64::*;
use std::ops::Range;

use crate::kernels::columns::Chosen;
use crate::kernels::x86::{attention, avx2};
use crate::kernels::{Functions, Isa, Panel, Q8Rows};
use crate::quant::columns::ColumnStrip;

pub(in crate::kernels) static ISA: Isa = Isa {
    name: "avxvnni",
    needs: "AVX-VNNI with AVX2, FMA and F16C",
    detect: || avx2::detect() && is_x86_feature_detected!("avxvnni"),
    functions: Functions {
        quantize: avx2::quantize,
        dot: avx2::dot::dot,
        dot_listed: avx2::dot::dot_listed,
        dot_tokens: Some(avx2::dot::dot_tokens),
        panels_from: crate::kernels::FEW_TOKENS + 1,
        unpack: avx2::unpack::unpack,
        interleave: avx2::gemm::interleave,
        gemm,
        columns,
        float: &avx2::FLOAT,
        decode_attention: &avx2::DECODE_ATTENTION,
        tiles: None,
        attention: Some(&ATTENTION),
    },
};

avx2::columns::instantiate!("avx2,fma,f16c,avxvnni", crate::kernels::x86::avxvnni::dpbusd);
avx2::gemm::instantiate!("avx2,fma,f16c,avxvnni", crate::kernels::x86::avxvnni::dpbusd);
attention::instantiate!(crate::kernels::x86::avxvnni::dpwssd, "avx2,fma,avxvnni");

/// The functions of `avx2::maddubs` in one step: products go to the sum of 32 bits at once.
macro_rules! dpbusd {
    ($features:literal, $instruction:ident, $encoding:literal) => {
        mod dpbusd {
            use std::arch::asm;
            use std::arch::x86_64::*;

            pub const MAX: u8 = 255;
            /// Without sums of 16 bits more tokens fit the registers.
            pub const TOKENS: usize = 6;

            #[inline]
            #[target_feature(enable = $features)]
            pub fn open(sum: __m256i) -> __m256i {
                sum
            }

            #[inline]
            #[target_feature(enable = $features)]
            pub fn add(sum: __m256i, w: __m256i, a: __m256i) -> __m256i {
                $instruction(sum, w, a)
            }

            #[inline]
            #[target_feature(enable = $features)]
            pub fn close(_sum: __m256i, sum: __m256i) -> __m256i {
                sum
            }

            /// # Safety
            /// Four bytes can be read at `a` + `at`.
            #[inline]
            #[target_feature(enable = $features)]
            pub unsafe fn add4(dots: &mut [__m256i; 2], w: [__m256i; 2], (a, at): (*const i8, usize)) {
                let _four: __m256i;
                // SAFETY: reads four bytes, as the caller promises, and changes nothing but its outputs.
                unsafe {
                    asm!(
                        "vpbroadcastd {four}, dword ptr [{a} + {at}]",
                        concat!($encoding, "vpdpbusd {dots0}, {w0}, {four}"),
                        concat!($encoding, "vpdpbusd {dots1}, {w1}, {four}"),
                        four = out(ymm_reg) _four,
                        dots0 = inout(ymm_reg) dots[0],
                        dots1 = inout(ymm_reg) dots[1],
                        w0 = in(ymm_reg) w[0],
                        w1 = in(ymm_reg) w[1],
                        a = in(reg) a,
                        at = in(reg) at,
                        options(readonly, nostack, preserves_flags),
                    );
                }
            }

            /// # Safety
            /// Eight bytes can be read at `a` + `at`.
            #[inline]
            #[target_feature(enable = $features)]
            pub unsafe fn add8(
                dots: &mut [__m256i; 2],
                [w, v]: [[__m256i; 2]; 2],
                (a, at): (*const i8, usize),
            ) {
                // SAFETY: eight bytes, as the caller promises.
                unsafe {
                    add4(dots, w, (a, at));
                    add4(dots, v, (a, at + 4));
                }
            }

            /// # Safety
            /// None: no byte is too great to be multiplied unsigned.
            pub unsafe fn add4_signed(
                _: &mut [__m256i; 2],
                _: [__m256i; 2],
                _: [__m256i; 2],
                _: (*const i8, usize),
            ) {
                unreachable!("no weight is greater than MAX")
            }
        }
    };
}

dpbusd!("avx2,avxvnni", _mm256_dpbusd_avx_epi32, "{{vex}} ");

/// The vectors of `avx2::attention` with products of pairs of words in one step.
macro_rules! dpwssd {
    ($features:literal, $instruction:ident) => {
        mod dpwssd {
            use std::arch::x86_64::*;

            pub use crate::kernels::x86::avx2::attention::lanes::*;

            /// `sums + a b`, of both numbers of each pair.
            #[inline]
            #[target_feature(enable = $features)]
            pub fn add_products(sums: I, a: I, b: I) -> I {
                [$instruction(sums[0], a[0], b[0]), $instruction(sums[1], a[1], b[1])]
            }
        }
    };
}

dpwssd!("avxvnni", _mm256_dpwssd_avx_epi32);

/// The same with the EVEX encoding of the instruction, so that the source of this row is also tested
/// on the CPUs with AVX-512 that lack AVX-VNNI.
#[cfg(test)]
pub(in crate::kernels) mod evex {
    use super::*;

    pub static ISA: Isa = Isa {
        name: "avx512vl",
        needs: "AVX-512 VL with VNNI (tests only)",
        detect: || {
            avx2::detect() && is_x86_feature_detected!("avx512vl") && is_x86_feature_detected!("avx512vnni")
        },
        functions: Functions {
            quantize: avx2::quantize,
            dot: avx2::dot::dot,
            dot_listed: avx2::dot::dot_listed,
            dot_tokens: Some(avx2::dot::dot_tokens),
            panels_from: crate::kernels::FEW_TOKENS + 1,
            unpack: avx2::unpack::unpack,
            interleave: avx2::gemm::interleave,
            gemm,
            columns,
            float: &avx2::FLOAT,
            decode_attention: &avx2::DECODE_ATTENTION,
            tiles: None,
            attention: Some(&ATTENTION),
        },
    };

    avx2::columns::instantiate!(
        "avx2,fma,f16c,avx512vl,avx512vnni",
        crate::kernels::x86::avxvnni::evex::dpbusd
    );
    avx2::gemm::instantiate!("avx2,fma,f16c,avx512vl,avx512vnni", crate::kernels::x86::avxvnni::evex::dpbusd);
    attention::instantiate!(crate::kernels::x86::avxvnni::evex::dpwssd, "avx2,fma,avx512vl,avx512vnni");
    dpbusd!("avx2,avx512vl,avx512vnni", _mm256_dpbusd_epi32, "");
    dpwssd!("avx512vl,avx512vnni", _mm256_dpwssd_epi32);
}
