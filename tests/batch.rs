//! Several sequences in one step: each gets what it gets alone.

mod common;

use common::models::{ModelFile, WIDE, stand_ins};
use skiff::gguf::GgmlType;
use skiff::kernels::FEW_TOKENS;
use skiff::kernels::Kernels;
use skiff::model::{
    Buffers, ColumnForms, FfnStep, KvType, Model, ModelError, Part, Products, Sequence, State,
};
use skiff::ops::Compute;
use skiff::sampler::{Sampler, SamplerOptions, StopMatcher};
use skiff::session::{Batch, End, Engine, Sampling, Session, SessionOptions};
use skiff::skip::{CutPlan, FfnSkip, LayerCut, Never, Random, ShortGpt, SkipOptions, SkipPolicy, Uniform};
use skiff::threads::Team;

const CONTEXT: usize = 96;

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// A policy of each kind, one after the other.
fn policy(i: usize) -> Box<dyn SkipPolicy> {
    match i % 6 {
        0 => Box::new(Never),
        1 => Box::new(FfnSkip::new(0.3, 1, 1, (0, WIDE.layers))),
        2 => Box::new(Random::new(0.5, i as u64, 0, 0..WIDE.layers)),
        3 => Box::new(Uniform::stand_ins(0.0, 0, 0..WIDE.layers)),
        4 => Box::new(Uniform::mixed(0.0, 0.3, 0, 0..WIDE.layers)),
        _ => Box::new(ShortGpt::new(&[1], WIDE.layers, 2)),
    }
}

/// Ready for all of them.
fn model(ty: GgmlType) -> Model {
    let mut model = ModelFile::llama(WIDE, ty).load().unwrap();
    model.prepare_stand_ins(stand_ins(WIDE, 0.05)).unwrap();
    let plan = CutPlan { layers: vec![Some(LayerCut::default()); WIDE.layers], ..CutPlan::default() };
    let team = Team::new(1).unwrap();
    let on = Compute { team: &team, kernels: Kernels::select(None).unwrap() };
    // By rows: columns are for one row alone, and round differently.
    model.prepare_cuts(on, plan, ColumnForms::None, |_, _| {}).unwrap();
    model
}

/// The prompt of sequence `i`, each of another length.
fn prompt(i: usize) -> Vec<u32> {
    (0..3 + 2 * i % 7).map(|t| ((i * 31 + t * 17) % WIDE.vocab) as u32).collect()
}

/// Tokens that are decoded after it.
fn token(i: usize, t: usize) -> u32 {
    ((i * 13 + t * 29 + 5) % WIDE.vocab) as u32
}

const TOKENS: usize = 6;

/// Logits `[sequence][token]` and shares skipped when sequences `which` are evaluated in steps together.
fn together(
    model: &Model,
    kv: KvType,
    threads: usize,
    products: Products,
    which: &[usize],
) -> (Vec<Vec<Vec<u32>>>, Vec<f64>) {
    let team = Team::new(threads).unwrap();
    let on = Compute { team: &team, kernels: Kernels::select(None).unwrap() };
    let mut buffers = Buffers::new(model, &team, 64, products);
    let mut sequences: Vec<Sequence> =
        which.iter().map(|&i| Sequence::new(model, CONTEXT, kv, policy(i))).collect();
    for (sequence, &i) in sequences.iter_mut().zip(which) {
        let part = Part { sequence, tokens: &prompt(i), step: FfnStep::Full };
        model.forward_parts(on, &mut buffers, &mut [part]).unwrap();
    }
    let mut logits = vec![Vec::new(); which.len()];
    for t in 0..TOKENS {
        let tokens: Vec<[u32; 1]> = which.iter().map(|&i| [token(i, t)]).collect();
        let step = FfnStep::Governed { index: t };
        let mut parts: Vec<Part<'_>> = sequences
            .iter_mut()
            .zip(&tokens)
            .map(|(sequence, tokens)| Part { sequence, tokens, step })
            .collect();
        model.forward_parts(on, &mut buffers, &mut parts).unwrap();
        let mut out = vec![0.0; which.len() * WIDE.vocab];
        model.logits_of_parts(on, &mut buffers, 0..which.len(), &mut out);
        out.chunks(WIDE.vocab).zip(&mut logits).for_each(|(row, logits)| logits.push(bits(row)));
    }
    (logits, sequences.iter().map(|s| s.stats().share()).collect())
}

