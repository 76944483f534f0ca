//! FFNs that do not run as they are: skipped, cut, or with a stand-in in their place.

mod common;

use std::sync::{Arc, Mutex};

use common::evaluate::{GOVERNED, Run, best, bits, distance, ids, mean_distance, quantised, small, step};
use common::models::{ModelFile, SMALL, Shape, WIDE, stand_ins};
use skiff::gguf::GgmlType;
use skiff::kernels::Kernels;
use skiff::model::{ColumnForms, FfnStep, KvType, Model, ModelError, Probe, State};
use skiff::ops::Compute;
use skiff::quant::Matrix;
use skiff::skip::{Cut, CutPlan, CutSide, Decision, Depth, FfnSkip, LayerCut, Never, SkipPolicy, Uniform};
use skiff::threads::Team;

// ---- skipping

/// Skips the FFN of one layer for the tokens that `tokens` lists (all, if it is `None`).
#[derive(Clone)]
struct SkipLayer {
    layer: usize,
    tokens: Option<Vec<usize>>,
    now: usize,
}

impl SkipLayer {
    fn boxed(layer: usize, tokens: Option<&[usize]>) -> Box<dyn SkipPolicy> {
        Box::new(Self { layer, tokens: tokens.map(<[_]>::to_vec), now: 0 })
    }
}

impl SkipPolicy for SkipLayer {
    fn name(&self) -> &'static str {
        "test"
    }
    fn begin_token(&mut self, index: usize) {
        self.now = index;
    }
    fn decide(&mut self, layer: usize) -> Decision {
        let governed = self.tokens.as_ref().is_none_or(|tokens| tokens.contains(&self.now));
        if layer == self.layer && governed { Decision::Skip } else { Decision::Run }
    }
    fn boxed_clone(&self) -> Box<dyn SkipPolicy> {
        Box::new(self.clone())
    }
}

#[test]
fn a_policy_that_skips_nothing_changes_no_bit() {
    for model in [&small(GgmlType::F16), quantised()] {
        let ids = ids(33, model.config().vocab);
        for kernels in Kernels::available() {
            for batches in [&[512][..], &[1], &[7]] {
                let run = |policy, step| {
                    bits(&Run { kernels, batches, policy, step, ..Run::new(model) }.logits(&ids))
                };
                let none = run(Box::new(Never), FfnStep::Full);
                assert!(none == run(Box::new(Never), GOVERNED), "{kernels:?} {batches:?}: off");
                // Measures every cosine and never fires: a cosine does not exceed 1 by this much.
                let layers = model.config().layers;
                let silent = FfnSkip::new(1.01, 1, 0, (0, layers));
                assert!(none == run(Box::new(silent), GOVERNED), "{kernels:?} {batches:?}: silent");
                let warming = FfnSkip::new(-1.0, 1, 1000, (0, layers));
                assert!(none == run(Box::new(warming), GOVERNED), "{kernels:?} {batches:?}: warm-up");
            }
        }
    }
}

#[test]
fn the_weights_of_a_skipped_ffn_are_not_read() {
    let mut file = ModelFile::llama(SMALL, GgmlType::F16);
    for part in ["ffn_gate", "ffn_up", "ffn_down", "ffn_norm"] {
        file.fill_tensor(&format!("blk.1.{part}.weight"), f32::NAN);
    }
    let model = file.load().unwrap();
    let ids = ids(9, SMALL.vocab);
    for batches in [&[512][..], &[1]] {
        let policy = SkipLayer::boxed(1, None);
        let skipped = Run { batches, policy, step: GOVERNED, ..Run::new(&model) }.logits(&ids);
        assert!(skipped.iter().all(|l| l.is_finite()), "{batches:?}");
        let policy = SkipLayer::boxed(2, None);
        let run = Run { batches, policy, step: GOVERNED, ..Run::new(&model) }.logits(&ids);
        assert!(run.iter().all(|l| l.is_nan()), "{batches:?}");
        let full = Run { batches, policy: SkipLayer::boxed(1, None), ..Run::new(&model) }.logits(&ids);
        assert!(full.iter().all(|l| l.is_nan()), "a full step asks no policy: {batches:?}");
    }
}

