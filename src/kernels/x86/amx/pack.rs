//! Activations and weights to the planes of `kernels::tiles`.

use std::arch::x86_64::*;

use crate::kernels::tiles::{Form, LIMIT, Range16, STEP, TILE, TINY, Tile, TilePanel, UNPACKED, chunk_cols};
use crate::kernels::x86::avx512vnni::transpose16;
use crate::kernels::{PANEL_COLS, PANEL_ROWS};

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
                (planes[0][t], planes[1][t]) = row_planes(&row[col..(col + STEP).min(range.end)], inverse[t]);
            }
            for (plane, tile) in planes.iter().zip(&mut tiles[col / STEP * 2..][..2]) {
                // Four columns are an element; `row_planes` has element 4 i + j where 4 j + i belongs.
                let turned = transpose16(*plane);
                for (at, four) in turned.iter().enumerate() {
                    store(&mut tile.0[4 * (at % 4) + at / 4], *four);
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
fn row_planes(values: &[f32], inverse: f32) -> (__m512i, __m512i) {
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
fn planes(v0: __m512i, v1: __m512i) -> (__m512i, __m512i) {
    // With 128 added, the upper byte is that of the rounded quotient, and the lower one is `low + 128`.
    let half = _mm512_set1_epi16(128);
    split(_mm512_add_epi16(v0, half), _mm512_add_epi16(v1, half))
}

/// [`planes`] of numbers to which 128 has been added.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn split(v0: __m512i, v1: __m512i) -> (__m512i, __m512i) {
    let byte = _mm512_set1_epi16(0xff);
    let high = _mm512_packs_epi16(_mm512_srai_epi16::<8>(v0), _mm512_srai_epi16::<8>(v1));
    let low = _mm512_packus_epi16(_mm512_and_si512(v0, byte), _mm512_and_si512(v1, byte));
    (high, _mm512_xor_si512(low, _mm512_set1_epi8(-128)))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(to: &mut [i8; 64], bytes: __m512i) {
    // SAFETY: 64 writable bytes.
    unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), bytes) };
}

/// Most groups of a row of a panel: two registers of scales.
const GROUPS: usize = PANEL_COLS / 16;

