//! Products with chosen columns: four columns at a time, interleaved in registers.

use std::arch::x86_64::*;
use std::ops::Range;

use super::blocks::lanes;
use crate::kernels::columns::{Bundle, Chosen};
use crate::kernels::x86::IQ4_VALUES;
use crate::kernels::x86::columns::{BYTES, Fetch, Group, Groups, NIBBLES, NIBBLES_AND_HIGH, TABLE};
use crate::quant::columns::{Codes, ColumnStrip, TILE};

/// See `Kernels::columns`, which asserts the lengths.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn columns(strip: &ColumnStrip<'_>, chosen: Chosen<'_>, outputs: Range<usize>, out: &mut [f32]) {
    let groups = Groups::new(strip, chosen, &outputs);
    match strip.codes {
        Codes::Nibbles { high: 0 } => kernel::<NIBBLES>(strip, groups, outputs, out),
        Codes::Nibbles { .. } => kernel::<NIBBLES_AND_HIGH>(strip, groups, outputs, out),
        Codes::Table => kernel::<TABLE>(strip, groups, outputs, out),
        Codes::Bytes => kernel::<BYTES>(strip, groups, outputs, out),
    }
}

/// Group after group; in a group tile after tile, while the next group is fetched, its columns one after the other:
/// in runs that the memory system can follow.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn kernel<const KIND: u8>(
    strip: &ColumnStrip<'_>,
    mut groups: Groups<'_>,
    outputs: Range<usize>,
    out: &mut [f32],
) {
    let (whole, half) = (High::new::<16>(strip), High::new::<8>(strip));
    let first = outputs.start / TILE;
    let mut ahead = groups.take();
    groups.fetch(ahead.as_ref(), 1).step();
    while let Some(group) = ahead {
        ahead = groups.take();
        let mut next = groups.fetch(ahead.as_ref(), outputs.len().div_ceil(TILE) * group.bundles.len());
        for (i, out) in out.chunks_mut(TILE).enumerate() {
            if out.len() == TILE {
                one_tile::<KIND, 16>(&group, &whole, first + i, &mut next, out);
            } else {
                one_tile::<KIND, 8>(&group, &half, first + i, &mut next, out);
            }
        }
    }
}

/// How the high bits of a tile of `A` sum registers are brought above the nibbles.
struct High {
    /// Bytes of a column in a tile: 64, 32 or 16.
    bytes: usize,
    /// How far the bits of each sum register of a quarter are rotated.
    turn: [__m512i; 4],
    /// Where they stand then.
    mask: __m512i,
}

impl High {
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn new<const A: usize>(strip: &ColumnStrip<'_>) -> Self {
        let mut turn = [_mm512_setzero_si512(); 4];
        let Codes::Nibbles { high: high @ 1.. } = strip.codes else {
            return Self { bytes: 0, turn, mask: turn[0] };
        };
        // `ColumnLayout::high_place`: field `f * copies + copy` of a byte is to be moved to bit 4.
        let bytes = A * 16 * high / 8;
        let copies = 64 / bytes;
        for (f, turn) in turn.iter_mut().enumerate() {
            let mut by = [0i32; 16];
            for (i, by) in by.iter_mut().enumerate() {
                let copy = i / (16 / copies);
                *by = (4 - (high * (f * copies + copy)) as i32).rem_euclid(32);
            }
            *turn = lanes(&by);
        }
        Self { bytes, turn, mask: _mm512_set1_epi8(((1 << high) - 1) << 4) }
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

/// A cache line of each of four columns, from byte `at` on.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn low_line(columns: &[*const u8; 4], at: usize) -> [__m512i; 4] {
    let mut x = [_mm512_setzero_si512(); 4];
    for i in 0..4 {
        // SAFETY: the columns are a strip's, and `at` is a line of their low part (`Kernels::columns`).
        x[i] = unsafe { _mm512_loadu_si512(columns[i].add(at).cast()) };
    }
    interleave(x)
}

/// The high bits of a tile of four columns, from byte `at` on, repeated to fill a register.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
fn high_lines(columns: &[*const u8; 4], at: usize, bytes: usize) -> [__m512i; 4] {
    let mut x = [_mm512_setzero_si512(); 4];
    for i in 0..4 {
        // SAFETY: the columns are a strip's and have `bytes` for the tile in their high part.
        x[i] = unsafe {
            let at = columns[i].add(at);
            match bytes {
                64 => _mm512_loadu_si512(at.cast()),
                32 => _mm512_broadcast_i64x4(_mm256_loadu_si256(at.cast())),
                _ => _mm512_broadcast_i32x4(_mm_loadu_si128(at.cast())),
            }
        };
    }
    interleave(x)
}

/// A group times the outputs of a tile, `A` sum registers of 16.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn one_tile<const KIND: u8, const A: usize>(
    group: &Group<'_>,
    high: &High,
    tile: usize,
    next: &mut Fetch<'_>,
    out: &mut [f32],
) {
    let strip = group.strip;
    let low_at = if KIND == BYTES { tile * TILE } else { tile * TILE / 2 };
    let high_at = match strip.codes {
        Codes::Nibbles { high } if KIND == NIBBLES_AND_HIGH => strip.low_bytes + tile * TILE * high / 8,
        _ => 0,
    };
    let mut dots = [_mm512_set1_epi32(group.start); A];
    if KIND == NIBBLES {
        // High nibbles are not shifted down but count 16 times.
        for pair in dots.as_chunks_mut::<2>().0 {
            pair[1] = _mm512_set1_epi32(16 * group.start);
        }
    }
    for (bundle, columns) in group.bundles.iter().zip(&group.columns) {
        next.step();
        add_bundle::<KIND, A>(columns, (low_at, high_at), high, bundle, &mut dots);
    }
    if KIND == NIBBLES {
        for pair in dots.as_chunks_mut::<2>().0 {
            pair[1] = _mm512_srai_epi32::<4>(pair[1]);
        }
    }
    add_group(group, tile * TILE, &dots, out);
}

