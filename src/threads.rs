//! The team: a leader and its rayon workers, who share the chunks of one operation after another.
//!
//! A decode step is some 200 small operations. Handing each to a sleeping thread pool would cost
//! 40-90 us apiece, so the workers enter the rayon pool once, when the team is made, and then wait
//! in a spin loop (yielding, and at last sleeping) for the next operation. The leader - the thread
//! that owns the model - writes the forward pass as straight-line code and calls [`Team::run`] or
//! one of the `for_*` helpers for each operation.
//!
//! Each worker has an equal share of the chunks, which lie one behind the other, and claims them one at a time from the
//! first on, so that what it prefetches at the end of one is the beginning of its next. Who is done with
//! his own takes from the ends of the others' shares. An operation ends when its *chunks*
//! are done, not when every worker has shown up. A worker whose core was taken by another process
//! therefore delays the team by the one chunk that it holds at most; the others do the rest.
//!
//! # The claim words
//! `state` packs `epoch << 32 | chunks << 16 | workers` of the current operation, a worker's word in `shares`
//! `epoch << 32 | from << 16 | to`: what is left of its share. A word of an older epoch says that nothing of the share has been
//! claimed in this one, so the leader has one word to write to begin an operation.
//!
//! A chunk is claimed by a compare-and-swap of the whole word of a share with something left. It can only succeed for the
//! operation it was read for: to end that, all of the share must have been claimed, which changes its word; and that the
//! word is not of a later operation is seen in `state`, read once more after the word. Since the leader waits for every
//! claimed chunk, the job that a successful claim belongs to is alive until that chunk is counted in `done`.

mod affinity;

use std::any::Any;
use std::cell::UnsafeCell;
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

pub use affinity::{AffinityError, keep_on};

use crate::topology::{CpuSet, Topology};

/// Spinning covers the gaps inside a forward pass (microseconds).
const SPIN: Duration = Duration::from_micros(30);
/// Yielding covers the gap between two tokens (sampling over a large vocabulary, printing): up to
/// here a worker is awake at the cost of its idle core, beyond it sleeps and takes 50 us to wake.
const STAY_AWAKE: Duration = Duration::from_micros(1500);
/// Largest number of chunks in one operation: the claim word has 16 bits for it.
const MAX_CHUNKS: usize = u16::MAX as usize;

/// Threads to use by default: the physical cores that this process may run on, within the cgroup's quota.
pub fn default_threads() -> usize {
    let counted = || std::thread::available_parallelism().map_or(1, usize::from);
    Topology::detect().default_threads().unwrap_or_else(counted)
}

