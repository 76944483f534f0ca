//! Super-blocks of 256 weights whose group scales are quantised themselves: Q2_K, Q3_K, Q4_K, Q5_K, Q6_K.

use super::block::*;
use super::fit::{self, Affine, nearest};
use super::legacy::{inverse, signed_max};

/// Weights of a super-block.
const LEN: usize = 256;

/// Weights that lie side by side in every field: the same bits of as many bytes.
const RUN: usize = 32;

/// A field of a run: some bits of each byte.
#[derive(Clone, Copy)]
struct Bits<'b> {
    bytes: &'b [u8],
    shift: usize,
    mask: u8,
}

impl<'b> Bits<'b> {
    /// `bits` of the bytes from `first` on, from bit `shift` on.
    fn at(bytes: &'b [u8], first: usize, shift: usize, bits: u32) -> Self {
        Self { bytes: &bytes[first..][..RUN], shift, mask: (1 << bits) - 1 }
    }

    fn of(self, byte: u8) -> u8 {
        byte >> self.shift & self.mask
    }
}

/// Codes of a super-block, run by run; none, if there is no room for any.
fn write_runs<'b>(q: &mut [u8], of: impl Fn(usize) -> Bits<'b>) {
    for (r, q) in q.chunks_exact_mut(RUN).enumerate() {
        let low = of(r);
        q.iter_mut().zip(low.bytes).for_each(|(q, byte)| *q = low.of(*byte));
    }
}

/// The same of codes in two fields, the second one above the first `bits`.
fn write_joined_runs<'b>(q: &mut [u8], bits: usize, of: impl Fn(usize) -> [Bits<'b>; 2]) {
    for (r, q) in q.chunks_exact_mut(RUN).enumerate() {
        let [low, high] = of(r);
        for ((q, l), h) in q.iter_mut().zip(low.bytes).zip(high.bytes) {
            *q = low.of(*l) | high.of(*h) << bits;
        }
    }
}

/// Two bits a weight of run `r`, in the order of [`BlockQ2K::qs`].
fn two_bits(qs: &[u8; 64], r: usize) -> Bits<'_> {
    Bits::at(qs, RUN * (r / 4), 2 * (r % 4), 2)
}

fn pack_two_bits(q: &[u8; LEN]) -> [u8; 64] {
    std::array::from_fn(|b| {
        (0..4).fold(0, |byte, j| byte | (q[128 * (b / 32) + 32 * j + b % 32] & 3) << (2 * j))
    })
}

/// One bit a weight of run `r`, in the order of [`BlockQ3K::hmask`] and [`BlockQ5K::qh`].
fn one_bit(bits: &[u8; 32], r: usize) -> Bits<'_> {
    Bits::at(bits, 0, r, 1)
}

fn pack_one_bit(q: &[u8; LEN], shift: u32) -> [u8; 32] {
    std::array::from_fn(|b| (0..8).fold(0, |byte, g| byte | (q[32 * g + b] >> shift & 1) << g))
}

/// Four bits a weight of run `r`, in the order of [`BlockQ4K::qs`].
fn four_bits(qs: &[u8; 128], r: usize) -> Bits<'_> {
    Bits::at(qs, RUN * (r / 2), 4 * (r % 2), 4)
}

fn pack_four_bits(q: &[u8; LEN]) -> [u8; 128] {
    std::array::from_fn(|b| {
        let i = 64 * (b / 32) + b % 32;
        q[i] & 15 | q[i + 32] << 4
    })
}

/// Scale and min of group `g` of [`BlockQ4K::scales`].
fn scale_min(scales: &[u8; 12], g: usize) -> (u8, u8) {
    if g < 4 {
        return (scales[g] & 63, scales[4 + g] & 63);
    }
    let low = scales[4 + g];
    (low & 15 | scales[g - 4] >> 6 << 4, low >> 4 | scales[g] >> 6 << 4)
}

fn pack_scale_min(scale: &[u8; 8], min: &[u8; 8]) -> [u8; 12] {
    std::array::from_fn(|b| match b {
        0..4 => scale[b] | scale[b + 4] >> 4 << 6,
        4..8 => min[b - 4] | min[b] >> 4 << 6,
        _ => scale[b - 4] & 15 | min[b - 4] << 4,
    })
}

/// Scale of group `g` of [`BlockQ3K::scales`], still with its offset of 32.
fn scale_q3(scales: &[u8; 12], g: usize) -> u8 {
    let low = scales[g % 8] >> (4 * (g / 8)) & 15;
    low | (scales[8 + g % 4] >> (2 * (g / 4)) & 3) << 4
}

fn pack_scales_q3(scale: &[u8; 16]) -> [u8; 12] {
    std::array::from_fn(|b| match b {
        0..8 => scale[b] & 15 | scale[b + 8] << 4,
        _ => (0..4).fold(0, |byte, j| byte | (scale[4 * j + b - 8] >> 4) << (2 * j)),
    })
}

