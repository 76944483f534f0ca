//! The column form: a matrix laid out so that one input's weights lie together.
//!
//! In a file a matrix is stored by rows (outputs), and a product reads all of it. If only some inputs matter, the
//! weights that meet them must be contiguous, and for more than a cache line: a core that fetches scattered lines on
//! its own has too few under way, and only from about 2 KiB on do runs keep up with a sequential read
//! (docs/skipping.md). The column form holds the very same codes `q` of the [common form](super) in strips of up to
//! [`STRIP`] outputs:
//!
//! ```text
//! strip = group[groups]
//! group = scale[width] (min[width]) column[group_len]    a byte each
//! column = low[width / 2]    (or [width] for 8-bit codes)    4 bits a code
//!          high[width * high_bits / 8]                       its upper 1 or 2 bits
//! ```
//!
//! (and, of matrices that are to be read coarsely, behind the columns of a group
//!
//! ```text
//! coarse[group_len]    the two upper bits of each code: width / 4 bytes a column
//! ```
//!
//! unless the high part has them anyway), so that a column of a strip is a run of kilobytes, and all of it, if all is chosen, one sequential read. `min` is
//! there for types that have one. Scales and mins are read for a group of which only a single column is chosen, so
//! they are kept small: a byte each, spread evenly up to the greatest that an output has,
//!
//! ```text
//! scale = factor[output] * (code - zero)
//! min = factor[output] * ratio[output] * (code - min_zero)
//! ```
//!
//! which moves a weight by some thousandths of itself, a small part of what its 4 bits did (docs/skipping.md).
//! Factors and ratios are f32, beside the strip. A zero is that of a whole strip, so that a kernel need not load it:
//! 0, or 128 where there are scales of both signs.
//!
//! # Order within a column
//! A kernel takes a tile of [`TILE`] outputs, whose sums fill 16 registers, and four columns at a time. It interleaves
//! their bytes (unpack bytes, then words, in 16-byte lanes), which gives lanes of four bytes, an output each, for the
//! byte dot product. The order of the codes of a tile is such that the sums come out in the order of the outputs: see
//! `ColumnLayout::low_place`.

use std::ops::Range;

use super::{Matrix, coarse_step, group_len, has_min, is_quantised, unpack_row, unpack_scales};
use crate::gguf::GgmlType;

/// Outputs of a tile: two cache lines of 4-bit codes a column, and 16 registers of 16 sums.
pub const TILE: usize = 256;
/// Most outputs of a strip: 8 KiB of 4-bit codes a column, and 64 KiB of sums.
pub const STRIP: usize = 64 * TILE;
/// Outputs of a last tile that is at most half full.
const HALF_TILE: usize = TILE / 2;
/// Bytes of a cache line.
const LINE: usize = 64;
/// Bits of a code that are read of a coarse column.
pub const COARSE_BITS: usize = 2;
/// Columns that are packed at a time: a whole number of blocks of every type.
pub const SPAN: usize = super::MAX_BLOCK_LEN;

/// Where the column form of a matrix has what; also known for a matrix that is never brought into it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ColumnLayout {
    ty: GgmlType,
    outputs: usize,
    cols: usize,
    coarse: bool,
}

/// How the codes of a type are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codes {
    /// 4 bits, and `high` more (0, 1 or 2) behind them.
    Nibbles {
        /// Bits of the high part.
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
    /// Those of them that are read coarsely.
    pub coarse: usize,
}

/// Where the upper bits of a strip's codes are: those of column `c` of a group begin `at + c * stride` bytes behind the
/// group's beginning, and are in the order of `ColumnLayout::high_place` with two bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Coarse {
    pub at: usize,
    pub stride: usize,
    /// How many codes share them ([`coarse_step`]).
    pub step: u8,
}

