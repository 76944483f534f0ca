//! Products with chosen columns: four columns at a time, interleaved in registers.
//!
//! # Order
//! Group after group, tile after tile of the outputs, all chosen columns of the group: so sums never leave the registers,
//! and a core follows as many runs as a group has columns. They are asked for some tiles ahead, since that many runs
//! are more than a CPU foresees by itself (docs/experiments.md).

#![allow(clippy::needless_range_loop)] // an iterator's closures and adapters would not be inlined

use std::arch::x86_64::*;
use std::ops::Range;

use super::blocks::lanes;
use crate::kernels::columns::groups::{BYTES, Group, Groups, NIBBLES, NIBBLES_AND_HIGH, TABLE};
use crate::kernels::columns::{Bundle, Chosen};
use crate::kernels::fetch::LINE;
use crate::kernels::x86::{IQ4_VALUES, is_amd};
use crate::quant::columns::{COARSE_BITS, Codes, ColumnStrip, TILE};

/// How many tiles ahead of their use columns are asked for.
const AHEAD: usize = 3;

/// See `Kernels::columns`, which asserts the lengths.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn columns(strip: &ColumnStrip<'_>, chosen: Chosen<'_>, outputs: Range<usize>, out: &mut [f32]) {
    match strip.codes {
        Codes::Nibbles { high: 0 } => kernel::<NIBBLES>(strip, chosen, outputs, out),
        Codes::Nibbles { .. } => kernel::<NIBBLES_AND_HIGH>(strip, chosen, outputs, out),
        Codes::Table => kernel::<TABLE>(strip, chosen, outputs, out),
        Codes::Bytes => kernel::<BYTES>(strip, chosen, outputs, out),
    }
}

/// What is asked for while a tile is multiplied: a tile of this group or of the next.
struct Ahead<'g> {
    group: &'g Group<'g>,
    tile: usize,
    /// Into L2 instead of L1. There an AMD core has many more lines under way, while Intel's reads faster into L1.
    far: bool,
}

impl Ahead<'_> {
    /// Asks for the columns of bundle `n`, if there is one.
    #[inline]
    #[target_feature(enable = "sse")]
    fn columns<const KIND: u8>(&self, n: usize) {
        if n >= self.group.bundles.len() {
            return;
        }
        if n >= self.group.fine {
            // The upper bits of a tile are a line.
            return self.group.columns[n]
                .iter()
                .for_each(|column| self.line(column.wrapping_add(self.tile * LINE)));
        }
        let strip = self.group.strip;
        let (low, lines) = if KIND == BYTES { (self.tile * TILE, 4) } else { (self.tile * TILE / 2, 2) };
        for column in self.group.columns[n] {
            for line in 0..lines {
                self.line(column.wrapping_add(low + line * LINE));
            }
            if let (Codes::Nibbles { high }, true) = (strip.codes, KIND == NIBBLES_AND_HIGH) {
                self.line(column.wrapping_add(strip.low_bytes + self.tile * TILE * high / 8));
            }
        }
    }

    /// Asks for scales and mins.
    #[inline]
    #[target_feature(enable = "sse")]
    fn scales(&self) {
        let scales = self.group.bytes.as_ptr().wrapping_add(self.tile * TILE);
        for at in (0..TILE).step_by(LINE) {
            self.line(scales.wrapping_add(at));
            if self.group.strip.has_min {
                self.line(scales.wrapping_add(self.group.strip.width + at));
            }
        }
    }

    #[inline]
    #[target_feature(enable = "sse")]
    fn line(&self, at: *const u8) {
        if self.far {
            _mm_prefetch::<_MM_HINT_T1>(at.cast());
        } else {
            _mm_prefetch::<_MM_HINT_T0>(at.cast());
        }
    }
}

/// Group after group.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn kernel<const KIND: u8>(
    strip: &ColumnStrip<'_>,
    chosen: Chosen<'_>,
    outputs: Range<usize>,
    out: &mut [f32],
) {
    out.fill(0.0);
    let (whole, half) = (High::new::<16>(strip), High::new::<8>(strip));
    let (first, tiles, far) = (outputs.start / TILE, outputs.len().div_ceil(TILE), is_amd());
    let mut groups = Groups::new(strip, chosen, &outputs);
    let mut now = groups.take();
    while let Some(group) = now {
        let next = groups.take();
        for tile in 0..tiles {
            // Behind the last group there is nothing to ask for; what is here already costs little to ask for again.
            let ahead = match (tile + AHEAD < tiles, &next) {
                (false, Some(next)) => {
                    Ahead { group: next, tile: first + (tile + AHEAD - tiles).min(tiles - 1), far }
                }
                _ => Ahead { group: &group, tile: first + (tile + AHEAD).min(tiles - 1), far },
            };
            let out = &mut out[tile * TILE..];
            match out.split_at_mut_checked(TILE) {
                Some((out, _)) => one_tile::<KIND, 16>(&group, &ahead, &whole, first + tile, out),
                None => one_tile::<KIND, 8>(&group, &ahead, &half, first + tile, out),
            }
        }
        now = next;
    }
}

