//! Matrices in column form, and their products with the chosen columns only.

use std::io;
use std::ops::Range;

use memmap2::MmapMut;

use super::Compute;
use crate::kernels::ColumnList;
use crate::quant::Matrix;
use crate::quant::columns::{ColumnLayout, ColumnStrip, PackScratch, Ranges, heads_of, pack};

/// Rows of activations up to which products by column pay: each passes over the chosen columns of a chunk, which
/// stay in the cache, where a panel of the dense product is unpacked once for all.
pub const COLUMN_ROWS: usize = 4;
/// Most bytes of a chunk. Each has sums of its own, so there should not be many more than threads need.
const MAX_CHUNK_BYTES: usize = 2 << 20;
/// Least bytes of a chunk for which a thread is given something to do.
const MIN_CHUNK_BYTES: usize = 64 << 10;
/// Chunks of a matrix that are wanted: they are claimed one by one, and the last ones should not take long.
const CHUNKS: usize = 8;
/// Outputs that are added up at a time.
const OUTPUTS: usize = 1024;

/// A matrix in the column form of [`quant::columns`](crate::quant::columns), in memory of its own.
pub struct ColumnMatrix {
    layout: ColumnLayout,
    strips: Vec<Strip>,
    /// Parts that the columns are cut into.
    parts: usize,
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
        let parts = parts(&layout);
        Ok(Some(Self { layout, strips, parts }))
    }

    /// The layout.
    pub fn layout(&self) -> &ColumnLayout {
        &self.layout
    }

    /// Bytes of memory.
    pub fn bytes(&self) -> usize {
        self.strips.iter().map(|s| s.groups.len() + 4 * s.heads.len()).sum()
    }

    /// Chunks of work of a product.
    fn chunks(&self) -> usize {
        self.strips.len() * self.parts
    }

    fn strip(&self, strip: usize) -> ColumnStrip<'_> {
        let Strip { heads, groups } = &self.strips[strip];
        self.layout.view(strip, heads, groups)
    }

    /// Groups of columns of a part.
    fn groups(&self, part: usize) -> Range<usize> {
        let groups = self.layout.groups();
        part * groups / self.parts..(part + 1) * groups / self.parts
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

/// Depends on the shape alone, as results do: parts are added up.
fn parts(layout: &ColumnLayout) -> usize {
    let strip = layout.bytes() / layout.strips();
    let for_size = strip.div_ceil(MAX_CHUNK_BYTES);
    let for_many = CHUNKS.div_ceil(layout.strips()).min(strip / MIN_CHUNK_BYTES);
    for_size.max(for_many).clamp(1, layout.groups().max(1))
}

/// Floats of a chunk and a row: the sums of the widest strip.
fn chunk_floats(stack: &[&ColumnMatrix]) -> usize {
    let strips = |m: &&ColumnMatrix| (0..m.strips.len()).map(|s| m.layout.width(s)).max();
    stack.iter().filter_map(strips).max().unwrap_or(0)
}

/// Floats of scratch that products with the stacked matrices take.
pub fn column_scratch(stack: &[&ColumnMatrix], rows: usize) -> usize {
    stack.iter().map(|m| m.chunks()).sum::<usize>() * rows * chunk_floats(stack)
}

/// `out[t] = [W0; W1; ...] x[t] + bias` where `lists[t]` has what is not zero of `x[t]`; an empty bias: none.
///
/// All matrices have as many columns, and groups of the same length. `out` is row-major with as many columns as the
/// matrices have outputs together.
pub fn matmul_columns(
    on: Compute<'_>,
    stack: &[&ColumnMatrix],
    lists: &[ColumnList],
    bias: &[f32],
    out: &mut [f32],
    scratch: &mut Vec<f32>,
) {
    let sums = Sums::new(on, stack, lists, bias, scratch);
    let outputs: usize = stack.iter().map(|m| m.layout.outputs()).sum();
    on.team.for_plain_tiles(&mut out[..lists.len() * outputs], outputs, (1, OUTPUTS), |mut tile| {
        let (t, first) = (tile.rows().start, tile.cols().start);
        sums.write(t, first, tile.row(t));
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
    scratch: &mut Vec<f32>,
    then: impl Fn(usize, usize, &mut [f32]) + Sync,
) {
    let stack = [gate, up];
    let sums = Sums::new(on, &stack, lists, bias, scratch);
    let outputs = gate.layout.outputs();
    on.team.for_plain_tiles(&mut out[..lists.len() * outputs], outputs, (1, OUTPUTS), |mut tile| {
        let (t, first) = (tile.rows().start, tile.cols().start);
        let out = tile.row(t);
        let mut up = [0f32; OUTPUTS];
        let up = &mut up[..out.len()];
        sums.write(t, first, out);
        sums.write(t, outputs + first, up);
        on.kernels.silu_mul(out, up);
        then(t, first, out);
    });
}

/// The sums of all chunks of a product.
struct Sums<'a> {
    on: Compute<'a>,
    stack: &'a [&'a ColumnMatrix],
    bias: &'a [f32],
    rows: usize,
    /// `[chunks, rows, floats]`
    sums: &'a [f32],
    floats: usize,
}

impl<'a> Sums<'a> {
    fn new(
        on: Compute<'a>,
        stack: &'a [&'a ColumnMatrix],
        lists: &[ColumnList],
        bias: &'a [f32],
        scratch: &'a mut Vec<f32>,
    ) -> Self {
        let (rows, needed) = (lists.len(), column_scratch(stack, lists.len()));
        if scratch.len() < needed {
            scratch.resize(needed, 0.0);
        }
        let (sums, floats) = (&mut scratch[..needed], chunk_floats(stack));
        let chunk = rows * floats;
        on.team.for_plain_tiles(sums, chunk, (1, chunk), |mut tile| {
            let index = tile.rows().start;
            let (matrix, strip, part) = locate(stack, index);
            let (view, groups) = (matrix.strip(strip), matrix.groups(part));
            for (list, sums) in lists.iter().zip(tile.row(index).chunks_exact_mut(floats)) {
                on.kernels.columns(view, list, groups.clone(), &mut sums[..view.width]);
            }
        });
        Self { on, stack, bias, rows, sums, floats }
    }

    /// Outputs `first..` of row `t`: the bias and the sums of all parts.
    fn write(&self, t: usize, first: usize, out: &mut [f32]) {
        match self.bias {
            [] => out.fill(0.0),
            bias => out.copy_from_slice(&bias[first..][..out.len()]),
        }
        let wanted = first..first + out.len();
        let (mut begin, mut chunk) = (0, 0);
        for matrix in self.stack {
            for strip in 0..matrix.strips.len() {
                let outputs = matrix.layout.outputs_of(strip);
                let (start, end) = (begin + outputs.start, begin + outputs.end);
                let both = start.max(wanted.start)..end.min(wanted.end);
                for part in 0..if both.is_empty() { 0 } else { matrix.parts } {
                    let from = ((chunk + part) * self.rows + t) * self.floats + both.start - start;
                    let out = &mut out[both.start - first..both.end - first];
                    self.on.kernels.add_weighted(out, &[1.0], &self.sums[from..][..both.len()]);
                }
                chunk += matrix.parts;
            }
            begin += matrix.layout.outputs();
        }
    }
}

/// Matrix, strip and part of a chunk.
fn locate<'a>(stack: &[&'a ColumnMatrix], mut chunk: usize) -> (&'a ColumnMatrix, usize, usize) {
    for matrix in stack {
        if chunk < matrix.chunks() {
            return (matrix, chunk / matrix.parts, chunk % matrix.parts);
        }
        chunk -= matrix.chunks();
    }
    unreachable!("a chunk of the stack")
}
