//! Many tokens: a panel of 32 unpacked weight rows times blocks of activations.

#![allow(clippy::needless_range_loop)] // an iterator's closures and adapters would not be inlined

use std::arch::asm;
use std::arch::x86_64::*;

use crate::kernels::{PANEL_COLS, PANEL_ROWS, Panel, Q8Rows};

/// Tokens in the micro-kernel: with 32 rows (two registers) each has two integer and two float sums,
/// and 7 x 4 of the 32 registers leave three for weights and a broadcast.
const TOKENS: usize = 7;
/// Most groups in a panel.
const GROUPS: usize = PANEL_COLS / 16;

/// `[row][col]` to `[col / 4][row][col % 4]`: 16 x 16 transpositions of four-byte elements.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn interleave(plain: &[u8], cols: usize, q: &mut [u8]) {
    assert!(plain.len() == PANEL_ROWS * cols && q.len() == plain.len() && cols.is_multiple_of(16));
    let whole = cols / 64 * 64;
    for rows in [0, 16] {
        for col in (0..whole).step_by(64) {
            // SAFETY: row `rows + r` has 64 columns from `col` on, and the destination of column
            // group `c` of these 16 rows is 64 bytes inside `q`.
            unsafe {
                let mut z = [_mm512_setzero_si512(); 16];
                for (r, z) in z.iter_mut().enumerate() {
                    *z = _mm512_loadu_si512(plain.as_ptr().add((rows + r) * cols + col).cast());
                }
                for (c, z) in transpose16(z).into_iter().enumerate() {
                    let at = ((col / 4 + c) * PANEL_ROWS + rows) * 4;
                    _mm512_storeu_si512(q.as_mut_ptr().add(at).cast(), z);
                }
            }
        }
    }
    for (r, row) in plain.chunks_exact(cols).enumerate() {
        for col in (whole..cols).step_by(4) {
            q[(col / 4 * PANEL_ROWS + r) * 4..][..4].copy_from_slice(&row[col..][..4]);
        }
    }
}

/// Rows for columns.
#[inline]
#[target_feature(enable = "avx512f")]
pub(in crate::kernels::x86) fn transpose16(z: [__m512i; 16]) -> [__m512i; 16] {
    // Pairs of elements, then pairs of pairs, inside each 128-bit lane; then the lanes.
    let mut a = [_mm512_setzero_si512(); 16];
    for i in 0..8 {
        a[2 * i] = _mm512_unpacklo_epi32(z[2 * i], z[2 * i + 1]);
        a[2 * i + 1] = _mm512_unpackhi_epi32(z[2 * i], z[2 * i + 1]);
    }
    let mut b = a;
    for i in 0..4 {
        b[4 * i] = _mm512_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
        b[4 * i + 1] = _mm512_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
        b[4 * i + 2] = _mm512_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
        b[4 * i + 3] = _mm512_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
    }
    // b[4 i + j] holds column 4 l + j of rows 4 i .. 4 i + 4 in lane l.
    let mut out = b;
    for j in 0..4 {
        let low = _mm512_shuffle_i32x4::<0b10_00_10_00>(b[j], b[4 + j]);
        let odd = _mm512_shuffle_i32x4::<0b11_01_11_01>(b[j], b[4 + j]);
        let low2 = _mm512_shuffle_i32x4::<0b10_00_10_00>(b[8 + j], b[12 + j]);
        let odd2 = _mm512_shuffle_i32x4::<0b11_01_11_01>(b[8 + j], b[12 + j]);
        out[j] = _mm512_shuffle_i32x4::<0b10_00_10_00>(low, low2);
        out[8 + j] = _mm512_shuffle_i32x4::<0b11_01_11_01>(low, low2);
        out[4 + j] = _mm512_shuffle_i32x4::<0b10_00_10_00>(odd, odd2);
        out[12 + j] = _mm512_shuffle_i32x4::<0b11_01_11_01>(odd, odd2);
    }
    out
}

