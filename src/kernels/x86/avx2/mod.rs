//! AVX2 with FMA and F16C. Its byte multiplication `maddubs` adds pairs of products of unsigned and
//! signed bytes in 16 bits, with saturation: exact for weights of up to 6 bits, and for signed weights
//! by their magnitude (at most 128: two products of 128 * 127 just fit).
//!
//! `avxvnni` is compiled from the same source with another `multiply`.

pub(super) mod attention;
mod blocks;
pub(super) mod columns;
pub(super) mod dot;
pub(super) mod gemm;
pub(super) mod unpack;

use std::arch::x86_64::*;
use std::ops::Range;

use crate::kernels::columns::Chosen;
use crate::kernels::float::instantiate;
use crate::kernels::{Functions, Isa, Panel, Q8Rows};
use crate::quant::columns::ColumnStrip;

pub(in crate::kernels) static ISA: Isa = Isa {
    name: "avx2",
    needs: "AVX2 with FMA and F16C",
    detect,
    functions: Functions {
        quantize,
        dot: dot::dot,
        dot_listed: dot::dot_listed,
        dot_tokens: Some(dot::dot_tokens),
        panels_from: crate::kernels::FEW_TOKENS + 1,
        unpack: unpack::unpack,
        interleave: gemm::interleave,
        gemm,
        columns,
        float: &FLOAT,
        decode_attention: &DECODE_ATTENTION,
        tiles: None,
        attention: Some(&attention::ATTENTION),
    },
};

/// Also what `avxvnni` builds on.
pub(super) fn detect() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

columns::instantiate!("avx2,fma,f16c", crate::kernels::x86::avx2::maddubs);
gemm::instantiate!("avx2,fma,f16c", crate::kernels::x86::avx2::maddubs);

/// Byte products in two steps: `add` sums them up in 16 bits and `close` adds those sums to a sum of
/// 32 bits, from which [`open`](maddubs::open) began. `gemm` has steps of its own: [`add4`](maddubs::add4) adds the
/// products of four columns of 16 rows with a token's to sums of 16 bits, [`add8`](maddubs::add8) those of eight columns
/// to sums of 32, [`add4_signed`](maddubs::add4_signed) those of four columns of signed weights.
mod maddubs {
    use std::arch::asm;
    use std::arch::x86_64::*;

    /// Weights up to this are multiplied unsigned; beyond, two products might saturate.
    pub const MAX: u8 = 63;
    /// Tokens in the micro-kernel of `gemm`: two sums each, of 16 registers.
    pub const TOKENS: usize = 4;

