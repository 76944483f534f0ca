//! Finding the scale (and minimum) of a group that leaves a small squared error.
//!
//! Both searches try a handful of scales around the one that just covers the range, because clipping an
//! outlier often costs less than spacing all levels wider, and refine each by least squares.

/// Candidates on either side of the scale that covers the range.
const STEPS: i32 = 8;

fn candidates(levels: f32) -> impl Iterator<Item = f32> {
    (-STEPS..=STEPS).map(move |i| levels + 0.1 * i as f32)
}

/// The nearest integer in `lo..=hi`; `lo` for what is not a number.
pub(super) fn nearest(x: f32, lo: i32, hi: i32) -> i32 {
    (x.round_ties_even().max(lo as f32) as i32).min(hi)
}

/// The `scale` with the smallest error of `x ~ scale * level(x / scale)`, where `level` gives the nearest
/// value that a code can stand for and `extreme` is the level of largest magnitude. Large weights count
/// more (by their square), since they carry more of a dot product.
pub(super) fn symmetric(x: &[f32], extreme: f32, level: impl Fn(f32) -> f32) -> f32 {
    let max = super::legacy::signed_max(x);
    if max == 0.0 || !max.is_finite() {
        return 0.0;
    }
    // With scale = xl/ll the squared error is xx - xl^2/ll: maximise the last term.
    let (mut best, mut best_gain) = (max / extreme, 0.0);
    for target in candidates(extreme) {
        let inverse = target / max;
        let (mut xl, mut ll) = (0.0, 0.0);
        for &v in x {
            let (l, weight) = (level(v * inverse), v * v);
            xl += weight * v * l;
            ll += weight * l * l;
        }
        if ll > 0.0 && xl * xl / ll > best_gain {
            (best, best_gain) = (xl / ll, xl * xl / ll);
        }
    }
    best
}

/// The `(scale, min)` with the smallest error of `x ~ scale * q - min` for `q` in `0..=top`, both not negative.
pub(super) fn affine(x: &[f32], top: i32) -> (f32, f32) {
    let low = x.iter().fold(0.0f32, |m, &v| m.min(v)); // at most 0: the stored min cannot be negative
    let high = x.iter().fold(low, |m, &v| m.max(v));
    let range = high - low;
    if range == 0.0 || !range.is_finite() {
        return (0.0, 0.0);
    }
    let mut best = (range / top as f32, -low);
    let mut best_error = affine_error(x, best, top);
    for target in candidates(top as f32) {
        let start = (range / target, -low);
        let refined = least_squares(x, start, top).unwrap_or(start);
        let error = affine_error(x, refined, top);
        if error < best_error {
            (best, best_error) = (refined, error);
        }
    }
    best
}

fn code(v: f32, (scale, min): (f32, f32), top: i32) -> f32 {
    nearest((v + min) / scale, 0, top) as f32
}

fn affine_error(x: &[f32], fit: (f32, f32), top: i32) -> f32 {
    x.iter().map(|&v| (fit.0 * code(v, fit, top) - fit.1 - v).powi(2)).sum()
}

/// The best `(scale, min)` for the codes that `start` gives; `None` if they do not determine one, or only
/// one with a sign that the formats cannot store.
fn least_squares(x: &[f32], start: (f32, f32), top: i32) -> Option<(f32, f32)> {
    let n = x.len() as f32;
    let (mut sq, mut sqq, mut sx, mut sqx) = (0.0, 0.0, 0.0, 0.0);
    for &v in x {
        let q = code(v, start, top);
        sq += q;
        sqq += q * q;
        sx += v;
        sqx += q * v;
    }
    let det = n * sqq - sq * sq;
    if det <= 0.0 {
        return None;
    }
    let (scale, min) = ((n * sqx - sq * sx) / det, (sq * sqx - sqq * sx) / det);
    if min >= 0.0 {
        return (scale > 0.0).then_some((scale, min));
    }
    (sqx > 0.0).then(|| (sqx / sqq, 0.0)) // best scale with the min held at zero
}
