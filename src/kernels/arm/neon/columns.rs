//! Products with chosen columns: 16 bytes of four columns at a time, interleaved in registers.
//!
//! These 16 bytes are a *lane* of a cache line (`quant::columns`). Interleaved they give the sums of 32 outputs, or of
//! 16 where codes have 8 bits, in registers of four. Codes are multiplied as signed bytes: those of up to 6 bits as
//! they are, those of 8 bits with their zero point of 128 taken off.
//!
//! Sums of 16 bits, where they are used, are widened once a *run* of bundles: each takes one product a bundle, so all
//! of a group fit for codes of up to 6 bits, and two for those of 8 bits; see `gemm`.

use std::arch::aarch64::*;

use super::dot::load4;
use crate::kernels::columns::groups::{BYTES, Group, NIBBLES_AND_HIGH, TABLE};
use crate::quant::IQ4_KVALUES;
use crate::quant::columns::{COARSE_BITS, Codes, ColumnStrip, TILE};

/// Lanes of a cache line.
const LANES_OF_LINE: usize = 4;
/// Lines of a tile of nibbles.
const LINES_OF_TILE: usize = TILE / 2 / 64;

/// Where the codes of a lane are in a column.
#[derive(Clone, Copy)]
pub(in crate::kernels::arm) struct Lane {
    low: usize,
    high: usize,
    /// In a coarse column.
    upper: usize,
    /// How far to shift the high bits to the left to bring them above the low nibbles, and above the high ones; or the upper
    /// bits of coarse columns to where they are in a code.
    shifts: [int8x16_t; 2],
    /// Where they stand then.
    mask: uint8x16_t,
}

impl Lane {
    /// Number `index` of a column's low part.
    #[inline]
    #[target_feature(enable = "neon")]
    pub fn new(strip: &ColumnStrip<'_>, index: usize) -> Self {
        let mut new =
            Self { low: 16 * index, high: 0, upper: 0, shifts: [vdupq_n_s8(0); 2], mask: vdupq_n_u8(0) };
        let (bits, place) = match (strip.codes, strip.coarse) {
            (Codes::Nibbles { high: bits @ 1.. }, _) => (bits, 4),
            (_, Some(_)) => (COARSE_BITS, 2),
            _ => return new,
        };
        // `ColumnLayout::high_place`: field `f * copies + copy` of a byte is to be moved to bit `place`.
        let (line, lane) = (index / LANES_OF_LINE, index % LANES_OF_LINE);
        let (tile, line) = (line / LINES_OF_TILE, line % LINES_OF_TILE);
        let lanes = (strip.width - tile * TILE).min(TILE) * bits / 8 / 16;
        let copies = LANES_OF_LINE / lanes;
        for f in 0..2 {
            let field = (2 * line + f) * copies + lane / lanes;
            new.shifts[f] = vdupq_n_s8(place - (bits * field) as i8);
        }
        new.upper = tile * TILE * bits / 8 + 16 * (lane % lanes);
        new.high = strip.low_bytes + new.upper;
        new.mask = vdupq_n_u8(((1 << bits) - 1) << place);
        new
    }
}

/// How many sum registers a lane fills.
const fn sums(kind: u8) -> usize {
    if kind == BYTES { 4 } else { 8 }
}

/// Whether codes have 8 bits.
pub(in crate::kernels::arm) const fn is_wide(kind: u8) -> bool {
    matches!(kind, BYTES | TABLE)
}

/// The codes of a lane of four columns, a register for each that holds sums, of which `N` are [`sums`]`(KIND)`.
#[inline]
#[target_feature(enable = "neon")]
#[allow(clippy::needless_range_loop)] // an iterator's closures would not be inlined
pub(in crate::kernels::arm) fn codes<const KIND: u8, const N: usize>(
    columns: &[*const u8; 4],
    lane: &Lane,
) -> [int8x16_t; N] {
    const { assert!(N == sums(KIND)) };
    let mut codes = [vdupq_n_s8(0); N];
    let low = quarters(columns, lane.low);
    let high = if KIND == NIBBLES_AND_HIGH { quarters(columns, lane.high) } else { low };
    for k in 0..4 {
        if KIND == BYTES {
            codes[k] = vreinterpretq_s8_u8(veorq_u8(low[k], vdupq_n_u8(0x80)));
            continue;
        }
        let mut nibbles = [vandq_u8(low[k], vdupq_n_u8(15)), vshrq_n_u8::<4>(low[k])];
        for f in 0..2 {
            if KIND == NIBBLES_AND_HIGH {
                let moved = vshlq_u8(high[k], lane.shifts[f]);
                nibbles[f] = vorrq_u8(nibbles[f], vandq_u8(moved, lane.mask));
            }
            codes[2 * k + f] = match KIND {
                TABLE => vqtbl1q_s8(table(), nibbles[f]),
                _ => vreinterpretq_s8_u8(nibbles[f]),
            };
        }
    }
    codes
}