/// `out += scale * dots + min * sum of activations` in units of the factors, for the outputs from `at` on.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn add_group<const A: usize>(group: &Group<'_>, at: usize, dots: &[__m512i; A], out: &mut [f32]) {
    let strip = group.strip;
    let scales = &group.bytes[at..][..A * 16];
    let (scale, zero) = (_mm512_set1_ps(group.scale), _mm512_set1_ps(strip.zeros[0]));
    if !strip.has_min {
        for (a, &dot) in dots.iter().enumerate() {
            let dot = _mm512_mul_ps(scale, _mm512_cvtepi32_ps(dot));
            let factor = _mm512_sub_ps(codes(scales, a), zero);
            store(out, a, _mm512_fmadd_ps(factor, dot, load(out, a)));
        }
        return;
    }
    let mins = &group.bytes[strip.width + at..][..A * 16];
    let ratios = &strip.heads[strip.width + at..][..A * 16];
    let sum = _mm512_set1_ps(group.sum);
    for (a, &dot) in dots.iter().enumerate() {
        let dot = _mm512_mul_ps(scale, _mm512_cvtepi32_ps(dot));
        let factor = _mm512_sub_ps(codes(scales, a), zero);
        let total = _mm512_fmadd_ps(factor, dot, load(out, a));
        let min = _mm512_mul_ps(sum, codes(mins, a));
        store(out, a, _mm512_fmadd_ps(load(ratios, a), min, total));
    }
}

/// `dots += codes * activations` for the four columns of a bundle.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn add_bundle<const KIND: u8, const A: usize>(
    columns: &[*const u8; 4],
    (low_at, high_at): (usize, usize),
    high: &High,
    b: &Bundle,
    dots: &mut [__m512i; A],
) {
    let acts = _mm512_set1_epi32(b.acts as i32);
    if KIND == BYTES {
        for line in 0..A / 4 {
            let x = low_line(columns, low_at + 64 * line);
            for k in 0..4 {
                dots[4 * line + k] = _mm512_dpbusd_epi32(dots[4 * line + k], x[k], acts);
            }
        }
        return;
    }
    let nibble = _mm512_set1_epi8(15);
    let top = if KIND == NIBBLES_AND_HIGH { high_lines(columns, high_at, high.bytes) } else { [nibble; 4] };
    for line in 0..A / 8 {
        let quarters = low_line(columns, low_at + 64 * line);
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
                // nibble | turned & mask
                let t0 = _mm512_rolv_epi32(top[k], high.turn[2 * line]);
                let t1 = _mm512_rolv_epi32(top[k], high.turn[2 * line + 1]);
                even = _mm512_ternarylogic_epi32::<0xf8>(even, t0, high.mask);
                odd = _mm512_ternarylogic_epi32::<0xf8>(odd, t1, high.mask);
            }
            dots[a] = _mm512_dpbusd_epi32(dots[a], even, acts);
            dots[a + 1] = _mm512_dpbusd_epi32(dots[a + 1], odd, acts);
        }
    }
}

/// The `a`-th 16 bytes as floats.
#[inline]
#[target_feature(enable = "avx512f")]
fn codes(bytes: &[u8], a: usize) -> __m512 {
    let bytes: &[u8; 16] = bytes[16 * a..].first_chunk().expect("a byte an output");
    // SAFETY: 16 readable bytes; the load has no alignment.
    _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }))
}

/// The `a`-th 16 floats.
#[inline]
#[target_feature(enable = "avx512f")]
fn load(floats: &[f32], a: usize) -> __m512 {
    let floats: &[f32; 16] = floats[16 * a..].first_chunk().expect("16 floats");
    // SAFETY: 64 readable bytes; the load has no alignment.
    unsafe { _mm512_loadu_ps(floats.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(floats: &mut [f32], a: usize, v: __m512) {
    let floats: &mut [f32; 16] = floats[16 * a..].first_chunk_mut().expect("16 floats");
    // SAFETY: 64 writable bytes; the store has no alignment.
    unsafe { _mm512_storeu_ps(floats.as_mut_ptr(), v) }
}
