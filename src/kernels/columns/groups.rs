//! What products with chosen columns share: where the columns of a group are, and the fetching of the next group.

use std::ops::Range;

use super::{BUNDLE, Bundle, Chosen, ChosenGroup, start_of};
use crate::kernels::fetch::{LINE, fetch_line};
use crate::quant::columns::{Coarse, Codes, ColumnStrip};

/// How a kernel reads codes; the values of `KIND`.
pub(in crate::kernels) const NIBBLES: u8 = 0;
pub(in crate::kernels) const NIBBLES_AND_HIGH: u8 = 1;
pub(in crate::kernels) const TABLE: u8 = 2;
pub(in crate::kernels) const BYTES: u8 = 3;

/// Most bundles of a group: 32 columns, of which a part is coarse.
const BUNDLES: usize = 9;

/// A group, its chosen columns and where they are.
pub(in crate::kernels) struct Group<'a> {
    pub strip: &'a ColumnStrip<'a>,
    /// The first output wanted.
    pub first: usize,
    /// Its scales, its mins and its columns.
    pub bytes: &'a [u8],
    /// Bundles of whole columns, of which there are `fine`, and then of coarse ones.
    pub bundles: &'a [Bundle],
    pub fine: usize,
    /// Where the columns are; of coarse ones, where their upper bits are.
    pub columns: [[*const u8; BUNDLE]; BUNDLES],
    /// Whole and coarse columns without those that fill up the last bundle.
    distinct: [usize; 2],
    /// Scale of the activations.
    pub scale: f32,
    /// Sum of the activations, and of their integers.
    pub sum: f32,
    #[cfg_attr(target_arch = "aarch64", allow(dead_code))] // of use where 8 is taken off nibbles
    pub count: i32,
    /// What the dot products start from.
    pub start: i32,
}

/// The groups of a product, one after the other.
pub(in crate::kernels) struct Groups<'a> {
    strip: &'a ColumnStrip<'a>,
    chosen: Chosen<'a>,
    runs: Runs,
    first: usize,
    /// The next group, and where its bundles begin.
    next: usize,
    at: usize,
}

impl<'a> Groups<'a> {
    /// Those of a product for some outputs.
    #[inline]
    pub fn new(strip: &'a ColumnStrip<'a>, chosen: Chosen<'a>, outputs: &Range<usize>) -> Self {
        let (first, at) = (outputs.start, chosen.start as usize);
        Self { strip, chosen, runs: Runs::new(strip, outputs), first, next: 0, at }
    }

    /// The next group.
    #[inline]
    pub fn take(&mut self) -> Option<Group<'a>> {
        let g = self.chosen.groups.get(self.next)?;
        let bundles = &self.chosen.bundles[self.at..g.end as usize];
        let fine = g.coarse as usize - self.at;
        (self.next, self.at) = (self.next + 1, g.end as usize);
        Some(Group::new(self.strip, g, (bundles, fine), self.first))
    }

    /// The fetching of a group in `steps` steps; nothing, if there is none.
    #[inline]
    pub fn fetch<'g>(&self, group: Option<&'g Group<'_>>, steps: usize) -> Fetch<'g> {
        let Runs { scales, column, coarse } = self.runs;
        let Some(group) = group else {
            let (columns, base) = ([(&[][..], column); 2], std::ptr::null());
            return Fetch { columns, base, runs: [NOTHING; 2], due: 0, rate: 0 };
        };
        let [whole, upper] = [(0, group.distinct[0]), (group.fine * BUNDLE, group.distinct[1])]
            .map(|(from, n)| &group.columns.as_flattened()[from..from + n]);
        let lines = |runs: &[Run; 2]| runs[0].lines + runs[1].lines;
        let all = lines(&scales) + whole.len() * lines(&column) + upper.len() * lines(&coarse);
        let rate = (all << DUE).div_ceil(steps);
        let columns = [(whole, column), (upper, coarse)];
        Fetch { columns, base: group.bytes.as_ptr(), runs: scales, due: 0, rate }
    }
}

