//! What leaving FFN weights unread gains, whatever it costs in quality, beside the gain that the unread bytes would
//! give if reading were all: decoding with a forced share of the FFN blocks skipped, or stood in for, with a forced share
//! of inputs and neurons cut by columns, both together, and of neurons by rows of up and columns of down; and with most of the output
//! matrix left unread.
//!
//! `SKIFF_BENCH_MODELS` names files to measure, with colons; else a synthetic model and the default one. Columns that matter
//! little are read coarsely, as calibration has it; with `SKIFF_BENCH_COARSE=0` they are all read in full or not at all.

mod common;

use std::collections::HashMap;
use std::hint::black_box;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use common::{best, decode, distance, ids, prompt, state};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use skiff::model::{ColumnForms, FfnRows, Matrices, Model, Probe, State};
use skiff::ops::{Compute, Inputs};
use skiff::skip::{
    Cut, CutPlan, Decision, FfnSkip, LayerCut, Never, OutputCalibration, Shortlisting, SkipPolicy, StandIn,
};
use skiff::threads::{Team, default_threads};

/// Tokens of a turn: with four layers, 10 % of their FFNs is a whole number.
const TOKENS: usize = 10;
/// Shares of the FFN blocks that are skipped.
const PERCENT: [usize; 3] = [10, 20, 30];
/// Shares that stand-ins take the place of.
const STAND_INS: [usize; 3] = [0, 10, 30];
/// Shares of the FFN weights that cuts aim at.
const CUTS: [f32; 5] = [0.0, 0.2, 0.3, 0.4, 0.5];
/// The same of rows of up and columns of down.
const NEURONS: [f32; 3] = [0.0, 0.2, 0.3];
/// Share of the columns left out with coarse ones beside them, in units of what it is without, for as many bytes unread:
/// magnitudes are about normally distributed.
const OUT_BESIDE_COARSE: f32 = 0.55;
/// Stand-ins in percent of the FFNs, with cuts of this share of the others.
const MIXED: (usize, f32) = (10, 0.3);
/// Turns of the comparison, if `SKIFF_BENCH_ROUNDS` does not say otherwise.
const ROUNDS: usize = 9;

/// Decides `taken` about `percent` of all FFNs, evenly spread over layers and tokens, and `otherwise` about the others.
#[derive(Clone)]
struct Forced {
    percent: usize,
    decisions: usize,
    taken: Decision,
    otherwise: Decision,
}

impl SkipPolicy for Forced {
    fn name(&self) -> &'static str {
        "forced"
    }

    fn begin_token(&mut self, _: usize) {}

    fn decide(&mut self, _: usize) -> Decision {
        let so_far = |decisions: usize| decisions * self.percent / 100;
        let skip = so_far(self.decisions + 1) > so_far(self.decisions);
        self.decisions += 1;
        if skip { self.taken } else { self.otherwise }
    }

    fn reset(&mut self) {
        self.decisions = 0;
    }

    fn boxed_clone(&self) -> Box<dyn SkipPolicy> {
        Box::new(self.clone())
    }
}

fn forced(percent: usize) -> Box<dyn SkipPolicy> {
    Box::new(Forced { percent, decisions: 0, taken: Decision::Skip, otherwise: Decision::Run })
}

/// Stand-ins for `percent` of the FFNs; the probes of all are asked.
fn standing_in(percent: usize) -> Forced {
    let [taken, otherwise] =
        [f32::INFINITY, f32::NEG_INFINITY].map(|below| Decision::StandIn { below, otherwise: None });
    Forced { percent, decisions: 0, taken, otherwise }
}

/// Of the shape that calibration gives them, and little weight.
fn stand_ins(model: &Model) -> Vec<StandIn> {
    let config = model.config();
    let (d, rank) = (config.embedding, (config.ffn / 16).clamp(32, 256) / 32 * 32);
    let wave = |n: usize, size: f32| (0..n).map(|i| size * (i as f32).sin()).collect::<Vec<f32>>();
    let one = StandIn::new(&wave(d, 1.0), 0.0, &wave(d, 1e-2), &wave(rank * d, 1e-2), &wave(d * rank, 1e-2));
    vec![one; config.layers]
}

/// The output matrix shortlisted, all FFNs in full.
fn shortlisting() -> Box<dyn SkipPolicy> {
    Box::new(Shortlisting { name: "output", ffns: Box::new(Never) })
}

/// No centre, and the first axes for directions: as much to compute as with what calibration finds.
fn output_inputs(embedding: usize) -> OutputCalibration {
    let axis = |i: usize| (0..embedding).map(move |j| f32::from(u8::from(i == j)));
    let directions = (0..OutputCalibration::DIRECTIONS).flat_map(axis).collect();
    OutputCalibration { centre: vec![0.0; embedding], directions }
}

