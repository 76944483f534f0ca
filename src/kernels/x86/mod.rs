//! x86-64: one folder an instruction set, the same file names in each.

pub(super) mod amx;
pub(super) mod avx2;
pub(super) mod avx512vnni;
pub(super) mod avxvnni;

use super::layout::{part, scales_mins_k4, scales_q3_k, word};

/// The values of IQ4_NL and IQ4_XS, 128 too large so that they are unsigned.
const IQ4_VALUES: [u8; 16] = [1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241];
