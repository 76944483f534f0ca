//! Products with some of the columns: `out = W x` for a matrix in column form and a sparse `x`.
//!
//! A column is chosen if its quantised activation is not zero ([`ColumnList::choose`]), so the result is that of the
//! dense product with zeros in the places that were left out, and nothing else of the column form is touched. Of those that
//! are chosen coarsely only the two upper bits of each code are read ([`coarsen`](crate::quant::coarsen)).
//! The arithmetic is that of the other integer kernels: exact sums over a group, then one f32 step a group.

#[cfg(any(target_arch = "aarch64", target_arch = "x86_64"))]
pub(super) mod groups;

use std::ops::Range;

use super::activations::BLOCK;
use super::{Kernels, Q8Row};
use crate::quant::columns::{Coarse, Codes, ColumnStrip, STRIP, TILE, Touched};
use crate::quant::zero_point;

/// Columns whose bytes are interleaved: those of a lane of the byte dot product.
const BUNDLE: usize = 4;

/// The chosen columns of a row of activations, in bundles of four from the same group.
///
/// Every column in it is below `cols`: kernels rely on it.
#[derive(Default)]
pub struct ColumnList {
    cols: usize,
    group_len: usize,
    pub(super) groups: Vec<ChosenGroup>,
    pub(super) bundles: Vec<Bundle>,
    touched: Touched,
    /// Sum of the activations.
    sum: f32,
}

/// Four columns and their activations; a bundle that is not full repeats its first column with an activation of 0.
#[derive(Clone, Copy, Default)]
pub(super) struct Bundle {
    pub cols: [u32; BUNDLE],
    pub acts: [i8; BUNDLE],
}

impl Bundle {
    /// Its activations in a lane of the byte dot product, the first column's in the lowest byte.
    #[inline(always)]
    pub fn lane(&self) -> i32 {
        i32::from_le_bytes(bytemuck::cast(self.acts))
    }
}

/// A group with a chosen column.
#[derive(Clone, Copy)]
pub(super) struct ChosenGroup {
    /// Which group.
    pub group: u32,
    /// Where its bundles of coarse columns begin; the others begin where those of the group before end.
    pub coarse: u32,
    /// Where its bundles end.
    pub end: u32,
    /// Sum of its activations, and of those of coarse columns.
    pub sum: i32,
    pub coarse_sum: i32,
    /// Scale of its activations.
    pub scale: f32,
}

/// Groups of a list and their bundles.
#[derive(Clone, Copy)]
pub(super) struct Chosen<'a> {
    pub groups: &'a [ChosenGroup],
    /// Bundles, those of other groups too.
    pub bundles: &'a [Bundle],
    /// Where the bundles of `groups` begin.
    pub start: u32,
}

impl ColumnList {
    /// Room for all of `cols` columns.
    pub fn with_capacity(cols: usize) -> Self {
        Self {
            groups: Vec::with_capacity(cols / 16),
            // With coarse ones a group may have two bundles that are not full.
            bundles: Vec::with_capacity(cols / 4 + cols / 16),
            ..Self::default()
        }
    }

    /// The columns of `x` that are not zero, for matrices with groups of `group_len` columns (16 or 32). Of every 32, those
    /// whose bits `coarse` gives are to be read coarsely, which the matrices must allow.
    pub fn choose(&mut self, x: Q8Row<'_>, group_len: usize, coarse: impl Fn(usize) -> u32) {
        assert!(x.cols.is_multiple_of(32) && matches!(group_len, 16 | 32));
        assert!(x.cols <= x.q.len() && x.cols / 32 <= x.scale.len() && u32::try_from(x.cols).is_ok());
        (self.cols, self.group_len, self.touched) = (x.cols, group_len, Touched::default());
        self.sum = 0.0;
        self.groups.clear();
        self.bundles.clear();
        for (g, q) in x.q[..x.cols].chunks_exact(group_len).enumerate() {
            let mask = nonzero(q);
            if mask != 0 {
                let first = g * group_len;
                let coarse = mask & coarse(first / 32) >> (first % 32);
                self.touched.add(mask, coarse);
                let sum = self.push(first, mask & !coarse, q);
                let at = self.bundles.len() as u32;
                let coarse_sum = self.push(first, coarse, q);
                let (scale, sum, end) = (x.scale[first / 32], sum + coarse_sum, self.bundles.len() as u32);
                self.sum += scale * sum as f32;
                self.groups.push(ChosenGroup { group: g as u32, coarse: at, end, sum, coarse_sum, scale });
            }
        }
    }

