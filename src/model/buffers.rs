//! The buffers of a step, and which row of them belongs to whom.

use super::cut::CutScratch;
use super::shortlist::ShortlistBuffers;
use super::stand_in::StandInScratch;
use super::{Model, Part, Probe};
use crate::memory::Pages;
use crate::ops::attention::AttentionScratch;
use crate::ops::{Inputs, MatmulScratch, RopeTable};
use crate::skip::{Cut, Decision};
use crate::threads::Team;

/// How the matrices of a step are multiplied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Products {
    /// In the way that is fastest for as many rows as there are. Up to [`FEW_TOKENS`](crate::kernels::FEW_TOKENS) rows
    /// give bit by bit what each gives alone. [`Kernels::panels_from`](crate::kernels::Kernels::panels_from) rows and more give
    /// what any such number gives, with sums that are rounded differently.
    #[default]
    Fastest,
    /// As for many rows, whatever their number, so that a row of quantised matrices is the same in any company: a batch
    /// of any size generates what its sequences generate alone. Slower for a few rows.
    AsForMany,
}

/// The buffers of a step, for up to `batch` rows: a token of a sequence each. All memory of decoding is allocated here,
/// once. Shapes in brackets; `n` is the rows of the step.
pub struct Buffers {
    /// Most rows of a step.
    pub(super) batch: usize,
    /// Whose the step's rows are, `[n]`.
    pub(super) owners: Vec<Owner>,
    /// `[n]`
    pub(super) positions: Vec<usize>,
    /// `[n, embedding]`: the residual stream.
    pub(super) x: Pages<f32>,
    /// `[rows, embedding]`: an FFN's output, where the stream before it is still needed.
    pub(super) ffn_out: Pages<f32>,
    /// `[n, q_dim + 2 kv_dim]`
    pub(super) qkv: Pages<f32>,
    /// `[n, embedding]`: normed stream.
    pub(super) normed: Inputs,
    /// `[n, q_dim]`: the attention's output before its matrix.
    pub(super) attended: Inputs,
    /// `[rows, ffn]`: the FFN's inner activations.
    pub(super) inner: Inputs,
    pub(super) rope: RopeTable,
    /// `[1, embedding]`: normed stream of the last token, refined.
    pub(super) last: Inputs,
    /// `[vocab]`
    pub(super) logits: Vec<f32>,
    /// `0..batch`
    pub(super) all_rows: Vec<usize>,
    /// Rows that run the current layer at all.
    pub(super) in_layer: Vec<usize>,
    /// Rows whose FFN runs in full.
    pub(super) active: Vec<usize>,
    /// Rows whose FFN runs with a cut.
    pub(super) cut_rows: Vec<usize>,
    /// The cut of each of `cut_rows`.
    pub(super) cuts: Vec<Cut>,
    /// Empty for models without a cut plan.
    pub(super) cut: CutScratch,
    /// Rows whose FFN a stand-in may take the place of, what that may cost, and the cut of those where it costs more.
    pub(super) may_stand_in: Vec<(usize, f32, Option<Cut>)>,
    /// Empty for models without stand-ins.
    pub(super) stand_in: StandInScratch,
    /// `None` for models without a shortlist.
    pub(super) shortlist: Option<ShortlistBuffers>,
    pub(super) matmul: Vec<MatmulScratch>,
    pub(super) attention: AttentionScratch,
    /// Looks on.
    pub(super) probe: Option<Box<dyn Probe>>,
}

/// Whose a row is: the `row`-th token of a part.
#[derive(Clone, Copy)]
pub(super) struct Owner {
    pub part: usize,
    pub row: usize,
}

impl Buffers {
    /// For steps of `model` of up to `batch` rows.
    pub fn new(model: &Model, team: &Team, batch: usize, products: Products) -> Self {
        let (config, threads) = (model.config(), team.threads());
        let (d, q, kv, ffn) = (config.embedding, config.q_dim(), config.kv_dim(), config.ffn);
        let widest = config.vocab.max(ffn).max(q + 2 * kv).max(d);
        let inputs = |cols| Inputs::with_capacity(batch, cols).by_panels(products == Products::AsForMany);
        let matmul = || MatmulScratch::with_capacity(batch, widest.div_ceil(4 * threads));
        Self {
            batch,
            owners: Vec::with_capacity(batch),
            positions: Vec::with_capacity(batch),
            x: Pages::zeroed(batch * d),
            ffn_out: Pages::zeroed(batch * d),
            qkv: Pages::zeroed(batch * (q + 2 * kv)),
            normed: inputs(d),
            attended: inputs(q),
            inner: inputs(ffn),
            rope: RopeTable::with_capacity(batch, config.rope.dimensions / 2),
            last: Inputs::with_refined_capacity(1, d).by_panels(products == Products::AsForMany),
            logits: vec![0.0; config.vocab],
            all_rows: (0..batch).collect(),
            in_layer: Vec::with_capacity(batch),
            active: Vec::with_capacity(batch),
            cut_rows: Vec::with_capacity(batch),
            cuts: Vec::with_capacity(batch),
            cut: CutScratch::new(model, batch),
            may_stand_in: Vec::with_capacity(batch),
            stand_in: StandInScratch::new(model, batch, products),
            shortlist: ShortlistBuffers::new(model, batch, products),
            matmul: (0..threads).map(|_| matmul()).collect(),
            attention: AttentionScratch::new(threads, config.attention()),
            probe: None,
        }
    }

