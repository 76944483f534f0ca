//! One token: dot products of weight rows, read in place, with one row of activations; and the
//! unpacking of rows for `gemm`, from the same block readers.
//!
//! What prepares weights and activations is the same for every kernel with 32-byte registers; what
//! multiplies them is compiled by [`instantiate!`] once for each way to multiply.

use std::arch::x86_64::*;

use super::blocks::{self, Bytes4, Four, Super};
use crate::gguf::GgmlType;
use crate::kernels::Q8Row;

/// Rows that go through the blocks together: they share the activations' rearrangement, and their
/// independent sums hide the latency of the adds.
pub(in crate::kernels::x86) const ROWS: usize = 4;

/// Activations for a [`Four`]: bytes in the order of its `low` and `high`, in the first two lanes of
/// each block's four its integer sum (`-zero * sum`, in two parts), and a lane a block its scale and
/// `scale * sum`.
pub(in crate::kernels::x86) struct Acts4 {
    pub low: [__m256i; 2],
    pub high: [__m256i; 2],
    pub start: [__m256i; 2],
    pub scale: __m128,
    pub sum: __m128,
}

/// Activations for a [`Super`]: likewise, with scales and sums by group, as in [`Super`].
pub(in crate::kernels::x86) struct Acts8 {
    pub q: [__m256i; 8],
    pub start: [__m256i; 8],
    pub scale: [__m256; 2],
    pub sum: [__m256; 2],
}

/// `SPREAD_16[i]` brings lane `2 i` to the lower four lanes and `2 i + 1` to the upper four.
pub(in crate::kernels::x86) const SPREAD_16: [[i32; 8]; 4] =
    [[0, 0, 0, 0, 1, 1, 1, 1], [2, 2, 2, 2, 3, 3, 3, 3], [4, 4, 4, 4, 5, 5, 5, 5], [6, 6, 6, 6, 7, 7, 7, 7]];

#[inline]
#[target_feature(enable = "avx2")]
pub(in crate::kernels::x86) fn spread(lanes: __m256, index: &[i32; 8]) -> __m256 {
    _mm256_permutevar8x32_ps(lanes, load_lanes(index))
}

