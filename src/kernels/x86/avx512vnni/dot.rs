//! One token: dot products of weight rows, read in place, with one row of activations; and the
//! unpacking of rows for `gemm`, from the same block readers.

#![allow(clippy::needless_range_loop)] // an iterator's closures and adapters would not be inlined

use std::arch::x86_64::*;
use std::cell::RefCell;

use super::blocks::{self, Four, Scales, Super, lanes, two_halves};
use crate::gguf::GgmlType;
use crate::kernels::rows::{Consecutive, Listed, WeightRows};
use crate::kernels::x86::{each_four_tokens, is_amd};
use crate::kernels::{Activations, Q8Row};

/// Rows that go through the blocks together: they share what is loaded of the activations, and their
/// independent sums hide the latency of the adds.
const ROWS: usize = 4;

/// Least distance in bytes between what is multiplied and what is fetched: the bytes that one core's
/// share of the bandwidth brings in while a line is under way.
const PREFETCH: usize = 4096;
/// Most bytes of rows that are multiplied together for the next ones to be fetched into L1.
const NEAR: usize = 6144;
/// Bytes of a cache line, and by how many the second request for one trails the first.
const LINE: usize = 64;
const AGAIN: usize = 4 * LINE;

/// Activations for a step, prepared once for all rows: `q` bytes in the order of the type's, `start` where the integer sum
/// of each begins (minus the zero point times the activations, spread over a group's lanes anyhow); and for each row that
/// [`Scales`] has room for, in the same lanes as there, the scale of each group and `scale * sum`, by which a minimum counts.
#[derive(Clone, Copy)]
struct Acts<const N: usize> {
    q: [__m512i; N],
    start: [__m512i; N],
    scale: __m512,
    sum: __m512,
}

