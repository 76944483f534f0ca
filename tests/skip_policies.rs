//! Skip policies on a model: whole layers left out, calibration, its file, and the shares that it promises.

mod common;

use common::models::{ModelFile, Shape};
use skiff::eval::calibrate::{CalibrateOptions, calibrate, complete};
use skiff::gguf::{Builder, GgmlType, Gguf, Value};
use skiff::kernels::FEW_TOKENS;
use skiff::kernels::Kernels;
use skiff::model::{FfnStep, KvType, Model, State};
use skiff::ops::Compute;
use skiff::skip::{
    Calibration, CalibrationError, Cut, CutPlan, Decision, ModelFacts, Never, OutputCalibration, ShortGpt,
    SkipChoice, SkipDecode, SkipError, SkipMode, SkipOptions, SkipPolicy,
};
use skiff::threads::Team;

/// Sizes that the column form does not pad: bytes left unread are then in proportion to the columns left out.
const SHAPE: Shape = Shape { layers: 12, embedding: 128, ffn: 128, heads: 4, kv_heads: 2, vocab: 96 };
const CONTEXT: usize = 512;

fn model() -> Model {
    ModelFile::llama(SHAPE, GgmlType::Q8_0).load().unwrap()
}

fn on(team: &Team) -> Compute<'_> {
    Compute { team, kernels: Kernels::available().next().unwrap() }
}

fn ids(n: usize) -> Vec<u32> {
    (0..n).map(|i| ((i * 37 + i * i / 3 + i / 7 * 11 + 5) % SHAPE.vocab) as u32).collect()
}

/// Logits of every position under a policy, evaluated in steps of `batch`; and the state after it.
fn logits(
    model: &Model,
    team: &Team,
    policy: Box<dyn SkipPolicy>,
    ids: &[u32],
    batch: usize,
) -> (Vec<f32>, State) {
    let mut state = State::new(model, team, (CONTEXT, CONTEXT), KvType::F16, policy);
    let mut out = Vec::new();
    for (i, step) in ids.chunks(batch).enumerate() {
        model.forward(on(team), &mut state, step, FfnStep::Governed { index: i * batch }).unwrap();
        let mut rows = vec![0.0; step.len() * SHAPE.vocab];
        model.logits_of(on(team), &mut state, 0..step.len(), &mut rows);
        out.extend(rows);
    }
    (out, state)
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let square = |x: &mut dyn Iterator<Item = f32>| x.map(|x| x * x).sum::<f32>();
    (square(&mut a.iter().zip(b).map(|(a, b)| a - b)) / square(&mut b.iter().copied())).sqrt()
}

#[test]
fn a_layer_left_out_passes_the_stream_on() {
    let (model, team) = (model(), Team::new(2).unwrap());
    let all: Vec<usize> = (0..SHAPE.layers).collect();
    let ids = ids(8);
    let (got, mut state) = logits(&model, &team, Box::new(ShortGpt::new(&all, SHAPE.layers, 0)), &ids, 8);
    assert_eq!((state.stats().share(), state.stats().layer_share()), (1.0, 1.0));
    // With every layer left out the stream is the embedding, whatever came before: each token by itself is equal.
    for (t, got) in ids.iter().zip(got.chunks_exact(SHAPE.vocab)) {
        state.truncate(0);
        model.forward(on(&team), &mut state, &[*t], FfnStep::Governed { index: 0 }).unwrap();
        let alone = model.logits(on(&team), &mut state, 0).to_vec();
        assert!(distance(&alone, got) < 1e-3);
    }
    let (full, _) = logits(&model, &team, Box::new(Never), &ids, 8);
    assert!(distance(&got, &full) > 0.05, "leaving out all layers matters");
}

