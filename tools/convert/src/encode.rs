//! Rows of f32 to blocks: on all cores, in order, a few megabytes at a time.

use std::ops::Range;

use rayon::prelude::*;
use skiff::gguf::GgmlType;
use skiff::quant;

use crate::ConvertError;
use crate::progress::Progress;

/// Weights of a chunk of work: their f32 stay in the L2 cache of a core while they are quantised.
const CHUNK_WEIGHTS: usize = 1 << 18;
/// Chunks a thread between two writes, so that few wait for the last one.
const CHUNKS_A_THREAD: usize = 16;

/// A matrix whose rows can be had as f32, from any thread.
pub trait Rows: Sync {
    /// Rows and columns.
    fn shape(&self) -> (usize, usize);

    /// Bytes that a row takes where it comes from: what progress counts.
    fn row_bytes(&self) -> usize;

    /// Reads some rows into `out`, row after row.
    fn read(&self, rows: Range<usize>, out: &mut [f32]) -> Result<(), ConvertError>;
}

/// Encodes all rows as `ty` and hands the blocks to `sink` in the order of the rows.
///
/// `importance` weighs the error of each column, where the type can make use of it.
///
/// # Errors
/// Those of `rows` and `sink`, and [`ConvertError::Interrupted`].
pub fn encode(
    rows: &dyn Rows,
    ty: GgmlType,
    importance: Option<&[f32]>,
    progress: &Progress,
    mut sink: impl FnMut(&[u8]) -> Result<(), ConvertError>,
) -> Result<(), ConvertError> {
    let (n_rows, cols) = rows.shape();
    let chunk = (CHUNK_WEIGHTS / cols.max(1)).clamp(1, n_rows.max(1));
    let batch = chunk * CHUNKS_A_THREAD * rayon::current_num_threads();
    for start in (0..n_rows).step_by(batch) {
        let end = (start + batch).min(n_rows);
        let starts: Vec<usize> = (start..end).step_by(chunk).collect();
        let encoded: Result<Vec<Vec<u8>>, ConvertError> = starts
            .into_par_iter()
            .map(|from| encode_chunk(rows, from..(from + chunk).min(end), cols, ty, importance))
            .collect();
        for blocks in encoded? {
            sink(&blocks)?;
        }
        progress.add(((end - start) * rows.row_bytes()) as u64)?;
    }
    Ok(())
}

fn encode_chunk(
    rows: &dyn Rows,
    range: Range<usize>,
    cols: usize,
    ty: GgmlType,
    importance: Option<&[f32]>,
) -> Result<Vec<u8>, ConvertError> {
    let mut values = vec![0.0; range.len() * cols];
    rows.read(range, &mut values)?;
    let mut blocks = vec![0; ty.row_bytes(cols) * (values.len() / cols)];
    for (values, blocks) in values.chunks_exact(cols).zip(blocks.chunks_exact_mut(ty.row_bytes(cols))) {
        quant::quantize_row_weighed(ty, values, importance, blocks);
    }
    Ok(blocks)
}
