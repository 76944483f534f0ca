//! One token: dot products of weight rows, read in place, with one row of activations; and the
//! unpacking of rows for `gemm`, from the same block readers.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::blocks::{self, Four, Q8, Super, lanes};
use crate::gguf::GgmlType;
use crate::kernels::{Activations, Q8Row};

/// Rows that go through the blocks together: they share the activations' rearrangement, and their
/// independent sums hide the latency of the adds.
const ROWS: usize = 4;

/// Least distance in bytes between what is multiplied and what is fetched: the bytes that one core's
/// share of the bandwidth brings in while a line is under way.
const PREFETCH: usize = 8192;

/// Activations for a [`Four`]: bytes in the order of its `low` and `high`, in lane `4 b` the start
/// of block `b`'s integer sum (`-zero * sum`), its scale in each of its lanes, and
/// `scale * sum` in its first lane.
struct Acts4 {
    low: __m512i,
    high: __m512i,
    start: __m512i,
    scale: __m512,
    sum: __m512,
}

/// Activations for a [`Super`]: likewise, but scales and sums by group, as in [`Super`].
struct Acts8 {
    q: [__m512i; 4],
    start: [__m512i; 4],
    scale: __m512,
    sum: __m512,
}

const fn blocks_of_lanes(per: usize, first: usize) -> [i32; 16] {
    let mut index = [0; 16];
    let mut i = 0;
    while i < 16 {
        index[i] = (first + i / per) as i32;
        i += 1;
    }
    index
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_q(x: &Q8Row<'_>, at: usize) -> __m512i {
    let q: &[i8; 64] = x.q[at..].first_chunk().expect("rows of activations are padded");
    // SAFETY: 64 readable bytes; the load has no alignment.
    unsafe { _mm512_loadu_si512(q.as_ptr().cast()) }
}

/// Scales of the blocks of 128 columns from `at` on, in the first four lanes.
#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
fn load_scale4(x: &Q8Row<'_>, at: usize) -> __m512 {
    let s: &[f32; 4] = x.scale[at / 32..].first_chunk().expect("rows of activations are padded");
    // SAFETY: 16 readable bytes; the load has no alignment.
    _mm512_zextps128_ps512(unsafe { _mm_loadu_ps(s.as_ptr()) })
}

/// The eight sums over 16 columns from `at` on, in the first eight lanes.
#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
fn load_sum8(x: &Q8Row<'_>, at: usize) -> __m512i {
    let s: &[i32; 8] = x.sum[at / 16..].first_chunk().expect("rows of activations are padded");
    // SAFETY: 32 readable bytes; the load has no alignment.
    _mm512_zextsi256_si512(unsafe { _mm256_loadu_si256(s.as_ptr().cast()) })
}

#[inline]
#[target_feature(enable = "avx512f")]
fn start<const SHIFT: u32>(sums: __m512i) -> __m512i {
    if SHIFT == 0 {
        _mm512_setzero_si512()
    } else {
        _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(sums, SHIFT))
    }
}

/// For types whose zero point is `2^SHIFT` (0: none).
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn acts4<const SHIFT: u32>(x: &Q8Row<'_>, at: usize) -> Acts4 {
    const SPREAD: [i32; 16] = blocks_of_lanes(4, 0);
    let (q0, q1) = (load_q(x, at), load_q(x, at + 64));
    // Two sums a block, in its first two lanes.
    let sums = _mm512_maskz_expand_epi32(0x3333, load_sum8(x, at));
    let scale = _mm512_permutexvar_ps(lanes(&SPREAD), load_scale4(x, at));
    Acts4 {
        low: _mm512_permutex2var_epi64(q0, _mm512_setr_epi64(0, 1, 4, 5, 8, 9, 12, 13), q1),
        high: _mm512_permutex2var_epi64(q0, _mm512_setr_epi64(2, 3, 6, 7, 10, 11, 14, 15), q1),
        start: start::<SHIFT>(sums),
        scale,
        sum: _mm512_mul_ps(scale, _mm512_cvtepi32_ps(sums)),
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn step4<const MIN: bool>(w: &Four, a: &Acts4, acc: __m512) -> __m512 {
    let sum = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(a.start, w.low, a.low), w.high, a.high);
    let acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(w.scale, a.scale), acc);
    if MIN { _mm512_fmadd_ps(w.min, a.sum, acc) } else { acc }
}