    /// Most rows of a step.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Rows of the last step.
    pub fn rows(&self) -> usize {
        self.owners.len()
    }

    /// Shows `probe` what the following steps compute, or nobody.
    pub fn set_probe(&mut self, probe: Option<Box<dyn Probe>>) {
        self.probe = probe;
    }

    /// The residual stream of the last step's rows, `[n, embedding]`, before the final norm.
    pub fn stream(&self) -> &[f32] {
        &self.x
    }

    /// Gives each part its rows, in order.
    pub(super) fn begin_step(&mut self, parts: &mut [Part<'_>]) {
        self.owners.clear();
        self.positions.clear();
        for (i, part) in parts.iter_mut().enumerate() {
            part.begin();
            let (n, first) = (part.tokens.len(), part.sequence.position);
            self.owners.extend((0..n).map(|row| Owner { part: i, row }));
            self.positions.extend(first..first + n);
        }
        if let Some(shortlist) = &mut self.shortlist {
            let mut lists =
                |owner: &Owner| parts[owner.part].policy(owner.row).is_some_and(|p| p.shortlists());
            shortlist.listed.clear();
            shortlist.listed.extend(self.owners.iter().map(&mut lists));
        }
    }

    /// Whether only the likely ones of a row's logits must be exact.
    pub(super) fn shortlists(&self, row: usize) -> bool {
        self.shortlist.as_ref().is_some_and(|shortlist| shortlist.listed[row])
    }

    /// Rows of the last call for logits that were shortlisted, and the weight bytes that they left unread.
    pub(super) fn output_unread(&self) -> (u64, i64) {
        self.shortlist.as_ref().map_or((0, 0), |shortlist| shortlist.unread)
    }

    /// Shows the stream that enters `layer` to whoever looks on.
    pub(super) fn show_stream(&mut self, layer: usize) {
        let n = self.owners.len();
        if let Some(probe) = &mut self.probe {
            probe.stream(layer, &self.x[..self.x.len() / self.batch * n]);
        }
    }

    /// The rows that run the layer at all.
    pub(super) fn choose_layer_rows(&mut self, parts: &mut [Part<'_>], layer: usize) {
        self.in_layer.clear();
        for (row, owner) in self.owners.iter().enumerate() {
            let part = &mut parts[owner.part];
            if part.policy(owner.row).is_none_or(|policy| policy.runs_layer(layer)) {
                self.in_layer.push(row);
            } else {
                part.sequence.stats.skipped(layer, 1);
                part.sequence.stats.left_out(layer, 1);
            }
        }
    }

    /// Adds a row whose FFN runs, with a cut or in full. Rows are in order: where all of a step run, they are taken to be.
    pub(super) fn run_row(&mut self, row: usize, cut: Option<Cut>) {
        let rows = if cut.is_some() { &mut self.cut_rows } else { &mut self.active };
        let at = rows.partition_point(|&other| other < row);
        rows.insert(at, row);
        if let Some(cut) = cut {
            self.cuts.insert(at, cut);
        }
    }

    /// Sorts the rows that run the layer by what happens to their FFN; `can_cut`: the layer is in the cut plan, `can_stand_in`:
    /// it has a stand-in.
    pub(super) fn choose_rows(
        &mut self,
        parts: &mut [Part<'_>],
        layer: usize,
        (can_cut, can_stand_in): (bool, bool),
    ) {
        self.active.clear();
        self.cut_rows.clear();
        self.cuts.clear();
        self.may_stand_in.clear();
        for &row in &self.in_layer {
            let Owner { part, row: token } = self.owners[row];
            let Some(policy) = parts[part].policy(token) else {
                self.active.push(row);
                continue;
            };
            let decision = policy.decide(layer);
            let stats = &mut parts[part].sequence.stats;
            match decision {
                Decision::Skip => {
                    stats.skipped(layer, 1);
                    continue;
                }
                // Counted once the probe has told.
                Decision::StandIn { below, otherwise } if can_stand_in => {
                    self.may_stand_in.push((row, below, otherwise.filter(|_| can_cut)));
                    continue;
                }
                Decision::Cut(cut) | Decision::StandIn { otherwise: Some(cut), .. } if can_cut => {
                    self.cut_rows.push(row);
                    self.cuts.push(cut);
                }
                Decision::Run | Decision::Cut(_) | Decision::StandIn { .. } => self.active.push(row),
            }
            stats.ran(layer, 1);
        }
    }
}
