//! Products with chosen columns: four columns at a time, interleaved in registers.

use std::arch::x86_64::*;

use super::blocks::lanes;
use crate::kernels::columns::{Bundle, Chosen, ChosenGroup};
use crate::kernels::x86::IQ4_VALUES;
use crate::quant::columns::{Codes, ColumnTile, TILE};
use crate::quant::zero_point;

/// Bundles fetched ahead: columns that were left out break the runs that hardware prefetchers follow. So many
/// bundles of 4-bit columns are 4 KiB, what a core can have under way.
const AHEAD: usize = 8;
/// Groups whose scales are fetched ahead.
const GROUPS_AHEAD: usize = 4;

/// How a kernel reads codes; the values of `KIND`.
const NIBBLES: u8 = 0;
const NIBBLES_AND_HIGH: u8 = 1;
const TABLE: u8 = 2;
const BYTES: u8 = 3;

/// See `Kernels::columns`, which asserts the lengths.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn columns(tile: &ColumnTile<'_>, chosen: Chosen<'_>, out: &mut [f32; TILE]) {
    match (tile.codes, tile.width) {
        (Codes::Nibbles { high: 0 }, 256) => kernel::<NIBBLES, 16>(tile, chosen, out),
        (Codes::Nibbles { high: 0 }, _) => kernel::<NIBBLES, 8>(tile, chosen, out),
        (Codes::Nibbles { .. }, 256) => kernel::<NIBBLES_AND_HIGH, 16>(tile, chosen, out),
        (Codes::Nibbles { .. }, _) => kernel::<NIBBLES_AND_HIGH, 8>(tile, chosen, out),
        (Codes::Table, 256) => kernel::<TABLE, 16>(tile, chosen, out),
        (Codes::Table, _) => kernel::<TABLE, 8>(tile, chosen, out),
        (Codes::Bytes, 256) => kernel::<BYTES, 16>(tile, chosen, out),
        (Codes::Bytes, _) => kernel::<BYTES, 8>(tile, chosen, out),
    }
}

/// The planes of a tile.
struct Planes {
    low: *const u8,
    low_bytes: usize,
    high: *const u8,
    high_bytes: usize,
    /// How far the bits of each sum register of a quarter are rotated to stand above a nibble.
    turn: [__m512i; 4],
    /// Where they stand then.
    top: __m512i,
}

#[inline]
#[target_feature(enable = "avx512f")]
fn planes(tile: &ColumnTile<'_>) -> Planes {
    let (low_bytes, high) = match tile.codes {
        Codes::Bytes => (tile.width, 0),
        Codes::Table => (tile.width / 2, 0),
        Codes::Nibbles { high } => (tile.width / 2, high),
    };
    let high_bytes = tile.width * high / 8;
    let mut turn = [_mm512_setzero_si512(); 4];
    if high > 0 {
        // `ColumnLayout::high_place`: field `f * copies + copy` of a byte, to be moved to bit 4.
        let copies = 64 / high_bytes;
        for (f, turn) in turn.iter_mut().enumerate() {
            let mut by = [0i32; 16];
            for (i, by) in by.iter_mut().enumerate() {
                let copy = i / (16 / copies);
                *by = (4 - (high * (f * copies + copy)) as i32).rem_euclid(32);
            }
            *turn = lanes(&by);
        }
    }
    let top = _mm512_set1_epi8(((1 << high) - 1) << 4);
    Planes { low: tile.low.as_ptr(), low_bytes, high: tile.high.as_ptr(), high_bytes, turn, top }
}

/// `A` sum registers of 16 outputs.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn kernel<const KIND: u8, const A: usize>(tile: &ColumnTile<'_>, chosen: Chosen<'_>, out: &mut [f32; TILE]) {
    let planes = planes(tile);
    let zero = i32::from(zero_point(tile.ty));
    let has_min = !tile.min.is_empty();
    let mut mins = [0f32; TILE];
    let mut all_sums = 0f32;
    let mut at = chosen.start as usize;
    for (i, g) in chosen.groups.iter().enumerate() {
        if let Some(next) = chosen.groups.get(i + GROUPS_AHEAD) {
            fetch_scales::<A>(tile, next);
        }
        let start = -zero * g.sum;
        let mut dots = [_mm512_set1_epi32(start); A];
        if KIND == NIBBLES {
            // High nibbles are not shifted down but count 16 times.
            for pair in dots.as_chunks_mut::<2>().0 {
                pair[1] = _mm512_set1_epi32(16 * start);
            }
        }
        for b in at..g.end as usize {
            if let Some(next) = chosen.bundles.get(b + AHEAD) {
                fetch::<KIND, A>(&planes, next);
            }
            bundle::<KIND, A>(&planes, &chosen.bundles[b], &mut dots);
        }
        at = g.end as usize;
        let sum = g.scale * g.sum as f32;
        all_sums += sum;
        add_group::<KIND, A>(tile, g, &dots, out);
        if has_min {
            add_mins::<A>(tile, g, sum, &mut mins);
        }
    }
    finish::<A>(tile, all_sums, &mins, out);
}