/// A skipped FFN leaves the stream as it was: the same as an FFN whose output matrix is zero.
#[test]
fn a_skipped_ffn_adds_nothing() {
    let file = ModelFile::llama(SMALL, GgmlType::F32);
    let mut without = file.clone();
    without.fill_tensor("blk.1.ffn_down.weight", 0.0);
    let (model, without) = (file.load().unwrap(), without.load().unwrap());
    let ids = ids(20, SMALL.vocab);
    let want = Run::new(&without).logits(&ids);
    let got = Run { policy: SkipLayer::boxed(1, None), step: GOVERNED, ..Run::new(&model) }.logits(&ids);
    assert!(bits(&got) == bits(&want));
    assert!(distance(&Run::new(&model).logits(&ids), &want) > 0.1, "that FFN matters in this model");
}

/// Rows that run are compacted for the FFN: each token must get what it would have got alone.
#[test]
fn tokens_of_one_step_skip_independently() {
    for model in [&small(GgmlType::F32), quantised()] {
        let vocab = model.config().vocab;
        let ids = ids(16, vocab);
        for skipping in [&[0, 3, 4, 9, 15][..], &[15], &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]] {
            for kernels in Kernels::available() {
                let team = Team::new(2).unwrap();
                let on = Compute { team: &team, kernels };
                let mut state =
                    State::new(model, &team, (16, 16), KvType::F16, SkipLayer::boxed(1, Some(skipping)));
                let together = step(model, on, &mut state, &ids, GOVERNED);
                let share = skipping.len() as f64 / 16.0;
                assert_eq!(state.stats().share_by_layer()[..2], [0.0, share]);

                let mut single =
                    State::new(model, &team, (16, 16), KvType::F16, SkipLayer::boxed(1, Some(skipping)));
                let alone: Vec<f32> = (0..ids.len())
                    .flat_map(|i| step(model, on, &mut single, &ids[i..=i], FfnStep::Governed { index: i }))
                    .collect();
                assert_eq!(state.stats().share_by_layer(), single.stats().share_by_layer());
                let full = Run { kernels, ..Run::new(model) }.logits(&ids);
                assert!(distance(&together, &full) > 0.1, "skipping shows");
                let distance = mean_distance(&together, &alone);
                assert!(distance < 0.03, "{kernels:?} {skipping:?}: {distance}");
            }
        }
    }
}

/// The cosines that the rule sees are those of the residual stream before and after the FFN.
#[test]
fn cosines_are_those_of_the_stream() {
    let mut file = ModelFile::llama(SMALL, GgmlType::F32);
    // The FFN of layer 1 adds nothing: its cosine is 1. Layer 0's is measured against the streams themselves.
    file.fill_tensor("blk.1.ffn_down.weight", 0.0);
    let model = file.load().unwrap();
    let team = Team::new(1).unwrap();
    let on = Compute { team: &team, kernels: best() };
    let mut state = State::new(&model, &team, (8, 8), KvType::F16, Box::new(Never));
    state.measure_cosines(true);
    step(&model, on, &mut state, &[5], GOVERNED);
    let cosines = state.stats().mean_cosines();
    assert!((cosines[1].unwrap() - 1.0).abs() < 1e-6, "{cosines:?}");
    // The stream after layer 0 with and without its FFN, by cutting the model to one layer.
    let stream = |file: &ModelFile| {
        let mut file = file.clone();
        file.set_key("llama.block_count", 1u32);
        let model = file.load().unwrap();
        let mut state = State::new(&model, &team, (8, 8), KvType::F16, Box::new(Never));
        model.forward(on, &mut state, &[5], FfnStep::Full).unwrap();
        state.stream()[..SMALL.embedding].to_vec()
    };
    let after = stream(&file);
    file.fill_tensor("blk.0.ffn_down.weight", 0.0);
    let before = stream(&file);
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let want = dot(&before, &after) / (dot(&before, &before) * dot(&after, &after)).sqrt();
    assert!(want < 0.999, "an FFN that turns the stream");
    assert!((cosines[0].unwrap() - want).abs() < 1e-5, "{cosines:?} {want}");
}

// ---- cuts

/// The same thresholds everywhere.
#[derive(Clone)]
struct CutAll(Cut);

impl SkipPolicy for CutAll {
    fn name(&self) -> &'static str {
        "cut-all"
    }
    fn begin_token(&mut self, _: usize) {}
    fn decide(&mut self, _: usize) -> Decision {
        Decision::Cut(self.0)
    }
    fn boxed_clone(&self) -> Box<dyn SkipPolicy> {
        Box::new(self.clone())
    }
}

