//! Matrices in column form, and their products with the chosen columns only.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::Compute;
use crate::kernels::columns::finish;
use crate::kernels::{ColumnList, Kernels};
use crate::memory::{MemoryError, Pages};
use crate::quant::Matrix;
use crate::quant::columns::{ColumnLayout, ColumnStrip, PackScratch, Ranges, TILE, heads_of, pack};

/// Bytes of a matrix that are a chunk of its product, about: few enough that threads end together, and many more than
/// the sums that each chunk leaves.
const PART_BYTES: usize = 3 << 20;
/// Bytes of a cache line.
const LINE: usize = 64;
/// Least parts of a product. Of small matrices more would cost more than they share out.
const LEAST_PARTS: usize = 2;
/// Chunks a thread of a product that are worth shorter runs.
const CHUNKS_A_THREAD: usize = 2;
/// Least outputs of a chunk that is not a whole strip: runs of 256 bytes of 4-bit codes.
const LEAST_OUTPUTS: usize = 512;
/// Outputs of a chunk of what follows the parts.
const FINISHED: usize = 1024;

/// Memory for matrices in column form, in huge pages: with small ones, columns that lie apart miss the TLB.
pub struct ColumnMemory {
    bytes: Pages<u8>,
    used: usize,
}

impl ColumnMemory {
    /// Room for matrices of these layouts.
    ///
    /// # Errors
    /// The system gives no memory.
    pub fn new<'l>(layouts: impl Iterator<Item = &'l ColumnLayout>) -> Result<Self, MemoryError> {
        let bytes = layouts.map(|l| (0..l.strips()).map(|s| strip_bytes(l, s)).sum::<usize>()).sum();
        Ok(Self { bytes: Pages::try_zeroed(bytes)?, used: 0 })
    }

    /// Bytes of it.
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Keeps it in memory.
    pub fn lock(&mut self) -> io::Result<()> {
        self.bytes.lock()
    }

    /// The finished memory, to be shared by its matrices.
    pub fn finish(self) -> Arc<Pages<u8>> {
        Arc::new(self.bytes)
    }
}

/// Whole huge pages would be too much for small matrices, but a line should be one.
fn strip_bytes(layout: &ColumnLayout, strip: usize) -> usize {
    (layout.spans() * layout.span_bytes(strip)).next_multiple_of(LINE)
}

/// A matrix in the column form of [`quant::columns`](crate::quant::columns).
pub struct ColumnMatrix {
    layout: ColumnLayout,
    strips: Vec<Strip>,
    memory: Arc<Pages<u8>>,
}

/// A matrix that has its place in a [`ColumnMemory`].
pub struct PackedColumns {
    layout: ColumnLayout,
    strips: Vec<Strip>,
}

struct Strip {
    heads: Vec<f32>,
    /// Where its groups are.
    place: Range<usize>,
}

impl PackedColumns {
    /// Lays `matrix` out by columns.
    ///
    /// # Panics
    /// If the layout is not the matrix's, or was not among those that `memory` was made for.
    pub fn new(
        on: Compute<'_>,
        matrix: &Matrix<'_>,
        layout: &ColumnLayout,
        memory: &mut ColumnMemory,
    ) -> Self {
        let mut scratch: Vec<_> = (0..on.team.threads()).map(|_| PackScratch::default()).collect();
        let strips = (0..layout.strips()).map(|s| Strip::new(on, matrix, layout, s, memory, &mut scratch));
        Self { layout: layout.clone(), strips: strips.collect() }
    }

    /// The matrix, which reads the memory that it was packed into.
    pub fn read(self, memory: &Arc<Pages<u8>>) -> ColumnMatrix {
        ColumnMatrix { layout: self.layout, strips: self.strips, memory: memory.clone() }
    }
}

impl ColumnMatrix {
    /// The layout.
    pub fn layout(&self) -> &ColumnLayout {
        &self.layout
    }

    /// Bytes of memory.
    pub fn bytes(&self) -> usize {
        self.strips.iter().map(|s| s.place.len() + 4 * s.heads.len()).sum()
    }

    /// Parts of the columns whose products are summed apart: they depend on the matrix alone, and so does the result.
    fn parts(&self) -> usize {
        let parts = self.layout.bytes().div_ceil(PART_BYTES).next_power_of_two().max(LEAST_PARTS);
        let groups = self.layout.groups();
        groups.div_ceil(groups.div_ceil(parts))
    }

    /// Floats of a part's sums: the outputs, padded as the last strip is.
    fn padded(&self) -> usize {
        let strips = self.layout.strips();
        self.layout.outputs_of(strips - 1).start + self.layout.width(strips - 1)
    }

    /// Floats that a product's sums take.
    pub fn sums(&self) -> usize {
        self.parts() * self.padded()
    }

