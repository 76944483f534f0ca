//! Logits of which only those of likely tokens are exact, so that most of the output matrix stays unread.
//!
//! A copy of the matrix in 4 bits, half of its bytes, estimates all logits; the rows of the largest few hundred are then read
//! from the matrix itself (as SVD-softmax does with the leading singular vectors, Shim et al., NeurIPS 2017). What 4 bits get
//! wrong is proportional to their input, so they are given what differs from the mean input, whose product is known, and what
//! they get wrong in the directions that differ most is a few more columns of the copy.

use std::ops::Range;

use super::{Buffers, Model, ModelError, Products};
use crate::gguf::GgmlType;
use crate::kernels::gemm_f32::View;
use crate::memory::{MemoryError, Pages};
use crate::ops::{
    Compute, Epilogue, Inputs, MatmulScratch, ShortlistScratch, matmul, norm_row, refine_largest, rms_norm,
};
use crate::quant::{self, Matrix};
use crate::skip::{OutputCalibration, SkipStats};
use crate::weights::locked;

/// Type of the copy.
const ROUGH: GgmlType = GgmlType::Q4_0;
/// Columns beside those of the matrix.
const DIRECTIONS: usize = OutputCalibration::DIRECTIONS;
/// Logits that are exact are about as many, if there are as many groups of 16: the 40 that sampling looks at by default were among
/// the 80 largest estimates (docs/skipping.md).
const EXACT: usize = 384;
/// The copy must save a quarter of the matrix to be worth its memory.
const WORTH: (usize, usize) = (3, 4);
/// Rows that a thread makes at a time.
const ROWS: usize = 64;

/// What a thread needs that makes the copy.
#[derive(Clone, Default)]
struct Encoder {
    /// What rows of the copy lack, `[rows, embedding]`.
    errors: Vec<f32>,
    row: Vec<f32>,
    /// That, along the directions, `[rows, DIRECTIONS]`.
    along: Vec<f32>,
}

/// The copy, and what its products lack.
pub(super) struct Shortlist {
    known: OutputCalibration,
    /// `[vocab, embedding + DIRECTIONS]`
    rough: Pages<u8>,
    /// Products of the matrix with the mean input, `[vocab]`.
    at_centre: Vec<f32>,
}

impl Shortlist {
    /// The copy of `output`; `scratch` has an element a thread.
    fn new(
        on: Compute<'_>,
        output: Matrix<'_>,
        known: OutputCalibration,
        scratch: &mut [MatmulScratch],
    ) -> Result<Self, MemoryError> {
        let (vocab, embedding) = (output.rows_len(), output.cols());
        let row_bytes = ROUGH.row_bytes(embedding + DIRECTIONS);
        let mut rough = Pages::try_zeroed(vocab * row_bytes)?;
        let mut encoders = vec![Encoder::default(); on.team.threads()];
        on.team.for_tiles(&mut rough, row_bytes, (ROWS, row_bytes), &mut encoders, |encoder, mut tile| {
            let rows = tile.rows();
            encoder.errors.resize(rows.len() * embedding, 0.0);
            for (row, error) in rows.clone().zip(encoder.errors.chunks_exact_mut(embedding)) {
                encoder.row.resize(embedding, 0.0);
                output.dequantize_row(row, error);
                let rough = &mut tile.row(row)[..ROUGH.row_bytes(embedding)];
                quant::quantize_row(ROUGH, error, rough);
                quant::dequantize_row(ROUGH, rough, &mut encoder.row);
                error.iter_mut().zip(&encoder.row).for_each(|(w, rough)| *w -= rough);
            }
            encoder.along.resize(rows.len() * DIRECTIONS, 0.0);
            let directions = View::rows(&known.directions, embedding).transposed();
            let errors = View::rows(&encoder.errors, embedding);
            on.kernels.gemm_f32(errors, directions, 0.0, &mut encoder.along, DIRECTIONS);
            for (row, along) in rows.zip(encoder.along.chunks_exact(DIRECTIONS)) {
                quant::quantize_row(ROUGH, along, &mut tile.row(row)[ROUGH.row_bytes(embedding)..]);
            }
        });
        let mut centre = Inputs::with_refined_capacity(1, embedding);
        centre.reshape(1, embedding);
        centre.fill(on, |_, x| x.copy_from_slice(&known.centre));
        centre.refine(on);
        let mut at_centre = vec![0.0; vocab];
        matmul(on, &[output], &centre, Epilogue::Store, &mut at_centre, scratch);
        Ok(Self { known, rough, at_centre })
    }

    fn rough(&self, (vocab, embedding): (usize, usize)) -> Matrix<'_> {
        Matrix::new(ROUGH, vocab, embedding + DIRECTIONS, &self.rough)
            .unwrap_or_else(|error| unreachable!("{error}"))
    }

    /// What the copy takes in the place of an input of the matrix, which `x` begins with.
    fn input(&self, on: Compute<'_>, x: &mut [f32]) {
        let (x, along) = x.split_at_mut(self.known.centre.len());
        x.iter_mut().zip(&self.known.centre).for_each(|(x, centre)| *x -= centre);
        for (along, direction) in along.iter_mut().zip(self.known.directions.chunks_exact(x.len())) {
            *along = on.kernels.dot_f32(direction, x);
        }
    }
}

