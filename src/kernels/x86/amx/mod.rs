//! AMX: a unit that multiplies tiles of bytes, 16 by 64 times 64 by 16 an instruction, beside AVX-512 for all else.
//!
//! Rust's intrinsics for it are not stable, so this is assembler. What a process and a thread have to do first is here
//! (Intel SDM vol. 1, chapter 18; Linux, Documentation/arch/x86/xstate.rst): ask the system once for the tiles' state,
//! which is large, and load the shapes of the tiles once a thread.

mod attention;
mod gemm;
mod pack;

use std::arch::asm;
use std::arch::x86_64::{__cpuid_count, _xgetbv};
use std::cell::Cell;
use std::sync::OnceLock;

use super::avx512vnni;
use crate::kernels::{self, Functions, Isa, tiles};

pub(in crate::kernels) static ISA: Isa = Isa {
    name: "amx",
    needs: "AMX (tile, int8, bf16) with AVX-512 VNNI, and a system that grants it",
    detect,
    functions: Functions {
        tiles: Some(&TILES),
        attention: Some(&ATTENTION),
        panels_from: kernels::FEW_TOKENS + 1,
        ..avx512vnni::ISA.functions
    },
};

static TILES: tiles::Functions =
    tiles::Functions { pack: pack::pack, widen: pack::widen, multiply: gemm::multiply, turn: gemm::turn };

static ATTENTION: kernels::attention::Functions = kernels::attention::Functions {
    pack_rows: attention::pack_rows,
    pack_columns: attention::pack_columns,
    scale_values: |_, _, _| (),
    pack_turned: attention::pack_turned,
    attend: attention::attend,
    divide: attention::divide,
};

/// Whether CPU and system have it; asks the system for permission, once.
fn detect() -> bool {
    static GRANTED: OnceLock<bool> = OnceLock::new();
    (avx512vnni::ISA.detect)() && *GRANTED.get_or_init(|| cpu_has_tiles() && state_is_saved() && ask())
}

/// CPUID leaf 7: AMX-TILE, AMX-INT8 and AMX-BF16, of which no CPU has had one without the others.
fn cpu_has_tiles() -> bool {
    let all = 1 << 24 | 1 << 25 | 1 << 22;
    __cpuid_count(7, 0).edx & all == all
}

/// XCR0: the system saves the tiles' configuration and data for each thread.
fn state_is_saved() -> bool {
    #[target_feature(enable = "xsave")]
    fn xcr0() -> u64 {
        // SAFETY: register 0 always exists where `xgetbv` does.
        unsafe { _xgetbv(0) }
    }
    let tiles = 0b11 << 17;
    // `avx512vnni` needs AVX, which is only reported where the system has enabled XSAVE.
    // SAFETY: the CPU has XSAVE, as just said.
    is_x86_feature_detected!("xsave") && unsafe { xcr0() } & tiles == tiles
}

/// Asks the system to let this process use tiles: their state, 8 KiB a thread, is not there unasked.
#[cfg(target_os = "linux")]
fn ask() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: this call takes two numbers and no memory of ours.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn ask() -> bool {
    false
}

/// What `ldtilecfg` reads: the shapes of the eight tiles.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

const _: () = assert!(size_of::<Shapes>() == 64);

/// All eight tiles as large as they can be.
static SHAPES: Shapes = {
    let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
    let mut i = 0;
    while i < 8 {
        (row_bytes[i], rows[i]) = (64, 16);
        i += 1;
    }
    Shapes { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows }
};

/// Gives this thread's tiles their shapes, unless it has done so.
///
/// # Safety
/// * [`detect`] must have returned true.
unsafe fn configure() {
    thread_local! {
        static CONFIGURED: Cell<bool> = const { Cell::new(false) };
    }
    if !CONFIGURED.replace(true) {
        // SAFETY: the CPU has AMX and the system permits it, says the caller; all 64 bytes of a valid configuration are
        // read (a static's, so that no compiler takes the rest of them for unused).
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &raw const SHAPES, options(nostack, preserves_flags, readonly));
        }
    }
}

/// Sets the four sums, `tmm0` to `tmm3`, to zero.
///
/// # Safety
/// * The CPU has AMX, and this thread's tiles are configured.
#[inline(always)]
unsafe fn zero_sums() {
    // SAFETY: as the caller says; only tiles are changed.
    unsafe {
        asm!(
            "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            options(nostack, preserves_flags, nomem),
        );
    }
}

/// Writes the four sums, `tmm0` to `tmm3`, one behind the other.
///
/// # Safety
/// * The CPU has AMX, and this thread's tiles are configured.
/// * `T` is four tiles of 1024 bytes, for which any bits will do.
#[inline(always)]
unsafe fn store_sums<T>(to: &mut T) {
    const { assert!(size_of::<T>() == 4096) };
    // SAFETY: as the caller says; 4096 bytes are written.
    unsafe {
        asm!(
            "tilestored [{to} + {stride}*1], tmm0",
            "tilestored [{to} + {stride}*1 + 1024], tmm1",
            "tilestored [{to} + {stride}*1 + 2048], tmm2",
            "tilestored [{to} + {stride}*1 + 3072], tmm3",
            to = in(reg) &raw mut *to,
            stride = in(reg) 64usize,
            options(nostack, preserves_flags),
        );
    }
}

/// Runs `rounds` rounds of four products of tiles of ones that are loaded before, and returns an element of their sum: see
/// `kernels::peak`.
///
/// # Safety
/// * [`detect`] must have returned true.
pub(in crate::kernels) unsafe fn burst(rounds: usize) -> i32 {
    let ones = [1i8; 1024];
    let mut sum = [[0i32; 16]; 16];
    // SAFETY: the tiles have their shapes; loads and the store are of 16 rows of 64 bytes, 64 apart.
    unsafe {
        configure();
        asm!(
            "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
            "tileloadd tmm4, [{ones} + {stride}*1]",
            "tileloadd tmm5, [{ones} + {stride}*1]",
            "test {rounds}, {rounds}",
            "jz 3f",
            "2:",
            "tdpbssd tmm0, tmm4, tmm5", "tdpbssd tmm1, tmm4, tmm5",
            "tdpbssd tmm2, tmm4, tmm5", "tdpbssd tmm3, tmm4, tmm5",
            "dec {rounds}",
            "jnz 2b",
            "3:",
            "tilestored [{sum} + {stride}*1], tmm0",
            ones = in(reg) &raw const ones,
            stride = in(reg) 64usize,
            rounds = inout(reg) rounds => _,
            sum = in(reg) &raw mut sum,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm5") _,
            options(nostack),
        );
    }
    sum[0][0]
}
