//! Activations quantised to 8 bits: what the integer kernels multiply the weights with.

/// Columns per scale.
pub const BLOCK: usize = 32;
/// Rows are padded with zeros to a multiple of this, so that kernels need no column tails.
const PAD: usize = 256;
/// Columns between rows: the width of a matrix is often a power of two, and rows so far apart would share a few sets of
/// the caches, which many rows then do not stay in.
const GAP: usize = 64;

/// Rows of activations: `x ~ scale * q`, a scale (f32) for every 32 columns, and the sum of `q` over
/// every 16, which turns a weight's zero point and minimum into one multiplication a group.
#[derive(Default)]
pub struct Activations {
    rows: usize,
    cols: usize,
    /// Columns from a row's first to the next one's: `padded`, and a gap.
    stride: usize,
    q: Vec<i8>,
    scale: Vec<f32>,
    sum: Vec<i32>,
}

/// One row, padded: `q` holds a multiple of 256 columns of which the first `cols` count.
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct Q8Row<'a> {
    pub cols: usize,
    pub q: &'a [i8],
    pub scale: &'a [f32],
    pub sum: &'a [i32],
}

/// One row to be written.
#[allow(missing_docs)]
pub struct Q8RowMut<'a> {
    pub q: &'a mut [i8],
    pub scale: &'a mut [f32],
    pub sum: &'a mut [i32],
}

impl Q8Row<'_> {
    /// `out = values - what this row holds from column `at` on`.
    pub fn residual(&self, at: usize, values: &[f32], out: &mut [f32]) {
        let blocks = values.chunks(BLOCK).zip(out.chunks_mut(BLOCK));
        for (b, (values, out)) in blocks.enumerate() {
            let first = at + b * BLOCK;
            let (scale, q) = (self.scale[first / BLOCK], &self.q[first..]);
            for ((out, v), q) in out.iter_mut().zip(values).zip(q) {
                *out = v - scale * f32::from(*q);
            }
        }
    }
}

impl Q8RowMut<'_> {
    /// The columns from `at` (a multiple of the padding) on, padded like a row of `cols`.
    pub fn part(&mut self, at: usize, cols: usize) -> Q8RowMut<'_> {
        assert!(at.is_multiple_of(PAD));
        let n = cols.next_multiple_of(PAD);
        Q8RowMut {
            q: &mut self.q[at..][..n],
            scale: &mut self.scale[at / BLOCK..][..n / BLOCK],
            sum: &mut self.sum[at / 16..][..n / 16],
        }
    }
}

/// Several rows from some column on. Row `t` starts `t * stride` columns after row 0.
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct Q8Rows<'a> {
    pub rows: usize,
    pub stride: usize,
    pub q: &'a [i8],
    pub scale: &'a [f32],
    pub sum: &'a [i32],
}

impl Activations {
    /// Room for `rows` rows of `cols` columns: later calls of [`reshape`](Self::reshape) within it
    /// allocate nothing.
    pub fn with_capacity(rows: usize, cols: usize) -> Self {
        let mut acts = Self::default();
        acts.reshape(rows, cols);
        acts
    }

    /// Makes this `rows x cols`; the contents are to be written anew.
    pub fn reshape(&mut self, rows: usize, cols: usize) {
        (self.rows, self.cols, self.stride) = (rows, cols, cols.next_multiple_of(PAD) + GAP);
        let n = rows * self.stride;
        if self.q.len() < n {
            self.q.resize(n, 0);
            self.scale.resize(n / BLOCK, 0.0);
            self.sum.resize(n / 16, 0);
        }
    }

    /// Columns of a row with its padding.
    fn padded(&self) -> usize {
        self.cols.next_multiple_of(PAD)
    }

    /// Room for more rows behind those there are, which stay.
    pub fn add_rows(&mut self, more: usize) {
        let rows = self.rows + more;
        self.reshape(rows, self.cols);
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns, without the padding.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Row `row`.
    pub fn row(&self, row: usize) -> Q8Row<'_> {
        assert!(row < self.rows);
        let (s, n) = (self.stride, self.padded());
        Q8Row {
            cols: self.cols,
            q: &self.q[row * s..][..n],
            scale: &self.scale[row * (s / BLOCK)..][..n / BLOCK],
            sum: &self.sum[row * (s / 16)..][..n / 16],
        }
    }

    /// Row `row`, to be written by `Kernels::quantize`.
    pub fn row_mut(&mut self, row: usize) -> Q8RowMut<'_> {
        assert!(row < self.rows);
        let (s, n) = (self.stride, self.padded());
        Q8RowMut {
            q: &mut self.q[row * s..][..n],
            scale: &mut self.scale[row * (s / BLOCK)..][..n / BLOCK],
            sum: &mut self.sum[row * (s / 16)..][..n / 16],
        }
    }

    /// All rows, each a separate mutable view: for quantising in parallel.
    pub fn rows_mut(&mut self) -> impl Iterator<Item = Q8RowMut<'_>> {
        let (s, n, rows) = (self.stride.max(GAP), self.padded(), self.rows);
        let parts =
            self.q.chunks_mut(s).zip(self.scale.chunks_mut(s / BLOCK)).zip(self.sum.chunks_mut(s / 16));
        parts.take(rows).map(move |((q, scale), sum)| Q8RowMut {
            q: &mut q[..n],
            scale: &mut scale[..n / BLOCK],
            sum: &mut sum[..n / 16],
        })
    }

    /// Rows `rows` from column `col` (a multiple of 32) on.
    pub fn from_col(&self, rows: std::ops::Range<usize>, col: usize) -> Q8Rows<'_> {
        assert!(col.is_multiple_of(BLOCK) && col <= self.padded() && rows.end <= self.rows);
        let first = rows.start * self.stride + col;
        Q8Rows {
            rows: rows.len(),
            stride: self.stride,
            q: &self.q[first..],
            scale: &self.scale[first / BLOCK..],
            sum: &self.sum[first / 16..],
        }
    }
}