pub(super) fn unpack_q2_k(bytes: &[u8], q: &mut [u8], scale: &mut [f32], min: &mut [f32]) {
    let b = BlockQ2K::parse(bytes);
    let (d, dmin) = (f16_to_f32(b.d), f16_to_f32(b.dmin));
    for (g, s) in b.scales.into_iter().enumerate() {
        scale[g] = d * f32::from(s & 15);
        min[g] = -(dmin * f32::from(s >> 4));
    }
    write_runs(q, |r| two_bits(&b.qs, r));
}

pub(super) fn unpack_q3_k(bytes: &[u8], q: &mut [u8], scale: &mut [f32], _min: &mut [f32]) {
    let b = BlockQ3K::parse(bytes);
    let d = f16_to_f32(b.d);
    for (g, s) in scale.iter_mut().enumerate() {
        *s = d * (f32::from(scale_q3(&b.scales, g)) - 32.0);
    }
    write_joined_runs(q, 2, |r| [two_bits(&b.qs, r), one_bit(&b.hmask, r)]);
}

/// Scales and mins of Q4_K and Q5_K.
fn unpack_scale_min(d: [u8; 2], dmin: [u8; 2], scales: &[u8; 12], scale: &mut [f32], min: &mut [f32]) {
    let (d, dmin) = (f16_to_f32(d), f16_to_f32(dmin));
    for (g, (scale, min)) in scale.iter_mut().zip(min).enumerate() {
        let (s, m) = scale_min(scales, g);
        *scale = d * f32::from(s);
        *min = -(dmin * f32::from(m));
    }
}

pub(super) fn unpack_q4_k(bytes: &[u8], q: &mut [u8], scale: &mut [f32], min: &mut [f32]) {
    let b = BlockQ4K::parse(bytes);
    unpack_scale_min(b.d, b.dmin, &b.scales, scale, min);
    write_runs(q, |r| four_bits(&b.qs, r));
}

pub(super) fn unpack_q5_k(bytes: &[u8], q: &mut [u8], scale: &mut [f32], min: &mut [f32]) {
    let b = BlockQ5K::parse(bytes);
    unpack_scale_min(b.d, b.dmin, &b.scales, scale, min);
    write_joined_runs(q, 4, |r| [four_bits(&b.qs, r), one_bit(&b.qh, r)]);
}

pub(super) fn unpack_q6_k(bytes: &[u8], q: &mut [u8], scale: &mut [f32], _min: &mut [f32]) {
    let b = BlockQ6K::parse(bytes);
    let d = f16_to_f32(b.d);
    for (scale, s) in scale.iter_mut().zip(b.scales) {
        *scale = d * f32::from(s as i8);
    }
    write_joined_runs(q, 4, |r| {
        let (half, j) = (r / 4, r % 4);
        [Bits::at(&b.ql, 64 * half + RUN * (j % 2), 4 * (j / 2), 4), two_bits(&b.qh, r)]
    });
}

/// A super-block of groups with minimum, before it is packed: `x ~ d * scale * q - dmin * min`.
struct AffineBlock<const G: usize> {
    d: [u8; 2],
    dmin: [u8; 2],
    scale: [u8; G],
    min: [u8; G],
    error: f32,
}

/// The range of codes, and that of the integers that scales and mins are stored in.
#[derive(Clone, Copy)]
struct Levels {
    code: f32,
    scale: f32,
}

/// Rounds of choosing integers for the scale of the scales, and that scale for the integers.
const ROUNDS: usize = 3;

impl<const G: usize> AffineBlock<G> {
    /// Fits every group, then finds a common `d` and `dmin`.
    fn fit(x: &[f32], w: &[f32], levels: Levels) -> Self {
        let fits: [Affine; G] =
            std::array::from_fn(|g| fit::affine(group::<G>(x, g), group::<G>(w, g), levels.code));
        let largest = |of: fn(&Affine) -> f32| fits.iter().map(of).fold(0f32, f32::max) / levels.scale;
        let mut best = Self::with(x, w, levels, &fits, (largest(|f| f.scale), largest(|f| f.min)));
        for _ in 0..ROUNDS {
            let refitted = Self::with(x, w, levels, &fits, best.least_squares(x, w, levels));
            if refitted.error < best.error {
                best = refitted;
            } else {
                break; // with a NaN among the weights too
            }
        }
        best
    }

