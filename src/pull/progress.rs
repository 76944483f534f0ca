//! Progress on stderr: a bar on a terminal, one line elsewhere.

use indicatif::{ProgressBar, ProgressStyle};
use std::time::Duration;

const TEMPLATE: &str =
    "{prefix:>9} {wide_msg} {bytes:>10}/{total_bytes} [{bar:24}] {bytes_per_sec:>12}, {eta} left";

/// A bar over `bytes`. Where stderr is no terminal it stays hidden and one line says what has begun.
pub(super) fn bar(verb: &'static str, what: &str, bytes: u64) -> ProgressBar {
    let bar = ProgressBar::new(bytes);
    if bar.is_hidden() {
        eprintln!("{verb} {what} ({:.1} MB)", bytes as f64 / 1e6);
        return bar;
    }
    // The template is a constant that a test checks; the default style still shows the position.
    if let Ok(style) = ProgressStyle::with_template(TEMPLATE) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_prefix(verb);
    bar.set_message(what.to_owned());
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_template_is_understood() {
        super::ProgressStyle::with_template(super::TEMPLATE).expect("a valid template");
    }
}
