//! Matrices in column form, and their products with the chosen columns only.

use std::io;
use std::ops::Range;

use memmap2::MmapMut;

use super::Compute;
use crate::kernels::ColumnList;
use crate::quant::Matrix;
use crate::quant::columns::{ColumnLayout, ColumnStrip, PackScratch, STRIP, heads_of, pack};

/// Rows of activations up to which products by column pay: each passes over the chosen columns of a chunk, which
/// stay in the cache, where a panel of the dense product is unpacked once for all.
pub const COLUMN_ROWS: usize = 4;
/// Most bytes of a chunk: with several rows of activations it is read once and then stays in the cache.
const MAX_CHUNK_BYTES: usize = 1 << 20;
/// Least bytes of a chunk for which a thread is given something to do.
const MIN_CHUNK_BYTES: usize = 64 << 10;
/// Chunks of a matrix that are wanted: they are claimed one by one, and the last ones should not take long.
const CHUNKS: usize = 12;

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
        let (width, span) = (layout.width(strip), layout.span_bytes(strip));
        let outputs = layout.outputs_of(strip);
        let mut found = vec![[0f32; 4]; outputs.len()];
        on.team.for_tiles(&mut found, 1, (16, 1), scratch, |scratch, mut tile| {
            for o in tile.rows() {
                tile.row(o)[0] = heads_of(layout, matrix.row(outputs.start + o), scratch);
            }
        });
        let mut heads = vec![0.0; layout.heads(strip)];
        for (which, heads) in heads.chunks_exact_mut(width).enumerate() {
            heads.iter_mut().zip(&found).for_each(|(head, found)| *head = found[which]);
        }
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

/// Floats of a chunk: the sums of a strip and, behind them, room for those of its mins.
const CHUNK_FLOATS: usize = 2 * STRIP;

/// Floats of scratch that [`matmul_columns`] takes.
pub fn column_scratch(stack: &[&ColumnMatrix], rows: usize) -> usize {
    stack.iter().map(|m| m.chunks()).sum::<usize>() * rows * CHUNK_FLOATS
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
    let (rows, needed) = (lists.len(), column_scratch(stack, lists.len()));
    if scratch.len() < needed {
        scratch.resize(needed, 0.0);
    }
    let sums = &mut scratch[..needed];
    let chunk_floats = rows * CHUNK_FLOATS;
    on.team.for_plain_tiles(sums, chunk_floats, (1, chunk_floats), |mut chunk| {
        let index = chunk.rows().start;
        let (matrix, strip, part) = locate(stack, index);
        let (view, groups) = (matrix.strip(strip), matrix.groups(part));
        for (list, floats) in lists.iter().zip(chunk.row(index).chunks_exact_mut(CHUNK_FLOATS)) {
            let (sums, mins) = floats.split_at_mut(STRIP);
            let mins = &mut mins[..if view.has_min { view.width } else { 0 }];
            on.kernels.columns(view, list, groups.clone(), &mut sums[..view.width], mins);
        }
    });
    let outputs: usize = stack.iter().map(|m| m.layout.outputs()).sum();
    let sums = &*sums;
    on.team.for_plain_tiles(&mut out[..rows * outputs], outputs, (1, STRIP / 2), |mut tile| {
        let (t, cols) = (tile.rows().start, tile.cols());
        let out = tile.row(t);
        match bias {
            [] => out.fill(0.0),
            bias => out.copy_from_slice(&bias[cols.clone()]),
        }
        add_parts(on, stack, sums, (t, rows), cols.start, out);
    });
}

/// Adds the sums of row `t` of all parts to `out`, the outputs from `first` on.
fn add_parts(
    on: Compute<'_>,
    stack: &[&ColumnMatrix],
    sums: &[f32],
    (t, rows): (usize, usize),
    first: usize,
    out: &mut [f32],
) {
    let wanted = first..first + out.len();
    let (mut begin, mut chunk) = (0, 0);
    for matrix in stack {
        for strip in 0..matrix.strips.len() {
            let outputs = matrix.layout.outputs_of(strip);
            let (start, end) = (begin + outputs.start, begin + outputs.end);
            let both = start.max(wanted.start)..end.min(wanted.end);
            for _ in 0..matrix.parts {
                if !both.is_empty() {
                    let from = (chunk * rows + t) * CHUNK_FLOATS + both.start - start;
                    let out = &mut out[both.start - first..both.end - first];
                    on.kernels.add_weighted(out, &[1.0], &sums[from..][..both.len()]);
                }
                chunk += 1;
            }
        }
        begin += matrix.layout.outputs();
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