/// Cuts every layer by thresholds of its own, but where another policy has stand-ins.
#[derive(Clone)]
struct ForcedCut {
    cuts: Vec<Cut>,
    stand_ins: Option<Forced>,
}

impl SkipPolicy for ForcedCut {
    fn name(&self) -> &'static str {
        "forced cut"
    }

    fn begin_token(&mut self, _: usize) {}

    fn decide(&mut self, layer: usize) -> Decision {
        let cut = self.cuts[layer];
        match self.stand_ins.as_mut().map(|stand_ins| stand_ins.decide(layer)) {
            Some(Decision::StandIn { below, .. }) => Decision::StandIn { below, otherwise: Some(cut) },
            _ => Decision::Cut(cut),
        }
    }

    fn reset(&mut self) {
        self.stand_ins.iter_mut().for_each(|stand_ins| stand_ins.reset());
    }

    fn boxed_clone(&self) -> Box<dyn SkipPolicy> {
        Box::new(self.clone())
    }
}

/// Gathers the magnitudes of what meets gate and up, and down, and of `silu(gate)`.
#[derive(Default)]
struct Magnitudes {
    inputs: HashMap<(usize, Matrices), Vec<f32>>,
    gates: HashMap<usize, Vec<f32>>,
    /// Share of the columns of gate and up, and of down, that are left out to save as much as one of 1 does without coarse ones.
    out: [f32; 2],
}

impl Probe for Magnitudes {
    fn matmul(&mut self, layer: usize, matrices: Matrices, x: &Inputs) {
        self.inputs.entry((layer, matrices)).or_default().extend(x.values().iter().map(|v| v.abs()));
    }

    fn wants_gate_up(&self) -> bool {
        true
    }

    fn ffn(&mut self, layer: usize, rows: FfnRows<'_>) {
        let ffn = rows.inner.len() / rows.rows.len();
        let gates = rows.gate_up.chunks_exact(ffn).step_by(2).flatten();
        self.gates.entry(layer).or_default().extend(gates.map(|g| (g / (1.0 + (-g).exp())).abs()));
    }
}

impl Magnitudes {
    fn of(model: &Model, on: Compute<'_>, tokens: &[u32]) -> Self {
        let probe = Arc::new(Mutex::new(Self::default()));
        let mut now = state(model, on, tokens.len(), Box::new(Never));
        now.set_probe(Some(Box::new(probe.clone())));
        prompt(model, on, &mut now, tokens);
        drop(now);
        let mut found = std::mem::take(&mut *probe.lock().unwrap());
        let all = found.inputs.values_mut().chain(found.gates.values_mut());
        all.for_each(|values| values.sort_by(f32::total_cmp));
        let coarse = model.layers()[0].coarse(coarse());
        found.out = coarse.map(|(factor, _)| if factor > 0.0 { OUT_BESIDE_COARSE } else { 1.0 });
        found
    }

    /// The value that a share `q` of those of a layer's matrices are below.
    fn below(&self, layer: usize, matrices: Matrices, q: f32) -> f32 {
        quantile(&self.inputs[&(layer, matrices)], q)
    }

    /// Cuts that leave about `share` of the FFN weights unread: rather neurons than inputs, as it is best.
    fn cut(&self, layers: usize, share: f32) -> Box<dyn SkipPolicy> {
        Box::new(ForcedCut { cuts: self.cuts(layers, share), stand_ins: None })
    }

    /// Such cuts where there are no stand-ins.
    fn mixed(&self, layers: usize) -> Box<dyn SkipPolicy> {
        let (percent, share) = MIXED;
        Box::new(ForcedCut { cuts: self.cuts(layers, share), stand_ins: Some(standing_in(percent)) })
    }

    fn cuts(&self, layers: usize, share: f32) -> Vec<Cut> {
        let cuts = (0..layers).map(|layer| Cut::Columns {
            inputs: self.below(layer, Matrices::GateUp, 0.85 * share * self.out[0]),
            inner: self.below(layer, Matrices::Down, 1.3 * share * self.out[1]),
        });
        cuts.collect()
    }

    /// The same by rows of up and columns of down, twice as many of these.
    fn neurons(&self, layers: usize, share: f32) -> Box<dyn SkipPolicy> {
        let cuts = (0..layers).map(|layer| Cut::Neurons {
            gate: quantile(&self.gates[&layer], share),
            inner: self.below(layer, Matrices::Down, 1.8 * share * self.out[1]),
        });
        Box::new(ForcedCut { cuts: cuts.collect(), stand_ins: None })
    }
}

/// Up to how many times a threshold columns are read coarsely.
fn coarse() -> f32 {
    std::env::var("SKIFF_BENCH_COARSE").ok().and_then(|n| n.parse().ok()).unwrap_or(CutPlan::COARSE)
}

