//! `skiff-convert`: see [`skiff_convert::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    skiff_convert::cli::main()
}
