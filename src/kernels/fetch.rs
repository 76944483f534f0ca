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

/// Bytes of a cache line.
pub(super) const LINE: usize = 64;

/// Asks for `bytes`.
#[inline(always)]
pub(super) fn fetch(bytes: &[u8]) {
    for line in (0..bytes.len()).step_by(LINE) {
        fetch_line(bytes.as_ptr().wrapping_add(line));
    }
}

/// Asks for the line of the byte at `at`, wherever that is. Into L2: what is computed while it comes fills L1, and a
/// core can have more lines on their way to L2.
#[inline(always)]
pub(super) fn fetch_line(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    #[allow(unused_unsafe)] // an unsafe function for older compilers
    // SAFETY: a prefetch never faults.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(at.cast());
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a prefetch never faults and changes nothing that the program sees.
    unsafe {
        std::arch::asm!("prfm pldl2keep, [{at}]", at = in(reg) at, options(readonly, nostack, preserves_flags));
    }
    #[cfg(not(any(target_arch = "aarch64", target_arch = "x86_64")))]
    let _ = at;
}
