//! What Linux says of CPUs: which this process may use, which share a core, how fast their kinds are, on which memory
//! node they sit, and how much of their time the cgroup grants. Read from `/proc` and `/sys` below any root, so that
//! tests can make machines of files.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::Serialize;

/// Most CPUs that a set may name: what Linux supports.
pub const MAX_CPUS: usize = 8192;

/// A set of CPUs by their numbers. Shown and parsed as Linux lists them: `0-3,8`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CpuSet(BTreeSet<usize>);

impl CpuSet {
    /// The CPUs whose bits are set in a hexadecimal number, `0x` or not, bit 0 being CPU 0 (llama.cpp's `--cpu-mask`).
    pub fn from_mask(hex: &str) -> Result<Self, String> {
        let digits = hex.strip_prefix("0x").or_else(|| hex.strip_prefix("0X")).unwrap_or(hex);
        if digits.is_empty() || digits.len() > MAX_CPUS / 4 {
            return Err(format!("expected 1 to {} hexadecimal digits", MAX_CPUS / 4));
        }
        let mut cpus = BTreeSet::new();
        for (i, c) in digits.chars().rev().enumerate() {
            let digit = c.to_digit(16).ok_or_else(|| format!("{c:?} is no hexadecimal digit"))?;
            cpus.extend((0..4).filter(|bit| digit >> bit & 1 == 1).map(|bit| 4 * i + bit));
        }
        Self::not_empty(cpus)
    }

    /// The CPUs of `lo-hi`, both included; either may be left out (llama.cpp's `--cpu-range`).
    pub fn from_range(text: &str) -> Result<Self, String> {
        let (low, high) = text.split_once('-').ok_or("expected two CPUs: LO-HI")?;
        let number = |text: &str, default: usize| match text {
            "" => Ok(default),
            text => text.parse().map_err(|_| format!("{text:?} is no CPU number")),
        };
        let (low, high) = (number(low, 0)?, number(high, MAX_CPUS - 1)?);
        if low > high || high >= MAX_CPUS {
            return Err(format!("expected LO-HI with LO <= HI < {MAX_CPUS}"));
        }
        Self::not_empty((low..=high).collect())
    }

    fn not_empty(cpus: BTreeSet<usize>) -> Result<Self, String> {
        if cpus.is_empty() { Err("names no CPU".into()) } else { Ok(Self(cpus)) }
    }

    /// The CPUs in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        self.0.iter().copied()
    }

    /// Number of CPUs.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether `cpu` is one of them.
    pub fn contains(&self, cpu: usize) -> bool {
        self.0.contains(&cpu)
    }

    /// Those that are in `other` too.
    pub fn and(&self, other: &Self) -> Self {
        Self(self.0.intersection(&other.0).copied().collect())
    }

    /// Those that are not in `other`.
    pub fn without(&self, other: &Self) -> Self {
        Self(self.0.difference(&other.0).copied().collect())
    }
}

impl FromIterator<usize> for CpuSet {
    fn from_iter<I: IntoIterator<Item = usize>>(cpus: I) -> Self {
        Self(cpus.into_iter().collect())
    }
}

/// Linux's lists: `0-3,8`; an empty text is the empty set.
impl FromStr for CpuSet {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut cpus = BTreeSet::new();
        for part in text.trim().split(',').filter(|part| !part.is_empty()) {
            let (low, high) = part.split_once('-').unwrap_or((part, part));
            match (low.parse::<usize>(), high.parse::<usize>()) {
                (Ok(low), Ok(high)) if low <= high && high < MAX_CPUS => cpus.extend(low..=high),
                _ => return Err(format!("{part:?} is no list of CPUs")),
            }
        }
        Ok(Self(cpus))
    }
}

impl fmt::Display for CpuSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cpus: Vec<usize> = self.iter().collect();
        for (i, run) in cpus.chunk_by(|a, b| a + 1 == *b).enumerate() {
            let comma = if i > 0 { "," } else { "" };
            match run {
                [one] => write!(f, "{comma}{one}")?,
                run => write!(f, "{comma}{}-{}", run[0], run[run.len() - 1])?,
            }
        }
        Ok(())
    }
}

