//! Activations and weights to the planes of `kernels::tiles`.

use std::arch::x86_64::*;

use crate::kernels::PANEL_COLS;
use crate::kernels::tiles::{Groups, LIMIT, Range16, STEP, TILE, TINY, Tile, TilePanel, chunk_cols};
use crate::kernels::x86::avx512vnni::transpose16;

/// See `Kernels::pack_tiles`, which asserts the lengths.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn pack(values: &[f32], cols: usize, tiles: &mut [Tile], scale: &mut [f32]) {
    let chunk = chunk_cols(cols);
    for (c, scale) in scale.as_chunks_mut::<TILE>().0.iter_mut().enumerate() {
        let range = c * chunk..((c + 1) * chunk).min(cols);
        let mut inverse = [0f32; TILE];
        *scale = [0.0; TILE];
        for (t, row) in values.chunks_exact(cols).enumerate() {
            let max = greatest(&row[range.clone()]);
            scale[t] = max / LIMIT;
            inverse[t] = if max > TINY { LIMIT / max } else { 0.0 };
        }
        for col in range.clone().step_by(STEP) {
            let mut planes = [[_mm512_setzero_si512(); TILE]; 2];
            for (t, row) in values.chunks_exact(cols).enumerate() {
                let [high, low] = row_planes(&row[col..(col + STEP).min(range.end)], inverse[t]);
                (planes[0][t], planes[1][t]) = (high, low);
            }
            for (plane, tile) in planes.into_iter().zip(&mut tiles[col / STEP * 2..][..2]) {
                // Four columns are an element; `row_planes` has element 4 i + j where 4 j + i belongs.
                for (at, four) in transpose16(plane).into_iter().enumerate() {
                    let to = &mut tile.0[4 * (at % 4) + at / 4];
                    // SAFETY: 64 writable bytes.
                    unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), four) };
                }
            }
        }
    }
}

/// The greatest magnitude of a multiple of 32 values.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn greatest(values: &[f32]) -> f32 {
    let mut max = [_mm512_setzero_ps(); 2];
    for values in values.as_chunks::<32>().0 {
        for (i, max) in max.iter_mut().enumerate() {
            // SAFETY: 16 of the 32 values.
            let v = unsafe { _mm512_loadu_ps(values.as_ptr().add(16 * i)) };
            *max = _mm512_max_ps(*max, _mm512_abs_ps(v));
        }
    }
    _mm512_reduce_max_ps(_mm512_max_ps(max[0], max[1]))
}

/// High and low bytes of 64 (or 32, then zeros) values times `inverse`, element `4 j + i` of four columns each at `4 i + j`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
fn row_planes(values: &[f32], inverse: f32) -> [__m512i; 2] {
    let mut whole = [_mm512_setzero_si512(); 4];
    for (whole, values) in whole.iter_mut().zip(values.as_chunks::<16>().0) {
        // SAFETY: 16 values.
        let v = unsafe { _mm512_loadu_ps(values.as_ptr()) };
        *whole = _mm512_cvtps_epi32(_mm512_mul_ps(v, _mm512_set1_ps(inverse)));
    }
    planes(_mm512_packs_epi32(whole[0], whole[1]), _mm512_packs_epi32(whole[2], whole[3]))
}

/// High and low bytes, packed 16-byte lane by lane: `v = 256 * high + low`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn planes(v0: __m512i, v1: __m512i) -> [__m512i; 2] {
    // With 128 added, the upper byte is that of the rounded quotient, and the lower one is `low + 128`.
    let half = _mm512_set1_epi16(128);
    split(_mm512_add_epi16(v0, half), _mm512_add_epi16(v1, half))
}

/// [`planes`] of numbers to which 128 has been added.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn split(v0: __m512i, v1: __m512i) -> [__m512i; 2] {
    let byte = _mm512_set1_epi16(0xff);
    let high = _mm512_packs_epi16(_mm512_srai_epi16::<8>(v0), _mm512_srai_epi16::<8>(v1));
    let low = _mm512_packus_epi16(_mm512_and_si512(v0, byte), _mm512_and_si512(v1, byte));
    [high, _mm512_xor_si512(low, _mm512_set1_epi8(-128))]
}

/// Most groups of a row of a panel: two registers of scales.
const GROUPS: usize = PANEL_COLS / 16;

