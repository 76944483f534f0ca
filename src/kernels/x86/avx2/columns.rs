//! Products with chosen columns: half a cache line of four columns at a time, interleaved in registers.
//!
//! That gives the sums of 64 outputs, or of 32 where codes have 8 bits, in registers of eight. With `maddubs` products
//! are added up in 16 bits over a *run* of bundles, as many as fit; see `gemm`.

#![allow(clippy::needless_range_loop)] // an iterator's closures and adapters would not be inlined

use std::arch::x86_64::*;
use std::ops::Range;

use crate::kernels::columns::Bundle;
use crate::kernels::columns::groups::{Fetch, Group, Groups, each_piece};
use crate::kernels::fetch::LINE;
use crate::quant::columns::{COARSE_BITS, Codes, ColumnStrip, TILE};

/// How the high bits of a tile are brought above the nibbles, or the upper bits of coarse columns to where they are in a code.
pub(in crate::kernels::x86) struct High {
    /// Bits of a code.
    bits: usize,
    /// Bytes of a column in a tile: 64, 32 or 16.
    bytes: usize,
    /// `[half][sum register of a quarter]`: how far to shift left, and right.
    shifts: [[[__m256i; 2]; 4]; 2],
    /// Where the bits stand then.
    mask: __m256i,
}

impl High {
    /// For a tile of `outputs`.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub fn new(strip: &ColumnStrip<'_>, outputs: usize) -> Self {
        let mut shifts = [[[_mm256_setzero_si256(); 2]; 4]; 2];
        let (bits, place) = match (strip.codes, strip.coarse) {
            (Codes::Nibbles { high: high @ 1.. }, _) => (high, 4),
            (_, Some(_)) => (COARSE_BITS, 2),
            _ => return Self { bits: 0, bytes: 0, shifts, mask: _mm256_setzero_si256() },
        };
        // `ColumnLayout::high_place`: field `f * copies + copy` of a byte is to be moved to bit `place`.
        let bytes = outputs * bits / 8;
        let copies = 64 / bytes;
        for (half, shifts) in shifts.iter_mut().enumerate() {
            for (f, shifts) in shifts.iter_mut().enumerate() {
                let (mut left, mut right) = ([0i32; 8], [0i32; 8]);
                for i in 0..8 {
                    let copy = (8 * half + i) / (16 / copies);
                    let by = place - (bits * (f * copies + copy)) as i32;
                    (left[i], right[i]) = (by.max(0), (-by).max(0));
                }
                *shifts = [load_lanes(&left), load_lanes(&right)];
            }
        }
        Self { bits, bytes, shifts, mask: _mm256_set1_epi8(((1 << bits) - 1) << place) }
    }

    /// Those of whole tiles, and of one that is half full.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub fn of_strip(strip: &ColumnStrip<'_>) -> [Self; 2] {
        [Self::new(strip, TILE), Self::new(strip, TILE / 2)]
    }

    /// Where those of a tile begin in the high part of a column, or in a coarse column.
    #[inline(always)]
    pub fn at(&self, tile: usize) -> usize {
        tile * TILE * self.bits / 8
    }

    /// Those that belong to sum register `f` of a quarter, in their place.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub fn of(&self, quarter: __m256i, half: usize, f: usize) -> __m256i {
        let [left, right] = self.shifts[half][f];
        let turned = _mm256_srlv_epi32(_mm256_sllv_epi32(quarter, left), right);
        _mm256_and_si256(turned, self.mask)
    }

    /// The high bits of four columns that go with half `half` of a line, interleaved; those of the tile begin at byte `at`.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub fn quarters(&self, columns: &[*const u8; 4], at: usize, half: usize) -> [__m256i; 4] {
        let mut x = [_mm256_setzero_si256(); 4];
        for i in 0..4 {
            // SAFETY: the columns are a strip's and have `self.bytes` for the tile in their high part, or are coarse ones.
            x[i] = unsafe {
                let at = columns[i].add(at);
                match self.bytes {
                    64 => _mm256_loadu_si256(at.add(32 * half).cast()),
                    32 => _mm256_loadu_si256(at.cast()),
                    _ => _mm256_broadcastsi128_si256(_mm_loadu_si128(at.cast())),
                }
            };
        }
        interleave(x)
    }
}

