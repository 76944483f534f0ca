//! Calibrations that come with the program.

/// Calibrations of well-known models, by name: files as `skiff calibrate` writes them, each for the one model whose
/// fingerprint it bears.
pub const BUILT_IN: [(&str, &[u8]); 1] = [("smollm2", include_bytes!("built_in/smollm2.skip.gguf"))];