/// Centres and weights that differ from entry to entry.
fn plan(shape: Shape, centre: f32) -> CutPlan {
    let wave = |n: usize, size: f32| (0..n).map(|i| size * (i as f32 * 0.7).sin()).collect::<Vec<f32>>();
    let side = |n: usize| CutSide {
        centre: if centre == 0.0 { Vec::new() } else { wave(n, centre) },
        weight: wave(n, 0.5).iter().map(|w| 1.0 + w).collect(),
    };
    // Factors of about 1/2 to 2.
    let depth = Depth { weight: wave(shape.embedding, 0.1), bias: 0.2 };
    let gate = wave(shape.ffn, 0.3).iter().map(|w| 0.5 + w).collect();
    let layer = LayerCut { depth, inputs: side(shape.embedding), inner: side(shape.ffn), gate };
    CutPlan { layers: vec![Some(layer); shape.layers], ..CutPlan::default() }
}

fn prepared(ty: GgmlType, centre: f32, forms: ColumnForms) -> Model {
    let mut model = ModelFile::llama(WIDE, ty).load().unwrap();
    let team = Team::new(2).unwrap();
    let on = Compute { team: &team, kernels: best() };
    model.prepare_cuts(on, plan(WIDE, centre), forms, |_, _| {}).unwrap();
    model
}

/// Logits and share of bytes unread of `model` under a cut.
fn cut(model: &Model, threads: usize, batch: usize, cut: Cut) -> (Vec<f32>, f64) {
    cut_tokens(model, &ids(9, WIDE.vocab), threads, batch, cut)
}

fn cut_tokens(model: &Model, tokens: &[u32], threads: usize, batch: usize, cut: Cut) -> (Vec<f32>, f64) {
    let team = Team::new(threads).unwrap();
    let mut logits = Vec::new();
    let on = Compute { team: &team, kernels: best() };
    let mut state = State::new(model, &team, (tokens.len(), 512), KvType::F16, Box::new(CutAll(cut)));
    for tokens in tokens.chunks(batch) {
        logits.extend(step(model, on, &mut state, tokens, GOVERNED));
    }
    let share = state.stats().weighted_share(|layer| model.layers()[layer].ffn.bytes() as u64);
    (logits, share)
}

const DEEP: Cut = Cut::Columns { inputs: 0.6, inner: 0.1 };
const FEW_NEURONS: Cut = Cut::Neurons { gate: 0.12, inner: 0.1 };
const NOTHING: [Cut; 2] = [Cut::Columns { inputs: 0.0, inner: 0.0 }, Cut::Neurons { gate: 0.0, inner: 0.0 }];
const FORMS: [ColumnForms; 3] = [ColumnForms::None, ColumnForms::Down, ColumnForms::All];

#[test]
fn a_cut_of_nothing_is_the_full_model() {
    for ty in [GgmlType::Q4_1, GgmlType::Q6_K, GgmlType::Q8_0, GgmlType::F16] {
        for centre in [0.0, 0.3] {
            for (forms, nothing) in FORMS.into_iter().flat_map(|forms| NOTHING.map(|cut| (forms, cut))) {
                let model = prepared(ty, centre, forms);
                let full = Run::new(&model).logits(&ids(9, WIDE.vocab));
                let (none, _) = cut(&model, 1, 1, nothing);
                let distance = mean_distance(&none, &full);
                // Centred activations round otherwise, and scales by column have 8 bits.
                assert!(distance < 0.03, "{ty} {centre} {forms:?} {nothing:?}: {distance}");
            }
        }
    }
}

#[test]
fn what_is_read_in_part_gives_what_rows_with_zeros_give() {
    for ty in
        [GgmlType::Q4_0, GgmlType::Q4_1, GgmlType::Q4_K, GgmlType::Q5_K, GgmlType::Q6_K, GgmlType::IQ4_NL]
    {
        let rows = prepared(ty, 0.2, ColumnForms::None);
        let (full, _) = cut(&rows, 1, 9, NOTHING[0]);
        for deep in [DEEP, FEW_NEURONS] {
            let (want, share) = cut(&rows, 1, 9, deep);
            assert!((0.2..0.9).contains(&share), "{ty} {deep:?}: {share} left out");
            let depth = mean_distance(&want, &full);
            for (forms, batch) in FORMS.into_iter().flat_map(|forms| [1, 3, 9].map(|batch| (forms, batch))) {
                let (got, counted) = cut(&prepared(ty, 0.2, forms), 1, batch, deep);
                let distance = mean_distance(&got, &want);
                let what = format!("{ty} {deep:?} {forms:?} {batch}");
                assert!(distance < 0.15 * depth, "{what}: {distance}, the cut itself {depth}");
                assert!((counted - share).abs() < 0.02, "{what}: {counted} {share}");
            }
        }
    }
}