/// Half a cache line of each of four columns, from byte `at` on, interleaved.
#[inline]
#[target_feature(enable = "avx2")]
pub(in crate::kernels::x86) fn quarters(columns: &[*const u8; 4], at: usize) -> [__m256i; 4] {
    let mut x = [_mm256_setzero_si256(); 4];
    for i in 0..4 {
        // SAFETY: the columns are a strip's, and `at` is half a line of their low part (`Kernels::columns`).
        x[i] = unsafe { _mm256_loadu_si256(columns[i].add(at).cast()) };
    }
    interleave(x)
}

/// Four registers to the four quarters of their 16-byte lanes, bytes of the four interleaved.
#[inline]
#[target_feature(enable = "avx2")]
fn interleave(x: [__m256i; 4]) -> [__m256i; 4] {
    let (low, high) = (_mm256_unpacklo_epi8(x[0], x[1]), _mm256_unpackhi_epi8(x[0], x[1]));
    let (low2, high2) = (_mm256_unpacklo_epi8(x[2], x[3]), _mm256_unpackhi_epi8(x[2], x[3]));
    [
        _mm256_unpacklo_epi16(low, low2),
        _mm256_unpackhi_epi16(low, low2),
        _mm256_unpacklo_epi16(high, high2),
        _mm256_unpackhi_epi16(high, high2),
    ]
}

/// `out += scale * dots + min * sum of activations` in units of the factors. Sum register `a` has the strip's
/// eight outputs from `at + 16 a` on: the other half of the line has the eight between.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(in crate::kernels::x86) fn add_group<const N: usize>(
    group: &Group<'_>,
    at: usize,
    dots: &[__m256i; N],
    out: &mut [f32],
) {
    let strip = group.strip;
    let (scale, zero) = (_mm256_set1_ps(group.scale), _mm256_set1_ps(strip.zeros[0]));
    let sum = _mm256_set1_ps(group.sum);
    // Parts of known lengths, so that there is one check for all registers.
    let span = 16 * N - 8;
    let (scales, out) = (&group.bytes[at..][..span], &mut out[at - group.first..][..span]);
    for a in 0..N {
        let dot = _mm256_mul_ps(scale, _mm256_cvtepi32_ps(dots[a]));
        let factor = _mm256_sub_ps(codes(scales, 16 * a), zero);
        store(out, 16 * a, _mm256_fmadd_ps(factor, dot, load(out, 16 * a)));
    }
    if strip.has_min {
        let (mins, ratios) =
            (&group.bytes[strip.width + at..][..span], &strip.heads[strip.width + at..][..span]);
        for a in 0..N {
            let min = _mm256_mul_ps(sum, codes(mins, 16 * a));
            store(out, 16 * a, _mm256_fmadd_ps(load(ratios, 16 * a), min, load(out, 16 * a)));
        }
    }
}

/// Products with nibbles by `maddubs`, a cache line of each column at a time. Two columns are interleaved, not four: 16 bits
/// hold the sum of a whole group, 8 taken off each code (32 * 8 * 127 < 2^15), so nothing has to be widened in between.
#[target_feature(enable = "avx2,fma")]
pub(in crate::kernels::x86) fn nibbles_in_pairs(
    strip: &ColumnStrip<'_>,
    mut groups: Groups<'_>,
    outputs: Range<usize>,
    out: &mut [f32],
) {
    let lines = outputs.start / (2 * LINE)..outputs.end / (2 * LINE);
    let high = High::of_strip(strip);
    each_piece!(groups, lines, |group, line, next| {
        let mut sums = sums_of_line(&group, line, &mut next);
        if group.fine < group.bundles.len() {
            add_coarse(&group, line, &high, &mut next, &mut sums);
        }
        let taken_off = 8 * group.count + group.start;
        for half in 0..2 {
            add_group(&group, 2 * LINE * line + 8 * half, &widen(&sums[half], taken_off), out);
        }
    });
}

/// Sums of 16 bits of the outputs of a line: `[half][bytes 0..8 or 8..16][low or high]`.
type LineSums = [[[__m256i; 2]; 2]; 2];

