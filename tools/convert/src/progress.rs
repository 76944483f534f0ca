//! A bar on stderr while a command runs, and the flag that Ctrl-C raises.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::ConvertError;

const BYTES: &str =
    "{prefix} {wide_msg} {bytes:>10}/{total_bytes} [{bar:24}] {bytes_per_sec:>12}, {eta} left";
const COUNT: &str = "{prefix} {pos}/{len} {msg} [{bar:24}] {per_sec:>12}, {eta} left";

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Lets Ctrl-C end the command at the next piece of work, its unfinished file removed.
pub fn catch_interrupts() {
    // Where that fails, Ctrl-C ends the process at once and leaves the unfinished file.
    let _ = ctrlc::set_handler(|| INTERRUPTED.store(true, Ordering::SeqCst));
}

/// Counts what is done; hidden where stderr is no terminal.
pub struct Progress {
    bar: ProgressBar,
    started: Instant,
}

impl Progress {
    /// Over `bytes`, of whatever the command works through.
    pub fn new(verb: &'static str, bytes: u64, quiet: bool) -> Self {
        Self::with(verb, BYTES, bytes, quiet)
    }

    /// Over `n` of something else.
    pub fn counting(verb: &'static str, what: &str, n: u64, quiet: bool) -> Self {
        let progress = Self::with(verb, COUNT, n, quiet);
        progress.at(what);
        progress
    }

    fn with(verb: &'static str, template: &str, n: u64, quiet: bool) -> Self {
        let bar = if quiet { ProgressBar::hidden() } else { ProgressBar::new(n) };
        // A test checks the templates; the default style still shows the position.
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_prefix(verb);
        if !bar.is_hidden() {
            bar.enable_steady_tick(Duration::from_millis(200));
        }
        Self { bar, started: Instant::now() }
    }

    /// Names what is being worked on.
    pub fn at(&self, what: &str) {
        self.bar.set_message(what.to_owned());
    }

    /// Counts `n` more.
    ///
    /// # Errors
    /// [`ConvertError::Interrupted`] after Ctrl-C.
    pub fn add(&self, n: u64) -> Result<(), ConvertError> {
        self.bar.inc(n);
        if INTERRUPTED.load(Ordering::SeqCst) { Err(ConvertError::Interrupted) } else { Ok(()) }
    }

    /// Removes the bar; the time since it was made.
    pub fn finish(&self) -> Duration {
        self.bar.finish_and_clear();
        self.started.elapsed()
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_templates_are_understood() {
        for template in [super::BYTES, super::COUNT] {
            super::ProgressStyle::with_template(template).expect("a valid template");
        }
    }
}