/// A row alone reads columns coarsely, and many rows, which evaluation takes at a time, are multiplied so: here all that matter
/// little, and hardly any is left out. Both give the same, and it is not what whole columns give.
#[test]
fn generation_reads_as_coarsely_as_evaluation_measures() {
    let tokens = ids(40, WIDE.vocab);
    let of = |model: &Model, batch, cut| cut_tokens(model, &tokens, 1, batch, cut);
    for ty in [GgmlType::Q4_0, GgmlType::Q4_1, GgmlType::Q4_K, GgmlType::Q6_K, GgmlType::Q5_K] {
        let (fine, coarse) = (prepared(ty, 0.2, ColumnForms::All), coarsely(ty, 500.0));
        let columns = Cut::Columns { inputs: 1e-3, inner: 1e-3 };
        for (cut, least) in [(columns, 0.2), (Cut::Neurons { gate: 1e-3, inner: 1e-3 }, 0.05)] {
            let (whole, fewer) = of(&fine, 1, cut);
            let ((one_by_one, share), (many, counted)) = (of(&coarse, 1, cut), of(&coarse, 40, cut));
            let (differs, distance) = (mean_distance(&many, &whole), mean_distance(&one_by_one, &many));
            let what = format!("{ty} {cut:?}: {distance} of {differs}; {share} {counted} {fewer} unread");
            assert!((counted - share).abs() < 0.01, "{what}");
            if ty == GgmlType::Q5_K {
                assert_eq!(
                    (bits(&one_by_one), share),
                    (bits(&whole), fewer),
                    "{what}: it has no coarse columns"
                );
            } else {
                assert!(share > fewer + least && distance < 0.3 * differs, "{what}");
            }
        }
    }
}

/// A few rows read all of the matrices anyway, and none of them coarsely.
#[test]
fn a_few_rows_are_not_coarse() {
    let (fine, coarse) = (prepared(GgmlType::Q4_1, 0.2, ColumnForms::All), coarsely(GgmlType::Q4_1, 3.0));
    let [fine, coarse] = [&fine, &coarse].map(|model| cut(model, 1, 3, DEEP));
    assert_eq!((bits(&fine.0), fine.1), (bits(&coarse.0), coarse.1));
}

fn coarsely(ty: GgmlType, coarse: f32) -> Model {
    let mut model = ModelFile::llama(WIDE, ty).load().unwrap();
    let team = Team::new(2).unwrap();
    let on = Compute { team: &team, kernels: best() };
    let plan = CutPlan { coarse, ..plan(WIDE, 0.2) };
    model.prepare_cuts(on, plan, ColumnForms::All, |_, _| {}).unwrap();
    model
}

#[test]
fn cuts_do_not_depend_on_the_threads() {
    let model = prepared(GgmlType::Q4_K, 0.2, ColumnForms::All);
    let one_and_three = |model: &Model| [1, 3].map(|threads| bits(&cut(model, threads, 1, DEEP).0));
    let [one, three] = one_and_three(&coarsely(GgmlType::Q4_K, 2.0));
    assert_eq!(one, three, "coarse columns");
    for (batch, deep) in [(1, DEEP), (1, FEW_NEURONS), (9, DEEP), (9, FEW_NEURONS)] {
        let [one, three] = [1, 3].map(|threads| bits(&cut(&model, threads, batch, deep).0));
        assert_eq!(one, three, "{batch} {deep:?}");
    }
}

