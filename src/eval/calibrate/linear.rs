//! Ridge regressions in f32, on one thread: calibration solves those of different layers side by side.

use crate::kernels::Kernels;
use crate::kernels::gemm_f32::View;

/// What is added to the variances, in units of their mean: enough that what a few tokens say by chance is not believed.
const STRENGTH: f32 = 1e-2;

/// `a^T b`, `[m, n]`, of rows of `m` and of `n` columns.
pub(super) fn cross(kernels: Kernels, a: &[f32], m: usize, b: &[f32], n: usize) -> Vec<f32> {
    let mut out = vec![0.0; m * n];
    kernels.gemm_f32(View::rows(a, m).transposed(), View::rows(b, n), 0.0, &mut out, n);
    out
}

/// `a b`, `[rows, n]`, where `a` has rows of `k` columns and `b` of `n`.
pub(super) fn product(kernels: Kernels, a: &[f32], k: usize, b: &[f32], n: usize) -> Vec<f32> {
    let mut out = vec![0.0; a.len() / k * n];
    kernels.gemm_f32(View::rows(a, k), View::rows(b, n), 0.0, &mut out, n);
    out
}

/// `a b^T`, `[rows of a, rows of b]`, both of `k` columns.
pub(super) fn dots(kernels: Kernels, a: &[f32], b: &[f32], k: usize) -> Vec<f32> {
    let n = b.len() / k;
    let mut out = vec![0.0; a.len() / k * n];
    kernels.gemm_f32(View::rows(a, k), View::rows(b, k).transposed(), 0.0, &mut out, n);
    out
}

/// The means of the columns of `x`, each row as often as its weight says.
pub(super) fn means(kernels: Kernels, x: &[f32], weights: &[f32]) -> Vec<f32> {
    let mut sum = vec![0.0; x.len() / weights.len()];
    kernels.add_weighted(&mut sum, weights, x);
    let all: f32 = weights.iter().sum();
    sum.iter_mut().for_each(|s| *s /= all);
    sum
}

/// The rows of `x` less `mean`.
pub(super) fn centre(x: &mut [f32], mean: &[f32]) {
    for row in x.chunks_exact_mut(mean.len()) {
        row.iter_mut().zip(mean).for_each(|(x, m)| *x -= m);
    }
}

/// A factored matrix of second moments, with the ridge added: `L L^T`.
pub(super) struct Ridge {
    kernels: Kernels,
    n: usize,
    /// Rows of L in the lower triangle; rows of L^T from the diagonal on in `upper`.
    lower: Vec<f32>,
    upper: Vec<f32>,
}

impl Ridge {
    /// Of the second moments `gram`, `[n, n]`.
    pub fn of(kernels: Kernels, mut gram: Vec<f32>, n: usize) -> Self {
        let trace: f32 = (0..n).map(|i| gram[i * n + i]).sum();
        let ridge = (STRENGTH * trace / n as f32).max(f32::MIN_POSITIVE);
        for i in 0..n {
            gram[i * n + i] += ridge;
            let (above, row) = gram.split_at_mut(i * n);
            for j in 0..i {
                let other = &above[j * n..][..=j];
                row[j] = (row[j] - kernels.dot_f32(&row[..j], &other[..j])) / other[j];
            }
            // Rounding may leave less than the ridge, and never should.
            row[i] = (row[i] - kernels.dot_f32(&row[..i], &row[..i])).max(0.5 * ridge).sqrt();
        }
        let mut upper = vec![0.0; n * n];
        for (i, row) in gram.chunks_exact(n).enumerate() {
            row[..=i].iter().enumerate().for_each(|(j, &v)| upper[j * n + i] = v);
        }
        Self { kernels, n, lower: gram, upper }
    }

    /// What, multiplied with the matrix, gives each row of `x`, in its place.
    pub fn solve(&self, x: &mut [f32]) {
        let n = self.n;
        for x in x.chunks_exact_mut(n) {
            for i in 0..n {
                let row = &self.lower[i * n..][..=i];
                x[i] = (x[i] - self.kernels.dot_f32(&row[..i], &x[..i])) / row[i];
            }
            for i in (0..n).rev() {
                let row = &self.upper[i * n..][..n];
                x[i] = (x[i] - self.kernels.dot_f32(&row[i + 1..], &x[i + 1..])) / row[i];
            }
        }
    }
}