#[inline]
#[target_feature(enable = "avx512f")]
fn fetch_scales<const A: usize>(tile: &ColumnTile<'_>, g: &ChosenGroup) {
    let at = g.group as usize * tile.width;
    for part in [tile.scale, tile.min] {
        if let Some(codes) = part.get(at..at + tile.width) {
            for line in codes.chunks(64) {
                _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast());
            }
        }
    }
}

/// Asks for the columns of a bundle.
#[inline]
#[target_feature(enable = "avx512f")]
fn fetch<const KIND: u8, const A: usize>(planes: &Planes, next: &Bundle) {
    for col in next.cols {
        // SAFETY: the columns of a list are below the tile's, so these are addresses in its planes.
        unsafe {
            let low = planes.low.add(col as usize * planes.low_bytes);
            for line in 0..if KIND == BYTES { A / 4 } else { A / 8 } {
                _mm_prefetch::<_MM_HINT_T0>(low.add(64 * line).cast());
            }
            if KIND == NIBBLES_AND_HIGH {
                _mm_prefetch::<_MM_HINT_T0>(planes.high.add(col as usize * planes.high_bytes).cast());
            }
        }
    }
}

/// Four registers to the four quarters of their 16-byte lanes, bytes of the four interleaved.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn interleave(x: [__m512i; 4]) -> [__m512i; 4] {
    let (low, high) = (_mm512_unpacklo_epi8(x[0], x[1]), _mm512_unpackhi_epi8(x[0], x[1]));
    let (low2, high2) = (_mm512_unpacklo_epi8(x[2], x[3]), _mm512_unpackhi_epi8(x[2], x[3]));
    [
        _mm512_unpacklo_epi16(low, low2),
        _mm512_unpackhi_epi16(low, low2),
        _mm512_unpacklo_epi16(high, high2),
        _mm512_unpackhi_epi16(high, high2),
    ]
}

/// The cache line `line` of each column's low plane.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn low_line(planes: &Planes, cols: &[u32; 4], line: usize) -> [__m512i; 4] {
    let mut x = [_mm512_setzero_si512(); 4];
    for (x, &col) in x.iter_mut().zip(cols) {
        // SAFETY: the column is below the tile's, and its part of the plane has this line (`Kernels::columns`).
        *x =
            unsafe { _mm512_loadu_si512(planes.low.add(col as usize * planes.low_bytes + 64 * line).cast()) };
    }
    interleave(x)
}

/// The columns of the high plane, repeated to fill a register.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
fn high_lines(planes: &Planes, cols: &[u32; 4]) -> [__m512i; 4] {
    let mut x = [_mm512_setzero_si512(); 4];
    for (x, &col) in x.iter_mut().zip(cols) {
        // SAFETY: the column is below the tile's and has `high_bytes` in the plane: 64, 32 or 16.
        *x = unsafe {
            let at = planes.high.add(col as usize * planes.high_bytes);
            match planes.high_bytes {
                64 => _mm512_loadu_si512(at.cast()),
                32 => _mm512_broadcast_i64x4(_mm256_loadu_si256(at.cast())),
                _ => _mm512_broadcast_i32x4(_mm_loadu_si128(at.cast())),
            }
        };
    }
    interleave(x)
}

