//! Finding the scale (and minimum) of a group that leaves a small squared error.
//!
//! The codes of a group depend on its scale, and the best scale depends on the codes. So both searches try a handful
//! of scales around the one that just covers the range (clipping an outlier often costs less than spacing all levels
//! wider), and for the codes that each gives solve for the best scale by least squares. This is the method of ggml's
//! K-quants (Kawrakow 2023, llama.cpp pull request 1684); the error of a candidate comes from the sums that least
//! squares needs anyway, so a candidate costs one pass.
//!
//! Errors are weighed: `w` has a positive number for each weight.

/// Values taken together: sums are kept in so many lanes, which compilers turn into SIMD.
const LANES: usize = 8;

/// Candidates on either side of the scale that covers the range, and how far apart they are, in levels. More and
/// closer ones gain less than 0.2 % of the error.
const STEPS: i32 = 3;
const STEP: f32 = 0.3;

/// Rounds of least squares from the best candidate on.
const ROUNDS: usize = 3;

/// What is added to round to an integer: past 2^23 an f32 has no fraction (`f32::round` is a call of a function where
/// the CPU is not known to have the instruction).
const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: negative numbers too

/// The nearest integer, for `x` of a magnitude below 2^22.
#[inline(always)]
pub(super) fn round(x: f32) -> f32 {
    (x + ROUND) - ROUND
}

/// `x` between `low` and `high`; NaN gives `low`.
#[inline(always)]
fn limit(x: f32, low: f32, high: f32) -> f32 {
    let x = if x > low { x } else { low };
    if x < high { x } else { high }
}

/// The nearest integer in `low..=high`; `low` for what is not a number.
#[inline(always)]
pub(super) fn nearest(x: f32, low: f32, high: f32) -> f32 {
    round(limit(x, low, high))
}

/// Sums of `f(x, w)` over a group.
#[inline(always)]
fn sums<const N: usize>(x: &[f32], w: &[f32], f: impl Fn(f32, f32) -> [f32; N]) -> [f32; N] {
    let mut lanes = [[0f32; LANES]; N];
    let (x, w) = (x.as_chunks::<LANES>().0, w.as_chunks::<LANES>().0);
    for k in 0..x.len().min(w.len()) {
        for i in 0..LANES {
            let terms = f(x[k][i], w[k][i]);
            for n in 0..N {
                lanes[n][i] += terms[n];
            }
        }
    }
    std::array::from_fn(|n| total(&lanes[n]))
}

#[inline(always)]
fn total(l: &[f32; LANES]) -> f32 {
    let half: [f32; LANES / 2] = [l[0] + l[4], l[1] + l[5], l[2] + l[6], l[3] + l[7]];
    (half[0] + half[2]) + (half[1] + half[3])
}

/// The smallest and the largest value, NaN aside; at least one of them is 0 or on either side of it.
#[inline(always)]
fn range(x: &[f32]) -> (f32, f32) {
    let (mut low, mut high) = ([0f32; LANES], [0f32; LANES]);
    for x in x.as_chunks::<LANES>().0 {
        for i in 0..LANES {
            low[i] = if x[i] < low[i] { x[i] } else { low[i] };
            high[i] = if x[i] > high[i] { x[i] } else { high[i] };
        }
    }
    (low.into_iter().fold(0.0, f32::min), high.into_iter().fold(0.0, f32::max))
}

/// Sums of `x l` and `l^2` over the levels that the codes of a scale stand for.
#[inline(always)]
pub(super) fn symmetric_sums(x: &[f32], w: &[f32], inverse: f32, level: impl Fn(f32) -> f32) -> [f32; 2] {
    sums(x, w, |x, w| {
        let l = level(x * inverse);
        [w * x * l, w * l * l]
    })
}

/// The squared error of a scale.
#[inline(always)]
pub(super) fn symmetric_error(x: &[f32], w: &[f32], scale: f32, level: impl Fn(f32) -> f32) -> f32 {
    let inverse = super::legacy::inverse(scale);
    let [error] = sums(x, w, |x, w| {
        let e = scale * level(x * inverse) - x;
        [w * e * e]
    });
    error
}

/// A fit `x ~ scale * q` and how much of the weighed sum of squares it explains.
#[derive(Clone, Copy, Debug, Default)]
struct Explained {
    scale: f32,
    gain: f32,
}

/// With `scale = xl / ll` the squared error is `xx - xl^2 / ll`: the last term is what a fit gains.
#[inline(always)]
fn explained(x: &[f32], w: &[f32], inverse: f32, level: impl Fn(f32) -> f32) -> Explained {
    let [xl, ll] = symmetric_sums(x, w, inverse, level);
    if ll > 0.0 { Explained { scale: xl / ll, gain: xl * xl / ll } } else { Explained::default() }
}

