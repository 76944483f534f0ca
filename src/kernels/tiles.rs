//! Products by a matrix unit (AMX), which multiplies whole tiles of bytes.
//!
//! Such a unit is so fast that bringing in a scale for every 32 columns, as [`gemm`](super::Kernels::gemm) does, would
//! take longer than the products. So weights and activations get one scale for up to 512 columns (a *chunk*) and 16
//! bits in return, as two planes of signed bytes, `256 * high + low`:
//!
//! ```text
//! w x = 65536 w_high x_high + 256 (w_high x_low + w_low x_high) + w_low x_low
//! ```
//!
//! of which the last term is left out: it is a few ten-thousandths of the sum, an order of magnitude less than what 8
//! bits a block of 32 lose. Three products of bytes give a nearly exact result, for every type of weights alike.
//!
//! # Layout
//! A [`Tile`] is 16 rows of 64 bytes. One of weights has 64 columns of 16 rows as they are. One of activations has
//! four columns of 16 tokens in each row, `[col / 4][token][col % 4]`, which is how the unit takes its second operand.

use std::ops::Range;

use super::fetch::PanelBytes;
use super::{Kernels, PANEL_COLS, PANEL_ROWS, panel_rows};
use crate::gguf::GgmlType;
use crate::quant;

/// Rows and tokens of a tile.
pub const TILE: usize = 16;
/// Columns of a tile: what one instruction adds up.
pub(super) const STEP: usize = 64;
/// Greatest magnitude of a weight or an activation in 16 bits: its high byte, rounded, fits 8 bits.
pub(super) const LIMIT: f32 = 32600.0;
/// A scale of less than this counts as nothing; the inverse of a greater one is finite.
pub(super) const TINY: f32 = 1e-30;

/// 16 rows of 64 bytes, aligned to cache lines: a tile that is not is loaded at half the speed.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Tile(pub(super) [[i8; 64]; TILE]);

const _: () = assert!(size_of::<Tile>() == 1024);

impl Tile {
    const ZERO: Self = Self([[0; 64]; TILE]);
}

/// The functions of a matrix unit; `unsafe` to call where the CPU has none.
pub(super) struct Functions {
    /// Up to 16 rows of activations to `[step][plane]` tiles and `[chunk][16]` scales.
    pub pack: unsafe fn(values: &[f32], cols: usize, tiles: &mut [Tile], scale: &mut [f32]),
    /// The unpacked rows of a panel to rows from `first` on.
    pub widen: unsafe fn(Form, rows: usize, first: usize, &mut TilePanel),
    pub multiply: unsafe fn(&TilePanel, &TileInputs, chunk: usize, acc: &mut [f32]),
    /// `[row][token]` to `[token][row]`, for each 16 tokens by [`PANEL_ROWS`].
    pub turn: unsafe fn(&mut [f32]),
}

/// Rows that are unpacked before they are widened: so many that a row's scales, written in pieces, are in the cache by
/// the time that they are read as one.
pub(super) const UNPACKED: usize = 8;

/// Columns of some rows of weights in the common form of [`quant`].
#[repr(C, align(64))]
pub(super) struct Unpacked {
    pub q: [[u8; PANEL_COLS]; UNPACKED],
    pub scale: [[f32; PANEL_COLS / 16]; UNPACKED],
    pub min: [[f32; PANEL_COLS / 16]; UNPACKED],
}

/// What all rows of [`Unpacked`] share.
#[derive(Clone, Copy)]
pub(super) struct Form {
    pub cols: usize,
    pub group_len: usize,
    pub has_min: bool,
    pub range: Range16,
}

/// How the codes of a type become 16 bits: `round((q - zero) * 2^shift * factor / 2^15)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range16 {
    pub zero: u8,
    /// Least and greatest `q - zero`.
    pub least: i32,
    pub greatest: i32,
    /// As much as `q - zero` can be shifted in 16 bits: 8 or more.
    pub shift: u32,
}

impl Range16 {
    /// Of a type, or of what it is [coarsely](quant::coarsen).
    pub fn of(ty: GgmlType, coarse: bool) -> Self {
        let zero = if coarse { 0 } else { i32::from(quant::zero_point(ty)) };
        let max = i32::from(super::max_q(ty));
        let (least, greatest) = (-zero, max - zero);
        let fits = |shift: &u32| least << shift >= -32768 && greatest << shift <= 32767;
        let shift = (8..15).rev().find(fits).expect("codes of 8 bits fit with 8 more");
        Self { zero: zero as u8, least, greatest, shift }
    }

