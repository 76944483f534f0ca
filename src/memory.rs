//! Zeroed buffers in huge pages: what is large and lives long (key/value cache, activations, weights that are read
//! instead of mapped).
//!
//! A page of 4 KiB costs a look-up in the page tables for every 16 to 64 positions of a head's keys; a huge page holds
//! thousands. A mapped file gets large pages from the page cache by itself, anonymous memory has to ask
//! (`madvise(MADV_HUGEPAGE)`).

use std::io;
use std::ops::{Deref, DerefMut};

use bytemuck::Pod;
use memmap2::MmapMut;

/// Bytes of a huge page of x86-64, and of aarch64 with pages of 4 KiB.
pub const HUGE_PAGE: usize = 2 << 20;
/// What is smaller fills no huge page and comes from the allocator.
const SMALL: usize = HUGE_PAGE;

/// A buffer of a fixed length, zeroed when made. Memory is taken from the system as it is touched, in huge pages
/// where the system grants them.
pub struct Pages<T> {
    store: Store<T>,
}

enum Store<T> {
    Small(Vec<T>),
    /// `len` elements from byte `start` of the map on: the first multiple of [`HUGE_PAGE`] in memory.
    Large {
        map: MmapMut,
        start: usize,
        len: usize,
    },
}

/// The memory that the system did not give.
#[derive(Debug, thiserror::Error)]
#[error("{bytes} bytes of memory cannot be had: {error}")]
#[allow(missing_docs)]
pub struct MemoryError {
    pub bytes: usize,
    pub error: io::Error,
}

impl<T: Pod> Pages<T> {
    /// `len` zeros.
    ///
    /// # Panics
    /// Where the system has no such address range, as `vec![0; len]` does.
    pub fn zeroed(len: usize) -> Self {
        Self::try_zeroed(len).unwrap_or_else(|error| panic!("{error}"))
    }

    /// `len` zeros, or why not.
    pub fn try_zeroed(len: usize) -> Result<Self, MemoryError> {
        let bytes = len.saturating_mul(size_of::<T>());
        if bytes < SMALL {
            return Ok(Self { store: Store::Small(vec![T::zeroed(); len]) });
        }
        // A huge page can only lie at a multiple of its size; the kernel's map may start anywhere.
        let map = MmapMut::map_anon(bytes.saturating_add(HUGE_PAGE));
        let map = map.map_err(|error| MemoryError { bytes, error })?;
        let start = map.as_ptr().addr().next_multiple_of(HUGE_PAGE) - map.as_ptr().addr();
        // Advice: a system that grants no huge pages gives small ones (`skiff info` tells).
        #[cfg(target_os = "linux")]
        let _ = map.advise_range(memmap2::Advice::HugePage, start, bytes);
        Ok(Self { store: Store::Large { map, start, len } })
    }

    /// At least `len` elements: where there are fewer, a new buffer of zeros takes the place of this one.
    pub fn reserve(&mut self, len: usize) {
        if self.len() < len {
            *self = Self::zeroed(len);
        }
    }

    /// Keeps the buffer in memory (`mlock`), which also takes all of it from the system now.
    #[cfg(unix)]
    pub fn lock(&mut self) -> io::Result<()> {
        if let Store::Small(small) = &self.store {
            // Its pages hold other small buffers too; those of a map of its own do not.
            let bytes = bytemuck::cast_slice(small);
            let mut map = MmapMut::map_anon(bytes.len().max(1))?;
            map[..bytes.len()].copy_from_slice(bytes);
            self.store = Store::Large { map, start: 0, len: small.len() };
        }
        match &self.store {
            Store::Large { map, .. } => map.lock(),
            Store::Small(_) => Ok(()),
        }
    }

