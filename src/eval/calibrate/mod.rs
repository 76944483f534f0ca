//! Calibration: what a text tells about skipping in a model, for [`Calibration`] files.
//!
//! The first windows of the text are held out: on them the quality of what the rest taught is measured. Six stages:
//! the full model's activations (`gather`); what each FFN is worth, by skipping it alone; what an error of each of its
//! sides costs, by cutting it alone (`sense`); what can take its place (`stand_in`); the strengths at which policies skip
//! given shares (`mixed`: of stand-ins and cuts together); the quality of some of those settings (`quality`). What settings do
//! to the model is measured on a few windows (`trials`).

mod depth;
mod gather;
mod linear;
mod mixed;
mod output;
mod quality;
mod sense;
mod stand_in;
mod trials;
mod weigh;

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use super::perplexity::{EvalError, Exact};
use crate::model::{ColumnForms, FfnStep, KvType, Layer, Model, ModelError, State};
use crate::ops::Compute;
use crate::skip::{
    Calibration, Curve, CutCalibration, CutPlan, Decision, FfnSkip, LayerCut, Never, SkipError, SkipMode,
    SkipPolicy, StandInCalibration, Uniform,
};
use gather::{Gatherer, LayerSums, widened};
use output::OutputInputs;
use quality::{POINTS, best, output_points, points, sorted};
use trials::{Alone, COMPARED, Trials};
use weigh::{Shares, gate_weights, layer_cut, trim_centres};

/// Tokens of a window.
const CONTEXT: usize = 512;
/// Tokens of each window that are neither skipped nor counted: the default warm-up.
const WARM_UP: usize = 25;
/// Windows on which many settings are tried.
const TRIALS: usize = 2;
/// Shares that the policies' strengths are found for.
const RATIOS: [f32; 12] = [0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6];
/// Largest weight of a cut.
const WEIGHT_SCALE: f32 = 1024.0;
/// Share of bytes left out at which centres are taken, and how often: each time what is left out changes a little.
const TRIM_RATIO: f64 = 0.3;
const TRIM_ROUNDS: usize = 3;

/// How much text is used.
#[derive(Clone, Debug)]
pub struct CalibrateOptions {
    /// Windows of 512 tokens that the full model's activations are taken from, as many from each text.
    pub windows: usize,
    /// Held-out windows, at the beginning of the first text, on which quality is measured; 0 measures none.
    pub quality_windows: usize,
    /// Name of the text or texts, for the file.
    pub text: String,
}

/// What is being done, for progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Stage {
    Activations,
    Damage,
    Sensitivity,
    StandIns,
    Strengths,
    Quality,
}

/// Errors of a calibration.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum CalibrateError {
    #[error(transparent)]
    Eval(#[from] EvalError),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Skip(#[from] SkipError),
    #[error(
        "text {text} has {tokens} tokens; calibration needs {needed}: give a longer one or fewer windows"
    )]
    TooShort { text: usize, tokens: usize, needed: usize },
    #[error("the calibration to complete has nothing on cuts: make a new one")]
    NoCuts,
    #[error(
        "the output matrix is not quantised, or has so few bits that a copy in 4 bits is hardly smaller: --skip output cannot be"
    )]
    NoOutput,
    #[error("interrupted")]
    Interrupted,
}

type Result<T> = std::result::Result<T, CalibrateError>;

/// Called with the stage, its steps done and all of them; false stops the calibration.
pub type Progress<'a> = &'a mut dyn FnMut(Stage, usize, usize) -> bool;

