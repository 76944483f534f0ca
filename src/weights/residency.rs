//! Bringing bytes of files into memory: which are not there yet, and reading those with several threads.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use super::{Bytes, Progress};
use crate::memory::HUGE_PAGE;

/// Bytes that a thread reads at a time: long enough for any disk, short enough for progress and for sharing.
const PART: usize = 4 * HUGE_PAGE;
/// Disks and network file systems want several requests at once, whatever the number of cores.
const READERS: usize = 8;

/// How much has come.
pub(super) struct Done<'a> {
    done: AtomicU64,
    total: u64,
    progress: Progress<'a>,
}

impl<'a> Done<'a> {
    pub fn new(total: u64, progress: Progress<'a>) -> Self {
        Self { done: AtomicU64::new(0), total, progress }
    }

    fn add(&self, bytes: usize) {
        let bytes = bytes as u64;
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        (self.progress)(done, self.total);
    }
}

/// The parts of a file that are to be read: all of them, or those with a page that is not in memory.
pub(super) fn parts(bytes: &Bytes, all: bool) -> Vec<Range<usize>> {
    let parts = (0..bytes.len()).step_by(PART).map(|from| from..(from + PART).min(bytes.len()));
    let cold = |part: &Range<usize>| match bytes {
        Bytes::Mapped(map) => !resident(&map[part.clone()]),
        Bytes::Owned(_) => false,
    };
    parts.filter(|part| all || cold(part)).collect()
}

/// Whether every page of `bytes` (from the start of a page on) is in the page cache. Yes where the system does not
/// tell: pages then come as they are touched.
#[cfg(target_os = "linux")]
fn resident(bytes: &[u8]) -> bool {
    // SAFETY: no argument but a constant; it reads no memory.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    let Ok(page) = usize::try_from(page) else { return true };
    if page == 0 || !bytes.as_ptr().addr().is_multiple_of(page) {
        return true;
    }
    let mut state = vec![0u8; bytes.len().div_ceil(page)];
    // SAFETY: the range starts at a page and lies in a live map (it is a slice of one); `state` has a byte for each of
    // its pages, which is all that the kernel writes.
    let failed =
        unsafe { libc::mincore(bytes.as_ptr().cast_mut().cast(), bytes.len(), state.as_mut_ptr()) } != 0;
    failed || state.iter().all(|state| state & 1 == 1)
}

#[cfg(not(target_os = "linux"))]
fn resident(_: &[u8]) -> bool {
    true
}

/// Reads `parts` of the file into the same places of `to`. Threads touch the parts that they read first, which on a
/// machine with several memory nodes spreads what is not placed otherwise.
pub(super) fn read(file: &File, parts: &[Range<usize>], to: &mut [u8], done: &Done<'_>) -> io::Result<()> {
    let mut rest = to;
    let mut at = 0;
    let mut targets = Vec::with_capacity(parts.len());
    for part in parts {
        let (target, later) = std::mem::take(&mut rest).split_at_mut(part.end - at);
        targets.push(std::sync::Mutex::new(&mut target[part.start - at..]));
        (rest, at) = (later, part.end);
    }
    share(parts.len(), |i, _| {
        // Each part is claimed once, so nobody waits and nobody has panicked with it.
        let mut target = targets[i].lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        read_at(file, &mut target, parts[i].start)?;
        done.add(parts[i].len());
        Ok(())
    })
}

/// Brings `parts` of the file into the page cache.
pub(super) fn touch(bytes: &Bytes, file: &File, parts: &[Range<usize>], done: &Done<'_>) -> io::Result<()> {
    share(parts.len(), |i, buffer| {
        for from in parts[i].clone().step_by(HUGE_PAGE) {
            let n = HUGE_PAGE.min(parts[i].end - from);
            if !populate(bytes, from, n) {
                // Reading tells what is wrong, where the map would end the process.
                buffer.resize(n, 0);
                read_at(file, buffer, from)?;
            }
            done.add(n);
        }
        Ok(())
    })
}

/// Asks the system to bring in a part of a map, in huge pages where [`map`](super::map) asked for them: it allocates
/// them for faults, not for reads.
#[cfg(target_os = "linux")]
fn populate(bytes: &Bytes, from: usize, n: usize) -> bool {
    match bytes {
        Bytes::Mapped(map) => map.advise_range(memmap2::Advice::PopulateRead, from, n).is_ok(),
        Bytes::Owned(_) => true,
    }
}

