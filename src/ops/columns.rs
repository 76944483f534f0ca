//! Matrices in column form, and their products with the chosen columns only.

use std::io;
use std::ops::Range;

use memmap2::MmapMut;

use super::Compute;
use crate::kernels::columns::finish;
use crate::kernels::{ColumnList, Kernels};
use crate::quant::Matrix;
use crate::quant::columns::{ColumnLayout, PackScratch, Ranges, TILE, heads_of, pack};

/// Rows of activations up to which products by column pay: each reads the chosen columns anew, where the dense
/// product reads a panel once for all.
pub const COLUMN_ROWS: usize = 1;
/// Tiles of a chunk, if the number of threads does not speak against it: a core fetches long runs faster.
const CHUNK: usize = 8;
/// Most tiles of a chunk: their sums stay in the L1 cache.
const MOST_TILES: usize = 12;

/// A matrix in the column form of [`quant::columns`](crate::quant::columns), in memory of its own.
pub struct ColumnMatrix {
    layout: ColumnLayout,
    strips: Vec<Strip>,
}

struct Strip {
    heads: Vec<f32>,
    groups: MmapMut,
}

impl ColumnMatrix {
    /// Lays `matrix` out by columns; `None` if its type is not quantised.
    ///
    /// # Errors
    /// The system gives no memory: [`bytes`](Self::bytes) of them are needed, about as many as the matrix has.
    pub fn new(on: Compute<'_>, matrix: &Matrix<'_>) -> io::Result<Option<Self>> {
        let Some(layout) = ColumnLayout::new(matrix.ty(), matrix.rows_len(), matrix.cols()) else {
            return Ok(None);
        };
        let mut scratch: Vec<_> = (0..on.team.threads()).map(|_| PackScratch::default()).collect();
        let strips = (0..layout.strips()).map(|s| Strip::new(on, matrix, &layout, s, &mut scratch));
        let strips = strips.collect::<io::Result<_>>()?;
        Ok(Some(Self { layout, strips }))
    }

    /// The layout.
    pub fn layout(&self) -> &ColumnLayout {
        &self.layout
    }

    /// Bytes of memory.
    pub fn bytes(&self) -> usize {
        self.strips.iter().map(|s| s.groups.len() + 4 * s.heads.len()).sum()
    }

    /// The outputs `wanted` of the product with the chosen columns, plus those of `bias`, if that is not empty.
    fn product(
        &self,
        kernels: Kernels,
        list: &ColumnList,
        bias: &[f32],
        wanted: Range<usize>,
        out: &mut [f32],
    ) {
        let mut sums = [0f32; MOST_TILES * TILE];
        for (s, Strip { heads, groups }) in self.strips.iter().enumerate() {
            let strip = self.layout.outputs_of(s);
            let both = strip.start.max(wanted.start)..strip.end.min(wanted.end);
            if both.is_empty() {
                continue;
            }
            let view = self.layout.view(s, heads, groups);
            let first = both.start - strip.start;
            // What the kernel computes of a last tile that is not full is dropped.
            let end = if both.end == strip.end { view.width } else { both.end - strip.start };
            let sums = &mut sums[..end - first];
            sums.fill(0.0);
            kernels.columns(view, list, 0..self.layout.groups(), first..end, sums);
            let sums = &mut sums[..both.len()];
            finish(view, list, first, sums);
            let out = &mut out[both.start - wanted.start..][..both.len()];
            match bias {
                [] => out.copy_from_slice(sums),
                bias => {
                    let bias = &bias[both.start..both.end];
                    out.iter_mut()
                        .zip(sums.iter().zip(bias))
                        .for_each(|(out, (sum, bias))| *out = sum + bias);
                }
            }
        }
    }
}

