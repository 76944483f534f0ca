//! One token: dot products of weight rows, read in place, with one row of activations; and the
//! unpacking of rows for `gemm`, from the same block readers.

#![allow(clippy::needless_range_loop)] // an iterator's closures and adapters would not be inlined

use std::arch::x86_64::*;
use std::cell::RefCell;

use super::blocks::{self, Four, Scales, Super, lanes};
use crate::gguf::GgmlType;
use crate::kernels::rows::{Consecutive, Listed, WeightRows};
use crate::kernels::x86::{each_tokens, is_amd};
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

/// Activations for a step, prepared once for all rows: `q` bytes in the order of the type's; and for each sum of a group of each
/// row that goes together, in the lanes where these are, the group's scale, and what the activations' sum is needed for: for a
/// type with a zero point what is to be added, minus it times the sum; for one with minima `scale * sum`, as bits.
#[derive(Clone, Copy)]
struct Acts<const N: usize> {
    q: [__m512i; N],
    scale: __m512,
    sum: __m512i,
}

impl<const N: usize> Acts<N> {
    /// From the order of [`Scales`] to that of the sums.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn in_order(self, order: &[i32; 16]) -> Self {
        Self {
            scale: _mm512_permutexvar_ps(lanes(order), self.scale),
            sum: _mm512_permutexvar_epi32(lanes(order), self.sum),
            ..self
        }
    }
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

/// [`Acts::sum`] of a type whose zero point is `2^SHIFT`, or of one with minima (0).
#[inline]
#[target_feature(enable = "avx512f")]
fn counted<const SHIFT: u32>(scale: __m512, sums: __m512i) -> __m512i {
    if SHIFT == 0 {
        _mm512_castps_si512(_mm512_mul_ps(scale, _mm512_cvtepi32_ps(sums)))
    } else {
        _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(sums, SHIFT))
    }
}

/// The bytes `q` of the four blocks of 128 columns, and the rest over and over.
#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
fn of_four_blocks<const SHIFT: u32>(x: &Q8Row<'_>, at: usize, q: [__m512i; 2]) -> Acts<2> {
    let (scale, sums) = (load_scale4(x, at), load_sum8(x, at));
    let pairs = _mm256_add_epi32(sums, _mm256_srli_epi64(sums, 32));
    let sums = _mm512_broadcast_i32x4(_mm256_cvtepi64_epi32(pairs));
    Acts { q, scale, sum: counted::<SHIFT>(scale, sums) }
}

/// For types in the order of [`Four`].
#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
fn acts4<const SHIFT: u32>(x: &Q8Row<'_>, at: usize) -> Acts<2> {
    let (q0, q1) = (load_q(x, at), load_q(x, at + 64));
    of_four_blocks::<SHIFT>(
        x,
        at,
        [
            _mm512_permutex2var_epi64(q0, _mm512_setr_epi64(0, 1, 4, 5, 8, 9, 12, 13), q1),
            _mm512_permutex2var_epi64(q0, _mm512_setr_epi64(2, 3, 6, 7, 10, 11, 14, 15), q1),
        ],
    )
}

impl Acts<2> {
    /// The last of a row's steps may begin inside the one before: the first of its four blocks count nothing then.
    #[inline(always)]
    fn keep_last(&mut self, blocks: usize) {
        let lanes = (0xf << (4 - blocks) & 0xf) * 0x1111;
        // SAFETY: only the kernels of this module make `Acts`.
        (self.scale, self.sum) = unsafe { keep(lanes, self.scale, self.sum) };
    }
}