/// The `scale` with the smallest error of `x ~ scale * level(x / scale)`, where `level` gives the nearest value that
/// a code can stand for and `extreme` is the level of largest magnitude. 0 for a group of zeros.
#[inline(always)]
pub(super) fn symmetric(x: &[f32], w: &[f32], extreme: f32, level: impl Fn(f32) -> f32 + Copy) -> f32 {
    let max = super::legacy::signed_max(x);
    if max.abs() < TINY || !max.is_finite() {
        return 0.0;
    }
    // The level of largest magnitude has no counterpart of the other sign: either may meet the largest weight.
    let mut best = Explained { scale: max / extreme, gain: f32::NEG_INFINITY };
    for sign in [1.0, -1.0] {
        for step in -STEPS..=STEPS {
            let fit = explained(x, w, sign * (extreme + STEP * step as f32) / max, level);
            if fit.gain > best.gain {
                best = fit;
            }
        }
    }
    for _ in 0..ROUNDS {
        let fit = explained(x, w, 1.0 / best.scale, level);
        if fit.gain <= best.gain {
            break;
        }
        best = fit;
    }
    if best.scale.is_finite() { best.scale } else { 0.0 }
}

/// Smaller weights count as zero: the inverse of their scale would not be finite.
const TINY: f32 = 1e-30;

/// A fit `x ~ scale * q - min`, neither negative, and its weighed squared error less that of `x` itself.
#[derive(Clone, Copy, Debug)]
pub(super) struct Affine {
    pub scale: f32,
    pub min: f32,
    error: f32,
}

/// The scale and min with the smallest error of `x ~ scale * q - min` for `q` in `0..=top`.
pub(super) fn affine(x: &[f32], w: &[f32], top: f32) -> Affine {
    let (low, high) = range(x); // low is at most 0: the stored min cannot be negative
    let range = high - low;
    if range < TINY || !range.is_finite() {
        return Affine { scale: 0.0, min: 0.0, error: 0.0 };
    }
    let fixed = sums(x, w, |x, w| [w, w * x]);
    let mut best = Affine { scale: range / top, min: -low, error: f32::INFINITY };
    for step in -STEPS..=STEPS {
        let inverse = (top + STEP * step as f32) / range;
        best = best.or(least_squares(x, w, fixed, inverse, -low, top));
    }
    for _ in 0..ROUNDS {
        let refined = best.or(least_squares(x, w, fixed, 1.0 / best.scale, best.min, top));
        if refined.error >= best.error {
            break;
        }
        best = refined;
    }
    best
}

impl Affine {
    fn or(self, other: Option<Self>) -> Self {
        other.filter(|other| other.error < self.error).unwrap_or(self)
    }
}

/// The best fit for the codes that `inverse` and `min` give; `None` if they do not determine one, or only one with a
/// sign that the formats cannot store.
#[inline(always)]
fn least_squares(
    x: &[f32],
    w: &[f32],
    [sw, sx]: [f32; 2],
    inverse: f32,
    min: f32,
    top: f32,
) -> Option<Affine> {
    let [sq, sqq, sqx] = sums(x, w, |x, w| {
        let q = nearest((x + min) * inverse, 0.0, top);
        [w * q, w * q * q, w * q * x]
    });
    let det = sw * sqq - sq * sq;
    if det <= 0.0 {
        return None;
    }
    let (scale, min) = ((sw * sqx - sq * sx) / det, (sq * sqx - sqq * sx) / det);
    let (scale, min) = if min >= 0.0 { (scale, min) } else { (sqx / sqq, 0.0) };
    let error = min * sx - scale * sqx;
    (scale > TINY && scale.is_finite() && min.is_finite()).then_some(Affine { scale, min, error })
}

/// Sums over a group with its codes `q`, all weighed.
pub(super) struct AffineSums {
    pub w: f32,
    pub x: f32,
    pub q: f32,
    pub qq: f32,
    pub qx: f32,
}

/// The sums for the codes of a scale and min.
pub(super) fn affine_sums(x: &[f32], w: &[f32], scale: f32, min: f32, top: f32) -> AffineSums {
    let inverse = super::legacy::inverse(scale);
    let [sw, sx, q, qq, qx] = sums(x, w, |x, w| {
        let q = nearest((x + min) * inverse, 0.0, top);
        [w, w * x, w * q, w * q * q, w * q * x]
    });
    AffineSums { w: sw, x: sx, q, qq, qx }
}

/// The squared error of a scale and min.
pub(super) fn affine_error(x: &[f32], w: &[f32], scale: f32, min: f32, top: f32) -> f32 {
    let inverse = super::legacy::inverse(scale);
    let [error] = sums(x, w, |x, w| {
        let e = scale * nearest((x + min) * inverse, 0.0, top) - min - x;
        [w * e * e]
    });
    error
}
