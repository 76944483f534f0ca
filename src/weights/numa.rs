//! Memory of machines with several nodes.
//!
//! Chunks of work go to whichever thread asks first, so no part of the weights or of the cache belongs to one thread,
//! and no placement makes all reads local. What can be had is the bandwidth of all nodes at once: pages alternate
//! between them. (What the page cache holds was placed when it was read; `--no-mmap` makes a copy that alternates.)

use std::path::Path;

use crate::topology;

/// Places the pages of `memory`, which nobody has touched yet, on all memory nodes in turn. On a machine with one
/// node, or where the system does not allow it, nothing happens: pages then lie where they are touched first.
pub fn interleave(memory: &mut [u8]) {
    let nodes: Vec<usize> = topology::nodes(Path::new("/")).iter().map(|node| node.0).collect();
    if nodes.len() > 1 {
        interleave_over(memory, &nodes);
    }
}

/// Whether the system took the advice.
#[cfg(target_os = "linux")]
fn interleave_over(memory: &mut [u8], nodes: &[usize]) -> bool {
    let mut mask = [0u64; 16];
    for &node in nodes.iter().filter(|&&node| node < 1024) {
        mask[node / 64] |= 1 << (node % 64);
    }
    // Whole pages inside `memory`: what is beyond belongs to others.
    const PAGE: usize = 64 << 10; // the largest page size of Linux's usual targets is a multiple of the others
    let from = memory.as_ptr().addr().next_multiple_of(PAGE);
    let to = (memory.as_ptr().addr() + memory.len()) / PAGE * PAGE;
    if from >= to {
        return false;
    }
    let skip = from - memory.as_ptr().addr();
    let start = memory[skip..].as_mut_ptr();
    // SAFETY: the range lies inside `memory`, which is borrowed mutably; a policy changes where pages will lie, not
    // what they hold. The kernel reads the 1024 bits of `mask` (it takes one less than `maxnode` says).
    let outcome = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            start,
            to - from,
            libc::MPOL_INTERLEAVE,
            mask.as_ptr(),
            1025usize,
            0usize,
        )
    };
    outcome == 0
}

#[cfg(not(target_os = "linux"))]
fn interleave_over(_: &mut [u8], _: &[usize]) -> bool {
    false
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use super::*;
    use crate::memory::{HUGE_PAGE, Pages};

    /// Interleaving over the one node that every machine has is a policy like any other: the kernel shows it.
    #[test]
    fn the_kernel_takes_the_policy() {
        let Some(&(node, _)) = topology::nodes(Path::new("/")).first() else {
            println!("SKIPPED: a test that needs a kernel that tells its memory nodes");
            return;
        };
        let mut pages = Pages::<u8>::zeroed(3 * HUGE_PAGE);
        if !interleave_over(&mut pages, &[node]) {
            println!("SKIPPED: a test that needs the system call mbind");
            return;
        }
        pages[HUGE_PAGE] = 1;
        let maps = std::fs::read_to_string("/proc/self/numa_maps").unwrap_or_default();
        let address = format!("{:x} ", pages.as_ptr().addr());
        if let Some(line) = maps.lines().find(|line| line.starts_with(&address)) {
            assert!(line.contains(&format!("interleave:{node}")), "{line}");
        }
    }

    #[test]
    fn what_is_smaller_than_a_page_is_left_alone() {
        assert!(!interleave_over(&mut [0; 100], &[0]));
        interleave(&mut []);
    }
}
