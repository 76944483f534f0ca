//! What skipping FFNs gains, whatever a policy costs in quality: decoding with a forced share of the FFNs skipped,
//! beside the gain that the bytes left unread would give.

mod common;

use std::hint::black_box;
use std::time::Instant;

use common::{best, decode, distance, ids, prompt, state};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use skiff::model::{Model, State};
use skiff::ops::Compute;
use skiff::skip::{Decision, Never, SkipPolicy};
use skiff::threads::{Team, default_threads};

/// Tokens of an iteration: with four layers, 10 % of their FFNs is a whole number.
const TOKENS: usize = 10;
const PERCENT: [usize; 4] = [0, 10, 20, 30];
/// Turns of the comparison.
const ROUNDS: usize = 9;

/// Skips `percent` of all FFNs, evenly spread over layers and tokens.
#[derive(Clone)]
struct Forced {
    percent: usize,
    decisions: usize,
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
        if skip { Decision::Skip } else { Decision::Run }
    }

    fn reset(&mut self) {
        self.decisions = 0;
    }

    fn boxed_clone(&self) -> Box<dyn SkipPolicy> {
        Box::new(self.clone())
    }
}

fn forced(percent: usize) -> Box<dyn SkipPolicy> {
    Box::new(Forced { percent, decisions: 0 })
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

/// Nothing forced is bit by bit the full model; what is forced is skipped, and matters.
fn check(model: &Model, on: Compute<'_>, tokens: &[u32]) {
    let run = |policy| {
        let mut now = state(model, on, TOKENS + 1, policy);
        prompt(model, on, &mut now, &tokens[..1]);
        let logits = generate(model, on, &mut now, tokens);
        (logits, now.stats().share())
    };
    let (full, _) = run(Box::new(Never));
    for percent in PERCENT {
        let (logits, share) = run(forced(percent));
        let want = (TOKENS * model.config().layers * percent / 100) as f64;
        assert_eq!(share, want / (TOKENS * model.config().layers) as f64, "{percent} % were to be skipped");
        match percent {
            0 => assert_eq!(logits, full, "skipping nothing changes the result"),
            _ => assert!(distance(&logits, &full) > 1e-3, "{percent} % skipped and nothing changes"),
        }
        assert!(logits.iter().all(|v| v.is_finite()));
    }
}

fn model(criterion: &mut Criterion, name: &str, model: &Model) {
    let team = Team::new(default_threads()).unwrap();
    let on = Compute { team: &team, kernels: best() };
    let tokens = ids(TOKENS, model.config().vocab);
    check(model, on, &tokens);
    let mut states: Vec<State> =
        PERCENT.iter().map(|&percent| state(model, on, TOKENS + 1, forced(percent))).collect();
    for now in &mut states {
        prompt(model, on, now, &tokens[..1]);
    }
    let mut group = common::group(criterion, name);
    group.throughput(Throughput::Elements(TOKENS as u64));
    for (percent, now) in PERCENT.iter().zip(&mut states) {
        group.bench_function(format!("decode, {percent} % of FFNs skipped"), |bencher| {
            bencher.iter(|| black_box(generate(model, on, now, &tokens)));
        });
    }
    group.finish();
    compare(name, model, on, &tokens, &mut states);
}

/// Times the shares in turn, so that what else the machine does hits all alike, and prints gain and ideal.
fn compare(name: &str, model: &Model, on: Compute<'_>, tokens: &[u32], states: &mut [State]) {
    let mut times = vec![Vec::new(); PERCENT.len()];
    for _ in 0..ROUNDS {
        for (now, times) in states.iter_mut().zip(&mut times) {
            let started = Instant::now();
            black_box(generate(model, on, now, tokens));
            times.push(started.elapsed().as_secs_f64());
        }
    }
    let medians: Vec<f64> = times
        .iter_mut()
        .map(|times| {
            times.sort_by(f64::total_cmp);
            times[ROUNDS / 2]
        })
        .collect();
    let all = model.decode_bytes() as f64;
    println!("{name}: skipped, tokens/s, gain, ideal gain (medians of {ROUNDS} turns)");
    for (percent, time) in PERCENT.iter().zip(&medians) {
        let ideal = all / (all - model.ffn_bytes() as f64 * *percent as f64 / 100.0);
        let (speed, gain) = (TOKENS as f64 / time, medians[0] / time);
        println!("    {percent:>2} %  {speed:>7.1}  {gain:.3}  {ideal:.3}");
    }
    println!();
}

fn skip(criterion: &mut Criterion) {
    if !common::wanted("skip") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = common::write_synthetic(folder.path());
    model(criterion, "skip, synthetic 0.3B Q4_0", &Model::load(&path).unwrap());
    if let Some(path) = common::smollm2() {
        model(criterion, "skip, SmolLM2 135M", &Model::load(&path).unwrap());
    }
}

criterion_group! { name = benches; config = common::criterion(); targets = skip }
criterion_main!(benches);
