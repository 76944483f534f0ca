//! The kernels on one thread: `dot` for every type, as fast as memory is read; several tokens the way matrix products
//! take them, `dot_tokens` for a few and, with the unpacking that it needs, `gemm` or a matrix unit for many.
//!
//! Scalar code is the reference that results are checked against; it is timed for one type.

mod common;

use std::hint::black_box;
use std::time::Duration;

use common::{Random, assert_close, matrix, quantised_types, scalar};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use skiff::gguf::GgmlType;
use skiff::kernels::tiles::{TILE, TileInputs, TilePanel, chunk_cols};
use skiff::kernels::{Activations, Kernels, PANEL_COLS, PANEL_ROWS, Panel};
use skiff::quant::dequantize_row;

const COLS: usize = 4096;
/// More than caches hold.
const WEIGHT_BYTES: usize = 272 << 20;
/// Rows that `dot` takes at a time, as a chunk of a matrix product does.
const CHUNK: usize = 64;
/// Rows of weights that several tokens are multiplied with, and those for scalar code.
const ROWS: usize = 512;
const SCALAR_ROWS: usize = PANEL_ROWS;
const TOKENS: [usize; 5] = [2, 8, 32, 128, 512];
/// Tokens whose products are checked.
const CHECKED: usize = 8;

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
    let mut group = common::group(criterion, "kernels/dot");
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
            let weights = if kernels.name() == "scalar" { &weights[..2 << 20] } else { &weights[..] };
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

/// Rows of activations for a matrix unit.
fn tiles(kernels: Kernels, values: &[f32]) -> TileInputs {
    let mut tiles = TileInputs::default();
    tiles.reshape(values.len() / COLS, COLS);
    for (values, to) in values.chunks(TILE * COLS).zip(tiles.groups_mut()) {
        kernels.pack_tiles(values, to);
    }
    tiles
}

/// `out[panel][token][row]` by a matrix unit, tokens padded to whole tiles.
fn multiply_tiles(
    kernels: Kernels,
    ty: GgmlType,
    weights: &[u8],
    x: &TileInputs,
    panel: &mut TilePanel,
    out: &mut [f32],
) {
    let row_bytes = ty.row_bytes(COLS);
    let outs = out.chunks_exact_mut(x.groups() * TILE * PANEL_ROWS);
    for (weights, out) in weights.chunks_exact(PANEL_ROWS * row_bytes).zip(outs) {
        out.fill(0.0);
        for (chunk, col) in (0..COLS).step_by(chunk_cols(COLS)).enumerate() {
            kernels.unpack_tiles(ty, (weights, row_bytes), col..col + chunk_cols(COLS), false, panel);
            kernels.multiply_tiles(panel, x, chunk, out);
        }
        kernels.turn_tiles(out);
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
        if acts.rows() < kernels.panels_from() {
            kernels.dot_tokens(ty, weights, acts, out);
            continue;
        }
        out.fill(0.0);
        for col in (0..COLS).step_by(PANEL_COLS) {
            kernels.unpack(ty, (weights, row_bytes), col..col + PANEL_COLS, false, panel);
            kernels.gemm(panel, acts.from_col(0..acts.rows(), col), out);
        }
    }
}

/// The first panel of `out` against scalar code, for tokens from the first to the last.
fn check(name: &str, ty: GgmlType, weights: &[u8], acts: &Activations, out: &[f32]) {
    let first = &weights[..PANEL_ROWS * ty.row_bytes(COLS)];
    let step = acts.rows().div_ceil(CHECKED);
    for t in (0..acts.rows()).rev().step_by(step) {
        let mut want = [0f32; PANEL_ROWS];
        scalar().dot(ty, first, acts.row(t), &mut want);
        assert_close(&format!("{name} {ty}, token {t}"), &out[t * PANEL_ROWS..][..PANEL_ROWS], &want, 1e-5);
    }
}

/// The first panel of `out` against exact products.
fn check_exact(name: &str, ty: GgmlType, weights: &[u8], values: &[f32], out: &[f32]) {
    let (rows, step) = (values.len() / COLS, (values.len() / COLS).div_ceil(CHECKED));
    let mut row = [0f32; COLS];
    for t in (0..rows).rev().step_by(step) {
        let mut want = [0f32; PANEL_ROWS];
        for (weights, want) in weights.chunks_exact(ty.row_bytes(COLS)).zip(&mut want) {
            dequantize_row(ty, weights, &mut row);
            let x = &values[t * COLS..][..COLS];
            *want = x.iter().zip(&row).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum::<f64>() as f32;
        }
        assert_close(&format!("{name} {ty}, token {t}"), &out[t * PANEL_ROWS..][..PANEL_ROWS], &want, 1e-3);
    }
}

fn tokens(criterion: &mut Criterion) {
    let mut random = Random(2);
    let (mut panel, mut tile_panel) = (Panel::default(), TilePanel::default());
    let mut group = common::group(criterion, "kernels/tokens");
    let batches = TOKENS.map(|tokens| {
        let values = random.floats(tokens * COLS, 1.0);
        let mut acts = Activations::with_capacity(tokens, COLS);
        for (row, values) in values.chunks_exact(COLS).enumerate() {
            scalar().quantize(values, acts.row_mut(row));
        }
        (values, acts)
    });
    for ty in quantised_types() {
        let weights = matrix(&mut random, ty, ROWS, COLS, 0.05);
        for (values, acts) in &batches {
            for kernels in Kernels::available().filter(|&k| timed(k, ty)) {
                let rows = if kernels.name() == "scalar" { SCALAR_ROWS } else { ROWS };
                let weights = &weights[..rows * ty.row_bytes(COLS)];
                let mut out = vec![0f32; acts.rows().next_multiple_of(TILE) * rows];
                group.throughput(Throughput::Elements((2 * acts.rows() * rows * COLS) as u64));
                let id = BenchmarkId::new(format!("{}/{ty}", kernels.name()), acts.rows());
                if kernels.has_tiles() && acts.rows() >= kernels.panels_from() {
                    let x = tiles(kernels, values);
                    multiply_tiles(kernels, ty, weights, &x, &mut tile_panel, &mut out);
                    check_exact(kernels.name(), ty, weights, values, &out);
                    group.bench_function(id, |bencher| {
                        bencher.iter(|| {
                            multiply_tiles(kernels, ty, weights, &x, &mut tile_panel, &mut out);
                            black_box(&mut out);
                        });
                    });
                    continue;
                }
                multiply(kernels, ty, weights, acts, &mut panel, &mut out);
                check(kernels.name(), ty, weights, acts, &out);
                group.bench_function(id, |bencher| {
                    bencher.iter(|| {
                        multiply(kernels, ty, weights, acts, &mut panel, &mut out);
                        black_box(&mut out);
                    });
                });
            }
        }
    }
}

/// There are some 150 benchmarks: half a second each.
fn kernels(criterion: &mut Criterion) {
    if common::wanted("kernels") {
        dot(criterion);
        tokens(criterion);
    }
}

criterion_group! {
    name = benches;
    config = common::criterion().warm_up_time(Duration::from_millis(50)).measurement_time(Duration::from_millis(500));
    targets = kernels
}
criterion_main!(benches);