/// Calibrates `model` on the tokens of some texts, and leaves it prepared for cuts, by rows, and for stand-ins.
pub fn calibrate(
    model: &mut Model,
    on: Compute<'_>,
    texts: &[Vec<u32>],
    options: &CalibrateOptions,
    progress: Progress<'_>,
) -> Result<Calibration> {
    let (held_out, windows) = divided(texts, options)?;
    let (mut found, layers, targets) = begun(model, on, &windows, options, progress)?;
    let trials = Trials::new(model, on, &windows[..TRIALS.min(windows.len())], COMPARED)?;
    found.damage = damages(model, on, &trials.first(), progress)?;
    found.cold = cold_regions(&found.cosines, &found.damage);
    found.ffn_skip = ffn_skip_curve(model, on, &trials, &layers, found.cold, progress)?;
    found.cut = Some(cuts(model, on, &trials, (&layers, &targets), progress)?);
    found.stand_ins = Some(stand_ins(model, on, &trials, &layers, progress)?);
    found.mixed = mixed::learn(model, on, &trials, &found, progress)?;
    found.points = points(model, on, &found, held_out, &POINTS, progress)?;
    with_output_points(model, on, found, held_out, progress)
}

/// What `output` needs, and the cosines that come with it: one pass over the windows, and one over those held out.
///
/// # Errors
/// As [`calibrate`]; or the output matrix is none that could be left unread.
pub fn calibrate_output(
    model: &mut Model,
    on: Compute<'_>,
    texts: &[Vec<u32>],
    options: &CalibrateOptions,
    progress: Progress<'_>,
) -> Result<Calibration> {
    if model.shortlist_bytes().is_none() {
        return Err(CalibrateError::NoOutput);
    }
    let (held_out, windows) = divided(texts, options)?;
    let (mut found, layers, _) = begun(model, on, &windows, options, progress)?;
    found.damage = vec![0.0; layers.len()];
    found.cold = cold_regions(&found.cosines, &found.damage);
    with_output_points(model, on, found, held_out, progress)
}

/// What the activations tell at once, and what [`gather`] gives for the rest.
fn begun(
    model: &Model,
    on: Compute<'_>,
    windows: &[&[u32]],
    options: &CalibrateOptions,
    progress: Progress<'_>,
) -> Result<(Calibration, Vec<LayerSums>, Vec<f32>)> {
    let (layers, targets, inputs) = gather(model, on, windows, progress)?;
    let found = Calibration {
        model: model.weights().fingerprint(),
        text: options.text.clone(),
        tokens: (options.windows * CONTEXT) as u32,
        cosines: layers.iter().map(|l| l.mean_cosine() as f32).collect(),
        influence: layers.iter().map(LayerSums::influence).collect(),
        output: inputs.learn(model, on),
        ..Calibration::default()
    };
    Ok((found, layers, targets))
}

/// Measures the points that leave the output matrix unread, and chooses among all.
fn with_output_points(
    model: &mut Model,
    on: Compute<'_>,
    mut found: Calibration,
    held_out: &[u32],
    progress: Progress<'_>,
) -> Result<Calibration> {
    if let Some(output) = &found.output {
        model.prepare_shortlist(on, output.clone())?;
    }
    found.points.retain(|point| !point.choice().output);
    let measured = output_points(model, on, &found, held_out, progress)?;
    found.points.extend(measured);
    found.points = sorted(found.points);
    found.auto = best(&found.points);
    Ok(found)
}