#[inline]
#[target_feature(enable = "avx")]
fn load_lanes(l: &[i32; 8]) -> __m256i {
    // SAFETY: 32 readable bytes; the load has no alignment.
    unsafe { _mm256_loadu_si256(l.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx")]
pub(in crate::kernels::x86) fn load_q(x: &Q8Row<'_>, at: usize) -> __m256i {
    let q: &[i8; 32] = x.q[at..].first_chunk().expect("rows of activations are padded");
    // SAFETY: 32 readable bytes; the load has no alignment.
    unsafe { _mm256_loadu_si256(q.as_ptr().cast()) }
}

/// Scales of the four blocks from column `at` on.
#[inline]
#[target_feature(enable = "sse")]
fn load_scale4(x: &Q8Row<'_>, at: usize) -> __m128 {
    let s: &[f32; 4] = x.scale[at / 32..].first_chunk().expect("rows of activations are padded");
    // SAFETY: 16 readable bytes; the load has no alignment.
    unsafe { _mm_loadu_ps(s.as_ptr()) }
}

/// The eight sums over 16 columns from `at` on.
#[inline]
#[target_feature(enable = "avx")]
fn load_sum8(x: &Q8Row<'_>, at: usize) -> __m256i {
    load_lanes(x.sum[at / 16..].first_chunk().expect("rows of activations are padded"))
}

/// Integer sums begin at `-zero * sum`; `SHIFT` is the binary logarithm of the zero point (0: none).
#[inline]
#[target_feature(enable = "avx2")]
fn start<const SHIFT: u32>(sums: __m256i) -> __m256i {
    if SHIFT == 0 {
        _mm256_setzero_si256()
    } else {
        _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_sll_epi32(sums, _mm_cvtsi32_si128(SHIFT as i32)))
    }
}

/// `A0..16 B0..16` and `A16..32 B16..32`: to the order of [`Four`], and back.
#[inline]
#[target_feature(enable = "avx2")]
fn halves(a: __m256i, b: __m256i) -> (__m256i, __m256i) {
    (_mm256_permute2x128_si256::<0x20>(a, b), _mm256_permute2x128_si256::<0x31>(a, b))
}

#[inline]
#[target_feature(enable = "avx2")]
pub(in crate::kernels::x86) fn acts4<const SHIFT: u32>(x: &Q8Row<'_>, step: usize) -> Acts4 {
    let at = step * 128;
    let (low0, high0) = halves(load_q(x, at), load_q(x, at + 32));
    let (low1, high1) = halves(load_q(x, at + 64), load_q(x, at + 96));
    let sums = load_sum8(x, at); // two a block
    let starts = start::<SHIFT>(sums);
    let zero = _mm256_setzero_si256();
    let pairs = _mm256_permute4x64_epi64::<0b10_00>(_mm256_hadd_epi32(sums, sums));
    let scale = load_scale4(x, at);
    Acts4 {
        low: [low0, low1],
        high: [high0, high1],
        start: [
            _mm256_blend_epi32::<0b0011_0011>(zero, _mm256_permute4x64_epi64::<0b01_00_00>(starts)),
            _mm256_blend_epi32::<0b0011_0011>(zero, _mm256_permute4x64_epi64::<0b11_00_10>(starts)),
        ],
        scale,
        sum: _mm_mul_ps(scale, _mm_cvtepi32_ps(_mm256_castsi256_si128(pairs))),
    }
}

/// For Q8_0: the scales of four blocks, whose bytes are read where they are used.
#[inline]
#[target_feature(enable = "avx2")]
pub(in crate::kernels::x86) fn acts_bytes4(x: &Q8Row<'_>, step: usize) -> ([__m256i; 4], __m128) {
    let at = step * 128;
    let q = [load_q(x, at), load_q(x, at + 32), load_q(x, at + 64), load_q(x, at + 96)];
    (q, load_scale4(x, at))
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_q8(x: &Q8Row<'_>, at: usize) -> [__m256i; 8] {
    // Not `from_fn`: its closure would be called from a function without the features.
    let mut q = [_mm256_setzero_si256(); 8];
    for (i, q) in q.iter_mut().enumerate() {
        *q = load_q(x, at + 32 * i);
    }
    q
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_scale8(x: &Q8Row<'_>, at: usize) -> __m256 {
    let s: &[f32; 8] = x.scale[at / 32..].first_chunk().expect("rows of activations are padded");
    // SAFETY: 32 readable bytes; the load has no alignment.
    unsafe { _mm256_loadu_ps(s.as_ptr()) }
}

/// For Q4_K and Q5_K: groups of 32, no zero point.
#[inline]
#[target_feature(enable = "avx2")]
pub(in crate::kernels::x86) fn acts_groups32(x: &Q8Row<'_>, step: usize) -> Acts8 {
    let at = step * 256;
    let scale = load_scale8(x, at);
    let pairs = _mm256_hadd_epi32(load_sum8(x, at), load_sum8(x, at + 128));
    let sums = _mm256_permute4x64_epi64::<0b11_01_10_00>(pairs);
    let zero = _mm256_setzero_ps();
    Acts8 {
        q: load_q8(x, at),
        start: [_mm256_setzero_si256(); 8],
        scale: [scale, zero],
        sum: [_mm256_mul_ps(scale, _mm256_cvtepi32_ps(sums)), zero],
    }
}

/// For types with groups of 16.
#[inline]
#[target_feature(enable = "avx2")]
pub(in crate::kernels::x86) fn acts_groups16<const SHIFT: u32>(x: &Q8Row<'_>, step: usize) -> Acts8 {
    let at = step * 256;
    let sums = [load_sum8(x, at), load_sum8(x, at + 128)];
    let starts = [start::<SHIFT>(sums[0]), start::<SHIFT>(sums[1])];
    let first = |i: usize| {
        let both = _mm256_permutevar8x32_epi32(starts[i / 4], load_lanes(&SPREAD_16[i % 4]));
        _mm256_blend_epi32::<0b0001_0001>(_mm256_setzero_si256(), both)
    };
    let scale8 = load_scale8(x, at);
    let scale = [spread(scale8, &[0, 0, 1, 1, 2, 2, 3, 3]), spread(scale8, &[4, 4, 5, 5, 6, 6, 7, 7])];
    Acts8 {
        q: load_q8(x, at),
        start: [first(0), first(1), first(2), first(3), first(4), first(5), first(6), first(7)],
        scale,
        sum: [
            _mm256_mul_ps(scale[0], _mm256_cvtepi32_ps(sums[0])),
            _mm256_mul_ps(scale[1], _mm256_cvtepi32_ps(sums[1])),
        ],
    }
}

/// For IQ4_XS: pairs of registers in the order of [`Four`].
#[inline]
#[target_feature(enable = "avx2")]
pub(in crate::kernels::x86) fn acts_iq4_xs(x: &Q8Row<'_>, step: usize) -> ([__m256i; 8], __m256) {
    let q = load_q8(x, step * 256);
    let ((q0, q1), (q2, q3)) = (halves(q[0], q[1]), halves(q[2], q[3]));
    let ((q4, q5), (q6, q7)) = (halves(q[4], q[5]), halves(q[6], q[7]));
    ([q0, q1, q2, q3, q4, q5, q6, q7], load_scale8(x, step * 256))
}

#[inline]
#[target_feature(enable = "avx")]
pub(in crate::kernels::x86) fn sum_lanes(v: __m256) -> f32 {
    let four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}

/// Prefetches the lines of a step, `ahead` bytes on: into L2, since L1 may be smaller than the rows
/// that are multiplied in between.
#[inline]
#[target_feature(enable = "sse")]
pub(in crate::kernels::x86) fn prefetch<const N: usize>(step: &[u8; N], ahead: usize) {
    for line in (0..N).step_by(64) {
        let at = step.as_ptr().wrapping_add(ahead + line).cast();
        #[allow(unused_unsafe)] // an unsafe function for older compilers
        // SAFETY: a prefetch of any address is allowed; it never faults.
        unsafe {
            _mm_prefetch::<_MM_HINT_T1>(at)
        };
    }
}

/// A function that multiplies rows of one type, `$bytes` bytes a step: `$acts(x, step)` prepares the
/// activations and `$step(bytes, acts, acc)` adds their products.
macro_rules! dot_rows {
    ($features:literal, $name:ident, $bytes:literal, $acts:expr, $step:expr) => {
        // Not inlined: one function for all types would run out of registers.
        #[inline(never)]
        #[target_feature(enable = $features)]
        fn $name(weights: &[u8], row_bytes: usize, x: Q8Row<'_>, out: &mut [f32]) {
            #[inline]
            #[target_feature(enable = $features)]
            fn rows<const R: usize>(w: &[u8], row_bytes: usize, x: &Q8Row<'_>) -> [f32; R] {
                // Loops, not `array::map`: the standard library is compiled without these features, so
                // closures with intrinsics are not inlined into it.
                let (whole, tail) = (row_bytes / $bytes, row_bytes % $bytes);
                let mut steps = [[].as_slice(); R];
                for r in 0..R {
                    steps[r] = &w[r * row_bytes..][..row_bytes].as_chunks::<$bytes>().0[..whole];
                }
                let mut acc = [_mm256_setzero_ps(); R];
                for s in 0..whole {
                    let a = $acts(x, s);
                    for r in 0..R {
                        // The next rows lie behind these: fetched in the order of the file, so that
                        // their beginnings, where every stream is new, do not wait for memory.
                        prefetch(&steps[0][s], R * row_bytes + (s * (R - 1) + r) * $bytes);
                        acc[r] = $step(&steps[r][s], &a, acc[r]);
                    }
                }
                if tail > 0 {
                    // Fewer blocks than a step takes: zeros for the rest.
                    let a = $acts(x, whole);
                    for r in 0..R {
                        let mut padded = [0u8; $bytes];
                        padded[..tail].copy_from_slice(&w[r * row_bytes + whole * $bytes..][..tail]);
                        acc[r] = $step(&padded, &a, acc[r]);
                    }
                }
                let mut sums = [0f32; R];
                for r in 0..R {
                    sums[r] = sum_lanes(acc[r]);
                }
                sums
            }
            let mut groups = weights.chunks_exact(ROWS * row_bytes);
            let mut done = 0;
            for w in &mut groups {
                out[done..done + ROWS].copy_from_slice(&rows::<ROWS>(w, row_bytes, &x));
                done += ROWS;
            }
            for w in groups.remainder().chunks_exact(row_bytes) {
                [out[done]] = rows(w, row_bytes, &x);
                done += 1;
            }
        }
    };
}
pub(in crate::kernels::x86) use dot_rows;

/// The function `dot` (see `Kernels::dot`), compiled with `$features` and multiplying with the
/// functions of the module `$multiply`.
macro_rules! instantiate {
    ($features:literal, $multiply:path) => {
        #[target_feature(enable = $features)]
        fn dot(ty: GgmlType, weights: &[u8], row_bytes: usize, x: Q8Row<'_>, out: &mut [f32]) {
            use GgmlType::*;
            use $crate::kernels::x86::avx2::blocks::{self, Bytes4, Four, Super};
            use $crate::kernels::x86::avx2::dot::*;
            use $multiply as multiply;

            /// Adds products of unsigned weights of up to 6 bits.
            #[inline]
            #[target_feature(enable = $features)]
            fn add(sum: __m256i, w: __m256i, a: __m256i) -> __m256i {
                multiply::close(sum, multiply::add(multiply::open(sum), w, a))
            }

            /// Twice [`add`], of which the 16-bit sums together still fit: 4 * 63 * 127 < 2^15.
            #[inline]
            #[target_feature(enable = $features)]
            fn add2(sum: __m256i, w: [__m256i; 2], a: [__m256i; 2]) -> __m256i {
                let both = multiply::add(multiply::add(multiply::open(sum), w[0], a[0]), w[1], a[1]);
                multiply::close(sum, both)
            }

            /// Adds products of signed weights: |w| times the activation with the sign of `w`. A weight
            /// of -128 is right too, an activation of -128 would not be and does not occur.
            #[inline]
            #[target_feature(enable = $features)]
            fn add_signed(sum: __m256i, w: __m256i, a: __m256i) -> __m256i {
                add(sum, _mm256_abs_epi8(w), _mm256_sign_epi8(a, w))
            }

            #[inline]
            #[target_feature(enable = $features)]
            fn step4<const MIN: bool>(w: &Four, a: &Acts4, mut acc: __m256) -> __m256 {
                let scale = _mm256_castps128_ps256(_mm_mul_ps(w.scale, a.scale));
                for i in 0..2 {
                    let sum = add2(a.start[i], [w.low[i], w.high[i]], [a.low[i], a.high[i]]);
                    acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), spread(scale, &SPREAD_16[i]), acc);
                }
                let four = |v| _mm256_zextps128_ps256(v);
                if MIN { _mm256_fmadd_ps(four(w.min), four(a.sum), acc) } else { acc }
            }

            #[inline]
            #[target_feature(enable = $features)]
            fn step4_signed(w: &Four, a: &Acts4, mut acc: __m256) -> __m256 {
                let scale = _mm256_castps128_ps256(_mm_mul_ps(w.scale, a.scale));
                for i in 0..2 {
                    let sum = add_signed(_mm256_setzero_si256(), w.low[i], a.low[i]);
                    let sum = add_signed(sum, w.high[i], a.high[i]);
                    acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), spread(scale, &SPREAD_16[i]), acc);
                }
                acc
            }

            #[inline]
            #[target_feature(enable = $features)]
            fn step_bytes4(w: &Bytes4, (q, scale): &([__m256i; 4], __m128), mut acc: __m256) -> __m256 {
                let scale = _mm256_castps128_ps256(_mm_mul_ps(w.scale, *scale));
                for i in 0..4 {
                    let sum = _mm256_cvtepi32_ps(add_signed(_mm256_setzero_si256(), w.q[i], q[i]));
                    acc = _mm256_fmadd_ps(sum, spread(scale, &[i as i32; 8]), acc);
                }
                acc
            }

            #[inline]
            #[target_feature(enable = $features)]
            fn step_groups32(w: &Super, a: &Acts8, mut acc: __m256) -> __m256 {
                let scale = _mm256_mul_ps(w.scale[0], a.scale[0]);
                for i in 0..8 {
                    let sum = _mm256_cvtepi32_ps(add(a.start[i], w.q[i], a.q[i]));
                    acc = _mm256_fmadd_ps(sum, spread(scale, &[i as i32; 8]), acc);
                }
                _mm256_fmadd_ps(w.min[0], a.sum[0], acc)
            }

            #[inline]
            #[target_feature(enable = $features)]
            fn step_groups16<const MIN: bool>(w: &Super, a: &Acts8, mut acc: __m256) -> __m256 {
                let scale = [_mm256_mul_ps(w.scale[0], a.scale[0]), _mm256_mul_ps(w.scale[1], a.scale[1])];
                for i in 0..8 {
                    let sum = _mm256_cvtepi32_ps(add(a.start[i], w.q[i], a.q[i]));
                    acc = _mm256_fmadd_ps(sum, spread(scale[i / 4], &SPREAD_16[i % 4]), acc);
                }
                if MIN {
                    acc = _mm256_fmadd_ps(w.min[0], a.sum[0], acc);
                    acc = _mm256_fmadd_ps(w.min[1], a.sum[1], acc);
                }
                acc
            }

            #[inline]
            #[target_feature(enable = $features)]
            fn step_iq4_xs(w: &Super, (q, scale): &([__m256i; 8], __m256), mut acc: __m256) -> __m256 {
                let scale = _mm256_mul_ps(w.scale[0], *scale);
                for i in 0..4 {
                    let sum = add_signed(_mm256_setzero_si256(), w.q[2 * i], q[2 * i]);
                    let sum = add_signed(sum, w.q[2 * i + 1], q[2 * i + 1]);
                    acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), spread(scale, &SPREAD_16[i]), acc);
                }
                acc
            }

            dot_rows!($features, dot_q4_0, 72, acts4::<3>, |b, a, acc| step4::<false>(
                &blocks::q4_0(b),
                a,
                acc
            ));
            dot_rows!($features, dot_q4_1, 80, acts4::<0>, |b, a, acc| step4::<true>(
                &blocks::q4_1(b),
                a,
                acc
            ));
            dot_rows!($features, dot_q5_0, 88, acts4::<4>, |b, a, acc| step4::<false>(
                &blocks::q5_0(b),
                a,
                acc
            ));
            dot_rows!($features, dot_q5_1, 96, acts4::<0>, |b, a, acc| step4::<true>(
                &blocks::q5_1(b),
                a,
                acc
            ));
            dot_rows!($features, dot_iq4_nl, 72, acts4::<0>, |b, a, acc| step4_signed(
                &blocks::iq4_nl(b),
                a,
                acc
            ));
            dot_rows!($features, dot_q8_0, 136, acts_bytes4, |b, a, acc| step_bytes4(
                &blocks::q8_0(b),
                a,
                acc
            ));
            dot_rows!($features, dot_q2_k, 84, acts_groups16::<0>, |b, a, acc| step_groups16::<true>(
                &blocks::q2_k(b),
                a,
                acc
            ));
            dot_rows!($features, dot_q3_k, 110, acts_groups16::<2>, |b, a, acc| step_groups16::<false>(
                &blocks::q3_k(b),
                a,
                acc
            ));
            dot_rows!($features, dot_q4_k, 144, acts_groups32, |b, a, acc| step_groups32(
                &blocks::q4_k(b),
                a,
                acc
            ));
            dot_rows!($features, dot_q5_k, 176, acts_groups32, |b, a, acc| step_groups32(
                &blocks::q5_k(b),
                a,
                acc
            ));
            dot_rows!($features, dot_q6_k, 210, acts_groups16::<5>, |b, a, acc| step_groups16::<false>(
                &blocks::q6_k(b),
                a,
                acc
            ));
            dot_rows!($features, dot_iq4_xs, 136, acts_iq4_xs, |b, a, acc| step_iq4_xs(
                &blocks::iq4_xs(b),
                a,
                acc
            ));

            match ty {
                Q8_0 => dot_q8_0(weights, row_bytes, x, out),
                Q4_0 => dot_q4_0(weights, row_bytes, x, out),
                Q4_1 => dot_q4_1(weights, row_bytes, x, out),
                Q5_0 => dot_q5_0(weights, row_bytes, x, out),
                Q5_1 => dot_q5_1(weights, row_bytes, x, out),
                Q2_K => dot_q2_k(weights, row_bytes, x, out),
                Q3_K => dot_q3_k(weights, row_bytes, x, out),
                Q4_K => dot_q4_k(weights, row_bytes, x, out),
                Q5_K => dot_q5_k(weights, row_bytes, x, out),
                Q6_K => dot_q6_k(weights, row_bytes, x, out),
                IQ4_NL => dot_iq4_nl(weights, row_bytes, x, out),
                IQ4_XS => dot_iq4_xs(weights, row_bytes, x, out),
                F32 | F16 | BF16 => unreachable!("unquantised types have kernels of their own"),
            }
        }
    };
}
pub(in crate::kernels::x86) use instantiate;

