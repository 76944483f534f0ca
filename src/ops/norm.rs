//! RMSNorm and residual adds.

use super::{Compute, Inputs};

/// `out[i] = x[rows[i]] / rms(x[rows[i]]) * weight`, quantised too (Zhang and Sennrich 2019).
///
/// `x` holds rows of `weight.len()` columns.
pub fn rms_norm(on: Compute<'_>, x: &[f32], rows: &[usize], weight: &[f32], eps: f32, out: &mut Inputs) {
    rms_norm_then(on, x, rows, weight, eps, out, |_, _| {});
}

/// [`rms_norm`] with `then(i, values)` applied to row `i` of `out` before it is quantised.
pub fn rms_norm_then(
    on: Compute<'_>,
    x: &[f32],
    rows: &[usize],
    weight: &[f32],
    eps: f32,
    out: &mut Inputs,
    then: impl Fn(usize, &mut [f32]) + Sync,
) {
    let cols = weight.len();
    out.reshape(rows.len(), cols);
    out.fill(on, |i, out| {
        norm_row(on, &x[rows[i] * cols..][..cols], weight, eps, out);
        then(i, out);
    });
}

/// `out = x / rms(x) * weight`, all as long.
pub fn norm_row(on: Compute<'_>, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let mean_square = on.kernels.dot_f32(x, x) / x.len() as f32;
    let inverse = 1.0 / (mean_square + eps).sqrt();
    for ((out, x), w) in out.iter_mut().zip(x).zip(weight) {
        *out = x * inverse * w;
    }
}

/// `x[rows[i]] += y[i]`, rows of `cols` columns.
pub fn add_rows(x: &mut [f32], rows: &[usize], y: &[f32], cols: usize) {
    for (&r, y) in rows.iter().zip(y.chunks_exact(cols)) {
        for (x, y) in x[r * cols..][..cols].iter_mut().zip(y) {
            *x += y;
        }
    }
}