    /// Rounds the fits to multiples of `d` and `dmin`.
    fn with(x: &[f32], w: &[f32], levels: Levels, fits: &[Affine; G], (d, dmin): (f32, f32)) -> Self {
        let (d, dmin) = (f32_to_f16(d), f32_to_f16(dmin));
        let (mut scale, mut min, mut error) = ([0; G], [0; G], 0.0);
        let unit = (f16_to_f32(d), f16_to_f32(dmin));
        for g in 0..G {
            let rounded = fits[g].rounded(group::<G>(x, g), group::<G>(w, g), levels, unit);
            (scale[g], min[g]) = (rounded.0, rounded.1);
            error += rounded.2;
        }
        Self { d, dmin, scale, min, error }
    }

    /// Scale and min of group `g`, as a reader sees them.
    fn group(&self, g: usize) -> (f32, f32) {
        let (d, dmin) = (f16_to_f32(self.d), f16_to_f32(self.dmin));
        (d * f32::from(self.scale[g]), dmin * f32::from(self.min[g]))
    }

    /// The `d` and `dmin` with the smallest error for these integers and codes.
    fn least_squares(&self, x: &[f32], w: &[f32], levels: Levels) -> (f32, f32) {
        // Normal equations of sum w (d s q - dmin m - x)^2.
        let (mut aa, mut ab, mut bb, mut ax, mut bx) = (0.0, 0.0, 0.0, 0.0, 0.0);
        for g in 0..G {
            let (scale, min) = self.group(g);
            let sums = fit::affine_sums(group::<G>(x, g), group::<G>(w, g), scale, min, levels.code);
            let (s, m) = (f32::from(self.scale[g]), f32::from(self.min[g]));
            aa += s * s * sums.qq;
            ab += s * m * sums.q;
            bb += m * m * sums.w;
            ax += s * sums.qx;
            bx += m * sums.x;
        }
        let det = aa * bb - ab * ab;
        match det > 0.0 {
            true => ((ax * bb - bx * ab) / det, (ax * ab - bx * aa) / det),
            false => (ax / aa, f16_to_f32(self.dmin)), // no mins
        }
    }

    fn codes(&self, x: &[f32], levels: Levels) -> [u8; LEN] {
        let mut q = [0; LEN];
        for (g, q) in q.chunks_exact_mut(LEN / G).enumerate() {
            let (scale, min) = self.group(g);
            let inverse = inverse(scale);
            for (q, x) in q.iter_mut().zip(group::<G>(x, g)) {
                *q = nearest((x + min) * inverse, 0.0, levels.code) as u8;
            }
        }
        q
    }
}

impl Affine {
    /// The integers for this fit in units of `d` and `dmin`, and their error. Where integers are few their roundings
    /// are tried in pairs.
    fn rounded(self, x: &[f32], w: &[f32], levels: Levels, (d, dmin): (f32, f32)) -> (u8, u8, f32) {
        let near = |v: f32, unit: f32| nearest(v * inverse(unit), 0.0, levels.scale);
        let (s, m) = (near(self.scale, d), near(self.min, dmin));
        let error = |s: f32, m: f32| fit::affine_error(x, w, s * d, m * dmin, levels.code);
        let mut best = (s, m, error(s, m));
        if levels.scale == FEW {
            for (s, m) in AROUND.map(|(ds, dm)| (s + ds, m + dm)) {
                let inside = |v: f32| (0.0..=FEW).contains(&v);
                let error = if inside(s) && inside(m) { error(s, m) } else { f32::INFINITY };
                if error < best.2 {
                    best = (s, m, error);
                }
            }
        }
        (best.0 as u8, best.1 as u8, best.2)
    }
}

/// The largest scale and min of Q2_K.
const FEW: f32 = 15.0;
const AROUND: [(f32, f32); 8] =
    [(-1.0, -1.0), (-1.0, 0.0), (-1.0, 1.0), (0.0, -1.0), (0.0, 1.0), (1.0, -1.0), (1.0, 0.0), (1.0, 1.0)];

/// Group `g` of `G` of a super-block.
#[inline(always)]
fn group<const G: usize>(x: &[f32], g: usize) -> &[f32] {
    &x[g * (LEN / G)..][..LEN / G]
}

/// A super-block of groups around zero: `x ~ d * scale * level(q)`.
pub(super) struct SymmetricBlock<const G: usize> {
    pub d: [u8; 2],
    pub scale: [i8; G],
    error: f32,
}

impl<const G: usize> SymmetricBlock<G> {
    /// Fits every group to the levels that `level` rounds to, then finds a common `d`; scales are in
    /// `-limit..limit`, and the largest one begins at `-limit`.
    pub(super) fn fit(
        x: &[f32],
        w: &[f32],
        limit: f32,
        extreme: f32,
        level: impl Fn(f32) -> f32 + Copy,
    ) -> Self {
        let fits: [f32; G] =
            std::array::from_fn(|g| fit::symmetric(group::<G>(x, g), group::<G>(w, g), extreme, level));
        let mut best = Self::with(x, w, limit, &fits, signed_max(&fits) / -limit, level);
        for _ in 0..ROUNDS {
            let refitted = Self::with(x, w, limit, &fits, best.least_squares(x, w, level), level);
            if refitted.error < best.error {
                best = refitted;
            } else {
                break; // with a NaN among the weights too
            }
        }
        best
    }