/// Sums of `(code - 8) * activation` over a group, but for the codes of coarse columns.
#[inline]
#[target_feature(enable = "avx2")]
fn sums_of_line(group: &Group<'_>, line: usize, next: &mut Fetch<'_>) -> LineSums {
    let nibble = _mm256_set1_epi8(15);
    let mut sums = [[[_mm256_set1_epi16((-8 * group.count) as i16); 2]; 2]; 2];
    for b in 0..group.fine {
        next.step();
        let (columns, acts) = (&group.columns[b], in_pairs(&group.bundles[b]));
        for half in 0..2 {
            for pair in 0..2 {
                // SAFETY: the columns are a strip's, and the line is one of their low part (`Kernels::columns`).
                let both = unsafe { interleave_pair(columns, pair, LINE * line + 32 * half) };
                for k in 0..2 {
                    let low = _mm256_and_si256(both[k], nibble);
                    let high = _mm256_and_si256(_mm256_srli_epi16::<4>(both[k]), nibble);
                    let [low_sum, high_sum] = &mut sums[half][k];
                    *low_sum = _mm256_add_epi16(*low_sum, _mm256_maddubs_epi16(low, acts[pair]));
                    *high_sum = _mm256_add_epi16(*high_sum, _mm256_maddubs_epi16(high, acts[pair]));
                }
            }
        }
    }
    sums
}

/// `sums += codes * activations` of the coarse columns of a group.
#[inline]
#[target_feature(enable = "avx2")]
fn add_coarse(group: &Group<'_>, line: usize, high: &[High; 2], next: &mut Fetch<'_>, sums: &mut LineSums) {
    let (of_tile, tile) = line_of(2 * line);
    let high = &high[usize::from(group.strip.width < (tile + 1) * TILE)];
    for b in group.fine..group.bundles.len() {
        next.step();
        let (columns, acts) = (&group.columns[b], in_pairs(&group.bundles[b]));
        for half in 0..2 {
            let at = high.at(tile) + if high.bytes == 64 { 32 * half } else { 0 };
            for pair in 0..2 {
                // SAFETY: the columns are coarse ones of a strip, which have two bits of each of the tile's outputs: 64 bytes, or
                // 32 of half a tile.
                let both = unsafe { interleave_pair(columns, pair, at) };
                for k in 0..2 {
                    for odd in 0..2 {
                        let code = high.of(both[k], half, 2 * of_tile + odd);
                        let sum = &mut sums[half][k][odd];
                        *sum = _mm256_add_epi16(*sum, _mm256_maddubs_epi16(code, acts[pair]));
                    }
                }
            }
        }
    }
}

/// The activations of the two pairs of columns of a bundle.
#[inline]
#[target_feature(enable = "avx2")]
fn in_pairs(bundle: &Bundle) -> [__m256i; 2] {
    let acts = bundle.lane();
    [_mm256_set1_epi16(acts as i16), _mm256_set1_epi16((acts >> 16) as i16)]
}

/// 32 bytes of the two columns of a pair, interleaved.
///
/// # Safety
/// They have 32 readable bytes from `at` on.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn interleave_pair(columns: &[*const u8; 4], pair: usize, at: usize) -> [__m256i; 2] {
    // SAFETY: the caller's; the loads have no alignment.
    let [x, y] = [0, 1].map(|i| unsafe { _mm256_loadu_si256(columns[2 * pair + i].add(at).cast()) });
    [_mm256_unpacklo_epi8(x, y), _mm256_unpackhi_epi8(x, y)]
}

/// The sums of half a line in 32 bits, each and `more`, in the order of the sum registers of [`add_group`].
#[inline]
#[target_feature(enable = "avx2")]
fn widen(sums: &[[__m256i; 2]; 2], more: i32) -> [__m256i; 8] {
    let mut dots = [_mm256_set1_epi32(more); 8];
    for k in 0..2 {
        for nibble in 0..2 {
            let s = sums[k][nibble];
            let (low, high) = (_mm256_unpacklo_epi16(s, s), _mm256_unpackhi_epi16(s, s));
            for (quarter, wide) in [(2 * k, low), (2 * k + 1, high)] {
                let dot = &mut dots[2 * quarter + nibble];
                *dot = _mm256_add_epi32(*dot, _mm256_srai_epi32::<16>(wide));
            }
        }
    }
    dots
}

/// Eight bytes as floats.
#[inline]
#[target_feature(enable = "avx2")]
fn codes(bytes: &[u8], at: usize) -> __m256 {
    let bytes: &[u8; 8] = bytes[at..].first_chunk().expect("a byte an output");
    // SAFETY: 8 readable bytes; the load has no alignment.
    _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(unsafe { _mm_loadl_epi64(bytes.as_ptr().cast()) }))
}

