//! Prompts' attention: `x86/attention.rs` with `vpdpwssd`, 16 lanes of two products.

use super::transpose16;
use crate::kernels::x86::attention::instantiate;

instantiate!(
    crate::kernels::x86::avx512vnni::attention::lanes,
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"
);

/// The vectors that it is made of.
pub(in crate::kernels::x86) mod lanes {
    use std::arch::x86_64::*;

    use super::transpose16;
    use crate::kernels::attention::{HALF, Pairs};
    use crate::kernels::x86::attention::EXP2;

    pub type F = __m512;
    pub type I = __m512i;

    /// Rows of sums that are in registers, two each: products take several cycles, and others can begin in each.
    pub const ROWS: usize = 8;

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn splat(x: f32) -> F {
        _mm512_set1_ps(x)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn zero() -> I {
        _mm512_setzero_si512()
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn splat_pair(pair: u32) -> I {
        _mm512_set1_epi32(pair.cast_signed())
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn load(from: &[f32; HALF]) -> F {
        // SAFETY: 64 readable bytes; the load has no alignment.
        unsafe { _mm512_loadu_ps(from.as_ptr()) }
    }

    /// 16 numbers of a row from `col` on; those behind its end are 0.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn load_some(row: &[f32], col: usize) -> F {
        let there = row.len().saturating_sub(col).min(HALF);
        let mask = ((1u32 << there) - 1) as u16;
        // SAFETY: only the numbers of `row` are read.
        unsafe { _mm512_maskz_loadu_ps(mask, row.as_ptr().wrapping_add(col)) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn load_i32(from: &[i32; HALF]) -> I {
        // SAFETY: 64 readable bytes; the load has no alignment.
        unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn load_pairs(from: &[u32; HALF]) -> I {
        // SAFETY: 64 readable bytes; the load has no alignment.
        unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn store(to: &mut [f32; HALF], x: F) {
        // SAFETY: 64 writable bytes; the store has no alignment.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), x) };
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn store_row(to: &mut [u32; HALF], row: I) {
        // SAFETY: 64 writable bytes; the store has no alignment.
        unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), row) };
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn add(a: F, b: F) -> F {
        _mm512_add_ps(a, b)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn sub(a: F, b: F) -> F {
        _mm512_sub_ps(a, b)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn mul(a: F, b: F) -> F {
        _mm512_mul_ps(a, b)
    }

    /// `a * b + c`
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn fma(a: F, b: F, c: F) -> F {
        _mm512_fmadd_ps(a, b, c)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn max(a: F, b: F) -> F {
        _mm512_max_ps(a, b)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    pub fn abs(x: F) -> F {
        _mm512_abs_ps(x)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn reduce_add(x: F) -> f32 {
        _mm512_reduce_add_ps(x)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn reduce_max(x: F) -> f32 {
        _mm512_reduce_max_ps(x)
    }

    /// Whether `a` is below `b` in any lane.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn any_below(a: F, b: F) -> bool {
        _mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b) != 0
    }

    /// `x`, or `instead` in lanes whose query does not see `position`.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn hide(x: F, position: i32, sees: I, instead: f32) -> F {
        let seen = _mm512_cmple_epi32_mask(_mm512_set1_epi32(position), sees);
        _mm512_mask_blend_ps(seen, _mm512_set1_ps(instead), x)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn floats(x: I) -> F {
        _mm512_cvtepi32_ps(x)
    }

    /// Rounded to nearest.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn integers(x: F) -> I {
        _mm512_cvtps_epi32(x)
    }

    /// Two numbers of 16 bits in each lane, `a` the lower.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    pub fn pair(a: I, b: I) -> I {
        _mm512_mask_blend_epi16(0xaaaa_aaaa, a, _mm512_slli_epi32::<16>(b))
    }

    /// `sums + a b`, of both numbers of each pair.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vnni")]
    pub fn add_products(sums: I, a: I, b: I) -> I {
        _mm512_dpwssd_epi32(sums, a, b)
    }

    /// `2^x`
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn exp2(x: F) -> F {
        let n = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
        let r = _mm512_sub_ps(x, n);
        let mut p = _mm512_set1_ps(EXP2[0]);
        for c in &EXP2[1..] {
            p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(*c));
        }
        _mm512_scalef_ps(p, n)
    }

    /// Lane `c` of row `r` to lane `r` of row `c`.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub fn transpose(rows: &[I; HALF], to: &mut Pairs) {
        for (to, row) in to.iter_mut().zip(transpose16(*rows)) {
            store_row(to, row);
        }
    }
}
