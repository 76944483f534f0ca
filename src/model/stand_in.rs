//! Stand-ins in the forward pass: who gets one, and what it adds to the stream.

use std::sync::atomic::{AtomicU32, Ordering};

use super::{Buffers, Layer, Model, ModelError, Part, Products};
use crate::ops::{Compute, Epilogue, Inputs, add_rows, matmul, rms_norm, rms_norm_then};
use crate::skip::StandIn;

/// Buffers of stand-ins: allocated with a state, used in every step.
#[derive(Default)]
pub(super) struct StandInScratch {
    /// What each row's stand-in is foretold to cost: the bits of an f32, that rows can be shared among threads.
    foretold: Vec<AtomicU32>,
    /// Rows that have one.
    rows: Vec<usize>,
    /// `[rows, rank]`
    narrow: Inputs,
}

impl StandInScratch {
    /// For steps of up to `batch` rows.
    pub fn new(model: &Model, batch: usize, products: Products) -> Self {
        let Some(first) = model.stand_ins.first() else { return Self::default() };
        Self {
            foretold: (0..batch).map(|_| AtomicU32::default()).collect(),
            rows: Vec::with_capacity(batch),
            narrow: Inputs::with_capacity(batch, first.rank()).by_panels(products == Products::AsForMany),
        }
    }
}

impl Model {
    /// Makes stand-ins ready, one a layer. States made before do not have the buffers for them.
    ///
    /// # Errors
    /// There are more or fewer than layers, or they are for another embedding.
    pub fn prepare_stand_ins(&mut self, stand_ins: Vec<StandIn>) -> Result<(), ModelError> {
        let (layers, embedding) = (self.layers.len(), self.config.embedding);
        let other = stand_ins.iter().map(|s| s.base.len()).find(|&n| n != embedding);
        if stand_ins.len() != layers || other.is_some() {
            let (found, entries) = (stand_ins.len(), other.unwrap_or(embedding));
            return Err(ModelError::StandIns { found, entries, layers, embedding });
        }
        self.stand_ins = stand_ins;
        Ok(())
    }

    pub(super) fn stand_in(&self, layer: usize) -> Option<&StandIn> {
        self.stand_ins.get(layer)
    }

    /// `x += base + W_wide (W_narrow norm(x))`, for those of the rows that may whose probe tells that it is good enough; the
    /// others join those that run, in full or cut. Whether `normed` holds the active rows, and no others, afterwards.
    pub(super) fn ffn_stand_in(
        &self,
        on: Compute<'_>,
        s: &mut Buffers,
        parts: &mut [Part<'_>],
        layer: &Layer,
        stand_in: &StandIn,
        index: usize,
    ) -> bool {
        let (c, norm) = (&self.config, &layer.ffn.norm);
        let was_active = s.active.len();
        let (foretold, rows) = (&s.stand_in.foretold, &mut s.stand_in.rows);
        rows.clear();
        rows.extend(s.may_stand_in.iter().map(|&(row, ..)| row));
        rms_norm_then(on, &s.x, rows, norm, c.norm_eps, &mut s.normed, |i, x| {
            let cost = on.kernels.dot_f32(&stand_in.probe, x) + stand_in.bias;
            foretold[i].store(cost.to_bits(), Ordering::Relaxed);
        });
        rows.clear();
        for i in 0..s.may_stand_in.len() {
            let (row, below, otherwise) = s.may_stand_in[i];
            // A NaN compares false: a broken stream is never a reason to skip.
            let good = f32::from_bits(s.stand_in.foretold[i].load(Ordering::Relaxed)) < below;
            let stats = &mut parts[s.owners[row].part].sequence.stats;
            if good {
                stats.stood_in(index, stand_in.bytes() as i64);
                s.stand_in.rows.push(row);
            } else {
                stats.ran(index, 1);
                s.run_row(row, otherwise);
            }
        }
        let rows = &s.stand_in.rows;
        if rows.is_empty() {
            return was_active == 0 && s.active.len() == s.may_stand_in.len();
        }
        if rows.len() < s.may_stand_in.len() {
            rms_norm(on, &s.x, rows, norm, c.norm_eps, &mut s.normed);
        }
        let (n, narrow) = (rows.len(), &mut s.stand_in.narrow);
        narrow.reshape(n, stand_in.rank());
        matmul(on, &[stand_in.narrow()], &s.normed, Epilogue::Store, narrow.values_mut(), &mut s.matmul);
        narrow.quantize(on);
        let out = &mut s.ffn_out[..n * c.embedding];
        matmul(on, &[stand_in.wide()], narrow, Epilogue::Bias(&stand_in.base), out, &mut s.matmul);
        add_rows(&mut s.x, rows, out, c.embedding);
        false
    }
}
