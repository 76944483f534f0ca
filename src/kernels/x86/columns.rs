//! What products with chosen columns share: where the columns of a group are, and the fetching of the next group.

use std::arch::x86_64::*;

use crate::kernels::columns::{Bundle, ChosenGroup};
use crate::quant::columns::ColumnStrip;
use crate::quant::zero_point;

/// How a kernel reads codes; the values of `KIND`.
pub(in crate::kernels::x86) const NIBBLES: u8 = 0;
pub(in crate::kernels::x86) const NIBBLES_AND_HIGH: u8 = 1;
pub(in crate::kernels::x86) const TABLE: u8 = 2;
pub(in crate::kernels::x86) const BYTES: u8 = 3;

/// Most bundles of a group: 32 columns.
const BUNDLES: usize = 8;

/// A group, its chosen columns and where they are.
pub(in crate::kernels::x86) struct Group<'a> {
    pub strip: &'a ColumnStrip<'a>,
    /// Its scales, its mins and its columns.
    pub bytes: &'a [u8],
    pub bundles: &'a [Bundle],
    pub columns: [[*const u8; 4]; BUNDLES],
    /// Scale of the activations.
    pub scale: f32,
    /// Sum of the activations.
    pub sum: f32,
    /// What the dot products start from.
    pub start: i32,
    /// Lines to fetch of the next group in each step.
    pub ahead: usize,
}

impl<'a> Group<'a> {
    #[inline]
    pub fn new(strip: &'a ColumnStrip<'a>, g: &ChosenGroup, bundles: &'a [Bundle], ahead: usize) -> Self {
        let group = g.group as usize;
        let bytes = &strip.groups[group * strip.group_bytes..][..strip.group_bytes];
        let scale_bytes = strip.group_bytes - strip.group_len * strip.column_bytes;
        let mut columns = [[bytes.as_ptr(); 4]; BUNDLES];
        for (columns, bundle) in columns.iter_mut().zip(bundles) {
            for (column, &col) in columns.iter_mut().zip(&bundle.cols) {
                let in_group = col as usize - group * strip.group_len;
                *column = bytes.as_ptr().wrapping_add(scale_bytes + in_group * strip.column_bytes);
            }
        }
        let sum = g.scale * g.sum as f32;
        let start = -i32::from(zero_point(strip.ty)) * g.sum;
        Self { strip, bytes, bundles, columns, scale: g.scale, sum, start, ahead }
    }
}

/// A group that is being fetched: its scales, then one column after the other. Into L2: a core can have more lines on
/// their way to it than to L1.
pub(in crate::kernels::x86) struct Fetch<'a> {
    /// Where column 0 of the matrix would be if all were as far apart as in this group.
    origin: *const u8,
    column_bytes: usize,
    bundles: &'a [Bundle],
    /// The next column.
    column: usize,
    at: *const u8,
    /// Lines of what is being fetched that are left.
    left: usize,
}

impl<'a> Fetch<'a> {
    #[inline]
    pub fn new(strip: &ColumnStrip<'_>, g: &ChosenGroup, bundles: &'a [Bundle]) -> Self {
        let group = g.group as usize;
        let at = strip.groups[group * strip.group_bytes..].as_ptr();
        let scale_bytes = strip.group_bytes - strip.group_len * strip.column_bytes;
        let before = group * strip.group_len * strip.column_bytes;
        Self {
            origin: at.wrapping_add(scale_bytes).wrapping_sub(before),
            column_bytes: strip.column_bytes,
            bundles,
            column: 0,
            at,
            left: scale_bytes / 64,
        }
    }

    /// Lines that are left at first, or some more.
    #[inline]
    pub fn all(&self) -> usize {
        if self.bundles.is_empty() { 0 } else { self.left + 4 * self.bundles.len() * self.column_bytes / 64 }
    }

    /// Asks for up to `n` more cache lines.
    #[inline]
    #[target_feature(enable = "sse")]
    pub fn lines(&mut self, n: usize) {
        for _ in 0..n {
            if self.left == 0 && !self.next_column() {
                return;
            }
            _mm_prefetch::<_MM_HINT_T1>(self.at.cast());
            self.at = self.at.wrapping_add(64);
            self.left -= 1;
        }
    }

    #[inline]
    fn next_column(&mut self) -> bool {
        while let Some(bundle) = self.bundles.get(self.column / 4) {
            let (i, cols) = (self.column % 4, bundle.cols);
            self.column += 1;
            // A bundle that is not full repeats its first column.
            if i == 0 || cols[i] != cols[0] {
                self.at = self.origin.wrapping_add(cols[i] as usize * self.column_bytes);
                self.left = self.column_bytes / 64;
                return true;
            }
        }
        false
    }
}