/// A job runs chunk `chunk` on worker `worker`.
type Job<'a> = &'a (dyn Fn(usize, usize) + Sync + 'a);

/// An operation, from its word in [`Shared::state`].
#[derive(Clone, Copy)]
struct Operation {
    word: u64,
    chunks: usize,
    workers: usize,
}

impl Operation {
    fn of(word: u64) -> Self {
        Self { word, chunks: (word >> 16 & 0xffff) as usize, workers: (word & 0xffff) as usize }
    }

    /// The upper half of the words that belong to it.
    fn epoch(self) -> u64 {
        self.word >> 32 << 32
    }

    /// The chunks that are `worker`'s share.
    fn share(self, worker: usize) -> Range<usize> {
        worker * self.chunks / self.workers..(worker + 1) * self.chunks / self.workers
    }
}

/// What is left of a worker's share; on cache lines of its own (two, which are fetched together).
#[repr(align(128))]
#[derive(Default)]
struct Share(AtomicU64);

struct Shared {
    state: AtomicU64,
    shares: Vec<Share>,
    done: AtomicUsize,
    job: UnsafeCell<Option<Job<'static>>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    sleepers: AtomicUsize,
    bed: Mutex<()>,
    wake: Condvar,
    quit: AtomicBool,
    /// Workers from this one on sleep.
    active: AtomicUsize,
}

// SAFETY: `job` is the only field that is not `Sync`. It is written by the leader alone, while no
// chunk is unclaimed or running, and read by a worker only between a successful claim and its
// `done` increment; the claim word orders the write before the read (Release/Acquire).
unsafe impl Sync for Shared {}

/// Why a team cannot be kept on its CPUs.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum PinError {
    #[error(transparent)]
    Affinity(#[from] AffinityError),
    #[error("the threads cannot be started: {0}")]
    Threads(#[from] rayon::ThreadPoolBuildError),
}

/// The threads that work on one operation at a time. See the module's description.
pub struct Team {
    shared: Arc<Shared>,
    threads: usize,
    busy: AtomicBool,
    /// Where the leader may run when the team is gone.
    unpinned: Option<CpuSet>,
    _pool: Option<rayon::ThreadPool>,
}

impl Team {
    /// A team of `threads` (at least 1), the calling thread being one of them. The system moves them between CPUs as
    /// it sees fit.
    pub fn new(threads: usize) -> Result<Self, rayon::ThreadPoolBuildError> {
        Self::start(threads, None)
    }

    /// A team whose threads, the calling one included, stay on one CPU each of those that this process may use.
    ///
    /// # Errors
    /// The calling thread cannot be kept there.
    pub fn pinned(threads: usize) -> Result<Self, PinError> {
        let topology = Topology::detect();
        let places = topology.places(threads);
        let leader = CpuSet::from_iter(places.iter().take(1).copied());
        let mut team = Self::start(threads, Some(places))?;
        keep_on(&leader)?;
        team.unpinned = Some(topology.allowed);
        Ok(team)
    }

    fn start(threads: usize, places: Option<Vec<usize>>) -> Result<Self, rayon::ThreadPoolBuildError> {
        let threads = threads.clamp(1, 1024);
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            shares: (0..threads).map(|_| Share::default()).collect(),
            done: AtomicUsize::new(0),
            job: UnsafeCell::new(None),
            panic: Mutex::new(None),
            sleepers: AtomicUsize::new(0),
            bed: Mutex::new(()),
            wake: Condvar::new(),
            quit: AtomicBool::new(false),
            active: AtomicUsize::new(threads),
        });
        let pool = match threads {
            1 => None,
            n => {
                let pool = rayon::ThreadPoolBuilder::new()
                    .num_threads(n - 1)
                    .thread_name(|i| format!("skiff-{}", i + 1))
                    .build()?;
                let shared = shared.clone();
                pool.spawn_broadcast(move |ctx| {
                    let worker = ctx.index() + 1;
                    if let Some(cpu) = places.as_ref().and_then(|places| places.get(worker)) {
                        // The CPU is one of those that the process may use; should it be taken away in this very
                        // moment, the worker runs elsewhere.
                        let _ = affinity::set(&CpuSet::from_iter([*cpu]));
                    }
                    shared.work(worker);
                });
                Some(pool)
            }
        };
        Ok(Self { shared, threads, busy: AtomicBool::new(false), unpinned: None, _pool: pool })
    }

    /// Number of threads, the leader included, those that [`use_threads`](Self::use_threads) put to sleep too.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Number of threads that take part in operations.
    pub fn active(&self) -> usize {
        self.shared.active.load(Ordering::Relaxed)
    }

    /// From the next operation on, only so many threads (at least 1, at most all) take part; the others sleep.
    pub fn use_threads(&self, threads: usize) {
        let threads = threads.clamp(1, self.threads);
        if self.shared.active.swap(threads, Ordering::SeqCst) < threads {
            let _bed = self.shared.bed.lock().unwrap_or_else(PoisonError::into_inner);
            self.shared.wake.notify_all();
        }
    }

    /// Runs `job(worker, chunk)` for every chunk in `0..chunks` and returns when all are done.
    ///
    /// No two chunks that run at the same time see the same `worker` (`0..threads`). A panic in a
    /// chunk is passed on after the others have finished. A call from inside a job runs serially.
    pub fn run(&self, chunks: usize, job: impl Fn(usize, usize) + Sync) {
        assert!(chunks <= MAX_CHUNKS, "{chunks} chunks in one operation");
        if self.active() == 1 || chunks <= 1 || self.busy.swap(true, Ordering::Acquire) {
            (0..chunks).for_each(|chunk| job(0, chunk));
            return;
        }
        let shared = &*self.shared;
        let job: Job<'_> = &job;
        // SAFETY: only the lifetime changes. The reference is dead before `job` is: this function
        // does not return or unwind until `done` equals `chunks`, and no claim can succeed later.
        let job: Job<'static> = unsafe { std::mem::transmute::<Job<'_>, Job<'static>>(job) };
        // SAFETY: `busy` makes this the only leader, and the previous operation is finished, so no
        // worker is reading the cell (see `Shared`).
        unsafe { *shared.job.get() = Some(job) };
        shared.done.store(0, Ordering::Relaxed);
        let epoch = shared.next_epoch();
        shared.state.store(epoch << 32 | (chunks as u64) << 16 | self.active() as u64, Ordering::Release);
        shared.wake_sleepers();
        while shared.claim_and_run(0).is_none() {}
        let mut idle = Idle::new();
        while shared.done.load(Ordering::Acquire) < chunks {
            idle.pause();
        }
        self.busy.store(false, Ordering::Release);
        let panic = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// Splits `0..n` into ranges of `step` and runs `job(worker, range)` for each.
    pub fn for_ranges(&self, n: usize, step: usize, job: impl Fn(usize, Range<usize>) + Sync) {
        let step = bounded_step(n, step);
        self.run(n.div_ceil(step), |worker, i| job(worker, i * step..((i + 1) * step).min(n)));
    }

    /// Splits the row-major matrix `data` (rows of `cols` elements) into tiles of at most
    /// `tile_rows x tile_cols` and hands each, mutable, to `job` with the worker's own `scratch`.
    ///
    /// `scratch` has an element for each thread.
    pub fn for_tiles<T: Send, S: Send>(
        &self,
        data: &mut [T],
        cols: usize,
        (tile_rows, tile_cols): (usize, usize),
        scratch: &mut [S],
        job: impl Fn(&mut S, Tile<'_, T>) + Sync,
    ) {
        assert!(cols > 0 && data.len().is_multiple_of(cols), "{} elements in rows of {cols}", data.len());
        assert!(scratch.len() >= self.threads, "scratch for {} of {} threads", scratch.len(), self.threads);
        let rows = data.len() / cols;
        let (tile_rows, tile_cols) = (tile_rows.clamp(1, rows.max(1)), tile_cols.clamp(1, cols));
        let across = cols.div_ceil(tile_cols);
        let (data, scratch) = (SharedMut(data.as_mut_ptr()), SharedMut(scratch.as_mut_ptr()));
        self.run(rows.div_ceil(tile_rows) * across, |worker, i| {
            let (r, c) = (i / across * tile_rows, i % across * tile_cols);
            let tile = Tile {
                origin: data,
                stride: cols,
                rows: r..(r + tile_rows).min(rows),
                cols: c..(c + tile_cols).min(cols),
                _borrow: PhantomData,
            };
            // SAFETY: `worker < threads <= scratch.len()`, and no other running chunk has this
            // worker's number, so the element is borrowed once.
            let scratch = unsafe { &mut *scratch.get().add(worker) };
            job(scratch, tile);
        });
    }

    /// [`for_tiles`](Self::for_tiles) without scratch.
    pub fn for_plain_tiles<T: Send>(
        &self,
        data: &mut [T],
        cols: usize,
        tile: (usize, usize),
        job: impl Fn(Tile<'_, T>) + Sync,
    ) {
        // A zero-sized element a thread: no allocation.
        let mut scratch = vec![(); self.threads];
        self.for_tiles(data, cols, tile, &mut scratch, |(), tile| job(tile));
    }
}

/// At least so large that an operation has no more than [`MAX_CHUNKS`] chunks.
fn bounded_step(n: usize, step: usize) -> usize {
    step.max(n.div_ceil(MAX_CHUNKS)).max(1)
}

impl Drop for Team {
    fn drop(&mut self) {
        if let Some(cpus) = &self.unpinned {
            // Should that fail, this thread stays on one CPU, which is slow but right.
            let _ = affinity::set(cpus);
        }
        self.shared.quit.store(true, Ordering::SeqCst);
        let _bed = self.shared.bed.lock().unwrap_or_else(PoisonError::into_inner);
        self.shared.wake.notify_all();
    }
}

impl Shared {
    /// The number of the next operation, which no word has yet. For the leader, between operations.
    fn next_epoch(&self) -> u64 {
        let epoch = (self.state.load(Ordering::Relaxed) >> 32) + 1;
        if epoch <= u64::from(u32::MAX) {
            return epoch;
        }
        self.shares.iter().for_each(|share| share.0.store(0, Ordering::Relaxed));
        1
    }

    /// A worker's life: chunks while there are some, sleep when there have been none for long.
    fn work(&self, worker: usize) {
        let mut idle = Idle::new();
        let mut finished = 0;
        while !self.quit.load(Ordering::Relaxed) {
            if worker >= self.active.load(Ordering::Relaxed) {
                self.sit_out(worker);
                idle = Idle::new();
            } else if self.state.load(Ordering::Relaxed) != finished {
                finished = self.claim_and_run(worker).unwrap_or(finished);
                idle = Idle::new();
            } else if !idle.pause() {
                self.sleep(finished);
                idle = Idle::new();
            }
        }
    }

    /// Claims a chunk of the current operation and runs it; if none is left, the operation's word.
    fn claim_and_run(&self, worker: usize) -> Option<u64> {
        let operation = Operation::of(self.state.load(Ordering::Acquire));
        if worker >= operation.workers {
            return Some(operation.word); // put to sleep, and has not noticed yet
        }
        let mut owners = (worker..operation.workers).chain(0..worker);
        let Some(chunk) = owners.find_map(|owner| self.claim(operation, owner, owner == worker)) else {
            return Some(operation.word);
        };
        // SAFETY: the claim succeeded, so the leader is waiting for this chunk: the job it wrote
        // before publishing `state` is in the cell and stays alive until `done` counts the chunk.
        let job = unsafe { *self.job.get() };
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            if let Some(job) = job {
                job(worker, chunk);
            }
        }));
        if let Err(panic) = outcome {
            *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
        }
        self.done.fetch_add(1, Ordering::Release);
        None
    }

    /// Claims the first chunk that is left of a worker's own share, or the last of another's.
    fn claim(&self, operation: Operation, owner: usize, own: bool) -> Option<usize> {
        let share = &self.shares[owner].0;
        loop {
            let seen = share.load(Ordering::Acquire);
            if self.state.load(Ordering::Acquire) != operation.word {
                return None; // the word may be of a later operation
            }
            let Range { start, end } = if seen >> 32 << 32 == operation.epoch() {
                (seen >> 16 & 0xffff) as usize..(seen & 0xffff) as usize
            } else {
                operation.share(owner)
            };
            if start >= end {
                return None;
            }
            let (chunk, left) = if own { (start, start + 1..end) } else { (end - 1, start..end - 1) };
            let word = operation.epoch() | (left.start as u64) << 16 | left.end as u64;
            if share.compare_exchange_weak(seen, word, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                return Some(chunk);
            }
        }
    }

    /// Sleeps until there is another operation than the one that is `finished`.
    fn sleep(&self, finished: u64) {
        let mut bed = self.bed.lock().unwrap_or_else(PoisonError::into_inner);
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        while self.state.load(Ordering::SeqCst) == finished && !self.quit.load(Ordering::SeqCst) {
            bed = self.wake.wait(bed).unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }

    /// Sleeps until `worker` is to take part again. It is no sleeper that a new operation has to wake.
    fn sit_out(&self, worker: usize) {
        let mut bed = self.bed.lock().unwrap_or_else(PoisonError::into_inner);
        while worker >= self.active.load(Ordering::SeqCst) && !self.quit.load(Ordering::SeqCst) {
            bed = self.wake.wait(bed).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Either the sleeper sees the new state, or this sees the sleeper (both sides fence).
    fn wake_sleepers(&self) {
        fence(Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            let _bed = self.bed.lock().unwrap_or_else(PoisonError::into_inner);
            self.wake.notify_all();
        }
    }
}

/// Waiting politely: spin, then yield the core.
struct Idle {
    since: Option<Instant>,
    rounds: u32,
}

impl Idle {
    fn new() -> Self {
        Self { since: None, rounds: 0 }
    }

    /// Waits a moment; false once it has been long enough to go to sleep.
    fn pause(&mut self) -> bool {
        self.rounds += 1;
        std::hint::spin_loop();
        if self.rounds.is_multiple_of(64) {
            let waited = self.since.get_or_insert_with(Instant::now).elapsed();
            if waited > SPIN {
                std::thread::yield_now();
            }
            return waited < STAY_AWAKE;
        }
        true
    }
}

/// A pointer that may cross threads: whoever hands out what it points to keeps the parts disjoint.
struct SharedMut<T>(*mut T);

impl<T> Clone for SharedMut<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for SharedMut<T> {}

impl<T> SharedMut<T> {
    fn get(self) -> *mut T {
        self.0
    }
}

// SAFETY: the pointer is to `T: Send` data of which `for_tiles` gives each thread a part of its own.
unsafe impl<T: Send> Send for SharedMut<T> {}
// SAFETY: as above; a shared `SharedMut` gives no access by itself.
unsafe impl<T: Send> Sync for SharedMut<T> {}

/// A rectangle of a row-major matrix that one chunk may write.
pub struct Tile<'a, T> {
    origin: SharedMut<T>,
    stride: usize,
    rows: Range<usize>,
    cols: Range<usize>,
    _borrow: PhantomData<&'a mut T>,
}

impl<T> Tile<'_, T> {
    /// The rows of the matrix that the tile covers.
    pub fn rows(&self) -> Range<usize> {
        self.rows.clone()
    }

    /// The columns of the matrix that the tile covers.
    pub fn cols(&self) -> Range<usize> {
        self.cols.clone()
    }

    /// The tile's part of row `row` of the matrix (one of [`rows`](Self::rows)).
    pub fn row(&mut self, row: usize) -> &mut [T] {
        assert!(self.rows.contains(&row), "row {row} of {:?}", self.rows);
        // SAFETY: the row is one of the tile's, so the part lies inside the matrix that `for_tiles`
        // borrows mutably for as long as the tile lives; tiles of different chunks are disjoint,
        // and `&mut self` keeps this the only part that is borrowed from this one.
        unsafe {
            let start = self.origin.get().add(row * self.stride + self.cols.start);
            std::slice::from_raw_parts_mut(start, self.cols.len())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_chunk_runs_once_whatever_the_number_of_threads() {
        for threads in [1, 2, 3, 8] {
            let team = Team::new(threads).unwrap();
            for chunks in [0, 1, 2, 7, 100, 5000] {
                let counts: Vec<AtomicUsize> = (0..chunks).map(|_| AtomicUsize::new(0)).collect();
                team.run(chunks, |worker, i| {
                    assert!(worker < threads);
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1), "{threads} {chunks}");
            }
        }
    }

    #[test]
    fn tiles_cover_the_matrix_without_overlap() {
        let team = Team::new(3).unwrap();
        let (rows, cols) = (13, 29);
        for tile in [(1, 29), (4, 8), (13, 1), (100, 100)] {
            let mut data = vec![0u32; rows * cols];
            team.for_plain_tiles(&mut data, cols, tile, |mut t| {
                let first = t.cols().start;
                for r in t.rows() {
                    for (c, x) in t.row(r).iter_mut().enumerate() {
                        *x += (r * cols + first + c) as u32 + 1;
                    }
                }
            });
            assert!(data.iter().enumerate().all(|(i, &x)| x == i as u32 + 1), "{tile:?}");
        }
    }

    #[test]
    fn a_panic_reaches_the_leader_and_the_team_goes_on() {
        let team = Team::new(2).unwrap();
        for _ in 0..20 {
            let caught = catch_unwind(AssertUnwindSafe(|| {
                team.run(16, |_, i| assert!(i != 11, "chunk eleven"));
            }));
            assert!(caught.is_err());
            let sum = AtomicUsize::new(0);
            team.run(10, |_, i| _ = sum.fetch_add(i, Ordering::Relaxed));
            assert_eq!(sum.into_inner(), 45);
        }
    }

    #[test]
    fn only_active_threads_take_part() {
        let team = Team::new(4).unwrap();
        for active in [4, 1, 2, 9, 3, 0] {
            team.use_threads(active);
            assert_eq!(team.active(), active.clamp(1, 4));
            for _ in 0..50 {
                let counts: Vec<AtomicUsize> = (0..64).map(|_| AtomicUsize::new(0)).collect();
                team.run(64, |worker, i| {
                    assert!(worker < team.active(), "worker {worker} of {}", team.active());
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
            }
        }
        // Those that slept take part again: with a chunk each that waits for the others, all are needed.
        team.use_threads(4);
        let all_here = std::sync::Barrier::new(4);
        team.run(4, |_, _| _ = all_here.wait());
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn pinned_threads_stay_on_one_cpu_each() {
        let allowed = Topology::detect().allowed;
        if allowed.is_empty() {
            println!("SKIPPED: a test that needs a system that tells its CPUs");
            return;
        }
        let places = Topology::detect().places(3);
        let everywhere = allowed.clone();
        // In a thread of its own: pinning stays with the leader.
        let seen = std::thread::spawn(move || {
            let team = Team::pinned(3).unwrap();
            let all_here = std::sync::Barrier::new(3);
            let seen = Mutex::new(vec![CpuSet::default(); 3]);
            team.run(3, |worker, _| {
                all_here.wait();
                seen.lock().unwrap()[worker] = Topology::detect().allowed;
            });
            drop(team);
            assert_eq!(Topology::detect().allowed, everywhere, "the leader is free again");
            seen.into_inner().unwrap()
        });
        let want: Vec<CpuSet> = places.iter().map(|&cpu| CpuSet::from_iter([cpu])).collect();
        assert_eq!(seen.join().unwrap(), want, "of {allowed}");
    }

    #[test]
    fn workers_wake_from_sleep_and_nested_calls_run_serially() {
        let team = Team::new(4).unwrap();
        for _ in 0..5 {
            std::thread::sleep(STAY_AWAKE * 3);
            let sum = AtomicUsize::new(0);
            team.run(8, |_, _| team.run(4, |_, _| _ = sum.fetch_add(1, Ordering::Relaxed)));
            assert_eq!(sum.into_inner(), 32);
        }
    }
}
