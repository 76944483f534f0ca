//! What this machine is and how fast it reads memory: the limits that a speed is to be judged by.
//!
//! Decoding a token reads every weight once, so [`read_sweep`] over more bytes than the caches hold, divided by the
//! weight bytes of a model, is the most tokens a second that any program can decode here without skipping.

use std::fs;
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use serde::Serialize;

use crate::kernels::{Kernels, sum_of};
use crate::memory::Pages;
use crate::threads::{self, Team};
pub use crate::topology::Memory;
use crate::topology::{CoreKind, Topology};

/// What the system tells about the machine. What it does not tell is `None`.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// The CPU's name.
    pub cpu: Option<String>,
    /// Target architecture of this build.
    pub arch: &'static str,
    /// Extensions of the instruction set that matter here.
    pub features: Vec<String>,
    /// CPUs (hardware threads) that the affinity mask allows, as a list.
    pub allowed_cpus: String,
    /// Physical cores among them.
    pub physical_cores: usize,
    /// Those cores by their speed as the system states it, fastest first.
    pub core_kinds: Vec<CoreKind>,
    /// Cores' worth of time that the cgroup grants.
    pub cgroup_quota: Option<f64>,
    /// Threads that a command uses unasked.
    pub default_threads: usize,
    /// CPUs of each memory node, as lists.
    pub memory_nodes: Vec<String>,
    /// When anonymous memory gets huge pages: `always`, `madvise` (skiff asks) or `never`.
    pub huge_pages: Option<String>,
    /// Main memory.
    pub memory: Option<Memory>,
}

/// Extensions worth naming, as Linux spells them.
const FEATURES: &[&str] = &[
    "sse4_2",
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimdhp",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
    "sve2",
];

impl Machine {
    /// Looks.
    pub fn detect() -> Self {
        let topology = Topology::detect();
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let listed = field(&cpuinfo, "flags").or_else(|| field(&cpuinfo, "Features")).unwrap_or_default();
        let has = |name: &&&str| listed.split_whitespace().any(|listed| listed == **name);
        Self {
            cpu: field(&cpuinfo, "model name").map(str::to_owned),
            arch: std::env::consts::ARCH,
            features: FEATURES.iter().filter(has).map(|name| name.to_string()).collect(),
            allowed_cpus: topology.allowed.to_string(),
            physical_cores: topology.cores.len(),
            core_kinds: topology.kinds,
            cgroup_quota: topology.quota,
            default_threads: threads::default_threads(),
            memory_nodes: topology.nodes.iter().map(|(node, cpus)| format!("{node}: CPUs {cpus}")).collect(),
            huge_pages: topology.huge_pages,
            memory: Memory::read(),
        }
    }
}

/// The value of the first line `name : value`.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let pairs = text.lines().filter_map(|line| line.split_once(':'));
    pairs.map(|(key, value)| (key.trim(), value.trim())).find(|(key, _)| *key == name).map(|(_, value)| value)
}

/// Less than this would be read from the caches of a large server.
const MIN_SWEEP: u64 = 512 << 20;
/// More than this only takes longer.
const MAX_SWEEP: u64 = 4 << 30;
/// Words that a thread claims at a time: 1 MiB.
const STEP: usize = 1 << 17;

/// A buffer to read, larger than the caches: an eighth of the memory, within 512 MiB and 4 GiB.
///
/// `None` where so much is not to be had.
pub fn sweep_buffer(memory: Option<Memory>) -> Option<Pages<u64>> {
    let bytes = memory.map_or(MIN_SWEEP, |m| (m.total / 8).clamp(MIN_SWEEP, MAX_SWEEP));
    sweep_buffer_of(memory, bytes)
}

/// A buffer to read of `bytes`, or of half the memory that can be had if that is less; `None` if that is too little.
pub fn sweep_buffer_of(memory: Option<Memory>, bytes: u64) -> Option<Pages<u64>> {
    let bytes = memory.map_or(bytes, |m| bytes.min(m.available / 2).next_multiple_of(8));
    // Ones, not zeros: untouched zeros are one page of the kernel's, read over and over.
    let mut buffer = (bytes >= MIN_SWEEP).then(|| Pages::try_zeroed(bytes as usize / 8).ok()).flatten()?;
    buffer.fill(1);
    Some(buffer)
}

/// Bytes a second at which the team reads `buffer`: the best of `passes`, each of them with lines asked for ahead and
/// without.
pub fn read_sweep(team: &Team, buffer: &[u64], passes: usize) -> f64 {
    let bytes = size_of_val(buffer) as f64;
    let pass = |ask| {
        let total = AtomicU64::new(0);
        let started = Instant::now();
        team.for_ranges(buffer.len(), STEP, |_, range| {
            total.fetch_add(sum_of(&buffer[range], ask), Ordering::Relaxed);
        });
        let seconds = started.elapsed().as_secs_f64();
        black_box(total.into_inner());
        bytes / seconds
    };
    (0..2 * passes).map(|i| pass(i % 2 == 0)).fold(0.0, f64::max)
}

/// Rounds of a burst: some microseconds.
const BURST: usize = 4096;
/// Bursts that a thread claims at a time.
const BURSTS: usize = 16;

/// 8-bit integer operations a second that the team reaches with the kernels' instruction when nothing has to be
/// loaded: the best of `passes`. `None` for kernels whose peak is not measured.
pub fn int8_peak(team: &Team, kernels: Kernels, passes: usize) -> Option<f64> {
    let mut best: Option<f64> = None;
    for _ in 0..passes {
        let total = AtomicU64::new(0);
        let started = Instant::now();
        team.run(8 * team.threads(), |_, _| {
            let bursts = (0..BURSTS).filter_map(|_| kernels.int8_burst(BURST));
            total.fetch_add(bursts.sum(), Ordering::Relaxed);
        });
        let speed = total.into_inner() as f64 / started.elapsed().as_secs_f64();
        best = best.into_iter().chain((speed > 0.0).then_some(speed)).reduce(f64::max);
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_has_a_core_and_names_are_whole_words() {
        let machine = Machine::detect();
        assert!(machine.physical_cores >= 1 && machine.default_threads >= 1);
        assert_eq!(field("flags\t\t: avx avx2\nflags : x", "flags"), Some("avx avx2"));
        assert_eq!(field("model name: a:b", "model name"), Some("a:b"));
        assert_eq!(field("model: a", "model name"), None);
    }

    #[test]
    fn a_peak_is_measured_where_it_is_known() {
        let team = Team::new(2).unwrap();
        for kernels in Kernels::available() {
            assert_eq!(
                int8_peak(&team, kernels, 1).is_some(),
                kernels.int8_burst(1).is_some(),
                "{kernels:?}"
            );
            assert_eq!(int8_peak(&team, kernels, 0), None);
        }
    }

    #[test]
    fn a_sweep_reads_every_word() {
        let words: Vec<u64> = (0..1000).collect();
        assert!([true, false].iter().all(|&ask| sum_of(&words, ask) == 999 * 1000 / 2));
        let team = Team::new(2).unwrap();
        assert!(read_sweep(&team, &words, 2) > 0.0);
        assert_eq!(read_sweep(&team, &words, 0), 0.0);
    }
}
