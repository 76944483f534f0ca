//! Matrices in column form, and their products with the chosen columns only.

use std::io;
use std::ops::Range;

use memmap2::MmapMut;

use super::Compute;
use crate::kernels::ColumnList;
use crate::quant::Matrix;
use crate::quant::columns::{ColumnLayout, ColumnTile, PackScratch, TILE, pack};

/// Rows of activations up to which products by column pay: each passes over the chosen columns of a chunk, which
/// stay in the cache, where a panel of the dense product is unpacked once for all.
pub const COLUMN_ROWS: usize = 4;
/// Most bytes of a chunk: with several rows of activations it is read once and then stays in the L2 cache.
const MAX_CHUNK_BYTES: usize = 512 << 10;
/// Least bytes of a chunk for which a thread is given something to do.
const MIN_CHUNK_BYTES: usize = 32 << 10;
/// Chunks of a matrix that are wanted: they are claimed one by one, and the last ones should not take long.
const CHUNKS: usize = 12;

/// A matrix in the column form of [`quant::columns`](crate::quant::columns), in memory of its own.
pub struct ColumnMatrix {
    layout: ColumnLayout,
    /// Tiles, one after the other.
    bytes: MmapMut,
    /// Parts that the columns of a tile are cut into.
    parts: usize,
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
        let stride = layout.tile_stride();
        let mut bytes = MmapMut::map_anon((layout.tiles() * stride).max(1))?;
        // Advice: with small pages every other column would miss the TLB.
        #[cfg(target_os = "linux")]
        let _ = bytes.advise(memmap2::Advice::HugePage);
        let mut scratch: Vec<_> = (0..on.team.threads()).map(|_| PackScratch::default()).collect();
        let tiles = &mut bytes[..layout.tiles() * stride];
        on.team.for_tiles(tiles, stride, (1, stride), &mut scratch, |scratch, mut part| {
            let tile = part.rows().start;
            pack(&layout, matrix, tile, part.row(tile), scratch);
        });
        let parts = parts(&layout);
        Ok(Some(Self { layout, bytes, parts }))
    }

    /// The layout.
    pub fn layout(&self) -> &ColumnLayout {
        &self.layout
    }

    /// Bytes of memory.
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Chunks of work of a product.
    fn chunks(&self) -> usize {
        self.layout.tiles() * self.parts
    }

    fn tile(&self, tile: usize) -> ColumnTile<'_> {
        self.layout.view(tile, &self.bytes[tile * self.layout.tile_stride()..])
    }

    /// Groups of columns of a part.
    fn groups(&self, part: usize) -> Range<usize> {
        let groups = self.layout.groups();
        part * groups / self.parts..(part + 1) * groups / self.parts
    }
}

/// Depends on the shape alone, as results do: parts are added up.
fn parts(layout: &ColumnLayout) -> usize {
    let tile = layout.tile_stride();
    let for_size = tile.div_ceil(MAX_CHUNK_BYTES);
    let for_many = CHUNKS.div_ceil(layout.tiles().max(1)).min(tile / MIN_CHUNK_BYTES);
    for_size.max(for_many).clamp(1, layout.groups().max(1))
}

/// Floats of scratch that [`matmul_columns`] takes.
pub fn column_scratch(stack: &[&ColumnMatrix], rows: usize) -> usize {
    stack.iter().map(|m| m.chunks()).sum::<usize>() * rows * TILE
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
    on.team.for_plain_tiles(sums, rows * TILE, (1, rows * TILE), |mut chunk| {
        let index = chunk.rows().start;
        let (matrix, tile, part) = locate(stack, index);
        let (view, groups) = (matrix.tile(tile), matrix.groups(part));
        let outputs = matrix.layout.outputs_of(tile).len();
        for (list, sums) in lists.iter().zip(chunk.row(index).chunks_exact_mut(TILE)) {
            on.kernels.columns(view, list, groups.clone(), &mut sums[..outputs]);
        }
    });
    let outputs: usize = stack.iter().map(|m| m.layout.outputs()).sum();
    for (t, out) in out.chunks_exact_mut(outputs).take(rows).enumerate() {
        match bias {
            [] => out.fill(0.0),
            bias => out.copy_from_slice(bias),
        }
        let (mut first, mut chunk) = (0, 0);
        for matrix in stack {
            for tile in 0..matrix.layout.tiles() {
                let range = matrix.layout.outputs_of(tile);
                let out = &mut out[first + range.start..first + range.end];
                for _ in 0..matrix.parts {
                    on.kernels.add_scaled(out, 1.0, &sums[(chunk * rows + t) * TILE..][..out.len()]);
                    chunk += 1;
                }
            }
            first += matrix.layout.outputs();
        }
    }
}

/// Matrix, tile and part of a chunk.
fn locate<'a>(stack: &[&'a ColumnMatrix], mut chunk: usize) -> (&'a ColumnMatrix, usize, usize) {
    for matrix in stack {
        if chunk < matrix.chunks() {
            return (matrix, chunk / matrix.parts, chunk % matrix.parts);
        }
        chunk -= matrix.chunks();
    }
    unreachable!("a chunk of the stack")
}