/// The same of one sequence with a state of its own.
fn alone(model: &Model, kv: KvType, i: usize) -> (Vec<Vec<u32>>, f64) {
    let team = Team::new(1).unwrap();
    let on = Compute { team: &team, kernels: Kernels::select(None).unwrap() };
    let mut state = State::new(model, &team, (CONTEXT, 64), kv, policy(i));
    model.forward(on, &mut state, &prompt(i), FfnStep::Full).unwrap();
    let logits = (0..TOKENS).map(|t| {
        model.forward(on, &mut state, &[token(i, t)], FfnStep::Governed { index: t }).unwrap();
        bits(model.logits(on, &mut state, 0))
    });
    let logits = logits.collect();
    (logits, state.stats().share())
}

#[test]
fn up_to_16_sequences_give_bit_by_bit_what_each_gives_alone() {
    for ty in [GgmlType::Q4_1, GgmlType::Q6_K] {
        let model = model(ty);
        for kv in [KvType::F16, KvType::Q8_0] {
            let all: Vec<usize> = (0..FEW_TOKENS).collect();
            let want: Vec<_> = all.iter().map(|&i| alone(&model, kv, i)).collect();
            assert!(want.iter().any(|(_, share)| *share > 0.1), "some skip");
            let (two, both, three) = ([3, 6], [4, 6], [3, 4, 6]);
            // Some of all kinds, and two of which both or one run an FFN.
            for (threads, which) in
                [(1, &all[..]), (3, &all[..]), (1, &all[3..9]), (1, &two), (1, &both), (1, &three)]
            {
                let (logits, shares) = together(&model, kv, threads, Products::Fastest, which);
                for ((got, share), &i) in logits.iter().zip(shares).zip(which) {
                    assert!(*got == want[i].0, "{ty} {kv:?} threads {threads}, {i} of {which:?}");
                    assert_eq!(share, want[i].1, "{ty} {kv:?} {i}");
                }
            }
        }
    }
}

#[test]
fn as_for_many_any_number_of_sequences_gives_what_one_gives() {
    for ty in [GgmlType::Q4_1, GgmlType::Q4_K] {
        let model = model(ty);
        let all: Vec<usize> = (0..40).collect();
        let (many, shares) = together(&model, KvType::F16, 2, Products::AsForMany, &all);
        for few in [&all[7..8], &all[3..8], &all[20..39]] {
            let (logits, few_shares) = together(&model, KvType::F16, 1, Products::AsForMany, few);
            for (j, &i) in few.iter().enumerate() {
                assert!(logits[j] == many[i], "{ty}: {i} among {}", few.len());
                assert_eq!(few_shares[j], shares[i]);
            }
        }
    }
}

/// A prompt and the tokens of others in one step, as a server has it.
#[test]
fn a_prompt_may_share_a_step_with_single_tokens() {
    let model = model(GgmlType::Q4_1);
    let team = Team::new(2).unwrap();
    let on = Compute { team: &team, kernels: Kernels::select(None).unwrap() };
    let step = |parts: &[(usize, &[u32])]| {
        let mut buffers = Buffers::new(&model, &team, 64, Products::Fastest);
        let mut sequences: Vec<Sequence> =
            parts.iter().map(|&(i, _)| Sequence::new(&model, CONTEXT, KvType::F16, policy(i))).collect();
        let mut logits = Vec::new();
        // Twice, so that the second step looks back on the first.
        for index in [0, 5] {
            let step = FfnStep::Governed { index };
            let parts = sequences.iter_mut().zip(parts);
            let mut parts: Vec<_> =
                parts.map(|(sequence, &(_, tokens))| Part { sequence, tokens, step }).collect();
            model.forward_parts(on, &mut buffers, &mut parts).unwrap();
            let n = buffers.rows();
            logits = vec![0.0; n * WIDE.vocab];
            model.logits_of_parts(on, &mut buffers, 0..n, &mut logits);
        }
        bits(&logits)
    };
    let [a, b, c, d, e]: [&[u32]; 5] = [&[7], &[1, 2, 3, 4, 5], &[9], &[11, 12, 13], &[15]];
    let all = step(&[(0, a), (1, b), (2, c), (3, d), (4, e)]);
    let each: Vec<u32> =
        [(0, a), (1, b), (2, c), (3, d), (4, e)].into_iter().flat_map(|part| step(&[part])).collect();
    assert!(all == each);
}