/// A strip, borrowed.
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct ColumnStrip<'a> {
    pub ty: GgmlType,
    pub codes: Codes,
    /// Outputs, padded to whole tiles (the last may be a half): a multiple of 128.
    pub width: usize,
    pub cols: usize,
    pub group_len: usize,
    pub has_min: bool,
    /// `[factor]` or `[factor, ratio]`, `[..][width]`.
    pub heads: &'a [f32],
    /// Code of a scale of 0, and of a min of 0.
    pub zeros: [f32; 2],
    /// `[groups][group_bytes]`
    pub groups: &'a [u8],
    pub group_bytes: usize,
    /// Bytes of a column, a multiple of 64.
    pub column_bytes: usize,
    /// Bytes of its low part.
    pub low_bytes: usize,
    /// If columns can be read coarsely.
    pub coarse: Option<Coarse>,
}

impl ColumnLayout {
    /// The layout of a matrix of `outputs x cols`; `None` for types that are not quantised.
    pub fn new(ty: GgmlType, outputs: usize, cols: usize) -> Option<Self> {
        let fits = is_quantised(ty) && cols.is_multiple_of(32) && outputs > 0;
        fits.then_some(Self { ty, outputs, cols, coarse: false })
    }

    /// The same with columns that can be read coarsely, if the type has such.
    pub fn with_coarse(self, coarse: bool) -> Self {
        Self { coarse: coarse && coarse_step(self.ty).is_some(), ..self }
    }

    /// Whether columns can be read coarsely.
    pub fn is_coarse(&self) -> bool {
        self.coarse
    }

