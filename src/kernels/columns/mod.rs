//! Products with some of the columns: `out = W x` for a matrix in column form and a sparse `x`.
//!
//! A column is chosen if its quantised activation is not zero ([`ColumnList::choose`]), so the result is that of the
//! dense product with zeros in the places that were left out, and nothing else of the column form is touched.
//! The arithmetic is that of the other integer kernels: exact sums over a group, then one f32 step a group.

#[cfg(any(target_arch = "aarch64", target_arch = "x86_64"))]
pub(super) mod groups;

use std::ops::Range;

use super::activations::BLOCK;
use super::{Kernels, Q8Row};
use crate::quant::columns::{Codes, ColumnStrip, STRIP, TILE, Touched};
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
    /// Where its bundles end; they begin where those of the group before end.
    pub end: u32,
    /// Sum of its activations.
    pub sum: i32,
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
            bundles: Vec::with_capacity(cols / 4),
            ..Self::default()
        }
    }

    /// The columns of `x` that are not zero, for matrices with groups of `group_len` columns (16 or 32).
    pub fn choose(&mut self, x: Q8Row<'_>, group_len: usize) {
        assert!(x.cols.is_multiple_of(32) && matches!(group_len, 16 | 32));
        assert!(x.cols <= x.q.len() && x.cols / 32 <= x.scale.len() && u32::try_from(x.cols).is_ok());
        (self.cols, self.group_len, self.touched) = (x.cols, group_len, Touched::default());
        self.sum = 0.0;
        self.groups.clear();
        self.bundles.clear();
        for (g, q) in x.q[..x.cols].chunks_exact(group_len).enumerate() {
            let mask = nonzero(q);
            if mask != 0 {
                self.touched.add(mask);
                self.push(g, mask, q, x.scale[g * group_len / 32]);
            }
        }
    }

    fn push(&mut self, group: usize, mut mask: u32, q: &[i8], scale: f32) {
        let first = (group * self.group_len) as u32;
        let (from, columns) = (self.bundles.len(), mask.count_ones() as usize);
        self.bundles.resize(from + columns.div_ceil(BUNDLE), Bundle::default());
        // Column after column to its place: a bundle that is put together and then copied waits for its own parts.
        let bundles = &mut self.bundles[from..];
        let mut sum = 0;
        for i in 0..columns {
            let (bundle, at) = (&mut bundles[i / BUNDLE], mask.trailing_zeros());
            let act = q[at as usize];
            bundle.cols[i % BUNDLE] = first + at;
            bundle.acts[i % BUNDLE] = act;
            sum += i32::from(act);
            mask &= mask - 1;
        }
        if let (left @ 1.., Some(last)) = (columns % BUNDLE, bundles.last_mut()) {
            last.cols = std::array::from_fn(|i| last.cols[if i < left { i } else { 0 }]);
        }
        self.sum += scale * sum as f32;
        self.groups.push(ChosenGroup { group: group as u32, end: self.bundles.len() as u32, sum, scale });
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

/// What a product with the columns of `x` that are not zero would touch, as [`ColumnList::touched`] counts it.
pub fn touched(x: Q8Row<'_>, group_len: usize) -> Touched {
    let mut touched = Touched::default();
    for q in x.q[..x.cols].chunks_exact(group_len) {
        match nonzero(q) {
            0 => {}
            mask => touched.add(mask),
        }
    }
    touched
}

/// [`touched`] for values that are not quantised yet: those that would not become zero.
pub fn touched_values(values: &[f32], group_len: usize) -> Touched {
    let mut touched = Touched::default();
    for block in values.chunks(BLOCK) {
        let max = block.iter().fold(0f32, |max, v| max.max(v.abs()));
        for group in block.chunks(group_len) {
            // Half a step is rounded to zero: see `scalar::quantize`.
            let chosen = group.iter().enumerate().filter(|(_, v)| v.abs() * 254.0 > max && max > 1e-30);
            match chosen.fold(0u32, |mask, (i, _)| mask | 1 << i) {
                0 => {}
                mask => touched.add(mask),
            }
        }
    }
    touched
}

impl Touched {
    /// Counts the columns of one group.
    fn add(&mut self, mask: u32) {
        self.groups += 1;
        self.columns += mask.count_ones() as usize;
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
        let scales = width * if strip.has_min { 2 } else { 1 };
        assert_eq!(strip.group_bytes, scales + strip.group_len * strip.column_bytes);
        assert_eq!(strip.groups.len(), all * strip.group_bytes);
        // SAFETY: the handle proves the ISA; the parts of the strip have the lengths just asserted, and the list's
        // columns and groups are below the strip's.
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

/// Plain code for every CPU.
pub(super) fn scalar(strip: &ColumnStrip<'_>, chosen: Chosen<'_>, outputs: Range<usize>, out: &mut [f32]) {
    let zero = i32::from(zero_point(strip.ty));
    out.fill(0.0);
    let mut start = chosen.start;
    for g in chosen.groups {
        let (sum, group) = (g.scale * g.sum as f32, g.group as usize);
        for (o, out) in outputs.clone().zip(out.iter_mut()) {
            let mut dot = -zero * g.sum;
            for bundle in &chosen.bundles[start as usize..g.end as usize] {
                for (col, act) in bundle.cols.into_iter().zip(bundle.acts) {
                    dot += i32::from(act) * i32::from(strip.code(col as usize, o));
                }
            }
            *out += (f32::from(strip.scale(0, group, o)) - strip.zeros[0]) * (g.scale * dot as f32);
            if strip.has_min {
                *out += strip.head(1, o) * (sum * f32::from(strip.scale(1, group, o)));
            }
        }
        start = g.end;
    }
}