/// Rows of one step leave out different layers; keys and values are there for tokens that run them later.
#[test]
fn layers_left_out_do_not_depend_on_the_steps() {
    let (model, team) = (model(), Team::new(2).unwrap());
    let policy = || Box::new(SkipDecode::new(0.5, 3..SkipDecode::HORIZON, 1..11));
    let ids = ids(40);
    let (together, _) = logits(&model, &team, policy(), &ids, 40);
    let (some, _) = logits(&model, &team, policy(), &ids, FEW_TOKENS);
    let (one_by_one, mut state) = logits(&model, &team, policy(), &ids, 1);
    assert!(distance(&some, &one_by_one) < 1e-3, "{}", distance(&some, &one_by_one));
    // Many rows may be rounded otherwise (a matrix unit takes 16 bits), and this model's weights are random.
    assert!(distance(&together, &one_by_one) < 0.06, "{}", distance(&together, &one_by_one));
    assert!(state.stats().layer_share() > 0.4);

    // A token that runs all layers after tokens that did not: it finds a key in every layer at every position.
    let shares = state.stats().layer_share();
    model.forward(on(&team), &mut state, &ids[..1], FfnStep::Full).unwrap();
    assert!(model.logits(on(&team), &mut state, 0).iter().all(|v| v.is_finite()));
    assert_eq!(state.stats().layer_share(), shares, "a full step is not counted");
    for layer in 0..SHAPE.layers {
        for position in 0..41 {
            let keys = state.kv().keys(on(&team).kernels, layer, position);
            assert!(keys.iter().any(|&k| k != 0.0), "layer {layer}, position {position}");
        }
    }
}

fn calibrated(model: &mut Model, team: &Team, quality_windows: usize) -> (Calibration, Vec<u32>) {
    let ids = ids(CONTEXT * (quality_windows + 4));
    let options = CalibrateOptions { windows: 4, quality_windows, text: "a text".into() };
    let mut stages = Vec::new();
    let found = calibrate(model, on(team), std::slice::from_ref(&ids), &options, &mut |stage, done, all| {
        assert!(done <= all);
        stages.push(stage);
        true
    });
    stages.dedup();
    // Strengths of the rule, of cuts and of stand-ins, each when what they need is known.
    assert_eq!(stages.len(), if quality_windows > 0 { 8 } else { 7 });
    (found.unwrap(), ids)
}

/// Shares of blocks and of bytes that a policy skips, of tokens past the warm-up.
fn shares(model: &Model, team: &Team, options: &SkipOptions, ids: &[u32]) -> (f64, f64) {
    let policy = model.policy(options).unwrap();
    let mut state = State::new(model, team, (CONTEXT, CONTEXT), KvType::F16, policy);
    for window in ids.chunks_exact(CONTEXT) {
        state.truncate(0);
        model.forward(on(team), &mut state, window, FfnStep::Governed { index: 0 }).unwrap();
    }
    let scale = CONTEXT as f64 / (CONTEXT - 25) as f64;
    let bytes = |layer: usize| model.layers()[layer].ffn.bytes() as u64;
    (scale * state.stats().share(), scale * state.stats().weighted_share(bytes))
}

#[test]
fn policies_reach_the_ratio_asked_for() {
    let (mut model, team) = (model(), Team::new(2).unwrap());
    let (found, ids) = calibrated(&mut model, &team, 0);
    // The rule of the paper, k = 1, runs an FFN before each that it skips: it reaches half of the warm region.
    let reach = (found.cold.1 - found.cold.0) / 2;
    model.set_calibration(found);
    for ratio in [0.1, 0.25, 0.4] {
        for name in SkipChoice::names().filter(|name| !["off", "auto", "output"].contains(name)) {
            let SkipChoice { mode, output } = SkipChoice::from_name(name).unwrap();
            let ratio_alone = SkipOptions { mode, output, ratio: Some(ratio), ..Default::default() };
            let options = SkipOptions { cold: Some((0, 12)), ..ratio_alone };
            let options = match mode {
                SkipMode::Static | SkipMode::Random | SkipMode::ShortGpt | SkipMode::SkipDecode => options,
                // Calibrated for the cold regions that were found.
                _ => SkipOptions { cold: None, ..options },
            };
            if mode == SkipMode::FfnSkip && ratio > reach as f32 / 12.0 {
                let error = model.policy(&options).err().expect("more than the rule can skip");
                assert!(matches!(error, SkipError::RatioTooHigh { most, .. } if most < ratio), "{error}");
                continue;
            }
            let (blocks, bytes) = shares(&model, &team, &options, &ids);
            let by_bytes = matches!(mode, SkipMode::Cut | SkipMode::Neurons | SkipMode::Mixed);
            let share = if by_bytes { bytes } else { blocks };
            let slack = match mode {
                // Whole layers out of twelve come no closer than half of one.
                SkipMode::Static | SkipMode::ShortGpt => 0.5 / 12.0,
                // Two windows, on which its shares are measured, have other stand-ins than four.
                SkipMode::Mixed => 0.05,
                _ => 0.03,
            };
            println!("{name} {ratio}: {blocks:.3} of blocks, {bytes:.3} of bytes");
            assert!((share - f64::from(ratio)).abs() <= slack + 1e-6, "{name} {ratio}: {share}");
        }
    }
    memory_follows_the_policy(&mut model, &team);
}

