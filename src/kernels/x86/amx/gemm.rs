//! Panels of weights times tiles of activations.

use std::arch::asm;
use std::arch::x86_64::*;

use crate::kernels::PANEL_ROWS;
use crate::kernels::tiles::{TILE, Tile, TileInputs, TilePanel};
use crate::kernels::x86::avx512vnni::transpose16;

/// Sums of products of 32 rows by 16 tokens: `[high with high, high with low][row][token]`.
#[repr(C, align(64))]
struct Sums([[[i32; TILE]; PANEL_ROWS]; 2]);

/// See `Kernels::multiply_tiles`, which asserts the lengths.
///
/// The unit works beside the vector ports, so while it adds up a group of tokens, the sums of the group before get
/// their scales: a few rows after each step, because the CPU looks no further ahead than a few hundred instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn multiply(panel: &TilePanel, x: &TileInputs, chunk: usize, acc: &mut [f32]) {
    // SAFETY: `Kernels::multiply_tiles`, the only caller, has a handle of this ISA.
    unsafe { super::configure() };
    let mut sums = Sums([[[0; TILE]; PANEL_ROWS]; 2]);
    let steps = panel.steps();
    let rows_a_step = PANEL_ROWS.div_ceil(steps);
    let mut before: Option<(&mut [f32], &[f32; TILE])> = None;
    for (group, acc) in acc.chunks_exact_mut(TILE * PANEL_ROWS).enumerate() {
        let (tiles, scale) = x.part(group, chunk);
        assert!(tiles.len() == 2 * steps && 4 * steps <= panel.tiles.len());
        // SAFETY: the thread's tiles have their shapes.
        unsafe { super::zero_sums() };
        for (s, x) in tiles.chunks_exact(2).enumerate() {
            let w = &panel.tiles[4 * s..4 * s + 4];
            // SAFETY: as above; four tiles of weights and two of activations follow the pointers.
            unsafe { step(w.as_ptr(), x.as_ptr()) };
            if let Some((acc, scale)) = &mut before {
                let first = s * rows_a_step;
                for row in first..(first + rows_a_step).min(PANEL_ROWS) {
                    add_row(&sums, panel, scale, row, acc);
                }
            }
        }
        // SAFETY: as above; `sums` has room for four tiles.
        unsafe { super::store_sums(&mut sums) };
        before = Some((acc, scale));
    }
    if let Some((acc, scale)) = before {
        for row in 0..PANEL_ROWS {
            add_row(&sums, panel, scale, row, acc);
        }
    }
}

/// Adds the products of 64 columns: `tmm0, tmm1` those of high bytes with high bytes, `tmm2, tmm3` those of high with low.
///
/// Loading tiles takes about as long as multiplying them, so none is loaded twice; and a product takes 52 cycles, but
/// another can begin every 16, so a sum is not added to again at once.
///
/// # Safety
/// * The CPU has AMX, and this thread's tiles are configured.
/// * Four tiles may be read at `w`, two at `x`.
#[inline(always)]
unsafe fn step(w: *const Tile, x: *const Tile) {
    // SAFETY: as the caller says.
    unsafe {
        asm!(
            "tileloadd tmm4, [{w} + {stride}*1]",
            "tileloadd tmm5, [{x} + {stride}*1 + 1024]",
            "tileloadd tmm6, [{w} + {stride}*1 + 1024]",
            "tileloadd tmm7, [{x} + {stride}*1]",
            "tdpbssd tmm2, tmm4, tmm5",
            "tdpbssd tmm3, tmm6, tmm5",
            "tdpbssd tmm0, tmm4, tmm7",
            "tileloadd tmm5, [{w} + {stride}*1 + 2048]",
            "tileloadd tmm4, [{w} + {stride}*1 + 3072]",
            "tdpbssd tmm1, tmm6, tmm7",
            "tdpbssd tmm2, tmm5, tmm7",
            "tdpbssd tmm3, tmm4, tmm7",
            w = in(reg) w,
            x = in(reg) x,
            stride = in(reg) 64usize,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, preserves_flags, readonly),
        );
    }
}

/// Adds a row's sums, times their scales, to those of the chunks before.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn add_row(sums: &Sums, panel: &TilePanel, scale: &[f32; TILE], row: usize, acc: &mut [f32]) {
    let acc: &mut [f32; TILE] = acc[row * TILE..].first_chunk_mut().expect("16 tokens a row");
    let load = |at: &[i32; TILE]| {
        // SAFETY: 64 readable bytes.
        unsafe { _mm512_loadu_si512(at.as_ptr().cast()) }
    };
    let (high, mid) = (load(&sums.0[0][row]), load(&sums.0[1][row]));
    // At most 512 * 127 * 127 * 256 and 2 * 512 * 127 * 128: together below 2^31.
    let sum = _mm512_add_epi32(_mm512_slli_epi32::<8>(high), mid);
    // SAFETY: 64 readable bytes each.
    let (scale, old) = unsafe { (_mm512_loadu_ps(scale.as_ptr()), _mm512_loadu_ps(acc.as_ptr())) };
    let scale = _mm512_mul_ps(scale, _mm512_set1_ps(panel.scale[row]));
    let new = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, old);
    // SAFETY: 64 writable bytes.
    unsafe { _mm512_storeu_ps(acc.as_mut_ptr(), new) };
}

/// See `Kernels::turn_tiles`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn turn(acc: &mut [f32]) {
    for acc in acc.as_chunks_mut::<{ TILE * PANEL_ROWS }>().0 {
        let mut halves = [[_mm512_setzero_si512(); TILE]; 2];
        for (h, half) in halves.iter_mut().enumerate() {
            for (r, row) in half.iter_mut().enumerate() {
                let at: &[f32; TILE] = acc[(h * TILE + r) * TILE..].first_chunk().expect("16 tokens a row");
                // SAFETY: 64 readable bytes.
                *row = unsafe { _mm512_loadu_si512(at.as_ptr().cast()) };
            }
            *half = transpose16(*half);
        }
        for (h, half) in halves.into_iter().enumerate() {
            for (t, rows) in half.into_iter().enumerate() {
                let at: &mut [f32; TILE] =
                    acc[t * PANEL_ROWS + h * TILE..].first_chunk_mut().expect("32 rows a token");
                // SAFETY: 64 writable bytes.
                unsafe { _mm512_storeu_si512(at.as_mut_ptr().cast(), rows) };
            }
        }
    }
}
