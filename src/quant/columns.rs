//! The column form: a matrix laid out so that one input's weights lie together.
//!
//! In a file a matrix is stored by rows (outputs), and a product reads all of it. If only some inputs matter, the
//! weights that meet them must be contiguous, a cache line or more at a time. The column form holds the very same
//! codes `q` of the [common form](super), in tiles of [`TILE`] outputs:
//!
//! ```text
//! tile = factor[width] zero[width] (min_factor[width] min_zero[width])    f32
//!        scale[groups][width] (min[groups][width])                        bytes
//!        low[cols][width / 2]   (or [width] for 8-bit codes)              4 bits a code
//!        high[cols][width * high_bits / 8]                                its upper 1 or 2 bits
//! ```
//!
//! so that a column of a tile of 256 outputs is two cache lines at 4 bits. What belongs to a `min` is there for types
//! that have one. Scales and mins are read for a group of which only a single column is chosen, so they are kept
//! small: a byte each, spread evenly over the range that an output's scales have,
//!
//! ```text
//! scale = factor[output] * (code - zero[output])
//! ```
//!
//! which moves a weight by some thousandths of itself, a small part of what its 4 bits did (docs/skipping.md).
//!
//! # Order within a column
//! A kernel takes four columns at a time and interleaves their bytes (unpack bytes, then words, in 16-byte lanes),
//! which gives lanes of four bytes, an output each, for the byte dot product. The order of the codes is such that
//! the sums come out in the order of the outputs: see [`ColumnLayout::low_place`].

use std::ops::Range;

use super::{Matrix, group_len, has_min, is_quantised, unpack_row};
use crate::gguf::GgmlType;

/// Outputs of a tile: two cache lines of 4-bit codes a column, and 16 registers of 16 sums.
pub const TILE: usize = 256;
/// Outputs of a last tile that is at most half full.
const HALF_TILE: usize = TILE / 2;
/// Bytes of a cache line.
const LINE: usize = 64;

/// Where the column form of a matrix has what; also known for a matrix that is never brought into it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ColumnLayout {
    ty: GgmlType,
    outputs: usize,
    cols: usize,
}

/// How the codes of a type are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codes {
    /// 4 bits, and `high` more (0, 1 or 2) in a plane of their own.
    Nibbles {
        /// Bits in the high plane.
        high: usize,
    },
    /// 4 bits that are an index into [`IQ4_KVALUES`](super::IQ4_KVALUES) (plus 128).
    Table,
    /// 8 bits.
    Bytes,
}

/// What a product with some of the columns touches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Touched {
    /// Groups with a chosen column.
    pub groups: usize,
    /// Chosen columns.
    pub columns: usize,
    /// Aligned pairs of columns with a chosen one.
    pub pairs: usize,
    /// Aligned fours of columns with a chosen one.
    pub fours: usize,
}

/// The parts of a tile, borrowed.
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct ColumnTile<'a> {
    pub ty: GgmlType,
    pub codes: Codes,
    /// Outputs, padded: 256 or 128.
    pub width: usize,
    pub cols: usize,
    pub group_len: usize,
    /// `[factor, zero]` or `[factor, zero, min_factor, min_zero]`, `[..][width]` little-endian f32.
    pub heads: &'a [u8],
    /// `[groups][width]`
    pub scale: &'a [u8],
    /// `[groups][width]`, or empty.
    pub min: &'a [u8],
    /// `[cols][width / 2]`, or `[cols][width]`.
    pub low: &'a [u8],
    /// `[cols][width * high / 8]`
    pub high: &'a [u8],
}

impl ColumnLayout {
    /// The layout of a matrix of `outputs x cols`; `None` for types that are not quantised.
    pub fn new(ty: GgmlType, outputs: usize, cols: usize) -> Option<Self> {
        (is_quantised(ty) && cols.is_multiple_of(32)).then_some(Self { ty, outputs, cols })
    }

    /// Number of outputs.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Columns that share a scale.
    pub fn group_len(&self) -> usize {
        group_len(self.ty)
    }