/// With everything left out an FFN gives what its centres give: the same for every token.
#[test]
fn what_is_left_out_counts_as_its_centre() {
    const MOST: f32 = f32::INFINITY;
    let columns = (Cut::Columns { inputs: MOST, inner: MOST }, 0.9);
    let neurons = (Cut::Neurons { gate: MOST, inner: MOST }, 0.6);
    for (forms, (all, least)) in FORMS.into_iter().flat_map(|forms| [(forms, columns), (forms, neurons)]) {
        let (none, share) = cut(&prepared(GgmlType::Q8_0, 0.0, forms), 1, 1, all);
        let (centred, _) = cut(&prepared(GgmlType::Q8_0, 0.3, forms), 1, 1, all);
        assert!(share > least, "{share}");
        let file = ModelFile::llama(WIDE, GgmlType::Q8_0);
        let mut without = file.clone();
        for i in 0..WIDE.layers {
            without.fill_tensor(&format!("blk.{i}.ffn_down.weight"), 0.0);
        }
        let want = Run::new(&without.load().unwrap()).logits(&ids(9, WIDE.vocab));
        let (none, centred) = (mean_distance(&none, &want), mean_distance(&centred, &want));
        assert!(none < 0.02, "an FFN that is left out adds nothing: {none}");
        assert!(centred > 0.1, "centres add something: {centred}");
    }
}

/// A factor of 2 is twice the threshold; a product beyond the limits is the limit, whatever its sign says.
#[test]
fn thresholds_are_multiplied_with_what_the_token_is_worth() {
    let of = |depth: &dyn Fn(usize) -> Depth, threshold: Cut, forms: ColumnForms| {
        let mut model = ModelFile::llama(WIDE, GgmlType::Q8_0).load().unwrap();
        let team = Team::new(1).unwrap();
        let on = Compute { team: &team, kernels: best() };
        let mut plan = plan(WIDE, 0.2);
        plan.layers.iter_mut().flatten().for_each(|layer| layer.depth = depth(WIDE.embedding));
        model.prepare_cuts(on, plan, forms, |_, _| {}).unwrap();
        cut(&model, 1, 1, threshold)
    };
    let columns = Cut::Columns { inputs: 0.2, inner: 0.03 };
    let neurons = Cut::Neurons { gate: 0.02, inner: 0.03 };
    let plain = |_| Depth::default();
    for (forms, cut) in FORMS.into_iter().flat_map(|forms| [(forms, columns), (forms, neurons)]) {
        let times = |n: f32| cut.times(n);
        let twice = of(&|_| Depth { weight: Vec::new(), bias: 1.0 }, times(1.0), forms);
        assert_eq!(bits(&twice.0), bits(&of(&plain, times(2.0), forms).0));
        // Each layer of each token is cut at 4 times the threshold or at a quarter of it.
        let huge = |sign: f32| {
            move |n: usize| Depth {
                weight: (0..n).map(|i| sign * 1e9 * (i as f32).sin()).collect(),
                bias: 0.0,
            }
        };
        let (one, other) = (of(&huge(1.0), times(1.0), forms), of(&huge(-1.0), times(1.0), forms));
        let (least, most) = (of(&plain, times(0.25), forms).1, of(&plain, times(4.0), forms).1);
        assert!(least < one.1 && one.1 < most && least < other.1 && other.1 < most);
        let shares = (one.1, other.1, least, most);
        assert!((one.1 + other.1 - least - most).abs() < 0.1 * most, "{shares:?}");
    }
}

#[test]
fn plans_that_do_not_fit_are_refused() {
    let mut model = small(GgmlType::F32);
    let team = Team::new(1).unwrap();
    let on = Compute { team: &team, kernels: best() };
    let mut refused = |change: &dyn Fn(&mut CutPlan)| {
        let mut wrong = plan(SMALL, 0.5);
        change(&mut wrong);
        let error = model.prepare_cuts(on, wrong, ColumnForms::All, |_, _| {}).unwrap_err();
        assert!(!model.has_cuts());
        error
    };
    for coarse in [-1.0, f32::NAN, f32::INFINITY] {
        assert!(matches!(refused(&|p| p.coarse = coarse), ModelError::CutCoarse { .. }), "{coarse}");
    }
    assert!(matches!(refused(&|p| _ = p.layers.pop()), ModelError::CutLayers { found: 2, layers: 3 }));
    let shape = refused(&|p| _ = p.layers[1].as_mut().unwrap().inner.centre.pop());
    assert!(matches!(shape, ModelError::CutShape { layer: 1, found: 95, expected: 96, .. }), "{shape}");
    let nan = refused(&|p| p.layers[2].as_mut().unwrap().inputs.weight[5] = f32::NAN);
    assert!(matches!(nan, ModelError::CutValue { layer: 2, index: 5, .. }), "{nan}");
    let gate = refused(&|p| p.layers[0].as_mut().unwrap().gate[3] = -0.5);
    assert!(matches!(gate, ModelError::CutValue { what: "weight of gates", index: 3, .. }), "{gate}");
    let short = refused(&|p| _ = p.layers[0].as_mut().unwrap().depth.weight.pop());
    assert!(matches!(short, ModelError::CutShape { layer: 0, what: "depth", .. }), "{short}");
    let infinite = refused(&|p| p.layers[1].as_mut().unwrap().depth.bias = f32::INFINITY);
    assert!(matches!(infinite, ModelError::CutValue { layer: 1, what: "depth", .. }), "{infinite}");
    let negative = refused(&|p| p.layers[2].as_mut().unwrap().inputs.weight[5] = -1.0);
    assert!(matches!(negative, ModelError::CutValue { .. }), "{negative}");
}