#[inline]
#[target_feature(enable = "avx")]
fn load(floats: &[f32], at: usize) -> __m256 {
    let floats: &[f32; 8] = floats[at..].first_chunk().expect("8 floats");
    // SAFETY: 32 readable bytes; the load has no alignment.
    unsafe { _mm256_loadu_ps(floats.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx")]
fn store(floats: &mut [f32], at: usize, v: __m256) {
    let floats: &mut [f32; 8] = floats[at..].first_chunk_mut().expect("8 floats");
    // SAFETY: 32 writable bytes; the store has no alignment.
    unsafe { _mm256_storeu_ps(floats.as_mut_ptr(), v) }
}

#[inline]
#[target_feature(enable = "avx")]
fn load_lanes(lanes: &[i32; 8]) -> __m256i {
    // SAFETY: 32 readable bytes; the load has no alignment.
    unsafe { _mm256_loadu_si256(lanes.as_ptr().cast()) }
}

/// Which of the tile's lines a half line is in, and its byte of the high part: `(line of the tile, tile)`.
#[inline(always)]
pub(in crate::kernels::x86) fn line_of(half_line: usize) -> (usize, usize) {
    const LINES: usize = TILE / 2 / 64;
    (half_line / 2 % LINES, half_line / 2 / LINES)
}

/// The function `columns` (see `Kernels::columns`), compiled with `$features` and multiplying with the functions of the
/// module `$multiply`.
macro_rules! instantiate {
    ($features:literal, $multiply:path) => {
        /// See `Kernels::columns`, which asserts the lengths.
        #[target_feature(enable = $features)]
        fn columns(strip: &ColumnStrip<'_>, chosen: Chosen<'_>, outputs: Range<usize>, out: &mut [f32]) {
            use $crate::kernels::columns::groups::{
                BYTES, Fetch, Group, Groups, NIBBLES, NIBBLES_AND_HIGH, TABLE, each_piece,
            };
            use $crate::kernels::x86::IQ4_VALUES;
            use $crate::kernels::x86::avx2::columns::{High, add_group, line_of, nibbles_in_pairs, quarters};
            use $crate::quant::columns::{Codes, TILE};
            use $multiply as multiply;

            /// Whether codes are multiplied by the sign trick of `dot`, their zero point of 128 taken off: those of 8
            /// bits, where they do not fit unsigned.
            #[inline(always)]
            const fn is_signed(kind: u8) -> bool {
                multiply::MAX < 255 && matches!(kind, BYTES | TABLE)
            }

            /// Group after group, while the next one is fetched; in a group half line after half line of the outputs.
            /// `N` sum registers, runs of `RUN` bundles.
            #[target_feature(enable = $features)]
            fn kernel<const KIND: u8, const N: usize, const RUN: usize>(
                strip: &ColumnStrip<'_>,
                mut groups: Groups<'_>,
                outputs: Range<usize>,
                out: &mut [f32],
            ) {
                let high = High::of_strip(strip);
                let halves = outputs.start / (8 * N)..outputs.end / (8 * N);
                each_piece!(groups, halves, |group, half, next| {
                    let whole = strip.width >= (line_of(half).1 + 1) * TILE;
                    half_line::<KIND, N, RUN>(&group, &high[usize::from(!whole)], half, &mut next, out);
                });
            }

            /// A group times the outputs of half a line.
            #[inline]
            #[target_feature(enable = $features)]
            fn half_line<const KIND: u8, const N: usize, const RUN: usize>(
                group: &Group<'_>,
                high: &High,
                index: usize,
                next: &mut Fetch<'_>,
                out: &mut [f32],
            ) {
                let start = if is_signed(KIND) { 0 } else { group.start };
                let mut dots = [_mm256_set1_epi32(start); N];
                let (n, mut at) = (group.bundles.len(), 0);
                while at < n {
                    let mut sums = dots;
                    for k in 0..N {
                        sums[k] = multiply::open(dots[k]);
                    }
                    let end = n.min(at + RUN);
                    while at < end {
                        next.step();
                        let (columns, acts) =
                            (&group.columns[at], _mm256_set1_epi32(group.bundles[at].lane()));
                        if at < group.fine {
                            add_bundle::<KIND, N>(group, columns, index, high, acts, &mut sums);
                        } else {
                            add_upper::<KIND, N>(columns, index, high, acts, &mut sums);
                        }
                        at += 1;
                    }
                    for k in 0..N {
                        dots[k] = multiply::close(dots[k], sums[k]);
                    }
                }
                add_group(group, index / 2 * 16 * N + index % 2 * 8, &dots, out);
            }

            /// `sums += codes * activations` for the four columns of a bundle.
            #[inline]
            #[target_feature(enable = $features)]
            fn add_bundle<const KIND: u8, const N: usize>(
                group: &Group<'_>,
                columns: &[*const u8; 4],
                index: usize,
                high: &High,
                acts: __m256i,
                sums: &mut [__m256i; N],
            ) {
                let quarters = quarters(columns, 32 * index);
                if KIND == BYTES {
                    for k in 0..4 {
                        sums[k] = add::<KIND>(sums[k], quarters[k], acts);
                    }
                    return;
                }
                let nibble = _mm256_set1_epi8(15);
                let (line, tile) = line_of(index);
                let mut top = [nibble; 4];
                if KIND == NIBBLES_AND_HIGH {
                    let at = group.strip.low_bytes + high.at(tile);
                    top = high.quarters(columns, at, index % 2);
                }
                for k in 0..4 {
                    let x = quarters[k];
                    let mut even = _mm256_and_si256(x, nibble);
                    let mut odd = _mm256_and_si256(_mm256_srli_epi16::<4>(x), nibble);
                    if KIND == NIBBLES_AND_HIGH {
                        even = _mm256_or_si256(even, high.of(top[k], index % 2, 2 * line));
                        odd = _mm256_or_si256(odd, high.of(top[k], index % 2, 2 * line + 1));
                    }
                    if KIND == TABLE {
                        // SAFETY: 16 readable bytes.
                        let table = unsafe { _mm_loadu_si128(IQ4_VALUES.as_ptr().cast()) };
                        let table = _mm256_broadcastsi128_si256(table);
                        even = _mm256_shuffle_epi8(table, even);
                        odd = _mm256_shuffle_epi8(table, odd);
                    }
                    sums[2 * k] = add::<KIND>(sums[2 * k], even, acts);
                    sums[2 * k + 1] = add::<KIND>(sums[2 * k + 1], odd, acts);
                }
            }

            /// `sums += upper bits * activations` for the four coarse columns of a bundle.
            #[inline]
            #[target_feature(enable = $features)]
            fn add_upper<const KIND: u8, const N: usize>(
                columns: &[*const u8; 4],
                index: usize,
                high: &High,
                acts: __m256i,
                sums: &mut [__m256i; N],
            ) {
                if KIND == BYTES || KIND == TABLE {
                    return; // they have no coarse columns
                }
                let (line, tile) = line_of(index);
                let top = high.quarters(columns, high.at(tile), index % 2);
                for k in 0..N / 2 {
                    for odd in 0..2 {
                        let code = high.of(top[k], index % 2, 2 * line + odd);
                        sums[2 * k + odd] = add::<KIND>(sums[2 * k + odd], code, acts);
                    }
                }
            }

            #[inline]
            #[target_feature(enable = $features)]
            fn add<const KIND: u8>(sum: __m256i, codes: __m256i, acts: __m256i) -> __m256i {
                if !is_signed(KIND) {
                    return multiply::add(sum, codes, acts);
                }
                let w = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
                multiply::add(sum, _mm256_abs_epi8(w), _mm256_sign_epi8(acts, w))
            }

            out.fill(0.0);
            let groups = Groups::new(strip, chosen, &outputs);
            match strip.codes {
                Codes::Nibbles { high: 0 } if multiply::MAX < 255 => {
                    nibbles_in_pairs(strip, groups, outputs, out)
                }
                Codes::Nibbles { high: 0 } => kernel::<NIBBLES, 8, 8>(strip, groups, outputs, out),
                Codes::Nibbles { high: 1 } => kernel::<NIBBLES_AND_HIGH, 8, 4>(strip, groups, outputs, out),
                Codes::Nibbles { .. } => kernel::<NIBBLES_AND_HIGH, 8, 2>(strip, groups, outputs, out),
                Codes::Table => kernel::<TABLE, 8, 1>(strip, groups, outputs, out),
                Codes::Bytes => kernel::<BYTES, 4, 1>(strip, groups, outputs, out),
            }
        }
    };
}
pub(in crate::kernels::x86) use instantiate;