#[inline]
#[target_feature(enable = "avx")]
fn store32(q: &mut [u8], at: usize, y: __m256i) {
    let q: &mut [u8; 32] = q[at..].first_chunk_mut().expect("room for the block");
    // SAFETY: 32 writable bytes; the store has no alignment.
    unsafe { _mm256_storeu_si256(q.as_mut_ptr().cast(), y) };
}

#[inline]
#[target_feature(enable = "avx")]
fn store_floats(y: __m256) -> [f32; 8] {
    let mut f = [0f32; 8];
    // SAFETY: 32 writable bytes; the store has no alignment.
    unsafe { _mm256_storeu_ps(f.as_mut_ptr(), y) };
    f
}

/// Signed bytes, 128 added. (A loop: the closure of a `map` would be called from a function without
/// the features.)
#[inline]
#[target_feature(enable = "avx2")]
fn unsigned<const N: usize>(mut q: [__m256i; N]) -> [__m256i; N] {
    for y in &mut q {
        *y = _mm256_xor_si256(*y, _mm256_set1_epi8(-128));
    }
    q
}

/// Four blocks in the order of the row, with their scales and minima.
type Row4 = ([__m256i; 4], __m128, __m128);

#[inline]
#[target_feature(enable = "avx2")]
fn row_order(w: &Four) -> Row4 {
    let ((a, b), (c, d)) = (halves(w.low[0], w.high[0]), halves(w.low[1], w.high[1]));
    ([a, b, c, d], w.scale, w.min)
}

