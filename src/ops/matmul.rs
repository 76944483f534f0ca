//! Matrix products: `out = W x` for weights in place and one or many rows of activations.
//!
//! A matrix is cut into chunks of rows (columns of `out`), which the team claims one at a time. With
//! one or a few rows of activations a chunk streams its weights once through the `dot` kernel, which
//! memory bounds; with many it unpacks panels of 32 rows and multiplies them with all rows of
//! activations, which arithmetic bounds.

use super::{Compute, Inputs};
use crate::gguf::GgmlType;
use crate::kernels::tiles::{TILE, TilePanel, chunk_cols};
use crate::kernels::{FEW_TOKENS, PANEL_COLS, PANEL_ROWS, Panel};
use crate::quant::{self, Matrix};
use crate::threads::Tile;

/// Least rows of a chunk when decoding: a few cache lines of output, tens of KiB of weights.
const MIN_CHUNK: usize = 16;
/// Chunks a thread: enough that a slow core leaves work to the others, few enough that claiming is free.
const CHUNKS_A_THREAD: usize = 6;
/// The least for small matrices: another thread may have had the chunk before, so that nobody has
/// fetched the beginning of this one.
const LEAST_CHUNKS_A_THREAD: usize = 2;
/// Weight bytes beside which the beginning of a chunk does not count.
const FEW_BYTES: usize = 96 << 10;
/// Weight bytes of a chunk that several rows of activations go over one after the other: they stay in
/// the L2 cache.
const CACHED_BYTES: usize = 128 << 10;

/// Most panels of a chunk: rows of activations that do not fit the L2 cache as a whole come into it once for all of them,
/// some columns at a time, and the sums of so many panels fit beside.
const MAX_PANELS: usize = 8;
/// Chunks of panels a thread that are worth more than that.
const PANEL_CHUNKS_A_THREAD: usize = 4;

/// What happens to a product.
#[derive(Clone, Copy)]
pub enum Epilogue<'a> {
    /// `out = W x`
    Store,
    /// `out = W x + bias`; a bias for each output (an empty one: none).
    Bias(&'a [f32]),
    /// `out += W x`: the residual add.
    Add,
}

/// A thread's buffers.
#[derive(Default)]
pub struct MatmulScratch {
    panel: Panel,
    tiles: TilePanel,
    pub(super) acc: Vec<f32>,
    pub(super) up: Vec<f32>,
    wide: Vec<f32>,
    /// Rows chosen, of a chunk.
    pub(super) chosen: Vec<u32>,
}

impl MatmulScratch {
    /// For up to `rows` rows of activations, and decode chunks of matrices of about `outputs` rows.
    pub fn with_capacity(rows: usize, outputs: usize) -> Self {
        let n = (rows * PANEL_ROWS * MAX_PANELS).max(outputs.max(MIN_CHUNK) * 2 * (FEW_TOKENS + 1));
        // A chunk may have twice as many rows, and its length is rounded up.
        let chosen = Vec::with_capacity(2 * outputs + MIN_CHUNK);
        Self { acc: vec![0.0; n], up: vec![0.0; n], chosen, ..Self::default() }
    }
}

/// Rows of matrices like `w` in a chunk, of `outputs` altogether.
fn chunk_rows(on: Compute<'_>, x: &Inputs, w: &Matrix<'_>, outputs: usize) -> usize {
    if x.are_many() {
        let (panels, threads) = (outputs.div_ceil(PANEL_ROWS), on.team.active());
        let most = (panels / (PANEL_CHUNKS_A_THREAD * threads)).clamp(1, MAX_PANELS);
        // As many chunks for each thread, if that is possible with smaller ones.
        let even = (1..=most).rev().find(|n| panels.div_ceil(*n).is_multiple_of(threads));
        return even.unwrap_or(most) * PANEL_ROWS;
    }
    let shared_by = |chunks| outputs.div_ceil(on.team.threads() * chunks);
    let fair = (FEW_BYTES / w.row_bytes().max(1))
        .clamp(shared_by(CHUNKS_A_THREAD), shared_by(LEAST_CHUNKS_A_THREAD));
    let cached = if x.rows == 1 { usize::MAX } else { CACHED_BYTES / w.row_bytes().max(1) };
    even_rows(outputs, fair.min(cached).max(MIN_CHUNK), on.team.threads())
}