/// Buffers of shortlists: allocated with a state, used in every step.
pub(super) struct ShortlistBuffers {
    /// `[rows, embedding + DIRECTIONS]`
    rough: Inputs,
    /// `[1, embedding]`: normed stream of a row, refined.
    exact: Inputs,
    scratch: ShortlistScratch,
    /// Rows of the last step whose logits are shortlisted, each.
    pub listed: Vec<bool>,
    /// Rows of the last call for logits that were, and the weight bytes that they left unread.
    pub unread: (u64, i64),
}

impl ShortlistBuffers {
    /// For steps of up to `batch` rows; nothing for models without a shortlist.
    pub fn new(model: &Model, batch: usize, products: Products) -> Option<Self> {
        model.shortlist.as_ref()?;
        let (vocab, embedding) = (model.config.vocab, model.config.embedding);
        let rough = Inputs::with_capacity(batch, embedding + DIRECTIONS);
        Some(Self {
            rough: rough.by_panels(products == Products::AsForMany),
            exact: Inputs::with_refined_capacity(1, embedding),
            scratch: ShortlistScratch::with_capacity(vocab),
            listed: Vec::with_capacity(batch),
            unread: (0, 0),
        })
    }
}

impl Model {
    /// Bytes of a copy of the output matrix that estimates logits; `None` where that is hardly smaller than the matrix, or none
    /// can be made.
    pub fn shortlist_bytes(&self) -> Option<usize> {
        let (vocab, embedding, ty) = (self.config.vocab, self.config.embedding, self.output.matrix().ty());
        let fits = quant::is_quantised(ty) && embedding.is_multiple_of(ROUGH.block_len());
        let bytes = fits.then(|| vocab * ROUGH.row_bytes(embedding + DIRECTIONS))?;
        (WORTH.1 * bytes <= WORTH.0 * self.output.bytes()).then_some(bytes)
    }

    /// Makes the copy of the output matrix, for policies that [shortlist](crate::skip::SkipPolicy::shortlists): as much memory as
    /// [`shortlist_bytes`](Self::shortlist_bytes) says. Where that is none, logits stay exact. States made before do not have the
    /// buffers for it.
    ///
    /// # Errors
    /// What is known is of another embedding, or there is not enough memory.
    pub fn prepare_shortlist(&mut self, on: Compute<'_>, known: OutputCalibration) -> Result<(), ModelError> {
        let (embedding, vocab) = (self.config.embedding, self.config.vocab);
        let found = (known.centre.len(), known.directions.len());
        if found != (embedding, DIRECTIONS * embedding) {
            return Err(ModelError::Shortlist { found, embedding, directions: DIRECTIONS });
        }
        if self.shortlist_bytes().is_some() {
            let threads = on.team.threads();
            let scratch = || MatmulScratch::with_capacity(1, vocab.div_ceil(4 * threads));
            let mut scratch: Vec<_> = (0..threads).map(|_| scratch()).collect();
            let made = Shortlist::new(on, self.output.matrix(), known, &mut scratch);
            let mut made = made.map_err(ModelError::ShortlistMemory)?;
            if self.locked {
                locked("the copy of the output matrix", made.rough.len(), made.rough.lock())?;
            }
            self.shortlist = Some(made);
        }
        Ok(())
    }

    /// Share of the output matrix that a token left unread whose logits were shortlisted, the copy's bytes counted as read.
    pub fn output_share(&self, stats: &SkipStats) -> f64 {
        stats.output_unread_by_token() / self.output.bytes() as f64
    }

    /// Whether there is such a copy.
    pub fn has_shortlist(&self) -> bool {
        self.shortlist.is_some()
    }

    /// Gives up what [`prepare_shortlist`](Self::prepare_shortlist) made.
    pub fn drop_shortlist(&mut self) {
        self.shortlist = None;
    }

    /// Logits of the rows `rows` of the last step, `[rows, vocab]`: estimates, of which the largest few hundred of each row are
    /// replaced by the exact ones.
    pub(super) fn project_shortlist(
        &self,
        on: Compute<'_>,
        s: &mut Buffers,
        shortlist: &Shortlist,
        rows: Range<usize>,
        out: &mut [f32],
    ) {
        let Some(buffers) = &mut s.shortlist else { return };
        let (c, norm, output) = (&self.config, &self.output_norm, self.output.matrix());
        let (d, first) = (c.embedding, rows.start);
        buffers.rough.reshape(rows.len(), d + DIRECTIONS);
        buffers.rough.fill(on, |i, x| {
            norm_row(on, &s.x[(first + i) * d..][..d], norm, c.norm_eps, &mut x[..d]);
            shortlist.input(on, x);
        });
        let rough = shortlist.rough((c.vocab, d));
        matmul(on, &[rough], &buffers.rough, Epilogue::Bias(&shortlist.at_centre), out, &mut s.matmul);
        for (row, out) in rows.zip(out.chunks_exact_mut(c.vocab)) {
            rms_norm(on, &s.x, &[row], norm, c.norm_eps, &mut buffers.exact);
            buffers.exact.refine(on);
            let (scratch, exact) = (&mut buffers.scratch, &buffers.exact);
            let exact = refine_largest(on, output, exact, EXACT, out, scratch, &mut s.matmul);
            buffers.unread.0 += 1;
            let read = rough.bytes().len() + exact * output.row_bytes();
            buffers.unread.1 += self.output.bytes() as i64 - read as i64;
        }
    }
}