impl Acts<4> {
    fn keep_last(&mut self, _: usize) {
        unreachable!("a row of superblocks has no other steps");
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn keep(lanes: u16, scale: __m512, sum: __m512i) -> (__m512, __m512i) {
    (_mm512_maskz_mov_ps(lanes, scale), _mm512_maskz_mov_epi32(lanes, sum))
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

/// The bytes `q` of the eight groups of 32 in 256 columns, and the rest twice.
#[inline]
#[target_feature(enable = "avx512f,avx512dq,avx512vl")]
fn of_groups32<const SHIFT: u32>(x: &Q8Row<'_>, at: usize, q: [__m512i; 4]) -> Acts<4> {
    let (scale, sums) = (_mm512_broadcast_f32x8(load_scale8(x, at)), sums16(x, at));
    let pairs = _mm512_add_epi32(sums, _mm512_srli_epi64(sums, 32));
    let sums = _mm512_broadcast_i32x8(_mm512_cvtepi64_epi32(pairs));
    Acts { q, scale, sum: counted::<SHIFT>(scale, sums) }
}

/// For Q4_K and Q5_K: the halves of even groups, then those of odd ones.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn acts_k4(x: &Q8Row<'_>, at: usize) -> Acts<4> {
    let q = [load_q(x, at), load_q(x, at + 64), load_q(x, at + 128), load_q(x, at + 192)];
    of_groups32::<0>(x, at, straight_k4(q))
}

/// For IQ4_XS: the order of [`Four`], twice.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn acts_iq4_xs(x: &Q8Row<'_>, at: usize) -> Acts<4> {
    let (a, b) = (acts4::<0>(x, at), acts4::<0>(x, at + 128));
    of_groups32::<7>(x, at, [a.q[0], a.q[1], b.q[0], b.q[1]])
}

/// For types with groups of 16 in the order of the row.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn acts_groups16<const SHIFT: u32>(x: &Q8Row<'_>, at: usize) -> Acts<4> {
    const TWICE: [i32; 16] = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7];
    let sums = sums16(x, at);
    let scale = _mm512_permutexvar_ps(lanes(&TWICE), _mm512_castps256_ps512(load_scale8(x, at)));
    Acts {
        q: [load_q(x, at), load_q(x, at + 64), load_q(x, at + 128), load_q(x, at + 192)],
        scale,
        sum: counted::<SHIFT>(scale, sums),
    }
}

// Sums of groups. A byte dot product leaves a group's in 4 or 8 lanes. They are added up as integers, those of several registers
// at once, until each lane has a group's exact sum: that takes no more instructions than to convert and scale the parts one by
// one, and fewer of those that share their units with the dot product.

/// Neighbouring lanes of `a` and `b` added up: in each 16 bytes `a0 + a1, a2 + a3, b0 + b1, b2 + b3`.
#[inline]
#[target_feature(enable = "avx512f")]
fn pairs(a: __m512i, b: __m512i) -> __m512i {
    let (a, b) = (_mm512_castsi512_ps(a), _mm512_castsi512_ps(b));
    let even = _mm512_castps_si512(_mm512_shuffle_ps::<0b10_00_10_00>(a, b));
    _mm512_add_epi32(even, _mm512_castps_si512(_mm512_shuffle_ps::<0b11_01_11_01>(a, b)))
}

#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn products(w: __m512i, q: __m512i) -> __m512i {
    _mm512_dpbusd_epi32(_mm512_setzero_si512(), w, q)
}

/// Of four rows of [`Four`]; lanes by block, then row.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn sums4(w: &[Four; 4], q: &[__m512i; 2]) -> __m512i {
    let mut rows = [_mm512_setzero_si512(); 4];
    for r in 0..4 {
        rows[r] = _mm512_dpbusd_epi32(products(w[r].low, q[0]), w[r].high, q[1]);
    }
    pairs(pairs(rows[0], rows[1]), pairs(rows[2], rows[3]))
}

/// Of a row with groups of 16; see [`ORDER_BY_4`].
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn sums_groups16(w: &[Super; 1], q: &[__m512i; 4]) -> __m512i {
    let [w] = w;
    let (a, b) = (products(w[0], q[0]), products(w[1], q[1]));
    let (c, d) = (products(w[2], q[2]), products(w[3], q[3]));
    pairs(pairs(a, b), pairs(c, d))
}

/// Of two rows with groups of 32, four of which are in two registers; see [`ORDER_K4`] and, for IQ4_XS, [`ORDER_BY_4`].
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn sums_groups32(w: &[Super; 2], q: &[__m512i; 4]) -> __m512i {
    let row = |w: &Super| {
        let first = _mm512_dpbusd_epi32(products(w[0], q[0]), w[1], q[1]);
        pairs(first, _mm512_dpbusd_epi32(products(w[2], q[2]), w[3], q[3]))
    };
    pairs(row(&w[0]), row(&w[1]))
}

/// What each lane of the sums is of: group `i` of [`Scales`], in which the groups of a row follow one another.
const ORDER_BY_4: [i32; 16] = [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15];
const ORDER_K4: [i32; 16] = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15];

// The products of four rows from what their groups have together, 4, 2 or 1 rows in a register.

#[inline]
#[target_feature(enable = "avx512f,avx512dq,avx512vl")]
fn halves(z: __m512) -> [__m256; 2] {
    [_mm512_castps512_ps256(z), _mm512_extractf32x8_ps::<1>(z)]
}

