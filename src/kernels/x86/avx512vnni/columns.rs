//! Products with chosen columns: four columns at a time, interleaved in registers.
#![allow(clippy::needless_range_loop)] // an iterator's closures and adapters would not be inlined
//!
//! # Order
//! A core reads at full speed where it follows several runs of kilobytes side by side and asks for them a few lines
//! ahead (docs/experiments.md). So a group is not taken tile by tile, but eight columns at a time from their first to
//! their last byte, while the integer sums of the strip's outputs wait in the cache.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::blocks::lanes;
use crate::kernels::columns::groups::{BYTES, NIBBLES, NIBBLES_AND_HIGH, TABLE};
use crate::kernels::columns::{Bundle, Chosen};
use crate::kernels::x86::IQ4_VALUES;
use crate::quant::columns::{Codes, ColumnStrip, STRIP, TILE};
use crate::quant::zero_point;

/// Bundles that are taken side by side: eight columns halve the traffic of the sums.
const BESIDE: usize = 2;
/// How many bytes ahead of its use a line is asked for.
const AHEAD: usize = 8 * 64;
/// The same of scales and mins.
const SCALES_AHEAD: usize = 4 * 64;

/// See `Kernels::columns`, which asserts the lengths.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn columns(strip: &ColumnStrip<'_>, chosen: Chosen<'_>, outputs: Range<usize>, out: &mut [f32]) {
    match strip.codes {
        Codes::Nibbles { high: 0 } => kernel::<NIBBLES>(strip, chosen, outputs.start, out),
        Codes::Nibbles { .. } => kernel::<NIBBLES_AND_HIGH>(strip, chosen, outputs.start, out),
        Codes::Table => kernel::<TABLE>(strip, chosen, outputs.start, out),
        Codes::Bytes => kernel::<BYTES>(strip, chosen, outputs.start, out),
    }
}

/// Integer sums of a group. Its first pass writes what its later ones read.
#[repr(align(64))]
struct Sums([MaybeUninit<i32>; STRIP]);

/// A group and its chosen columns.
#[derive(Clone, Copy)]
struct Group<'a> {
    strip: &'a ColumnStrip<'a>,
    /// Its scales, its mins and its columns.
    bytes: &'a [u8],
    bundles: &'a [Bundle],
    /// Its first column, and where that is.
    first: u32,
    columns: *const u8,
    /// Scale of the activations.
    scale: f32,
    /// Sum of the activations.
    sum: f32,
    /// What the dot products start from.
    start: i32,
    /// Whether it is the first of the product: outputs begin with it.
    fresh: bool,
}

impl<'a> Group<'a> {
    /// The `i`-th of those chosen, whose bundles begin at `from`.
    #[inline]
    fn new(strip: &'a ColumnStrip<'a>, chosen: &Chosen<'a>, i: usize, from: usize) -> Self {
        let g = &chosen.groups[i];
        let bytes = &strip.groups[g.group as usize * strip.group_bytes..][..strip.group_bytes];
        let scales = strip.group_bytes - strip.group_len * strip.column_bytes;
        Self {
            strip,
            bytes,
            bundles: &chosen.bundles[from..g.end as usize],
            first: g.group * strip.group_len as u32,
            columns: bytes[scales..].as_ptr(),
            scale: g.scale,
            sum: g.scale * g.sum as f32,
            start: -i32::from(zero_point(strip.ty)) * g.sum,
            fresh: i == 0,
        }
    }

    /// Where the columns of the bundles from `at` on are, and how many there are: at most [`BESIDE`] bundles.
    #[inline]
    fn beside(&self, at: usize) -> ([[*const u8; 4]; BESIDE], usize) {
        let mut columns = [[self.columns; 4]; BESIDE];
        let n = (self.bundles.len() - at).min(BESIDE);
        for i in 0..n {
            for j in 0..4 {
                let in_group = (self.bundles[at + i].cols[j] - self.first) as usize;
                columns[i][j] = self.columns.wrapping_add(in_group * self.strip.column_bytes);
            }
        }
        (columns, n)
    }
}

/// Bundles of a group that are taken together.
struct Pass<'g> {
    group: &'g Group<'g>,
    /// The first of them.
    at: usize,
    /// Whether they are the group's last; its first they are if `at` is 0.
    last: bool,
    columns: &'g [[*const u8; 4]; BESIDE],
    /// The columns that come after them.
    next: &'g [*const u8],
    /// Where the low and the high parts of columns that are wanted begin and end.
    parts: [(usize, usize); 2],
}