impl Strip {
    fn new(
        on: Compute<'_>,
        matrix: &Matrix<'_>,
        layout: &ColumnLayout,
        strip: usize,
        scratch: &mut [PackScratch],
    ) -> io::Result<Self> {
        let span = layout.span_bytes(strip);
        let outputs = layout.outputs_of(strip);
        let mut ranges = vec![Ranges::default(); outputs.len()];
        on.team.for_tiles(&mut ranges, 1, (16, 1), scratch, |scratch, mut tile| {
            for o in tile.rows() {
                tile.row(o)[0] = Ranges::of(layout, matrix.row(outputs.start + o), scratch);
            }
        });
        let heads = heads_of(layout, strip, &ranges);
        let mut groups = MmapMut::map_anon(layout.spans() * span)?;
        // Advice: with small pages nearly every column would miss the TLB.
        #[cfg(target_os = "linux")]
        let _ = groups.advise(memmap2::Advice::HugePage);
        on.team.for_tiles(&mut groups[..], span, (1, span), scratch, |scratch, mut tile| {
            let i = tile.rows().start;
            pack(layout, matrix, (strip, i), &heads, tile.row(i), scratch);
        });
        Ok(Self { heads, groups })
    }
}

/// Outputs of a chunk, in whole tiles: such that the threads come out even, and the runs that are read of a column
/// are about as long as [`CHUNK`].
fn chunk(on: Compute<'_>, outputs: usize) -> usize {
    let (tiles, threads) = (outputs.div_ceil(TILE), on.team.active());
    let longest = |chunk: &usize| tiles.div_ceil(*chunk).div_ceil(threads) * chunk;
    let chunk = (1..=MOST_TILES).rev().min_by_key(|chunk| (longest(chunk), chunk.abs_diff(*CHUNKV)));
    chunk.unwrap_or(1) * TILE
}
static CHUNKV: std::sync::LazyLock<usize> =
    std::sync::LazyLock::new(|| std::env::var("SKC").ok().and_then(|v| v.parse().ok()).unwrap_or(CHUNK));

/// `out[t] = W x[t] + bias` where `lists[t]` has what is not zero of `x[t]`; an empty bias: none.
pub fn matmul_columns(
    on: Compute<'_>,
    matrix: &ColumnMatrix,
    lists: &[ColumnList],
    bias: &[f32],
    out: &mut [f32],
) {
    let outputs = matrix.layout.outputs();
    let tile = (lists.len(), chunk(on, outputs));
    on.team.for_plain_tiles(&mut out[..lists.len() * outputs], outputs, tile, |mut tile| {
        let cols = tile.cols();
        for (t, list) in lists.iter().enumerate() {
            matrix.product(on.kernels, list, bias, cols.clone(), tile.row(t));
        }
    });
}

/// `out[t] = then(t, silu(gate x[t]) * (up x[t]))`, as [`matmul_columns`]; `bias` is that of gate and then of up.
///
/// `then(t, first, values)` is shown the outputs of row `t` from `first` on, part by part.
#[allow(clippy::too_many_arguments)] // what a product takes, and what follows it
pub fn swiglu_columns(
    on: Compute<'_>,
    gate: &ColumnMatrix,
    up: &ColumnMatrix,
    lists: &[ColumnList],
    bias: &[f32],
    out: &mut [f32],
    then: impl Fn(usize, usize, &mut [f32]) + Sync,
) {
    let outputs = gate.layout.outputs();
    let (gate_bias, up_bias) = bias.split_at(bias.len() / 2);
    let tile = (lists.len(), chunk(on, outputs));
    on.team.for_plain_tiles(&mut out[..lists.len() * outputs], outputs, tile, |mut tile| {
        let cols = tile.cols();
        let mut of_up = [0f32; MOST_TILES * TILE];
        let of_up = &mut of_up[..cols.len()];
        for (t, list) in lists.iter().enumerate() {
            let out = tile.row(t);
            gate.product(on.kernels, list, gate_bias, cols.clone(), out);
            up.product(on.kernels, list, up_bias, cols.clone(), of_up);
            on.kernels.silu_mul(out, of_up);
            then(t, cols.start, out);
        }
    });
}