/// The value that a share `q` of sorted ones are below; 0 for none.
fn quantile(sorted: &[f32], q: f32) -> f32 {
    if q == 0.0 { 0.0 } else { sorted[((sorted.len() - 1) as f32 * q) as usize] }
}

/// Decodes some tokens from the start; the logits of the last one are left in the state.
fn generate(model: &Model, on: Compute<'_>, state: &mut State, tokens: &[u32]) -> Vec<f32> {
    state.truncate(1);
    let mut last = Vec::new();
    for (i, &token) in tokens.iter().enumerate() {
        let logits = decode(model, on, state, token, i);
        if i + 1 == tokens.len() {
            last = logits.to_vec();
        }
    }
    last
}

/// A way to decode and its state.
struct Variant {
    name: String,
    state: State,
}

impl Variant {
    fn new(
        model: &Model,
        on: Compute<'_>,
        tokens: &[u32],
        name: String,
        policy: Box<dyn SkipPolicy>,
    ) -> Self {
        let mut state = state(model, on, TOKENS + 1, policy);
        prompt(model, on, &mut state, &tokens[..1]);
        Self { name, state }
    }

    /// Share of the FFN bytes left unread so far.
    fn share(&self, model: &Model) -> f64 {
        self.state.stats().weighted_share(|layer| model.layers()[layer].ffn.bytes() as u64)
    }
}

/// Nothing forced is bit by bit the full model; what is forced is left out, and matters.
fn check(model: &Model, on: Compute<'_>, tokens: &[u32], magnitudes: &Magnitudes) {
    let layers = model.config().layers;
    let run = |policy| {
        let mut now = Variant::new(model, on, tokens, String::new(), policy);
        let logits = generate(model, on, &mut now.state, tokens);
        assert!(logits.iter().all(|v| v.is_finite()));
        (logits, now.state.stats().share(), now.share(model))
    };
    let (full, ..) = run(Box::new(Never));
    assert_eq!(run(forced(0)).0, full, "skipping nothing changes the result");
    assert_eq!(run(watching(layers)).0, full, "looking on changes the result");
    for percent in PERCENT {
        let (logits, share, _) = run(forced(percent));
        let want = (TOKENS * layers * percent / 100) as f64;
        assert_eq!(share, want / (TOKENS * layers) as f64, "{percent} % were to be skipped");
        assert!(distance(&logits, &full) > 1e-3, "{percent} % skipped and nothing changes");
    }
    for percent in STAND_INS {
        let (logits, share, bytes) = run(Box::new(standing_in(percent)));
        assert_eq!(share, (TOKENS * layers * percent / 100) as f64 / (TOKENS * layers) as f64);
        assert!(bytes >= 0.8 * share, "a stand-in reads little: {bytes} of {share}");
        assert_eq!(logits == full, percent == 0, "{percent} % stood in for");
    }
    let (_, blocks, bytes) = run(magnitudes.mixed(layers));
    let stood_in = (TOKENS * layers * MIXED.0 / 100) as f64 / (TOKENS * layers) as f64;
    let want = stood_in + (1.0 - stood_in) * f64::from(MIXED.1);
    assert!(blocks == stood_in && (bytes - want).abs() < 0.12, "{want} was to be left out, {bytes} was");
    let listed = run(shortlisting()).0;
    let largest = |logits: &[f32]| logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    assert_eq!(largest(&listed), largest(&full), "the largest logit is exact");
    assert_eq!(listed != full, model.has_shortlist(), "others are not");
    let columns = CUTS.map(|share| (share, magnitudes.cut(layers, share)));
    let neurons = NEURONS.map(|share| (share, magnitudes.neurons(layers, share)));
    for (share, policy) in columns.into_iter().chain(neurons) {
        let (logits, _, found) = run(policy);
        let distance = distance(&logits, &full);
        assert!((found - f64::from(share)).abs() < 0.12, "{share} was to be cut, {found} was");
        match share {
            0.0 => assert!(distance < 0.05, "nothing is cut and the logits differ by {distance}"),
            _ => assert!(distance > 1e-3, "{share} is cut and nothing changes"),
        }
    }
}

/// The paper's policy with a threshold that nothing reaches: what looking on costs.
fn watching(layers: usize) -> Box<dyn SkipPolicy> {
    Box::new(FfnSkip::new(2.0, 1, 0, (0, layers)))
}