    fn view(&self, strip: usize) -> ColumnStrip<'_> {
        let Strip { heads, place } = &self.strips[strip];
        self.layout.view(strip, heads, &self.memory[place.clone()])
    }

    /// Outputs of a chunk of one of `parts`: whole strips, if these are chunks enough for all threads, else pieces of
    /// strips. A sum is that of its part, whatever the chunk.
    fn chunk_outputs(&self, parts: usize, threads: usize) -> usize {
        let strip = self.layout.outputs_of_first();
        let pieces = (CHUNKS_A_THREAD * threads).div_ceil(parts * self.layout.strips());
        let (most, all) = ((strip / LEAST_OUTPUTS).max(1), strip / TILE);
        // Chunks lie side by side: where there are several strips, they have to divide one.
        let fits = |tiles: &usize| self.layout.strips() == 1 || all.is_multiple_of(*tiles);
        (all.div_ceil(pieces.clamp(1, most))..all).find(fits).unwrap_or(all) * TILE
    }

    /// The product of the chosen columns of `part` with the outputs from `first` on, all of one strip, in units of the
    /// outputs' factors.
    fn part(&self, kernels: Kernels, list: &ColumnList, part: usize, first: usize, sums: &mut [f32]) {
        let (strip, in_strip) =
            (first / self.layout.outputs_of_first(), first % self.layout.outputs_of_first());
        let groups = self.layout.groups();
        let step = groups.div_ceil(self.parts());
        let groups = part * step..((part + 1) * step).min(groups);
        kernels.columns(self.view(strip), list, groups, in_strip..in_strip + sums.len(), sums);
    }

    /// From the sums of all parts to the outputs from `first` on, plus those of `bias`, if that is not empty.
    fn finish(&self, list: &ColumnList, sums: &[f32], bias: &[f32], first: usize, out: &mut [f32]) {
        let (n, all) = (self.padded(), out.len());
        out.copy_from_slice(&sums[first..][..all]);
        for part in sums.chunks_exact(n).skip(1) {
            out.iter_mut().zip(&part[first..][..all]).for_each(|(out, sum)| *out += sum);
        }
        let most = self.layout.outputs_of_first();
        let mut at = 0;
        while at < all {
            let (strip, in_strip) = ((first + at) / most, (first + at) % most);
            let n = (most - in_strip).min(all - at);
            finish(self.view(strip), list, in_strip, &mut out[at..][..n]);
            at += n;
        }
        if !bias.is_empty() {
            out.iter_mut().zip(&bias[first..][..all]).for_each(|(out, bias)| *out += bias);
        }
    }
}

impl Strip {
    fn new(
        on: Compute<'_>,
        matrix: &Matrix<'_>,
        layout: &ColumnLayout,
        strip: usize,
        memory: &mut ColumnMemory,
        scratch: &mut [PackScratch],
    ) -> Self {
        let span = layout.span_bytes(strip);
        let outputs = layout.outputs_of(strip);
        let mut ranges = vec![Ranges::default(); outputs.len()];
        on.team.for_tiles(&mut ranges, 1, (16, 1), scratch, |scratch, mut tile| {
            for o in tile.rows() {
                tile.row(o)[0] = Ranges::of(layout, matrix.row(outputs.start + o), scratch);
            }
        });
        let heads = heads_of(layout, strip, &ranges);
        let place = memory.used..memory.used + layout.spans() * span;
        memory.used += strip_bytes(layout, strip);
        let groups = &mut memory.bytes[place.clone()];
        on.team.for_tiles(groups, span, (1, span), scratch, |scratch, mut tile| {
            let i = tile.rows().start;
            pack(layout, matrix, (strip, i), &heads, tile.row(i), scratch);
        });
        Self { heads, place }
    }
}

/// Buffers of products by columns.
#[derive(Default)]
pub struct ColumnScratch {
    /// Sums of the parts of one product, or of two: `[parts][outputs, padded]`.
    sums: Vec<f32>,
}

impl ColumnScratch {
    /// Makes room for a product with any of `matrices`, or with two of them at once.
    pub fn reserve<'m>(&mut self, matrices: impl Iterator<Item = &'m ColumnMatrix>) {
        let most = matrices.map(ColumnMatrix::sums).max().unwrap_or(0);
        self.sums.resize(self.sums.len().max(2 * most), 0.0);
    }
}

