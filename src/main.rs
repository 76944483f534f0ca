//! The `skiff` command; everything is in [`skiff::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    skiff::cli::main()
}
