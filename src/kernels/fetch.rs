//! Asking for memory before it is needed.

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