/// `dots += codes * activations` for the four columns of a bundle.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn bundle<const KIND: u8, const A: usize>(planes: &Planes, b: &Bundle, dots: &mut [__m512i; A]) {
    let acts = _mm512_set1_epi32(i32::from_le_bytes(b.acts.map(|a| a as u8)));
    if KIND == BYTES {
        for line in 0..A / 4 {
            let x = low_line(planes, &b.cols, line);
            for k in 0..4 {
                dots[4 * line + k] = _mm512_dpbusd_epi32(dots[4 * line + k], x[k], acts);
            }
        }
        return;
    }
    let nibble = _mm512_set1_epi8(15);
    let high = if KIND == NIBBLES_AND_HIGH { high_lines(planes, &b.cols) } else { [nibble; 4] };
    for line in 0..A / 8 {
        let quarters = low_line(planes, &b.cols, line);
        for k in 0..4 {
            let (x, a) = (quarters[k], 8 * line + 2 * k);
            let (mut even, mut odd) = (_mm512_and_si512(x, nibble), _mm512_andnot_si512(nibble, x));
            if KIND != NIBBLES {
                odd = _mm512_and_si512(_mm512_srli_epi16::<4>(x), nibble);
            }
            if KIND == TABLE {
                // SAFETY: 16 readable bytes.
                let table = _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(IQ4_VALUES.as_ptr().cast()) });
                (even, odd) = (_mm512_shuffle_epi8(table, even), _mm512_shuffle_epi8(table, odd));
            }
            if KIND == NIBBLES_AND_HIGH {
                // (turned & top) | nibble
                let (t0, t1) = (
                    _mm512_rolv_epi32(high[k], planes.turn[2 * line]),
                    _mm512_rolv_epi32(high[k], planes.turn[2 * line + 1]),
                );
                even = _mm512_ternarylogic_epi32::<0xf8>(even, t0, planes.top);
                odd = _mm512_ternarylogic_epi32::<0xf8>(odd, t1, planes.top);
            }
            dots[a] = _mm512_dpbusd_epi32(dots[a], even, acts);
            dots[a + 1] = _mm512_dpbusd_epi32(dots[a + 1], odd, acts);
        }
    }
}

/// Number `a` of 16 floats of a head vector.
#[inline]
#[target_feature(enable = "avx512f")]
fn head(tile: &ColumnTile<'_>, which: usize, a: usize) -> __m512 {
    let at = (which * tile.width + a * 16) * 4;
    let bytes: &[u8; 64] = tile.heads[at..].first_chunk().expect("heads hold whole registers");
    // SAFETY: 64 readable bytes; the load has no alignment.
    unsafe { _mm512_loadu_ps(bytes.as_ptr().cast()) }
}

/// The 16 codes of group `g` for the outputs from `16 a` on, as floats.
#[inline]
#[target_feature(enable = "avx512f")]
fn codes(part: &[u8], width: usize, g: &ChosenGroup, a: usize) -> __m512 {
    let at = g.group as usize * width + a * 16;
    let bytes: &[u8; 16] = part[at..].first_chunk().expect("a byte an output");
    // SAFETY: 16 readable bytes; the load has no alignment.
    _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(sums: &[f32; TILE], a: usize) -> __m512 {
    let sums: &[f32; 16] = sums[16 * a..].first_chunk().expect("16 sums");
    // SAFETY: 64 readable bytes; the load has no alignment.
    unsafe { _mm512_loadu_ps(sums.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(sums: &mut [f32; TILE], a: usize, v: __m512) {
    let sums: &mut [f32; 16] = sums[16 * a..].first_chunk_mut().expect("16 sums");
    // SAFETY: 64 writable bytes; the store has no alignment.
    unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), v) }
}

/// `sums += (scale - zero) * (activation scale * dots)`
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn add_group<const KIND: u8, const A: usize>(
    tile: &ColumnTile<'_>,
    g: &ChosenGroup,
    dots: &[__m512i; A],
    sums: &mut [f32; TILE],
) {
    let plain = _mm512_set1_ps(g.scale);
    for (a, &dot) in dots.iter().enumerate() {
        let dot = if KIND == NIBBLES && a % 2 == 1 { _mm512_srai_epi32::<4>(dot) } else { dot };
        let scale = _mm512_sub_ps(codes(tile.scale, tile.width, g, a), head(tile, 1, a));
        let dot = _mm512_mul_ps(plain, _mm512_cvtepi32_ps(dot));
        store(sums, a, _mm512_fmadd_ps(scale, dot, load(sums, a)));
    }
}

/// `mins += min * sum of activations`
#[inline]
#[target_feature(enable = "avx512f")]
fn add_mins<const A: usize>(tile: &ColumnTile<'_>, g: &ChosenGroup, sum: f32, mins: &mut [f32; TILE]) {
    let sum = _mm512_set1_ps(sum);
    for a in 0..A {
        let min = codes(tile.min, tile.width, g, a);
        store(mins, a, _mm512_fmadd_ps(min, sum, load(mins, a)));
    }
}

/// From sums of codes to sums of weights.
#[inline]
#[target_feature(enable = "avx512f")]
fn finish<const A: usize>(tile: &ColumnTile<'_>, all: f32, mins: &[f32; TILE], sums: &mut [f32; TILE]) {
    let all = _mm512_set1_ps(all);
    for a in 0..A {
        let mut total = _mm512_mul_ps(load(sums, a), head(tile, 0, a));
        if !tile.min.is_empty() {
            let min = _mm512_fnmadd_ps(head(tile, 3, a), all, load(mins, a));
            total = _mm512_fmadd_ps(head(tile, 2, a), min, total);
        }
        store(sums, a, total);
    }
}