/// The sum of the 16 bytes of each half.
#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
fn both(z: __m256) -> __m128 {
    _mm_add_ps(_mm256_castps256_ps128(z), _mm256_extractf128_ps::<1>(z))
}

#[inline]
#[target_feature(enable = "avx512f,avx512dq,avx512vl")]
fn rows4(a: &[__m512; 1]) -> __m128 {
    let [low, high] = halves(a[0]);
    both(_mm256_add_ps(low, high))
}

#[inline]
#[target_feature(enable = "avx512f,avx512dq,avx512vl")]
fn rows_groups32(a: &[__m512; 2]) -> __m128 {
    let two = |z| {
        let [low, high] = halves(z);
        both(_mm256_add_ps(low, high))
    };
    _mm_hadd_ps(two(a[0]), two(a[1]))
}

#[inline]
#[target_feature(enable = "avx512f,avx512dq,avx512vl")]
fn rows_groups16(a: &[__m512; 4]) -> __m128 {
    let row = |z| {
        let [low, high] = halves(z);
        _mm256_add_ps(low, high)
    };
    let (low, high) = (_mm256_hadd_ps(row(a[0]), row(a[1])), _mm256_hadd_ps(row(a[2]), row(a[3])));
    both(_mm256_hadd_ps(low, high))
}

/// A function that multiplies rows of one type, `$cols` columns or `$bytes` bytes a step, with some tokens:
/// `$acts(x, column)` prepares a token's activations; `$scales(rows)` takes the scales of `$together` rows out of their
/// blocks, and `$read(bytes)` a row's weights; `$sums(weights, acts)` gives the exact sums of their groups, in the order `$order`
/// of those that the scales have; `$rows(products)` the four rows' from those of their groups. `$zero` and `$min`: whether the type
/// has a zero point, and minima.
macro_rules! dot_rows {
    ($name:ident, $cols:literal, $bytes:literal, $acts:expr, $together:literal: $($first:literal)+,
     ($zero:literal, $min:literal), $scales:expr, $read:path, $sums:path, $order:path, $rows:path) => {
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
                let mut products = [[_mm512_setzero_ps(); ROWS / $together]; T];
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
                        let mut weights = [$read(step[FIRST]); $together];
                        for i in 0..$together {
                            if FIRST + i < R {
                                prefetch(ahead, (FIRST + i) * $bytes, $bytes, near);
                                together[i] = step[FIRST + i];
                                weights[i] = $read(step[FIRST + i]);
                            }
                        }
                        let Scales { scale, min } = $scales(together);
                        let (scale, min) =
                            (_mm512_permutexvar_ps(lanes(&$order), scale), _mm512_permutexvar_ps(lanes(&$order), min));
                        for t in 0..T {
                            let (a, of_groups) = (&acts[t], &mut products[t][FIRST / $together]);
                            if $min {
                                *of_groups = _mm512_fmadd_ps(min, _mm512_castsi512_ps(a.sum), *of_groups);
                            }
                            let mut sums = $sums(&weights, &a.q);
                            if $zero {
                                sums = _mm512_add_epi32(sums, a.sum);
                            }
                            let scale = _mm512_mul_ps(scale, a.scale);
                            *of_groups = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), scale, *of_groups);
                        }
                    })+
                }
                let mut out = [[0f32; ROWS]; T];
                for t in 0..T {
                    // SAFETY: 16 writable bytes; the store has no alignment.
                    unsafe { _mm_storeu_ps(out[t].as_mut_ptr(), $rows(&products[t])) };
                }
                out
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
                        acts.push(of_step.in_order(&$order));
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
                    let (sums, rows) = if T > 4 && $together < ROWS && n - done >= 2 {
                        // The sums of four rows would leave no registers for what these types unpack.
                        (rows::<W, 2, T>(w, done, acts), 2)
                    } else if n - done >= ROWS {
                        (rows::<W, ROWS, T>(w, done, acts), ROWS)
                    } else {
                        (rows::<W, 1, T>(w, done, acts), 1)
                    };
                    for t in 0..T {
                        out[t][done..done + rows].copy_from_slice(&sums[t][..rows]);
                    }
                    done += rows;
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