impl Pass<'_> {
    /// Asks for what comes [`AHEAD`] of byte `at` of the low or high parts of `n` bundles.
    #[inline]
    #[target_feature(enable = "sse")]
    fn fetch(&self, part: usize, at: usize, n: usize) {
        let (begin, end) = self.parts[part];
        let to = at + AHEAD.min(end - begin);
        if to < end {
            for i in 0..n {
                for j in 0..4 {
                    _mm_prefetch::<_MM_HINT_T0>(self.columns[i][j].wrapping_add(to).cast());
                }
            }
        } else {
            for column in self.next {
                _mm_prefetch::<_MM_HINT_T0>(column.wrapping_add(to - end + begin).cast());
            }
        }
    }
}

/// Group after group.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn kernel<const KIND: u8>(strip: &ColumnStrip<'_>, chosen: Chosen<'_>, first: usize, out: &mut [f32]) {
    if chosen.groups.is_empty() {
        return out.fill(0.0);
    }
    let high = (High::new::<16>(strip), High::new::<8>(strip));
    let (from, to) = (first, first + out.len());
    let parts = match strip.codes {
        Codes::Bytes => [(from, to), (0, 0)],
        Codes::Table => [(from / 2, to / 2), (0, 0)],
        Codes::Nibbles { high } => {
            [(from / 2, to / 2), (strip.low_bytes + from * high / 8, strip.low_bytes + to * high / 8)]
        }
    };
    let mut sums = Sums([MaybeUninit::uninit(); STRIP]);
    let mut group = Group::new(strip, &chosen, 0, chosen.start as usize);
    let (mut columns, mut n) = group.beside(0);
    for i in 0..chosen.groups.len() {
        let after = match i + 1 < chosen.groups.len() {
            true => Group::new(strip, &chosen, i + 1, chosen.groups[i].end as usize),
            false => Group { bundles: &[], ..group },
        };
        let bundles = group.bundles.len();
        let mut at = 0;
        while at < bundles {
            let last = at + BESIDE >= bundles;
            let (next, n_next) = if last { after.beside(0) } else { group.beside(at + BESIDE) };
            let after = &next[..n_next];
            let pass = Pass { group: &group, at, last, columns: &columns, next: after.as_flattened(), parts };
            if n == BESIDE {
                all_tiles::<KIND, BESIDE>(&pass, &high, first / TILE, &mut sums, out);
            } else {
                all_tiles::<KIND, 1>(&pass, &high, first / TILE, &mut sums, out);
            }
            (columns, n) = (next, n_next);
            at += BESIDE;
        }
        group = after;
    }
}

