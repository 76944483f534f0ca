//! Safe, parallel operations on rows of activations: what a forward pass is written in.
//!
//! Each takes the [`Team`] and the [`Kernels`] and splits its work into tiles. What a tile computes
//! does not depend on the number of threads, so neither do the results.

pub mod attention;
mod columns;
mod matmul;
mod norm;
mod rope;
mod shortlist;

pub use columns::{ColumnMatrix, ColumnMemory, ColumnScratch, PackedColumns, matmul_columns, swiglu_columns};
pub use matmul::{Epilogue, MatmulScratch, matmul, matmul_swiglu, matmul_swiglu_chosen};
pub use norm::{add_rows, norm_row, rms_norm, rms_norm_then};
pub use rope::{RopeStyle, RopeTable};
pub use shortlist::{ShortlistScratch, refine_largest};

use crate::kernels::columns::{touched, touched_values};
use crate::kernels::tiles::{TILE, TileInputs};
use crate::kernels::{Activations, ColumnList, Kernels};
use crate::memory::Pages;
use crate::quant::columns::Touched;
use crate::threads::Team;

/// What every operation needs: who does the work, and with which instructions.
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct Compute<'a> {
    pub team: &'a Team,
    pub kernels: Kernels,
}

/// Columns that [`Inputs::refine`] holds at a time: a multiple of the padding of activations.
const REFINE_COLS: usize = 1024;

/// Rows of activations in the forms that matrices are multiplied with.
#[derive(Default)]
pub struct Inputs {
    rows: usize,
    cols: usize,
    f32: Pages<f32>,
    /// If `two_terms`, as many rows again hold what the first leave over, quantised in turn.
    q8: Activations,
    two_terms: bool,
    by_panels: bool,
    /// Whether matrices are unpacked for them.
    many: bool,
    /// Whether they meet matrices by the upper bits of their codes alone.
    coarse: bool,
    /// In place of `q8` if `in_tiles`.
    tiles: TileInputs,
    in_tiles: bool,
}

impl Inputs {
    /// Room for `rows` rows of `cols` columns; smaller shapes allocate nothing later.
    pub fn with_capacity(rows: usize, cols: usize) -> Self {
        let mut inputs = Self::default();
        inputs.reshape(rows, cols);
        inputs
    }

    /// [`with_capacity`](Self::with_capacity) for rows that will be [refined](Self::refine).
    pub fn with_refined_capacity(rows: usize, cols: usize) -> Self {
        let mut inputs = Self::with_capacity(rows, cols);
        inputs.q8.add_rows(rows);
        inputs
    }

    /// Has matrices unpacked for these rows however few they are, as they are for many: a row's product with a quantised
    /// matrix then does not depend on how many others there are.
    pub fn by_panels(mut self, by_panels: bool) -> Self {
        self.by_panels = by_panels;
        self
    }

    /// Rows for which matrices are unpacked, and [coarsely](crate::quant::coarsen).
    pub fn coarsely() -> Self {
        Self { by_panels: true, coarse: true, ..Self::default() }
    }

    /// Whether unpacking panels of a matrix pays, or was asked for. Fewer rows, [`FEW_TOKENS`](crate::kernels::FEW_TOKENS) at
    /// least, give bit by bit what each gives alone: a draft can be verified in one step.
    pub fn are_many(&self) -> bool {
        self.many
    }

