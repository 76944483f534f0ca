//! Stand-ins: what takes the place of an FFN for the tokens where it is foretold to be good enough.
//!
//! In place of `FFN(x)`, x being the normed stream, a token then has
//!
//! ```text
//! base + W_wide (W_narrow x)
//! ```
//!
//! with `rank` rows in `W_narrow`: a few per cent of the FFN's bytes. Whether it is good enough is foretold from x itself,
//! before anything is read: the binary logarithm of what its error would cost is close to a linear function of x
//! (docs/skipping.md, "Stand-ins").

use super::calibration::{restored, stored, stored_type};
use crate::gguf::GgmlType;
use crate::quant::Matrix;

/// The stand-in of one layer's FFN.
#[derive(Clone, Debug, PartialEq)]
pub struct StandIn {
    /// `[embedding]`; with `bias`: the binary logarithm of what the stand-in's error is foretold to cost.
    pub probe: Vec<f32>,
    /// Added to the product with the probe.
    pub bias: f32,
    /// `[embedding]`
    pub base: Vec<f32>,
    rank: usize,
    /// `[rank, embedding]`, quantised.
    narrow: Vec<u8>,
    /// `[embedding, rank]`, quantised.
    wide: Vec<u8>,
}

/// Type of a matrix of a stand-in, by its columns: five bits where blocks fit. Four cost a tenth more divergence.
pub(super) fn matrix_type(cols: usize) -> GgmlType {
    if cols.is_multiple_of(GgmlType::Q5_0.block_len()) { GgmlType::Q5_0 } else { GgmlType::F16 }
}

impl StandIn {
    /// With the matrices `narrow`, `[rank, embedding]`, and `wide`, `[embedding, rank]`, all of it rounded as a file has it.
    ///
    /// # Panics
    /// If the lengths do not fit each other.
    pub fn new(probe: &[f32], bias: f32, base: &[f32], narrow: &[f32], wide: &[f32]) -> Self {
        let n = base.len();
        assert!(n > 0 && probe.len() == n && narrow.len() == wide.len() && narrow.len().is_multiple_of(n));
        let rank = narrow.len() / n;
        let rounded = |values: &[f32]| restored(n, stored_type(n), &stored(n, stored_type(n), values));
        Self {
            probe: rounded(probe),
            bias,
            base: rounded(base),
            rank,
            narrow: stored(n, matrix_type(n), narrow),
            wide: stored(rank, matrix_type(rank), wide),
        }
    }

    /// From the bytes of a file, which have the lengths that [`narrow_bytes`](Self::narrow_bytes) and
    /// [`wide_bytes`](Self::wide_bytes) state; `None` if they are no finite numbers.
    pub(super) fn from_bytes(
        (probe, bias, base): (&[f32], f32, &[f32]),
        rank: usize,
        narrow: &[u8],
        wide: &[u8],
    ) -> Option<Self> {
        let n = base.len();
        let finite =
            |cols, bytes: &[u8]| restored(cols, matrix_type(cols), bytes).iter().all(|v| v.is_finite());
        let made = Self {
            probe: probe.to_vec(),
            bias,
            base: base.to_vec(),
            rank,
            narrow: narrow.to_vec(),
            wide: wide.to_vec(),
        };
        (finite(n, narrow) && finite(rank, wide)).then_some(made)
    }

    /// Bytes of `W_narrow` for `embedding` inputs.
    pub(super) fn narrow_bytes(embedding: usize, rank: usize) -> usize {
        matrix_type(embedding).row_bytes(embedding) * rank
    }

    /// Bytes of `W_wide` for `embedding` outputs.
    pub(super) fn wide_bytes(embedding: usize, rank: usize) -> usize {
        matrix_type(rank).row_bytes(rank) * embedding
    }

    /// Rows of `W_narrow`.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// `W_narrow`, `[rank, embedding]`.
    pub fn narrow(&self) -> Matrix<'_> {
        view(self.rank, self.base.len(), &self.narrow)
    }

    /// `W_wide`, `[embedding, rank]`.
    pub fn wide(&self) -> Matrix<'_> {
        view(self.base.len(), self.rank, &self.wide)
    }

    /// Weight bytes that it reads.
    pub fn bytes(&self) -> usize {
        self.narrow.len() + self.wide.len()
    }
}

fn view(rows: usize, cols: usize, bytes: &[u8]) -> Matrix<'_> {
    Matrix::new(matrix_type(cols), rows, cols, bytes).unwrap_or_else(|error| unreachable!("{error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matrices_are_rounded_a_little() {
        let values = |n: usize| (0..n).map(|i| (i * 37 % 101) as f32 / 101.0 - 0.5).collect::<Vec<f32>>();
        let (n, rank) = (64, 32);
        let stand_in = StandIn::new(&values(n), -3.0, &values(n), &values(rank * n), &values(n * rank));
        assert_eq!((stand_in.rank(), stand_in.narrow().rows_len(), stand_in.wide().rows_len()), (32, 32, 64));
        assert_eq!(stand_in.bytes(), 2 * rank * n / 32 * 22);
        let mut row = vec![0.0; n];
        stand_in.narrow().dequantize_row(5, &mut row);
        for (got, expected) in row.iter().zip(&values(rank * n)[5 * n..]) {
            assert!((got - expected).abs() < 0.035, "{got} for {expected}");
        }
        // Rounded once, rounded for good.
        let again = StandIn::new(&stand_in.probe, -3.0, &stand_in.base, &values(rank * n), &values(n * rank));
        assert_eq!(again, stand_in);
    }
}