/// Columns of all matrices for `cut`, of down for `neurons`, none for others; more than is needed is given back on request.
fn memory_follows_the_policy(model: &mut Model, team: &Team) {
    let of = |mode| SkipOptions { mode, ratio: Some(0.2), ..Default::default() };
    let [cut, neurons] = [SkipMode::Cut, SkipMode::Neurons].map(of);
    model.drop_cuts();
    let mut bytes = |trims: bool, options: &SkipOptions| {
        match trims {
            true => model.trim_skip(on(team), options).unwrap(),
            false => model.prepare_skip(on(team), options, |_, _| {}).unwrap(),
        }
        model.column_bytes()
    };
    let down = bytes(false, &neurons);
    let all = bytes(false, &cut);
    assert!(down > 0 && (2.0..4.0).contains(&(all as f64 / down as f64)), "{down} {all}");
    assert_eq!([bytes(false, &neurons), bytes(true, &cut), bytes(true, &neurons)], [all, all, down]);
    assert_eq!(bytes(true, &of(SkipMode::Random)), 0);
}

#[test]
fn points_state_the_quality_that_was_measured() {
    let (mut model, team) = (model(), Team::new(2).unwrap());
    let (found, _) = calibrated(&mut model, &team, 1);
    let random = found.points.iter().find(|p| p.policy == "random").unwrap();
    for (policy, least) in [("cut", 5), ("neurons", 5), ("stand-in", 4), ("mixed", 4)] {
        let cut: Vec<_> = found.points.iter().filter(|p| p.policy == policy).collect();
        assert!(cut.len() >= least, "{:?}", found.points);
        for pair in cut.windows(2) {
            assert!(pair[0].kl <= pair[1].kl * 1.05 + 1e-4, "deeper cuts are further off: {pair:?}");
            assert!(pair[0].bytes < pair[1].bytes);
        }
        assert!(random.kl > cut[0].kl && random.blocks > 0.05);
    }
}

/// Nothing of an F16 matrix can be left unread in parts, so cuts have no shares; all else is learnt all the same.
#[test]
fn a_model_that_is_not_quantised_is_calibrated_for_what_it_can_skip() {
    let shape = Shape { layers: 6, ..SHAPE };
    let mut model = ModelFile::llama(shape, GgmlType::F16).load().unwrap();
    let (found, _) = calibrated(&mut model, &Team::new(2).unwrap(), 1);
    let has = |policy: &str| found.points.iter().any(|p| p.policy == policy && p.bytes > 0.0);
    assert_eq!(["static", "stand-in", "ffn-skip"].map(has), [true; 3], "{:?}", found.points);
    assert_eq!(["cut", "neurons", "mixed"].map(has), [false; 3], "{:?}", found.points);
}

/// The calibration as a version wrote it that did not know `policies`.
fn without(mut found: Calibration, policies: &[&str]) -> Calibration {
    found.auto = None;
    found.points.retain(|point| !policies.contains(&point.policy.as_str()));
    if policies.contains(&"output") {
        found.output = None;
        found.points.retain(|point| !point.choice().output);
    }
    if policies.contains(&"neurons") {
        let cut = found.cut.as_mut().unwrap();
        cut.neurons = Default::default();
        cut.plan.layers.iter_mut().flatten().for_each(|layer| layer.gate.clear());
    }
    if policies.contains(&"stand-in") {
        found.stand_ins = None;
    }
    if policies.contains(&"mixed") {
        found.mixed = None;
    }
    found
}