/// Adds to a calibration of `model` what it lacks, from `texts`: what a file of an older version has not learnt about
/// coarse columns, neurons, stand-ins, these together with cuts, or the output matrix. The rest stays. Nothing is lacking: it is
/// given back.
///
/// # Errors
/// As [`calibrate`]; or it has no cuts to begin with.
pub fn complete(
    model: &mut Model,
    on: Compute<'_>,
    mut known: Calibration,
    texts: &[Vec<u32>],
    options: &CalibrateOptions,
    progress: Progress<'_>,
) -> Result<Calibration> {
    let Some(cut) = known.cut.as_mut() else { return Err(CalibrateError::NoCuts) };
    if cut.plan.coarse == 0.0 && can_be_coarse(model) {
        // Other thresholds leave out as much, and at another cost.
        cut.plan.coarse = CutPlan::COARSE;
        (cut.curve, cut.neurons, known.mixed) = Default::default();
        let as_before = |mode| !matches!(mode, SkipMode::Cut | SkipMode::Neurons | SkipMode::Mixed);
        known.points.retain(|point| as_before(point.choice().mode));
    }
    let mut lacking = Vec::new();
    lacking.extend(cut.curve.ratios.is_empty().then_some(SkipMode::Cut));
    lacking.extend(cut.neurons.ratios.is_empty().then_some(SkipMode::Neurons));
    lacking.extend(known.stand_ins.is_none().then_some(SkipMode::StandIn));
    lacking.extend(known.mixed.is_none().then_some(SkipMode::Mixed));
    let lacks_output = known.output.is_none() && model.shortlist_bytes().is_some();
    if lacking.is_empty() && !lacks_output {
        return Ok(known);
    }
    let lacks = |mode| lacking.contains(&mode);
    let (held_out, windows) = divided(texts, options)?;
    let trials = Trials::new(model, on, &windows[..TRIALS.min(windows.len())], COMPARED)?;
    let lacks_cuts = lacks(SkipMode::Cut) || lacks(SkipMode::Neurons);
    if lacks_cuts || lacks(SkipMode::StandIn) || lacks_output {
        let (layers, _, inputs) = gather(model, on, &windows, progress)?;
        if lacks_output {
            known.output = inputs.learn(model, on);
        }
        if lacks_cuts {
            complete_cuts(model, on, &trials, &layers, cut, progress)?;
        }
        if lacks(SkipMode::StandIn) {
            known.stand_ins = Some(stand_ins(model, on, &trials, &layers, progress)?);
        }
    }
    model.prepare_cuts(on, cut.plan.clone(), ColumnForms::None, |_, _| {})?;
    if let Some(found) = &known.stand_ins {
        model.prepare_stand_ins(found.layers.clone())?;
    }
    if lacks(SkipMode::Mixed) {
        known.mixed = mixed::learn(model, on, &trials, &known, progress)?;
    }
    let lacking: Vec<_> = POINTS.into_iter().filter(|(mode, _)| lacking.contains(mode)).collect();
    let measured = points(model, on, &known, held_out, &lacking, progress)?;
    known.points.extend(measured);
    with_output_points(model, on, known, held_out, progress)
}

/// Adds the curves that are lacking, and what `neurons` needs beside what is known about columns.
fn complete_cuts(
    model: &mut Model,
    on: Compute<'_>,
    trials: &Trials<'_>,
    layers: &[LayerSums],
    cut: &mut CutCalibration,
    progress: Progress<'_>,
) -> Result<()> {
    for ((cut, layer), sums) in cut.plan.layers.iter_mut().zip(model.layers()).zip(layers) {
        if let Some(cut) = cut.as_mut().filter(|cut| cut.gate.is_empty()) {
            cut.gate = gate_weights(&layer.ffn, sums, &cut.inner.weight);
        }
    }
    cut.plan = cut.plan.as_stored();
    model.prepare_cuts(on, cut.plan.clone(), ColumnForms::None, |_, _| {})?;
    let lacking = [&cut.curve, &cut.neurons].into_iter().filter(|curve| curve.ratios.is_empty()).count();
    let mut steps = Steps { done: 0, all: lacking * RATIOS.len(), progress };
    if cut.curve.ratios.is_empty() {
        let shares = Shares::of_columns(model, &cut.plan, layers);
        cut.curve = cut_curve(model, on, trials, &shares, Uniform::columns, &mut steps)?;
    }
    if cut.neurons.ratios.is_empty() {
        let shares = Shares::of_neurons(model, &cut.plan, layers);
        cut.neurons = cut_curve(model, on, trials, &shares, Uniform::neurons, &mut steps)?;
    }
    Ok(())
}

/// Whether any columns can be read coarsely.
fn can_be_coarse(model: &Model) -> bool {
    let factors = |layer: &Layer| layer.coarse(CutPlan::COARSE).map(|(factor, _)| factor);
    model.layers().iter().flat_map(factors).any(|factor| factor > 0.0)
}