    /// What the bytes that a coarse column spares are in units of those that it has.
    pub fn coarse_saves(&self) -> f32 {
        let width = self.outputs.next_multiple_of(HALF_TILE);
        let coarse = width * COARSE_BITS / 8;
        (self.column_bytes(width) as f32 - coarse as f32) / coarse as f32
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

    /// Number of strips; all have as many tiles, but for the last.
    pub fn strips(&self) -> usize {
        self.outputs.div_ceil(self.outputs_of_first())
    }

    /// Outputs of every strip but the last, which may have fewer, if there are several.
    pub fn outputs_of_first(&self) -> usize {
        let tiles = self.outputs.div_ceil(TILE);
        tiles.div_ceil(tiles.div_ceil(STRIP / TILE)) * TILE
    }

    /// Outputs of strip `strip`.
    pub fn outputs_of(&self, strip: usize) -> Range<usize> {
        let most = self.outputs_of_first();
        strip * most..((strip + 1) * most).min(self.outputs)
    }

    /// Outputs of a strip with the padding.
    pub fn width(&self, strip: usize) -> usize {
        self.outputs_of(strip).len().next_multiple_of(HALF_TILE)
    }

    /// Bytes of a column's low and high part in a strip of `width`.
    fn parts(&self, width: usize) -> (usize, usize) {
        match self.codes() {
            Codes::Bytes => (width, 0),
            Codes::Table => (width / 2, 0),
            Codes::Nibbles { high } => (width / 2, width * high / 8),
        }
    }

    fn column_bytes(&self, width: usize) -> usize {
        let (low, high) = self.parts(width);
        (low + high).next_multiple_of(LINE)
    }

    /// Bytes of the scales (and mins) of a group.
    fn scale_bytes(&self, width: usize) -> usize {
        width * (1 + usize::from(has_min(self.ty)))
    }

    /// Where coarse columns are in a group.
    fn coarse(&self, width: usize) -> Option<Coarse> {
        let step = coarse_step(self.ty).filter(|_| self.coarse)?;
        let (columns, (low, high)) = (self.scale_bytes(width), self.parts(width));
        Some(match high {
            0 => Coarse { at: columns + self.group_len() * low, stride: coarse_bytes(width), step },
            _ => Coarse { at: columns + low, stride: self.column_bytes(width), step },
        })
    }

    fn group_bytes(&self, width: usize) -> usize {
        let coarse = if self.coarse && self.parts(width).1 == 0 { coarse_bytes(width) } else { 0 };
        self.scale_bytes(width) + self.group_len() * (self.column_bytes(width) + coarse)
    }

    /// Floats of a strip's heads.
    pub fn heads(&self, strip: usize) -> usize {
        self.width(strip) * (1 + usize::from(has_min(self.ty))) + 2
    }

    /// Spans of [`SPAN`] columns, the last of which may be shorter.
    pub fn spans(&self) -> usize {
        self.cols.div_ceil(SPAN)
    }

    /// Bytes of a span of a strip.
    pub fn span_bytes(&self, strip: usize) -> usize {
        SPAN / self.group_len() * self.group_bytes(self.width(strip))
    }

    /// Bytes of everything but coarse columns.
    pub fn bytes(&self) -> usize {
        self.bytes_read(Touched { groups: self.groups(), columns: self.cols, coarse: 0 })
    }

    /// Bytes that a product reads which touches so many groups and columns.
    pub fn bytes_read(&self, touched: Touched) -> usize {
        let strip = |s: usize| {
            let width = self.width(s);
            4 * self.heads(s)
                + touched.groups * self.scale_bytes(width)
                + (touched.columns - touched.coarse) * self.column_bytes(width)
                + touched.coarse * width * COARSE_BITS / 8
        };
        (0..self.strips()).map(strip).sum()
    }

    /// Strip `strip` with its heads and groups.
    ///
    /// # Panics
    /// If there is no such strip, or what is passed is shorter than it.
    pub fn view<'a>(&self, strip: usize, heads: &'a [f32], groups: &'a [u8]) -> ColumnStrip<'a> {
        assert!(strip < self.strips());
        let width = self.width(strip);
        let group_bytes = self.group_bytes(width);
        let (heads, zeros) = heads[..self.heads(strip)].split_at(self.heads(strip) - 2);
        ColumnStrip {
            ty: self.ty,
            codes: self.codes(),
            width,
            cols: self.cols,
            group_len: self.group_len(),
            has_min: has_min(self.ty),
            heads,
            zeros: [zeros[0], zeros[1]],
            groups: &groups[..self.groups() * group_bytes],
            group_bytes,
            column_bytes: self.column_bytes(width),
            low_bytes: self.parts(width).0,
            coarse: self.coarse(width),
        }
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

    /// Byte of a tile's part of a column's low codes that has the code of output `o` of the tile, and how far up in it.
    ///
    /// The `a`-th sum register holds outputs `16 a..16 a + 16`, in four lanes of four. Interleaving a cache line
    /// gives four registers (quarters), each made of four bytes of every lane; the low nibbles of a quarter feed one
    /// sum register and the high nibbles the next.
    fn low_place(codes: Codes, o: usize) -> (usize, usize) {
        let (a, lane, e) = (o / 16, o % 16 / 4, o % 4);
        match codes {
            Codes::Bytes => (LINE * (a / 4) + 16 * lane + 4 * (a % 4) + e, 0),
            _ => (LINE * (a / 8) + 16 * lane + 4 * (a % 8 / 2) + e, 4 * (a % 2)),
        }
    }

    /// The same for `high` bits of a tile of `width`. A column has 64, 32 or 16 bytes of them there; a kernel repeats
    /// them to fill a register, and a copy gives the bits of the lanes that it stands in.
    fn high_place(high: usize, width: usize, o: usize) -> (usize, usize) {
        let (a, lane, e) = (o / 16, o % 16 / 4, o % 4);
        let copies = LINE / (width * high / 8);
        let lanes = 4 / copies;
        let field = (a / 8 * 2 + a % 2) * copies + lane / lanes;
        (16 * (lane % lanes) + 4 * (a % 8 / 2) + e, high * field)
    }

    /// Where the upper bits of output `o` of a strip of `width` are in a coarse column: byte and shift.
    fn coarse_place(width: usize, o: usize) -> (usize, usize) {
        let tile = o / TILE;
        let (byte, bit) = Self::high_place(COARSE_BITS, (width - tile * TILE).min(TILE), o % TILE);
        (tile * TILE * COARSE_BITS / 8 + byte, bit)
    }

    /// Where the code of output `o` of a strip of `width` is in a column: byte and shift of its low bits, and of its
    /// high bits (0 if there are none).
    fn place(codes: Codes, width: usize, low_bytes: usize, o: usize) -> [(usize, usize); 2] {
        let (tile, o) = (o / TILE, o % TILE);
        let (byte, shift) = Self::low_place(codes, o);
        let low_of_tile = if codes == Codes::Bytes { TILE } else { TILE / 2 };
        let low = (tile * low_of_tile + byte, shift);
        let Codes::Nibbles { high: high @ 1.. } = codes else { return [low, (0, 0)] };
        let (byte, shift) = Self::high_place(high, (width - tile * TILE).min(TILE), o);
        [low, (low_bytes + tile * TILE * high / 8 + byte, shift)]
    }
}

/// Bytes of a coarse column, whole cache lines.
fn coarse_bytes(width: usize) -> usize {
    (width * COARSE_BITS / 8).next_multiple_of(LINE)
}

impl ColumnStrip<'_> {
    /// Bytes of the scales (and mins) of a group.
    pub fn scale_bytes(&self) -> usize {
        self.width * (1 + usize::from(self.has_min))
    }

    /// The upper bits of the code of output `o` of the strip in column `col`.
    ///
    /// # Panics
    /// If columns cannot be read coarsely.
    pub fn coarse_code(&self, col: usize, o: usize) -> u8 {
        let Coarse { at, stride, .. } = self.coarse.expect("columns that can be read coarsely");
        let column =
            &self.groups[col / self.group_len * self.group_bytes + at + col % self.group_len * stride..];
        let (byte, bit) = ColumnLayout::coarse_place(self.width, o);
        column[byte] >> bit & ((1 << COARSE_BITS) - 1)
    }

    /// The code of output `o` of the strip in column `col`, as an unsigned byte of the common form.
    pub fn code(&self, col: usize, o: usize) -> u8 {
        let [(low, shift), (high, bit)] = ColumnLayout::place(self.codes, self.width, self.low_bytes, o);
        let in_group = self.scale_bytes() + col % self.group_len * self.column_bytes;
        let column = &self.groups[col / self.group_len * self.group_bytes + in_group..];
        match self.codes {
            Codes::Bytes => column[low],
            Codes::Table => super::IQ4_KVALUES[usize::from(column[low] >> shift & 15)] as u8 ^ 0x80,
            Codes::Nibbles { high: 0 } => column[low] >> shift & 15,
            Codes::Nibbles { high: n } => {
                column[low] >> shift & 15 | (column[high] >> bit & ((1 << n) - 1)) << 4
            }
        }
    }

    /// The byte of the scale (`part` 0) or min (1) of group `group` and output `o`.
    pub fn scale(&self, part: usize, group: usize, o: usize) -> u8 {
        self.groups[group * self.group_bytes + part * self.width + o]
    }

    /// Number `o` of head vector `which`.
    pub fn head(&self, which: usize, o: usize) -> f32 {
        self.heads[which * self.width + o]
    }
}

/// Least and greatest scale and min of an output.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ranges([[f32; 2]; 2]);

impl Ranges {
    /// Of the output with the weights `row`.
    pub fn of(layout: &ColumnLayout, row: &[u8], s: &mut PackScratch) -> Self {
        let groups = layout.groups();
        s.scale.resize(groups.max(SPAN), 0.0);
        s.min.resize(groups.max(SPAN), 0.0);
        let (scale, min) = (&mut s.scale[..groups], &mut s.min[..groups]);
        unpack_scales(layout.ty, row, scale, min);
        let range = |values: &[f32]| {
            let least = values.iter().fold(f32::INFINITY, |m, &v| m.min(v));
            [least, values.iter().fold(f32::NEG_INFINITY, |m, &v| m.max(v))]
        };
        Self([range(scale), if has_min(layout.ty) { range(min) } else { [0.0; 2] }])
    }
}

/// The heads of strip `strip`, whose outputs have the scales and mins `ranges`.
pub fn heads_of(layout: &ColumnLayout, strip: usize, ranges: &[Ranges]) -> Vec<f32> {
    let width = layout.width(strip);
    let mut heads = vec![0.0; layout.heads(strip)];
    let zeros = [0, 1].map(|part| {
        let of_one_sign =
            ranges.iter().all(|r| r.0[part][0] >= 0.0) || ranges.iter().all(|r| r.0[part][1] <= 0.0);
        if of_one_sign { 0.0 } else { 128.0 }
    });
    for (o, Ranges([scales, mins])) in ranges.iter().enumerate() {
        heads[o] = factor(*scales, zeros[0]);
        if has_min(layout.ty) {
            heads[width + o] = factor(*mins, zeros[1]) / heads[o];
        }
    }
    let end = heads.len() - 2;
    heads[end..].copy_from_slice(&zeros);
    heads
}

/// What a code counts such that the bytes reach from the least value to the greatest.
fn factor([least, greatest]: [f32; 2], zero: f32) -> f32 {
    let most = if greatest.abs() >= least.abs() { greatest } else { least };
    match most {
        m if m == 0.0 || !m.is_finite() => 1.0,
        m if zero == 0.0 => m / 255.0,
        m => m.abs() / 127.0,
    }
}

/// Buffers of packing.
#[derive(Default)]
pub struct PackScratch {
    /// `[4][SPAN]`: the codes of four outputs.
    q: Vec<u8>,
    scale: Vec<f32>,
    min: Vec<f32>,
    /// `[SPAN][TILE]`: the codes of a tile, column by column.
    turned: Vec<u8>,
}

/// Writes span `span` of strip `strip` of `matrix` to `bytes`, which were zero; `heads` are those of the strip.
///
/// # Panics
/// If the layout is not that of the matrix, or `bytes` or `heads` are shorter than they must be.
pub fn pack(
    layout: &ColumnLayout,
    matrix: &Matrix<'_>,
    (strip, span): (usize, usize),
    heads: &[f32],
    bytes: &mut [u8],
    s: &mut PackScratch,
) {
    let ty = layout.ty;
    assert!(matrix.ty() == ty && matrix.rows_len() == layout.outputs && matrix.cols() == layout.cols);
    let width = layout.width(strip);
    let cols = span * SPAN..((span + 1) * SPAN).min(layout.cols);
    let (n, groups) = (cols.len(), cols.len() / layout.group_len());
    let outputs = layout.outputs_of(strip);
    let (heads, zeros) = heads[..layout.heads(strip)].split_at(layout.heads(strip) - 2);
    s.q.resize(4 * SPAN, 0);
    s.scale.resize(groups.max(SPAN), 0.0);
    s.min.resize(groups.max(SPAN), 0.0);
    s.turned.resize(TILE * SPAN, 0);
    for tile in 0..width.div_ceil(TILE) {
        let first = tile * TILE;
        s.turned.fill(0);
        let outputs_here = first..(first + TILE).min(outputs.len());
        for four in outputs_here.clone().step_by(4) {
            s.q.fill(0);
            for (o, q) in (four..outputs_here.end).zip(s.q.chunks_exact_mut(SPAN)) {
                let row = &matrix.row(outputs.start + o)[ty.row_bytes(cols.start)..ty.row_bytes(cols.end)];
                let (scale, min) = (&mut s.scale[..groups], &mut s.min[..groups]);
                unpack_row(ty, row, &mut q[..n], scale, min);
                let factor = heads[o];
                let code = |v: f32, factor: f32, zero: f32| (v / factor + zero).round_ties_even() as u8;
                for (g, group) in bytes.chunks_exact_mut(layout.group_bytes(width)).take(groups).enumerate() {
                    group[o] = code(scale[g], factor, zeros[0]);
                    if has_min(ty) {
                        group[width + o] = code(min[g], factor * heads[width + o], zeros[1]);
                    }
                }
            }
            turn_four(&s.q, four - first, &mut s.turned);
        }
        pack_tile(layout, width, tile, &s.turned[..n * TILE], bytes);
    }
}

/// Writes the codes of four outputs, `[4][SPAN]`, to the tile's, `[SPAN][TILE]`, from output `at` on.
fn turn_four(rows: &[u8], at: usize, turned: &mut [u8]) {
    let (rows, _) = rows.as_chunks::<SPAN>();
    let [a, b, c, d] = rows else { unreachable!("four rows") };
    for (i, column) in turned.chunks_exact_mut(TILE).enumerate() {
        let four: &mut [u8; 4] = column[at..].first_chunk_mut().expect("outputs of a tile");
        *four = [a[i], b[i], c[i], d[i]];
    }
}

/// Writes the codes of a tile, `[cols][TILE]`, to the groups of a span.
fn pack_tile(layout: &ColumnLayout, width: usize, tile: usize, codes: &[u8], bytes: &mut [u8]) {
    let (group_bytes, column_bytes) = (layout.group_bytes(width), layout.column_bytes(width));
    let (low_bytes, here) = (layout.parts(width).0, (width - tile * TILE).min(TILE));
    let (kind, indices) = (layout.codes(), iq4_indices());
    // The codes of four outputs at a time: their bytes lie together in every place.
    let place = |four| ColumnLayout::place(kind, width, low_bytes, tile * TILE + 4 * four);
    let places: Vec<_> = (0..here / 4).map(place).collect();
    // A high part is packed with its column.
    let coarse = layout.coarse(width).filter(|_| layout.parts(width).1 == 0);
    let coarse_places: Vec<_> =
        (0..here / 4).map(|four| ColumnLayout::coarse_place(width, tile * TILE + 4 * four)).collect();
    for (c, column) in codes.chunks_exact(TILE).enumerate() {
        let (group, in_group) = (c / layout.group_len(), c % layout.group_len());
        let group = &mut bytes[group * group_bytes..][..group_bytes];
        if let Some(Coarse { at, stride, .. }) = coarse {
            let to = &mut group[at + in_group * stride..][..stride];
            for (four, &(byte, bit)) in column.as_chunks::<4>().0.iter().zip(&coarse_places) {
                add_four(to, byte, (u32::from_le_bytes(*four) >> COARSE_BITS & 0x0303_0303) << bit);
            }
        }
        let to = &mut group[layout.scale_bytes(width) + in_group * column_bytes..][..column_bytes];
        let mut add = |at: usize, v: u32| add_four(to, at, v);
        for (four, &[(low, shift), (high, bit)]) in column.as_chunks::<4>().0.iter().zip(&places) {
            let codes = u32::from_le_bytes(*four);
            match kind {
                Codes::Bytes => add(low, codes),
                Codes::Table => add(low, u32::from_le_bytes(four.map(|q| indices[usize::from(q)])) << shift),
                Codes::Nibbles { high: 0 } => add(low, codes << shift),
                Codes::Nibbles { .. } => {
                    add(low, (codes & 0x0f0f_0f0f) << shift);
                    add(high, (codes >> 4 & 0x0f0f_0f0f) << bit);
                }
            }
        }
    }
}

/// Adds the bits of `v` to four bytes that have none there.
fn add_four(bytes: &mut [u8], at: usize, v: u32) {
    let place: &mut [u8; 4] = bytes[at..].first_chunk_mut().expect("four bytes");
    *place = (u32::from_le_bytes(*place) | v).to_le_bytes();
}

/// From a code of the IQ4 types to its index in their table.
fn iq4_indices() -> [u8; 256] {
    let mut index = [0; 256];
    for (i, v) in super::IQ4_KVALUES.iter().enumerate() {
        index[usize::from(v.wrapping_add(-128) as u8)] = i as u8;
    }
    index
}

/// Heads and groups of a strip, for tests of this and other modules.
#[cfg(test)]
pub(crate) fn packed(layout: &ColumnLayout, matrix: &Matrix<'_>, strip: usize) -> (Vec<f32>, Vec<u8>) {
    let mut scratch = PackScratch::default();
    let outputs = layout.outputs_of(strip);
    let ranges: Vec<_> = outputs.map(|o| Ranges::of(layout, matrix.row(o), &mut scratch)).collect();
    let heads = heads_of(layout, strip, &ranges);
    let mut groups = vec![0; layout.spans() * layout.span_bytes(strip)];
    for (span, bytes) in groups.chunks_exact_mut(layout.span_bytes(strip)).enumerate() {
        pack(layout, matrix, (strip, span), &heads, bytes, &mut scratch);
    }
    (heads, groups)
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
            for (outputs, blocks) in [(1, 1), (100, 3), (256, 2), (300, 1), (500, 1), (8300, 1)] {
                let cols = blocks * ty.block_len();
                let bytes = bytes(ty, outputs, cols);
                let matrix = Matrix::new(ty, outputs, cols, &bytes).unwrap();
                for coarse in [false, true] {
                    let layout = ColumnLayout::new(ty, outputs, cols).unwrap().with_coarse(coarse);
                    assert_eq!(layout.is_coarse(), coarse && coarse_step(ty).is_some());
                    assert_eq!(layout.outputs_of(layout.strips() - 1).end, outputs);
                    for s in 0..layout.strips() {
                        let (heads, groups) = packed(&layout, &matrix, s);
                        check_strip(&layout.view(s, &heads, &groups), &matrix, layout.outputs_of(s));
                    }
                }
            }
        }
    }

    fn check_strip(strip: &ColumnStrip<'_>, matrix: &Matrix<'_>, outputs: Range<usize>) {
        let (ty, cols, groups) = (strip.ty, strip.cols, strip.cols / strip.group_len);
        let (mut q, mut scale, mut min) = (vec![0; cols], vec![0.0; groups], vec![0.0; groups]);
        for (o, row) in outputs.enumerate() {
            unpack_row(ty, matrix.row(row), &mut q, &mut scale, &mut min);
            for (c, q) in q.iter().enumerate() {
                assert_eq!(strip.code(c, o), *q, "{ty} {row} {c}");
                if let Some(Coarse { step, .. }) = strip.coarse {
                    assert_eq!(strip.coarse_code(c, o), *q / step, "{ty} {row} {c}");
                }
            }
            check_scales(strip, 0, o, &scale);
            if has_min(ty) {
                check_scales(strip, 1, o, &min);
            }
        }
    }

    fn check_scales(strip: &ColumnStrip<'_>, part: usize, o: usize, want: &[f32]) {
        let factor = strip.head(0, o) * if part == 1 { strip.head(1, o) } else { 1.0 };
        let zero = strip.zeros[part];
        let most = want.iter().fold(0f32, |m, &v| m.max(v.abs()));
        for (g, want) in want.iter().enumerate() {
            let got = factor * (f32::from(strip.scale(part, g, o)) - zero);
            let step = most / (255.0 - zero) * 0.51 + want.abs() * 1e-5;
            assert!((got - want).abs() <= step, "{:?} {o} {g}: {got} {want}", strip.ty);
        }
    }

    #[test]
    fn codes_have_places_of_their_own() {
        for ty in types() {
            for outputs in [100, 256, 300, 500, 1000] {
                let layout = ColumnLayout::new(ty, outputs, 256).unwrap();
                let (width, mut seen) = (layout.width(0), std::collections::HashSet::new());
                let (low_bytes, high_bytes) = layout.parts(width);
                for o in 0..width {
                    let [low, high] = ColumnLayout::place(layout.codes(), width, low_bytes, o);
                    assert!(low.0 < low_bytes && seen.insert(low), "{ty} {width} {o}");
                    if high_bytes > 0 {
                        assert!((low_bytes..low_bytes + high_bytes).contains(&high.0), "{ty} {width} {o}");
                        assert!(high.1 < 8 && seen.insert(high), "{ty} {width} {o}");
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
            let half = Touched { groups: layout.groups(), columns: cols / 2, coarse: 0 };
            assert!((layout.bytes_read(half) as f64) < 0.57 * rows as f64, "{ty}");
            assert!(layout.bytes_read(Touched::default()) < rows / 100);
            if let Some(step) = coarse_step(ty) {
                let all = Touched { groups: layout.groups(), columns: cols, coarse: cols };
                let share = if step == 4 { 0.5 } else { 1.0 / 3.0 };
                let scales = layout.bytes_read(Touched { columns: 0, coarse: 0, ..all });
                let (coarse, codes) = (layout.bytes_read(all) - scales, layout.bytes() - scales);
                assert!((coarse as f64 / codes as f64 - share).abs() < 1e-3, "{ty}: {coarse} of {codes}");
                assert_eq!(layout.coarse_saves(), 1.0 / share as f32 - 1.0);
            }
        }
    }
}