/// See `Kernels::unpack_tiles`, which asserts the lengths.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn widen(form: Form, rows: usize, first: usize, panel: &mut TilePanel) {
    match (form.group_len, form.has_min) {
        (32, false) => widen_rows::<32, false>(form, rows, first, panel),
        (32, true) => widen_rows::<32, true>(form, rows, first, panel),
        (_, false) => widen_rows::<16, false>(form, rows, first, panel),
        (_, true) => widen_rows::<16, true>(form, rows, first, panel),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn widen_rows<const G: usize, const MIN: bool>(form: Form, rows: usize, first: usize, panel: &mut TilePanel) {
    let TilePanel { tiles, scale: units, unpacked, .. } = panel;
    let Form { cols, range, .. } = form;
    assert!(rows <= UNPACKED && first + rows <= PANEL_ROWS && cols <= PANEL_COLS);
    let mut bits = [(_mm512_setzero_si512(), _mm512_setzero_si512()); UNPACKED];
    for r in 0..rows {
        let (factors, mins, unit) =
            sixteen_bits::<MIN>(&unpacked.scale[r], &unpacked.min[r], cols / G, range);
        (bits[r], units[first + r]) = ((factors, mins), 256.0 * unit);
    }
    // Lane `i` of a step belongs to group `4 step + i` (of 16 columns) or `2 step + i / 2` (of 32).
    let four = |lane: i64| lane * 0x0001_0001_0001_0001;
    let [a, b, c, d] = if G == 16 { [0, four(1), four(2), four(3)] } else { [0, 0, four(1), four(1)] };
    let first_groups = _mm512_setr_epi64(a, a, b, b, c, c, d, d);
    let next = _mm512_set1_epi16((STEP / G) as i16);
    let zero = _mm512_set1_epi8(range.zero as i8);
    let shift = _mm_cvtsi32_si128(range.shift as i32 - 8);
    let half = _mm512_set1_epi16(128);
    for (r, &(factors, mins)) in bits[..rows].iter().enumerate() {
        let mut group = first_groups;
        for step in 0..cols.div_ceil(STEP) {
            let q: &[u8; STEP] = unpacked.q[r][step * STEP..].first_chunk().expect("whole steps");
            // What lies behind a row's last 32 columns is multiplied with zeros.
            // SAFETY: 64 readable bytes.
            let q = _mm512_sub_epi8(unsafe { _mm512_loadu_si512(q.as_ptr().cast()) }, zero);
            let factor = _mm512_permutexvar_epi16(group, factors);
            let min = if MIN { _mm512_permutexvar_epi16(group, mins) } else { half };
            let nothing = _mm512_setzero_si512();
            let v0 = _mm512_sll_epi16(_mm512_unpacklo_epi8(nothing, q), shift);
            let v1 = _mm512_sll_epi16(_mm512_unpackhi_epi8(nothing, q), shift);
            let v0 = _mm512_adds_epi16(_mm512_mulhrs_epi16(v0, factor), min);
            let v1 = _mm512_adds_epi16(_mm512_mulhrs_epi16(v1, factor), min);
            let ([high_tile, low_tile], place) = TilePanel::place(first + r, step);
            let (high, low) = split(v0, v1);
            store(&mut tiles[high_tile].0[place], high);
            store(&mut tiles[low_tile].0[place], low);
            group = _mm512_add_epi16(group, next);
        }
    }
}

/// What each group's codes are multiplied with, what is added (with 128 more, for [`split`]), and what a unit is worth.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn sixteen_bits<const MIN: bool>(
    scale: &[f32; GROUPS],
    min: &[f32; GROUPS],
    groups: usize,
    range: Range16,
) -> (__m512i, __m512i, f32) {
    let (mut scales, mut mins) = ([_mm512_setzero_ps(); 2], [_mm512_setzero_ps(); 2]);
    let mut most = _mm512_setzero_ps();
    let per_scale = _mm512_set1_ps(range.per_scale() / 32767.0);
    let (least, greatest) = (_mm512_set1_ps(range.least as f32), _mm512_set1_ps(range.greatest as f32));
    for i in 0..groups.div_ceil(16) {
        let there = (((1u64 << groups) - 1) >> (16 * i)) as u16;
        // SAFETY: 16 of the 32 elements, of which only those below `groups` are read.
        unsafe {
            scales[i] = _mm512_maskz_loadu_ps(there, scale.as_ptr().add(16 * i));
            if MIN {
                mins[i] = _mm512_maskz_loadu_ps(there, min.as_ptr().add(16 * i));
            }
        }
        for extreme in [&least, &greatest] {
            let value = _mm512_abs_ps(_mm512_add_ps(_mm512_mul_ps(scales[i], *extreme), mins[i]));
            most = _mm512_max_ps(most, _mm512_mul_ps(value, _mm512_set1_ps(1.0 / LIMIT)));
        }
        most = _mm512_max_ps(most, _mm512_mul_ps(_mm512_abs_ps(scales[i]), per_scale));
    }
    let unit = _mm512_reduce_max_ps(most);
    let inverse = if unit > TINY { 1.0 / unit } else { 0.0 };
    let factors = words(scales, range.per_scale() * inverse);
    let mins = if MIN { _mm512_adds_epi16(words(mins, inverse), _mm512_set1_epi16(128)) } else { factors };
    (factors, mins, unit)
}

/// `v * by`, rounded to words.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn words(v: [__m512; 2], by: f32) -> __m512i {
    let by = _mm512_set1_ps(by);
    let low = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(v[0], by)));
    let high = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(v[1], by)));
    _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high)
}
