//! Many tokens: a panel of 32 unpacked weight rows times blocks of activations.

use std::arch::x86_64::*;

use crate::kernels::{PANEL_COLS, PANEL_ROWS, Panel, Q8Rows};

/// Tokens in the micro-kernel: with 32 rows (two registers) each has two integer and two float sums,
/// and 6 x 4 of the 32 registers leave enough for weights, scales and a broadcast.
const TOKENS: usize = 6;
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
        let n = (x.rows - t).min(TOKENS);
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
    let zero = -i32::from(panel.zero);
    // SAFETY: every offset below is within the lengths just asserted: token `t + i < t + T`, column
    // below `panel.cols`, group below `groups`, 32 rows a group of the panel and of `acc`.
    unsafe {
        let q = x.q.as_ptr().add(t * x.stride);
        let scale = x.scale.as_ptr().add(t * (x.stride / 32));
        let sum = x.sum.as_ptr().add(t * (x.stride / 16));
        // What each group of a token begins with, `-zero * sum`, or adds for a minimum, `a_scale * sum`:
        // made at once, so that the loop below need but broadcast it from memory.
        let (mut start, mut a_sum) = ([[0i32; GROUPS]; T], [[0f32; GROUPS]; T]);
        for i in 0..T {
            for g in 0..groups {
                let at = sum.add(i * (x.stride / 16) + g * G / 16);
                let sum = if G == 32 { *at + *at.add(1) } else { *at };
                if MIN {
                    a_sum[i][g] = *scale.add(i * (x.stride / 32) + g * G / 32) * sum as f32;
                } else {
                    start[i][g] = zero * sum;
                }
            }
        }
        // Plain loops: a closure given to `from_fn` is a call from a function without the features.
        let mut total = [[_mm512_setzero_ps(); 2]; T];
        for (i, total) in total.iter_mut().enumerate() {
            let at = acc.as_ptr().add(i * PANEL_ROWS);
            *total = [_mm512_loadu_ps(at), _mm512_loadu_ps(at.add(16))];
        }
        for g in 0..groups {
            let mut dots = [[_mm512_setzero_si512(); 2]; T];
            if !MIN {
                for i in 0..T {
                    dots[i] = [_mm512_set1_epi32(*start[i].get_unchecked(g)); 2];
                }
            }
            for c in 0..G / 4 {
                let w = panel.q.0.as_ptr().add((g * (G / 4) + c) * PANEL_ROWS * 4);
                let (w0, w1) = (_mm512_load_si512(w.cast()), _mm512_load_si512(w.add(64).cast()));
                for (i, dots) in dots.iter_mut().enumerate() {
                    let four = q.add(i * x.stride + g * G + c * 4).cast::<i32>().read_unaligned();
                    let a = _mm512_set1_epi32(four);
                    *dots = [_mm512_dpbusd_epi32(dots[0], w0, a), _mm512_dpbusd_epi32(dots[1], w1, a)];
                }
            }
            let load2 = |p: *const f32| [_mm512_loadu_ps(p), _mm512_loadu_ps(p.add(16))];
            let w_scale = load2(panel.scale.as_ptr().add(g * PANEL_ROWS));
            let w_min = load2(panel.min.as_ptr().add(g * PANEL_ROWS));
            for i in 0..T {
                let a_scale = *scale.add(i * (x.stride / 32) + g * G / 32);
                for h in 0..2 {
                    let both = _mm512_mul_ps(w_scale[h], _mm512_set1_ps(a_scale));
                    total[i][h] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[i][h]), both, total[i][h]);
                    if MIN {
                        let a_sum = _mm512_set1_ps(*a_sum[i].get_unchecked(g));
                        total[i][h] = _mm512_fmadd_ps(w_min[h], a_sum, total[i][h]);
                    }
                }
            }
        }
        for (i, total) in total.iter().enumerate() {
            let at = acc.as_mut_ptr().add(i * PANEL_ROWS);
            _mm512_storeu_ps(at, total[0]);
            _mm512_storeu_ps(at.add(16), total[1]);
        }
    }
}