/// Main memory, bytes.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Memory {
    /// All of it, or what the cgroup grants if that is less.
    pub total: u64,
    /// What can be had without swapping.
    pub available: u64,
}

impl Memory {
    /// Looks.
    pub fn read() -> Option<Self> {
        let meminfo = fs::read_to_string("/proc/meminfo").ok()?;
        let kib = |name| -> Option<u64> {
            let value = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
            value.split_whitespace().next()?.parse().ok()
        };
        let (total, available) = (kib("MemTotal:")? * 1024, kib("MemAvailable:")? * 1024);
        let granted = fs::read_to_string("/sys/fs/cgroup/memory.max").ok();
        let granted = granted.and_then(|text| text.trim().parse::<u64>().ok()).unwrap_or(u64::MAX);
        Some(Self { total: total.min(granted), available: available.min(granted) })
    }
}

/// Cores of one speed.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CoreKind {
    /// Physical cores of this kind that the process may use.
    pub cores: usize,
    /// Their speed as the system states it, the fastest being 1.
    pub speed: f64,
}

/// The machine as this process may use it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Topology {
    /// Hardware threads that the affinity mask allows; empty where the system does not tell.
    pub allowed: CpuSet,
    /// Hardware threads of each physical core with one that is allowed, siblings together, in order of their first.
    pub cores: Vec<CpuSet>,
    /// The cores by speed, fastest first.
    pub kinds: Vec<CoreKind>,
    /// Cores' worth of time that the cgroup and those around it grant, if limited.
    pub quota: Option<f64>,
    /// Nodes that have memory, by number, with their CPUs.
    pub nodes: Vec<(usize, CpuSet)>,
    /// When anonymous memory gets huge pages: `always`, `madvise` or `never`.
    pub huge_pages: Option<String>,
}

impl Topology {
    /// This machine's.
    pub fn detect() -> Self {
        Self::read(Path::new("/"))
    }

    /// That of the files below `root`. What is not there or not understood is left empty.
    pub fn read(root: &Path) -> Self {
        let files = Files { root };
        let allowed = files.allowed();
        let cores = files.cores(&allowed);
        Self {
            kinds: files.kinds(&cores),
            cores,
            quota: files.quota(),
            nodes: files.nodes(),
            huge_pages: files.huge_pages(),
            allowed,
        }
    }

    /// Threads to use unasked: one a physical core that the process may use, slow kinds included (work goes to whoever
    /// asks for it), and no more than the quota has cores. `None` where the system tells nothing.
    ///
    /// Hardware siblings share the units that the kernels keep busy, so they are not counted. A thread beyond the
    /// quota would be stopped for the rest of each period, and the others would wait for it.
    pub fn default_threads(&self) -> Option<usize> {
        let cores = if self.cores.is_empty() { self.allowed.len() } else { self.cores.len() };
        let quota = self.quota.map_or(usize::MAX, |quota| quota.floor() as usize);
        (cores > 0).then(|| cores.min(quota).max(1))
    }

    /// A CPU for each of `threads` threads that are to stay where they are: one of each core first, fastest cores
    /// first, then their siblings, round and round.
    pub fn places(&self, threads: usize) -> Vec<usize> {
        let siblings = self.cores.iter().map(CpuSet::len).max().unwrap_or(0);
        let mut order: Vec<usize> = (0..siblings)
            .flat_map(|i| self.cores.iter().filter_map(move |core| core.iter().nth(i)))
            .collect();
        if order.is_empty() {
            order = self.allowed.iter().collect();
        }
        order.into_iter().cycle().take(threads).collect()
    }
}

/// Memory nodes by number, with their CPUs, as the files below `root` tell.
pub fn nodes(root: &Path) -> Vec<(usize, CpuSet)> {
    Files { root }.nodes()
}

struct Files<'a> {
    root: &'a Path,
}

