//! The forward pass on all cores: a prompt and decoding, at the start and behind 2048 tokens.

mod common;

use std::hint::black_box;

use common::{assert_close, best, decode, ids, prompt, scalar, state};
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use skiff::model::Model;
use skiff::ops::Compute;
use skiff::skip::Never;
use skiff::threads::{Team, default_threads};

const PROMPT: usize = 512;
const DEPTH: usize = 2048;

/// The logits after a prompt are those of scalar code, up to the rounding of activations, and the same whether its
/// last token came with the others or alone.
fn check(name: &str, model: &Model, on: Compute<'_>) {
    let tokens = ids(8, model.config().vocab);
    let mut now = state(model, on, tokens.len(), Box::new(Never));
    prompt(model, on, &mut now, &tokens);
    let together = model.logits(on, &mut now, tokens.len() - 1).to_vec();
    now.truncate(0);
    prompt(model, on, &mut now, &tokens[..7]);
    let alone = decode(model, on, &mut now, tokens[7], 0).to_vec();
    assert_close(&format!("{name}, one by one"), &alone, &together, 0.05);
    let reference = Compute { kernels: scalar(), ..on };
    now.truncate(0);
    prompt(model, reference, &mut now, &tokens);
    let want = model.logits(reference, &mut now, tokens.len() - 1);
    assert_close(&format!("{name}, {}", on.kernels.name()), &together, want, 0.05);
}

fn model(criterion: &mut Criterion, name: &str, model: &Model) {
    let team = Team::new(default_threads()).unwrap();
    let on = Compute { team: &team, kernels: best() };
    check(name, model, on);
    let tokens = ids(DEPTH + PROMPT, model.config().vocab);
    let mut now = state(model, on, DEPTH + PROMPT, Box::new(Never));
    let mut group = common::group(criterion, name);

    group.throughput(Throughput::Elements(PROMPT as u64));
    for (depth, name) in
        [(0, format!("prefill {PROMPT}")), (DEPTH, format!("prefill {PROMPT} at depth {DEPTH}"))]
    {
        now.truncate(0);
        prompt(model, on, &mut now, &tokens[..depth]);
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                now.truncate(depth);
                prompt(model, on, &mut now, &tokens[depth..depth + PROMPT]);
                black_box(model.logits(on, &mut now, PROMPT - 1)[0])
            });
        });
    }
    // The position is put back after each token, so every one has the same depth.
    group.throughput(Throughput::Bytes(model.decode_bytes()));
    for depth in [1, DEPTH] {
        now.truncate(0);
        prompt(model, on, &mut now, &tokens[..depth]);
        group.bench_function(format!("decode at depth {depth}"), |bencher| {
            bencher.iter_batched(
                || (),
                |()| {
                    now.truncate(depth);
                    black_box(decode(model, on, &mut now, tokens[depth], 0)[0])
                },
                BatchSize::PerIteration,
            );
        });
    }
}

fn forward(criterion: &mut Criterion) {
    if !common::wanted("forward") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = common::write_synthetic(folder.path());
    model(criterion, "forward, synthetic 0.3B Q4_0", &Model::load(&path).unwrap());
    if let Some(path) = common::smollm2() {
        model(criterion, "forward, SmolLM2 135M", &Model::load(&path).unwrap());
    }
}

criterion_group! { name = benches; config = common::criterion(); targets = forward }
criterion_main!(benches);
