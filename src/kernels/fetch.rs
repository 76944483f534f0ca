//! Asking for memory before it is needed.

use std::ops::Range;

use crate::gguf::GgmlType;

/// Where the columns of a panel lie in each row of weights, and those of the next panel of these rows.
pub(super) struct PanelBytes {
    /// Those of the panel's own.
    pub now: Range<usize>,
    next: Range<usize>,
}

impl PanelBytes {
    /// Those of columns `cols` of rows of `row_bytes`.
    pub fn new(ty: GgmlType, cols: &Range<usize>, row_bytes: usize) -> Self {
        let (now, n) = (ty.row_bytes(cols.start)..ty.row_bytes(cols.end), ty.row_bytes(cols.len()));
        let next = now.end..row_bytes.min(now.end + n);
        Self { now, next }
    }

    /// Asks for the first columns of all `rows`, which no panel before could.
    pub fn fetch_first<'a>(&self, rows: impl Iterator<Item = &'a [u8]>) {
        if self.now.start == 0 {
            rows.for_each(|row| fetch(&row[self.now.clone()]));
        }
    }

    /// Asks for the next columns of a row.
    pub fn fetch_next(&self, row: &[u8]) {
        fetch(&row[self.next.clone()]);
    }
}

/// Asks for `bytes`, into L2: what is computed while they come fills L1.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(super) fn fetch(bytes: &[u8]) {
    use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
    for line in bytes.chunks(64) {
        #[allow(unused_unsafe)] // an unsafe function for older compilers
        // SAFETY: a prefetch never faults.
        unsafe {
            _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().cast())
        };
    }
}

#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
pub(super) fn fetch(_: &[u8]) {}
