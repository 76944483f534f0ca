//! x86-64: one folder an instruction set, the same file names in each.

pub(super) mod amx;
mod attention;
pub(super) mod avx2;
pub(super) mod avx512vnni;
pub(super) mod avxvnni;

use std::arch::x86_64::__cpuid;
use std::sync::LazyLock;

use super::layout::{part, scales_mins_k4, scales_q3_k, word};

/// Whether AMD made this CPU: what it fetches ahead, and how soon, differs from Intel's.
fn is_amd() -> bool {
    static IS_AMD: LazyLock<bool> = LazyLock::new(|| {
        #[allow(unused_unsafe)] // an unsafe function for older compilers
        // SAFETY: every x86-64 CPU has the instruction.
        let id = unsafe { __cpuid(0) };
        [id.ebx, id.edx, id.ecx].map(u32::to_le_bytes).concat() == b"AuthenticAMD"
    });
    *IS_AMD
}

/// The values of IQ4_NL and IQ4_XS, 128 too large so that they are unsigned.
const IQ4_VALUES: [u8; 16] = [1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241];

/// The body of `dot_tokens`: `$tokens::<_, T>` for as many tokens at a time as the first of the numbers `$n` that are left, the
/// last of which is 1.
macro_rules! each_tokens {
    ($tokens:ident, $ty:ident, $weights:ident, $x:ident, $out:ident, $($n:literal)+) => {
        let (n, mut t, mut rest) = ($weights.len(), 0, $out);
        while t < $x.rows() {
            $(if $x.rows() - t >= $n {
                let (now, later) = rest.split_at_mut($n * n);
                let mut now = now.chunks_exact_mut(n);
                let outs = std::array::from_fn(|_| now.next().expect("as many as there are tokens"));
                $tokens::<_, $n>($ty, $weights, &std::array::from_fn(|i| $x.row(t + i)), outs);
                (t, rest) = (t + $n, later);
                continue;
            })+
        }
    };
}
use each_tokens;