    /// What the factor of a scale is a multiple of: a scale times this over the unit is its factor.
    pub fn per_scale(self) -> f32 {
        (1 << (15 - self.shift)) as f32
    }
}

/// Columns of a chunk of rows of `cols`: about as many in each, of whole blocks of every type that such rows can have.
pub fn chunk_cols(cols: usize) -> usize {
    let whole = if cols.is_multiple_of(quant::MAX_BLOCK_LEN) { quant::MAX_BLOCK_LEN } else { STEP };
    cols.div_ceil(cols.div_ceil(PANEL_COLS).max(1)).next_multiple_of(whole).max(whole)
}

/// Rows of activations as tiles.
#[derive(Default)]
pub struct TileInputs {
    rows: usize,
    cols: usize,
    /// `[rows / 16][step][plane]`, a step being 64 columns, the high plane first.
    tiles: Vec<Tile>,
    /// `[rows / 16][chunk][16]`
    scale: Vec<f32>,
}

/// Sixteen rows, to be written by [`Kernels::pack_tiles`].
pub struct TileRowsMut<'a> {
    cols: usize,
    tiles: &'a mut [Tile],
    scale: &'a mut [f32],
}

impl TileInputs {
    /// Makes this `rows x cols`; the contents are to be written anew.
    pub fn reshape(&mut self, rows: usize, cols: usize) {
        (self.rows, self.cols) = (rows, cols);
        let (tiles, scales) = (self.tiles_len() * self.groups(), self.scales_len() * self.groups());
        if self.tiles.len() < tiles {
            self.tiles.resize(tiles, Tile::ZERO);
        }
        if self.scale.len() < scales {
            self.scale.resize(scales, 0.0);
        }
    }

    /// Groups of up to 16 rows.
    pub fn groups(&self) -> usize {
        self.rows.div_ceil(TILE)
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Tiles of a group.
    fn tiles_len(&self) -> usize {
        2 * self.cols.div_ceil(STEP)
    }

    /// Scales of a group.
    fn scales_len(&self) -> usize {
        TILE * self.cols.div_ceil(chunk_cols(self.cols))
    }

    /// The groups, each a separate mutable view: for packing in parallel.
    pub fn groups_mut(&mut self) -> impl Iterator<Item = TileRowsMut<'_>> {
        let (groups, cols) = (self.groups(), self.cols);
        let (tiles, scales) = (self.tiles_len().max(1), self.scales_len().max(1));
        let parts = self.tiles.chunks_mut(tiles).zip(self.scale.chunks_mut(scales)).take(groups);
        parts.map(move |(tiles, scale)| TileRowsMut { cols, tiles, scale })
    }

    /// Tiles and scales of a chunk of a group.
    #[inline]
    pub(super) fn part(&self, group: usize, chunk: usize) -> (&[Tile], &[f32; TILE]) {
        let n = chunk_cols(self.cols);
        let steps = chunk * n / STEP..((chunk + 1) * n).min(self.cols).div_ceil(STEP);
        let tiles = &self.tiles[group * self.tiles_len()..][..self.tiles_len()];
        let scale = &self.scale[group * self.scales_len() + chunk * TILE..];
        let scale = scale.first_chunk().expect("16 scales a chunk");
        (&tiles[2 * steps.start..2 * steps.end], scale)
    }
}

/// [`PANEL_ROWS`] rows of weights as tiles.
pub struct TilePanel {
    cols: usize,
    /// `[step][plane][row / 16]`, the high plane first.
    pub(super) tiles: Box<[Tile; 4 * PANEL_COLS / STEP]>,
    /// Of each row, times 256: a sum counts the products of high bytes as 256.
    pub(super) scale: [f32; PANEL_ROWS],
    pub(super) unpacked: Box<Unpacked>,
}

impl Default for TilePanel {
    fn default() -> Self {
        let unpacked = Unpacked {
            q: [[0; PANEL_COLS]; UNPACKED],
            scale: [[0.0; PANEL_COLS / 16]; UNPACKED],
            min: [[0.0; PANEL_COLS / 16]; UNPACKED],
        };
        Self {
            cols: 0,
            tiles: Box::new([Tile::ZERO; 4 * PANEL_COLS / STEP]),
            scale: [0.0; PANEL_ROWS],
            unpacked: Box::new(unpacked),
        }
    }
}

impl TilePanel {
    /// Steps of 64 columns.
    pub(super) fn steps(&self) -> usize {
        self.cols.div_ceil(STEP)
    }

