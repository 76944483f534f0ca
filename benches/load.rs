//! Loading: from a path to a model that can run, its file being in the page cache.

mod common;

use std::hint::black_box;
use std::path::Path;

use criterion::{Criterion, criterion_group, criterion_main};
use skiff::model::Model;
use skiff::session::Engine;
use skiff::tokenizer::EncodeOptions;
use skiff::weights::Weights;

/// The tensors of the loaded model are the ones of the file.
fn check(path: &Path) {
    let (model, weights) = (Model::load(path).unwrap(), Weights::open(path).unwrap());
    let config = model.config();
    assert_eq!(model.layers().len(), config.layers);
    for (i, layer) in model.layers().iter().enumerate() {
        let name = format!("blk.{i}.ffn_down.weight");
        let want = weights.tensor(&name, config.embedding, config.ffn).unwrap();
        assert!(layer.ffn.down.matrix().bytes() == want.matrix().bytes(), "{name} is not what the file has");
    }
}

fn load(criterion: &mut Criterion) {
    if !common::wanted("load") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let synthetic = common::write_synthetic(folder.path());
    let mut group = criterion.benchmark_group("load");
    check(&synthetic);
    group.bench_function("model, synthetic 0.3B Q4_0", |b| {
        b.iter(|| black_box(Model::load(&synthetic)).unwrap())
    });
    let Some(path) = common::smollm2() else { return };
    check(&path);
    group.bench_function("model, SmolLM2 135M", |b| b.iter(|| black_box(Model::load(&path)).unwrap()));
    let load = || Engine::load(&path, None, None).unwrap();
    let engine = load();
    let ids = engine.tokenizer().encode("Why is the sky blue?", EncodeOptions::default()).unwrap();
    assert_eq!(ids, [4898, 314, 260, 6376, 4461, 47]);
    group.bench_function("with tokenizer and threads, SmolLM2 135M", |b| b.iter(|| black_box(load())));
}

criterion_group! { name = benches; config = common::criterion(); targets = load }
criterion_main!(benches);