/// The upper bits of a lane of four coarse columns, as [`codes`].
#[inline]
#[target_feature(enable = "neon")]
#[allow(clippy::needless_range_loop)] // an iterator's closures would not be inlined
pub(in crate::kernels::arm) fn upper_bits<const KIND: u8, const N: usize>(
    columns: &[*const u8; 4],
    lane: &Lane,
) -> [int8x16_t; N] {
    let mut codes = [vdupq_n_s8(0); N];
    if is_wide(KIND) {
        return codes; // they have no coarse columns
    }
    let upper = quarters(columns, lane.upper);
    for k in 0..N / 2 {
        for f in 0..2 {
            let moved = vshlq_u8(upper[k], lane.shifts[f]);
            codes[2 * k + f] = vreinterpretq_s8_u8(vandq_u8(moved, lane.mask));
        }
    }
    codes
}

#[inline]
#[target_feature(enable = "neon")]
fn table() -> int8x16_t {
    // SAFETY: 16 readable bytes.
    unsafe { vld1q_s8(IQ4_KVALUES.as_ptr()) }
}

/// 16 bytes of each of four columns, from byte `at` on, to four quarters, bytes of the four interleaved.
#[inline]
#[target_feature(enable = "neon")]
fn quarters(columns: &[*const u8; 4], at: usize) -> [uint8x16_t; 4] {
    let mut x = [vdupq_n_u8(0); 4];
    for i in 0..4 {
        // SAFETY: the columns are a strip's, and `at` is a lane of their low or high part, or of coarse ones
        // (`Kernels::columns`).
        x[i] = unsafe { vld1q_u8(columns[i].add(at)) };
    }
    let [low, high] = zip8(x[0], x[1]);
    let [low2, high2] = zip8(x[2], x[3]);
    let ([a, b], [c, d]) = (zip16(low, low2), zip16(high, high2));
    [a, b, c, d]
}

#[inline]
#[target_feature(enable = "neon")]
fn zip8(a: uint8x16_t, b: uint8x16_t) -> [uint16x8_t; 2] {
    [vreinterpretq_u16_u8(vzip1q_u8(a, b)), vreinterpretq_u16_u8(vzip2q_u8(a, b))]
}

#[inline]
#[target_feature(enable = "neon")]
fn zip16(a: uint16x8_t, b: uint16x8_t) -> [uint8x16_t; 2] {
    [vreinterpretq_u8_u16(vzip1q_u16(a, b)), vreinterpretq_u8_u16(vzip2q_u16(a, b))]
}

/// `out += scale * dots + min * sum of activations` in units of the factors, for a lane: sum register `a` has the
/// strip's four outputs from `first + 16 a` on.
#[inline]
#[target_feature(enable = "neon")]
pub(in crate::kernels::arm) fn add_group<const N: usize>(
    group: &Group<'_>,
    first: usize,
    dots: &[int32x4_t; N],
    out: &mut [f32],
) {
    let (strip, n) = (group.strip, 16 * (N - 1) + 4);
    let scales = &group.bytes[first..][..n];
    let out = &mut out[first - group.first..][..n];
    let mut total = [vdupq_n_f32(0.0); N];
    for a in 0..N {
        let factor = vsubq_f32(bytes4(scales, 16 * a), vdupq_n_f32(strip.zeros[0]));
        let dot = vmulq_n_f32(vcvtq_f32_s32(dots[a]), group.scale);
        total[a] = vfmaq_f32(floats4(out, 16 * a), factor, dot);
    }
    if strip.has_min {
        let mins = &group.bytes[strip.width + first..][..n];
        let ratios = &strip.heads[strip.width + first..][..n];
        for (a, total) in total.iter_mut().enumerate() {
            let min = vmulq_n_f32(bytes4(mins, 16 * a), group.sum);
            *total = vfmaq_f32(*total, floats4(ratios, 16 * a), min);
        }
    }
    for (a, &total) in total.iter().enumerate() {
        let out: &mut [f32; 4] = out[16 * a..].first_chunk_mut().expect("four floats");
        // SAFETY: four writable floats.
        unsafe { vst1q_f32(out.as_mut_ptr(), total) };
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn floats4(floats: &[f32], at: usize) -> float32x4_t {
    load4(floats[at..].first_chunk().expect("four floats"))
}

/// Four bytes as floats.
#[inline]
#[target_feature(enable = "neon")]
fn bytes4(bytes: &[u8], at: usize) -> float32x4_t {
    let four = u32::from_le_bytes(*bytes[at..].first_chunk().expect("a byte an output"));
    let wide = vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four)));
    vcvtq_f32_u32(vmovl_u16(vget_low_u16(wide)))
}

/// The first output of lane `index`, if a lane fills `sums` registers.
pub(in crate::kernels::arm) const fn first_output(index: usize, sums: usize) -> usize {
    index / LANES_OF_LINE * 16 * sums + index % LANES_OF_LINE * 4
}

