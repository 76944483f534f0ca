//! On which CPUs the calling thread may run. Threads inherit that from the one that starts them.

use std::io;

use crate::topology::{CpuSet, Topology};

/// Why threads cannot be kept on some CPUs.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum AffinityError {
    #[error("CPU {missing} is not among those that this process may use ({allowed})")]
    NotAllowed { missing: CpuSet, allowed: CpuSet },
    #[error("threads cannot be kept on CPUs {cpus}: {error}")]
    System { cpus: CpuSet, error: io::Error },
}

/// Keeps the calling thread, and those that it starts from now on, on `cpus`.
///
/// # Errors
/// One of the CPUs is not there or not this process' to use, or the system keeps threads on no CPU.
pub fn keep_on(cpus: &CpuSet) -> Result<(), AffinityError> {
    let allowed = Topology::detect().allowed;
    let missing = cpus.without(&allowed);
    if !missing.is_empty() {
        return Err(AffinityError::NotAllowed { missing, allowed });
    }
    set(cpus).map_err(|error| AffinityError::System { cpus: cpus.clone(), error })
}

#[cfg(target_os = "linux")]
pub(super) fn set(cpus: &CpuSet) -> io::Result<()> {
    let mut mask = [0u64; crate::topology::MAX_CPUS / 64];
    for cpu in cpus.iter() {
        mask[cpu / 64] |= 1 << (cpu % 64);
    }
    // SAFETY: the kernel reads `size_of_val(&mask)` bytes from `mask`, which lives longer than the call; 0 is the
    // calling thread. CPUs beyond those that the kernel knows are zeros, which it ignores.
    let failed = unsafe { libc::sched_setaffinity(0, size_of_val(&mask), mask.as_ptr().cast()) } != 0;
    if failed { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(not(target_os = "linux"))]
pub(super) fn set(_: &CpuSet) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use super::*;

    #[test]
    fn a_thread_stays_where_it_is_kept_and_hands_it_on() {
        let Some(first) = Topology::detect().allowed.iter().next() else {
            println!("SKIPPED: a test that needs a system that tells its CPUs");
            return;
        };
        let kept = std::thread::spawn(move || {
            keep_on(&CpuSet::from_iter([first])).unwrap();
            let inherited = std::thread::spawn(|| Topology::detect().allowed).join().unwrap();
            (Topology::detect().allowed, inherited)
        });
        let one = CpuSet::from_iter([first]);
        assert_eq!(kept.join().unwrap(), (one.clone(), one));
    }

    #[test]
    fn foreign_cpus_are_named() {
        let error = keep_on(&"8190-8191".parse().unwrap()).unwrap_err().to_string();
        assert!(error.starts_with("CPU 8190-8191 is not among those that this process may use ("), "{error}");
    }
}