/// Activations for [`Q8_0`](blocks::Q8): in the order of the row, blocks A and B, C and D.
struct ActsQ8 {
    q: [__m512i; 2],
    start: [__m512i; 2],
    scale: [__m512; 2],
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn acts_q8_0(x: &Q8Row<'_>, at: usize) -> ActsQ8 {
    const LOW: [i32; 16] = blocks_of_lanes(8, 0);
    const HIGH: [i32; 16] = blocks_of_lanes(8, 2);
    let (sums, scale) = (load_sum8(x, at), load_scale4(x, at));
    // The two sums of a block in the first two of its lanes.
    let upper = _mm512_maskz_compress_epi32(0x00f0, sums);
    ActsQ8 {
        q: [load_q(x, at), load_q(x, at + 64)],
        start: [
            start::<7>(_mm512_maskz_expand_epi32(0x0303, sums)),
            start::<7>(_mm512_maskz_expand_epi32(0x0303, upper)),
        ],
        scale: [_mm512_permutexvar_ps(lanes(&LOW), scale), _mm512_permutexvar_ps(lanes(&HIGH), scale)],
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn step_q8_0(w: &Q8, a: &ActsQ8, mut acc: __m512) -> __m512 {
    for i in 0..2 {
        let sum = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(a.start[i], w.q[i], a.q[i]));
        acc = _mm512_fmadd_ps(sum, _mm512_mul_ps(w.scale[i], a.scale[i]), acc);
    }
    acc
}

/// The last of a row's steps may begin inside the one before: the first blocks count nothing then.
trait KeepLast {
    fn keep_last(&mut self, blocks: usize);
}

impl KeepLast for Acts4 {
    #[inline(always)]
    fn keep_last(&mut self, blocks: usize) {
        let lanes = (0xffffu32 << (16 - 4 * blocks)) as u16;
        // SAFETY: only the kernels of this module make `Acts4`.
        (self.scale, self.sum) = unsafe { (keep(lanes, self.scale), keep(lanes, self.sum)) };
    }
}

impl KeepLast for ActsQ8 {
    #[inline(always)]
    fn keep_last(&mut self, blocks: usize) {
        let lanes = 0xffff_ffffu64 << (32 - 8 * blocks);
        // SAFETY: only the kernels of this module make `ActsQ8`.
        self.scale =
            unsafe { [keep(lanes as u16, self.scale[0]), keep((lanes >> 16) as u16, self.scale[1])] };
    }
}

impl KeepLast for Acts8 {
    fn keep_last(&mut self, _: usize) {
        unreachable!("a row of superblocks has no other steps");
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn keep(lanes: u16, z: __m512) -> __m512 {
    _mm512_maskz_mov_ps(lanes, z)
}

/// Scales and sums of the eight groups of 32 in 256 columns, in the lower eight lanes.
#[inline]
#[target_feature(enable = "avx512f,avx512dq,avx512vl")]
fn groups32(x: &Q8Row<'_>, at: usize) -> (__m512, __m512) {
    let s: &[f32; 8] = x.scale[at / 32..].first_chunk().expect("rows of activations are padded");
    // SAFETY: 32 readable bytes; the load has no alignment.
    let scale = _mm512_zextps256_ps512(unsafe { _mm256_loadu_ps(s.as_ptr()) });
    let sums = sums16(x, at);
    let pairs = _mm512_add_epi32(sums, _mm512_srli_epi64(sums, 32));
    let sum32 = _mm512_zextsi256_si512(_mm512_cvtepi64_epi32(pairs));
    (scale, _mm512_mul_ps(scale, _mm512_cvtepi32_ps(sum32)))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn sums16(x: &Q8Row<'_>, at: usize) -> __m512i {
    let s: &[i32; 16] = x.sum[at / 16..].first_chunk().expect("rows of activations are padded");
    lanes(s)
}

/// For Q4_K and Q5_K: groups 0 2, 1 3, 4 6, 5 7.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn acts_k4(x: &Q8Row<'_>, at: usize) -> Acts8 {
    let pair = |at| {
        let (a, b) = (load_q(x, at), load_q(x, at + 64));
        (_mm512_shuffle_i64x2::<0b01_00_01_00>(a, b), _mm512_shuffle_i64x2::<0b11_10_11_10>(a, b))
    };
    let ((q0, q1), (q2, q3)) = (pair(at), pair(at + 128));
    let (scale, sum) = groups32(x, at);
    Acts8 { q: [q0, q1, q2, q3], start: [_mm512_setzero_si512(); 4], scale, sum }
}

/// For IQ4_XS: the order of [`Four`], twice.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn acts_iq4_xs(x: &Q8Row<'_>, at: usize) -> Acts8 {
    let (a, b) = (acts4::<7>(x, at), acts4::<7>(x, at + 128));
    let zero = _mm512_setzero_si512();
    let (scale, sum) = groups32(x, at);
    Acts8 { q: [a.low, a.high, b.low, b.high], start: [a.start, zero, b.start, zero], scale, sum }
}

/// For types with groups of 16 in the order of the row.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn acts_groups16<const SHIFT: u32>(x: &Q8Row<'_>, at: usize) -> Acts8 {
    const TWICE: [i32; 16] = blocks_of_lanes(2, 0);
    const FIRST: [[i32; 16]; 4] =
        [blocks_of_lanes(4, 0), blocks_of_lanes(4, 4), blocks_of_lanes(4, 8), blocks_of_lanes(4, 12)];
    let sums = sums16(x, at);
    let first = |i: usize| start::<SHIFT>(_mm512_maskz_permutexvar_epi32(0x1111, lanes(&FIRST[i]), sums));
    let scale = _mm512_permutexvar_ps(lanes(&TWICE), groups32(x, at).0);
    Acts8 {
        q: [load_q(x, at), load_q(x, at + 64), load_q(x, at + 128), load_q(x, at + 192)],
        start: [first(0), first(1), first(2), first(3)],
        scale,
        sum: _mm512_mul_ps(scale, _mm512_cvtepi32_ps(sums)),
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn step_k4(w: &Super, a: &Acts8, acc: __m512) -> __m512 {
    step8::<true>(w, a, &SPREAD_K4, acc)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn step_groups16<const MIN: bool>(w: &Super, a: &Acts8, acc: __m512) -> __m512 {
    step8::<MIN>(w, a, &SPREAD_16, acc)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn step_iq4_xs(w: &Super, a: &Acts8, acc: __m512) -> __m512 {
    step8::<false>(w, a, &SPREAD_IQ4_XS, acc)
}

/// `SPREAD[i]`: the group of each lane of `q[i]`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn step8<const MIN: bool>(w: &Super, a: &Acts8, spread: &[[i32; 16]; 4], mut acc: __m512) -> __m512 {
    let scale = _mm512_mul_ps(w.scale, a.scale);
    for (i, spread) in spread.iter().enumerate() {
        let sum = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(a.start[i], w.q[i], a.q[i]));
        acc = _mm512_fmadd_ps(sum, _mm512_permutexvar_ps(lanes(spread), scale), acc);
    }
    if MIN { _mm512_fmadd_ps(w.min, a.sum, acc) } else { acc }
}

const fn two_groups(low: i32, high: i32) -> [i32; 16] {
    let mut index = [low; 16];
    let mut i = 8;
    while i < 16 {
        index[i] = high;
        i += 1;
    }
    index
}

const SPREAD_K4: [[i32; 16]; 4] = [two_groups(0, 2), two_groups(1, 3), two_groups(4, 6), two_groups(5, 7)];
const SPREAD_IQ4_XS: [[i32; 16]; 4] =
    [blocks_of_lanes(4, 0), blocks_of_lanes(4, 0), blocks_of_lanes(4, 4), blocks_of_lanes(4, 4)];
const SPREAD_16: [[i32; 16]; 4] =
    [blocks_of_lanes(4, 0), blocks_of_lanes(4, 4), blocks_of_lanes(4, 8), blocks_of_lanes(4, 12)];

/// The sums of the lanes of four registers.
#[inline]
#[target_feature(enable = "avx512f,avx512dq,avx512vl")]
fn reduce4(a: &[__m512; 4]) -> [f32; 4] {
    let halves = |z| _mm256_add_ps(_mm512_castps512_ps256(z), _mm512_extractf32x8_ps::<1>(z));
    let (low, high) =
        (_mm256_hadd_ps(halves(a[0]), halves(a[1])), _mm256_hadd_ps(halves(a[2]), halves(a[3])));
    let four = _mm256_hadd_ps(low, high);
    let four = _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps::<1>(four));
    let mut sums = [0f32; 4];
    // SAFETY: 16 writable bytes; the store has no alignment.
    unsafe { _mm_storeu_ps(sums.as_mut_ptr(), four) };
    sums
}

/// A function that multiplies rows of one type, `$cols` columns or `$bytes` bytes a step, with some
/// tokens: `$acts(x, column)` prepares a token's activations, `$step(weights, acts, acc)` adds their
/// products with what `$read(bytes)` made of the weights.
macro_rules! dot_rows {
    ($name:ident, $cols:literal, $bytes:literal, $acts:expr, $read:path, $step:expr) => {
        // Not inlined: one function for all types would run out of registers.
        #[inline(never)]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
        fn $name<const T: usize>(weights: &[u8], row_bytes: usize, x: &[Q8Row<'_>; T], out: [&mut [f32]; T]) {
            /// The products of `R` rows with every token; those of missing rows are 0.
            #[inline]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
            fn rows<const R: usize, const T: usize>(
                w: &[u8],
                row_bytes: usize,
                x: &[Q8Row<'_>; T],
            ) -> [[f32; ROWS]; T] {
                // Loops, not `array::map`: the standard library is compiled without these features, so
                // closures with intrinsics are not inlined into it.
                let whole = row_bytes / $bytes;
                let mut steps = [[].as_slice(); R];
                for r in 0..R {
                    steps[r] = &w[r * row_bytes..][..row_bytes].as_chunks::<$bytes>().0[..whole];
                }
                let mut acc = [[_mm512_setzero_ps(); ROWS]; T];
                let ahead = (R * row_bytes).max(PREFETCH);
                for s in 0..whole {
                    let mut a = [const { MaybeUninit::uninit() }; T];
                    for t in 0..T {
                        a[t].write($acts(&x[t], s * $cols));
                    }
                    for r in 0..R {
                        // The next rows lie behind these: fetched in the order of the file, so that
                        // their beginnings, where every stream is new, do not wait for memory.
                        prefetch(w, ahead + (s * R + r) * $bytes, $bytes);
                        let weights = $read(&steps[r][s]);
                        for t in 0..T {
                            // SAFETY: written above.
                            let a = unsafe { a[t].assume_init_ref() };
                            acc[t][r] = $step(&weights, a, acc[t][r]);
                        }
                    }
                }
                let tail = row_bytes % $bytes;
                if tail > 0 {
                    prefetch(w, ahead + R * whole * $bytes, R * tail);
                    let blocks = tail / ($bytes / 4);
                    for t in 0..T {
                        let mut a = $acts(&x[t], (whole * $cols + blocks * 32).saturating_sub($cols));
                        if whole > 0 {
                            a.keep_last(blocks);
                        }
                        for r in 0..R {
                            let (row, mut padded) = (&w[r * row_bytes..][..row_bytes], [0u8; $bytes]);
                            // The row's last step begins inside the one before: what that did counts
                            // nothing. A row of less than a step has zeros behind it.
                            let step = row.last_chunk().unwrap_or_else(|| {
                                padded[..tail].copy_from_slice(row);
                                &padded
                            });
                            acc[t][r] = $step(&$read(step), &a, acc[t][r]);
                        }
                    }
                }
                let mut sums = [[0f32; ROWS]; T];
                for t in 0..T {
                    sums[t] = reduce4(&acc[t]);
                }
                sums
            }
            let (n, mut done) = (out[0].len(), 0);
            while done < n {
                let w = &weights[done * row_bytes..];
                let (sums, r) = if n - done >= ROWS {
                    (rows::<ROWS, T>(w, row_bytes, x), ROWS)
                } else {
                    (rows::<1, T>(w, row_bytes, x), 1)
                };
                for t in 0..T {
                    out[t][done..done + r].copy_from_slice(&sums[t][..r]);
                }
                done += r;
            }
        }
    };
}

/// Fetches `bytes` bytes, `ahead` behind the start of `w`: into L2, since L1 may be smaller than the
/// rows that are multiplied in between.
#[inline]
#[target_feature(enable = "avx512f")]
fn prefetch(w: &[u8], ahead: usize, bytes: usize) {
    for line in (0..bytes).step_by(64) {
        let at = w.as_ptr().wrapping_add(ahead + line).cast();
        #[allow(unused_unsafe)] // an unsafe function for older compilers
        // SAFETY: a prefetch of any address is allowed; it never faults.
        unsafe {
            _mm_prefetch::<_MM_HINT_T1>(at)
        };
    }
}

dot_rows!(dot_q4_0, 128, 72, acts4::<3>, blocks::q4_0, step4::<false>);
dot_rows!(dot_iq4_nl, 128, 72, acts4::<7>, blocks::iq4_nl, step4::<false>);
dot_rows!(dot_q4_1, 128, 80, acts4::<0>, blocks::q4_1, step4::<true>);
dot_rows!(dot_q5_0, 128, 88, acts4::<4>, blocks::q5_0, step4::<false>);
dot_rows!(dot_q5_1, 128, 96, acts4::<0>, blocks::q5_1, step4::<true>);
dot_rows!(dot_q8_0, 128, 136, acts_q8_0, blocks::q8_0, step_q8_0);
dot_rows!(dot_q2_k, 256, 84, acts_groups16::<0>, blocks::q2_k, step_groups16::<true>);
dot_rows!(dot_q3_k, 256, 110, acts_groups16::<2>, blocks::q3_k, step_groups16::<false>);
dot_rows!(dot_q4_k, 256, 144, acts_k4, blocks::q4_k, step_k4);
dot_rows!(dot_q5_k, 256, 176, acts_k4, blocks::q5_k, step_k4);
dot_rows!(dot_q6_k, 256, 210, acts_groups16::<5>, blocks::q6_k, step_groups16::<false>);
dot_rows!(dot_iq4_xs, 256, 136, acts_iq4_xs, blocks::iq4_xs, step_iq4_xs);

/// `T` tokens from `t` on.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn tokens<const T: usize>(
    ty: GgmlType,
    weights: &[u8],
    row_bytes: usize,
    x: &[Q8Row<'_>; T],
    out: [&mut [f32]; T],
) {
    use GgmlType::*;
    match ty {
        Q4_0 => dot_q4_0(weights, row_bytes, x, out),
        IQ4_NL => dot_iq4_nl(weights, row_bytes, x, out),
        Q4_1 => dot_q4_1(weights, row_bytes, x, out),
        Q5_0 => dot_q5_0(weights, row_bytes, x, out),
        Q5_1 => dot_q5_1(weights, row_bytes, x, out),
        Q8_0 => dot_q8_0(weights, row_bytes, x, out),
        Q2_K => dot_q2_k(weights, row_bytes, x, out),
        Q3_K => dot_q3_k(weights, row_bytes, x, out),
        Q4_K => dot_q4_k(weights, row_bytes, x, out),
        Q5_K => dot_q5_k(weights, row_bytes, x, out),
        Q6_K => dot_q6_k(weights, row_bytes, x, out),
        IQ4_XS => dot_iq4_xs(weights, row_bytes, x, out),
        F32 | F16 | BF16 => unreachable!("unquantised types have kernels of their own"),
    }
}

/// See `Kernels::dot`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn dot(ty: GgmlType, weights: &[u8], row_bytes: usize, x: Q8Row<'_>, out: &mut [f32]) {
    tokens(ty, weights, row_bytes, &[x], [out]);
}

/// See `Kernels::dot_tokens`: the weights are unpacked once for four tokens, whose sums and those of
/// four rows fill half of the registers.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn dot_tokens(ty: GgmlType, weights: &[u8], row_bytes: usize, x: &Activations, out: &mut [f32]) {
    let n = weights.len() / row_bytes;
    let (mut t, mut rest) = (0, out);
    while t < x.rows() {
        match x.rows() - t {
            1 => {
                tokens(ty, weights, row_bytes, &[x.row(t)], [&mut rest[..n]]);
                return;
            }
            2 | 3 => {
                let (now, later) = rest.split_at_mut(2 * n);
                let (a, b) = now.split_at_mut(n);
                tokens(ty, weights, row_bytes, &[x.row(t), x.row(t + 1)], [a, b]);
                (t, rest) = (t + 2, later);
            }
            _ => {
                let (now, later) = rest.split_at_mut(4 * n);
                let (ab, cd) = now.split_at_mut(2 * n);
                let ((a, b), (c, d)) = (ab.split_at_mut(n), cd.split_at_mut(n));
                let four = [x.row(t), x.row(t + 1), x.row(t + 2), x.row(t + 3)];
                tokens(ty, weights, row_bytes, &four, [a, b, c, d]);
                (t, rest) = (t + 4, later);
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store64(q: &mut [u8], at: usize, z: __m512i) {
    let q: &mut [u8; 64] = q[at..].first_chunk_mut().expect("room for the block");
    // SAFETY: 64 writable bytes; the store has no alignment.
    unsafe { _mm512_storeu_si512(q.as_mut_ptr().cast(), z) };
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store_floats(z: __m512) -> [f32; 16] {
    let mut f = [0f32; 16];
    // SAFETY: 64 writable bytes; the store has no alignment.
    unsafe { _mm512_storeu_ps(f.as_mut_ptr(), z) };
    f
}

/// The order of [`Four`] to that of the row.
#[inline]
#[target_feature(enable = "avx512f")]
fn straighten4(low: __m512i, high: __m512i) -> (__m512i, __m512i) {
    (
        _mm512_permutex2var_epi64(low, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high),
        _mm512_permutex2var_epi64(low, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), high),
    )
}

/// The order of Q4_K to that of the row; undoes itself.
#[inline]
#[target_feature(enable = "avx512f")]
fn straighten_k4(a: __m512i, b: __m512i) -> (__m512i, __m512i) {
    (_mm512_shuffle_i64x2::<0b01_00_01_00>(a, b), _mm512_shuffle_i64x2::<0b11_10_11_10>(a, b))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn unpack4<const BYTES: usize>(
    bytes: &[u8],
    q: &mut [u8],
    scale: &mut [f32],
    min: &mut [f32],
    read: impl Fn(&[u8; BYTES]) -> (__m512i, __m512i, __m512, __m512),
) {
    let (steps, tail) = bytes.as_chunks::<BYTES>();
    for (s, b) in steps.iter().enumerate() {
        let (z0, z1, scales, mins) = read(b);
        store64(q, s * 128, z0);
        store64(q, s * 128 + 64, z1);
        scale[s * 4..][..4].copy_from_slice(&store_floats(scales)[..4]);
        min[s * 4..][..4].copy_from_slice(&store_floats(mins)[..4]);
    }
    if !tail.is_empty() {
        let mut padded = [0u8; BYTES];
        padded[..tail.len()].copy_from_slice(tail);
        let (z0, z1, scales, mins) = read(&padded);
        let mut rest = [0u8; 128];
        store64(&mut rest, 0, z0);
        store64(&mut rest, 64, z1);
        let (q, scale, min) =
            (&mut q[steps.len() * 128..], &mut scale[steps.len() * 4..], &mut min[steps.len() * 4..]);
        q.copy_from_slice(&rest[..q.len()]);
        scale.copy_from_slice(&store_floats(scales)[..scale.len()]);
        min.copy_from_slice(&store_floats(mins)[..min.len()]);
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn row_order(w: &Four) -> (__m512i, __m512i, __m512, __m512) {
    let (z0, z1) = straighten4(w.low, w.high);
    (z0, z1, _mm512_maskz_compress_ps(0x1111, w.scale), _mm512_maskz_compress_ps(0x1111, w.min))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
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
        for (i, z) in w.q.into_iter().enumerate() {
            store64(q, s * 256 + i * 64, z);
        }
        scale[s * groups..][..groups].copy_from_slice(&store_floats(w.scale)[..groups]);
        min[s * groups..][..groups].copy_from_slice(&store_floats(w.min)[..groups]);
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn straight_k4(w: Super) -> Super {
    let ((q0, q1), (q2, q3)) = (straighten_k4(w.q[0], w.q[1]), straighten_k4(w.q[2], w.q[3]));
    Super { q: [q0, q1, q2, q3], ..w }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn straight_iq4_xs(w: Super) -> Super {
    let ((q0, q1), (q2, q3)) = (straighten4(w.q[0], w.q[1]), straighten4(w.q[2], w.q[3]));
    Super { q: [q0, q1, q2, q3], ..w }
}

/// See `quant::unpack_row`, with which the results are identical.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn unpack(ty: GgmlType, b: &[u8], q: &mut [u8], scale: &mut [f32], min: &mut [f32]) {
    use GgmlType::*;
    match ty {
        Q8_0 => unpack4(b, q, scale, min, |b| {
            let w = blocks::q8_0(b);
            let two = |z| _mm512_maskz_compress_ps(0x0101, z);
            let scale = _mm512_mask_expand_ps(two(w.scale[0]), 0b1100, two(w.scale[1]));
            (w.q[0], w.q[1], scale, _mm512_setzero_ps())
        }),
        Q4_0 => unpack4(b, q, scale, min, |b| row_order(&blocks::q4_0(b))),
        Q4_1 => unpack4(b, q, scale, min, |b| row_order(&blocks::q4_1(b))),
        Q5_0 => unpack4(b, q, scale, min, |b| row_order(&blocks::q5_0(b))),
        Q5_1 => unpack4(b, q, scale, min, |b| row_order(&blocks::q5_1(b))),
        IQ4_NL => unpack4(b, q, scale, min, |b| row_order(&blocks::iq4_nl(b))),
        Q2_K => unpack8(b, 16, q, scale, min, |b| blocks::q2_k(b)),
        Q3_K => unpack8(b, 16, q, scale, min, |b| blocks::q3_k(b)),
        Q4_K => unpack8(b, 8, q, scale, min, |b| straight_k4(blocks::q4_k(b))),
        Q5_K => unpack8(b, 8, q, scale, min, |b| straight_k4(blocks::q5_k(b))),
        Q6_K => unpack8(b, 16, q, scale, min, |b| blocks::q6_k(b)),
        IQ4_XS => unpack8(b, 8, q, scale, min, |b| straight_iq4_xs(blocks::iq4_xs(b))),
        F32 | F16 | BF16 => unreachable!("unquantised types have kernels of their own"),
    }
}
