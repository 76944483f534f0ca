//! Many tokens: a panel of 32 unpacked weight rows times blocks of activations.
//!
//! The micro-kernel takes 16 rows (two registers, for each of which it keeps a sum a token) and a few
//! tokens; the two halves of a panel come one after the other, so that a half stays in the L1 cache.
//!
//! With `maddubs` the costly part is widening its 16-bit sums. For weights of few bits several of them
//! fit before that is due: a *run* is the longest sequence of column groups of four whose sums of
//! `2 * max * 127` each stay below 2^15.
//!
//! The innermost steps are in assembler: the compiler moves the loads of a whole group to the front,
//! for which there are no registers, and more than doubles the instructions with what it spills.

use std::arch::x86_64::*;

use crate::kernels::{PANEL_COLS, PANEL_ROWS, Panel, Q8Rows};

/// Most tokens in a micro-kernel of any way to multiply.
pub(in crate::kernels::x86) const MAX_TOKENS: usize = 6;
/// Rows in the micro-kernel.
pub(in crate::kernels::x86) const ROWS: usize = 16;
/// Most groups in a panel.
pub(in crate::kernels::x86) const GROUPS: usize = PANEL_COLS / 16;

/// `[row][col]` to `[col / 4][row][col % 4]`: 8 x 8 transpositions of four-byte elements.
#[target_feature(enable = "avx2")]
pub(in crate::kernels::x86) fn interleave(plain: &[u8], cols: usize, q: &mut [u8]) {
    assert!(plain.len() == PANEL_ROWS * cols && q.len() == plain.len() && cols.is_multiple_of(32));
    for rows in (0..PANEL_ROWS).step_by(8) {
        for col in (0..cols).step_by(32) {
            // SAFETY: row `rows + r` has 32 columns from `col` on, and the destination of column
            // group `c` of these 8 rows is 32 bytes inside `q`.
            unsafe {
                let mut y = [_mm256_setzero_si256(); 8];
                for (r, y) in y.iter_mut().enumerate() {
                    *y = _mm256_loadu_si256(plain.as_ptr().add((rows + r) * cols + col).cast());
                }
                for (c, y) in transpose8(y).into_iter().enumerate() {
                    let at = ((col / 4 + c) * PANEL_ROWS + rows) * 4;
                    _mm256_storeu_si256(q.as_mut_ptr().add(at).cast(), y);
                }
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn transpose8(y: [__m256i; 8]) -> [__m256i; 8] {
    // Pairs of elements, then pairs of pairs, inside each 128-bit lane; then the lanes.
    let mut a = y;
    for i in 0..4 {
        a[2 * i] = _mm256_unpacklo_epi32(y[2 * i], y[2 * i + 1]);
        a[2 * i + 1] = _mm256_unpackhi_epi32(y[2 * i], y[2 * i + 1]);
    }
    let mut b = a;
    for i in 0..2 {
        b[4 * i] = _mm256_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
        b[4 * i + 1] = _mm256_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
        b[4 * i + 2] = _mm256_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
        b[4 * i + 3] = _mm256_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
    }
    // b[4 i + j] holds columns j and 4 + j of rows 4 i .. 4 i + 4.
    let mut out = b;
    for j in 0..4 {
        out[j] = _mm256_permute2x128_si256::<0x20>(b[j], b[4 + j]);
        out[4 + j] = _mm256_permute2x128_si256::<0x31>(b[j], b[4 + j]);
    }
    out
}

/// What each group of a token begins with, `-zero * sum`, or the bits of what it adds for a minimum, `a_scale * sum`: made
/// at once for the tokens from `t` on, so that the kernel need but broadcast it from memory.
#[target_feature(enable = "avx2")]
#[allow(clippy::needless_range_loop)] // an iterator's adapters would not be inlined
pub(in crate::kernels::x86) fn constants<const G: usize, const MIN: bool>(
    panel: &Panel,
    x: Q8Rows<'_>,
    t: usize,
    to: &mut [[i32; GROUPS]],
) {
    let zero = -i32::from(panel.zero);
    let groups = panel.cols / G;
    for i in 0..to.len() {
        let sum = &x.sum[(t + i) * (x.stride / 16)..][..panel.cols / 16];
        let scale = &x.scale[(t + i) * (x.stride / 32)..][..panel.cols / 32];
        let to = &mut to[i][..groups];
        let whole = groups / 8 * 8;
        for g in (0..whole).step_by(8) {
            // SAFETY: eight groups from `g` on, each of which has a sum (or two) and a scale (or half of one).
            unsafe {
                let load = |at| _mm256_loadu_si256(sum.as_ptr().add(at).cast());
                let (sums, scale) = if G == 32 {
                    // `hadd` adds in 128-bit lanes: the permutation puts their halves in order.
                    let sums = _mm256_hadd_epi32(load(2 * g), load(2 * g + 8));
                    let scale = _mm256_loadu_ps(scale.as_ptr().add(g));
                    (_mm256_permute4x64_epi64::<0b11_01_10_00>(sums), scale)
                } else {
                    let four = _mm256_castps128_ps256(_mm_loadu_ps(scale.as_ptr().add(g / 2)));
                    let twice = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
                    (load(g), _mm256_permutevar8x32_ps(four, twice))
                };
                let constants = if MIN {
                    _mm256_castps_si256(_mm256_mul_ps(scale, _mm256_cvtepi32_ps(sums)))
                } else {
                    _mm256_mullo_epi32(sums, _mm256_set1_epi32(zero))
                };
                _mm256_storeu_si256(to.as_mut_ptr().add(g).cast(), constants);
            }
        }
        for g in whole..groups {
            let of_group = if G == 32 { sum[2 * g] + sum[2 * g + 1] } else { sum[g] };
            let factor = scale[g * G / 32];
            to[g] = if MIN { (factor * of_group as f32).to_bits() as i32 } else { zero * of_group };
        }
    }
}

/// The function `gemm` (see `Kernels::gemm`), compiled with `$features` and multiplying with the
/// functions of the module `$multiply`.
macro_rules! instantiate {
    ($features:literal, $multiply:path) => {
        #[target_feature(enable = $features)]
        fn gemm(panel: &Panel, x: Q8Rows<'_>, acc: &mut [f32]) {
            use $crate::kernels::PANEL_ROWS;
            use $crate::kernels::x86::avx2::gemm::{GROUPS, MAX_TOKENS, ROWS, constants};
            use $multiply as multiply;

            #[inline]
            #[target_feature(enable = $features)]
            fn tokens<const T: usize>(panel: &Panel, x: Q8Rows<'_>, t: usize, acc: &mut [f32]) {
                let signed = panel.max > multiply::MAX;
                match (panel.group_len, panel.has_min, panel.max) {
                    _ if signed => {
                        // The signed form has no minimum and a type has either.
                        assert!(panel.zero == 128 && panel.group_len == 32 && !panel.has_min);
                        kernel::<T, 32, 1, false, true>(panel, x, t, acc)
                    }
                    (32, false, ..=15) => kernel::<T, 32, 8, false, false>(panel, x, t, acc),
                    (32, true, ..=15) => kernel::<T, 32, 8, true, false>(panel, x, t, acc),
                    (32, false, ..=31) => kernel::<T, 32, 4, false, false>(panel, x, t, acc),
                    (32, true, ..=31) => kernel::<T, 32, 4, true, false>(panel, x, t, acc),
                    (32, false, _) => kernel::<T, 32, 2, false, false>(panel, x, t, acc),
                    (32, true, _) => kernel::<T, 32, 2, true, false>(panel, x, t, acc),
                    (_, false, ..=31) => kernel::<T, 16, 4, false, false>(panel, x, t, acc),
                    (_, true, ..=31) => kernel::<T, 16, 4, true, false>(panel, x, t, acc),
                    (_, false, _) => kernel::<T, 16, 2, false, false>(panel, x, t, acc),
                    (_, true, _) => kernel::<T, 16, 2, true, false>(panel, x, t, acc),
                }
            }

            /// Products of the `4 * RUN` columns from `col` on of `T` tokens, `stride` bytes apart from `a` on, with as
            /// many columns of 16 rows at `w`, added to `dots`. `SIGNED` weights are multiplied by the sign trick of `dot`.
            ///
            /// # Safety
            /// These columns can be read of each token, and as many times [`PANEL_ROWS`] weights, which are aligned to a
            /// register.
            #[inline]
            #[target_feature(enable = $features)]
            #[allow(clippy::needless_range_loop)] // an iterator's closures would not be inlined
            unsafe fn run<const T: usize, const RUN: usize, const SIGNED: bool>(
                dots: &mut [[__m256i; 2]; T],
                w: *const u8,
                (a, stride): (*const i8, usize),
                col: usize,
            ) {
                // SAFETY: columns `col..col + 4 * RUN` of tokens below `T` and of 16 rows, as the caller promises.
                unsafe {
                    let weights = |c: usize| {
                        let w = w.add(c * PANEL_ROWS * 4);
                        [_mm256_load_si256(w.cast()), _mm256_load_si256(w.add(32).cast())]
                    };
                    if SIGNED {
                        let high_bit = _mm256_set1_epi8(-128);
                        let [w0, w1] = weights(0);
                        let w = [_mm256_xor_si256(w0, high_bit), _mm256_xor_si256(w1, high_bit)];
                        let size = [_mm256_abs_epi8(w[0]), _mm256_abs_epi8(w[1])];
                        for i in 0..T {
                            multiply::add4_signed(&mut dots[i], w, size, (a.add(i * stride), col));
                        }
                    } else if RUN == 2 {
                        // Short runs need no register for each sum if a token is finished before the next begins.
                        let (w, v) = (weights(0), weights(1));
                        for i in 0..T {
                            multiply::add8(&mut dots[i], [w, v], (a.add(i * stride), col));
                        }
                    } else {
                        let mut sums = *dots;
                        for i in 0..T {
                            sums[i] = [multiply::open(dots[i][0]), multiply::open(dots[i][1])];
                        }
                        for c in 0..RUN {
                            let w = weights(c);
                            for i in 0..T {
                                multiply::add4(&mut sums[i], w, (a.add(i * stride), col + 4 * c));
                            }
                        }
                        for i in 0..T {
                            let [s0, s1] = sums[i];
                            dots[i] = [multiply::close(dots[i][0], s0), multiply::close(dots[i][1], s1)];
                        }
                    }
                }
            }

            /// `T` tokens from `t` on by 32 rows, in groups of `G` columns, of which a run is `4 * RUN`.
            #[target_feature(enable = $features)]
            #[allow(clippy::needless_range_loop)] // an iterator's closures would not be inlined
            fn kernel<
                const T: usize,
                const G: usize,
                const RUN: usize,
                const MIN: bool,
                const SIGNED: bool,
            >(
                panel: &Panel,
                x: Q8Rows<'_>,
                t: usize,
                acc: &mut [f32],
            ) {
                let groups = panel.cols / G;
                let last = t + T - 1;
                assert!(acc.len() == T * PANEL_ROWS && panel.q.0.len() >= panel.cols * PANEL_ROWS);
                assert!(panel.scale.len() >= groups * PANEL_ROWS && panel.min.len() >= groups * PANEL_ROWS);
                assert!(last * x.stride + panel.cols <= x.q.len());
                assert!(last * (x.stride / 32) + panel.cols / 32 <= x.scale.len());
                assert!(last * (x.stride / 16) + panel.cols / 16 <= x.sum.len());
                let mut constant = [[0i32; GROUPS]; T];
                constants::<G, MIN>(panel, x, t, &mut constant);
                // SAFETY: every offset below is within the lengths just asserted: token
                // `t + i < t + T`, column below `panel.cols`, group below `groups`, 32 rows a group of
                // the panel and of `acc`. `panel.q` is aligned to a cache line. That a token's constants are as
                // many as groups, `constants` has checked.
                unsafe {
                    let q = x.q.as_ptr().add(t * x.stride);
                    let scale = x.scale.as_ptr().add(t * (x.stride / 32));
                    for row in (0..PANEL_ROWS).step_by(ROWS) {
                        for g in 0..groups {
                            // Plain loops: a closure given to `map` or `from_fn` is a call from a function
                            // without the features, and the sums would live in memory.
                            let mut dots = [[_mm256_setzero_si256(); 2]; T];
                            if !MIN && !SIGNED {
                                for i in 0..T {
                                    dots[i] = [_mm256_set1_epi32(*constant[i].get_unchecked(g)); 2];
                                }
                            }
                            for from in (0..G / 4).step_by(RUN) {
                                let quad = g * (G / 4) + from;
                                let w = panel.q.0.as_ptr().add((quad * PANEL_ROWS + row) * 4);
                                run::<T, RUN, SIGNED>(&mut dots, w, (q, x.stride), 4 * quad);
                            }
                            let w_scale = panel.scale.as_ptr().add(g * PANEL_ROWS + row);
                            let w_min = panel.min.as_ptr().add(g * PANEL_ROWS + row);
                            for i in 0..T {
                                let a_scale = _mm256_set1_ps(*scale.add(i * (x.stride / 32) + g * G / 32));
                                let a_sum = f32::from_bits(*constant[i].get_unchecked(g) as u32);
                                for h in 0..2 {
                                    let at = acc.as_mut_ptr().add(i * PANEL_ROWS + row + 8 * h);
                                    let both = _mm256_mul_ps(_mm256_loadu_ps(w_scale.add(8 * h)), a_scale);
                                    let products = _mm256_cvtepi32_ps(dots[i][h]);
                                    let mut total = _mm256_fmadd_ps(products, both, _mm256_loadu_ps(at));
                                    if MIN {
                                        let w_min = _mm256_loadu_ps(w_min.add(8 * h));
                                        total = _mm256_fmadd_ps(w_min, _mm256_set1_ps(a_sum), total);
                                    }
                                    _mm256_storeu_ps(at, total);
                                }
                            }
                        }
                    }
                }
            }

            const { assert!(multiply::TOKENS <= MAX_TOKENS) };
            let mut t = 0;
            while t < x.rows {
                // As many in each as in any other: one token left over would take as long as several.
                let rest = x.rows - t;
                let n = rest.div_ceil(rest.div_ceil(multiply::TOKENS));
                let acc = &mut acc[t * PANEL_ROWS..][..n * PANEL_ROWS];
                match n {
                    6 => tokens::<6>(panel, x, t, acc),
                    5 => tokens::<5>(panel, x, t, acc),
                    4 => tokens::<4>(panel, x, t, acc),
                    3 => tokens::<3>(panel, x, t, acc),
                    2 => tokens::<2>(panel, x, t, acc),
                    _ => tokens::<1>(panel, x, t, acc),
                }
                t += n;
            }
        }
    };
}
pub(in crate::kernels::x86) use instantiate;
