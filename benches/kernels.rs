//! The kernels on one thread: `dot` for every type, as fast as memory is read; `gemm` with the unpacking that it needs.
//!
//! Scalar code is the reference that results are checked against; it is timed for one type.

mod common;

use std::hint::black_box;

use common::{Random, assert_close, matrix, quantised_types, scalar};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use skiff::gguf::GgmlType;
use skiff::kernels::{Activations, Kernels, PANEL_COLS, PANEL_ROWS, Panel};

const COLS: usize = 4096;
/// More than caches hold.
const WEIGHT_BYTES: usize = 272 << 20;
/// Rows that `dot` takes at a time, as a chunk of a matrix product does.
const CHUNK: usize = 64;
const GEMM_ROWS: usize = 1024;
const TOKENS: [usize; 5] = [2, 8, 32, 128, 512];

fn timed(kernels: Kernels, ty: GgmlType) -> bool {
    kernels.name() != "scalar" || ty == GgmlType::Q4_0
}

fn activations(random: &mut Random, rows: usize) -> Activations {
    let mut acts = Activations::with_capacity(rows, COLS);
    for row in 0..rows {
        scalar().quantize(&random.floats(COLS, 1.0), acts.row_mut(row));
    }
    acts
}

fn dot(criterion: &mut Criterion) {
    let mut random = Random(1);
    let acts = activations(&mut random, 1);
    let mut group = common::group(criterion, "dot");
    for ty in quantised_types() {
        let chunk_bytes = CHUNK * ty.row_bytes(COLS);
        let weights = matrix(&mut random, ty, CHUNK * WEIGHT_BYTES.div_ceil(chunk_bytes), COLS, 0.05);
        let mut want = [0f32; CHUNK];
        scalar().dot(ty, &weights[..chunk_bytes], acts.row(0), &mut want);
        for kernels in Kernels::available().filter(|&k| timed(k, ty)) {
            let mut out = [0f32; CHUNK];
            kernels.dot(ty, &weights[..chunk_bytes], acts.row(0), &mut out);
            assert_close(&format!("dot {} {ty}", kernels.name()), &out, &want, 1e-5);
            // Arithmetic bounds scalar code: it needs no more memory than caches hold.
            let weights = if kernels.name() == "scalar" { &weights[..8 << 20] } else { &weights[..] };
            let weights = &weights[..weights.len() / chunk_bytes * chunk_bytes];
            group.throughput(Throughput::Bytes(weights.len() as u64));
            group.bench_function(BenchmarkId::new(kernels.name(), ty), |bencher| {
                bencher.iter(|| {
                    for chunk in weights.chunks_exact(chunk_bytes) {
                        kernels.dot(ty, chunk, acts.row(0), &mut out);
                        black_box(&mut out);
                    }
                });
            });
        }
    }
}

/// `out[panel][token][row]`
fn multiply(
    kernels: Kernels,
    ty: GgmlType,
    weights: &[u8],
    acts: &Activations,
    panel: &mut Panel,
    out: &mut [f32],
) {
    let row_bytes = ty.row_bytes(COLS);
    let outs = out.chunks_exact_mut(acts.rows() * PANEL_ROWS);
    for (weights, out) in weights.chunks_exact(PANEL_ROWS * row_bytes).zip(outs) {
        out.fill(0.0);
        for col in (0..COLS).step_by(PANEL_COLS) {
            kernels.unpack(ty, weights, row_bytes, col..col + PANEL_COLS, panel);
            kernels.gemm(panel, acts.from_col(0..acts.rows(), col), out);
        }
    }
}

fn gemm(criterion: &mut Criterion) {
    let mut random = Random(2);
    let (mut panel, mut group) = (Panel::default(), common::group(criterion, "gemm"));
    group.measurement_time(std::time::Duration::from_secs(1));
    for ty in quantised_types() {
        let weights = matrix(&mut random, ty, GEMM_ROWS, COLS, 0.05);
        for tokens in TOKENS {
            let acts = activations(&mut random, tokens);
            let mut want = vec![0f32; tokens.min(8) * PANEL_ROWS];
            let first = &weights[..PANEL_ROWS * ty.row_bytes(COLS)];
            let mut row = [0f32; PANEL_ROWS];
            for (t, want) in want.chunks_exact_mut(PANEL_ROWS).enumerate() {
                scalar().dot(ty, first, acts.row(t), &mut row);
                want.copy_from_slice(&row);
            }
            for kernels in Kernels::available().filter(|&k| timed(k, ty)) {
                let rows = if kernels.name() == "scalar" { PANEL_ROWS } else { GEMM_ROWS };
                let weights = &weights[..rows * ty.row_bytes(COLS)];
                let mut out = vec![0f32; tokens * rows];
                multiply(kernels, ty, weights, &acts, &mut panel, &mut out);
                assert_close(&format!("gemm {} {ty}", kernels.name()), &out[..want.len()], &want, 1e-5);
                group.throughput(Throughput::Elements((2 * tokens * rows * COLS) as u64));
                let id = BenchmarkId::new(format!("{}/{ty}", kernels.name()), tokens);
                group.bench_function(id, |bencher| {
                    bencher.iter(|| {
                        multiply(kernels, ty, weights, &acts, &mut panel, &mut out);
                        black_box(&mut out);
                    });
                });
            }
        }
    }
}

criterion_group! { name = kernels; config = common::criterion(); targets = dot, gemm }
criterion_main!(kernels);