impl<'a> Group<'a> {
    #[inline]
    fn new(
        strip: &'a ColumnStrip<'a>,
        g: &ChosenGroup,
        (bundles, fine): (&'a [Bundle], usize),
        first: usize,
    ) -> Self {
        let group = g.group as usize;
        let bytes = &strip.groups[group * strip.group_bytes..][..strip.group_bytes];
        let mut columns = [[bytes.as_ptr(); BUNDLE]; BUNDLES];
        let whole = (strip.scale_bytes(), strip.column_bytes);
        let upper = strip.coarse.map_or(whole, |Coarse { at, stride, .. }| (at, stride));
        for (n, (columns, bundle)) in columns.iter_mut().zip(bundles).enumerate() {
            let (at, stride) = if n < fine { whole } else { upper };
            for (column, &col) in columns.iter_mut().zip(&bundle.cols) {
                let in_group = col as usize - group * strip.group_len;
                *column = bytes.as_ptr().wrapping_add(at + in_group * stride);
            }
        }
        let (sum, start) = (g.scale * g.sum as f32, start_of(strip, g));
        let distinct = [distinct(&bundles[..fine]), distinct(&bundles[fine..])];
        Self {
            strip,
            first,
            bytes,
            bundles,
            fine,
            columns,
            distinct,
            scale: g.scale,
            sum,
            count: g.sum,
            start,
        }
    }
}

/// Columns of bundles without those that fill up the last one.
#[inline]
fn distinct(bundles: &[Bundle]) -> usize {
    let last = bundles.last().map_or([0; BUNDLE], |bundle| bundle.cols);
    let repeated = last[1..].iter().filter(|&&col| col == last[0]).count();
    (BUNDLE * bundles.len()).saturating_sub(repeated)
}

/// Lines that follow one another.
#[derive(Clone, Copy)]
struct Run {
    offset: usize,
    lines: usize,
}

/// None of them.
const NOTHING: Run = Run { offset: 0, lines: 0 };

/// What the outputs that are wanted need of a group, and of a column.
#[derive(Clone, Copy)]
struct Runs {
    /// Scales and mins.
    scales: [Run; 2],
    /// Low and high part.
    column: [Run; 2],
    /// Upper bits, and nothing.
    coarse: [Run; 2],
}

impl Runs {
    fn new(strip: &ColumnStrip<'_>, outputs: &Range<usize>) -> Self {
        let Range { start, end } = *outputs;
        let run = |start: usize, end: usize| {
            let offset = start / LINE * LINE;
            Run { offset, lines: (end - offset).div_ceil(LINE) }
        };
        let (low, high) = match strip.codes {
            Codes::Bytes => (run(start, end), 0),
            Codes::Table => (run(start / 2, end / 2), 0),
            Codes::Nibbles { high } => (run(start / 2, end / 2), high),
        };
        let above = |at: usize| strip.low_bytes + at * high / 8;
        let high = if high > 0 { run(above(start), above(end)) } else { NOTHING };
        let mins = if strip.has_min { run(strip.width + start, strip.width + end) } else { NOTHING };
        let coarse = [run(start / 4, end / 4), NOTHING];
        Self { scales: [run(start, end), mins], column: [low, high], coarse }
    }
}

/// Binary digits of a fraction of a line that is due.
const DUE: u32 = 16;

/// A group that is being fetched: its scales and mins, then column after column, in runs that the memory system can follow.
/// Line by line, as evenly as they are needed: a burst of requests holds up the loads of what is computed meanwhile.
pub(in crate::kernels) struct Fetch<'g> {
    /// Columns that are left, and the runs of each: whole ones, and coarse ones.
    columns: [(&'g [*const u8], [Run; 2]); 2],
    /// What is left of the runs of the current part, which begins at `base`.
    base: *const u8,
    runs: [Run; 2],
    /// How many lines should be on their way by now, and how many more with each step.
    due: usize,
    rate: usize,
}

impl Fetch<'_> {
    /// Asks for what is due.
    #[inline]
    pub fn step(&mut self) {
        self.due += self.rate;
        while self.due >= 1 << DUE {
            if self.runs[0].lines == 0 && !self.turn() {
                return;
            }
            fetch_line(self.base.wrapping_add(self.runs[0].offset));
            self.runs[0].offset += LINE;
            self.runs[0].lines -= 1;
            self.due -= 1 << DUE;
        }
    }

    /// On to the next run, if there is one: of this part, or else of the next column.
    #[inline]
    fn turn(&mut self) -> bool {
        while self.runs[0].lines == 0 {
            if self.runs[1].lines > 0 {
                self.runs = [self.runs[1], NOTHING];
            } else {
                let [whole, coarse] = &mut self.columns;
                let (columns, runs) = if whole.0.is_empty() { coarse } else { whole };
                let Some((column, left)) = columns.split_first() else { return false };
                (self.base, self.runs, *columns) = (*column, *runs, left);
            }
        }
        true
    }
}

/// `$body` for each of `$pieces` of the outputs of group after group, while the next group is fetched, a step a bundle.
/// (Not a function: its closure would be called from code without the CPU's features.)
macro_rules! each_piece {
    ($groups:ident, $pieces:expr, |$group:ident, $piece:ident, $next:ident| $body:block) => {
        let pieces = $pieces;
        let mut ahead = $groups.take();
        $groups.fetch(ahead.as_ref(), 1).step();
        while let Some($group) = ahead {
            ahead = $groups.take();
            let mut $next = $groups.fetch(ahead.as_ref(), pieces.len() * $group.bundles.len());
            for $piece in pieces.clone() $body
        }
    };
}
pub(in crate::kernels) use each_piece;
