//! How deep a token may be cut: a regression, for each layer, of what an error would cost on the normed stream.
//!
//! An error in the stream costs a token in proportion to how much its logits' errors change its probabilities `p`:
//! about `1 - sum p^2`, nothing where the model is certain. With thresholds `t`, the entries left out are about
//! proportional to `t` and their squared error to `t^3`, so that for a given number of bytes the cost is least
//! where `t` is proportional to `cost^(-1/2)`.

use crate::ops::Compute;
use crate::skip::Depth;

/// What an error costs later tokens, through keys and values, whatever this token's own doubt.
const FLOOR: f32 = 0.1;
/// Exponent of the cost in the factor of the thresholds.
const EXPONENT: f32 = -0.5;
/// Share of the tokens, the last ones, on which is seen when the regression begins to learn its text by heart.
const HELD_OUT: f64 = 0.2;
/// Most steps of the regression.
const STEPS: usize = 40;

/// What the factor of a token's thresholds should be, its binary logarithm, where its most likely successors'
/// squared probabilities add up to `1 - doubt`.
pub(super) fn target(doubt: f32) -> f32 {
    EXPONENT * (doubt.max(0.0) + FLOOR).log2()
}

/// The regression of `targets` (which average 0) on the rows of `x`, `[targets, n]`, and the share of their variance
/// that it explains where it has not seen them: 0 if it is of no use.
///
/// Conjugate gradients on the normal equations, stopped where the held-out error is least: few steps act as a ridge
/// does, without a strength to choose.
pub(super) fn fit(on: Compute<'_>, x: &[f32], targets: &[f32]) -> (Depth, f32) {
    let rows = targets.len();
    let n = x.len() / rows.max(1);
    let seen = rows - (rows as f64 * HELD_OUT) as usize;
    if n == 0 || seen == 0 || seen == rows {
        return (Depth::default(), 0.0);
    }
    let means = product(on, x, &vec![1.0 / seen as f32; seen], n);
    // (X - mean) v, and its transpose times v, which is centred if v is.
    let times = |v: &[f32]| -> Vec<f32> {
        let shift = on.kernels.dot_f32(&means, v);
        x.chunks_exact(n).map(|row| on.kernels.dot_f32(row, v) - shift).collect()
    };
    let error = |residual: &[f32]| residual[seen..].iter().map(|r| f64::from(r * r)).sum::<f64>();
    let mut residual = targets.to_vec();
    let (mut weight, mut best) = (vec![0.0; n], (error(&residual), vec![0.0; n]));
    let all = best.0;
    let mut gradient = centred_product(on, x, &residual[..seen], &means);
    let (mut direction, mut energy) = (gradient.clone(), on.kernels.dot_f32(&gradient, &gradient));
    for _ in 0..STEPS {
        let moved = times(&direction);
        let step = energy / moved[..seen].iter().map(|m| m * m).sum::<f32>();
        if !step.is_finite() {
            break;
        }
        weight.iter_mut().zip(&direction).for_each(|(w, d)| *w += step * d);
        residual.iter_mut().zip(&moved).for_each(|(r, m)| *r -= step * m);
        if error(&residual) < best.0 {
            best = (error(&residual), weight.clone());
        }
        gradient = centred_product(on, x, &residual[..seen], &means);
        let next = on.kernels.dot_f32(&gradient, &gradient);
        direction.iter_mut().zip(&gradient).for_each(|(d, g)| *d = g + next / energy * *d);
        energy = next;
    }
    let explained = if all > 0.0 { 1.0 - best.0 / all } else { 0.0 };
    if explained <= 0.0 {
        return (Depth::default(), 0.0);
    }
    let bias = -on.kernels.dot_f32(&means, &best.1);
    (Depth { weight: best.1, bias }, explained as f32)
}

/// `sum_i v_i x_i` over the first rows of `x`, which have `n` columns.
fn product(on: Compute<'_>, x: &[f32], v: &[f32], n: usize) -> Vec<f32> {
    let mut sum = vec![0.0; n];
    on.kernels.add_weighted(&mut sum, v, &x[..v.len() * n]);
    sum
}

/// The same with the means of `x` subtracted.
fn centred_product(on: Compute<'_>, x: &[f32], v: &[f32], means: &[f32]) -> Vec<f32> {
    let mut sum = product(on, x, v, means.len());
    let total: f32 = v.iter().sum();
    sum.iter_mut().zip(means).for_each(|(s, m)| *s -= total * m);
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Kernels;
    use crate::threads::Team;

    /// Rows of noise around 3, from a generator of Knuth's.
    fn noise(rows: usize, n: usize) -> Vec<f32> {
        let mut seed = 1u64;
        let mut next = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 40) as f32 / (1u64 << 24) as f32
        };
        (0..rows * n).map(|_| 3.0 + next()).collect()
    }

    #[test]
    fn a_linear_target_is_found_and_chance_is_not() {
        let team = Team::new(1).unwrap();
        let on = Compute { team: &team, kernels: Kernels::select(None).unwrap() };
        let (rows, n) = (500, 8);
        let x = noise(rows, n);
        let linear: Vec<f32> = x.chunks_exact(n).map(|x| 2.0 * x[1] - x[6]).collect();
        let mean = linear.iter().sum::<f32>() / rows as f32;
        let linear: Vec<f32> = linear.iter().map(|y| y - mean).collect();
        let (depth, explained) = fit(on, &x, &linear);
        assert!(explained > 0.99, "{explained}");
        for (x, y) in x.chunks_exact(n).zip(&linear) {
            let factor = depth.factor(on.kernels.dot_f32(&depth.weight, x));
            assert!((factor.log2() - y).abs() < 0.1, "{factor} for {y}");
        }
        // What is seen only where it is learnt is no rule: later rows follow the opposite one.
        let broken = rows - rows / 5;
        let turned: Vec<f32> =
            linear.iter().enumerate().map(|(i, y)| if i < broken { *y } else { -y }).collect();
        assert_eq!(fit(on, &x, &turned), (Depth::default(), 0.0));
        assert_eq!(fit(on, &[], &[]), (Depth::default(), 0.0));
    }

    #[test]
    fn doubtful_tokens_are_cut_less() {
        assert!(target(0.9) < target(0.5) && target(0.5) < target(0.0));
        // Four times the cost, half the threshold.
        let steep = target(4.0 * (0.1 + FLOOR) - FLOOR) - target(0.1);
        assert!((steep + 1.0).abs() < 1e-5, "{steep}");
    }
}
