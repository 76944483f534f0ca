//! Block structs of the quantised types, scalar quantise and dequantise, and the [`Matrix`] view.
//!
//! No SIMD, no threads, no files: this is the reference that every kernel is tested against.
