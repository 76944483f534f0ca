//! AVX-512 with VNNI: `vpdpbusd` adds four products of unsigned and signed bytes to each 32-bit lane.

pub(super) mod attention;
mod blocks;
mod columns;
mod dot;
mod gemm;

pub(super) use gemm::transpose16;

use std::arch::x86_64::*;

use crate::kernels::float::instantiate;
use crate::kernels::{Functions, Isa};

pub(in crate::kernels) static ISA: Isa = Isa {
    name: "avx512vnni",
    needs: "AVX-512 (F, BW, DQ, VL) with VNNI",
    detect: || {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
    },
    functions: Functions {
        quantize,
        dot: dot::dot,
        dot_listed: dot::dot_listed,
        dot_tokens: Some(dot::dot_tokens),
        // Measured on Zen 4; where a matrix unit is, that is faster from the first one that it may take.
        panels_from: 33,
        unpack: dot::unpack,
        interleave: gemm::interleave,
        gemm: gemm::gemm,
        columns: columns::columns,
        float: &FLOAT,
        decode_attention: &DECODE_ATTENTION,
        tiles: None,
        attention: Some(&attention::ATTENTION),
    },
};

crate::kernels::decode_attention::instantiate!(
    crate::kernels::x86::avx512vnni::floats,
    ["avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma", "f16c"]
);

/// Vectors of attention.
mod floats {
    use std::arch::x86_64::*;

    pub const LANES: usize = 16;
    pub type V = __m512;

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn zero() -> V {
        _mm512_setzero_ps()
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn splat(x: f32) -> V {
        _mm512_set1_ps(x)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn load(from: &[f32; LANES]) -> V {
        // SAFETY: 64 readable bytes; the load has no alignment.
        unsafe { _mm512_loadu_ps(from.as_ptr()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn widen(from: &[u16; LANES]) -> V {
        // SAFETY: 32 readable bytes; the load has no alignment.
        _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(from.as_ptr().cast()) })
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn store(v: V, to: &mut [f32; LANES]) {
        // SAFETY: 64 writable bytes; the store has no alignment.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), v) };
    }

    /// `a * b + c`
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn fma(a: V, b: V, c: V) -> V {
        _mm512_fmadd_ps(a, b, c)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512dq,avx2,fma")]
    pub fn sums_of_four(v: [V; 4]) -> [f32; 4] {
        let mut halves = [_mm256_setzero_ps(); 4];
        for i in 0..4 {
            halves[i] = _mm256_add_ps(_mm512_castps512_ps256(v[i]), _mm512_extractf32x8_ps::<1>(v[i]));
        }
        crate::kernels::x86::avx2::floats::sums_of_four(halves)
    }
}

instantiate!(FLOAT, true, ["avx512f", "avx512bw", "avx512dq", "avx512vl", "fma", "f16c"], |b: &[u16; 16]| {
    widen16(b)
});

#[inline]
#[target_feature(enable = "avx512f")]
fn widen16(bits: &[u16; 16]) -> [f32; 16] {
    let mut wide = [0f32; 16];
    floats::store(floats::widen(bits), &mut wide);
    wide
}

/// See `scalar::quantize`, with which the results are identical.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn quantize(x: &[f32], q: &mut [i8], scale: &mut [f32], sum: &mut [i32]) {
    let blocks = x.as_chunks::<32>().0.iter().zip(q.as_chunks_mut::<32>().0);
    for ((x, q), (scale, sum)) in blocks.zip(scale.iter_mut().zip(sum.as_chunks_mut::<2>().0)) {
        // SAFETY: `x` is 32 floats.
        let (x0, x1) = unsafe { (_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x.as_ptr().add(16))) };
        let max = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(x0), _mm512_abs_ps(x1)));
        let inverse = _mm512_set1_ps(if max > 1e-30 { 127.0 / max } else { 0.0 });
        *scale = max / 127.0;
        let (q0, q1) =
            (_mm512_cvtps_epi32(_mm512_mul_ps(x0, inverse)), _mm512_cvtps_epi32(_mm512_mul_ps(x1, inverse)));
        *sum = [_mm512_reduce_add_epi32(q0), _mm512_reduce_add_epi32(q1)];
        // SAFETY: `q` is 32 bytes.
        unsafe {
            _mm_storeu_si128(q.as_mut_ptr().cast(), _mm512_cvtsepi32_epi8(q0));
            _mm_storeu_si128(q.as_mut_ptr().add(16).cast(), _mm512_cvtsepi32_epi8(q1));
        }
    }
}