    fn with(
        x: &[f32],
        w: &[f32],
        limit: f32,
        fits: &[f32; G],
        d: f32,
        level: impl Fn(f32) -> f32 + Copy,
    ) -> Self {
        let d = f32_to_f16(d);
        let unit = inverse(f16_to_f32(d));
        let scale = fits.map(|fit| nearest(fit * unit, -limit, limit - 1.0) as i8);
        let mut block = Self { d, scale, error: 0.0 };
        let error = |g| fit::symmetric_error(group::<G>(x, g), group::<G>(w, g), block.group(g), level);
        block.error = (0..G).map(error).sum();
        block
    }

    /// Scale of group `g`, as a reader sees it.
    pub(super) fn group(&self, g: usize) -> f32 {
        f16_to_f32(self.d) * f32::from(self.scale[g])
    }

    /// The `d` with the smallest error for these integers and codes.
    fn least_squares(&self, x: &[f32], w: &[f32], level: impl Fn(f32) -> f32 + Copy) -> f32 {
        let (mut xl, mut ll) = (0.0, 0.0);
        for g in 0..G {
            let [gxl, gll] =
                fit::symmetric_sums(group::<G>(x, g), group::<G>(w, g), inverse(self.group(g)), level);
            let s = f32::from(self.scale[g]);
            xl += s * gxl;
            ll += s * s * gll;
        }
        if ll > 0.0 { xl / ll } else { f16_to_f32(self.d) }
    }

    fn codes(&self, x: &[f32], zero: f32) -> [u8; LEN] {
        let mut q = [0; LEN];
        for (g, q) in q.chunks_exact_mut(LEN / G).enumerate() {
            let inverse = inverse(self.group(g));
            for (q, x) in q.iter_mut().zip(group::<G>(x, g)) {
                *q = (nearest(x * inverse, -zero, zero - 1.0) + zero) as u8;
            }
        }
        q
    }
}

pub(super) fn quantize_q2_k(x: &[f32], w: &[f32], out: &mut [u8]) {
    let levels = Levels { code: 3.0, scale: FEW };
    let b = AffineBlock::<16>::fit(x, w, levels);
    let scales = std::array::from_fn(|g| b.scale[g] | b.min[g] << 4);
    BlockQ2K { scales, qs: pack_two_bits(&b.codes(x, levels)), d: b.d, dmin: b.dmin }.write(out);
}

pub(super) fn quantize_q3_k(x: &[f32], w: &[f32], out: &mut [u8]) {
    let b = SymmetricBlock::<16>::fit(x, w, 32.0, -4.0, |v| nearest(v, -4.0, 3.0));
    let q = b.codes(x, 4.0);
    let scales = pack_scales_q3(&b.scale.map(|s| (s + 32) as u8));
    BlockQ3K { hmask: pack_one_bit(&q, 2), qs: pack_two_bits(&q), scales, d: b.d }.write(out);
}

pub(super) fn quantize_q4_k(x: &[f32], w: &[f32], out: &mut [u8]) {
    let levels = Levels { code: 15.0, scale: 63.0 };
    let b = AffineBlock::<8>::fit(x, w, levels);
    let (scales, qs) = (pack_scale_min(&b.scale, &b.min), pack_four_bits(&b.codes(x, levels)));
    BlockQ4K { d: b.d, dmin: b.dmin, scales, qs }.write(out);
}

pub(super) fn quantize_q5_k(x: &[f32], w: &[f32], out: &mut [u8]) {
    let levels = Levels { code: 31.0, scale: 63.0 };
    let b = AffineBlock::<8>::fit(x, w, levels);
    let q = b.codes(x, levels);
    let (qh, qs) = (pack_one_bit(&q, 4), pack_four_bits(&q));
    BlockQ5K { d: b.d, dmin: b.dmin, scales: pack_scale_min(&b.scale, &b.min), qh, qs }.write(out);
}

pub(super) fn quantize_q6_k(x: &[f32], w: &[f32], out: &mut [u8]) {
    let b = SymmetricBlock::<16>::fit(x, w, 128.0, -32.0, |v| nearest(v, -32.0, 31.0));
    let q = b.codes(x, 32.0);
    let ql = std::array::from_fn(|b| {
        let i = 128 * (b / 64) + b % 64;
        q[i] & 15 | q[i + 64] << 4
    });
    let qh = pack_two_bits(&q.map(|q| q >> 4));
    BlockQ6K { ql, qh, scales: b.scale.map(|s| s as u8), d: b.d }.write(out);
}
