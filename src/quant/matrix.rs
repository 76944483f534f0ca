//! A view of a weight matrix: bytes that are known to be as long as its shape says.

use super::assert_row;
use crate::gguf::GgmlType;
use std::ops::Range;

/// `rows` rows of `cols` weights each, row after row, in borrowed bytes.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    ty: GgmlType,
    rows: usize,
    cols: usize,
    bytes: &'a [u8],
}

/// The bytes handed to [`Matrix::new`] do not have the size of its shape.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{bytes} bytes are not a {ty} matrix of {rows} rows and {cols} columns")]
pub struct ShapeError {
    /// Element type asked for.
    pub ty: GgmlType,
    /// Rows asked for.
    pub rows: usize,
    /// Weights per row asked for.
    pub cols: usize,
    /// Bytes at hand.
    pub bytes: usize,
}

impl<'a> Matrix<'a> {
    /// Checks that `cols` is a whole number of blocks and that `bytes` is exactly `rows` such rows.
    pub fn new(ty: GgmlType, rows: usize, cols: usize, bytes: &'a [u8]) -> Result<Self, ShapeError> {
        let blocks = cols.is_multiple_of(ty.block_len()).then_some(cols / ty.block_len());
        let expected = blocks.and_then(|n| n.checked_mul(ty.block_bytes())).and_then(|n| n.checked_mul(rows));
        if expected == Some(bytes.len()) {
            Ok(Self { ty, rows, cols, bytes })
        } else {
            Err(ShapeError { ty, rows, cols, bytes: bytes.len() })
        }
    }

    /// Element type.
    #[inline]
    pub fn ty(&self) -> GgmlType {
        self.ty
    }

    /// Number of rows: the outputs of a matrix-vector product.
    #[inline]
    pub fn rows_len(&self) -> usize {
        self.rows
    }

    /// Weights per row: the inputs of a matrix-vector product.
    #[inline]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// All bytes.
    #[inline]
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Bytes from one row to the next.
    #[inline]
    pub fn row_bytes(&self) -> usize {
        self.ty.row_bytes(self.cols)
    }

    /// The bytes of row `i`.
    ///
    /// # Panics
    /// If there is no such row.
    #[inline]
    pub fn row(&self, i: usize) -> &'a [u8] {
        self.rows(i..i + 1)
    }

    /// The bytes of some rows.
    ///
    /// # Panics
    /// If the range is not inside the matrix.
    #[inline]
    pub fn rows(&self, range: Range<usize>) -> &'a [u8] {
        assert!(range.start <= range.end && range.end <= self.rows, "rows {range:?} of {}", self.rows);
        let n = self.row_bytes();
        &self.bytes[range.start * n..range.end * n]
    }

    /// Decodes row `i` into `out`.
    ///
    /// # Panics
    /// If there is no such row or `out` is not `cols` long.
    pub fn dequantize_row(&self, i: usize, out: &mut [f32]) {
        assert_row(self.ty, self.row_bytes(), out.len());
        super::dequantize_row(self.ty, self.row(i), out);
    }
}

impl std::fmt::Debug for Matrix<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Matrix({} {}x{})", self.ty, self.rows, self.cols) // not its megabytes
    }
}
