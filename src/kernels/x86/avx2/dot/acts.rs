//! Activations as the products of each kind of type want them.

#![allow(clippy::needless_range_loop)] // an iterator's closures and adapters would not be inlined

use std::arch::x86_64::*;

use super::super::blocks::{load16, load32};
use crate::kernels::Q8Row;

/// Two blocks' activations, in the order of `blocks::Two`; what belongs to a block is in all lanes of its half.
#[derive(Clone, Copy)]
pub(super) struct ActsTwo {
    pub low: __m256i,
    pub high: __m256i,
    /// Sum of the integers.
    pub count: __m256i,
    pub scale: __m256,
    /// `scale * count`, by which a minimum counts.
    pub sum: __m256,
}

/// A superblock's activations.
#[derive(Clone, Copy)]
pub(super) struct ActsSuper<'x> {
    pub q: &'x [i8; 256],
    pub scale: &'x [f32; 8],
    /// Of 16 columns each.
    pub sum: &'x [i32; 16],
}

#[inline]
#[target_feature(enable = "avx")]
fn lanes(l: &[i32; 8]) -> __m256i {
    // SAFETY: 32 readable bytes; the load has no alignment.
    unsafe { _mm256_loadu_si256(l.as_ptr().cast()) }
}

/// Bytes `at..at + 16` in the lower half, the 16 from 32 bytes on in the upper one.
#[inline]
#[target_feature(enable = "avx2")]
fn apart(q: &[i8; 64], at: usize) -> __m256i {
    let load = |at: usize| load16::<i8>(q[at..].first_chunk().expect("inside two blocks"));
    _mm256_inserti128_si256(_mm256_castsi128_si256(load(at)), load(at + 32), 1)
}

/// `HALVES[i]` brings lane `2 i` to the lower half and lane `2 i + 1` to the upper one.
const HALVES: [[i32; 8]; 4] =
    [[0, 0, 0, 0, 1, 1, 1, 1], [2, 2, 2, 2, 3, 3, 3, 3], [4, 4, 4, 4, 5, 5, 5, 5], [6, 6, 6, 6, 7, 7, 7, 7]];

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn spread(v: __m256, index: &[i32; 8]) -> __m256 {
    _mm256_permutevar8x32_ps(v, lanes(index))
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn acts_two(x: &Q8Row<'_>, step: usize) -> ActsTwo {
    const PADDED: &str = "rows of activations are padded";
    let q: &[i8; 64] = x.q[64 * step..].first_chunk().expect(PADDED);
    let scale: &[f32; 2] = x.scale[2 * step..].first_chunk().expect(PADDED);
    let sum: &[i32; 4] = x.sum[4 * step..].first_chunk().expect(PADDED);
    let scale = _mm256_castps128_ps256(_mm_castsi128_ps(_mm_set_epi64x(0, bytemuck::cast(*scale))));
    // SAFETY: 16 readable bytes; the load has no alignment.
    let sum = unsafe { _mm_loadu_si128(sum.as_ptr().cast()) };
    let scale = spread(scale, &HALVES[0]);
    let pairs = _mm256_castsi128_si256(_mm_hadd_epi32(sum, sum));
    let count = _mm256_permutevar8x32_epi32(pairs, lanes(&HALVES[0]));
    ActsTwo {
        low: apart(q, 0),
        high: apart(q, 16),
        count,
        scale,
        sum: _mm256_mul_ps(scale, _mm256_cvtepi32_ps(count)),
    }
}

#[inline(always)]
pub(super) fn acts_super<'x>(x: &Q8Row<'x>, step: usize) -> ActsSuper<'x> {
    const PADDED: &str = "rows of activations are padded";
    ActsSuper {
        q: x.q[256 * step..].first_chunk().expect(PADDED),
        scale: x.scale[8 * step..].first_chunk().expect(PADDED),
        sum: x.sum[16 * step..].first_chunk().expect(PADDED),
    }
}

impl ActsSuper<'_> {
    /// Those of register `i` of eight.
    #[inline]
    #[target_feature(enable = "avx")]
    pub fn q(&self, i: usize) -> __m256i {
        load32::<i8>(self.q[32 * i..].first_chunk().expect("one of eight"))
    }

    /// Those of groups `2 i` and `2 i + 1` of 32.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub fn two(&self, i: usize) -> (__m256i, __m256i, __m256) {
        let q: &[i8; 64] = self.q[64 * i..].first_chunk().expect("one of four");
        let (low, high) = (_mm256_set1_ps(self.scale[2 * i]), _mm256_set1_ps(self.scale[2 * i + 1]));
        (apart(q, 0), apart(q, 16), _mm256_blend_ps::<0b1111_0000>(low, high))
    }

    #[inline]
    #[target_feature(enable = "avx")]
    pub fn scales(&self) -> __m256 {
        // SAFETY: 32 readable bytes; the load has no alignment.
        unsafe { _mm256_loadu_ps(self.scale.as_ptr()) }
    }

    /// `scale * sum` of groups of 32: those of `2 i` and `2 i + 1` in the halves of register `i`.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub fn sums32(&self) -> [__m256; 4] {
        let (first, second) = self.sum.split_at(8);
        let (first, second) = (first.first_chunk().expect("8"), second.first_chunk().expect("8"));
        let pairs = _mm256_hadd_epi32(lanes(first), lanes(second));
        let sums = _mm256_cvtepi32_ps(_mm256_permute4x64_epi64::<0b11_01_10_00>(pairs));
        let sums = _mm256_mul_ps(self.scales(), sums);
        let mut all = [sums; 4];
        for i in 0..4 {
            all[i] = spread(sums, &HALVES[i]);
        }
        all
    }

    /// Likewise of groups of 16, in eight registers.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub fn sums16(&self) -> [__m256; 8] {
        let (first, second) = self.sum.split_at(8);
        let sums = [first, second].map(|s| lanes(s.first_chunk().expect("8")));
        let scales = self.scales();
        let scales = [spread(scales, &[0, 0, 1, 1, 2, 2, 3, 3]), spread(scales, &[4, 4, 5, 5, 6, 6, 7, 7])];
        let mut all = [scales[0]; 8];
        for h in 0..2 {
            let sums = _mm256_mul_ps(scales[h], _mm256_cvtepi32_ps(sums[h]));
            for i in 0..4 {
                all[4 * h + i] = spread(sums, &HALVES[i]);
            }
        }
        all
    }
}