    /// The tiles that row `row` lies in, high and low plane of each step, and its place there.
    #[inline(always)] // called from functions with target features, where a call costs a `vzeroupper`
    pub(super) fn place(row: usize, step: usize) -> ([usize; 2], usize) {
        ([4 * step + row / TILE, 4 * step + 2 + row / TILE], row % TILE)
    }
}

impl Kernels {
    /// Whether many rows are multiplied by [`multiply_tiles`](Self::multiply_tiles): the CPU has a matrix unit.
    pub fn has_tiles(&self) -> bool {
        self.isa.functions.tiles.is_some()
    }

    fn tile_functions(&self) -> &'static Functions {
        self.isa.functions.tiles.expect("has_tiles() was asked")
    }

    /// Brings up to 16 rows of values to tiles; missing rows count as 0.
    ///
    /// # Panics
    /// If there are more rows, or no [tiles](Self::has_tiles).
    pub fn pack_tiles(&self, values: &[f32], to: TileRowsMut<'_>) {
        let cols = to.cols;
        assert!(cols.is_multiple_of(32) && cols > 0);
        assert!(values.len().is_multiple_of(cols) && values.len() / cols <= TILE);
        assert!(to.tiles.len() == 2 * cols.div_ceil(STEP));
        assert!(to.scale.len() == TILE * cols.div_ceil(chunk_cols(cols)));
        // SAFETY: the handle proves the ISA; the lengths were just asserted.
        unsafe { (self.tile_functions().pack)(values, cols, to.tiles, to.scale) }
    }

    /// Unpacks columns `cols` of up to [`PANEL_ROWS`] rows into `panel`, [coarsely](quant::coarsen) if that is asked for; missing
    /// rows count as 0.
    ///
    /// `weights` holds whole rows of `row_bytes`; `cols` begins and ends at a block boundary.
    ///
    /// # Panics
    /// If that is not so, or there are no [tiles](Self::has_tiles).
    pub fn unpack_tiles(
        &self,
        ty: GgmlType,
        (weights, row_bytes): (&[u8], usize),
        cols: Range<usize>,
        coarse: bool,
        panel: &mut TilePanel,
    ) {
        let rows = panel_rows(ty, weights, row_bytes, &cols);
        panel.cols = cols.len();
        let bytes = PanelBytes::new(ty, &cols, row_bytes);
        let coarse = coarse && quant::coarse_step(ty).is_some();
        let form = Form {
            cols: cols.len(),
            group_len: quant::group_len(ty),
            has_min: quant::has_min(ty) || coarse,
            range: Range16::of(ty, coarse),
        };
        let (n, groups) = (form.cols, form.cols / form.group_len);
        let tile_functions = self.tile_functions();
        bytes.fetch_first(weights.chunks_exact(row_bytes));
        for (i, part) in weights.chunks(UNPACKED * row_bytes).enumerate() {
            for (r, row) in part.chunks_exact(row_bytes).enumerate() {
                let u = &mut panel.unpacked;
                let (q, scale, min) = (&mut u.q[r][..n], &mut u.scale[r][..groups], &mut u.min[r][..groups]);
                // SAFETY: the handle proves the ISA; `q` has a byte and the scales an element for each weight and group
                // of the blocks.
                unsafe { (self.isa.functions.unpack)(ty, &row[bytes.now.clone()], q, scale, min) };
                if coarse {
                    quant::coarsen(ty, q, scale, min);
                }
                bytes.fetch_next(row);
            }
            // SAFETY: the handle proves the ISA; the panel has room for `PANEL_COLS` columns of `PANEL_ROWS` rows.
            unsafe { (tile_functions.widen)(form, part.len() / row_bytes, i * UNPACKED, panel) };
        }
        for r in rows..PANEL_ROWS {
            panel.scale[r] = 0.0; // whatever bytes are there count as nothing
        }
    }

    /// `acc[group][row][token] += panel[row] . x[16 group + token]`, for columns from `chunk * chunk_cols` on, as many as
    /// the panel has. `acc` has an element for all 16 tokens of each group.
    ///
    /// # Panics
    /// If the lengths do not belong together, or there are no [tiles](Self::has_tiles).
    pub fn multiply_tiles(&self, panel: &TilePanel, x: &TileInputs, chunk: usize, acc: &mut [f32]) {
        let first = chunk * chunk_cols(x.cols);
        assert!(first < x.cols && panel.cols == chunk_cols(x.cols).min(x.cols - first));
        assert_eq!(acc.len(), x.groups() * TILE * PANEL_ROWS);
        // SAFETY: the handle proves the ISA; the lengths were just asserted.
        unsafe { (self.tile_functions().multiply)(panel, x, chunk, acc) }
    }

    /// From `acc[group][row][token]` to `acc[token][row]`, in place.
    ///
    /// # Panics
    /// If `acc` has no whole groups, or there are no [tiles](Self::has_tiles).
    pub fn turn_tiles(&self, acc: &mut [f32]) {
        assert!(acc.len().is_multiple_of(TILE * PANEL_ROWS));
        // SAFETY: the handle proves the ISA; `acc` holds whole groups.
        unsafe { (self.tile_functions().turn)(acc) }
    }
}