/// See `Kernels::unpack_tiles`, which asserts the lengths.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn widen(w: &Groups<'_>, row: usize, panel: &mut TilePanel) {
    let range = Range16::of(w.ty);
    let (factors, mins, unit) = sixteen_bits(w, range);
    panel.scale[row] = 256.0 * unit;
    // Lane `i` of a step belongs to group `4 step + i` (of 16 columns) or `2 step + i / 2` (of 32).
    let narrow = w.q.len() / w.scale.len() == 16;
    let lanes = if narrow { [0, 1, 2, 3] } else { [0, 0, 1, 1] };
    let lanes = lanes.map(|lane: u64| lane * 0x0001_0001_0001_0001);
    let [a, b, c, d] = lanes.map(|lane| lane as i64);
    let mut group = _mm512_setr_epi64(a, a, b, b, c, c, d, d);
    let next = _mm512_set1_epi16(if narrow { 4 } else { 2 });
    let zero = _mm512_set1_epi8(range.zero as i8);
    let shift = _mm_cvtsi32_si128(range.shift as i32 - 8);
    for (step, q) in w.q.chunks(STEP).enumerate() {
        // A row's last 32 columns are a step as well: activations are zero behind them.
        let there = if q.len() == STEP { !0 } else { (1 << q.len()) - 1 };
        // SAFETY: as many bytes as `q` has are read.
        let q = _mm512_sub_epi8(unsafe { _mm512_maskz_loadu_epi8(there, q.as_ptr().cast()) }, zero);
        let (factor, min) = (_mm512_permutexvar_epi16(group, factors), _mm512_permutexvar_epi16(group, mins));
        let nothing = _mm512_setzero_si512();
        let widen = |v| _mm512_adds_epi16(_mm512_mulhrs_epi16(_mm512_sll_epi16(v, shift), factor), min);
        let (v0, v1) = (widen(_mm512_unpacklo_epi8(nothing, q)), widen(_mm512_unpackhi_epi8(nothing, q)));
        let (tiles, place) = TilePanel::place(row, step);
        for (tile, plane) in tiles.into_iter().zip(split(v0, v1)) {
            let to = &mut panel.tiles[tile].0[place];
            // SAFETY: 64 writable bytes.
            unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), plane) };
        }
        group = _mm512_add_epi16(group, next);
    }
}

/// What each group's codes are multiplied with, what is added (with 128 more, for [`split`]), and what a unit is worth.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn sixteen_bits(w: &Groups<'_>, range: Range16) -> (__m512i, __m512i, f32) {
    let n = w.scale.len();
    assert!(n <= GROUPS && (w.min.is_empty() || w.min.len() == n));
    let (mut scales, mut mins) = ([_mm512_setzero_ps(); 2], [_mm512_setzero_ps(); 2]);
    let mut most = _mm512_setzero_ps();
    let least = _mm512_set1_ps(range.least as f32);
    let greatest = _mm512_set1_ps(range.greatest as f32);
    for i in 0..2 {
        let there = ((1u64 << n) - 1 >> (16 * i)) as u16;
        // SAFETY: only the elements below `n` are read.
        unsafe {
            scales[i] = _mm512_maskz_loadu_ps(there, w.scale.as_ptr().wrapping_add(16 * i));
            if !w.min.is_empty() {
                mins[i] = _mm512_maskz_loadu_ps(there, w.min.as_ptr().wrapping_add(16 * i));
            }
        }
        for extreme in [least, greatest] {
            let value = _mm512_add_ps(_mm512_mul_ps(scales[i], extreme), mins[i]);
            most = _mm512_max_ps(most, _mm512_mul_ps(_mm512_abs_ps(value), _mm512_set1_ps(1.0 / LIMIT)));
        }
        let scale = _mm512_mul_ps(_mm512_abs_ps(scales[i]), _mm512_set1_ps(range.per_scale() / 32767.0));
        most = _mm512_max_ps(most, scale);
    }
    let unit = _mm512_reduce_max_ps(most);
    let inverse = if unit > TINY { 1.0 / unit } else { 0.0 };
    let whole = |v: [__m512; 2], by: f32| {
        let by = _mm512_set1_ps(by);
        let half = |v| _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(v, by)));
        _mm512_inserti64x4::<1>(_mm512_castsi256_si512(half(v[0])), half(v[1]))
    };
    let mins = _mm512_adds_epi16(whole(mins, inverse), _mm512_set1_epi16(128));
    (whole(scales, range.per_scale() * inverse), mins, unit)
}