#[test]
fn a_copied_prefix_is_as_good_as_evaluating_it() {
    let model = ModelFile::llama(WIDE, GgmlType::Q4_1).load().unwrap();
    let team = Team::new(1).unwrap();
    let on = Compute { team: &team, kernels: Kernels::select(None).unwrap() };
    for kv in [KvType::F32, KvType::F16, KvType::Q8_0] {
        let mut buffers = Buffers::new(&model, &team, 64, Products::Fastest);
        let mut logits = |sequence: &mut Sequence, tokens: &[u32]| {
            let part = Part { sequence, tokens, step: FfnStep::Full };
            model.forward_parts(on, &mut buffers, &mut [part]).unwrap();
            let mut out = vec![0.0; WIDE.vocab];
            let last = tokens.len() - 1;
            model.logits_of_parts(on, &mut buffers, last..last + 1, &mut out);
            bits(&out)
        };
        let mut first = Sequence::new(&model, CONTEXT, kv, policy(0));
        logits(&mut first, &[1, 2, 3, 4, 5]);
        // Another context: heads are elsewhere.
        let mut second = Sequence::new(&model, CONTEXT / 2, kv, policy(0));
        logits(&mut second, &[9, 9]);
        second.copy_prefix(&first, 3);
        let got = logits(&mut second, &[7, 8]);
        first.truncate(3);
        assert!(got == logits(&mut first, &[7, 8]), "{kv:?}");
        assert_eq!(second.position(), 5);
    }
}

/// Sequences that begin alike and hold that once: what each gives does not tell, whatever happens to it next.
#[test]
fn a_shared_prefix_is_as_good_as_one_of_its_own() {
    let model = ModelFile::llama(WIDE, GgmlType::Q4_1).load().unwrap();
    let team = Team::new(2).unwrap();
    let on = Compute { team: &team, kernels: Kernels::select(None).unwrap() };
    let prompt: Vec<u32> = (0..300).map(|i| (i * 7 % WIDE.vocab) as u32).collect();
    for kv in [KvType::F32, KvType::F16, KvType::Q8_0] {
        let mut buffers = Buffers::new(&model, &team, 512, Products::AsForMany);
        let mut step = |sequences: &mut [Sequence], tokens: &[u32]| {
            let parts = sequences.iter_mut();
            let mut parts: Vec<_> =
                parts.map(|sequence| Part { sequence, tokens, step: FfnStep::Full }).collect();
            model.forward_parts(on, &mut buffers, &mut parts).unwrap();
            let n = buffers.rows();
            let mut out = vec![0.0; n * WIDE.vocab];
            model.logits_of_parts(on, &mut buffers, 0..n, &mut out);
            bits(&out)
        };
        let new = || Sequence::new(&model, 400, kv, policy(0));
        let mut whole = new();
        step(std::slice::from_mut(&mut whole), &prompt);
        let cache = {
            let mut sequence = new();
            sequence.copy_prefix(&whole, 300);
            sequence.into_kv()
        };
        let pair = |positions: usize| {
            let (mut own, mut shared) = (new(), new());
            own.copy_prefix(&whole, positions);
            shared.share_prefix(&cache, positions);
            (own, shared)
        };
        for positions in [5, 127, 128, 200, 256, 300] {
            let (own, shared) = pair(positions);
            let mut both = [own, shared];
            for t in 0..3 {
                let logits = step(&mut both, &[9 + t]);
                assert!(logits[..WIDE.vocab] == logits[WIDE.vocab..], "{kv:?} {positions}");
            }
            // A prompt after it, then back into what is shared, and over it.
            for (tokens, back) in [(20, 290), (3, 130), (40, 128), (2, 60), (30, 0), (5, 5)] {
                let logits = step(&mut both, &prompt[..tokens]);
                assert!(
                    logits[..logits.len() / 2] == logits[logits.len() / 2..],
                    "{kv:?} {positions} {back}"
                );
                both.iter_mut().for_each(|s| s.truncate(back));
            }
        }
        let (own, shared) = pair(300);
        let mut both = [own, shared];
        both.iter_mut().for_each(|s| s.shift(&model, on, 4, 50));
        let logits = step(&mut both, &[3]);
        assert!(logits[..WIDE.vocab] == logits[WIDE.vocab..], "{kv:?} shifted");
        // A copy of a sequence that shares.
        let (_, shared) = pair(200);
        let (own, mut copy) = (pair(150).0, new());
        copy.copy_prefix(&shared, 150);
        let logits = step(&mut [own, copy], &[3]);
        assert!(logits[..WIDE.vocab] == logits[WIDE.vocab..], "{kv:?} copied");
        assert!(step(std::slice::from_mut(&mut whole), &[3]) != logits[..WIDE.vocab]);
    }
}