// ---- stand-ins

/// Logits of nine tokens in steps of `batch`, and the shares of blocks and of bytes that were not read.
fn standing_in(model: &Model, threads: usize, batch: usize, below: f32) -> (Vec<f32>, [f64; 2]) {
    under(model, threads, batch, Uniform::stand_ins(below, 0, 0..model.config().layers))
}

/// The same under any policy.
fn under(model: &Model, threads: usize, batch: usize, policy: Uniform) -> (Vec<f32>, [f64; 2]) {
    let tokens = ids(9, model.config().vocab);
    let team = Team::new(threads).unwrap();
    let on = Compute { team: &team, kernels: best() };
    let mut state = State::new(model, &team, (tokens.len(), 512), KvType::F16, Box::new(policy));
    let mut logits = Vec::new();
    for tokens in tokens.chunks(batch) {
        logits.extend(step(model, on, &mut state, tokens, GOVERNED));
    }
    let bytes = state.stats().weighted_share(|layer| model.layers()[layer].ffn.bytes() as u64);
    (logits, [state.stats().share(), bytes])
}

fn with_stand_ins(size: f32) -> Model {
    let mut model = ModelFile::llama(WIDE, GgmlType::Q4_1).load().unwrap();
    model.prepare_stand_ins(stand_ins(WIDE, size)).unwrap();
    model
}

#[test]
fn stand_ins_that_are_foretold_to_be_bad_are_not_used() {
    let model = with_stand_ins(0.05);
    for batch in [1, 3, 9] {
        let (never, shares) = standing_in(&model, 2, batch, f32::NEG_INFINITY);
        let run = Run { batches: &[batch], ..Run::new(&model) };
        assert_eq!(bits(&never), bits(&run.logits(&ids(9, WIDE.vocab))), "{batch}");
        assert_eq!(shares, [0.0; 2]);
        assert_eq!(standing_in(&model, 2, batch, f32::NAN).1, [0.0; 2], "no number is no reason");
    }
}

#[test]
fn some_rows_of_a_step_have_stand_ins_and_others_do_not() {
    let model = with_stand_ins(0.05);
    let (one_by_one, shares) = standing_in(&model, 1, 1, 0.0);
    assert!((0.2..0.8).contains(&shares[0]) && shares[1] < shares[0], "{shares:?}");
    let full = Run::new(&model).logits(&ids(9, WIDE.vocab));
    assert!(mean_distance(&one_by_one, &full) > 0.05, "stand-ins are something else");
    for batch in [3, 9] {
        let (together, counted) = standing_in(&model, 1, batch, 0.0);
        assert_eq!(bits(&together), bits(&one_by_one), "{batch}");
        assert_eq!(counted, shares);
    }
    assert_eq!(bits(&standing_in(&model, 3, 1, 0.0).0), bits(&one_by_one), "threads");
}