/// What can take each FFN's place, and the thresholds for shares of blocks, measured: a stream with stand-ins is another.
fn stand_ins(
    model: &mut Model,
    on: Compute<'_>,
    trials: &Trials<'_>,
    layers: &[LayerSums],
    progress: Progress<'_>,
) -> Result<StandInCalibration> {
    let found = stand_in::learn(model, on, &trials.first(), layers, &mut *progress)?;
    model.prepare_stand_ins(found.clone())?;
    let learnt_from = layers[0].cosines.len() / (CONTEXT - WARM_UP) * CONTEXT;
    let tried = trials.tokens() as f64 / learnt_from as f64;
    let foretold = stand_in::Foretold::of(on, layers, &found, tried);
    let mut measured = Vec::new();
    for (i, &ratio) in RATIOS.iter().enumerate() {
        let below = foretold.threshold(ratio);
        let policy = Uniform::stand_ins(below, WARM_UP, 0..model.config().layers);
        let trial = trials.run(model, on, Box::new(policy))?;
        // A few windows are not like all of them: theirs tell how many more or fewer there are than foretold.
        let (all, tried) = foretold.shares(below);
        measured.push(((trial.blocks * all / tried.max(f64::MIN_POSITIVE)) as f32, below));
        report(&mut *progress, Stage::Strengths, i + 1, RATIOS.len())?;
    }
    Ok(StandInCalibration { layers: found, curve: curve(measured) })
}

/// The text that is held out, and the windows to learn from: those of the texts in turn.
fn divided<'t>(texts: &'t [Vec<u32>], options: &CalibrateOptions) -> Result<(&'t [u32], Vec<&'t [u32]>)> {
    let held_out = options.quality_windows * CONTEXT;
    let share = options.windows.max(TRIALS).div_ceil(texts.len().max(1));
    let too_short = |i, tokens, needed| Err(CalibrateError::TooShort { text: i + 1, tokens, needed });
    let Some(first) = texts.first().filter(|_| options.windows > 0) else {
        return too_short(0, 0, held_out + share * CONTEXT);
    };
    let mut windows = Vec::new();
    for (i, text) in texts.iter().enumerate() {
        let from = if i == 0 { held_out } else { 0 };
        let needed = from + share * CONTEXT;
        if text.len() < needed {
            return too_short(i, text.len(), needed);
        }
        windows.push(spread(&text[from..], share));
    }
    let in_turn = (0..share).flat_map(|i| windows.iter().map(move |of_text| of_text[i]));
    Ok((&first[..held_out], in_turn.take(options.windows).collect()))
}

/// `n` windows of `text`, evenly spread.
fn spread(text: &[u32], n: usize) -> Vec<&[u32]> {
    let all: Vec<&[u32]> = text.chunks_exact(CONTEXT).collect();
    (0..n).map(|i| all[i * all.len() / n]).collect()
}

fn state(model: &Model, on: Compute<'_>, policy: Box<dyn SkipPolicy>) -> State {
    State::new(model, on.team, (CONTEXT, CONTEXT), KvType::F16, policy)
}

/// What the full model computes over `windows`; how deep each traced token should be cut, on average as deep as
/// all ([`depth::target`]); and what its output matrix is multiplied with.
fn gather(
    model: &Model,
    on: Compute<'_>,
    windows: &[&[u32]],
    progress: Progress<'_>,
) -> Result<(Vec<LayerSums>, Vec<f32>, OutputInputs)> {
    let config = model.config();
    let text = (windows.len(), CONTEXT, WARM_UP);
    let gatherer = Gatherer::new(config.layers, (config.embedding, config.ffn), text);
    let trace_every = gatherer.trace_every;
    let shared = Arc::new(Mutex::new(gatherer));
    let (mut doubts, mut inputs) = (Vec::new(), OutputInputs::new(config.embedding));
    let mut state = state(model, on, Box::new(Never));
    state.set_probe(Some(Box::new(shared.clone())));
    for (i, window) in windows.iter().enumerate() {
        state.truncate(0);
        model.forward(on, &mut state, window, FfnStep::Full)?;
        doubts.extend(doubts_of(model, on, &mut state));
        inputs.add(on, &model.output_inputs(on, &state, WARM_UP..CONTEXT));
        report(&mut *progress, Stage::Activations, i + 1, windows.len())?;
    }
    let mut gatherer = shared.lock().unwrap_or_else(PoisonError::into_inner);
    let mut targets: Vec<f32> = doubts.into_iter().step_by(trace_every).map(depth::target).collect();
    let mean = targets.iter().sum::<f32>() / targets.len().max(1) as f32;
    targets.iter_mut().for_each(|target| *target -= mean);
    Ok((std::mem::take(&mut gatherer.layers), targets, inputs))
}