    /// Bundles of the columns of `mask` of the group that begins with column `first`; the sum of their activations.
    fn push(&mut self, first: usize, mut mask: u32, q: &[i8]) -> i32 {
        let (from, columns) = (self.bundles.len(), mask.count_ones() as usize);
        self.bundles.resize(from + columns.div_ceil(BUNDLE), Bundle::default());
        // Column after column to its place: a bundle that is put together and then copied waits for its own parts.
        let bundles = &mut self.bundles[from..];
        let mut sum = 0;
        for i in 0..columns {
            let (bundle, at) = (&mut bundles[i / BUNDLE], mask.trailing_zeros());
            let act = q[at as usize];
            bundle.cols[i % BUNDLE] = first as u32 + at;
            bundle.acts[i % BUNDLE] = act;
            sum += i32::from(act);
            mask &= mask - 1;
        }
        if let (left @ 1.., Some(last)) = (columns % BUNDLE, bundles.last_mut()) {
            last.cols = std::array::from_fn(|i| last.cols[if i < left { i } else { 0 }]);
        }
        sum
    }

    /// What a product with these columns touches.
    pub fn touched(&self) -> Touched {
        self.touched
    }

    /// The chosen ones among the groups `groups`.
    fn within(&self, groups: Range<usize>) -> Chosen<'_> {
        let at = |g: usize| self.groups.partition_point(|c| (c.group as usize) < g);
        let (from, to) = (at(groups.start), at(groups.end));
        let start = if from == 0 { 0 } else { self.groups[from - 1].end };
        Chosen { groups: &self.groups[from..to], bundles: &self.bundles, start }
    }
}

/// What a product with the columns of `x` that are not zero would touch, and coarsely with those of `coarse`, as
/// [`ColumnList::touched`] counts it.
pub fn touched(x: Q8Row<'_>, coarse: Option<Q8Row<'_>>, group_len: usize) -> Touched {
    let coarse = coarse.into_iter().flat_map(|x| masks(x, group_len));
    Touched::default().and_groups(masks(x, group_len), coarse)
}

/// Of each group the bits of the columns that are not zero.
fn masks(x: Q8Row<'_>, group_len: usize) -> impl Iterator<Item = u32> {
    x.q[..x.cols].chunks_exact(group_len).map(nonzero)
}

/// [`touched`] for values that are not quantised yet: those that would not become zero.
pub fn touched_values(x: &[f32], coarse: Option<&[f32]>, group_len: usize) -> Touched {
    let coarse = coarse.into_iter().flat_map(|x| masks_of_values(x, group_len));
    Touched::default().and_groups(masks_of_values(x, group_len), coarse)
}

fn masks_of_values(values: &[f32], group_len: usize) -> impl Iterator<Item = u32> {
    values.chunks(BLOCK).flat_map(move |block| {
        let max = block.iter().fold(0f32, |max, v| max.max(v.abs()));
        block.chunks(group_len).map(move |group| {
            // Half a step is rounded to zero: see `scalar::quantize`.
            let chosen = group.iter().enumerate().filter(|(_, v)| v.abs() * 254.0 > max && max > 1e-30);
            chosen.fold(0u32, |mask, (i, _)| mask | 1 << i)
        })
    })
}

impl Touched {
    /// Counts the columns of one group, and those of them that are read coarsely.
    fn add(&mut self, mask: u32, coarse: u32) {
        self.groups += 1;
        self.columns += mask.count_ones() as usize;
        self.coarse += coarse.count_ones() as usize;
    }

    /// With the columns of groups, of which the coarse ones are told apart, if there are any.
    fn and_groups(mut self, fine: impl Iterator<Item = u32>, coarse: impl Iterator<Item = u32>) -> Self {
        for (fine, coarse) in fine.zip(coarse.chain(std::iter::repeat(0))) {
            if fine | coarse != 0 {
                self.add(fine | coarse, coarse);
            }
        }
        self
    }
}

/// A bit for each value that is not zero.
fn nonzero(q: &[i8]) -> u32 {
    let (eights, _) = q.as_chunks::<8>();
    eights.iter().enumerate().fold(0, |mask, (i, q)| {
        let x = u64::from_le_bytes(bytemuck::cast(*q));
        // The top bit of each byte that is not zero, then those bits side by side.
        let top = (((x & 0x7f7f_7f7f_7f7f_7f7f) + 0x7f7f_7f7f_7f7f_7f7f) | x) & 0x8080_8080_8080_8080;
        let bits = (top >> 7).wrapping_mul(0x0102_0408_1020_4080) >> 56;
        mask | (bits as u32) << (8 * i)
    })
}