/// See `Kernels::gemm`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn gemm(panel: &Panel, x: Q8Rows<'_>, acc: &mut [f32]) {
    let mut t = 0;
    while t < x.rows {
        // As many in each as in any other: one token left over would take as long as several.
        let rest = x.rows - t;
        let n = rest.div_ceil(rest.div_ceil(TOKENS));
        let acc = &mut acc[t * PANEL_ROWS..][..n * PANEL_ROWS];
        match n {
            7 => tokens::<7>(panel, x, t, acc),
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

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn tokens<const T: usize>(panel: &Panel, x: Q8Rows<'_>, t: usize, acc: &mut [f32]) {
    match (panel.group_len, panel.has_min) {
        (32, false) => kernel::<T, 32, false>(panel, x, t, acc),
        (32, true) => kernel::<T, 32, true>(panel, x, t, acc),
        (_, false) => kernel::<T, 16, false>(panel, x, t, acc),
        (_, true) => kernel::<T, 16, true>(panel, x, t, acc),
    }
}

/// What each group of a token begins with, `-zero * sum`, or the bits of what it adds for a minimum, `a_scale * sum`: made
/// at once, so that the kernel need but broadcast it from memory.
///
/// # Safety
/// The `groups` groups of `G` columns, at most [`GROUPS`], have their sums over 16 columns at `sum` and their scales, for
/// each 32 columns, at `scale`.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn constants<const G: usize, const MIN: bool>(
    (sum, scale): (*const i32, *const f32),
    groups: usize,
    zero: i32,
    to: &mut [i32; GROUPS],
) {
    let index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (first, to) in (0..groups).step_by(16).zip(to.as_chunks_mut::<16>().0) {
        let n = (groups - first).min(16);
        // SAFETY: sums and scales of `n` groups from `first` on are read, no more than the mask has; `to` is 64 bytes.
        unsafe {
            let sum = sum.add(first * G / 16);
            let load = |at, n| _mm512_maskz_loadu_epi32(((1u32 << n) - 1) as u16, at);
            let sums = if G == 16 {
                load(sum, n)
            } else {
                let (a, b) =
                    (load(sum, (2 * n).min(16)), load(sum.wrapping_add(16), (2 * n).saturating_sub(16)));
                let even = _mm512_slli_epi32(index, 1);
                let odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
                _mm512_add_epi32(_mm512_permutex2var_epi32(a, even, b), _mm512_permutex2var_epi32(a, odd, b))
            };
            let constants = if MIN {
                let scales = load(scale.add(first * G / 32).cast(), (n * G).div_ceil(32));
                let scales = if G == 16 {
                    _mm512_permutexvar_epi32(_mm512_srli_epi32(index, 1), scales)
                } else {
                    scales
                };
                _mm512_castps_si512(_mm512_mul_ps(_mm512_castsi512_ps(scales), _mm512_cvtepi32_ps(sums)))
            } else {
                _mm512_mullo_epi32(sums, _mm512_set1_epi32(zero))
            };
            _mm512_storeu_si512(to.as_mut_ptr().cast(), constants);
        }
    }
}

/// Adds the products of four columns of 32 rows, `w`, with a token's, at `a`, to the token's sums.
///
/// In assembler because the compiler moves loads of several columns to the front, for which there are no registers.
///
/// # Safety
/// Four bytes can be read at `a`.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn add4(dots: &mut [__m512i; 2], w: [__m512i; 2], a: *const i8) {
    let _four: __m512i;
    // SAFETY: reads four bytes, as the caller promises, and changes nothing but its outputs.
    unsafe {
        asm!(
            "vpbroadcastd {four}, dword ptr [{a}]",
            "vpdpbusd {dots0}, {w0}, {four}",
            "vpdpbusd {dots1}, {w1}, {four}",
            four = out(zmm_reg) _four,
            dots0 = inout(zmm_reg) dots[0],
            dots1 = inout(zmm_reg) dots[1],
            w0 = in(zmm_reg) w[0],
            w1 = in(zmm_reg) w[1],
            a = in(reg) a,
            options(readonly, nostack, preserves_flags),
        );
    }
}