impl Files<'_> {
    fn text(&self, path: impl AsRef<Path>) -> Option<String> {
        fs::read_to_string(self.root.join(path)).ok()
    }

    fn set(&self, path: impl AsRef<Path>) -> Option<CpuSet> {
        self.text(path)?.parse().ok()
    }

    /// The mask of the calling thread: threads that it starts inherit it.
    fn allowed(&self) -> CpuSet {
        let status = self.text("proc/thread-self/status").unwrap_or_default();
        let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        let allowed: Option<CpuSet> = list.and_then(|list| list.parse().ok());
        let online = self.set("sys/devices/system/cpu/online");
        match (allowed, online) {
            // The mask may name CPUs that are not there.
            (Some(allowed), Some(online)) => allowed.and(&online),
            (allowed, online) => allowed.or(online).unwrap_or_default(),
        }
    }

    /// Fastest first, so that [`Topology::places`] fills those first.
    fn cores(&self, allowed: &CpuSet) -> Vec<CpuSet> {
        let siblings = |cpu| {
            let path = format!("sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
            self.set(path).unwrap_or_default()
        };
        let cores = allowed.iter().map(|cpu| {
            let core = siblings(cpu).and(allowed);
            // A CPU that tells no siblings is a core by itself.
            if core.contains(cpu) { core } else { CpuSet::from_iter([cpu]) }
        });
        let mut cores: Vec<CpuSet> = cores.collect::<BTreeSet<_>>().into_iter().collect();
        cores.sort_by(|a, b| self.speed(b).total_cmp(&self.speed(a)));
        cores
    }

    /// In the units of whichever file the system has: capacity (Arm, hybrid x86 since Linux 6.12) or top frequency.
    fn speed(&self, core: &CpuSet) -> f64 {
        let Some(cpu) = core.iter().next() else { return 0.0 };
        let number = |name: &str| -> Option<f64> {
            self.text(format!("sys/devices/system/cpu/cpu{cpu}/{name}"))?.trim().parse().ok()
        };
        number("cpu_capacity").or_else(|| number("cpufreq/cpuinfo_max_freq")).unwrap_or(1.0)
    }

    /// Cores within a tenth of each other are of one kind: favoured cores of one kind differ by that much.
    fn kinds(&self, cores: &[CpuSet]) -> Vec<CoreKind> {
        let fastest = cores.first().map_or(1.0, |core| self.speed(core)).max(f64::MIN_POSITIVE);
        let mut kinds: Vec<CoreKind> = Vec::new();
        for speed in cores.iter().map(|core| self.speed(core) / fastest) {
            match kinds.last_mut() {
                Some(kind) if speed >= 0.9 * kind.speed => kind.cores += 1,
                _ => kinds.push(CoreKind { cores: 1, speed }),
            }
        }
        kinds
    }

    /// The tightest quota of the process' cgroup and those above it, of version 2 or 1.
    fn quota(&self) -> Option<f64> {
        let own = self.text("proc/self/cgroup").unwrap_or_default();
        let mut tightest: Option<f64> = None;
        for line in own.lines() {
            // `hierarchy:controllers:path`; version 2 has hierarchy 0 and no controllers.
            let mut parts = line.splitn(3, ':');
            let (Some(id), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
                continue;
            };
            let mounts: &[&str] = match (id, controllers) {
                ("0", "") => &["sys/fs/cgroup", "sys/fs/cgroup/unified"],
                (_, list) if list.split(',').any(|c| c == "cpu") => {
                    &["sys/fs/cgroup/cpu", "sys/fs/cgroup/cpu,cpuacct", "sys/fs/cgroup/cpuacct,cpu"]
                }
                _ => continue,
            };
            for mount in mounts {
                for quota in self.quotas_up_from(Path::new(mount), path) {
                    tightest = Some(tightest.map_or(quota, |t| t.min(quota)));
                }
            }
        }
        tightest
    }

    /// Quotas of the group `path` below `mount` and of its ancestors. In a container the path may be the host's, of
    /// which only the last ancestor, the mount itself, is visible.
    fn quotas_up_from(&self, mount: &Path, path: &str) -> Vec<f64> {
        let mut groups: Vec<PathBuf> = vec![mount.to_owned()];
        for part in path.split('/').filter(|part| !part.is_empty() && *part != "..") {
            groups.push(groups[groups.len() - 1].join(part));
        }
        groups.iter().filter_map(|group| self.quota_of(group)).collect()
    }

    fn quota_of(&self, group: &Path) -> Option<f64> {
        let pair = self.text(group.join("cpu.max")).or_else(|| {
            let quota = self.text(group.join("cpu.cfs_quota_us"))?;
            Some(format!("{} {}", quota.trim(), self.text(group.join("cpu.cfs_period_us"))?))
        })?;
        let (quota, period) = pair.trim().split_once(' ')?;
        // `max` and -1 are no limit.
        let (quota, period) = (quota.parse::<f64>().ok()?, period.trim().parse::<f64>().ok()?);
        (quota > 0.0 && period > 0.0).then_some(quota / period)
    }

    fn nodes(&self) -> Vec<(usize, CpuSet)> {
        let online: CpuSet = self.set("sys/devices/system/node/has_memory").unwrap_or_default();
        let cpus = |node| self.set(format!("sys/devices/system/node/node{node}/cpulist"));
        online.iter().filter_map(|node| Some((node, cpus(node)?))).collect()
    }

    /// The word in brackets.
    fn huge_pages(&self) -> Option<String> {
        let text = self.text("sys/kernel/mm/transparent_hugepage/enabled")?;
        let (_, rest) = text.split_once('[')?;
        Some(rest.split_once(']')?.0.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine of files.
    struct Fake(tempfile::TempDir);

    impl Fake {
        fn new(allowed: &str, online: &str) -> Self {
            let fake = Self(tempfile::tempdir().unwrap());
            fake.put("proc/thread-self/status", &format!("Name:\tx\nCpus_allowed_list:\t{allowed}\n"));
            fake.put("sys/devices/system/cpu/online", online);
            fake
        }

        fn put(&self, path: &str, text: &str) {
            let path = self.0.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }

        fn cpu(&self, cpu: usize, file: &str, text: &str) {
            self.put(&format!("sys/devices/system/cpu/cpu{cpu}/{file}"), text);
        }

        fn read(&self) -> Topology {
            Topology::read(self.0.path())
        }
    }

    fn set(text: &str) -> CpuSet {
        text.parse().unwrap()
    }

    #[test]
    fn sets_are_read_and_shown_as_linux_does() {
        for text in ["", "0", "0-3", "0-3,8", "1,3,5-6"] {
            assert_eq!(set(text).to_string(), text);
        }
        assert_eq!(set(" 2-2\n").to_string(), "2");
        for text in ["a", "3-1", "-", "1-", "0-99999999999", "8192"] {
            assert!(text.parse::<CpuSet>().is_err(), "{text}");
        }
    }

    #[test]
    fn masks_and_ranges_are_llama_cpps() {
        assert_eq!(CpuSet::from_mask("0xF0").unwrap(), set("4-7"));
        assert_eq!(CpuSet::from_mask("10000000000000001").unwrap(), set("0,64"));
        assert_eq!(CpuSet::from_range("2-5").unwrap(), set("2-5"));
        assert_eq!(CpuSet::from_range("-1").unwrap(), set("0-1"));
        for mask in ["", "0x", "0", "fg", &"f".repeat(MAX_CPUS)] {
            assert!(CpuSet::from_mask(mask).is_err(), "{mask}");
        }
        for range in ["", "3", "5-2", "0-8192", "a-b"] {
            assert!(CpuSet::from_range(range).is_err(), "{range}");
        }
    }

    #[test]
    fn siblings_are_one_core_and_only_allowed_ones_count() {
        let fake = Fake::new("0-1,4-6", "0-7");
        for cpu in 0..8 {
            fake.cpu(cpu, "topology/thread_siblings_list", &format!("{},{}", cpu % 4, cpu % 4 + 4));
        }
        let topology = fake.read();
        assert_eq!(topology.cores, [set("0,4"), set("1,5"), set("6")]);
        assert_eq!(topology.default_threads(), Some(3));
        assert_eq!(topology.kinds, [CoreKind { cores: 3, speed: 1.0 }]);
        assert_eq!(topology.places(7), [0, 1, 6, 4, 5, 0, 1], "a core each before siblings");
    }

    #[test]
    fn slow_cores_count_and_come_last() {
        let fake = Fake::new("0-5", "0-5");
        for cpu in 0..6 {
            // CPUs 0 to 3 are slow; 4 and 5 are the siblings of a fast core.
            fake.cpu(
                cpu,
                "topology/thread_siblings_list",
                if cpu < 4 { ["0", "1", "2", "3"][cpu] } else { "4-5" },
            );
            fake.cpu(cpu, "cpu_capacity", if cpu < 4 { "512\n" } else { "1024\n" });
        }
        let topology = fake.read();
        assert_eq!(topology.kinds, [CoreKind { cores: 1, speed: 1.0 }, CoreKind { cores: 4, speed: 0.5 }]);
        assert_eq!(topology.default_threads(), Some(5));
        assert_eq!(topology.places(6), [4, 0, 1, 2, 3, 5]);
    }

    #[test]
    fn the_tightest_quota_around_the_process_counts() {
        let fake = Fake::new("0-7", "0-7");
        fake.put("proc/self/cgroup", "0::/a/b\n");
        fake.put("sys/fs/cgroup/a/b/cpu.max", "max 100000\n");
        assert_eq!(fake.read().quota, None);
        assert_eq!(fake.read().default_threads(), Some(8));
        fake.put("sys/fs/cgroup/a/cpu.max", "250000 100000\n");
        assert_eq!((fake.read().quota, fake.read().default_threads()), (Some(2.5), Some(2)));
        fake.put("sys/fs/cgroup/a/b/cpu.max", "50000 100000\n");
        assert_eq!((fake.read().quota, fake.read().default_threads()), (Some(0.5), Some(1)));
    }

    #[test]
    fn a_quota_of_version_1_counts_and_one_of_a_container_too() {
        let fake = Fake::new("0-7", "0-7");
        fake.put("proc/self/cgroup", "5:memory:/x\n4:cpu,cpuacct:/docker/abc\n0::/\n");
        fake.put("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1\n");
        fake.put("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n");
        assert_eq!(fake.read().quota, None);
        // A container sees its own group as the mount, under the name that the host has for it.
        fake.put("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "300000\n");
        assert_eq!((fake.read().quota, fake.read().default_threads()), (Some(3.0), Some(3)));
    }

    #[test]
    fn nodes_and_huge_pages_are_found() {
        let fake = Fake::new("0-3", "0-3");
        assert_eq!((fake.read().nodes, fake.read().huge_pages), (vec![], None));
        fake.put("sys/devices/system/node/has_memory", "0,2\n");
        fake.put("sys/devices/system/node/node0/cpulist", "0-1\n");
        fake.put("sys/devices/system/node/node2/cpulist", "2-3\n");
        fake.put("sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n");
        let topology = fake.read();
        assert_eq!(topology.nodes, [(0, set("0-1")), (2, set("2-3"))]);
        assert_eq!(topology.huge_pages.as_deref(), Some("madvise"));
    }

    #[test]
    fn nothing_known_is_nothing_claimed() {
        let empty = tempfile::tempdir().unwrap();
        assert_eq!(Topology::read(empty.path()), Topology::default());
        assert_eq!(Topology::default().default_threads(), None);
    }

    /// The standard library knows the mask and the quota too, by system calls.
    #[test]
    #[cfg(target_os = "linux")]
    fn this_machine_agrees_with_the_standard_library() {
        let topology = Topology::detect();
        if topology.allowed.is_empty() || !Path::new("/sys/fs/cgroup").exists() {
            println!("SKIPPED: a test that needs /proc and the files of cgroups");
            return;
        }
        let known = std::thread::available_parallelism().unwrap().get();
        let quota = topology.quota.map_or(usize::MAX, |quota| (quota.floor() as usize).max(1));
        assert_eq!(topology.allowed.len().min(quota), known, "{topology:?}");
    }
}
