//! Prompts' attention: `x86/attention.rs` with `vpmaddwd`, 8 lanes of two products.

use crate::kernels::x86::attention::instantiate;

instantiate!(crate::kernels::x86::avx2::attention::madd, "avx2,fma");

/// [`lanes`] with their products, which are added in an instruction of its own.
mod madd {
    use std::arch::x86_64::*;

    pub use super::lanes::*;

    /// `sums + a b`, of both numbers of each pair.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub fn add_products(sums: I, a: I, b: I) -> I {
        let add = |sums, a, b| _mm256_add_epi32(sums, _mm256_madd_epi16(a, b));
        [add(sums[0], a[0], b[0]), add(sums[1], a[1], b[1])]
    }
}

/// The vectors that it is made of, two registers each.
pub(in crate::kernels::x86) mod lanes {
    use std::arch::x86_64::*;

    use crate::kernels::attention::{HALF, Pairs};
    use crate::kernels::x86::attention::EXP2;
    use crate::kernels::x86::avx2::gemm::transpose8;

    pub type F = [__m256; 2];
    pub type I = [__m256i; 2];

    /// Rows of sums that are in registers, four each, beside four of columns: as many as there are.
    pub const ROWS: usize = 2;

    #[inline]
    #[target_feature(enable = "avx2")]
    pub fn splat(x: f32) -> F {
        [_mm256_set1_ps(x); 2]
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub fn zero() -> I {
        [_mm256_setzero_si256(); 2]
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub fn splat_pair(pair: u32) -> I {
        [_mm256_set1_epi32(pair.cast_signed()); 2]
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub fn load(from: &[f32; HALF]) -> F {
        // SAFETY: 64 readable bytes; loads have no alignment.
        unsafe { [_mm256_loadu_ps(from.as_ptr()), _mm256_loadu_ps(from.as_ptr().add(8))] }
    }

    /// 16 numbers of a row from `col` on; those behind its end are 0.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub fn load_some(row: &[f32], col: usize) -> F {
        match row.get(col..col + HALF) {
            Some(there) => load(there.try_into().expect("16 of them")),
            None => {
                let (mut padded, there) = ([0.0; HALF], &row[col.min(row.len())..]);
                padded[..there.len()].copy_from_slice(there);
                load(&padded)
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub fn load_i32(from: &[i32; HALF]) -> I {
        // SAFETY: 64 readable bytes; loads have no alignment.
        unsafe { [_mm256_loadu_si256(from.as_ptr().cast()), _mm256_loadu_si256(from.as_ptr().add(8).cast())] }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub fn load_pairs(from: &[u32; HALF]) -> I {
        // SAFETY: 64 readable bytes; loads have no alignment.
        unsafe { [_mm256_loadu_si256(from.as_ptr().cast()), _mm256_loadu_si256(from.as_ptr().add(8).cast())] }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub fn store(to: &mut [f32; HALF], x: F) {
        // SAFETY: 64 writable bytes; stores have no alignment.
        unsafe {
            _mm256_storeu_ps(to.as_mut_ptr(), x[0]);
            _mm256_storeu_ps(to.as_mut_ptr().add(8), x[1]);
        }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub fn store_row(to: &mut [u32; HALF], row: I) {
        // SAFETY: 64 writable bytes; stores have no alignment.
        unsafe {
            _mm256_storeu_si256(to.as_mut_ptr().cast(), row[0]);
            _mm256_storeu_si256(to.as_mut_ptr().add(8).cast(), row[1]);
        }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub fn add(a: F, b: F) -> F {
        [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])]
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub fn sub(a: F, b: F) -> F {
        [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])]
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub fn mul(a: F, b: F) -> F {
        [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])]
    }

    /// `a * b + c`
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    pub fn fma(a: F, b: F, c: F) -> F {
        [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])]
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub fn max(a: F, b: F) -> F {
        [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])]
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub fn abs(x: F) -> F {
        let sign = _mm256_set1_ps(-0.0);
        [_mm256_andnot_ps(sign, x[0]), _mm256_andnot_ps(sign, x[1])]
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub fn reduce_add(x: F) -> f32 {
        let mut lanes = [0.0; HALF];
        store(&mut lanes, x);
        lanes.iter().sum()
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub fn reduce_max(x: F) -> f32 {
        let mut lanes = [0.0; HALF];
        store(&mut lanes, x);
        lanes.iter().fold(f32::NEG_INFINITY, |max, &x| max.max(x))
    }

    /// Whether `a` is below `b` in any lane.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub fn any_below(a: F, b: F) -> bool {
        let below = [_mm256_cmp_ps::<_CMP_LT_OQ>(a[0], b[0]), _mm256_cmp_ps::<_CMP_LT_OQ>(a[1], b[1])];
        _mm256_movemask_ps(_mm256_or_ps(below[0], below[1])) != 0
    }

    /// `x`, or `instead` in lanes whose query does not see `position`.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub fn hide(x: F, position: i32, sees: I, instead: f32) -> F {
        let (position, instead) = (_mm256_set1_epi32(position), _mm256_set1_ps(instead));
        let hidden = |sees| _mm256_castsi256_ps(_mm256_cmpgt_epi32(position, sees));
        [_mm256_blendv_ps(x[0], instead, hidden(sees[0])), _mm256_blendv_ps(x[1], instead, hidden(sees[1]))]
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    pub fn floats(x: I) -> F {
        [_mm256_cvtepi32_ps(x[0]), _mm256_cvtepi32_ps(x[1])]
    }

    /// Rounded to nearest.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub fn integers(x: F) -> I {
        [_mm256_cvtps_epi32(x[0]), _mm256_cvtps_epi32(x[1])]
    }

    /// Two numbers of 16 bits in each lane, `a` the lower.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub fn pair(a: I, b: I) -> I {
        let two = |a, b| _mm256_blend_epi16::<0b1010_1010>(a, _mm256_slli_epi32::<16>(b));
        [two(a[0], b[0]), two(a[1], b[1])]
    }

    /// `2^x`, for `x` of at most 126; 0 below -126.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    pub fn exp2(x: F) -> F {
        [exp2_of_8(x[0]), exp2_of_8(x[1])]
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn exp2_of_8(x: __m256) -> __m256 {
        let n = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
        let r = _mm256_sub_ps(x, n);
        let mut p = _mm256_set1_ps(EXP2[0]);
        for c in &EXP2[1..] {
            p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(*c));
        }
        // An exponent of 0 and no mantissa are 0.
        let n = _mm256_cvtps_epi32(_mm256_max_ps(n, _mm256_set1_ps(-127.0)));
        let power = _mm256_slli_epi32::<23>(_mm256_add_epi32(n, _mm256_set1_epi32(127)));
        _mm256_mul_ps(p, _mm256_castsi256_ps(power))
    }

    /// Lane `c` of row `r` to lane `r` of row `c`.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub fn transpose(rows: &[I; HALF], to: &mut Pairs) {
        for half in 0..2 {
            let mut turned = [[_mm256_setzero_si256(); 8]; 2];
            for (i, turned) in turned.iter_mut().enumerate() {
                for (row, from) in turned.iter_mut().zip(&rows[8 * i..]) {
                    *row = from[half];
                }
                *turned = transpose8(*turned);
            }
            for (i, to) in to[8 * half..][..8].iter_mut().enumerate() {
                store_row(to, [turned[0][i], turned[1][i]]);
            }
        }
    }
}
