//! Memory that is kept from being swapped or dropped (`mlock`).

use std::io;

use memmap2::Mmap;

use super::WeightsError;

/// Keeps the bytes of a file in memory.
#[cfg(unix)]
pub(super) fn lock(map: &Mmap) -> io::Result<()> {
    map.lock()
}

/// Keeps the bytes of a file in memory, where the system can do that.
#[cfg(not(unix))]
pub(super) fn lock(_: &Mmap) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Turns the outcome of locking `bytes` of `what` into an error that tells what to do.
pub fn locked(what: &str, bytes: usize, outcome: io::Result<()>) -> Result<(), WeightsError> {
    outcome.map_err(|error| {
        let (what, bytes) = (what.to_owned(), bytes as u64);
        let limit = std::fs::read_to_string("/proc/self/limits").ok().and_then(|limits| lock_limit(&limits));
        WeightsError::Lock { what, bytes, error, limit }
    })
}

/// The soft limit of locked bytes in the text of `/proc/self/limits`; `None` if there is none.
fn lock_limit(limits: &str) -> Option<u64> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max locked memory"))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_found_and_named() {
        let limits = "Limit      Soft Limit  Hard Limit  Units\n\
                      Max locked memory         8388608              8388608              bytes\n";
        assert_eq!(lock_limit(limits), Some(8_388_608));
        assert_eq!(lock_limit("Max locked memory unlimited unlimited bytes"), None);
        let error = WeightsError::Lock {
            what: "m.gguf".into(),
            bytes: 9,
            error: io::ErrorKind::OutOfMemory.into(),
            limit: Some(8_388_608),
        };
        let text = error.to_string();
        assert!(text.starts_with("--mlock: m.gguf (9 bytes) cannot be kept in memory: "), "{text}");
        assert!(text.contains("RLIMIT_MEMLOCK is 8388608 bytes: raise it with `ulimit -l"), "{text}");
        assert!(locked("x", 1, Ok(())).is_ok());
    }
}