#[test]
fn where_no_stand_in_is_cheap_enough_columns_are_left_out() {
    let mut model = with_stand_ins(0.05);
    let plan = CutPlan { layers: vec![Some(LayerCut::default()); WIDE.layers], ..CutPlan::default() };
    let team = Team::new(1).unwrap();
    let on = Compute { team: &team, kernels: best() };
    for forms in [ColumnForms::None, ColumnForms::All] {
        model.prepare_cuts(on, plan.clone(), forms, |_, _| {}).unwrap();
        for batch in [1, 3, 9] {
            let mixed = |below| under(&model, 2, batch, Uniform::mixed(below, 0.3, 0, 0..WIDE.layers));
            let columns = under(&model, 2, batch, Uniform::columns(0.3, 0, 0..WIDE.layers));
            let (never, shares) = mixed(f32::NEG_INFINITY);
            assert_eq!((bits(&never), shares), (bits(&columns.0), columns.1), "{batch}");
            assert_eq!((columns.1[0], columns.1[1] > 0.05), (0.0, true), "{columns:?}");
            let (always, shares) = mixed(f32::INFINITY);
            let stand_ins = standing_in(&model, 2, batch, f32::INFINITY);
            assert_eq!((bits(&always), shares), (bits(&stand_ins.0), stand_ins.1), "{batch}");
            // As many stand-ins as without cuts, or nearly: the stream is another. And more that is not read.
            let (_, [blocks, bytes]) = mixed(0.0);
            let (_, [without, fewer]) = standing_in(&model, 2, batch, 0.0);
            assert!(blocks > 0.1 && (blocks - without).abs() < 0.25 && bytes > fewer, "{blocks} {without}");
        }
    }
}

/// The stream behind the last layer, by rows.
#[derive(Default)]
struct LastStream(Vec<f32>);

impl Probe for LastStream {
    fn stream(&mut self, layer: usize, x: &[f32]) {
        if layer == 1 {
            self.0 = x.to_vec();
        }
    }
}

/// In a model of one layer: what attention leaves in the stream, and the map of that on top.
#[test]
fn a_stand_in_adds_its_map_of_the_normed_stream() {
    let shape = Shape { layers: 1, ..WIDE };
    let file = ModelFile::llama(shape, GgmlType::Q4_1);
    let stream = |size: f32| {
        let mut model = file.load().unwrap();
        let made = stand_ins(shape, size);
        model.prepare_stand_ins(made.clone()).unwrap();
        let team = Team::new(1).unwrap();
        let on = Compute { team: &team, kernels: best() };
        let policy = Box::new(Uniform::stand_ins(f32::INFINITY, 0, 0..1));
        let mut state = State::new(&model, &team, (9, 9), KvType::F32, policy);
        let seen = Arc::new(Mutex::new(LastStream::default()));
        state.set_probe(Some(Box::new(seen.clone())));
        model.forward(on, &mut state, &ids(5, shape.vocab), GOVERNED).unwrap();
        let norm = (model.layers()[0].ffn.norm.to_vec(), model.config().norm_eps);
        let x = std::mem::take(&mut seen.lock().unwrap().0);
        (x, made.into_iter().next().unwrap(), norm)
    };
    let (attended, ..) = stream(0.0);
    let (got, map, (norm, eps)) = stream(0.5);
    let d = shape.embedding;
    let product = |matrix: Matrix<'_>, x: &[f32]| -> Vec<f32> {
        let mut row = vec![0.0; matrix.cols()];
        let dot = |row: &[f32]| row.iter().zip(x).map(|(a, b)| a * b).sum::<f32>();
        (0..matrix.rows_len())
            .map(|r| {
                matrix.dequantize_row(r, &mut row);
                dot(&row)
            })
            .collect()
    };
    for (x, got) in attended.chunks_exact(d).zip(got.chunks_exact(d)) {
        let scale = 1.0 / (x.iter().map(|x| x * x).sum::<f32>() / d as f32 + eps).sqrt();
        let normed: Vec<f32> = x.iter().zip(&norm).map(|(x, w)| x * scale * w).collect();
        let mapped = product(map.wide(), &product(map.narrow(), &normed));
        let want: Vec<f32> = x.iter().zip(&map.base).zip(mapped).map(|((x, b), m)| x + b + m).collect();
        assert!(mean_distance(got, &want) < 0.05, "{}", mean_distance(got, &want));
        assert!(mean_distance(x, &want) > 0.2, "the map is something");
    }
}

#[test]
fn stand_ins_that_do_not_fit_are_refused() {
    let mut model = ModelFile::llama(WIDE, GgmlType::Q4_1).load().unwrap();
    let few = model.prepare_stand_ins(stand_ins(WIDE, 1.0)[1..].to_vec()).unwrap_err();
    assert!(matches!(few, ModelError::StandIns { .. }), "{few}");
    let narrow = Shape { embedding: 64, ..WIDE };
    let error = model.prepare_stand_ins(stand_ins(narrow, 1.0)).unwrap_err();
    assert!(matches!(error, ModelError::StandIns { entries: 64, .. }), "{error}");
}
