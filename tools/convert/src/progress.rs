//! A bar on stderr while a command runs, and the flag that Ctrl-C raises.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::ConvertError;

const TEMPLATE: &str =
    "{prefix} {wide_msg} {bytes:>10}/{total_bytes} [{bar:24}] {bytes_per_sec:>12}, {eta} left";

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Lets Ctrl-C end the command at the next piece of work, its unfinished file removed.
pub fn catch_interrupts() {
    // Where that fails, Ctrl-C ends the process at once and leaves the unfinished file.
    let _ = ctrlc::set_handler(|| INTERRUPTED.store(true, Ordering::SeqCst));
}

/// Counts bytes done; hidden where stderr is no terminal.
pub struct Progress {
    bar: ProgressBar,
    started: Instant,
}

impl Progress {
    /// Over `bytes`, of whatever the command works through.
    pub fn new(verb: &'static str, bytes: u64, quiet: bool) -> Self {
        let bar = if quiet { ProgressBar::hidden() } else { ProgressBar::new(bytes) };
        // The template is a constant that a test checks; the default style still shows the position.
        if let Ok(style) = ProgressStyle::with_template(TEMPLATE) {
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

    /// Counts `bytes` more.
    ///
    /// # Errors
    /// [`ConvertError::Interrupted`] after Ctrl-C.
    pub fn add(&self, bytes: u64) -> Result<(), ConvertError> {
        self.bar.inc(bytes);
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
    fn the_template_is_understood() {
        super::ProgressStyle::with_template(super::TEMPLATE).expect("a valid template");
    }
}
