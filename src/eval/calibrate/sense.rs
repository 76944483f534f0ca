//! What an error of one side of an FFN costs, measured: the divergence that cutting this side alone causes.
//!
//! [`layer_cut`](super::weigh::layer_cut) foresees the squared error of the FFN's output, in units of the stream that
//! it is added to. Whatever the rest of the model makes of such an error is a factor of that layer and side. On
//! Qwen2.5-1.5B it grows sixfold over the layers, once more as much in the last one, and is twice as large for inputs,
//! whose errors pass the product of gate and up, as for neurons (docs/skipping.md).

use super::gather::LayerSums;
use super::weigh::{column_bytes, scores, trim_centres};
use super::{Alone, Progress, Result, Stage, TRIM_ROUNDS, Trials, report};
use crate::model::{ColumnForms, Model};
use crate::ops::Compute;
use crate::skip::{Cut, CutPlan, CutSide, Decision, Depth, LayerCut};

/// Share of a side's entries that is left out: a divergence well above that of rounding.
const SHARE: f64 = 0.65;
/// Least share of a divergence that is taken to be the cut's, not that of rounding.
const LEAST: f64 = 0.1;

/// Multiplies the weights of each side of `cuts` with the root of what a squared error in their units costs.
pub(super) fn weigh(
    model: &mut Model,
    on: Compute<'_>,
    trials: &Trials<'_>,
    layers: &[LayerSums],
    cuts: &mut [LayerCut],
    progress: Progress<'_>,
) -> Result<()> {
    let mut alone = cuts.to_vec();
    for (cut, sums) in alone.iter_mut().zip(layers) {
        cut.depth = Depth::default();
        for _ in 0..TRIM_ROUNDS {
            let [inputs, inner] = thresholds(cut, sums);
            trim_centres(cut, sums, [inputs, inner]);
        }
    }
    let plan = CutPlan { layers: alone.iter().cloned().map(Some).collect(), ..CutPlan::default() };
    model.prepare_cuts(on, plan, ColumnForms::None, |_, _| {})?;
    let model = &*model;
    let run = |layer, inputs, inner| {
        let cut = Cut::Columns { inputs, inner };
        trials.run(model, on, Box::new(Alone::new(layer, Decision::Cut(cut)))).map(|trial| trial.kl)
    };
    // What rounding alone makes of a vector with another centre.
    let floor = run(0, 0.0, 0.0)?;
    let mut costs = [Vec::new(), Vec::new()];
    for (i, (cut, sums)) in alone.iter().zip(layers).enumerate() {
        let [inputs, inner] = thresholds(cut, sums);
        let diverged = [run(i, inputs, 0.0)?, run(i, 0.0, inner)?];
        let [gate_up, down] = column_bytes(&model.layers()[i].ffn);
        let errors = [
            error(&cut.inputs, &sums.normed_samples, inputs, gate_up),
            error(&cut.inner, &sums.inner_samples, inner, down),
        ];
        for side in 0..2 {
            let cost = (diverged[side] - floor).max(LEAST * diverged[side]) / errors[side];
            costs[side].push(if cost.is_finite() && cost > 0.0 { cost } else { f64::MIN_POSITIVE });
        }
        report(&mut *progress, Stage::Sensitivity, i + 1, layers.len())?;
    }
    let [inputs, inner] = costs.map(|costs| smoothed(&costs));
    for (cut, (inputs, inner)) in cuts.iter_mut().zip(inputs.into_iter().zip(inner)) {
        cut.inputs.weight.iter_mut().for_each(|w| *w *= inputs.sqrt() as f32);
        cut.inner.weight.iter_mut().for_each(|w| *w *= inner.sqrt() as f32);
    }
    Ok(())
}

/// Thresholds of the two sides that leave out [`SHARE`] of their entries.
fn thresholds(cut: &LayerCut, sums: &LayerSums) -> [f32; 2] {
    [(&cut.inputs, &sums.normed_samples), (&cut.inner, &sums.inner_samples)].map(|(side, samples)| {
        let mut scores: Vec<f32> = scores(side, samples).collect();
        let at = (scores.len() as f64 * SHARE) as usize;
        if at < scores.len() { *scores.select_nth_unstable_by(at, f32::total_cmp).1 } else { 0.0 }
    })
}

/// The squared error a token that leaving out what is below `threshold` makes, in units of the weights; a column has
/// `bytes`, by which they are divided.
fn error(side: &CutSide, samples: &[f32], threshold: f32, bytes: f64) -> f64 {
    let tokens = (samples.len() / side.weight.len().max(1)).max(1);
    let out = scores(side, samples).filter(|&score| score < threshold);
    out.map(|score| f64::from(score * score)).sum::<f64>() / tokens as f64 * bytes
}

/// Geometric means with the neighbours: one window's divergences are noisy and change slowly from layer to layer, but
/// for the first and the last.
fn smoothed(costs: &[f64]) -> Vec<f64> {
    let inner = 1..costs.len().saturating_sub(1);
    let mean = |i: usize| match i {
        // The ends are unlike their neighbours, and not smeared into them.
        i if !inner.contains(&i) => costs[i],
        i => {
            let (before, after) =
                (costs[if i > 1 { i - 1 } else { i }], costs[if i + 1 < inner.end { i + 1 } else { i }]);
            (costs[i] * costs[i] * before * after).powf(0.25)
        }
    };
    (0..costs.len()).map(mean).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_stay_and_the_middle_is_smoothed() {
        let smooth = smoothed(&[100.0, 1.0, 16.0, 1.0, 1.0, 1000.0]);
        assert_eq!((smooth[0], smooth[5]), (100.0, 1000.0));
        assert!((smooth[1] - 2.0).abs() < 1e-9, "{smooth:?}");
        assert!((smooth[2] - 4.0).abs() < 1e-9, "{smooth:?}");
        assert!((smooth[4] - 1.0).abs() < 1e-9, "not smeared by the last: {smooth:?}");
        assert_eq!(smoothed(&[3.0]), [3.0]);
    }

    #[test]
    fn errors_are_of_what_is_left_out() {
        let side = CutSide { centre: vec![1.0, 0.0], weight: vec![1.0, 2.0] };
        // Scores: 1, 2 and 3, 8.
        assert_eq!(error(&side, &[2.0, 1.0, 4.0, 4.0], 2.5, 10.0), 25.0);
    }
}