/// Files of older versions know nothing about neurons or stand-ins; what they know stays as it is.
#[test]
fn an_older_calibration_is_completed() {
    let (mut model, team) = (model(), Team::new(2).unwrap());
    let (found, ids) = calibrated(&mut model, &team, 1);
    let options = CalibrateOptions { windows: 4, quality_windows: 1, text: "a text".into() };
    let nobody = &mut |_, _, _| true;
    let three = ["neurons", "stand-in", "mixed"];
    for lacking in [&three[2..], &three[1..], &three, &["output"], &["mixed", "output"]] {
        let older = without(found.clone(), lacking);
        let older = read(&write(&older, &model.facts()), &model).unwrap();
        let texts = [ids.clone()];
        // What is measured beside the output matrix left unread must be measured with it so.
        model.drop_shortlist();
        let completed = complete(&mut model, on(&team), older.clone(), &texts, &options, nobody).unwrap();
        assert!(model.has_shortlist(), "{lacking:?}");
        if !lacking.contains(&"output") {
            assert_eq!(completed.output, older.output, "it was there");
        }
        for policy in lacking {
            let learnt = |c: &Calibration| c.points.iter().filter(|p| p.policy == *policy).count();
            assert!(learnt(&completed) > 0 && learnt(&completed).abs_diff(learnt(&found)) <= 2);
            let SkipChoice { mode, output } = SkipChoice::from_name(policy).unwrap();
            let ratio = (!output).then_some(0.2);
            let asked = SkipOptions { mode, output, ratio, ..Default::default() };
            let error = asked.policy(&model.facts(), Some(&older)).err().unwrap().to_string();
            assert!(error.contains(policy) && error.contains("--complete"), "{error}");
            assert!(asked.policy(&model.facts(), Some(&completed)).is_ok());
        }
        let again = complete(&mut model, on(&team), completed.clone(), &texts, &options, nobody).unwrap();
        assert_eq!(again, completed, "nothing was lacking");
        // What leaves the output matrix unread, too, is measured anew: it goes by what else was found.
        let rest = |c: Calibration| {
            let mut c = without(c, lacking);
            c.points.retain(|point| !point.choice().output);
            c
        };
        assert_eq!(rest(completed), rest(older), "the rest stays");
    }
}

/// A file from before columns were read coarsely: it goes on meaning what it meant, until it is completed. Then whatever cuts
/// columns is measured anew, and all else stays.
#[test]
fn an_older_calibration_gets_coarse_columns() {
    let file = ModelFile::llama(SHAPE, GgmlType::Q4_1);
    let mut model = file.load().unwrap();
    let team = Team::new(2).unwrap();
    let (found, ids) = calibrated(&mut model, &team, 1);
    assert_eq!(found.cut.as_ref().unwrap().plan.coarse, CutPlan::COARSE);
    let mut older = found.clone();
    older.cut.as_mut().unwrap().plan.coarse = 0.0;
    older = read(&write(&older, &model.facts()), &model).unwrap();
    assert_eq!(older.cut.as_ref().unwrap().plan.coarse, 0.0);
    let cut = SkipOptions { mode: SkipMode::Cut, ratio: Some(0.25), ..Default::default() };
    let unread = |found: &Calibration| {
        let mut model = file.load().unwrap();
        model.set_calibration(found.clone());
        model.prepare_skip(on(&team), &cut, |_, _| {}).unwrap();
        (shares(&model, &team, &cut, &ids).1, model.column_bytes())
    };
    let (fewer, (asked, bytes)) = (unread(&older), unread(&found));
    assert!(fewer.0 < asked - 0.05, "whole columns are {} of the bytes, with coarse ones {asked}", fewer.0);
    assert!((1.3..2.0).contains(&(bytes as f64 / fewer.1 as f64)), "{bytes} {}", fewer.1);
    let options = CalibrateOptions { windows: 4, quality_windows: 1, text: "a text".into() };
    let nobody = &mut |_, _, _| true;
    let completed = complete(&mut model, on(&team), older.clone(), &[ids], &options, nobody).unwrap();
    let kinds = ["cut", "neurons", "mixed"];
    let of = |c: &Calibration, of_cuts: bool| -> Vec<_> {
        let kind = |policy: &str| kinds.contains(&policy);
        let points = c.points.iter().filter(|p| !p.choice().output && kind(&p.policy) == of_cuts);
        points.cloned().collect()
    };
    assert_eq!(of(&completed, false), of(&older, false), "the rest stays");
    assert_eq!(of(&completed, true), of(&found, true), "as it is learnt from the beginning");
    let [again, first] = [&completed, &found].map(|c| c.cut.as_ref().unwrap());
    assert_eq!((&again.curve, &again.neurons), (&first.curve, &first.neurons));
    assert_eq!(again.plan.coarse, first.plan.coarse);
}