/// Steps of [`leading`]: what comes last need not be exact.
const STEPS: usize = 8;

/// About the first `rank` eigenvectors of the symmetric matrix `m`, `[n, n]`, as orthonormal rows: subspace iteration.
pub(super) fn leading(kernels: Kernels, m: &[f32], n: usize, rank: usize) -> Vec<f32> {
    let mut seed = 1u64;
    let mut next = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    let mut rows: Vec<f32> = (0..rank * n).map(|_| next()).collect();
    for _ in 0..STEPS {
        rows = product(kernels, &rows, n, m, n);
        orthonormalise(kernels, &mut rows, n);
    }
    rows
}

/// Gram and Schmidt, each row twice: once is not exact enough.
fn orthonormalise(kernels: Kernels, rows: &mut [f32], n: usize) {
    for i in 0..rows.len() / n {
        let (before, row) = rows.split_at_mut(i * n);
        let row = &mut row[..n];
        let scale = kernels.dot_f32(row, row).sqrt().max(f32::MIN_POSITIVE);
        row.iter_mut().for_each(|x| *x /= scale);
        for before in [&*before, before].into_iter().flat_map(|before| before.chunks_exact(n)) {
            let along = kernels.dot_f32(before, row);
            row.iter_mut().zip(before).for_each(|(x, b)| *x -= along * b);
        }
        // Of a matrix of lower rank, the rest is rounding; it stays out.
        let left = kernels.dot_f32(row, row).sqrt();
        let scale = if left > 1e-4 { 1.0 / left } else { 0.0 };
        row.iter_mut().for_each(|x| *x *= scale);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernels() -> Kernels {
        Kernels::select(None).unwrap()
    }

    fn values(n: usize, step: usize) -> Vec<f32> {
        (0..n).map(|i| (i * step % 1009) as f32 / 1009.0 - 0.5).collect()
    }

    #[test]
    fn a_ridge_solves_what_it_was_made_of() {
        let (n, rows) = (24, 200);
        let x = values(rows * n, 373);
        let gram = cross(kernels(), &x, n, &x, n);
        let ridge = STRENGTH * (0..n).map(|i| gram[i * n + i]).sum::<f32>() / n as f32;
        let expected = values(2 * n, 91);
        // (G + ridge) b, row by row; G is symmetric.
        let mut b = product(kernels(), &expected, n, &gram, n);
        b.iter_mut().zip(&expected).for_each(|(b, e)| *b += ridge * e);
        Ridge::of(kernels(), gram, n).solve(&mut b);
        for (got, expected) in b.iter().zip(&expected) {
            assert!((got - expected).abs() < 1e-3, "{got} for {expected}");
        }
    }

    #[test]
    fn nothing_is_no_trouble() {
        let mut b = vec![1.0; 4];
        Ridge::of(kernels(), vec![0.0; 16], 4).solve(&mut b);
        assert!(b.iter().all(|b| !b.is_nan()));
        assert!(leading(kernels(), &[0.0; 16], 4, 2).iter().all(|&q| q == 0.0));
    }

    #[test]
    fn leading_directions_hold_most_of_a_matrix() {
        let (n, rank) = (20, 3);
        let base = values(rank * n, 577);
        let m = cross(kernels(), &base, n, &base, n);
        let q = leading(kernels(), &m, n, rank);
        let eye = dots(kernels(), &q, &q, n);
        for (i, v) in eye.iter().enumerate() {
            let expected = if i % (rank + 1) == 0 { 1.0 } else { 0.0 };
            assert!((v - expected).abs() < 1e-4, "{eye:?}");
        }
        // All of it lies in their span: M - Q^T Q M = 0.
        let inside = cross(kernels(), &q, n, &product(kernels(), &q, n, &m, n), n);
        for (got, expected) in inside.iter().zip(&m) {
            assert!((got - expected).abs() < 1e-3, "{got} for {expected}");
        }
    }
}