/// `1 - sum p^2` over the successors of each token past the warm-up of the window that `state` holds.
fn doubts_of(model: &Model, on: Compute<'_>, state: &mut State) -> Vec<f32> {
    let vocab = model.config().vocab;
    let mut doubts = Vec::new();
    for from in (WARM_UP..CONTEXT).step_by(COMPARED) {
        let rows = from..(from + COMPARED).min(CONTEXT);
        let n = rows.len();
        let mut p = vec![0.0; n * vocab];
        model.logits_of(on, state, rows, &mut p);
        Exact::of(on, &mut p, &vec![0; n]);
        doubts.extend(p.chunks_exact(vocab).map(|p| 1.0 - on.kernels.dot_f32(p, p)));
    }
    doubts
}

fn report(progress: Progress<'_>, stage: Stage, done: usize, all: usize) -> Result<()> {
    if progress(stage, done, all) { Ok(()) } else { Err(CalibrateError::Interrupted) }
}

/// The divergence that skipping each FFN alone causes.
fn damages(model: &Model, on: Compute<'_>, trials: &Trials<'_>, progress: Progress<'_>) -> Result<Vec<f32>> {
    let layers = model.config().layers;
    let mut damage = Vec::new();
    for layer in 0..layers {
        let skipped = trials.run(model, on, Box::new(Alone::new(layer, Decision::Skip)))?;
        damage.push(skipped.kl as f32);
        report(&mut *progress, Stage::Damage, layer + 1, layers)?;
    }
    Ok(damage)
}

/// Cuts of all layers. Weights are in units of the largest, so that few bits hold them.
fn plan(
    on: Compute<'_>,
    model: &mut Model,
    trials: &Trials<'_>,
    (layers, targets): (&[LayerSums], &[f32]),
    progress: Progress<'_>,
) -> Result<CutPlan> {
    let parts = model.layers().iter().zip(layers);
    let mut cuts: Vec<_> = parts.map(|(layer, sums)| layer_cut(on, &layer.ffn, sums)).collect();
    sense::weigh(model, on, trials, layers, &mut cuts, progress)?;
    on.team.for_plain_tiles(&mut cuts, 1, (1, 1), |mut tile| {
        for layer in tile.rows() {
            tile.row(layer)[0].depth = depth::fit(on, &widened(&layers[layer].traced), targets).0;
        }
    });
    let weights = |cut: &LayerCut| [cut.inputs.weight.clone(), cut.inner.weight.clone()].concat();
    let largest = cuts.iter().flat_map(weights).fold(f32::MIN_POSITIVE, f32::max);
    for ((cut, sums), layer) in cuts.iter_mut().zip(layers).zip(model.layers()) {
        let weights = cut.inputs.weight.iter_mut().chain(&mut cut.inner.weight);
        weights.for_each(|weight| *weight *= WEIGHT_SCALE / largest);
        cut.gate = gate_weights(&layer.ffn, sums, &cut.inner.weight);
    }
    let mut plan = CutPlan { coarse: CutPlan::COARSE, layers: cuts.into_iter().map(Some).collect() };
    for _ in 0..TRIM_ROUNDS {
        let threshold = Shares::of_columns(model, &plan, layers).threshold(TRIM_RATIO).unwrap_or(0.0);
        let cuts = plan.layers.iter_mut().flatten();
        cuts.zip(layers).for_each(|(cut, sums)| trim_centres(cut, sums, [threshold; 2]));
    }
    Ok(plan.as_stored())
}