// ---- the file

fn write(calibration: &Calibration, facts: &ModelFacts) -> Vec<u8> {
    calibration.write(facts, Vec::new()).unwrap()
}

fn read(bytes: &[u8], model: &Model) -> Result<Calibration, CalibrationError> {
    let file = Gguf::parse(bytes).map_err(CalibrationError::Gguf)?;
    Calibration::read(&file, bytes, &model.facts(), &model.weights().fingerprint())
}

#[test]
fn a_file_gives_back_what_was_written() {
    let (mut model, team) = (model(), Team::new(2).unwrap());
    let (mut found, _) = calibrated(&mut model, &team, 1);
    found.auto = Some(1);
    let bytes = write(&found, &model.facts());
    assert_eq!(read(&bytes, &model).unwrap(), found);

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.skip.gguf");
    std::fs::write(&path, &bytes).unwrap();
    assert_eq!(*model.load_calibration(&path).unwrap(), found);

    // The same shapes with other weights are another model.
    let other = ModelFile::llama(SHAPE, GgmlType::Q4_1).load().unwrap();
    let error = other.load_calibration(&path).unwrap_err().to_string();
    assert!(error.contains("m.skip.gguf") && error.contains("another model"), "{error}");
    let shallow = ModelFile::llama(Shape { layers: 3, ..SHAPE }, GgmlType::Q8_0).load().unwrap();
    let error = shallow.load_calibration(&path).unwrap_err().to_string();
    assert!(error.contains("skip.model.layers 12") && error.contains("has 3"), "{error}");
}

#[test]
fn broken_files_are_errors() {
    let (mut model, team) = (model(), Team::new(2).unwrap());
    let (found, _) = calibrated(&mut model, &team, 0);
    let bytes = write(&found, &model.facts());
    for end in 0..bytes.len() {
        assert!(read(&bytes[..end], &model).is_err() || end + 64 > bytes.len(), "cut at {end}");
    }
    // A changed byte may give another valid file, and never a panic, a number out of range or another length.
    let header = Gguf::parse(&bytes).unwrap().data_start as usize;
    for at in (0..bytes.len()).filter(|at| *at < header || at % 97 == 0) {
        for flip in [0x01, 0x80, 0xff] {
            let mut broken = bytes.clone();
            broken[at] ^= flip;
            if let Ok(read) = read(&broken, &model) {
                assert_eq!(read.cosines.len(), SHAPE.layers);
                assert!(read.cold.0 <= read.cold.1 && read.cold.1 <= SHAPE.layers);
                if let Some(output) = &read.output {
                    let values = [&output.centre[..], &output.directions].concat();
                    assert_eq!(values.len(), (1 + OutputCalibration::DIRECTIONS) * SHAPE.embedding);
                    assert!(values.iter().all(|v| v.is_finite()));
                }
                for mode in [SkipMode::Cut, SkipMode::Neurons, SkipMode::StandIn, SkipMode::Mixed] {
                    let options = SkipOptions { mode, ratio: Some(0.2), ..Default::default() };
                    if let Ok(mut policy) = options.policy(&model.facts(), Some(&read)) {
                        policy.begin_token(100);
                        assert!(match policy.decide(0) {
                            Decision::Cut(Cut::Columns { inputs: t, .. } | Cut::Neurons { gate: t, .. }) =>
                                t >= 0.0,
                            Decision::StandIn { below, otherwise: None } => below.is_finite(),
                            Decision::StandIn { below, otherwise: Some(Cut::Columns { inputs: t, .. }) } =>
                                t >= 0.0 && !below.is_nan(),
                            _ => false,
                        });
                    }
                }
            }
        }
    }
}

