//! x86-64: one folder an instruction set, the same file names in each.

pub(super) mod amx;
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

/// The body of `dot_tokens`: `$tokens::<T>` for four tokens at a time, whose sums leave room in the registers for those of
/// four rows, and then for two and one.
macro_rules! each_four_tokens {
    ($tokens:ident, $ty:ident, $weights:ident, $x:ident, $out:ident) => {
        let n = $weights.len();
        let (mut t, mut rest) = (0, $out);
        while t < $x.rows() {
            match $x.rows() - t {
                1 => {
                    $tokens($ty, $weights, &[$x.row(t)], [&mut rest[..n]]);
                    return;
                }
                2 | 3 => {
                    let (now, later) = rest.split_at_mut(2 * n);
                    let (a, b) = now.split_at_mut(n);
                    $tokens($ty, $weights, &[$x.row(t), $x.row(t + 1)], [a, b]);
                    (t, rest) = (t + 2, later);
                }
                _ => {
                    let (now, later) = rest.split_at_mut(4 * n);
                    let (ab, cd) = now.split_at_mut(2 * n);
                    let ((a, b), (c, d)) = (ab.split_at_mut(n), cd.split_at_mut(n));
                    let four = [$x.row(t), $x.row(t + 1), $x.row(t + 2), $x.row(t + 3)];
                    $tokens($ty, $weights, &four, [a, b, c, d]);
                    (t, rest) = (t + 4, later);
                }
            }
        }
    };
}
use each_four_tokens;