/// First layer that may be skipped, and the first after the last: from either end inward, a layer is cold while its
/// FFN turns the stream (`1 - cosine`), or hurts when skipped alone, more than twice as much as the median FFN.
pub(crate) fn cold_regions(cosines: &[f32], damage: &[f32]) -> (usize, usize) {
    let turns: Vec<f32> = cosines.iter().map(|c| 1.0 - c).collect();
    let (turn, hurt) = (2.0 * median(&turns), 2.0 * median(damage));
    let cold = |layer: &usize| turns[*layer] > turn || damage[*layer] > hurt;
    let start = (0..turns.len()).take_while(cold).count();
    let end = turns.len() - (start..turns.len()).rev().take_while(cold).count();
    (start, end)
}

fn median(values: &[f32]) -> f32 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f32::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(0.0)
}

/// Thresholds of the paper's rule: guessed from the cosines of the full model, their shares then measured, since a
/// stream with skips has other cosines.
fn ffn_skip_curve(
    model: &Model,
    on: Compute<'_>,
    trials: &Trials<'_>,
    layers: &[LayerSums],
    cold: (usize, usize),
    progress: Progress<'_>,
) -> Result<Curve> {
    let mut measured = Vec::new();
    let shares = RATIOS.iter().map(|&ratio| guess_threshold(layers, cold, ratio));
    for (i, threshold) in shares.enumerate() {
        let trial = trials.run(model, on, Box::new(FfnSkip::new(threshold, 1, WARM_UP, cold)))?;
        measured.push((trial.blocks as f32, threshold));
        report(&mut *progress, Stage::Strengths, i + 1, 3 * RATIOS.len())?;
    }
    Ok(curve(measured))
}

/// The threshold with which the rule, k = 1, would skip `ratio` of the blocks if the cosines were those of the full
/// model.
fn guess_threshold(layers: &[LayerSums], cold: (usize, usize), ratio: f32) -> f32 {
    let share = |threshold: f32| {
        let tokens = layers.first().map_or(0, |l| l.cosines.len());
        let mut skipped = 0;
        for t in 0..tokens {
            let mut layer = cold.0;
            while layer < cold.1 {
                let fires = layers[layer].cosines[t] >= threshold;
                skipped += usize::from(fires && layer + 1 < cold.1);
                layer += if fires { 2 } else { 1 };
            }
        }
        skipped as f32 / (tokens * layers.len()).max(1) as f32
    };
    let (mut low, mut high) = (-1.0f32, 1.0f32);
    for _ in 0..24 {
        let middle = (low + high) / 2.0;
        *(if share(middle) > ratio { &mut low } else { &mut high }) = middle;
    }
    high
}

/// Rising shares with their strengths; shares that do not rise are dropped.
fn curve(mut measured: Vec<(f32, f32)>) -> Curve {
    measured.retain(|(ratio, _)| *ratio > 0.0 && *ratio <= 1.0);
    measured.sort_by(|a, b| a.0.total_cmp(&b.0));
    measured.dedup_by(|b, a| b.0 <= a.0);
    let (ratios, strengths) = measured.into_iter().unzip();
    Curve { ratios, strengths }
}

fn cuts(
    model: &mut Model,
    on: Compute<'_>,
    trials: &Trials<'_>,
    (layers, targets): (&[LayerSums], &[f32]),
    progress: Progress<'_>,
) -> Result<CutCalibration> {
    let plan = plan(on, model, &trials.first(), (layers, targets), &mut *progress)?;
    model.prepare_cuts(on, plan.clone(), ColumnForms::None, |_, _| {})?;
    // The curve of `ffn-skip` was the first.
    let mut steps = Steps { done: RATIOS.len(), all: 3 * RATIOS.len(), progress };
    let shares = Shares::of_columns(model, &plan, layers);
    let columns = cut_curve(model, on, trials, &shares, Uniform::columns, &mut steps)?;
    let shares = Shares::of_neurons(model, &plan, layers);
    let neurons = cut_curve(model, on, trials, &shares, Uniform::neurons, &mut steps)?;
    Ok(CutCalibration { plan, curve: columns, neurons })
}

