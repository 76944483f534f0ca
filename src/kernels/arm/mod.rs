//! aarch64: one folder an instruction set, the same file names in each.

pub(super) mod dotprod;
pub(super) mod i8mm;
pub(super) mod neon;