/// `T` tokens from `t` on by 32 rows, in groups of `G` columns.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn kernel<const T: usize, const G: usize, const MIN: bool>(
    panel: &Panel,
    x: Q8Rows<'_>,
    t: usize,
    acc: &mut [f32],
) {
    let groups = panel.cols / G;
    let last = t + T - 1;
    assert!(groups <= GROUPS && acc.len() == T * PANEL_ROWS && panel.q.0.len() >= panel.cols * PANEL_ROWS);
    assert!(panel.scale.len() >= groups * PANEL_ROWS && panel.min.len() >= groups * PANEL_ROWS);
    assert!(last * x.stride + panel.cols <= x.q.len());
    assert!(last * (x.stride / 32) + panel.cols / 32 <= x.scale.len());
    assert!(last * (x.stride / 16) + panel.cols / 16 <= x.sum.len());
    // SAFETY: every offset below is within the lengths just asserted: token `t + i < t + T`, column
    // below `panel.cols`, group below `groups`, 32 rows a group of the panel and of `acc`.
    unsafe {
        let q = x.q.as_ptr().add(t * x.stride);
        let scale = x.scale.as_ptr().add(t * (x.stride / 32));
        let sum = x.sum.as_ptr().add(t * (x.stride / 16));
        let load2 = |p: *const f32| [_mm512_loadu_ps(p), _mm512_loadu_ps(p.add(16))];
        // Plain loops: a closure given to `from_fn` is a call from a function without the features.
        let mut constant = [[0i32; GROUPS]; T];
        let mut total = [[_mm512_setzero_ps(); 2]; T];
        for i in 0..T {
            let of_token = (sum.add(i * (x.stride / 16)), scale.add(i * (x.stride / 32)));
            constants::<G, MIN>(of_token, groups, -i32::from(panel.zero), &mut constant[i]);
            total[i] = load2(acc.as_ptr().add(i * PANEL_ROWS));
        }
        for g in 0..groups {
            let mut dots = [[_mm512_setzero_si512(); 2]; T];
            if !MIN {
                for i in 0..T {
                    dots[i] = [_mm512_set1_epi32(*constant[i].get_unchecked(g)); 2];
                }
            }
            for c in 0..G / 4 {
                let w = panel.q.0.as_ptr().add((g * (G / 4) + c) * PANEL_ROWS * 4);
                let w = [_mm512_load_si512(w.cast()), _mm512_load_si512(w.add(64).cast())];
                for i in 0..T {
                    add4(&mut dots[i], w, q.add(i * x.stride + g * G + c * 4));
                }
            }
            let w_scale = load2(panel.scale.as_ptr().add(g * PANEL_ROWS));
            let w_min = load2(panel.min.as_ptr().add(g * PANEL_ROWS));
            for i in 0..T {
                let a_scale = _mm512_set1_ps(*scale.add(i * (x.stride / 32) + g * G / 32));
                let a_sum = _mm512_set1_ps(f32::from_bits(*constant[i].get_unchecked(g) as u32));
                for h in 0..2 {
                    let both = _mm512_mul_ps(w_scale[h], a_scale);
                    total[i][h] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[i][h]), both, total[i][h]);
                    if MIN {
                        total[i][h] = _mm512_fmadd_ps(w_min[h], a_sum, total[i][h]);
                    }
                }
            }
        }
        for i in 0..T {
            let at = acc.as_mut_ptr().add(i * PANEL_ROWS);
            _mm512_storeu_ps(at, total[i][0]);
            _mm512_storeu_ps(at.add(16), total[i][1]);
        }
    }
}