    /// Keeps the buffer in memory, where the system can do that.
    #[cfg(not(unix))]
    pub fn lock(&mut self) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

impl<T> Default for Pages<T> {
    fn default() -> Self {
        Self { store: Store::Small(Vec::new()) }
    }
}

impl<T: Pod> Deref for Pages<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match &self.store {
            Store::Small(small) => small,
            Store::Large { map, start, len } => {
                bytemuck::cast_slice(&map[*start..*start + len * size_of::<T>()])
            }
        }
    }
}

impl<T: Pod> DerefMut for Pages<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        match &mut self.store {
            Store::Small(small) => small,
            Store::Large { map, start, len } => {
                bytemuck::cast_slice_mut(&mut map[*start..*start + *len * size_of::<T>()])
            }
        }
    }
}

/// Drops a file that has been written and synced from the page cache. There it lies in small pages, and would stay so;
/// brought in anew by `weights`, it comes in huge ones.
pub fn leave_page_cache(file: &std::fs::File) {
    #[cfg(target_os = "linux")]
    let _ = rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed);
    #[cfg(not(target_os = "linux"))]
    let _ = file;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_of_all_sizes_are_zeroed_and_writable() {
        let huge = HUGE_PAGE / 4;
        for len in [0, 1, 1000, huge - 1, huge, huge + 1, 3 * huge + 7] {
            let mut pages = Pages::<f32>::zeroed(len);
            assert_eq!(pages.len(), len);
            assert!(pages.iter().all(|&x| x == 0.0), "{len}");
            pages.iter_mut().enumerate().for_each(|(i, x)| *x = i as f32);
            assert!(pages.iter().enumerate().all(|(i, &x)| x == i as f32), "{len}");
            if len >= huge {
                assert!(pages.as_ptr().addr().is_multiple_of(HUGE_PAGE), "{len}");
            }
        }
    }

    #[test]
    fn reserving_replaces_only_what_is_too_small() {
        let mut pages = Pages::<u16>::zeroed(4);
        pages[3] = 7;
        pages.reserve(3);
        assert_eq!(pages[..], [0, 0, 0, 7]);
        pages.reserve(5);
        assert_eq!(pages[..], [0; 5]);
    }

    #[test]
    fn what_cannot_be_had_is_an_error() {
        let error = Pages::<u8>::try_zeroed(usize::MAX / 2).err().expect("no machine has that");
        assert_eq!(error.bytes, usize::MAX / 2);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_locked_buffer_keeps_its_contents_and_counts_as_locked() {
        let mut pages = Pages::<u8>::zeroed(100_000);
        pages[99_999] = 5;
        if let Err(error) = pages.lock() {
            println!("SKIPPED: a test that needs 100 kB of RLIMIT_MEMLOCK: {error}");
            return;
        }
        assert_eq!((pages.len(), pages[0], pages[99_999]), (100_000, 0, 5));
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let locked = status.lines().find_map(|line| line.strip_prefix("VmLck:")).unwrap();
        let locked: usize = locked.trim().trim_end_matches(" kB").parse().unwrap();
        assert!(locked >= 97, "{locked} kB");
    }

    /// The advice was given: the kernel marks the map (`hg`), whether it has huge pages to spare or not.
    #[test]
    #[cfg(target_os = "linux")]
    fn large_buffers_ask_for_huge_pages() {
        let pages = Pages::<u8>::zeroed(2 * HUGE_PAGE);
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let offered = std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists();
        if !smaps.contains("VmFlags") || !offered {
            println!("SKIPPED: a test that needs a kernel with huge pages");
            return;
        }
        let inside = |line: &str| {
            let (from, to) = line.split_once(' ')?.0.split_once('-')?;
            let parse = |hex| usize::from_str_radix(hex, 16).ok();
            Some((parse(from)?..parse(to)?).contains(&pages.as_ptr().addr()))
        };
        let flags = smaps.lines().skip_while(|line| inside(line) != Some(true));
        let flags = flags.skip(1).find(|line| line.starts_with("VmFlags")).unwrap();
        assert!(flags.split_whitespace().any(|flag| flag == "hg"), "{flags}");
    }
}