impl<const N: usize> Acts<N> {
    /// Where sum `i` begins; 0 for types without a zero point, for which it need not be loaded.
    #[inline(always)]
    fn start<const ZERO: bool>(&self, i: usize) -> __m512i {
        // SAFETY: only the kernels of this module make `Acts`.
        if ZERO { self.start[i] } else { unsafe { _mm512_setzero_si512() } }
    }
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

/// Scales of the blocks of 128 columns from `at` on, over and over.
#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
fn load_scale4(x: &Q8Row<'_>, at: usize) -> __m512 {
    let s: &[f32; 4] = x.scale[at / 32..].first_chunk().expect("rows of activations are padded");
    // SAFETY: 16 readable bytes; the load has no alignment.
    _mm512_broadcast_f32x4(unsafe { _mm_loadu_ps(s.as_ptr()) })
}

/// The eight sums over 16 columns from `at` on.
#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
fn load_sum8(x: &Q8Row<'_>, at: usize) -> __m256i {
    let s: &[i32; 8] = x.sum[at / 16..].first_chunk().expect("rows of activations are padded");
    // SAFETY: 32 readable bytes; the load has no alignment.
    unsafe { _mm256_loadu_si256(s.as_ptr().cast()) }
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

/// `scale * sum` of the four blocks of 128 columns, over and over.
#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
fn scaled_sums4(scale: __m512, sums: __m256i) -> __m512 {
    let pairs = _mm256_add_epi32(sums, _mm256_srli_epi64(sums, 32));
    let sums = _mm_cvtepi32_ps(_mm256_cvtepi64_epi32(pairs));
    _mm512_mul_ps(scale, _mm512_broadcast_f32x4(sums))
}

/// For types whose zero point is `2^SHIFT` (0: none).
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn acts4<const SHIFT: u32>(x: &Q8Row<'_>, at: usize) -> Acts<2> {
    let (q0, q1) = (load_q(x, at), load_q(x, at + 64));
    let (scale, sums) = (load_scale4(x, at), load_sum8(x, at));
    // Two sums a block, in its first two lanes.
    let spread = _mm512_maskz_expand_epi32(0x3333, _mm512_castsi256_si512(sums));
    Acts {
        q: [
            _mm512_permutex2var_epi64(q0, _mm512_setr_epi64(0, 1, 4, 5, 8, 9, 12, 13), q1),
            _mm512_permutex2var_epi64(q0, _mm512_setr_epi64(2, 3, 6, 7, 10, 11, 14, 15), q1),
        ],
        start: [start::<SHIFT>(spread), _mm512_setzero_si512()],
        scale,
        sum: scaled_sums4(scale, sums),
    }
}

/// For Q8_0: in the order of the row, blocks A and B, C and D.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn acts_q8_0(x: &Q8Row<'_>, at: usize) -> Acts<2> {
    let sums = _mm512_castsi256_si512(load_sum8(x, at));
    // The two sums of a block in the first two of its lanes.
    let upper = _mm512_maskz_compress_epi32(0x00f0, sums);
    Acts {
        q: [load_q(x, at), load_q(x, at + 64)],
        start: [
            start::<7>(_mm512_maskz_expand_epi32(0x0303, sums)),
            start::<7>(_mm512_maskz_expand_epi32(0x0303, upper)),
        ],
        scale: load_scale4(x, at),
        sum: _mm512_setzero_ps(),
    }
}

impl Acts<2> {
    /// The last of a row's steps may begin inside the one before: the first of its four blocks count nothing then.
    #[inline(always)]
    fn keep_last(&mut self, blocks: usize) {
        let lanes = (0xf << (4 - blocks) & 0xf) * 0x1111;
        // SAFETY: only the kernels of this module make `Acts`.
        (self.scale, self.sum) = unsafe { (keep(lanes, self.scale), keep(lanes, self.sum)) };
    }
}

impl Acts<4> {
    fn keep_last(&mut self, _: usize) {
        unreachable!("a row of superblocks has no other steps");
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn keep(lanes: u16, z: __m512) -> __m512 {
    _mm512_maskz_mov_ps(lanes, z)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn sums16(x: &Q8Row<'_>, at: usize) -> __m512i {
    let s: &[i32; 16] = x.sum[at / 16..].first_chunk().expect("rows of activations are padded");
    lanes(s)
}

/// Scales of the eight groups of 32 in 256 columns.
#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
fn load_scale8(x: &Q8Row<'_>, at: usize) -> __m256 {
    let s: &[f32; 8] = x.scale[at / 32..].first_chunk().expect("rows of activations are padded");
    // SAFETY: 32 readable bytes; the load has no alignment.
    unsafe { _mm256_loadu_ps(s.as_ptr()) }
}

/// Scales and `scale * sum` of eight groups of 32, twice.
#[inline]
#[target_feature(enable = "avx512f,avx512dq,avx512vl")]
fn groups32(x: &Q8Row<'_>, at: usize) -> (__m512, __m512) {
    let scale = load_scale8(x, at);
    let sums = sums16(x, at);
    let pairs = _mm512_add_epi32(sums, _mm512_srli_epi64(sums, 32));
    let scaled = _mm256_mul_ps(scale, _mm256_cvtepi32_ps(_mm512_cvtepi64_epi32(pairs)));
    (_mm512_broadcast_f32x8(scale), _mm512_broadcast_f32x8(scaled))
}

/// For Q4_K and Q5_K: groups 0 2, 1 3, 4 6, 5 7.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn acts_k4(x: &Q8Row<'_>, at: usize) -> Acts<4> {
    let pair = |at| {
        let (a, b) = (load_q(x, at), load_q(x, at + 64));
        (_mm512_shuffle_i64x2::<0b01_00_01_00>(a, b), _mm512_shuffle_i64x2::<0b11_10_11_10>(a, b))
    };
    let ((q0, q1), (q2, q3)) = (pair(at), pair(at + 128));
    let (scale, sum) = groups32(x, at);
    Acts { q: [q0, q1, q2, q3], start: [_mm512_setzero_si512(); 4], scale, sum }
}

/// For IQ4_XS: the order of [`Four`], twice.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn acts_iq4_xs(x: &Q8Row<'_>, at: usize) -> Acts<4> {
    let (a, b) = (acts4::<7>(x, at), acts4::<7>(x, at + 128));
    let (scale, sum) = groups32(x, at);
    Acts {
        q: [a.q[0], a.q[1], b.q[0], b.q[1]],
        start: [a.start[0], a.start[1], b.start[0], b.start[1]],
        scale,
        sum,
    }
}

/// For types with groups of 16 in the order of the row.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn acts_groups16<const SHIFT: u32>(x: &Q8Row<'_>, at: usize) -> Acts<4> {
    const TWICE: [i32; 16] = blocks_of_lanes(2, 0);
    const FIRST: [[i32; 16]; 4] =
        [blocks_of_lanes(4, 0), blocks_of_lanes(4, 4), blocks_of_lanes(4, 8), blocks_of_lanes(4, 12)];
    let sums = sums16(x, at);
    let first = |i: usize| start::<SHIFT>(_mm512_maskz_permutexvar_epi32(0x1111, lanes(&FIRST[i]), sums));
    let scale = _mm512_permutexvar_ps(lanes(&TWICE), _mm512_castps256_ps512(load_scale8(x, at)));
    Acts {
        q: [load_q(x, at), load_q(x, at + 64), load_q(x, at + 128), load_q(x, at + 192)],
        start: [first(0), first(1), first(2), first(3)],
        scale,
        sum: _mm512_mul_ps(scale, _mm512_cvtepi32_ps(sums)),
    }
}

/// The scale of each lane's group, of the row that is number `row` in `scale`; `SPREAD` says where its first row's are.
#[inline]
#[target_feature(enable = "avx512f")]
fn of_row(scale: __m512, spread: &[i32; 16], first: usize) -> __m512 {
    _mm512_permutexvar_ps(_mm512_add_epi32(lanes(spread), _mm512_set1_epi32(first as i32)), scale)
}

/// Adds the products of a row's step: `row` is its number in `scale`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn step4<const ZERO: bool>(w: &Four, a: &Acts<2>, scale: __m512, row: usize, acc: __m512) -> __m512 {
    let sum = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(a.start::<ZERO>(0), w.low, a.q[0]), w.high, a.q[1]);
    _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), of_row(scale, &BLOCKS, 4 * row), acc)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn step_q8_0(w: &[__m512i; 2], a: &Acts<2>, scale: __m512, row: usize, mut acc: __m512) -> __m512 {
    const SPREAD: [i32; 16] = blocks_of_lanes(8, 0);
    for i in 0..2 {
        let sum = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(a.start[i], w[i], a.q[i]));
        acc = _mm512_fmadd_ps(sum, of_row(scale, &SPREAD, 4 * row + 2 * i), acc);
    }
    acc
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn step_k4(w: &Super, a: &Acts<4>, scale: __m512, row: usize, acc: __m512) -> __m512 {
    step8::<false>(w, a, scale, 8 * row, &SPREAD_K4, acc)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn step_groups16<const ZERO: bool>(w: &Super, a: &Acts<4>, scale: __m512, _: usize, acc: __m512) -> __m512 {
    step8::<ZERO>(w, a, scale, 0, &SPREAD_16, acc)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn step_iq4_xs(w: &Super, a: &Acts<4>, scale: __m512, row: usize, acc: __m512) -> __m512 {
    step8::<true>(w, a, scale, 8 * row, &SPREAD_IQ4_XS, acc)
}

/// `SPREAD[i]`: the group of each lane of `w[i]`; the row's first group is number `first` in `scale`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn step8<const ZERO: bool>(
    w: &Super,
    a: &Acts<4>,
    scale: __m512,
    first: usize,
    spread: &[[i32; 16]; 4],
    mut acc: __m512,
) -> __m512 {
    for (i, spread) in spread.iter().enumerate() {
        let sum = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(a.start::<ZERO>(i), w[i], a.q[i]));
        acc = _mm512_fmadd_ps(sum, of_row(scale, spread, first), acc);
    }
    acc
}