#[test]
fn a_part_that_does_not_fit_leaves_all_as_they_were() {
    let model = ModelFile::llama(WIDE, GgmlType::Q4_1).load().unwrap();
    let team = Team::new(1).unwrap();
    let on = Compute { team: &team, kernels: Kernels::select(None).unwrap() };
    let mut buffers = Buffers::new(&model, &team, 64, Products::Fastest);
    let mut a = Sequence::new(&model, 8, KvType::F16, policy(0));
    let mut b = Sequence::new(&model, 2, KvType::F16, policy(0));
    let mut step = |a: &mut Sequence, b: &mut Sequence, tokens: &[u32]| {
        let step = FfnStep::Full;
        let mut parts = [Part { sequence: a, tokens: &[1], step }, Part { sequence: b, tokens, step }];
        model.forward_parts(on, &mut buffers, &mut parts)
    };
    assert!(matches!(step(&mut a, &mut b, &[1, 2, 3]), Err(ModelError::ContextFull { .. })));
    assert!(matches!(step(&mut a, &mut b, &[u32::MAX]), Err(ModelError::TokenId { .. })));
    assert_eq!((a.position(), b.position()), (0, 0));
    step(&mut a, &mut b, &[1, 2]).unwrap();
    assert_eq!((a.position(), b.position()), (1, 2));
}

/// Lanes that come and go generate what sessions generate.
#[test]
fn lanes_generate_what_sessions_generate() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let mut file = ModelFile::llama(WIDE, GgmlType::Q4_1);
    file.set_vocabulary();
    file.write(&path);
    let engine = Engine::load(&path, Some(2), None).unwrap();
    let greedy = || Sampler::new(SamplerOptions::greedy()).unwrap();
    // The last stops at a string that the first generates.
    let max = |i: usize| 3 + 2 * i;
    let stop = |i: usize| StopMatcher::new(if i == 5 { vec!["w1"] } else { vec![] });
    let session = |i: usize| {
        let options = SessionOptions { context: Some(CONTEXT), ..Default::default() };
        let mut session = Session::new(&engine, options).unwrap();
        let prompt = prompt(i);
        let (&last, before) = prompt.split_last().unwrap();
        session.prompt(before, |_, _| true).unwrap();
        session.push(last).unwrap();
        let mut sampler = greedy();
        let sampling = Sampling { sampler: &mut sampler, constraint: None, stop: stop(i), ignore_eos: false };
        let mut generation = session.generate(sampling, max(i));
        let text: String = generation.by_ref().map(|piece| piece.unwrap().text).collect();
        (text, generation.end())
    };
    let mut batch = Batch::new(&engine, 32, Products::Fastest);
    let mut waiting: Vec<usize> = (0..12).rev().collect();
    let mut lanes = Vec::new();
    let mut texts = vec![String::new(); 12];
    let mut ends: Vec<Option<End>> = vec![None; 12];
    while !(waiting.is_empty() && lanes.is_empty()) {
        while lanes.len() < 5
            && let Some(i) = waiting.pop()
        {
            let prompt = prompt(i);
            let (&last, before) = prompt.split_last().unwrap();
            let mut sequence = batch.sequence(CONTEXT, KvType::F16, &SkipOptions::default()).unwrap();
            batch.prompt(&mut sequence, before, None).unwrap();
            lanes.push((i, batch.lane(sequence, (last, 0), greedy(), stop(i), max(i))));
        }
        let names: Vec<usize> = lanes.iter().map(|(i, _)| *i).collect();
        let mut steps: Vec<_> = lanes.iter_mut().map(|(_, lane)| lane).collect();
        batch.advance(&mut steps, |lane, piece| texts[names[lane]].push_str(&piece.text)).unwrap();
        lanes.iter().for_each(|(i, lane)| ends[*i] = lane.end());
        lanes.retain(|(_, lane)| lane.end().is_none());
    }
    for i in 0..12 {
        assert_eq!((texts[i].clone(), ends[i]), session(i), "{i}");
    }
}
