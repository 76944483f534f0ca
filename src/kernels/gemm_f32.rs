//! f32 matrix products through the `gemm` crate: unquantised weights and attention over a prompt.

use super::Kernels;

/// A matrix of f32 with strides in elements.
#[derive(Clone, Copy)]
pub struct View<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> View<'a> {
    /// Row-major, rows of `cols`.
    pub fn rows(data: &'a [f32], cols: usize) -> Self {
        assert!(cols > 0 && data.len().is_multiple_of(cols));
        Self { data, rows: data.len() / cols, cols, row_stride: cols, col_stride: 1 }
    }

    /// The first `cols` columns.
    pub fn first_cols(self, cols: usize) -> Self {
        assert!(cols <= self.cols);
        Self { cols, ..self }
    }

    /// Rows for columns.
    pub fn transposed(self) -> Self {
        let Self { data, rows, cols, row_stride, col_stride } = self;
        Self { data, rows: cols, cols: rows, row_stride: col_stride, col_stride: row_stride }
    }
}

impl Kernels {
    /// `out = keep * out + a b` on this thread; `out` is row-major with rows `out_stride` apart.
    pub fn gemm_f32(&self, a: View<'_>, b: View<'_>, keep: f32, out: &mut [f32], out_stride: usize) {
        assert!(a.cols == b.rows && b.cols <= out_stride);
        let (m, n, k) = (a.rows, b.cols, a.cols);
        if m == 0 || n == 0 {
            return;
        }
        assert!(out.len() >= (m - 1) * out_stride + n);
        let inside = |v: &View<'_>| (v.rows - 1) * v.row_stride + (v.cols - 1) * v.col_stride < v.data.len();
        assert!(k > 0 && inside(&a) && inside(&b));
        // SAFETY: the largest offset of each operand was just asserted to lie inside its slice, and
        // `out` is borrowed mutably, so it overlaps neither `a` nor `b`.
        unsafe {
            gemm::gemm(
                m,
                n,
                k,
                out.as_mut_ptr(),
                1,
                out_stride as isize,
                keep != 0.0,
                a.data.as_ptr(),
                a.col_stride as isize,
                a.row_stride as isize,
                b.data.as_ptr(),
                b.col_stride as isize,
                b.row_stride as isize,
                keep,
                1.0,
                false,
                false,
                false,
                gemm::Parallelism::None,
            );
        }
    }
}