const LANES: [i32; 16] = blocks_of_lanes(1, 0);
const BLOCKS: [i32; 16] = blocks_of_lanes(4, 0);
const SPREAD_K4: [[i32; 16]; 4] = [two_halves(0, 2), two_halves(1, 3), two_halves(4, 6), two_halves(5, 7)];
const SPREAD_IQ4_XS: [[i32; 16]; 4] =
    [blocks_of_lanes(4, 0), blocks_of_lanes(4, 0), blocks_of_lanes(4, 4), blocks_of_lanes(4, 4)];
const SPREAD_16: [[i32; 16]; 4] =
    [blocks_of_lanes(4, 0), blocks_of_lanes(4, 4), blocks_of_lanes(4, 8), blocks_of_lanes(4, 12)];

/// What the products of some rows and tokens have so far: their own lanes by row, the part of the minima in the lanes of
/// [`Scales`], for as many rows together.
struct Sums<const T: usize> {
    rows: [[__m512; ROWS]; T],
    mins: [[__m512; ROWS]; T],
}

impl<const T: usize> Sums<T> {
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn new() -> Self {
        Self { rows: [[_mm512_setzero_ps(); ROWS]; T], mins: [[_mm512_setzero_ps(); ROWS]; T] }
    }

    /// Adds minima times activations for token `t` and the `TOGETHER` rows from `first` on.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn add_min<const TOGETHER: usize>(&mut self, t: usize, first: usize, min: __m512, sum: __m512) {
        let to = if TOGETHER == 1 { &mut self.rows[t][first] } else { &mut self.mins[t][first / TOGETHER] };
        *to = _mm512_fmadd_ps(min, sum, *to);
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512dq,avx512vl")]
    fn total<const TOGETHER: usize, const MIN: bool>(mut self) -> [[f32; ROWS]; T] {
        let mut totals = [[0f32; ROWS]; T];
        for t in 0..T {
            if MIN && TOGETHER > 1 {
                for r in 0..ROWS {
                    // To the same lanes whatever the row's number is, so that it does not change how sums are rounded.
                    let n = 16 / TOGETHER;
                    let first = of_row(self.mins[t][r / TOGETHER], &LANES, r % TOGETHER * n);
                    let first = _mm512_maskz_mov_ps(((1u32 << n) - 1) as u16, first);
                    self.rows[t][r] = _mm512_add_ps(self.rows[t][r], first);
                }
            }
            totals[t] = reduce4(&self.rows[t]);
        }
        totals
    }
}

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