dot_rows!(dot_q4_0, 128, 72, acts4::<3>, 4: 0, (true, false), blocks::q4_0_scales, blocks::q4_0, sums4, ORDER_BY_4, rows4);
dot_rows!(dot_iq4_nl, 128, 72, acts4::<7>, 4: 0, (true, false), blocks::q4_0_scales, blocks::iq4_nl, sums4, ORDER_BY_4, rows4);
dot_rows!(dot_q4_1, 128, 80, acts4::<0>, 4: 0, (false, true), blocks::q4_1_scales, blocks::q4_1, sums4, ORDER_BY_4, rows4);
dot_rows!(dot_q5_0, 128, 88, acts4::<4>, 4: 0, (true, false), blocks::q5_0_scales, blocks::q5_0, sums4, ORDER_BY_4, rows4);
dot_rows!(dot_q5_1, 128, 96, acts4::<0>, 4: 0, (false, true), blocks::q5_1_scales, blocks::q5_1, sums4, ORDER_BY_4, rows4);
dot_rows!(dot_q8_0, 128, 136, acts4::<7>, 4: 0, (true, false), blocks::q8_0_scales, blocks::q8_0, sums4, ORDER_BY_4, rows4);
dot_rows!(dot_q2_k, 256, 84, acts_groups16::<0>, 1: 0 1 2 3, (false, true), blocks::q2_k_scales, blocks::q2_k, sums_groups16, ORDER_BY_4, rows_groups16);
dot_rows!(dot_q3_k, 256, 110, acts_groups16::<2>, 1: 0 1 2 3, (true, false), blocks::q3_k_scales, blocks::q3_k, sums_groups16, ORDER_BY_4, rows_groups16);
dot_rows!(dot_q4_k, 256, 144, acts_k4, 2: 0 2, (false, true), blocks::k4_scales, blocks::q4_k, sums_groups32, ORDER_K4, rows_groups32);
dot_rows!(dot_q5_k, 256, 176, acts_k4, 2: 0 2, (false, true), blocks::k4_scales, blocks::q5_k, sums_groups32, ORDER_K4, rows_groups32);
dot_rows!(dot_q6_k, 256, 210, acts_groups16::<5>, 1: 0 1 2 3, (true, false), blocks::q6_k_scales, blocks::q6_k, sums_groups16, ORDER_BY_4, rows_groups16);
dot_rows!(dot_iq4_xs, 256, 136, acts_iq4_xs, 2: 0 2, (true, false), blocks::iq4_xs_scales, blocks::iq4_xs, sums_groups32, ORDER_BY_4, rows_groups32);

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

/// See `Kernels::dot_tokens`: the weights are unpacked once for up to eight tokens.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn dot_tokens(ty: GgmlType, weights: &[u8], row_bytes: usize, x: &Activations, out: &mut [f32]) {
    let w = Consecutive { weights, row_bytes };
    each_tokens!(tokens, ty, w, x, out, 8 4 2 1);
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store64(q: &mut [u8], at: usize, z: __m512i) {
    let q: &mut [u8; 64] = q[at..].first_chunk_mut().expect("room for the block");
    // SAFETY: 64 writable bytes; the store has no alignment.
    unsafe { _mm512_storeu_si512(q.as_mut_ptr().cast(), z) };
}

/// The first `N` numbers, 4, 8 or 16.
#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
fn store_first<const N: usize>(z: __m512, to: &mut [f32]) {
    let to: &mut [f32; N] = to.first_chunk_mut().expect("room for the scales");
    // SAFETY: `N` numbers can be written; the stores have no alignment.
    unsafe {
        match N {
            4 => _mm_storeu_ps(to.as_mut_ptr(), _mm512_castps512_ps128(z)),
            8 => _mm256_storeu_ps(to.as_mut_ptr(), _mm512_castps512_ps256(z)),
            16 => _mm512_storeu_ps(to.as_mut_ptr(), z),
            _ => unreachable!("no type has as many groups"),
        }
    }
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

/// What `read(bytes)` makes of the weights of four blocks, in the order of the row, and `scales(rows)` of their scales.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn unpack4<const BYTES: usize>(
    bytes: &[u8],
    (q, scale, min): (&mut [u8], &mut [f32], &mut [f32]),
    read: impl Fn(&[u8; BYTES]) -> [__m512i; 2],
    scales: impl Fn([&[u8; BYTES]; 4]) -> Scales,
) {
    let step = |b: &[u8; BYTES], q: &mut [u8], scale: &mut [f32], min: &mut [f32]| {
        let (w, scales) = (read(b), scales([b; 4]));
        store64(q, 0, w[0]);
        store64(q, 64, w[1]);
        store_first::<4>(scales.scale, scale);
        store_first::<4>(scales.min, min);
    };
    let (steps, tail) = bytes.as_chunks::<BYTES>();
    for (s, b) in steps.iter().enumerate() {
        step(b, &mut q[s * 128..], &mut scale[s * 4..], &mut min[s * 4..]);
    }
    if tail.is_empty() {
        return;
    }
    if let Some(last) = bytes.last_chunk() {
        // The last step begins inside the one before.
        let at = bytes.len() / (BYTES / 4) - 4;
        return step(last, &mut q[at * 32..], &mut scale[at..], &mut min[at..]);
    }
    let (mut padded, mut all_q, mut scales, mut mins) = ([0u8; BYTES], [0u8; 128], [0f32; 4], [0f32; 4]);
    padded[..tail.len()].copy_from_slice(tail);
    step(&padded, &mut all_q, &mut scales, &mut mins);
    q.copy_from_slice(&all_q[..q.len()]);
    scale.copy_from_slice(&scales[..scale.len()]);
    min.copy_from_slice(&mins[..min.len()]);
}

