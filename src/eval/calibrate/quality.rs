//! The quality of settings on held-out text, and the one that `--skip auto` takes.

use super::trials::{ALL, Measured, Trials};
use super::{CONTEXT, Progress, Result, Stage, report};
use crate::model::Model;
use crate::ops::Compute;
use crate::skip::{Calibration, Point, SkipError, SkipMode, SkipOptions, SkipPolicy};

/// Settings whose quality is measured.
pub(super) const POINTS: [(SkipMode, &[f32]); 9] = [
    (SkipMode::Cut, &[0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5]),
    (SkipMode::Neurons, &[0.1, 0.15, 0.2, 0.25, 0.3]),
    (SkipMode::StandIn, &[0.05, 0.1, 0.15, 0.2]),
    (SkipMode::Mixed, &[0.2, 0.25, 0.3, 0.35]),
    (SkipMode::FfnSkip, &[0.1, 0.2]),
    (SkipMode::Static, &[0.1, 0.2]),
    (SkipMode::Random, &[0.1]),
    (SkipMode::ShortGpt, &[0.1]),
    (SkipMode::SkipDecode, &[0.1]),
];
/// The policies whose deepest setting that is good enough is looked for, and how often the interval that holds it is halved.
const REFINED: [SkipMode; 4] = [SkipMode::Cut, SkipMode::Neurons, SkipMode::StandIn, SkipMode::Mixed];
const REFINEMENTS: usize = 2;

/// A policy at a `--skip-ratio`.
type Setting = (SkipMode, f32);

/// Measures the settings of `policies` on the held-out text.
pub(super) fn points(
    model: &Model,
    on: Compute<'_>,
    found: &Calibration,
    held_out: &[u32],
    policies: &[(SkipMode, &[f32])],
    progress: Progress<'_>,
) -> Result<Vec<Point>> {
    let settings = policies.iter().flat_map(|&(mode, ratios)| ratios.iter().map(move |&r| (mode, r)));
    let mut settings: Vec<Setting> = settings.collect();
    let refined: Vec<_> = policies.iter().map(|policy| policy.0).filter(|m| REFINED.contains(m)).collect();
    let windows = held_out.len() / CONTEXT;
    // The full model's probabilities of the text are more than is kept, so each round evaluates it again.
    let all = windows * (settings.len() + 1 + REFINEMENTS * (refined.len() + 1));
    let (mut done, mut points) = (0, Vec::new());
    for round in 0..=REFINEMENTS {
        if round > 0 {
            settings = refined.iter().filter_map(|&mode| Some((mode, between(&points, mode)?))).collect();
        }
        let mut step = || {
            done += 1;
            report(&mut *progress, Stage::Quality, done, all)
        };
        points.extend(measured(model, on, found, held_out, &settings, &mut step)?);
    }
    Ok(points)
}

/// The settings that the calibration reaches: each window is evaluated by the full model, and then with each of them.
fn measured(
    model: &Model,
    on: Compute<'_>,
    found: &Calibration,
    held_out: &[u32],
    settings: &[Setting],
    step: &mut dyn FnMut() -> Result<()>,
) -> Result<Vec<Point>> {
    let mut policies: Vec<(Setting, Box<dyn SkipPolicy>, Measured)> = Vec::new();
    for &(mode, ratio) in settings {
        let skip = SkipOptions { mode, ratio: Some(ratio), ..SkipOptions::default() };
        match skip.policy(&model.facts(), Some(found)) {
            Ok(policy) => policies.push(((mode, ratio), policy, Measured::default())),
            // A shallow model or a short curve does not reach every share, and what is not quantised cannot be cut.
            Err(SkipError::RatioTooHigh { .. } | SkipError::Uncalibrated { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    if policies.is_empty() || held_out.is_empty() {
        return Ok(Vec::new());
    }
    for window in held_out.chunks_exact(CONTEXT) {
        let trials = Trials::new(model, on, &[window], ALL)?;
        step()?;
        for (_, policy, measured) in &mut policies {
            trials.measure(model, on, policy.boxed_clone(), measured)?;
            step()?;
        }
    }
    Ok(policies.into_iter().map(|(setting, _, measured)| point(model, setting, measured)).collect())
}

fn point(model: &Model, (mode, ratio): Setting, measured: Measured) -> Point {
    let report = measured.report(model);
    let full = report.ppl_full.unwrap_or(report.ppl);
    Point {
        policy: mode.name().to_owned(),
        ratio,
        blocks: report.ffn_skipped as f32,
        bytes: report.ffn_bytes_skipped.clamp(0.0, 1.0) as f32,
        perplexity: (report.ppl / full) as f32,
        kl: report.kl_mean.unwrap_or(0.0) as f32,
        same_top1: report.same_top1.unwrap_or(1.0) as f32,
    }
}

/// In the order of [`POINTS`].
pub(super) fn sorted(mut points: Vec<Point>) -> Vec<Point> {
    points.sort_by(|a, b| order(a).cmp(&order(b)).then(a.ratio.total_cmp(&b.ratio)));
    points
}

/// Place of a point's policy in [`POINTS`].
fn order(point: &Point) -> Option<usize> {
    POINTS.iter().position(|(mode, _)| mode.name() == point.policy)
}

/// The ratio midway between the deepest setting of `mode` that is good enough for `--skip auto` and the next that is not.
fn between(points: &[Point], mode: SkipMode) -> Option<f32> {
    let of_mode = || points.iter().filter(|p| p.policy == mode.name());
    let deepest = of_mode().filter(|p| p.is_good()).map(|p| p.ratio).max_by(f32::total_cmp)?;
    let next = of_mode().map(|p| p.ratio).filter(|&r| r > deepest).min_by(f32::total_cmp)?;
    Some((deepest + next) / 2.0)
}

/// The point with the most bytes unread, of those that are good enough for `--skip auto`.
pub(super) fn best(points: &[Point]) -> Option<usize> {
    let good = points.iter().enumerate().filter(|(_, p)| p.is_good());
    good.max_by(|a, b| a.1.bytes.total_cmp(&b.1.bytes)).map(|(i, _)| i)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_takes_the_most_of_what_is_good() {
        let point = |bytes, kl| Point {
            policy: "cut".into(),
            ratio: bytes,
            bytes,
            perplexity: 1.01,
            kl,
            ..Point::default()
        };
        assert_eq!(best(&[point(0.1, 0.01), point(0.3, 0.039), point(0.4, 0.05)]), Some(1));
        assert_eq!(best(&[point(0.1, 0.3)]), None);
        assert_eq!(
            between(&[point(0.5, 0.5), point(0.25, 0.01), point(0.75, 0.9)], SkipMode::Cut),
            Some(0.375)
        );
        assert_eq!(between(&[point(0.1, 0.3)], SkipMode::Cut), None, "nothing is good");
        assert_eq!(between(&[point(0.1, 0.01)], SkipMode::Cut), None, "nothing is bad");
    }
}