/// A function that multiplies rows of one type, `$cols` columns or `$bytes` bytes a step, with some tokens:
/// `$acts(x, column)` prepares a token's activations; `$scales(rows)` takes the scales of `$together` rows out of their
/// blocks; `$step(weights, acts, scales, row, acc)` adds the products of those with what `$read(bytes)` made of a row's
/// weights. `$min`: whether the type has minima.
macro_rules! dot_rows {
    ($name:ident, $cols:literal, $bytes:literal, $acts:expr, $together:literal: $($first:literal)+, $min:literal, $scales:expr, $read:path, $step:expr) => {
        // Not inlined: one function for all types would run out of registers.
        #[inline(never)]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
        fn $name<'w, W: WeightRows<'w>, const T: usize>(w: W, x: &[Q8Row<'_>; T], out: [&mut [f32]; T]) {
            // Loops, not `array::map`: the standard library is compiled without these features, so closures with
            // intrinsics are not inlined into it.

            /// The products of the `R` rows from `first` on with every token, of whose activations `acts` has all steps.
            #[inline]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
            fn rows<'w, W: WeightRows<'w>, const R: usize, const T: usize>(
                w: W,
                first: usize,
                acts_of_steps: &[[Acts<{ $cols / 64 }>; T]],
            ) -> [[f32; ROWS]; T] {
                let row_bytes = w.row_bytes();
                let ahead = (R * row_bytes).max(PREFETCH);
                let near = W::GAPLESS && $bytes < $cols && R * row_bytes <= NEAR && is_amd();
                let (mut steps, mut last) = ([[].as_slice(); R], [&[0; $bytes]; R]);
                for r in 0..R {
                    let row = w.row(first + r);
                    steps[r] = &row.as_chunks::<$bytes>().0[..row_bytes / $bytes];
                    last[r] = row.last_chunk().expect("a step");
                }
                let mut sums = Sums::new();
                for (s, acts) in acts_of_steps.iter().enumerate() {
                    let mut step = [&[0; $bytes]; R];
                    for r in 0..R {
                        step[r] = if s < row_bytes / $bytes { &steps[r][s] } else { last[r] };
                    }
                    // The next rows: fetched one after the other, so that their beginnings, where every stream is new,
                    // do not wait for memory.
                    let ahead = w.behind(first, ahead + s * R * $bytes);
                    // Written out for each group of rows: a loop stays one, and then the sums are in memory.
                    $(if $first < R {
                        const FIRST: usize = $first;
                        let mut together = [step[FIRST]; $together];
                        for i in 0..$together {
                            together[i] = step[(FIRST + i).min(R - 1)];
                        }
                        let w: Scales = $scales(together);
                        let mut scale = [w.scale; T];
                        for t in 0..T {
                            scale[t] = _mm512_mul_ps(w.scale, acts[t].scale);
                            if $min {
                                sums.add_min::<$together>(t, FIRST, w.min, acts[t].sum);
                            }
                        }
                        for r in FIRST..(FIRST + $together).min(R) {
                            prefetch(ahead, r * $bytes, $bytes, near);
                            let weights = $read(step[r]);
                            for t in 0..T {
                                sums.rows[t][r] = $step(&weights, &acts[t], scale[t], r - FIRST, sums.rows[t][r]);
                            }
                        }
                    })+
                }
                sums.total::<$together, $min>()
            }

            /// The activations of every token, step by step.
            #[inline]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
            fn prepare<const T: usize>(row_bytes: usize, x: &[Q8Row<'_>; T], acts: &mut Vec<Acts<{ $cols / 64 }>>) {
                acts.clear();
                // The row's last step may begin inside the one before.
                let tail = row_bytes % $bytes / ($bytes / 4);
                for s in 0..row_bytes.div_ceil($bytes) {
                    let whole = (s + 1) * $bytes <= row_bytes;
                    for x in x {
                        let mut of_step = $acts(x, if whole { s * $cols } else { (s * $cols + tail * 32) - $cols });
                        if !whole {
                            of_step.keep_last(tail);
                        }
                        acts.push(of_step);
                    }
                }
            }

            /// The products of rows of less than a step, which get zeros behind them.
            #[inline(never)]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
            fn short<'w, W: WeightRows<'w>, const T: usize>(w: W, x: &[Q8Row<'_>; T], mut out: [&mut [f32]; T]) {
                for i in 0..out[0].len() {
                    let mut padded = [0u8; $bytes];
                    padded[..w.row_bytes()].copy_from_slice(w.row(i));
                    let one = Consecutive { weights: &padded, row_bytes: $bytes };
                    $name(one, x, out.each_mut().map(|out| &mut out[i..i + 1]));
                }
            }

            if w.row_bytes() < $bytes {
                return short(w, x, out);
            }
            thread_local!(static ACTS: RefCell<Vec<Acts<{ $cols / 64 }>>> = const { RefCell::new(Vec::new()) });
            ACTS.with_borrow_mut(|acts| {
                prepare(w.row_bytes(), x, acts);
                let acts = acts.as_chunks::<T>().0;
                let (n, mut done) = (out[0].len(), 0);
                while done < n {
                    if T == 4 && $together < ROWS && n - done >= 2 {
                        // The sums of four rows and tokens would leave no registers for what these types unpack.
                        let sums = rows::<W, 2, T>(w, done, acts);
                        for t in 0..T {
                            out[t][done..done + 2].copy_from_slice(&sums[t][..2]);
                        }
                        done += 2;
                    } else if n - done >= ROWS {
                        let sums = rows::<W, ROWS, T>(w, done, acts);
                        for t in 0..T {
                            *out[t][done..].first_chunk_mut().expect("as many are left") = sums[t];
                        }
                        done += ROWS;
                    } else {
                        let sums = rows::<W, 1, T>(w, done, acts);
                        for t in 0..T {
                            out[t][done] = sums[t][0];
                        }
                        done += 1;
                    }
                }
            });
        }
    };
}

/// Asks for the lines of `bytes` bytes, `ahead` behind `w`: in L2, since L1 may be smaller than the rows that are
/// multiplied in between, and each twice, a little later again, which draws a quarter more from memory on Intel's CPUs; or,
/// where that is faster (`near`), once and into L1 (docs/experiments.md, "Decoding on AVX-512" and "on Zen 4").
#[inline]
#[target_feature(enable = "avx512f")]
fn prefetch(w: *const u8, ahead: usize, bytes: usize, near: bool) {
    for line in (ahead.next_multiple_of(LINE)..ahead + bytes).step_by(LINE) {
        let at = w.wrapping_add(line).cast();
        #[allow(unused_unsafe)] // an unsafe function for older compilers
        // SAFETY: a prefetch of any address is allowed; it never faults.
        unsafe {
            if near {
                _mm_prefetch::<_MM_HINT_T0>(at);
            } else {
                _mm_prefetch::<_MM_HINT_T1>(at);
                _mm_prefetch::<_MM_HINT_T1>(at.wrapping_sub(AGAIN));
            }
        };
    }
}

dot_rows!(dot_q4_0, 128, 72, acts4::<3>, 4: 0, false, blocks::q4_0_scales, blocks::q4_0, step4::<true>);
dot_rows!(dot_iq4_nl, 128, 72, acts4::<7>, 4: 0, false, blocks::q4_0_scales, blocks::iq4_nl, step4::<true>);
dot_rows!(dot_q4_1, 128, 80, acts4::<0>, 4: 0, true, blocks::q4_1_scales, blocks::q4_1, step4::<false>);
dot_rows!(dot_q5_0, 128, 88, acts4::<4>, 4: 0, false, blocks::q5_0_scales, blocks::q5_0, step4::<true>);
dot_rows!(dot_q5_1, 128, 96, acts4::<0>, 4: 0, true, blocks::q5_1_scales, blocks::q5_1, step4::<false>);
dot_rows!(dot_q8_0, 128, 136, acts_q8_0, 4: 0, false, blocks::q8_0_scales, blocks::q8_0, step_q8_0);
dot_rows!(dot_q2_k, 256, 84, acts_groups16::<0>, 1: 0 1 2 3, true, blocks::q2_k_scales, blocks::q2_k, step_groups16::<false>);
dot_rows!(dot_q3_k, 256, 110, acts_groups16::<2>, 1: 0 1 2 3, false, blocks::q3_k_scales, blocks::q3_k, step_groups16::<true>);
dot_rows!(dot_q4_k, 256, 144, acts_k4, 2: 0 2, true, blocks::k4_scales, blocks::q4_k, step_k4);
dot_rows!(dot_q5_k, 256, 176, acts_k4, 2: 0 2, true, blocks::k4_scales, blocks::q5_k, step_k4);
dot_rows!(dot_q6_k, 256, 210, acts_groups16::<5>, 1: 0 1 2 3, false, blocks::q6_k_scales, blocks::q6_k, step_groups16::<true>);
dot_rows!(dot_iq4_xs, 256, 136, acts_iq4_xs, 2: 0 2, false, blocks::iq4_xs_scales, blocks::iq4_xs, step_iq4_xs);

/// `T` tokens from `t` on.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn tokens<'w, W: WeightRows<'w>, const T: usize>(
    ty: GgmlType,
    w: W,
    x: &[Q8Row<'_>; T],
    out: [&mut [f32]; T],
) {
    use GgmlType::*;
    match ty {
        Q4_0 => dot_q4_0(w, x, out),
        IQ4_NL => dot_iq4_nl(w, x, out),
        Q4_1 => dot_q4_1(w, x, out),
        Q5_0 => dot_q5_0(w, x, out),
        Q5_1 => dot_q5_1(w, x, out),
        Q8_0 => dot_q8_0(w, x, out),
        Q2_K => dot_q2_k(w, x, out),
        Q3_K => dot_q3_k(w, x, out),
        Q4_K => dot_q4_k(w, x, out),
        Q5_K => dot_q5_k(w, x, out),
        Q6_K => dot_q6_k(w, x, out),
        IQ4_XS => dot_iq4_xs(w, x, out),
        F32 | F16 | BF16 => unreachable!("unquantised types have kernels of their own"),
    }
}

/// See `Kernels::dot`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn dot(ty: GgmlType, weights: &[u8], row_bytes: usize, x: Q8Row<'_>, out: &mut [f32]) {
    tokens(ty, Consecutive { weights, row_bytes }, &[x], [out]);
}

/// See `Kernels::dot_listed`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn dot_listed(ty: GgmlType, w: Listed<'_>, x: Q8Row<'_>, out: &mut [f32]) {
    tokens(ty, w, &[x], [out]);
}

/// See `Kernels::dot_tokens`: the weights are unpacked once for four tokens.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn dot_tokens(ty: GgmlType, weights: &[u8], row_bytes: usize, x: &Activations, out: &mut [f32]) {
    let w = Consecutive { weights, row_bytes };
    each_four_tokens!(tokens, ty, w, x, out);
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

/// What `read(bytes)` makes of the weights of four blocks, in the order of the row, and `scales(rows)` of their scales.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn unpack4<const BYTES: usize>(
    bytes: &[u8],
    (q, scale, min): (&mut [u8], &mut [f32], &mut [f32]),
    read: impl Fn(&[u8; BYTES]) -> [__m512i; 2],
    scales: impl Fn([&[u8; BYTES]; 4]) -> Scales,
) {
    let (steps, tail) = bytes.as_chunks::<BYTES>();
    for (s, b) in steps.iter().enumerate() {
        let (w, scales) = (read(b), scales([b; 4]));
        store64(q, s * 128, w[0]);
        store64(q, s * 128 + 64, w[1]);
        scale[s * 4..][..4].copy_from_slice(&store_floats(scales.scale)[..4]);
        min[s * 4..][..4].copy_from_slice(&store_floats(scales.min)[..4]);
    }
    if !tail.is_empty() {
        let mut padded = [0u8; BYTES];
        padded[..tail.len()].copy_from_slice(tail);
        let (w, scales) = (read(&padded), scales([&padded; 4]));
        let mut rest = [0u8; 128];
        store64(&mut rest, 0, w[0]);
        store64(&mut rest, 64, w[1]);
        let (q, scale, min) =
            (&mut q[steps.len() * 128..], &mut scale[steps.len() * 4..], &mut min[steps.len() * 4..]);
        q.copy_from_slice(&rest[..q.len()]);
        scale.copy_from_slice(&store_floats(scales.scale)[..scale.len()]);
        min.copy_from_slice(&store_floats(scales.min)[..min.len()]);
    }
}

