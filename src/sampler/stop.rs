//! Stop strings over a stream of text.
//!
//! Every stop string is matched by Knuth, Morris and Pratt's algorithm, so each byte is looked at in
//! amortised constant time a stop string, however the text is cut into pieces. Text that may still
//! turn out to be the start of a stop string is held back.

/// What one piece of text led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StopStep<'a> {
    /// Text that can be shown now.
    pub emit: &'a str,
    /// The stop string that was met; it and all that follows is dropped.
    pub stopped: Option<&'a str>,
}

/// Finds the stop string that ends first in a stream of text.
#[derive(Clone, Debug, Default)]
pub struct StopMatcher {
    stops: Vec<Stop>,
    /// Text not emitted before the last call: its first `emitted` bytes went out with that call.
    held: String,
    emitted: usize,
    hit: Option<usize>,
}

#[derive(Clone, Debug)]
struct Stop {
    text: String,
    /// `borders[i]`: the longest proper prefix of `text[..=i]` that is also its suffix.
    borders: Vec<usize>,
    matched: usize,
}

impl Stop {
    fn new(text: String) -> Self {
        let bytes = text.as_bytes();
        let mut borders = vec![0; bytes.len()];
        for i in 1..bytes.len() {
            borders[i] = extend(bytes, &borders, borders[i - 1], bytes[i]);
        }
        Self { text, borders, matched: 0 }
    }

    /// Takes one byte of text; whether it completes the stop string.
    fn step(&mut self, byte: u8) -> bool {
        self.matched = extend(self.text.as_bytes(), &self.borders, self.matched, byte);
        self.matched == self.text.len()
    }
}

/// The longest prefix of `text` that ends a text of which `matched` bytes matched before `byte` came.
fn extend(text: &[u8], borders: &[usize], mut matched: usize, byte: u8) -> usize {
    while matched > 0 && text.get(matched) != Some(&byte) {
        matched = borders[matched - 1];
    }
    if text.get(matched) == Some(&byte) { matched + 1 } else { 0 }
}

impl StopMatcher {
    /// A matcher for these strings; empty ones are ignored.
    pub fn new<S: Into<String>>(stops: impl IntoIterator<Item = S>) -> Self {
        let texts = stops.into_iter().map(Into::into).filter(|text: &String| !text.is_empty());
        Self { stops: texts.map(Stop::new).collect(), ..Self::default() }
    }

    /// Takes the next piece of text. After a stop nothing more is emitted.
    ///
    /// If several stop strings end at the same place, the longest counts.
    pub fn push(&mut self, piece: &str) -> StopStep<'_> {
        self.held.drain(..self.emitted);
        self.emitted = 0;
        if self.hit.is_none() {
            let start = self.held.len();
            self.held.push_str(piece);
            self.scan(start);
        }
        StopStep { emit: &self.held[..self.emitted], stopped: self.hit.map(|i| self.stops[i].text.as_str()) }
    }

    /// Ends the stream: the text that was held back, if no stop string was met.
    pub fn flush(&mut self) -> String {
        let rest = self.held.split_off(self.emitted);
        self.reset();
        rest
    }

    /// Forgets the text seen so far.
    pub fn reset(&mut self) {
        self.held.clear();
        self.emitted = 0;
        self.hit = None;
        self.stops.iter_mut().for_each(|stop| stop.matched = 0);
    }

    /// Reads `held` from `start` on and decides how much of it can go out.
    fn scan(&mut self, start: usize) {
        for (i, &byte) in self.held.as_bytes().iter().enumerate().skip(start) {
            if let Some(hit) = step_all(&mut self.stops, byte) {
                self.hit = Some(hit);
                self.emitted = i + 1 - self.stops[hit].text.len();
                self.held.truncate(self.emitted);
                return;
            }
        }
        // A match starts with the first byte of a stop string, hence at a character boundary.
        let pending = self.stops.iter().map(|stop| stop.matched).max().unwrap_or(0);
        self.emitted = self.held.len() - pending;
    }
}

/// The longest stop string that `byte` completes.
fn step_all(stops: &mut [Stop], byte: u8) -> Option<usize> {
    let mut hit = None;
    for (i, stop) in stops.iter_mut().enumerate() {
        if stop.step(byte) {
            hit = hit.max(Some((stop.text.len(), i)));
        }
    }
    hit.map(|(_, i)| i)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The text emitted before each piece's end, what flush adds, and the stop string met.
    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, String, Option<String>) {
        let mut matcher = StopMatcher::new(stops.iter().copied());
        let mut emitted = Vec::new();
        let mut stopped = None;
        for piece in pieces {
            let step = matcher.push(piece);
            emitted.push(step.emit.to_owned());
            stopped = step.stopped.map(str::to_owned);
        }
        (emitted, matcher.flush(), stopped)
    }

    #[test]
    fn a_stop_split_across_pieces_is_found_and_dropped() {
        let (emitted, rest, stopped) = run(&["</s>"], &["ab<", "/", "s>cd", "ef"]);
        assert_eq!(emitted, ["ab", "", "", ""]);
        assert_eq!((rest.as_str(), stopped.as_deref()), ("", Some("</s>")));
    }

    #[test]
    fn a_false_start_is_released() {
        let (emitted, rest, stopped) = run(&["</s>"], &["ab<", "/t", "x<"]);
        assert_eq!(emitted, ["ab", "</t", "x"]);
        assert_eq!((rest.as_str(), stopped), ("<", None));
    }

    #[test]
    fn overlapping_starts_are_not_lost() {
        assert_eq!(run(&["aab"], &["aa", "ab!"]).0, ["", "a"]);
        assert_eq!(run(&["abac"], &["xab", "abac"]).0, ["x", "ab"]);
    }

    #[test]
    fn the_stop_that_ends_first_wins_and_the_longest_of_those() {
        assert_eq!(
            run(&["abcd", "c"], &["xab", "cd"]),
            (vec!["x".into(), "ab".into()], String::new(), Some("c".into()))
        );
        assert_eq!(run(&["c", "bc"], &["abc"]).2.as_deref(), Some("bc"));
    }

    #[test]
    fn characters_are_never_cut() {
        // Both start with the byte 0xC3.
        let (emitted, _, stopped) = run(&["é!"], &["aè", "é", "é!"]);
        assert_eq!(emitted, ["aè", "", "é"]);
        assert_eq!(stopped.as_deref(), Some("é!"));
    }

    #[test]
    fn without_stops_everything_passes() {
        assert_eq!(run(&[""], &["a", "b"]), (vec!["a".into(), "b".into()], String::new(), None));
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(
            pieces in prop::collection::vec("[abé]{0,4}", 0..12),
            stops in prop::collection::vec("[abé]{0,3}", 0..3),
        ) {
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let text = pieces.concat();
            let (emitted, rest, stopped) = run(&stops, &pieces);

            let ends = (0..=text.len()).filter(|&i| text.is_char_boundary(i));
            let find = |end: usize| {
                let here = stops.iter().filter(|s| !s.is_empty() && text[..end].ends_with(**s));
                here.max_by_key(|s| s.len()).map(|s| (end - s.len(), *s))
            };
            let expected = ends.map(find).find(Option::is_some).flatten();
            let (cut, stop) = expected.map_or((text.len(), None), |(cut, stop)| (cut, Some(stop)));
            prop_assert_eq!(emitted.concat() + &rest, &text[..cut]);
            prop_assert_eq!(stopped.as_deref(), stop);
        }
    }
}