#[inline]
#[target_feature(enable = "avx2")]
fn unpack4<const BYTES: usize>(
    bytes: &[u8],
    q: &mut [u8],
    scale: &mut [f32],
    min: &mut [f32],
    read: impl Fn(&[u8; BYTES]) -> Row4,
) {
    let unpack = |b: &[u8; BYTES], q: &mut [u8], scale: &mut [f32], min: &mut [f32]| {
        let (w, scales, mins) = read(b);
        for (i, y) in w.into_iter().enumerate() {
            store32(q, 32 * i, y);
        }
        scale.copy_from_slice(&store_floats(_mm256_zextps128_ps256(scales))[..4]);
        min.copy_from_slice(&store_floats(_mm256_zextps128_ps256(mins))[..4]);
    };
    let (steps, tail) = bytes.as_chunks::<BYTES>();
    for (s, b) in steps.iter().enumerate() {
        unpack(b, &mut q[s * 128..], &mut scale[s * 4..][..4], &mut min[s * 4..][..4]);
    }
    if !tail.is_empty() {
        let (mut padded, mut rest, mut scales, mut mins) = ([0u8; BYTES], [0u8; 128], [0f32; 4], [0f32; 4]);
        padded[..tail.len()].copy_from_slice(tail);
        unpack(&padded, &mut rest, &mut scales, &mut mins);
        let done = steps.len();
        let (q, scale, min) = (&mut q[done * 128..], &mut scale[done * 4..], &mut min[done * 4..]);
        q.copy_from_slice(&rest[..q.len()]);
        scale.copy_from_slice(&scales[..scale.len()]);
        min.copy_from_slice(&mins[..min.len()]);
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn unpack8<const BYTES: usize>(
    bytes: &[u8],
    groups: usize,
    q: &mut [u8],
    scale: &mut [f32],
    min: &mut [f32],
    read: impl Fn(&[u8; BYTES]) -> Super,
) {
    for (s, b) in bytes.as_chunks::<BYTES>().0.iter().enumerate() {
        let w = read(b);
        for (i, y) in w.q.into_iter().enumerate() {
            store32(q, s * 256 + i * 32, y);
        }
        for h in 0..groups / 8 {
            scale[s * groups + 8 * h..][..8].copy_from_slice(&store_floats(w.scale[h]));
            min[s * groups + 8 * h..][..8].copy_from_slice(&store_floats(w.min[h]));
        }
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn straight_iq4_xs(w: Super) -> Super {
    let ((q0, q1), (q2, q3)) = (halves(w.q[0], w.q[1]), halves(w.q[2], w.q[3]));
    let ((q4, q5), (q6, q7)) = (halves(w.q[4], w.q[5]), halves(w.q[6], w.q[7]));
    Super { q: unsigned([q0, q1, q2, q3, q4, q5, q6, q7]), ..w }
}

/// See `quant::unpack_row`, with which the results are identical.
#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::kernels::x86) fn unpack(
    ty: GgmlType,
    b: &[u8],
    q: &mut [u8],
    scale: &mut [f32],
    min: &mut [f32],
) {
    use GgmlType::*;
    match ty {
        Q8_0 => unpack4(b, q, scale, min, |b| {
            let Bytes4 { q, scale } = blocks::q8_0(b);
            (unsigned(q), scale, _mm_setzero_ps())
        }),
        Q4_0 => unpack4(b, q, scale, min, |b| row_order(&blocks::q4_0(b))),
        Q4_1 => unpack4(b, q, scale, min, |b| row_order(&blocks::q4_1(b))),
        Q5_0 => unpack4(b, q, scale, min, |b| row_order(&blocks::q5_0(b))),
        Q5_1 => unpack4(b, q, scale, min, |b| row_order(&blocks::q5_1(b))),
        IQ4_NL => unpack4(b, q, scale, min, |b| {
            let (q, scale, min) = row_order(&blocks::iq4_nl(b));
            (unsigned(q), scale, min)
        }),
        Q2_K => unpack8(b, 16, q, scale, min, |b| blocks::q2_k(b)),
        Q3_K => unpack8(b, 16, q, scale, min, |b| blocks::q3_k(b)),
        Q4_K => unpack8(b, 8, q, scale, min, |b| blocks::q4_k(b)),
        Q5_K => unpack8(b, 8, q, scale, min, |b| blocks::q5_k(b)),
        Q6_K => unpack8(b, 16, q, scale, min, |b| blocks::q6_k(b)),
        IQ4_XS => unpack8(b, 8, q, scale, min, |b| straight_iq4_xs(blocks::iq4_xs(b))),
        F32 | F16 | BF16 => unreachable!("unquantised types have kernels of their own"),
    }
}