/// Likewise for superblocks with `groups` groups.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn unpack8<const BYTES: usize, const TOGETHER: usize>(
    bytes: &[u8],
    groups: usize,
    (q, scale, min): (&mut [u8], &mut [f32], &mut [f32]),
    read: impl Fn(&[u8; BYTES]) -> Super,
    scales: impl Fn([&[u8; BYTES]; TOGETHER]) -> Scales,
) {
    for (s, b) in bytes.as_chunks::<BYTES>().0.iter().enumerate() {
        for (i, z) in read(b).into_iter().enumerate() {
            store64(q, s * 256 + i * 64, z);
        }
        let w = scales([b; TOGETHER]);
        scale[s * groups..][..groups].copy_from_slice(&store_floats(w.scale)[..groups]);
        min[s * groups..][..groups].copy_from_slice(&store_floats(w.min)[..groups]);
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn straight4(w: Four) -> [__m512i; 2] {
    straighten4(w.low, w.high).into()
}

#[inline]
#[target_feature(enable = "avx512f")]
fn straight_k4(q: Super) -> Super {
    let ((q0, q1), (q2, q3)) = (straighten_k4(q[0], q[1]), straighten_k4(q[2], q[3]));
    [q0, q1, q2, q3]
}

#[inline]
#[target_feature(enable = "avx512f")]
fn straight_iq4_xs(q: Super) -> Super {
    let ((q0, q1), (q2, q3)) = (straighten4(q[0], q[1]), straighten4(q[2], q[3]));
    [q0, q1, q2, q3]
}

/// See `quant::unpack_row`, with which the results are identical.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn unpack(ty: GgmlType, b: &[u8], q: &mut [u8], scale: &mut [f32], min: &mut [f32]) {
    use GgmlType::*;
    use blocks::*;
    let to = (q, scale, min);
    match ty {
        Q8_0 => unpack4(b, to, |b| q8_0(b), |b| q8_0_scales(b)),
        Q4_0 => unpack4(b, to, |b| straight4(q4_0(b)), |b| q4_0_scales(b)),
        Q4_1 => unpack4(b, to, |b| straight4(q4_1(b)), |b| q4_1_scales(b)),
        Q5_0 => unpack4(b, to, |b| straight4(q5_0(b)), |b| q5_0_scales(b)),
        Q5_1 => unpack4(b, to, |b| straight4(q5_1(b)), |b| q5_1_scales(b)),
        IQ4_NL => unpack4(b, to, |b| straight4(iq4_nl(b)), |b| q4_0_scales(b)),
        Q2_K => unpack8(b, 16, to, |b| q2_k(b), |b| q2_k_scales(b)),
        Q3_K => unpack8(b, 16, to, |b| q3_k(b), |b| q3_k_scales(b)),
        Q4_K => unpack8(b, 8, to, |b| straight_k4(q4_k(b)), |b| k4_scales(b)),
        Q5_K => unpack8(b, 8, to, |b| straight_k4(q5_k(b)), |b| k4_scales(b)),
        Q6_K => unpack8(b, 16, to, |b| q6_k(b), |b| q6_k_scales(b)),
        IQ4_XS => unpack8(b, 8, to, |b| straight_iq4_xs(iq4_xs(b)), |b| iq4_xs_scales(b)),
        F32 | F16 | BF16 => unreachable!("unquantised types have kernels of their own"),
    }
}
