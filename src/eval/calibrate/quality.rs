//! The quality of settings on held-out text, and the one that `--skip auto` takes.

use std::cmp::Ordering;

use super::trials::{ALL, Measured, Trials};
use super::{CONTEXT, Progress, Result, Stage, report};
use crate::model::Model;
use crate::ops::Compute;
use crate::skip::{Calibration, Point, SkipChoice, SkipError, SkipMode, SkipOptions, SkipPolicy};

/// Settings whose quality is measured.
pub(super) const POINTS: [(SkipMode, &[f32]); 9] = [
    (SkipMode::Cut, &[0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5]),
    (SkipMode::Neurons, &[0.1, 0.15, 0.2, 0.25, 0.3]),
    (SkipMode::StandIn, &[0.05, 0.1, 0.15, 0.2]),
    (SkipMode::Mixed, &[0.2, 0.25, 0.3, 0.35, 0.4]),
    (SkipMode::FfnSkip, &[0.1, 0.2]),
    (SkipMode::Static, &[0.1, 0.2]),
    (SkipMode::Random, &[0.1]),
    (SkipMode::ShortGpt, &[0.1]),
    (SkipMode::SkipDecode, &[0.1]),
];
/// The policies whose deepest setting that is good enough is looked for, and how often the interval that holds it is halved.
const REFINED: [SkipMode; 4] = [SkipMode::Cut, SkipMode::Neurons, SkipMode::StandIn, SkipMode::Mixed];
const REFINEMENTS: usize = 2;

/// By how much a ratio is smaller than the deepest that is good enough, where the output matrix is left unread, too: that costs
/// some of what a setting may.
const LESS_WITH_OUTPUT: f32 = 0.01;

/// A policy at a `--skip-ratio`.
type Setting = (SkipChoice, f32);

/// Measures the settings of `policies` on the held-out text.
pub(super) fn points(
    model: &Model,
    on: Compute<'_>,
    found: &Calibration,
    held_out: &[u32],
    policies: &[(SkipMode, &[f32])],
    progress: Progress<'_>,
) -> Result<Vec<Point>> {
    let settings =
        policies.iter().flat_map(|&(mode, ratios)| ratios.iter().map(move |&r| (SkipChoice::from(mode), r)));
    let mut settings: Vec<Setting> = settings.collect();
    let refined: Vec<_> = policies.iter().map(|policy| policy.0).filter(|m| REFINED.contains(m)).collect();
    let windows = held_out.len() / CONTEXT;
    // The full model's probabilities of the text are more than is kept, so each round evaluates it again.
    let all = windows * (settings.len() + 1 + REFINEMENTS * (refined.len() + 1));
    let (mut done, mut points) = (0, Vec::new());
    for round in 0..=REFINEMENTS {
        if round > 0 {
            settings =
                refined.iter().filter_map(|&mode| Some((mode.into(), between(&points, mode)?))).collect();
        }
        let mut step = || {
            done += 1;
            report(&mut *progress, Stage::Quality, done, all)
        };
        points.extend(measured(model, on, found, held_out, &settings, &mut step)?);
    }
    Ok(points)
}

/// Measures what leaves most of the output matrix unread: alone, and beside the deepest setting of each policy that is good enough
/// for `--skip auto`. Nothing, where that cannot be.
pub(super) fn output_points(
    model: &Model,
    on: Compute<'_>,
    found: &Calibration,
    held_out: &[u32],
    progress: Progress<'_>,
) -> Result<Vec<Point>> {
    if found.output.is_none() {
        return Ok(Vec::new());
    }
    let beside =
        |mode| Some((SkipChoice { mode, output: true }, deepest(&found.points, mode)? - LESS_WITH_OUTPUT));
    let mut settings = vec![(SkipChoice::OUTPUT, 0.0)];
    settings.extend(REFINED.into_iter().filter_map(beside).filter(|setting| setting.1 > 0.0));
    let (mut done, all) = (0, held_out.len() / CONTEXT * (settings.len() + 1));
    let mut step = || {
        done += 1;
        report(&mut *progress, Stage::Quality, done, all)
    };
    measured(model, on, found, held_out, &settings, &mut step)
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
    for &(choice, ratio) in settings {
        let SkipChoice { mode, output } = choice;
        let with = (mode != SkipMode::Off).then_some(ratio);
        let skip = SkipOptions { mode, output, ratio: with, ..SkipOptions::default() };
        match skip.policy(&model.facts(), Some(found)) {
            Ok(policy) => policies.push(((choice, ratio), policy, Measured::default())),
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

fn point(model: &Model, (choice, ratio): Setting, measured: Measured) -> Point {
    let report = measured.report(model);
    let full = report.ppl_full.unwrap_or(report.ppl);
    Point {
        policy: choice.name().to_owned(),
        ratio,
        blocks: report.ffn_skipped as f32,
        bytes: report.ffn_bytes_skipped.clamp(0.0, 1.0) as f32,
        perplexity: (report.ppl / full) as f32,
        kl: report.kl_mean.unwrap_or(0.0) as f32,
        same_top1: report.same_top1.unwrap_or(1.0) as f32,
    }
}

/// In the order of [`POINTS`], and then what leaves the output matrix unread.
pub(super) fn sorted(mut points: Vec<Point>) -> Vec<Point> {
    points.sort_by(|a, b| order(a).cmp(&order(b)).then(a.ratio.total_cmp(&b.ratio)));
    points
}

/// Whether the output matrix is left unread, and the place of what is done about FFNs in [`POINTS`].
fn order(point: &Point) -> (bool, Option<usize>) {
    let SkipChoice { mode, output } = point.choice();
    (output, POINTS.iter().position(|&(other, _)| other == mode))
}

/// The ratio midway between the deepest setting of `mode` that is good enough for `--skip auto` and the next that is not.
fn between(points: &[Point], mode: SkipMode) -> Option<f32> {
    let deepest = deepest(points, mode)?;
    let deeper = points.iter().filter(|p| p.policy == mode.name() && p.ratio > deepest);
    let next = deeper.map(|p| p.ratio).min_by(f32::total_cmp)?;
    Some((deepest + next) / 2.0)
}

/// The largest ratio of `mode` that is good enough for `--skip auto`.
fn deepest(points: &[Point], mode: SkipMode) -> Option<f32> {
    let good = points.iter().filter(|p| p.policy == mode.name() && p.is_good());
    good.map(|p| p.ratio).max_by(f32::total_cmp)
}

/// The point with the most FFN bytes unread, of those that are good enough for `--skip auto`; if there are any that leave the
/// output matrix unread, too, of these.
pub(super) fn best(points: &[Point]) -> Option<usize> {
    let good = points.iter().enumerate().filter(|(_, p)| p.is_good());
    let key = |p: &Point| (p.choice().output, p.bytes);
    good.max_by(|a, b| key(a.1).partial_cmp(&key(b.1)).unwrap_or(Ordering::Equal)).map(|(i, _)| i)
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
        let with_output = |bytes, kl| Point { policy: "cut+output".into(), ..point(bytes, kl) };
        assert_eq!(best(&[point(0.3, 0.039), with_output(0.28, 0.039), with_output(0.2, 0.01)]), Some(1));
        assert_eq!(
            between(&[point(0.5, 0.5), point(0.25, 0.01), point(0.75, 0.9)], SkipMode::Cut),
            Some(0.375)
        );
        assert_eq!(between(&[point(0.1, 0.3)], SkipMode::Cut), None, "nothing is good");
        assert_eq!(between(&[point(0.1, 0.01)], SkipMode::Cut), None, "nothing is bad");
    }
}