/// Rows of a chunk, about `most`, so that equal threads have as many chunks as each other, all of them equally long.
fn even_rows(outputs: usize, most: usize, threads: usize) -> usize {
    let chunks = outputs.div_ceil(most).next_multiple_of(threads);
    outputs.div_ceil(chunks).next_multiple_of(4).max(MIN_CHUNK)
}

/// `out[t] = [W0; W1; ...] x[t]`: the rows of the stacked matrices, one under the other.
///
/// `out` is row-major with as many columns as the matrices have rows together. All matrices have as
/// many columns as `x`.
pub fn matmul(
    on: Compute<'_>,
    stack: &[Matrix<'_>],
    x: &Inputs,
    epilogue: Epilogue<'_>,
    out: &mut [f32],
    scratch: &mut [MatmulScratch],
) {
    let outputs: usize = stack.iter().map(|m| m.rows_len()).sum();
    let chunk = chunk_rows(on, x, &stack[0], outputs);
    on.team.for_tiles(out, outputs, (usize::MAX, chunk), scratch, |scratch, mut tile| {
        let mut first = 0;
        for matrix in stack {
            let (from, to) = (tile.cols().start.max(first), tile.cols().end.min(first + matrix.rows_len()));
            if from < to {
                let at = from - tile.cols().start;
                product(on, matrix, from - first..to - first, x, scratch);
                store(x, &mut tile, at, to - from, epilogue, &scratch.acc);
            }
            first += matrix.rows_len();
        }
    });
}

/// `out[t] = silu(gate x[t]) * (up x[t])` (Shazeer 2020): both matrices in one pass.
pub fn matmul_swiglu(
    on: Compute<'_>,
    gate: Matrix<'_>,
    up: Matrix<'_>,
    x: &Inputs,
    out: &mut [f32],
    scratch: &mut [MatmulScratch],
) {
    let outputs = gate.rows_len();
    let chunk = chunk_rows(on, x, &gate, outputs);
    on.team.for_tiles(out, outputs, (usize::MAX, chunk), scratch, |scratch, mut tile| {
        product(on, &up, tile.cols(), x, scratch);
        std::mem::swap(&mut scratch.acc, &mut scratch.up);
        product(on, &gate, tile.cols(), x, scratch);
        let n = tile.cols().len();
        for t in tile.rows() {
            let row = tile.row(t);
            for part in parts(x, n) {
                let at = part.sums(t);
                let gate = &mut scratch.acc[at.clone()];
                on.kernels.silu_mul(gate, &scratch.up[at]);
                copy(&mut row[part.cols.clone()], gate);
            }
        }
    });
}

/// [`matmul_swiglu`] for a single row that wants up of some neurons only, and biases (of gate and then of up; an empty one:
/// none): `choose(first, gate, list, out)` is shown `silu(gate x)` of the neurons from `first` on, lists those wanted, as they
/// are counted from there, and writes what the others become. `then(first, out)` may change the results. Both begin with
/// multiples of 32.
///
/// # Panics
/// If `x` has another number of rows, or the matrices are not quantised.
#[allow(clippy::too_many_arguments)] // what a product takes, and what follows it
pub fn matmul_swiglu_chosen(
    on: Compute<'_>,
    [gate, up]: [Matrix<'_>; 2],
    x: &Inputs,
    bias: &[f32],
    out: &mut [f32],
    scratch: &mut [MatmulScratch],
    choose: impl Fn(usize, &[f32], &mut Vec<u32>, &mut [f32]) + Sync,
    then: impl Fn(usize, &mut [f32]) + Sync,
) {
    assert!(x.rows == 1 && !x.are_many());
    let outputs = gate.rows_len();
    let (gate_bias, up_bias) = bias.split_at(bias.len() / 2);
    let chunk = chunk_rows(on, x, &gate, outputs).next_multiple_of(32);
    on.team.for_tiles(out, outputs, (1, chunk), scratch, |scratch, mut tile| {
        let cols = tile.cols();
        product(on, &gate, cols.clone(), x, scratch);
        let MatmulScratch { acc, up: of_up, chosen, .. } = scratch;
        let (gate, out) = (&mut acc[..cols.len()], tile.row(0));
        if !gate_bias.is_empty() {
            gate.iter_mut().zip(&gate_bias[cols.clone()]).for_each(|(gate, bias)| *gate += bias);
        }
        on.kernels.silu(gate);
        choose(cols.start, gate, chosen, out);
        let ups = &mut of_up[..chosen.len()];
        on.kernels.dot_listed(up.ty(), up.rows(cols.clone()), chosen, x.q8.row(0), ups);
        for (&row, up) in chosen.iter().zip(&*ups) {
            let row = row as usize;
            out[row] = gate[row] * (up + up_bias.get(cols.start + row).copied().unwrap_or(0.0));
        }
        then(cols.start, out);
    });
}

/// Where the sums of some outputs of a chunk lie.
struct Part {
    /// Outputs, counted in the chunk.
    cols: std::ops::Range<usize>,
    /// Where its sums begin, and how far those of a row of activations are from those of the next.
    first: usize,
    stride: usize,
}

impl Part {
    /// The sums of row `t` of the activations.
    fn sums(&self, t: usize) -> std::ops::Range<usize> {
        let at = self.first + t * self.stride;
        at..at + self.cols.len()
    }
}

/// Sums that a panel has, or what takes its place, of a chunk of `n` outputs: `[rows][stride]`.
fn part_len(x: &Inputs, n: usize) -> (usize, usize) {
    if !x.are_many() {
        (x.rows, n)
    } else if x.in_tiles {
        (x.rows.next_multiple_of(TILE), PANEL_ROWS)
    } else {
        (x.rows, PANEL_ROWS)
    }
}

/// The parts of the sums of `n` outputs: for many rows of activations one a panel.
fn parts(x: &Inputs, n: usize) -> impl Iterator<Item = Part> {
    let (rows, stride) = part_len(x, n);
    (0..n).step_by(stride).enumerate().map(move |(i, from)| Part {
        cols: from..(from + stride).min(n),
        first: i * rows * stride,
        stride,
    })
}

/// Copies a row of a tile; that of a full panel has a known length and needs no call.
fn copy(to: &mut [f32], from: &[f32]) {
    match (to.as_chunks_mut::<PANEL_ROWS>(), from.as_chunks::<PANEL_ROWS>()) {
        (([to], []), ([from], [])) => *to = *from,
        ((_, _), _) => to.copy_from_slice(from),
    }
}

/// Stores the sums of `n` outputs, which are the tile's from its column `at` on: row by row, so that memory is written in
/// long runs.
fn store(x: &Inputs, tile: &mut Tile<'_, f32>, at: usize, n: usize, epilogue: Epilogue<'_>, acc: &[f32]) {
    let first = tile.cols().start + at;
    for t in tile.rows() {
        let row = &mut tile.row(t)[at..at + n];
        for part in parts(x, n) {
            let (out, acc) = (&mut row[part.cols.clone()], &acc[part.sums(t)]);
            match epilogue {
                Epilogue::Store | Epilogue::Bias([]) => copy(out, acc),
                Epilogue::Bias(bias) => {
                    let bias = &bias[first + part.cols.start..][..acc.len()];
                    out.iter_mut().zip(acc.iter().zip(bias)).for_each(|(out, (acc, bias))| *out = acc + bias);
                }
                Epilogue::Add => out.iter_mut().zip(acc).for_each(|(out, acc)| *out += acc),
            }
        }
    }
}

/// Columns of the panels of a matrix: about as many in each, of whole blocks and whole cache lines.
fn panel_cols(cols: usize, ty: GgmlType) -> usize {
    cols.div_ceil(cols.div_ceil(PANEL_COLS).max(1)).next_multiple_of(ty.block_len().max(64))
}

/// The sums of the rows `rows` of `w` with all rows of `x`, in `scratch.acc`, where [`parts`] says.
fn product(
    on: Compute<'_>,
    w: &Matrix<'_>,
    rows: std::ops::Range<usize>,
    x: &Inputs,
    scratch: &mut MatmulScratch,
) {
    let n = rows.len();
    let (part_rows, stride) = part_len(x, n);
    let many = x.are_many();
    debug_assert!(many || !x.coarse, "only unpacked weights are coarse");
    // The second terms of a few rows have sums of their own at first.
    let sums = part_rows * stride * n.div_ceil(stride) * if x.two_terms && !many { 2 } else { 1 };
    if scratch.acc.len() < sums {
        scratch.acc.resize(sums, 0.0);
        scratch.up.resize(sums, 0.0);
    }
    let weights = w.rows(rows);
    let MatmulScratch { panel, tiles, acc, wide, .. } = scratch;
    let acc = &mut acc[..sums];
    match (quant::is_quantised(w.ty()), many) {
        (true, false) => {
            // Both terms of refined inputs in one pass over the weights.
            on.kernels.dot_tokens(w.ty(), weights, &x.q8, acc);
            if x.two_terms {
                let (acc, second) = acc.split_at_mut(x.rows * n);
                acc.iter_mut().zip(second).for_each(|(a, s)| *a += *s);
            }
        }
        (false, false) => {
            for (x, acc) in x.values().chunks_exact(x.cols).zip(acc.chunks_exact_mut(n)) {
                on.kernels.dot_float(w.ty(), weights, x, acc);
            }
        }
        (true, true) => {
            acc.fill(0.0);
            let step = if x.in_tiles { chunk_cols(x.cols) } else { panel_cols(x.cols, w.ty()) };
            for (chunk, from) in (0..x.cols).step_by(step).enumerate() {
                let cols = from..(from + step).min(x.cols);
                let panels = weights.chunks(PANEL_ROWS * w.row_bytes());
                for (weights, acc) in panels.zip(acc.chunks_exact_mut(part_rows * stride)) {
                    add_panel(on, w, weights, (chunk, cols.clone()), x, (panel, tiles), acc);
                }
            }
            if x.in_tiles {
                on.kernels.turn_tiles(acc);
            }
        }
        (false, true) => {
            let panels = weights.chunks(PANEL_ROWS * w.row_bytes());
            for (weights, acc) in panels.zip(acc.chunks_exact_mut(part_rows * stride)) {
                float_product(on, w.ty(), weights, x, wide, acc);
            }
        }
    }
}

/// Adds the products of up to [`PANEL_ROWS`] rows, columns `cols`, with all rows of `x`.
fn add_panel(
    on: Compute<'_>,
    w: &Matrix<'_>,
    weights: &[u8],
    (chunk, cols): (usize, std::ops::Range<usize>),
    x: &Inputs,
    (panel, tiles): (&mut Panel, &mut TilePanel),
    acc: &mut [f32],
) {
    if x.in_tiles {
        on.kernels.unpack_tiles(w.ty(), (weights, w.row_bytes()), cols, x.coarse, tiles);
        on.kernels.multiply_tiles(tiles, &x.tiles, chunk, acc);
        return;
    }
    let from = cols.start;
    on.kernels.unpack(w.ty(), (weights, w.row_bytes()), cols, x.coarse, panel);
    for term in 0..1 + usize::from(x.two_terms) {
        let rows = term * x.rows..(term + 1) * x.rows;
        on.kernels.gemm(panel, x.q8.from_col(rows, from), acc);
    }
}

/// Unquantised weights: a tile widened to f32 and multiplied by the `gemm` crate.
fn float_product(
    on: Compute<'_>,
    ty: GgmlType,
    weights: &[u8],
    x: &Inputs,
    wide: &mut Vec<f32>,
    acc: &mut [f32],
) {
    if wide.len() < PANEL_ROWS * x.cols {
        wide.resize(PANEL_ROWS * x.cols, 0.0);
    }
    let n = weights.len() / ty.row_bytes(x.cols);
    let wide = &mut wide[..n * x.cols];
    for (row, wide) in weights.chunks_exact(ty.row_bytes(x.cols)).zip(wide.chunks_exact_mut(x.cols)) {
        quant::dequantize_row(ty, row, wide);
    }
    let a = crate::kernels::gemm_f32::View::rows(x.values(), x.cols);
    let b = crate::kernels::gemm_f32::View::rows(wide, x.cols).transposed();
    on.kernels.gemm_f32(a, b, 0.0, acc, PANEL_ROWS);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Kernels;
    use crate::threads::Team;

    fn wave(n: usize, speed: f32) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * speed).sin()).collect()
    }

    /// Rows of `x` and matrices of rows that are wide enough for several panels.
    fn check(rows: usize, (outputs, cols): (usize, usize), ty: GgmlType, refined: bool, tolerance: f32) {
        let (x, team) = (wave(rows * cols, 0.37), Team::new(2).unwrap());
        for kernels in Kernels::available() {
            let on = Compute { team: &team, kernels };
            let mut bytes = [vec![0; ty.row_bytes(cols) * outputs], vec![0; ty.row_bytes(cols) * outputs]];
            quant::quantize_row(ty, &wave(cols * outputs, 0.11), &mut bytes[0]);
            quant::quantize_row(ty, &wave(cols * outputs, 0.23), &mut bytes[1]);
            let [gate, up] = [0, 1].map(|i| Matrix::new(ty, outputs, cols, &bytes[i]).unwrap());
            let mut inputs = Inputs::with_capacity(rows, cols);
            inputs.values_mut().copy_from_slice(&x);
            inputs.quantize(on);
            if refined {
                inputs.refine(on);
            }
            let mut scratch: Vec<_> = (0..2).map(|_| MatmulScratch::default()).collect();
            let (mut both, mut swiglu) = (vec![0.0; rows * 2 * outputs], vec![0.0; rows * outputs]);
            matmul(on, &[gate, up], &inputs, Epilogue::Store, &mut both, &mut scratch);
            matmul_swiglu(on, gate, up, &inputs, &mut swiglu, &mut scratch);
            let exact = |m: &Matrix<'_>, r: usize, x: &[f32]| -> f32 {
                let mut w = vec![0.0; cols];
                m.dequantize_row(r, &mut w);
                w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum::<f64>() as f32
            };
            for (t, x) in x.chunks(cols).enumerate() {
                for r in 0..outputs {
                    let (g, u) = (exact(&gate, r, x), exact(&up, r, x));
                    let out = &both[t * 2 * outputs..];
                    assert!((out[r] - g).abs() < tolerance, "{kernels:?} {ty} {rows}: {} {g}", out[r]);
                    assert!((out[outputs + r] - u).abs() < tolerance, "{kernels:?} {ty} {rows}");
                    let want = g / (1.0 + (-g).exp()) * u;
                    let slack = tolerance * (1.0 + g.abs() + u.abs());
                    assert!((swiglu[t * outputs + r] - want).abs() < slack, "{kernels:?} {ty} {rows} swiglu");
                }
            }
        }
    }

    #[test]
    fn products_equal_exact_ones_within_the_rounding_of_activations() {
        for rows in [1, 3, FEW_TOKENS, FEW_TOKENS + 1, 35] {
            check(rows, (70, 1280), GgmlType::Q8_0, false, 0.6);
            check(rows, (70, 1280), GgmlType::Q4_K, false, 0.6);
            check(rows, (70, 1280), GgmlType::F16, false, 1e-3);
        }
    }

    #[test]
    fn refined_inputs_are_nearly_exact() {
        for rows in [1, 3, FEW_TOKENS, FEW_TOKENS + 1, 35] {
            check(rows, (70, 1280), GgmlType::Q8_0, true, 5e-3);
            check(rows, (70, 1280), GgmlType::Q5_1, true, 5e-3);
        }
    }

    #[test]
    fn chunks_of_several_panels_are_put_together() {
        let team = Team::new(2).unwrap();
        let on = Compute { team: &team, kernels: Kernels::select(None).unwrap() };
        let (bytes, outputs) = (vec![0; GgmlType::Q8_0.row_bytes(64) * 1250], 1250);
        let matrix = Matrix::new(GgmlType::Q8_0, outputs, 64, &bytes).unwrap();
        let mut inputs = Inputs::with_capacity(40, 64);
        inputs.quantize(on);
        assert!(
            chunk_rows(on, &inputs, &matrix, outputs) > PANEL_ROWS,
            "the test is of chunks that are larger"
        );
        check(40, (1250, 64), GgmlType::Q8_0, false, 0.1);
        check(35, (1250, 64), GgmlType::F16, false, 1e-3);
    }

    #[test]
    fn a_matrix_unit_takes_many_rows_and_needs_no_second_term() {
        if Kernels::select(None).unwrap().has_tiles() {
            let x = wave(FEW_TOKENS * 3 * 1280, 0.37);
            let team = Team::new(2).unwrap();
            let on = Compute { team: &team, kernels: Kernels::select(None).unwrap() };
            let mut inputs = Inputs::with_capacity(FEW_TOKENS * 3, 1280);
            inputs.values_mut().copy_from_slice(&x);
            inputs.quantize(on);
            inputs.refine(on);
            assert!(inputs.in_tiles && !inputs.two_terms);
        } else {
            eprintln!("SKIPPED: this CPU has no matrix unit");
        }
    }

    /// With all neurons wanted, a product of chosen rows is the dense one, bit for bit; the others are what `choose` wrote.
    #[test]
    fn chosen_rows_are_those_of_the_dense_product() {
        let (outputs, cols, ty, team) = (150, 256, GgmlType::Q4_K, Team::new(2).unwrap());
        let mut bytes = [vec![0; ty.row_bytes(cols) * outputs], vec![0; ty.row_bytes(cols) * outputs]];
        quant::quantize_row(ty, &wave(cols * outputs, 0.11), &mut bytes[0]);
        quant::quantize_row(ty, &wave(cols * outputs, 0.23), &mut bytes[1]);
        let stack = [0, 1].map(|i| Matrix::new(ty, outputs, cols, &bytes[i]).unwrap());
        for kernels in Kernels::available() {
            let on = Compute { team: &team, kernels };
            let mut x = Inputs::with_capacity(1, cols);
            x.values_mut().copy_from_slice(&wave(cols, 0.37));
            x.quantize(on);
            let mut scratch: Vec<_> = (0..2).map(|_| MatmulScratch::default()).collect();
            let (mut dense, mut out) = (vec![0.0; outputs], vec![0.0; outputs]);
            matmul_swiglu(on, stack[0], stack[1], &x, &mut dense, &mut scratch);
            for step in [1, 3] {
                let choose = |first: usize, _: &[f32], list: &mut Vec<u32>, out: &mut [f32]| {
                    list.clear();
                    list.extend(
                        (0..out.len()).filter(|j| (first + j).is_multiple_of(step)).map(|j| j as u32),
                    );
                    out.fill(7.0);
                };
                matmul_swiglu_chosen(on, stack, &x, &[], &mut out, &mut scratch, choose, |_, _| {});
                for (j, (out, dense)) in out.iter().zip(&dense).enumerate() {
                    let want = if j % step == 0 { *dense } else { 7.0 };
                    assert_eq!(out.to_bits(), want.to_bits(), "{kernels:?} {step} {j}");
                }
            }
            let bias = [vec![0.5; outputs], vec![2.0; outputs]].concat();
            let all = |_: usize, gate: &[f32], list: &mut Vec<u32>, _: &mut [f32]| {
                list.clear();
                list.extend(0..gate.len() as u32);
            };
            matmul_swiglu_chosen(on, stack, &x, &bias, &mut out, &mut scratch, all, |_, out| out[0] += 1.0);
            let mut both = vec![0.0; 2 * outputs];
            matmul(on, &stack, &x, Epilogue::Bias(&bias), &mut both, &mut scratch);
            let (gate, up) = both.split_at(outputs);
            let want = gate[1] / (1.0 + (-gate[1]).exp()) * up[1];
            assert!((out[1] - want).abs() < 1e-4 * want.abs().max(1.0), "{} {want}", out[1]);
            assert!(
                (out[0] - 1.0 - gate[0] / (1.0 + (-gate[0]).exp()) * up[0]).abs() < 1e-3,
                "`then` is asked"
            );
        }
    }
}