impl Kernels {
    /// `out[i] = sum over the chosen columns j of groups of W[o][j] x[j]` for the outputs `o = outputs.start + i` of a
    /// strip, but for the factors and zeros that [`finish`] brings in.
    ///
    /// # Panics
    /// If the lengths are wrong, the outputs are not whole tiles (the strip's last one may be a half), or the list was
    /// chosen for another number of columns or another group length.
    pub fn columns(
        &self,
        strip: ColumnStrip<'_>,
        list: &ColumnList,
        groups: Range<usize>,
        outputs: Range<usize>,
        out: &mut [f32],
    ) {
        let (width, all) = (strip.width, strip.cols / strip.group_len);
        assert!(list.cols == strip.cols && list.group_len == strip.group_len && groups.end <= all);
        assert!(width.is_multiple_of(TILE / 2) && width <= STRIP && out.len() == outputs.len());
        let whole = |at: usize| at.is_multiple_of(TILE) || at == width;
        assert!(
            outputs.start <= outputs.end
                && outputs.end <= width
                && whole(outputs.start)
                && whole(outputs.end)
        );
        assert_eq!(strip.heads.len(), width * if strip.has_min { 2 } else { 1 });
        let (low, high) = match strip.codes {
            Codes::Bytes => (width, 0),
            Codes::Table => (width / 2, 0),
            Codes::Nibbles { high } => (width / 2, width * high / 8),
        };
        assert!(strip.low_bytes == low && strip.column_bytes == (low + high).next_multiple_of(64));
        let columns = strip.scale_bytes() + strip.group_len * strip.column_bytes;
        let coarse_bytes = (width / 4).next_multiple_of(64);
        let (coarse, end) = match (strip.coarse, strip.codes) {
            (None, _) => (None, columns),
            (Some(Coarse { step, .. }), Codes::Nibbles { high: 0 }) => {
                let end = columns + strip.group_len * coarse_bytes;
                (Some(Coarse { at: columns, stride: coarse_bytes, step }), end)
            }
            (Some(Coarse { step, .. }), _) => {
                assert_eq!(strip.codes, Codes::Nibbles { high: 2 });
                let at = strip.scale_bytes() + strip.low_bytes;
                (Some(Coarse { at, stride: strip.column_bytes, step }), columns)
            }
        };
        assert!(strip.coarse == coarse && strip.group_bytes == end);
        assert!(coarse.is_some() || list.touched.coarse == 0, "columns that cannot be read coarsely");
        assert_eq!(strip.groups.len(), all * strip.group_bytes);
        // SAFETY: the handle proves the ISA; the parts of the strip have the lengths just asserted, the list's columns and groups
        // are below the strip's, and coarse ones are only in it if the strip has such.
        unsafe { (self.isa.functions.columns)(&strip, list.within(groups), outputs, out) };
    }
}

/// From what [`Kernels::columns`] summed up over all groups to the sums of weights, for the outputs from `first` on.
///
/// # Panics
/// If there are more sums than outputs from `first` on.
pub fn finish(strip: ColumnStrip<'_>, list: &ColumnList, first: usize, sums: &mut [f32]) {
    let (factors, ratios) = strip.heads.split_at(strip.width);
    let n = sums.len();
    if strip.has_min {
        let zeros = strip.zeros[1] * list.sum;
        sums.iter_mut().zip(&ratios[first..][..n]).for_each(|(sum, ratio)| *sum -= ratio * zeros);
    }
    sums.iter_mut().zip(&factors[first..][..n]).for_each(|(sum, factor)| *sum *= factor);
}

/// What the dot products of a group start from: the zero point of all columns, and, of the coarse ones, how far the middle
/// of the codes that share their upper bits is above the least of them.
#[inline]
fn start_of(strip: &ColumnStrip<'_>, g: &ChosenGroup) -> i32 {
    let above = strip.coarse.map_or(0, |coarse| i32::from(coarse.step) - 1);
    -i32::from(zero_point(strip.ty)) * g.sum + ((above * g.coarse_sum) >> 1)
}

/// Plain code for every CPU.
pub(super) fn scalar(strip: &ColumnStrip<'_>, chosen: Chosen<'_>, outputs: Range<usize>, out: &mut [f32]) {
    out.fill(0.0);
    let mut start = chosen.start;
    for g in chosen.groups {
        let (sum, group) = (g.scale * g.sum as f32, g.group as usize);
        for (o, out) in outputs.clone().zip(out.iter_mut()) {
            let mut dot = start_of(strip, g);
            let mut add = |bundles: std::ops::Range<u32>, code: &dyn Fn(usize) -> i32| {
                for bundle in &chosen.bundles[bundles.start as usize..bundles.end as usize] {
                    for (col, act) in bundle.cols.into_iter().zip(bundle.acts) {
                        dot += i32::from(act) * code(col as usize);
                    }
                }
            };
            add(start..g.coarse, &|col| i32::from(strip.code(col, o)));
            let step = strip.coarse.map_or(0, |coarse| i32::from(coarse.step));
            add(g.coarse..g.end, &|col| step * i32::from(strip.coarse_code(col, o)));
            *out += (f32::from(strip.scale(0, group, o)) - strip.zeros[0]) * (g.scale * dot as f32);
            if strip.has_min {
                *out += strip.head(1, o) * (sum * f32::from(strip.scale(1, group, o)));
            }
        }
        start = g.end;
    }
}