    /// Makes this `rows x cols`; the contents are to be written anew.
    pub fn reshape(&mut self, rows: usize, cols: usize) {
        (self.rows, self.cols, self.two_terms, self.in_tiles) = (rows, cols, false, false);
        self.f32.reserve(rows * cols);
        self.q8.reshape(rows, cols);
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns of a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The unquantised rows.
    pub fn values(&self) -> &[f32] {
        &self.f32[..self.rows * self.cols]
    }

    /// The unquantised rows, to be written before [`quantize`](Self::quantize).
    pub fn values_mut(&mut self) -> &mut [f32] {
        &mut self.f32[..self.rows * self.cols]
    }

    /// What a product of row `row` by its columns that are not zero would touch, and coarsely by those of the same row of
    /// `coarse`.
    pub fn touched(&self, coarse: Option<&Self>, row: usize, group_len: usize) -> Touched {
        let values = |x: &'_ Self| row * x.cols..(row + 1) * x.cols;
        if self.in_tiles {
            let coarse = coarse.map(|x| &x.values()[values(x)]);
            return touched_values(&self.values()[values(self)], coarse, group_len);
        }
        touched(self.q8.row(row), coarse.map(|x| x.q8.row(row)), group_len)
    }

    /// The columns of row `row` that are not zero, for matrices with groups of `group_len` columns; of every 32, those of
    /// the bits that `coarse` gives are to be read coarsely.
    pub fn choose_columns(
        &self,
        group_len: usize,
        row: usize,
        coarse: impl Fn(usize) -> u32,
        list: &mut ColumnList,
    ) {
        list.choose(self.q8.row(row), group_len, coarse);
    }

    /// Quantises what was written to [`values_mut`](Self::values_mut).
    pub fn quantize(&mut self, on: Compute<'_>) {
        self.fill(on, |_, _| {});
    }

    /// Adds a second term of 8 bits that holds what quantisation left over, so that products are as
    /// exact as with 15 bits, at twice the arithmetic and the same weight bytes. Tiles are as exact already.
    pub fn refine(&mut self, on: Compute<'_>) {
        assert!(!self.two_terms, "refined already");
        if self.in_tiles {
            return;
        }
        self.q8.add_rows(self.rows);
        self.two_terms = true;
        let mut left = [0f32; REFINE_COLS];
        for r in 0..self.rows {
            let values = &self.f32[r * self.cols..][..self.cols];
            for (i, values) in values.chunks(REFINE_COLS).enumerate() {
                let left = &mut left[..values.len()];
                self.q8.row(r).residual(i * REFINE_COLS, values, left);
                let mut to = self.q8.row_mut(self.rows + r);
                on.kernels.quantize(left, to.part(i * REFINE_COLS, values.len()));
            }
        }
    }

    /// Writes each row with `write(row, values)` and quantises it.
    pub fn fill(&mut self, on: Compute<'_>, write: impl Fn(usize, &mut [f32]) + Sync) {
        let (rows, cols) = (self.rows, self.cols);
        self.many = self.by_panels || rows >= on.kernels.panels_from();
        if self.many && on.kernels.has_tiles() {
            return self.fill_tiles(on, write);
        }
        if rows == 1 {
            // Decoding: not worth waking anybody, and nothing is allocated.
            let values = &mut self.f32[..cols];
            write(0, values);
            on.kernels.quantize(values, self.q8.row_mut(0));
            return;
        }
        let values = self.f32.chunks_mut(cols).take(rows);
        let mut views: Vec<_> = values.zip(self.q8.rows_mut()).map(Some).collect();
        on.team.for_plain_tiles(&mut views, 1, (4, 1), |mut tile| {
            for r in tile.rows() {
                if let Some((values, q8)) = tile.row(r)[0].take() {
                    write(r, values);
                    on.kernels.quantize(values, q8);
                }
            }
        });
    }

    /// [`fill`](Self::fill) for a matrix unit.
    fn fill_tiles(&mut self, on: Compute<'_>, write: impl Fn(usize, &mut [f32]) + Sync) {
        let (rows, cols) = (self.rows, self.cols);
        self.in_tiles = true;
        self.tiles.reshape(rows, cols);
        let values = self.f32[..rows * cols].chunks_mut(TILE * cols);
        let mut views: Vec<_> = values.zip(self.tiles.groups_mut()).map(Some).collect();
        on.team.for_plain_tiles(&mut views, 1, (1, 1), |mut tile| {
            for group in tile.rows() {
                if let Some((values, tiles)) = tile.row(group)[0].take() {
                    for (i, values) in values.chunks_exact_mut(cols).enumerate() {
                        write(group * TILE + i, values);
                    }
                    on.kernels.pack_tiles(values, tiles);
                }
            }
        });
    }
}