/// The file's metadata with one entry changed.
fn changed(bytes: &[u8], key: &str, value: Option<Value>) -> Vec<u8> {
    let file = Gguf::parse(bytes).unwrap();
    let mut builder = Builder::new();
    for (k, v) in file.metadata.iter() {
        match (&value, k == key) {
            (Some(value), true) => builder.insert(k, value.clone()).unwrap(),
            (None, true) => {}
            _ => builder.insert(k, v.clone()).unwrap(),
        }
    }
    for t in &file.tensors {
        builder.tensor(&t.name, t.ty, &t.shape).unwrap();
    }
    let mut out = builder.start(Vec::new()).unwrap();
    for t in &file.tensors {
        out.write_tensor(&bytes[t.offset as usize..][..t.n_bytes as usize]).unwrap();
    }
    out.finish().unwrap()
}

#[test]
fn wrong_keys_are_named() {
    let (mut model, team) = (model(), Team::new(2).unwrap());
    let (mut found, _) = calibrated(&mut model, &team, 0);
    let bytes = write(&found, &model.facts());
    let error = |key: &str, value: Option<Value>| {
        read(&changed(&bytes, key, value), &model).expect_err(key).to_string()
    };
    let cases: [(&str, Value, &str); 21] = [
        ("general.architecture", "llama".into(), "not a calibration file"),
        ("skip.version", 9u32.into(), "skip.version 9"),
        ("skip.model.ffn", 97u32.into(), "skip.model.ffn 97"),
        ("skip.model.fingerprint", "0".into(), "another model"),
        ("skip.cosine", vec![0.5f32; 11].into(), "11 entries, expected 12"),
        ("skip.cosine", vec![1.5f32; 12].into(), "skip.cosine[0] is 1.5"),
        ("skip.influence", vec![f32::NAN; 12].into(), "skip.influence[0] is NaN"),
        ("skip.damage", vec![f32::INFINITY; 12].into(), "skip.damage[0] is inf"),
        ("skip.cold.end", 13u32.into(), "skip.cold.end is 13"),
        ("skip.cut.layer", vec![true; 2].into(), "2 entries, expected 12"),
        ("skip.cut.depth", vec![0f32; 2].into(), "skip.cut.depth has 2 entries"),
        ("skip.cut.depth", vec![f32::NAN; 12].into(), "a finite number"),
        ("skip.cut.coarse", f32::NAN.into(), "skip.cut.coarse[0] is NaN, expected"),
        ("skip.cut.coarse", (-1f32).into(), "skip.cut.coarse[0] is -1, expected"),
        ("skip.cut.ratio", vec![0.5f32, 0.4].into(), "no less than the entry before"),
        ("skip.cut.strength", vec![1f32; 2].into(), "skip.cut.strength has 2 entries"),
        ("skip.stand_in.rank", 129u32.into(), "skip.stand_in.rank is 129"),
        ("skip.stand_in.rank", 0u32.into(), "skip.stand_in.rank is 0"),
        ("skip.stand_in.rank", 64u32.into(), "stand_in.narrow.weight"),
        ("skip.mixed.offset", f32::NAN.into(), "skip.mixed.offset[0] is NaN"),
        ("skip.stand_in.bias", vec![f32::NAN; 12].into(), "skip.stand_in.bias[0] is NaN"),
    ];
    for (key, value, want) in cases {
        let error = error(key, Some(value));
        assert!(error.contains(want), "{key}: {error}");
    }
    assert!(error("skip.cold.start", None).contains("skip.cold.start"));
    found.auto = Some(3);
    let error = read(&write(&found, &model.facts()), &model).unwrap_err().to_string();
    assert!(error.contains("skip.auto is 3"), "{error}");
}