/// Plain code, to test by.
#[cfg(test)]
pub(super) mod reference {
    use super::*;

    pub static FUNCTIONS: Functions = Functions { pack, widen, multiply, turn };

    /// `256 * high + low`, both signed.
    fn planes(v: i32) -> [i8; 2] {
        let high = (v + 128) >> 8;
        [high as i8, (v - (high << 8)) as i8]
    }

    fn pack(values: &[f32], cols: usize, tiles: &mut [Tile], scale: &mut [f32]) {
        tiles.fill(Tile::ZERO);
        scale.fill(0.0);
        let n = chunk_cols(cols);
        for (t, values) in values.chunks_exact(cols).enumerate() {
            for (c, values) in values.chunks(n).enumerate() {
                let max = values.iter().fold(0f32, |m, v| m.max(v.abs()));
                let inverse = if max > TINY { LIMIT / max } else { 0.0 };
                scale[c * TILE + t] = max / LIMIT;
                for (i, v) in values.iter().enumerate() {
                    let col = c * n + i;
                    for (plane, byte) in
                        planes((v * inverse).round_ties_even() as i32).into_iter().enumerate()
                    {
                        tiles[col / STEP * 2 + plane].0[col % STEP / 4][4 * t + col % 4] = byte;
                    }
                }
            }
        }
    }

    fn widen(form: Form, rows: usize, first: usize, panel: &mut TilePanel) {
        let TilePanel { tiles: to, scale: units, unpacked: w, .. } = panel;
        let range = form.range;
        for r in 0..rows {
            let min = |g: usize| if form.has_min { w.min[r][g] } else { 0.0 };
            let mut unit = 0f32;
            for g in 0..form.cols / form.group_len {
                let scale = w.scale[r][g];
                for extreme in [range.least, range.greatest] {
                    unit = unit.max((scale * extreme as f32 + min(g)).abs() * (1.0 / LIMIT));
                }
                unit = unit.max(scale.abs() * (range.per_scale() / 32767.0));
            }
            let inverse = if unit > TINY { 1.0 / unit } else { 0.0 };
            units[first + r] = 256.0 * unit;
            for (col, &q) in w.q[r][..form.cols].iter().enumerate() {
                let g = col / form.group_len;
                let v = (i32::from(q) - i32::from(range.zero)) << range.shift;
                let factor = (w.scale[r][g] * (range.per_scale() * inverse)).round_ties_even() as i32;
                let v = ((v * factor + (1 << 14)) >> 15) + (min(g) * inverse).round_ties_even() as i32;
                let (tiles, place) = TilePanel::place(first + r, col / STEP);
                for (tile, byte) in tiles.into_iter().zip(planes(v)) {
                    to[tile].0[place][col % STEP] = byte;
                }
            }
        }
    }

    fn multiply(panel: &TilePanel, x: &TileInputs, chunk: usize, acc: &mut [f32]) {
        for (group, acc) in acc.chunks_exact_mut(TILE * PANEL_ROWS).enumerate() {
            let (tiles, scale) = x.part(group, chunk);
            for (i, acc) in acc.iter_mut().enumerate() {
                let (row, token) = (i / TILE, i % TILE);
                let mut sum = 0i32;
                for col in 0..panel.cols {
                    let (at, place) = TilePanel::place(row, col / STEP);
                    let w = at.map(|tile| i32::from(panel.tiles[tile].0[place][col % STEP]));
                    let x = [0, 1].map(|plane| {
                        i32::from(tiles[col / STEP * 2 + plane].0[col % STEP / 4][4 * token + col % 4])
                    });
                    sum += 256 * w[0] * x[0] + w[0] * x[1] + w[1] * x[0];
                }
                *acc += sum as f32 * (scale[token] * panel.scale[row]);
            }
        }
    }

    fn turn(acc: &mut [f32]) {
        for acc in acc.chunks_exact_mut(TILE * PANEL_ROWS) {
            let from = acc.to_vec();
            for (i, acc) in acc.iter_mut().enumerate() {
                *acc = from[i % PANEL_ROWS * TILE + i / PANEL_ROWS];
            }
        }
    }
}