/// `out = W x + bias` where `list` has what is not zero of `x`; an empty bias: none.
pub fn matmul_columns(
    on: Compute<'_>,
    matrix: &ColumnMatrix,
    list: &ColumnList,
    bias: &[f32],
    scratch: &mut ColumnScratch,
    out: &mut [f32],
) {
    let sums = &mut scratch.sums[..matrix.sums()];
    let outputs = matrix.chunk_outputs(matrix.parts(), on.team.active());
    on.team.for_plain_tiles(sums, matrix.padded(), (1, outputs), |mut tile| {
        let (part, first) = (tile.rows().start, tile.cols().start);
        matrix.part(on.kernels, list, part, first, tile.row(part));
    });
    on.team.for_plain_tiles(out, matrix.layout.outputs(), (1, FINISHED), |mut tile| {
        matrix.finish(list, sums, bias, tile.cols().start, tile.row(0));
    });
}

/// `out = then(silu(gate x) * (up x))`, as [`matmul_columns`]; `bias` is that of gate and then of up.
///
/// `then(first, values)` is shown the outputs from `first`, a multiple of 32, on, part by part.
#[allow(clippy::too_many_arguments)] // what a product takes, and what follows it
pub fn swiglu_columns(
    on: Compute<'_>,
    gate: &ColumnMatrix,
    up: &ColumnMatrix,
    list: &ColumnList,
    bias: &[f32],
    scratch: &mut ColumnScratch,
    out: &mut [f32],
    then: impl Fn(usize, &mut [f32]) + Sync,
) {
    let (outputs, parts) = (gate.layout.outputs(), gate.parts());
    let sums = &mut scratch.sums[..gate.sums() + up.sums()];
    let outputs_of_chunk = gate.chunk_outputs(2 * parts, on.team.active());
    on.team.for_plain_tiles(sums, gate.padded(), (1, outputs_of_chunk), |mut tile| {
        let (row, first) = (tile.rows().start, tile.cols().start);
        let (matrix, part) = if row < parts { (gate, row) } else { (up, row - parts) };
        matrix.part(on.kernels, list, part, first, tile.row(row));
    });
    let (of_gate, of_up) = sums.split_at(gate.sums());
    let (gate_bias, up_bias) = bias.split_at(bias.len() / 2);
    on.team.for_plain_tiles(out, outputs, (1, FINISHED), |mut tile| {
        let (first, out) = (tile.cols().start, tile.row(0));
        let mut values = [0f32; FINISHED];
        let values = &mut values[..out.len()];
        gate.finish(list, of_gate, gate_bias, first, out);
        up.finish(list, of_up, up_bias, first, values);
        on.kernels.silu_mul(out, values);
        then(first, out);
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::GgmlType;
    use crate::ops::Inputs;
    use crate::quant;
    use crate::quant::columns::STRIP;
    use crate::threads::Team;

    fn wave(n: usize, speed: f32) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * speed).sin()).collect()
    }

    /// Many threads get pieces of a strip, of one strip or of several of which the last is shorter: bit by bit the same sums.
    #[test]
    fn pieces_of_strips_give_the_sums_of_whole_ones() {
        for outputs in [1536 + 64, STRIP + 1000] {
            let (cols, ty, kernels) = (64, GgmlType::Q4_1, Kernels::select(None).unwrap());
            let mut bytes = vec![0; ty.row_bytes(cols) * outputs];
            quant::quantize_row(ty, &wave(cols * outputs, 0.61), &mut bytes);
            let matrix = Matrix::new(ty, outputs, cols, &bytes).unwrap();
            let layout = ColumnLayout::new(ty, outputs, cols).unwrap().with_coarse(true);
            let run = |threads: usize| {
                let team = Team::new(threads).unwrap();
                let on = Compute { team: &team, kernels };
                let mut memory = ColumnMemory::new([&layout].into_iter()).unwrap();
                let packed = PackedColumns::new(on, &matrix, &layout, &mut memory);
                let matrix = packed.read(&memory.finish());
                let mut x = Inputs::with_capacity(1, cols);
                x.values_mut().copy_from_slice(&wave(cols, 0.37));
                x.quantize(on);
                let (mut list, mut scratch) = (ColumnList::default(), ColumnScratch::default());
                x.choose_columns(layout.group_len(), 0, |_| 0x1248_8421, &mut list);
                scratch.reserve([&matrix].into_iter());
                let (mut out, mut inner) = (vec![0.0; outputs], vec![0.0; outputs]);
                matmul_columns(on, &matrix, &list, &[], &mut scratch, &mut out);
                swiglu_columns(on, &matrix, &matrix, &list, &[], &mut scratch, &mut inner, |_, _| ());
                (matrix.chunk_outputs(matrix.parts(), threads), out, inner)
            };
            let (whole, out, inner) = run(1);
            assert_eq!(whole, layout.outputs_of_first());
            for threads in [3, 16] {
                let pieces = run(threads);
                assert!(pieces.0 < whole, "{} of {whole} outputs for {threads} threads", pieces.0);
                assert!(pieces.1 == out && pieces.2 == inner, "{outputs} outputs, {threads} threads");
            }
        }
    }
}