    #[inline]
    #[target_feature(enable = "avx2")]
    pub fn open(_sum: __m256i) -> __m256i {
        _mm256_setzero_si256()
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub fn add(sums: __m256i, w: __m256i, a: __m256i) -> __m256i {
        _mm256_add_epi16(sums, _mm256_maddubs_epi16(w, a))
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub fn close(sum: __m256i, sums: __m256i) -> __m256i {
        _mm256_add_epi32(sum, _mm256_madd_epi16(sums, _mm256_set1_epi16(1)))
    }

    /// # Safety
    /// Four bytes can be read at `a` + `at`.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub unsafe fn add4(sums: &mut [__m256i; 2], w: [__m256i; 2], (a, at): (*const i8, usize)) {
        let (_four, _products): (__m256i, __m256i);
        // SAFETY: reads four bytes, as the caller promises, and changes nothing but its outputs.
        unsafe {
            asm!(
                "vpbroadcastd {four}, dword ptr [{a} + {at}]",
                "vpmaddubsw {products}, {w0}, {four}",
                "vpmaddubsw {four}, {w1}, {four}",
                "vpaddw {sums0}, {sums0}, {products}",
                "vpaddw {sums1}, {sums1}, {four}",
                four = out(ymm_reg) _four,
                products = out(ymm_reg) _products,
                sums0 = inout(ymm_reg) sums[0],
                sums1 = inout(ymm_reg) sums[1],
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
    #[target_feature(enable = "avx2")]
    pub unsafe fn add8(dots: &mut [__m256i; 2], [w, v]: [[__m256i; 2]; 2], (a, at): (*const i8, usize)) {
        let (_four, _next, _first, _second): (__m256i, __m256i, __m256i, __m256i);
        // SAFETY: reads eight bytes, as the caller promises, and `ONES`; changes nothing but its outputs.
        unsafe {
            asm!(
                "vpbroadcastd {four}, dword ptr [{a} + {at}]",
                "vpbroadcastd {next}, dword ptr [{a} + {at} + 4]",
                "vpmaddubsw {first}, {w0}, {four}",
                "vpmaddubsw {second}, {v0}, {next}",
                "vpmaddubsw {four}, {w1}, {four}",
                "vpmaddubsw {next}, {v1}, {next}",
                "vpaddw {first}, {first}, {second}",
                "vpaddw {four}, {four}, {next}",
                "vpmaddwd {first}, {first}, ymmword ptr [{ones}]",
                "vpmaddwd {four}, {four}, ymmword ptr [{ones}]",
                "vpaddd {dots0}, {dots0}, {first}",
                "vpaddd {dots1}, {dots1}, {four}",
                four = out(ymm_reg) _four,
                next = out(ymm_reg) _next,
                first = out(ymm_reg) _first,
                second = out(ymm_reg) _second,
                dots0 = inout(ymm_reg) dots[0],
                dots1 = inout(ymm_reg) dots[1],
                w0 = in(ymm_reg) w[0],
                w1 = in(ymm_reg) w[1],
                v0 = in(ymm_reg) v[0],
                v1 = in(ymm_reg) v[1],
                a = in(reg) a,
                at = in(reg) at,
                ones = in(reg) &raw const ONES,
                options(readonly, nostack, preserves_flags),
            );
        }
    }

    /// `size`: the magnitudes of `w`.
    ///
    /// # Safety
    /// Four bytes can be read at `a` + `at`.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub unsafe fn add4_signed(
        dots: &mut [__m256i; 2],
        w: [__m256i; 2],
        size: [__m256i; 2],
        (a, at): (*const i8, usize),
    ) {
        let (_four, _products): (__m256i, __m256i);
        // SAFETY: reads four bytes, as the caller promises, and `ONES`; changes nothing but its outputs.
        unsafe {
            asm!(
                "vpbroadcastd {four}, dword ptr [{a} + {at}]",
                "vpsignb {products}, {four}, {w0}",
                "vpsignb {four}, {four}, {w1}",
                "vpmaddubsw {products}, {size0}, {products}",
                "vpmaddubsw {four}, {size1}, {four}",
                "vpmaddwd {products}, {products}, ymmword ptr [{ones}]",
                "vpmaddwd {four}, {four}, ymmword ptr [{ones}]",
                "vpaddd {dots0}, {dots0}, {products}",
                "vpaddd {dots1}, {dots1}, {four}",
                four = out(ymm_reg) _four,
                products = out(ymm_reg) _products,
                dots0 = inout(ymm_reg) dots[0],
                dots1 = inout(ymm_reg) dots[1],
                w0 = in(ymm_reg) w[0],
                w1 = in(ymm_reg) w[1],
                size0 = in(ymm_reg) size[0],
                size1 = in(ymm_reg) size[1],
                a = in(reg) a,
                at = in(reg) at,
                ones = in(reg) &raw const ONES,
                options(readonly, nostack, preserves_flags),
            );
        }
    }

    /// 16 words of 1.
    #[repr(align(32))]
    struct Ones(#[allow(dead_code)] [i16; 16]); // read by `asm!` alone
    static ONES: Ones = Ones([1; 16]);
}

crate::kernels::decode_attention::instantiate!(crate::kernels::x86::avx2::floats, ["avx2", "fma", "f16c"]);

/// Vectors of attention.
pub(in crate::kernels::x86) mod floats {
    use std::arch::x86_64::*;

    pub const LANES: usize = 8;
    pub type V = __m256;

    #[inline]
    #[target_feature(enable = "avx")]
    pub fn zero() -> V {
        _mm256_setzero_ps()
    }

    #[inline]
    #[target_feature(enable = "avx")]
    pub fn splat(x: f32) -> V {
        _mm256_set1_ps(x)
    }

    #[inline]
    #[target_feature(enable = "avx")]
    pub fn load(from: &[f32; LANES]) -> V {
        // SAFETY: 32 readable bytes; the load has no alignment.
        unsafe { _mm256_loadu_ps(from.as_ptr()) }
    }

    #[inline]
    #[target_feature(enable = "avx,f16c")]
    pub fn widen(from: &[u16; LANES]) -> V {
        // SAFETY: 16 readable bytes; the load has no alignment.
        _mm256_cvtph_ps(unsafe { _mm_loadu_si128(from.as_ptr().cast()) })
    }

    #[inline]
    #[target_feature(enable = "avx")]
    pub fn store(v: V, to: &mut [f32; LANES]) {
        // SAFETY: 32 writable bytes; the store has no alignment.
        unsafe { _mm256_storeu_ps(to.as_mut_ptr(), v) };
    }

    /// `a * b + c`
    #[inline]
    #[target_feature(enable = "fma")]
    pub fn fma(a: V, b: V, c: V) -> V {
        _mm256_fmadd_ps(a, b, c)
    }

    #[inline]
    #[target_feature(enable = "avx")]
    pub fn sums_of_four(v: [V; 4]) -> [f32; 4] {
        // Pairs of lanes, then pairs of these: a sum of each in either half.
        let pairs = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
        let sums = _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps::<1>(pairs));
        let mut four = [0f32; 4];
        // SAFETY: 16 writable bytes; the store has no alignment.
        unsafe { _mm_storeu_ps(four.as_mut_ptr(), sums) };
        four
    }
}

instantiate!(FLOAT, true, ["avx2", "fma", "f16c"], |b: &[u16; 16]| widen16(b));

#[inline]
#[target_feature(enable = "avx,f16c")]
fn widen16(bits: &[u16; 16]) -> [f32; 16] {
    let mut wide = [0f32; 16];
    for (bits, wide) in bits.as_chunks().0.iter().zip(wide.as_chunks_mut().0) {
        floats::store(floats::widen(bits), wide);
    }
    wide
}

/// See `scalar::quantize`, with which the results are identical.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn quantize(x: &[f32], q: &mut [i8], scale: &mut [f32], sum: &mut [i32]) {
    let blocks = x.as_chunks::<32>().0.iter().zip(q.as_chunks_mut::<32>().0);
    for ((x, q), (scale, sum)) in blocks.zip(scale.iter_mut().zip(sum.as_chunks_mut::<2>().0)) {
        let mut y = [_mm256_setzero_ps(); 4];
        for (y, x) in y.iter_mut().zip(x.as_chunks::<8>().0) {
            // SAFETY: `x` is 8 floats.
            *y = unsafe { _mm256_loadu_ps(x.as_ptr()) };
        }
        let size = |i: usize| _mm256_andnot_ps(_mm256_set1_ps(-0.0), y[i]);
        let max8 = _mm256_max_ps(_mm256_max_ps(size(0), size(1)), _mm256_max_ps(size(2), size(3)));
        let max4 = _mm_max_ps(_mm256_castps256_ps128(max8), _mm256_extractf128_ps::<1>(max8));
        let max2 = _mm_max_ps(max4, _mm_movehl_ps(max4, max4));
        let max = _mm_cvtss_f32(_mm_max_ss(max2, _mm_movehdup_ps(max2)));
        let inverse = _mm256_set1_ps(if max > 1e-30 { 127.0 / max } else { 0.0 });
        *scale = max / 127.0;
        let n = |i: usize| _mm256_cvtps_epi32(_mm256_mul_ps(y[i], inverse));
        // Packing works in 128-bit lanes: the permutation puts its runs of four in order.
        let words = [_mm256_packs_epi32(n(0), n(1)), _mm256_packs_epi32(n(2), n(3))];
        let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        let bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(words[0], words[1]), order);
        // What is not a number became -128, which the sign trick could not negate.
        let bytes = _mm256_max_epi8(bytes, _mm256_set1_epi8(-127));
        let pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes);
        let fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
        let eights = _mm256_hadd_epi32(fours, fours);
        let sums = _mm256_hadd_epi32(eights, eights);
        *sum = [_mm256_extract_epi32::<0>(sums), _mm256_extract_epi32::<4>(sums)];
        // SAFETY: `q` is 32 bytes.
        unsafe { _mm256_storeu_si256(q.as_mut_ptr().cast(), bytes) };
    }
}