fn model(criterion: &mut Criterion, name: &str, model: &mut Model) {
    let team = Team::new(default_threads()).unwrap();
    let on = Compute { team: &team, kernels: best() };
    let (tokens, layers) = (ids(TOKENS, model.config().vocab), model.config().layers);
    let magnitudes = Magnitudes::of(model, on, &tokens);
    let plan = CutPlan { coarse: coarse(), layers: vec![Some(LayerCut::default()); layers] };
    let started = Instant::now();
    model.prepare_cuts(on, plan, ColumnForms::All, |_, _| {}).unwrap();
    model.prepare_stand_ins(stand_ins(model)).unwrap();
    model.prepare_shortlist(on, output_inputs(model.config().embedding)).unwrap();
    let (seconds, bytes) = (started.elapsed().as_secs_f64(), model.column_bytes() as f64);
    println!("{name}: {:.2} GB by columns, made in {seconds:.1} s", bytes / 1e9);
    let model = &*model;
    check(model, on, &tokens, &magnitudes);

    let variant = |name: String, policy| Variant::new(model, on, &tokens, name, policy);
    let mut all =
        vec![variant("all".into(), Box::new(Never)), variant("looking on".into(), watching(layers))];
    all.extend(PERCENT.map(|percent| variant(format!("{percent} % of blocks skipped"), forced(percent))));
    all.extend(
        STAND_INS.map(|percent| variant(format!("{percent} % stood in for"), Box::new(standing_in(percent)))),
    );
    all.extend(CUTS.map(|s| variant(format!("{:.0} % to be cut", 100.0 * s), magnitudes.cut(layers, s))));
    let neurons = |s| variant(format!("{:.0} % by neurons", 100.0 * s), magnitudes.neurons(layers, s));
    all.extend(NEURONS.map(neurons));
    let (percent, share) = MIXED;
    let both = format!("{percent} % stood in for, {:.0} % cut", 100.0 * share);
    all.push(variant(both, magnitudes.mixed(layers)));
    if model.has_shortlist() {
        all.push(variant("output matrix shortlisted".into(), shortlisting()));
    }
    let mut group = common::group(criterion, name);
    group.throughput(Throughput::Elements(TOKENS as u64));
    for Variant { name, state } in &mut all {
        group.bench_function(format!("decode, {name}"), |bencher| {
            bencher.iter(|| black_box(generate(model, on, state, &tokens)));
        });
    }
    group.finish();
    if std::env::args().any(|arg| arg.starts_with("--profile-time")) {
        return;
    }
    compare(name, model, on, &tokens, &mut all);
}

/// Times the variants in turn, so that what else the machine does hits all alike, and prints gain and ideal.
fn compare(name: &str, model: &Model, on: Compute<'_>, tokens: &[u32], variants: &mut [Variant]) {
    let rounds =
        std::env::var("SKIFF_BENCH_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(ROUNDS).max(1);
    let mut times = vec![Vec::new(); variants.len()];
    for _ in 0..rounds {
        for (variant, times) in variants.iter_mut().zip(&mut times) {
            let started = Instant::now();
            black_box(generate(model, on, &mut variant.state, tokens));
            times.push(started.elapsed().as_secs_f64());
        }
    }
    times.iter_mut().for_each(|times| times.sort_by(f64::total_cmp));
    let all = model.decode_bytes() as f64;
    println!(
        "{name}: best and median of {rounds} turns of {TOKENS} tokens; time saved: of what the bytes would save"
    );
    println!("                             unread  tokens/s  median  gain   (median)  ideal  time saved");
    for (variant, sorted) in variants.iter().zip(&times) {
        let (share, best, median) = (variant.share(model), sorted[0], sorted[rounds / 2]);
        let output = variant.state.stats().output_unread_by_token();
        let ideal = all / (all - model.ffn_bytes() as f64 * share - output);
        let (gain, median_gain) = (times[0][0] / best, times[0][rounds / 2] / median);
        let saved = (1.0 - 1.0 / gain) / (1.0 - 1.0 / ideal);
        println!(
            "    {:<24} {:>5.1} % {:>8.1} {:>8.1}  {gain:.3}  ({median_gain:.3})  {ideal:.3}  {:>5.0} %",
            variant.name,
            100.0 * share,
            TOKENS as f64 / best,
            TOKENS as f64 / median,
            100.0 * saved
        );
    }
    println!();
}

fn skip(criterion: &mut Criterion) {
    if !common::wanted("skip") {
        return;
    }
    let named = std::env::var_os("SKIFF_BENCH_MODELS");
    if let Some(paths) = &named {
        for path in std::env::split_paths(paths) {
            let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            model(criterion, &format!("skip, {name}"), &mut Model::load(&path).unwrap());
        }
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path: PathBuf = common::write_synthetic(folder.path());
    model(criterion, "skip, synthetic 0.3B Q4_0", &mut Model::load(&path).unwrap());
    if let Some(path) = common::smollm2() {
        model(criterion, "skip, SmolLM2 135M", &mut Model::load(&path).unwrap());
    }
}

criterion_group! { name = benches; config = common::criterion(); targets = skip }
criterion_main!(benches);