    /// Groups of columns.
    pub fn groups(&self) -> usize {
        self.cols / self.group_len()
    }

    /// Number of tiles.
    pub fn tiles(&self) -> usize {
        self.outputs.div_ceil(TILE)
    }

    /// Outputs of tile `tile`.
    pub fn outputs_of(&self, tile: usize) -> Range<usize> {
        tile * TILE..((tile + 1) * TILE).min(self.outputs)
    }

    /// How codes are stored.
    pub fn codes(&self) -> Codes {
        use GgmlType::*;
        match self.ty {
            Q5_0 | Q5_1 | Q5_K => Codes::Nibbles { high: 1 },
            Q6_K => Codes::Nibbles { high: 2 },
            Q8_0 => Codes::Bytes,
            IQ4_NL | IQ4_XS => Codes::Table,
            _ => Codes::Nibbles { high: 0 },
        }
    }

    /// Outputs of a tile with the padding.
    fn width(&self, tile: usize) -> usize {
        if self.outputs_of(tile).len() <= HALF_TILE { HALF_TILE } else { TILE }
    }

    /// Bytes of each part of a tile of `width`: heads, scales, mins, low and high plane.
    fn parts(&self, width: usize) -> [usize; 5] {
        let min = usize::from(has_min(self.ty));
        let (low, high) = self.column_bytes(width);
        let groups = self.groups();
        [(2 + 2 * min) * 4 * width, groups * width, min * groups * width, self.cols * low, self.cols * high]
    }

    /// Bytes of a column of a tile, in the low and in the high plane.
    fn column_bytes(&self, width: usize) -> (usize, usize) {
        match self.codes() {
            Codes::Bytes => (width, 0),
            Codes::Table => (width / 2, 0),
            Codes::Nibbles { high } => (width / 2, width * high / 8),
        }
    }

    /// Bytes from one tile to the next.
    pub fn tile_stride(&self) -> usize {
        self.parts(TILE).iter().sum()
    }

    /// Bytes of all tiles.
    pub fn bytes(&self) -> usize {
        (0..self.tiles()).map(|t| self.parts(self.width(t)).iter().sum::<usize>()).sum()
    }

    /// Bytes that a product reads which touches so many columns and groups, by whole cache lines.
    pub fn bytes_read(&self, touched: Touched) -> usize {
        (0..self.tiles()).map(|t| self.tile_bytes_read(self.width(t), touched)).sum()
    }

    fn tile_bytes_read(&self, width: usize, touched: Touched) -> usize {
        let min = usize::from(has_min(self.ty));
        let (low, high) = self.column_bytes(width);
        let high_lines = match LINE.checked_div(high) {
            None => 0,
            Some(1) => touched.columns,
            Some(2) => touched.pairs,
            Some(_) => touched.fours,
        };
        self.parts(width)[0] + touched.groups * width * (1 + min) + touched.columns * low + high_lines * LINE
    }

    /// The parts of tile `tile` in its bytes.
    ///
    /// # Panics
    /// If there is no such tile, or `bytes` is shorter than it.
    pub fn view<'a>(&self, tile: usize, bytes: &'a [u8]) -> ColumnTile<'a> {
        assert!(tile < self.tiles());
        let width = self.width(tile);
        let [heads, scale, min, low, high] = self.parts(width);
        let (heads, rest) = bytes.split_at(heads);
        let (scale, rest) = rest.split_at(scale);
        let (min, rest) = rest.split_at(min);
        let (low, rest) = rest.split_at(low);
        ColumnTile {
            ty: self.ty,
            codes: self.codes(),
            width,
            cols: self.cols,
            group_len: self.group_len(),
            heads,
            scale,
            min,
            low,
            high: &rest[..high],
        }
    }

    /// Byte of a column's low plane that has the code of output `o` of a tile, and how far up in it.
    ///
    /// The `a`-th sum register holds outputs `16 a..16 a + 16`, in four lanes of four. Interleaving a cache line
    /// gives four registers (quarters), each made of four bytes of every lane; the low nibbles of a quarter feed one
    /// sum register and the high nibbles the next.
    pub fn low_place(&self, o: usize) -> (usize, usize) {
        let (a, lane, e) = (o / 16, o % 16 / 4, o % 4);
        match self.codes() {
            Codes::Bytes => (LINE * (a / 4) + 16 * lane + 4 * (a % 4) + e, 0),
            _ => (LINE * (a / 8) + 16 * lane + 4 * (a % 8 / 2) + e, 4 * (a % 2)),
        }
    }

    /// The same for the high plane of a tile of `width`. A column has 64, 32 or 16 bytes there; a kernel repeats
    /// them to fill a register, and a copy gives the bits of the lanes that it stands in.
    pub fn high_place(&self, width: usize, o: usize) -> (usize, usize) {
        let Codes::Nibbles { high: high @ 1.. } = self.codes() else { return (0, 0) };
        let (a, lane, e) = (o / 16, o % 16 / 4, o % 4);
        let copies = LINE / (width * high / 8);
        let lanes = 4 / copies;
        let field = (a / 8 * 2 + a % 2) * copies + lane / lanes;
        (16 * (lane % lanes) + 4 * (a % 8 / 2) + e, high * field)
    }
}