/// How the high bits of a tile of `A` sum registers, or the upper bits of coarse columns, are brought to their place.
struct High {
    /// Bytes of a column in a tile: 64, 32 or 16.
    bytes: usize,
    /// How far the bits of each sum register of a quarter are rotated.
    turn: [__m512i; 4],
    /// Where they stand then, of even and odd sum registers.
    masks: [__m512i; 2],
}

impl High {
    /// High bits go above the nibbles, and upper bits to where they are in a code. Of nibbles alone those of odd sum registers
    /// are not shifted down ([`one_tile`]), and so theirs are shifted up.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn new<const A: usize>(strip: &ColumnStrip<'_>) -> Self {
        let nothing = _mm512_setzero_si512();
        let mut turn = [nothing; 4];
        let (bits, places) = match (strip.codes, strip.coarse) {
            (Codes::Nibbles { high: high @ 1.. }, _) => (high, [4, 4]),
            (_, Some(_)) => (COARSE_BITS, [2, 6]),
            _ => return Self { bytes: 0, turn, masks: [nothing; 2] },
        };
        // `ColumnLayout::high_place`: field `f * copies + copy` of a byte is to be moved there.
        let bytes = A * 16 * bits / 8;
        let copies = 64 / bytes;
        for (f, turn) in turn.iter_mut().enumerate() {
            let mut by = [0i32; 16];
            for (i, by) in by.iter_mut().enumerate() {
                let copy = i / (16 / copies);
                *by = (places[f % 2] - (bits * (f * copies + copy)) as i32).rem_euclid(32);
            }
            *turn = lanes(&by);
        }
        let mask = |place: i32| _mm512_set1_epi8((((1 << bits) - 1) << place) as i8);
        Self { bytes, turn, masks: places.map(mask) }
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

/// The high or upper bits of a tile of four columns, from byte `at` on, repeated to fill a register.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
fn high_lines(columns: &[*const u8; 4], at: usize, bytes: usize) -> [__m512i; 4] {
    let mut x = [_mm512_setzero_si512(); 4];
    for i in 0..4 {
        // SAFETY: the columns are a strip's and have `bytes` for the tile in their high part, or are its coarse ones.
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

/// The chosen columns of a group times the outputs of a tile, `A` sum registers of 16.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn one_tile<const KIND: u8, const A: usize>(
    group: &Group<'_>,
    ahead: &Ahead<'_>,
    high: &High,
    tile: usize,
    out: &mut [f32],
) {
    let strip = group.strip;
    let start = _mm512_set1_epi32(group.start);
    // High nibbles are not shifted down but count 16 times.
    let of_high = if KIND == NIBBLES { _mm512_set1_epi32(16 * group.start) } else { start };
    let mut dots = [start; A];
    for a in (1..A).step_by(2) {
        dots[a] = of_high;
    }
    for n in 0..group.fine {
        ahead.columns::<KIND>(n);
        let (columns, bundle) = (&group.columns[n], &group.bundles[n]);
        if KIND == BYTES {
            let acts = _mm512_set1_epi32(bundle.lane());
            for line in 0..A / 4 {
                let x = low_line(columns, tile * TILE + LINE * line);
                for k in 0..4 {
                    dots[4 * line + k] = _mm512_dpbusd_epi32(dots[4 * line + k], x[k], acts);
                }
            }
            continue;
        }
        let mut top = [_mm512_setzero_si512(); 4];
        if let (Codes::Nibbles { high: bits }, true) = (strip.codes, KIND == NIBBLES_AND_HIGH) {
            top = high_lines(columns, strip.low_bytes + tile * TILE * bits / 8, high.bytes);
        }
        for line in 0..A / 8 {
            let x = low_line(columns, tile * TILE / 2 + LINE * line);
            let turn = [high.turn[2 * line], high.turn[2 * line + 1]];
            let dots = dots[8 * line..].first_chunk_mut().expect("eight sums a line");
            add_line::<KIND>(&x, &top, (&turn, high.masks[0]), bundle, dots);
        }
    }
    for n in group.fine..group.bundles.len() {
        ahead.columns::<KIND>(n);
        if KIND == NIBBLES || KIND == NIBBLES_AND_HIGH {
            let top = high_lines(&group.columns[n], tile * TILE / 4, high.bytes);
            for line in 0..A / 8 {
                let turn = [high.turn[2 * line], high.turn[2 * line + 1]];
                let dots = dots[8 * line..].first_chunk_mut().expect("eight sums a line");
                add_upper(&top, (&turn, &high.masks), &group.bundles[n], dots);
            }
        }
    }
    for n in group.bundles.len()..ahead.group.bundles.len() {
        ahead.columns::<KIND>(n);
    }
    ahead.scales();
    if KIND == NIBBLES {
        for a in (1..A).step_by(2) {
            dots[a] = _mm512_srai_epi32::<4>(dots[a]);
        }
    }
    add_group(group, tile * TILE, &dots, out);
}

/// `out += scale * dots + min * sum of activations` in units of the factors, for the outputs from `at` on.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn add_group<const A: usize>(group: &Group<'_>, at: usize, dots: &[__m512i; A], out: &mut [f32]) {
    let strip = group.strip;
    let (scale, zero) = (_mm512_set1_ps(group.scale), _mm512_set1_ps(strip.zeros[0]));
    let sum = _mm512_set1_ps(group.sum);
    let (scales, out) = (&group.bytes[at..][..16 * A], &mut out[..16 * A]);
    let (mins, ratios): (&[u8], &[f32]) = match strip.has_min {
        true => (&group.bytes[strip.width + at..][..16 * A], &strip.heads[strip.width + at..][..16 * A]),
        false => (&[], &[]),
    };
    for a in 0..A {
        // SAFETY: 16 readable floats; the load has no alignment.
        let mut total = unsafe { _mm512_loadu_ps(out.as_ptr().add(16 * a)) };
        // SAFETY: 16 readable bytes.
        let code = unsafe { codes(scales.as_ptr().add(16 * a)) };
        let dot = _mm512_mul_ps(scale, _mm512_cvtepi32_ps(dots[a]));
        total = _mm512_fmadd_ps(_mm512_sub_ps(code, zero), dot, total);
        if strip.has_min {
            // SAFETY: 16 readable bytes.
            let min = _mm512_mul_ps(sum, unsafe { codes(mins.as_ptr().add(16 * a)) });
            // SAFETY: 16 readable floats; the load has no alignment.
            let ratio = unsafe { _mm512_loadu_ps(ratios.as_ptr().add(16 * a)) };
            total = _mm512_fmadd_ps(ratio, min, total);
        }
        // SAFETY: 16 writable floats; the store has no alignment.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr().add(16 * a), total) };
    }
}

/// `dots += codes * activations` for a line of the four columns of a bundle.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn add_line<const KIND: u8>(
    quarters: &[__m512i; 4],
    top: &[__m512i; 4],
    (turn, mask): (&[__m512i; 2], __m512i),
    b: &Bundle,
    dots: &mut [__m512i; 8],
) {
    let acts = _mm512_set1_epi32(b.lane());
    let nibble = _mm512_set1_epi8(15);
    for k in 0..4 {
        let x = quarters[k];
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
            let (t0, t1) = (_mm512_rolv_epi32(top[k], turn[0]), _mm512_rolv_epi32(top[k], turn[1]));
            even = _mm512_ternarylogic_epi32::<0xf8>(even, t0, mask);
            odd = _mm512_ternarylogic_epi32::<0xf8>(odd, t1, mask);
        }
        dots[2 * k] = _mm512_dpbusd_epi32(dots[2 * k], even, acts);
        dots[2 * k + 1] = _mm512_dpbusd_epi32(dots[2 * k + 1], odd, acts);
    }
}

/// `dots += upper bits * activations` for what is a line of four whole columns, of the coarse columns of a bundle.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn add_upper(
    top: &[__m512i; 4],
    (turn, masks): (&[__m512i; 2], &[__m512i; 2]),
    b: &Bundle,
    dots: &mut [__m512i; 8],
) {
    let acts = _mm512_set1_epi32(b.lane());
    for k in 0..4 {
        for f in 0..2 {
            let code = _mm512_and_si512(_mm512_rolv_epi32(top[k], turn[f]), masks[f]);
            dots[2 * k + f] = _mm512_dpbusd_epi32(dots[2 * k + f], code, acts);
        }
    }
}

/// 16 bytes as floats.
///
/// # Safety
/// There are 16 readable bytes.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn codes(bytes: *const u8) -> __m512 {
    // SAFETY: the caller's; the load has no alignment.
    _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(bytes.cast()) }))
}
