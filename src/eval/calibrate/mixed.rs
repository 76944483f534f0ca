//! Stand-ins and cuts together: how cheap a stand-in has to be foretold to go before a cut.
//!
//! Both thresholds bound what a byte left unread may cost, and those of cuts are of a root of it: so the one rises by two octaves
//! where the other rises by one, and a single number tells how far they are apart. Which one is best is measured at a share that
//! one would use.

use super::trials::{Trial, Trials};
use super::{Progress, RATIOS, Result, Stage, WARM_UP, curve, report};
use crate::model::Model;
use crate::ops::Compute;
use crate::skip::{Calibration, MixedCalibration, Uniform};

/// Share of bytes of the cut that stand-ins are tried with, and shares of cuts alone that it is compared with.
const CUT: f32 = 0.28;
const ALONE: [f32; 2] = [0.25, 0.35];
/// Shares of blocks that stand-ins are tried at.
const STAND_INS: [f32; 5] = [0.01, 0.02, 0.04, 0.06, 0.08];

/// `None`: `found`, whose cuts and stand-ins the model is prepared for, has too little of either.
pub(super) fn learn(
    model: &Model,
    on: Compute<'_>,
    trials: &Trials<'_>,
    found: &Calibration,
    progress: Progress<'_>,
) -> Result<Option<MixedCalibration>> {
    let all = ALONE.len() + STAND_INS.len() + RATIOS.len();
    let mut done = 0;
    let mut run = |policy: Uniform| -> Result<Trial> {
        let trial = trials.run(model, on, Box::new(policy))?;
        done += 1;
        report(&mut *progress, Stage::Strengths, done, all)?;
        Ok(trial)
    };
    let (Some(cut), Some(stand_ins)) = (&found.cut, &found.stand_ins) else { return Ok(None) };
    let layers = 0..model.config().layers;
    let mut alone = Vec::new();
    for threshold in ALONE.iter().filter_map(|&ratio| cut.curve.strength(ratio)) {
        let trial = run(Uniform::columns(threshold, WARM_UP, layers.clone()))?;
        alone.push((trial.bytes, trial.kl.ln()));
    }
    let (&[first, second], Some(threshold)) = (&alone[..], cut.curve.strength(CUT)) else { return Ok(None) };
    let mut best: Option<(f64, f32)> = None;
    for below in STAND_INS.iter().filter_map(|&share| stand_ins.curve.strength(share)) {
        let trial = run(Uniform::mixed(below, threshold, WARM_UP, layers.clone()))?;
        let more = trial.kl.ln() - on_line(first, second, trial.bytes);
        if more.is_finite() && best.is_none_or(|(least, _)| more < least) {
            best = Some((more, below));
        }
    }
    let Some((_, below)) = best else { return Ok(None) };
    let mut found = MixedCalibration { offset: below - 2.0 * threshold.log2(), ..Default::default() };
    let mut measured = Vec::new();
    for threshold in RATIOS.iter().filter_map(|&ratio| cut.curve.strength(ratio)) {
        let trial = run(Uniform::mixed(found.below(threshold), threshold, WARM_UP, layers.clone()))?;
        measured.push((trial.bytes as f32, threshold));
    }
    found.curve = curve(measured);
    Ok(found.offset.is_finite().then_some(found))
}

/// The line through two points, at `x`.
fn on_line(first: (f64, f64), second: (f64, f64), x: f64) -> f64 {
    first.1 + (x - first.0) * (second.1 - first.1) / (second.0 - first.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_go_on() {
        assert_eq!(on_line((1.0, 2.0), (3.0, 6.0), 4.0), 8.0);
        assert!(on_line((1.0, 2.0), (1.0, 2.0), 4.0).is_nan(), "never the best");
    }
}