impl ColumnTile<'_> {
    /// The code of output `o` of the tile in column `col`, as an unsigned byte of the common form.
    pub fn code(&self, layout: &ColumnLayout, col: usize, o: usize) -> u8 {
        let (low_bytes, high_bytes) = layout.column_bytes(self.width);
        let (byte, shift) = layout.low_place(o);
        let low = self.low[col * low_bytes + byte];
        match self.codes {
            Codes::Bytes => low,
            Codes::Table => super::IQ4_KVALUES[usize::from(low >> shift & 15)].wrapping_add(-128) as u8,
            Codes::Nibbles { high: 0 } => low >> shift & 15,
            Codes::Nibbles { high } => {
                let (byte, bit) = layout.high_place(self.width, o);
                let top = self.high[col * high_bytes + byte] >> bit & ((1 << high) - 1);
                low >> shift & 15 | top << 4
            }
        }
    }

    /// Number `o` of head vector `which` (see [`heads`](Self::heads)).
    pub fn head(&self, which: usize, o: usize) -> f32 {
        let at = (which * self.width + o) * 4;
        f32::from_le_bytes(std::array::from_fn(|i| self.heads[at + i]))
    }
}

/// Buffers of [`pack`].
#[derive(Default)]
pub struct PackScratch {
    /// `[TILE][cols]`
    q: Vec<u8>,
    /// `[TILE][groups]`
    scale: Vec<f32>,
    min: Vec<f32>,
}

/// Writes tile `tile` of `matrix` to `bytes`, which were zero.
///
/// # Panics
/// If the layout is not that of the matrix, or `bytes` is shorter than the tile.
pub fn pack(layout: &ColumnLayout, matrix: &Matrix<'_>, tile: usize, bytes: &mut [u8], s: &mut PackScratch) {
    assert!(matrix.ty() == layout.ty && matrix.rows_len() == layout.outputs && matrix.cols() == layout.cols);
    let (cols, groups, width) = (layout.cols, layout.groups(), layout.width(tile));
    s.q.resize(TILE * cols, 0);
    s.scale.resize(TILE * groups, 0.0);
    s.min.resize(TILE * groups, 0.0);
    let outputs = layout.outputs_of(tile);
    for (o, row) in outputs.clone().enumerate() {
        let (q, g) = (&mut s.q[o * cols..][..cols], o * groups..(o + 1) * groups);
        unpack_row(layout.ty, matrix.row(row), q, &mut s.scale[g.clone()], &mut s.min[g]);
    }
    let [heads_len, scale_len, min_len, low_len, _] = layout.parts(width);
    let (heads, rest) = bytes.split_at_mut(heads_len);
    let (scale, rest) = rest.split_at_mut(scale_len);
    let (min, rest) = rest.split_at_mut(min_len);
    let (low, high) = rest.split_at_mut(low_len);
    let (scale_heads, min_heads) = heads.split_at_mut(2 * 4 * width);
    let n = outputs.len();
    pack_scales(&s.scale[..n * groups], width, scale_heads, scale);
    if has_min(layout.ty) {
        pack_scales(&s.min[..n * groups], width, min_heads, min);
    }
    pack_codes(layout, width, &s.q[..n * cols], low, high);
}