/// Likewise for superblocks with `GROUPS` groups.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn unpack8<const BYTES: usize, const GROUPS: usize, const TOGETHER: usize>(
    bytes: &[u8],
    (q, scale, min): (&mut [u8], &mut [f32], &mut [f32]),
    read: impl Fn(&[u8; BYTES]) -> Super,
    scales: impl Fn([&[u8; BYTES]; TOGETHER]) -> Scales,
) {
    for (s, b) in bytes.as_chunks::<BYTES>().0.iter().enumerate() {
        let (w, scales) = (read(b), scales([b; TOGETHER]));
        for i in 0..4 {
            store64(q, s * 256 + i * 64, w[i]);
        }
        store_first::<GROUPS>(scales.scale, &mut scale[s * GROUPS..]);
        store_first::<GROUPS>(scales.min, &mut min[s * GROUPS..]);
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn straight4(w: Four) -> [__m512i; 2] {
    straighten4(w.low, w.high).into()
}

/// The order of Q4_K to that of the row; undoes itself.
#[inline]
#[target_feature(enable = "avx512f")]
fn straight_k4(q: Super) -> Super {
    // The quarters of the four registers are a square that is turned over.
    let low = |a, b| _mm512_shuffle_i64x2::<0b01_00_01_00>(a, b);
    let high = |a, b| _mm512_shuffle_i64x2::<0b11_10_11_10>(a, b);
    let even = |a, b| _mm512_shuffle_i64x2::<0b10_00_10_00>(a, b);
    let odd = |a, b| _mm512_shuffle_i64x2::<0b11_01_11_01>(a, b);
    let (l0, l1) = (low(q[0], q[1]), low(q[2], q[3]));
    let (h0, h1) = (high(q[0], q[1]), high(q[2], q[3]));
    [even(l0, l1), odd(l0, l1), even(h0, h1), odd(h0, h1)]
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
        Q8_0 => unpack4(b, to, |b| q8_0_in_order(b), |b| q8_0_scales(b)),
        Q4_0 => unpack4(b, to, |b| straight4(q4_0(b)), |b| q4_0_scales(b)),
        Q4_1 => unpack4(b, to, |b| straight4(q4_1(b)), |b| q4_1_scales(b)),
        Q5_0 => unpack4(b, to, |b| straight4(q5_0(b)), |b| q5_0_scales(b)),
        Q5_1 => unpack4(b, to, |b| straight4(q5_1(b)), |b| q5_1_scales(b)),
        IQ4_NL => unpack4(b, to, |b| straight4(iq4_nl(b)), |b| q4_0_scales(b)),
        Q2_K => unpack8::<_, 16, _>(b, to, |b| q2_k(b), |b| q2_k_scales(b)),
        Q3_K => unpack8::<_, 16, _>(b, to, |b| q3_k(b), |b| q3_k_scales(b)),
        Q4_K => unpack8::<_, 8, _>(b, to, |b| straight_k4(q4_k(b)), |b| k4_scales(b)),
        Q5_K => unpack8::<_, 8, _>(b, to, |b| straight_k4(q5_k(b)), |b| k4_scales(b)),
        Q6_K => unpack8::<_, 16, _>(b, to, |b| q6_k(b), |b| q6_k_scales(b)),
        IQ4_XS => unpack8::<_, 8, _>(b, to, |b| straight_iq4_xs(iq4_xs(b)), |b| iq4_xs_scales(b)),
        F32 | F16 | BF16 => unreachable!("unquantised types have kernels of their own"),
    }
}