/// Some bundles times all outputs, those from tile `first` on.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn all_tiles<const KIND: u8, const N: usize>(
    pass: &Pass<'_>,
    (whole, half): &(High, High),
    first: usize,
    sums: &mut Sums,
    out: &mut [f32],
) {
    let mut at = 0;
    while at < out.len() {
        let end = (at + TILE).min(out.len());
        let (sums, out) = (&mut sums.0[at..end], &mut out[at..end]);
        let tile = first + at / TILE;
        if out.len() == TILE {
            one_tile::<KIND, N, 16>(pass, whole, tile, sums, out);
        } else {
            one_tile::<KIND, N, 8>(pass, half, tile, sums, out);
        }
        at = end;
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

/// Some bundles times the outputs of a tile, `A` sum registers of 16.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn one_tile<const KIND: u8, const N: usize, const A: usize>(
    pass: &Pass<'_>,
    high: &High,
    tile: usize,
    sums: &mut [MaybeUninit<i32>],
    out: &mut [f32],
) {
    let Pass { group, at, columns, .. } = *pass;
    let strip = group.strip;
    let mut top = [[_mm512_setzero_si512(); 4]; N];
    if let (Codes::Nibbles { high: bits }, true) = (strip.codes, KIND == NIBBLES_AND_HIGH) {
        let high_at = strip.low_bytes + tile * TILE * bits / 8;
        pass.fetch(1, high_at, N);
        for n in 0..N {
            top[n] = high_lines(&columns[n], high_at, high.bytes);
        }
    }
    if KIND == BYTES {
        for line in 0..A / 4 {
            let mut dots = [_mm512_setzero_si512(); 4];
            let low_at = tile * TILE + 64 * line;
            pass.fetch(0, low_at, N);
            begin::<KIND, 4>(pass, (tile, line), sums, &mut dots);
            for n in 0..N {
                let x = low_line(&columns[n], low_at);
                let acts = _mm512_set1_epi32(group.bundles[at + n].acts as i32);
                for k in 0..4 {
                    dots[k] = _mm512_dpbusd_epi32(dots[k], x[k], acts);
                }
            }
            end::<KIND, 4>(pass, (tile, line), dots, sums, out);
        }
        return;
    }
    for line in 0..A / 8 {
        let mut dots = [_mm512_setzero_si512(); 8];
        let low_at = tile * TILE / 2 + 64 * line;
        pass.fetch(0, low_at, N);
        begin::<KIND, 8>(pass, (tile, line), sums, &mut dots);
        for n in 0..N {
            let x = low_line(&columns[n], low_at);
            let turn = [high.turn[2 * line], high.turn[2 * line + 1]];
            add_line::<KIND>(&x, &top[n], (&turn, high.mask), &group.bundles[at + n], &mut dots);
        }
        end::<KIND, 8>(pass, (tile, line), dots, sums, out);
    }
}

/// What the sums of a line of a tile begin with.
#[inline]
#[target_feature(enable = "avx512f")]
fn begin<const KIND: u8, const R: usize>(
    pass: &Pass<'_>,
    (tile, line): (usize, usize),
    sums: &[MaybeUninit<i32>],
    dots: &mut [__m512i; R],
) {
    if pass.at > 0 {
        let sums = &sums[16 * R * line..][..16 * R];
        for a in 0..R {
            // SAFETY: 64 readable bytes, written in the group's first pass; the load has no alignment.
            dots[a] = unsafe { _mm512_loadu_si512(sums.as_ptr().add(16 * a).cast()) };
        }
        return;
    }
    // The scales and mins of these outputs are needed in the last pass; beyond their end is what is needed anyway.
    let strip = pass.group.strip;
    let scales = pass.group.bytes.as_ptr().wrapping_add(tile * TILE + 16 * R * line + SCALES_AHEAD);
    for at in (0..16 * R).step_by(64) {
        _mm_prefetch::<_MM_HINT_T0>(scales.wrapping_add(at).cast());
        if strip.has_min {
            _mm_prefetch::<_MM_HINT_T0>(scales.wrapping_add(strip.width + at).cast());
        }
    }
    let start = _mm512_set1_epi32(pass.group.start);
    // High nibbles are not shifted down but count 16 times.
    let of_high = if KIND == NIBBLES { _mm512_set1_epi32(16 * pass.group.start) } else { start };
    for a in 0..R {
        dots[a] = if a % 2 == 0 { start } else { of_high };
    }
}

/// Puts the sums of a line of a tile aside, or, if they are complete, adds them to the outputs.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn end<const KIND: u8, const R: usize>(
    pass: &Pass<'_>,
    (tile, line): (usize, usize),
    mut dots: [__m512i; R],
    sums: &mut [MaybeUninit<i32>],
    out: &mut [f32],
) {
    let n = 16 * R;
    if !pass.last {
        let sums = &mut sums[n * line..][..n];
        for a in 0..R {
            // SAFETY: 64 writable bytes; the store has no alignment.
            unsafe { _mm512_storeu_si512(sums.as_mut_ptr().add(16 * a).cast(), dots[a]) };
        }
        return;
    }
    if KIND == NIBBLES {
        for a in (1..R).step_by(2) {
            dots[a] = _mm512_srai_epi32::<4>(dots[a]);
        }
    }
    add_group(pass.group, tile * TILE + line * n, &dots, &mut out[line * n..][..n]);
}

/// `out += scale * dots + min * sum of activations` in units of the factors, for the outputs from `at` on.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn add_group<const R: usize>(group: &Group<'_>, at: usize, dots: &[__m512i; R], out: &mut [f32]) {
    let strip = group.strip;
    let (scale, zero) = (_mm512_set1_ps(group.scale), _mm512_set1_ps(strip.zeros[0]));
    let scales = &group.bytes[at..][..16 * R];
    let out = &mut out[..16 * R];
    let mut total = [_mm512_setzero_ps(); R];
    if !group.fresh {
        for a in 0..R {
            // SAFETY: 16 readable floats; the load has no alignment.
            total[a] = unsafe { _mm512_loadu_ps(out.as_ptr().add(16 * a)) };
        }
    }
    for a in 0..R {
        // SAFETY: 16 readable bytes.
        let code = unsafe { codes(scales.as_ptr().add(16 * a)) };
        let dot = _mm512_mul_ps(scale, _mm512_cvtepi32_ps(dots[a]));
        total[a] = _mm512_fmadd_ps(_mm512_sub_ps(code, zero), dot, total[a]);
    }
    if strip.has_min {
        let mins = &group.bytes[strip.width + at..][..16 * R];
        let ratios = &strip.heads[strip.width + at..][..16 * R];
        let sum = _mm512_set1_ps(group.sum);
        for a in 0..R {
            // SAFETY: 16 readable bytes.
            let min = _mm512_mul_ps(sum, unsafe { codes(mins.as_ptr().add(16 * a)) });
            // SAFETY: 16 readable floats; the load has no alignment.
            let ratio = unsafe { _mm512_loadu_ps(ratios.as_ptr().add(16 * a)) };
            total[a] = _mm512_fmadd_ps(ratio, min, total[a]);
        }
    }
    for a in 0..R {
        // SAFETY: 16 writable floats; the store has no alignment.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr().add(16 * a), total[a]) };
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
    let acts = _mm512_set1_epi32(b.acts as i32);
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