/// A byte for each of `values`, `[outputs][groups]`, into `codes`, `[groups][width]`; factor and zero of each output
/// into `heads`.
fn pack_scales(values: &[f32], width: usize, heads: &mut [u8], codes: &mut [u8]) {
    let groups = codes.len() / width;
    let (factors, zeros) = heads.split_at_mut(4 * width);
    for (o, values) in values.chunks_exact(groups.max(1)).enumerate() {
        let low = values.iter().fold(f32::INFINITY, |m, &v| m.min(v));
        let high = values.iter().fold(f32::NEG_INFINITY, |m, &v| m.max(v));
        let (factor, zero) = spread(low, high);
        factors[4 * o..][..4].copy_from_slice(&factor.to_le_bytes());
        zeros[4 * o..][..4].copy_from_slice(&zero.to_le_bytes());
        for (g, v) in values.iter().enumerate() {
            codes[g * width + o] = (v / factor + zero).round_ties_even() as u8;
        }
    }
}

/// `(factor, zero)` such that the bytes stand for values from `low` to `high`.
fn spread(low: f32, high: f32) -> (f32, f32) {
    let range = high - low;
    // One value for all groups is met exactly, by code 1 over zero 0.
    if !range.is_finite() || range <= low.abs().max(high.abs()) * 1e-6 {
        return if low == 0.0 || !low.is_finite() { (1.0, 0.0) } else { (low, 0.0) };
    }
    let factor = range / 255.0;
    (factor, -low / factor)
}

/// Columns packed at a time: their part of a tile stays in the L1 cache while every output adds to it.
const PACK_COLS: usize = 64;

/// The codes `q`, `[outputs][cols]`, into the planes of a tile.
fn pack_codes(layout: &ColumnLayout, width: usize, q: &[u8], low: &mut [u8], high: &mut [u8]) {
    let (low_bytes, high_bytes) = layout.column_bytes(width);
    let table = matches!(layout.codes(), Codes::Table).then(iq4_indices);
    for from in (0..layout.cols).step_by(PACK_COLS) {
        let cols = from..(from + PACK_COLS).min(layout.cols);
        let low = &mut low[cols.start * low_bytes..cols.end * low_bytes];
        let high = &mut high[cols.start * high_bytes..cols.end * high_bytes];
        for (o, row) in q.chunks_exact(layout.cols).enumerate() {
            let row = &row[cols.clone()];
            let (low_at, low_shift) = layout.low_place(o);
            let (high_at, high_shift) = layout.high_place(width, o);
            let columns = low.chunks_exact_mut(low_bytes).zip(row);
            match (&table, high_bytes) {
                (Some(table), _) => {
                    columns.for_each(|(column, q)| column[low_at] |= table[usize::from(*q)] << low_shift);
                }
                (None, 0) => columns.for_each(|(column, q)| column[low_at] |= q << low_shift),
                (None, _) => {
                    for ((column, q), top) in columns.zip(high.chunks_exact_mut(high_bytes)) {
                        column[low_at] |= (q & 15) << low_shift;
                        top[high_at] |= (q >> 4) << high_shift;
                    }
                }
            }
        }
    }
}