/// The function `columns` (see `Kernels::columns`), compiled with `$features` and multiplying with the functions of the
/// module `$multiply`.
macro_rules! instantiate {
    ($features:literal, $multiply:path) => {
        /// See `Kernels::columns`, which asserts the lengths.
        #[target_feature(enable = $features)]
        pub(in crate::kernels::arm) fn columns(
            strip: &ColumnStrip<'_>,
            chosen: Chosen<'_>,
            outputs: Range<usize>,
            out: &mut [f32],
        ) {
            use $crate::kernels::arm::neon::columns::{
                Lane, add_group, codes, first_output, is_wide, upper_bits,
            };
            use $crate::kernels::columns::Bundle;
            use $crate::kernels::columns::groups::{
                BYTES, Fetch, Group, Groups, NIBBLES, NIBBLES_AND_HIGH, TABLE, each_piece,
            };
            use $crate::quant::columns::Codes;
            use $multiply::{self as multiply, LANES};

            /// Group after group, while the next one is fetched; in a group a few lanes of the outputs after the other.
            /// `N` sum registers a lane, runs of `RUN` bundles.
            #[target_feature(enable = $features)]
            fn kernel<const KIND: u8, const N: usize, const RUN: usize>(
                strip: &ColumnStrip<'_>,
                mut groups: Groups<'_>,
                outputs: Range<usize>,
                out: &mut [f32],
            ) {
                let pieces = outputs.start / (4 * N * LANES)..outputs.end / (4 * N * LANES);
                each_piece!(groups, pieces, |group, piece, next| {
                    let mut lanes = [Lane::new(strip, LANES * piece); LANES];
                    for (i, lane) in lanes.iter_mut().enumerate() {
                        *lane = Lane::new(strip, LANES * piece + i);
                    }
                    let dots = products::<KIND, N, RUN>(&group, &lanes, &mut next);
                    for i in 0..LANES {
                        add_group(&group, first_output(LANES * piece + i, N), &dots[i], out);
                    }
                });
            }

            /// A group times the outputs of some lanes.
            #[inline]
            #[target_feature(enable = $features)]
            #[allow(clippy::needless_range_loop)] // an iterator's closures would not be inlined
            fn products<const KIND: u8, const N: usize, const RUN: usize>(
                group: &Group<'_>,
                lanes: &[Lane; LANES],
                next: &mut Fetch<'_>,
            ) -> [[int32x4_t; N]; LANES] {
                let mut dots = [[multiply::zero(); N]; LANES];
                let (fine, n) = (group.fine, group.bundles.len());
                for (part, coarse) in [(0..fine, false), (fine..n, true)] {
                    let (bundles, columns) = (&group.bundles[part.clone()], &group.columns[part]);
                    for (bundles, columns) in bundles.chunks(RUN).zip(columns.chunks(RUN)) {
                        add_run::<KIND, N>(bundles, columns, (lanes, coarse), next, &mut dots);
                    }
                }
                let start = vdupq_n_s32(if is_wide(KIND) { 0 } else { group.start });
                let mut sums = [[start; N]; LANES];
                for i in 0..LANES {
                    for a in 0..N {
                        sums[i][a] = vaddq_s32(start, multiply::finish(dots[i][a]));
                    }
                }
                sums
            }

            /// `dots += codes * activations` for a run of bundles.
            #[inline]
            #[target_feature(enable = $features)]
            #[allow(clippy::needless_range_loop)] // an iterator's closures would not be inlined
            fn add_run<const KIND: u8, const N: usize>(
                bundles: &[Bundle],
                columns: &[[*const u8; 4]],
                (lanes, coarse): (&[Lane; LANES], bool),
                next: &mut Fetch<'_>,
                dots: &mut [[multiply::Sum; N]; LANES],
            ) {
                let mut runs = [[multiply::open(multiply::zero()); N]; LANES];
                for i in 0..LANES {
                    for a in 0..N {
                        runs[i][a] = multiply::open(dots[i][a]);
                    }
                }
                for (bundle, columns) in bundles.iter().zip(columns) {
                    next.step();
                    let acts = vreinterpretq_s8_u32(vdupq_n_u32(bundle.lane().cast_unsigned()));
                    for i in 0..LANES {
                        let codes = match coarse {
                            false => codes::<KIND, N>(columns, &lanes[i]),
                            true => upper_bits::<KIND, N>(columns, &lanes[i]),
                        };
                        for a in 0..N {
                            runs[i][a] = multiply::add(runs[i][a], codes[a], acts);
                        }
                    }
                }
                for i in 0..LANES {
                    for a in 0..N {
                        dots[i][a] = multiply::close(dots[i][a], runs[i][a]);
                    }
                }
            }

            out.fill(0.0);
            let groups = Groups::new(strip, chosen, &outputs);
            match strip.codes {
                Codes::Nibbles { high: 0 } => kernel::<NIBBLES, 8, 8>(strip, groups, outputs, out),
                Codes::Nibbles { high: 1 } => kernel::<NIBBLES_AND_HIGH, 8, 8>(strip, groups, outputs, out),
                Codes::Nibbles { .. } => kernel::<NIBBLES_AND_HIGH, 8, 4>(strip, groups, outputs, out),
                Codes::Table => kernel::<TABLE, 8, 2>(strip, groups, outputs, out),
                Codes::Bytes => kernel::<BYTES, 4, 2>(strip, groups, outputs, out),
            }
        }
    };
}
pub(in crate::kernels::arm) use instantiate;