/// Steps of [`Stage::Strengths`].
struct Steps<'p> {
    done: usize,
    all: usize,
    progress: Progress<'p>,
}

/// Thresholds and the shares that they leave out, measured.
fn cut_curve(
    model: &Model,
    on: Compute<'_>,
    trials: &Trials<'_>,
    shares: &Shares,
    policy: fn(f32, usize, Range<usize>) -> Uniform,
    steps: &mut Steps<'_>,
) -> Result<Curve> {
    let mut measured = Vec::new();
    for &ratio in &RATIOS {
        if let Some(threshold) = shares.threshold(f64::from(ratio)) {
            let policy = policy(threshold, WARM_UP, 0..model.config().layers);
            let trial = trials.run(model, on, Box::new(policy))?;
            measured.push((trial.bytes as f32, threshold));
        }
        steps.done += 1;
        report(&mut *steps.progress, Stage::Strengths, steps.done, steps.all)?;
    }
    Ok(curve(measured))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cold_regions_are_at_the_ends_only() {
        let cosines = [0.1, 0.96, 0.97, 0.5, 0.97, 0.96, 0.96, 0.8];
        let damage = [9.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.3, 0.1];
        // Layer 6 hurts, layer 7 turns, layer 3 turns but is in the middle.
        assert_eq!(cold_regions(&cosines, &damage), (1, 6));
        assert_eq!(cold_regions(&[0.9; 4], &[0.1; 4]), (0, 4));
    }

    #[test]
    fn guesses_skip_as_often_as_asked() {
        let cosines =
            |seed: usize| (0..400).map(move |t| ((t * 7919 + seed * 104_729) % 1000) as f32 / 1000.0);
        let layers: Vec<LayerSums> =
            (0..20).map(|l| LayerSums { cosines: cosines(l).collect(), ..LayerSums::default() }).collect();
        let threshold = guess_threshold(&layers, (2, 18), 0.2);
        let mut policy = FfnSkip::new(threshold, 1, 0, (2, 18));
        let mut skipped = 0;
        for t in 0..400 {
            policy.begin_token(t);
            for (l, layer) in layers.iter().enumerate() {
                match policy.decide(l) {
                    crate::skip::Decision::Skip => skipped += 1,
                    _ => policy.observe(l, layer.cosines[t]),
                }
            }
        }
        let share = skipped as f64 / 8000.0;
        assert!((share - 0.2).abs() < 0.005, "{share}");
    }

    #[test]
    fn as_much_is_learnt_from_each_text() {
        let text = |first: u32, windows: u32| (first..first + windows * CONTEXT as u32).collect::<Vec<_>>();
        let options = CalibrateOptions { windows: 5, quality_windows: 1, text: "two texts".into() };
        let texts = [text(0, 7), text(100_000, 3)];
        let (held_out, windows) = divided(&texts, &options).unwrap();
        assert_eq!(held_out, &texts[0][..CONTEXT]);
        let places: Vec<u32> = windows.iter().map(|w| w[0] / CONTEXT as u32).collect();
        let other = 100_000 / CONTEXT as u32;
        assert_eq!(places, [1, other, 3, other + 1, 5], "windows of both in turn, spread over each");
        assert!(windows.iter().all(|w| w.len() == CONTEXT));

        let short = |texts: &[Vec<u32>]| divided(texts, &options).unwrap_err().to_string();
        let error = short(&[text(0, 9), text(0, 2)]);
        assert!(error.contains("text 2 has 1024 tokens; calibration needs 1536"), "{error}");
        let error = short(&[text(0, 2), text(0, 9)]);
        assert!(error.contains("text 1 has 1024 tokens; calibration needs 2048"), "{error}");
        assert!(short(&[]).contains("text 1 has 0 tokens"));
    }

    #[test]
    fn curves_rise() {
        let c = curve(vec![(0.3, 1.0), (0.1, 3.0), (0.1, 2.0), (0.0, 9.0)]);
        assert_eq!((c.ratios, c.strengths), (vec![0.1, 0.3], vec![3.0, 1.0]));
    }
}
