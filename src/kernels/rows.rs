//! Which rows of a matrix a product goes over, and in what order: those of a chunk one after the other, or those of a list.
//!
//! Kernels are compiled for either, so that the first pays nothing for the second.

#![cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // kernels of ARM ask for rows alone

/// Rows of weights, counted in the order in which they are multiplied.
pub(super) trait WeightRows<'w>: Copy {
    /// Whether they lie one behind the other, as a CPU foresees it.
    const GAPLESS: bool;

    /// Bytes of a row.
    fn row_bytes(&self) -> usize;

    /// Row `i`.
    fn row(&self, i: usize) -> &'w [u8];

    /// The byte that comes `bytes` after the beginning of row `i`, if all rows lay behind one another: for prefetches alone,
    /// since it may be past the last row.
    fn behind(&self, i: usize, bytes: usize) -> *const u8;
}

/// All rows of a chunk.
#[derive(Clone, Copy)]
pub(super) struct Consecutive<'w> {
    /// Whole rows.
    pub weights: &'w [u8],
    pub row_bytes: usize,
}

impl Consecutive<'_> {
    /// How many.
    pub fn len(&self) -> usize {
        self.weights.len() / self.row_bytes
    }
}

impl<'w> WeightRows<'w> for Consecutive<'w> {
    const GAPLESS: bool = true;

    #[inline(always)]
    fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    #[inline(always)]
    fn row(&self, i: usize) -> &'w [u8] {
        &self.weights[i * self.row_bytes..][..self.row_bytes]
    }

    #[inline(always)]
    fn behind(&self, i: usize, bytes: usize) -> *const u8 {
        self.weights.as_ptr().wrapping_add(i * self.row_bytes + bytes)
    }
}

/// Some rows of a matrix, by number.
#[derive(Clone, Copy)]
pub(super) struct Listed<'w> {
    /// All rows.
    pub weights: &'w [u8],
    pub row_bytes: usize,
    /// Those wanted.
    pub list: &'w [u32],
}

impl<'w> WeightRows<'w> for Listed<'w> {
    const GAPLESS: bool = false;

    #[inline(always)]
    fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    #[inline(always)]
    fn row(&self, i: usize) -> &'w [u8] {
        &self.weights[self.list[i] as usize * self.row_bytes..][..self.row_bytes]
    }

    #[inline(always)]
    fn behind(&self, i: usize, bytes: usize) -> *const u8 {
        // 32 bits divide faster. What a wrong number costs is a prefetch.
        let (more, at) = (bytes as u32 / self.row_bytes as u32, bytes as u32 % self.row_bytes as u32);
        let row = self.list.get(i + more as usize).or(self.list.last()).map_or(0, |&row| row as usize);
        self.weights.as_ptr().wrapping_add(row * self.row_bytes + at as usize)
    }
}