/// From a code of the IQ4 types to its index in their table.
fn iq4_indices() -> [u8; 256] {
    let mut index = [0; 256];
    for (i, v) in super::IQ4_KVALUES.iter().enumerate() {
        index[usize::from(v.wrapping_add(-128) as u8)] = i as u8;
    }
    index
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::quantize_row;

    fn types() -> impl Iterator<Item = GgmlType> {
        GgmlType::all().filter(|&ty| is_quantised(ty))
    }

    /// A matrix whose scales differ from group to group.
    fn bytes(ty: GgmlType, outputs: usize, cols: usize) -> Vec<u8> {
        let wave = |i: usize| (i as f32 * 0.37).sin() * (1.5 + (i as f32 * 0.001).sin());
        let values: Vec<f32> = (0..outputs * cols).map(wave).collect();
        let mut bytes = vec![0; ty.row_bytes(cols) * outputs];
        quantize_row(ty, &values, &mut bytes);
        bytes
    }

    #[test]
    fn the_column_form_holds_the_codes_and_nearly_the_scales() {
        for ty in types() {
            for (outputs, blocks) in [(1, 1), (100, 3), (256, 2), (300, 1), (500, 1)] {
                let cols = blocks * ty.block_len();
                let bytes = bytes(ty, outputs, cols);
                let matrix = Matrix::new(ty, outputs, cols, &bytes).unwrap();
                let layout = ColumnLayout::new(ty, outputs, cols).unwrap();
                let (groups, mut scratch) = (layout.groups(), PackScratch::default());
                for t in 0..layout.tiles() {
                    let mut packed = vec![0; layout.tile_stride()];
                    pack(&layout, &matrix, t, &mut packed, &mut scratch);
                    let tile = layout.view(t, &packed);
                    for (o, row) in layout.outputs_of(t).enumerate() {
                        let (mut q, mut scale) = (vec![0; cols], vec![0.0; groups]);
                        let mut min = vec![0.0; groups];
                        unpack_row(ty, matrix.row(row), &mut q, &mut scale, &mut min);
                        for (c, q) in q.iter().enumerate() {
                            assert_eq!(tile.code(&layout, c, o), *q, "{ty} {outputs}x{cols} {row} {c}");
                        }
                        check_scales(&tile, 0, tile.scale, o, &scale);
                        if has_min(ty) {
                            check_scales(&tile, 2, tile.min, o, &min);
                        }
                    }
                }
            }
        }
    }

    fn check_scales(tile: &ColumnTile<'_>, head: usize, codes: &[u8], o: usize, want: &[f32]) {
        let (factor, zero) = (tile.head(head, o), tile.head(head + 1, o));
        let range =
            want.iter().fold(f32::MIN, |m, &v| m.max(v)) - want.iter().fold(f32::MAX, |m, &v| m.min(v));
        for (g, want) in want.iter().enumerate() {
            let got = factor * (f32::from(codes[g * tile.width + o]) - zero);
            let step = range / 255.0 * 0.51 + want.abs() * 1e-5;
            assert!((got - want).abs() <= step, "{:?} {o} {g}: {got} {want}", tile.ty);
        }
    }

    #[test]
    fn codes_of_a_tile_have_places_of_their_own() {
        for ty in types() {
            let layout = ColumnLayout::new(ty, TILE, 256).unwrap();
            for width in [HALF_TILE, TILE] {
                let (low, high) = layout.column_bytes(width);
                let mut seen = std::collections::HashSet::new();
                for o in 0..width {
                    let (byte, shift) = layout.low_place(o);
                    assert!(byte < low && seen.insert((0, byte, shift)), "{ty} {width} {o}");
                    if high > 0 {
                        let (byte, bit) = layout.high_place(width, o);
                        assert!(byte < high && bit < 8 && seen.insert((1, byte, bit)), "{ty} {width} {o}");
                    }
                }
            }
        }
    }

    /// Bytes of the types that decoders use most: not more than by rows, and in proportion to what is chosen.
    #[test]
    fn the_column_form_is_no_larger_than_the_rows() {
        use GgmlType::*;
        for ty in [Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0, IQ4_NL, IQ4_XS] {
            let (outputs, cols) = (4096, 11008);
            let layout = ColumnLayout::new(ty, outputs, cols).unwrap();
            let rows = ty.row_bytes(cols) * outputs;
            assert!(layout.bytes() as f64 <= rows as f64 * 1.003, "{ty}: {} {rows}", layout.bytes());
            let all = Touched { groups: layout.groups(), columns: cols, pairs: cols / 2, fours: cols / 4 };
            assert_eq!(layout.bytes_read(all), layout.bytes(), "{ty}");
            assert!(layout.bytes_read(Touched::default()) < rows / 100);
        }
    }
}