#[cfg(not(target_os = "linux"))]
fn populate(_: &Bytes, _: usize, _: usize) -> bool {
    false
}

/// Runs `job(i, buffer)` for `0..n`, by several threads; the first error ends it.
fn share(n: usize, job: impl Fn(usize, &mut Vec<u8>) -> io::Result<()> + Sync) -> io::Result<()> {
    let next = AtomicUsize::new(0);
    let work = || {
        let mut buffer = Vec::new();
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= n {
                return Ok(());
            }
            job(i, &mut buffer).inspect_err(|_| next.store(n, Ordering::Relaxed))?;
        }
    };
    if n <= 1 {
        return work();
    }
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..READERS.min(n)).map(|_| scope.spawn(work)).collect();
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().unwrap_or_else(|p| std::panic::resume_unwind(p)))
    })
}

#[cfg(unix)]
fn read_at(file: &File, to: &mut [u8], at: usize) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, to, at as u64).map_err(shorter)
}

#[cfg(not(unix))]
fn read_at(file: &File, to: &mut [u8], at: usize) -> io::Result<()> {
    use std::io::{Read, Seek, SeekFrom};
    let mut file = file.try_clone()?;
    file.seek(SeekFrom::Start(at as u64))?;
    file.read_exact(to).map_err(shorter)
}

fn shorter(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => {
            io::Error::new(error.kind(), "the file became shorter while it was read")
        }
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn pattern(n: usize) -> Vec<u8> {
        (0..n).map(|i| (i / 7 + i) as u8).collect()
    }

    fn file_of(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    #[test]
    fn parts_come_to_their_places_and_are_counted() {
        let bytes = pattern(3 * PART + 12_345);
        let file = file_of(&bytes);
        let map = file_map(&file);
        let last = AtomicU64::new(0);
        let progress = |done: u64, total: u64| {
            assert!(done <= total && total == bytes.len() as u64);
            last.fetch_max(done, Ordering::Relaxed);
        };
        let parts = parts(&map, true);
        assert_eq!(parts.len(), 4);
        let done = Done::new(bytes.len() as u64, &progress);
        let mut copy = vec![0; bytes.len()];
        read(&file, &parts, &mut copy, &done).unwrap();
        assert!(copy == bytes);
        assert_eq!(last.swap(0, Ordering::Relaxed), bytes.len() as u64);
        touch(&map, &file, &parts, &Done::new(bytes.len() as u64, &progress)).unwrap();
        assert_eq!(last.into_inner(), bytes.len() as u64);
        // With holes between them, parts still come to their places.
        let mut copy = vec![0; bytes.len()];
        read(&file, &parts[1..2], &mut copy, &Done::new(0, &|_, _| {})).unwrap();
        assert!(copy[PART..2 * PART] == bytes[PART..2 * PART] && copy[2 * PART..].iter().all(|&b| b == 0));
    }

    #[test]
    fn a_file_that_became_shorter_is_an_error() {
        let file = file_of(&pattern(PART));
        let mut copy = vec![0; 2 * PART];
        let error =
            read(&file, &[0..PART, PART..2 * PART], &mut copy, &Done::new(0, &|_, _| {})).unwrap_err();
        assert_eq!(error.to_string(), "the file became shorter while it was read");
    }

    fn file_map(file: &File) -> Bytes {
        super::super::map(file).unwrap()
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn dropped_pages_are_cold_and_read_pages_are_not() {
        // Beside the sources: a folder for temporary files may be memory itself.
        let Ok(folder) = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")) else {
            println!("SKIPPED: a test that needs to write beside the sources");
            return;
        };
        let path = folder.path().join("file");
        std::fs::write(&path, pattern(2 * PART)).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        file.sync_all().unwrap();
        let map = file_map(&file);
        assert!(parts(&map, false).is_empty(), "just written");
        crate::memory::leave_page_cache(&file);
        let cold = parts(&map, false);
        if cold.is_empty() {
            println!("SKIPPED: a test that needs a file system that drops pages");
            return;
        }
        touch(&map, &file, &cold, &Done::new(0, &|_, _| {})).unwrap();
        assert!(parts(&map, false).is_empty(), "just read");
    }
}
