//! FFNs with a cut: what is prepared at load, and the part of the forward pass that uses it.

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use super::forward::observe;
use super::{Buffers, Layer, Model, ModelError, Part};
use crate::kernels::ColumnList;
use crate::ops::{
    ColumnMatrix, ColumnMemory, ColumnScratch, Compute, Epilogue, Inputs, MatmulScratch, PackedColumns,
    add_rows, matmul, matmul_columns, matmul_swiglu_chosen, rms_norm_then, swiglu_columns,
};
use crate::quant::Matrix;
use crate::quant::columns::{ColumnLayout, Touched};
use crate::skip::{Cut, CutPlan, CutSide, Depth, LayerCut};
use crate::weights::locked;

/// A layer that may be cut.
pub(super) struct PreparedCut {
    plan: LayerCut,
    /// `W_gate centre` and `W_up centre`, `[2 ffn]`; empty where the centre is zero.
    gate_up_base: Vec<f32>,
    /// `W_down centre`, `[embedding]`; empty where the centre is zero.
    down_base: Vec<f32>,
    /// `None` where a matrix is not quantised: nothing is saved then.
    layouts: Option<Layouts>,
    /// Up to how many times a threshold columns are read coarsely, of gate and up, and of down; 0: none.
    coarse: [f32; 2],
    columns: Columns,
}

/// Column forms of an FFN's matrices.
struct Layouts {
    gate: ColumnLayout,
    up: ColumnLayout,
    down: ColumnLayout,
}

/// The matrices that are laid out by columns.
#[derive(Default)]
struct Columns {
    gate_up: Option<[ColumnMatrix; 2]>,
    down: Option<ColumnMatrix>,
}

impl Columns {
    fn all(&self) -> impl Iterator<Item = &ColumnMatrix> {
        self.gate_up.iter().flatten().chain(&self.down)
    }
}

/// Which matrices of an FFN are laid out by columns when cuts are prepared. The others are read by rows: results are the
/// same, and counts of bytes that are left unread too, but nothing is saved by columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ColumnForms {
    /// None: for measuring what cuts cost in quality.
    None,
    /// Down alone: for [`Cut::Neurons`].
    Down,
    /// All: for [`Cut::Columns`].
    All,
}

/// What a row touches of the matrices of a cut FFN.
#[derive(Clone, Copy)]
struct Read {
    gate_up: GateUpRead,
    down: Touched,
}

#[derive(Clone, Copy)]
enum GateUpRead {
    /// Of both.
    Columns(Touched),
    /// Rows of up; gate is read in full.
    Rows(usize),
}

impl Default for Read {
    fn default() -> Self {
        Self { gate_up: GateUpRead::Rows(0), down: Touched::default() }
    }
}

/// Buffers of cuts: allocated with a state, used in every step.
#[derive(Default)]
pub(super) struct CutScratch {
    /// `[rows, 2 ffn]`: gate and up.
    gate_up: Vec<f32>,
    /// Chosen columns of gate and up, of a step of one row.
    inputs: ColumnList,
    /// Chosen columns of down.
    inner: ColumnList,
    columns: ColumnScratch,
    /// What each row's thresholds are multiplied with: the bits of an f32, that rows can be shared among threads.
    factors: Vec<AtomicU32>,
    /// Rows of up that each row wants: numbers, in the same form.
    wanted: Vec<AtomicU32>,
    /// Bits of the inputs, and of the neurons, whose columns are read coarsely, of a step of one row.
    coarse_inputs: Vec<AtomicU32>,
    coarse_inner: Vec<AtomicU32>,
    /// Of many rows, what meets matrices in full, and what meets them coarsely.
    apart: Apart,
    read: Vec<Read>,
}

/// Rows of activations, taken apart.
struct Apart {
    fine: Inputs,
    coarse: Inputs,
}

impl Default for Apart {
    fn default() -> Self {
        Self { fine: Inputs::default().by_panels(true), coarse: Inputs::coarsely() }
    }
}

impl Apart {
    /// `out = W x + bias`; of `coarse` rows, what is below the threshold of each meets `W` coarsely.
    #[allow(clippy::too_many_arguments)] // what a product takes, and how it is taken apart
    fn product(
        &mut self,
        on: Compute<'_>,
        stack: &[Matrix<'_>],
        x: &Inputs,
        bias: &[f32],
        (side, coarse): (&CutSide, bool),
        threshold: impl Fn(usize) -> f32 + Sync,
        out: &mut [f32],
        m: &mut [MatmulScratch],
    ) {
        if !coarse {
            return matmul(on, stack, x, Epilogue::Bias(bias), out, m);
        }
        self.take(on, side, x, threshold);
        matmul(on, stack, &self.fine, Epilogue::Bias(bias), out, m);
        matmul(on, stack, &self.coarse, Epilogue::Add, out, m);
    }

    /// Takes the rows `x` apart: what is below the threshold of each, and what is not.
    fn take(&mut self, on: Compute<'_>, side: &CutSide, x: &Inputs, threshold: impl Fn(usize) -> f32 + Sync) {
        let n = x.cols();
        for (inputs, below) in [(&mut self.fine, false), (&mut self.coarse, true)] {
            inputs.reshape(x.rows(), n);
            inputs.fill(on, |r, out| side.select(threshold(r), below, &x.values()[r * n..][..n], out));
        }
    }

    /// What was taken apart, if it was, or else `x`.
    fn or<'x>(&'x self, x: &'x Inputs, apart: bool) -> (&'x Inputs, Option<&'x Inputs>) {
        if apart { (&self.fine, Some(&self.coarse)) } else { (x, None) }
    }
}

impl CutScratch {
    /// For steps of up to `batch` rows.
    pub fn new(model: &Model, batch: usize) -> Self {
        if !model.has_cuts() {
            return Self::default();
        }
        let (d, ffn) = (model.config.embedding, model.config.ffn);
        let mut columns = ColumnScratch::default();
        columns.reserve(model.cuts.iter().flatten().flat_map(|cut| cut.columns.all()));
        Self {
            gate_up: vec![0.0; batch * 2 * ffn],
            inputs: ColumnList::with_capacity(d),
            inner: ColumnList::with_capacity(ffn),
            columns,
            factors: (0..batch).map(|_| AtomicU32::default()).collect(),
            wanted: (0..batch).map(|_| AtomicU32::default()).collect(),
            coarse_inputs: (0..d.div_ceil(32)).map(|_| AtomicU32::default()).collect(),
            coarse_inner: (0..ffn.div_ceil(32)).map(|_| AtomicU32::default()).collect(),
            apart: Apart::default(),
            read: Vec::with_capacity(batch),
        }
    }
}

impl Model {
    /// Makes the layers of `plan` ready to be cut: checks their vectors, multiplies the centres with the weights, and
    /// lays matrices of their FFNs out by columns, so that what is cut is not read. That takes about as much memory as
    /// those matrices have ([`column_bytes`](Self::column_bytes)), and half as much again where columns can be read coarsely,
    /// besides the file's own, which prompts still use.
    /// `progress(layers done, layers)` is called after each.
    ///
    /// States made before do not have the buffers of a cut: call this first.
    ///
    /// # Errors
    /// The plan has another number of layers than the model, or a vector another length than the side that it
    /// belongs to, or a value that is not finite (or a weight that is negative); or there is not enough memory.
    pub fn prepare_cuts(
        &mut self,
        on: Compute<'_>,
        plan: CutPlan,
        forms: ColumnForms,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<(), ModelError> {
        let layers = self.layers.len();
        if plan.layers.len() != layers {
            return Err(ModelError::CutLayers { found: plan.layers.len(), layers });
        }
        if !(plan.coarse >= 0.0 && plan.coarse.is_finite()) {
            return Err(ModelError::CutCoarse { found: plan.coarse });
        }
        for (i, cut) in plan.layers.iter().enumerate() {
            let Some(cut) = cut else { continue };
            check_depth(i, &cut.depth, self.config.embedding)?;
            check_side(i, &cut.inputs, ["centre of inputs", "weight of inputs"], self.config.embedding)?;
            check_side(i, &cut.inner, ["centre of neurons", "weight of neurons"], self.config.ffn)?;
            check_weight(i, &cut.gate, "weight of gates", self.config.ffn)?;
        }
        let factor = plan.coarse;
        let layouts: Vec<_> = self.layers.iter().map(|layer| Layouts::new(layer, factor > 0.0)).collect();
        let needed = layouts.iter().zip(&plan.layers).filter(|(_, cut)| cut.is_some());
        let needed = needed.filter_map(|(layouts, _)| layouts.as_ref());
        let mut memory = ColumnMemory::new(needed.flat_map(|l| l.of(forms)))?;
        let (mut cuts, mut packed) = (Vec::with_capacity(layers), Vec::with_capacity(layers));
        for (i, (cut, layouts)) in plan.layers.into_iter().zip(layouts).enumerate() {
            let layer = &self.layers[i];
            let of_cut = layouts.as_ref().filter(|_| cut.is_some());
            packed.push(of_cut.map_or_else(Vec::new, |layouts| layouts.pack(on, layer, forms, &mut memory)));
            cuts.push(cut.map(|cut| PreparedCut::new(on, layer, cut, layouts, factor)));
            progress(i + 1, layers);
        }
        if self.locked {
            locked("the FFNs laid out by columns", memory.bytes(), memory.lock())?;
        }
        let memory = memory.finish();
        for (cut, packed) in cuts.iter_mut().zip(packed) {
            let Some(cut) = cut else { continue };
            let mut packed = packed.into_iter().map(|packed| packed.read(&memory));
            cut.columns.down = packed.next();
            cut.columns.gate_up = packed.next().zip(packed.next()).map(|(gate, up)| [gate, up]);
        }
        (self.cuts, self.column_forms) = (cuts, forms);
        Ok(())
    }

    /// Bytes of memory that FFNs laid out by columns take.
    pub fn column_bytes(&self) -> usize {
        self.cuts.iter().flatten().flat_map(|cut| cut.columns.all()).map(ColumnMatrix::bytes).sum()
    }

    /// Gives up what [`prepare_cuts`](Self::prepare_cuts) made.
    pub fn drop_cuts(&mut self) {
        self.cuts = Vec::new();
    }

    /// Whether any layer can be cut.
    pub fn has_cuts(&self) -> bool {
        self.cuts.iter().any(Option::is_some)
    }

    pub(super) fn cut(&self, layer: usize) -> Option<&PreparedCut> {
        self.cuts.get(layer).and_then(Option::as_ref)
    }

    /// `x += W_down cut(silu(W_gate cut(norm(x))) * W_up cut(norm(x)))`, for the rows with a cut.
    pub(super) fn ffn_cut(
        &self,
        on: Compute<'_>,
        s: &mut Buffers,
        parts: &mut [Part<'_>],
        layer: &Layer,
        prepared: &PreparedCut,
        index: usize,
    ) {
        let c = &self.config;
        let observed = parts.iter().any(Part::observed);
        let (rows, plan) = (&s.cut_rows[..], &prepared.plan);
        let (cuts, factors, coarse) = (&mut s.cuts[..], &s.cut.factors[..], &s.cut.coarse_inputs[..]);
        s.cut.read.clear();
        s.cut.read.resize(rows.len(), Read::default());
        rms_norm_then(on, &s.x, rows, &layer.ffn.norm, c.norm_eps, &mut s.normed, |i, x| {
            let depth = &plan.depth;
            let product = if depth.weight.is_empty() { 0.0 } else { on.kernels.dot_f32(&depth.weight, x) };
            let factor = depth.factor(product);
            factors[i].store(factor.to_bits(), Ordering::Relaxed);
            let threshold = cuts[i].inputs() * factor;
            plan.inputs.apply(threshold, x);
            if rows.len() == 1 && prepared.coarse[0] > 0.0 {
                plan.inputs.below(threshold * prepared.coarse[0], 0, x, store_in(coarse));
            }
        });
        for (cut, factor) in cuts.iter_mut().zip(factors) {
            *cut = cut.times(f32::from_bits(factor.load(Ordering::Relaxed)));
        }
        s.inner.reshape(rows.len(), c.ffn);
        prepared.gate_up(on, layer, &s.normed, cuts, &mut s.cut, &mut s.matmul, &mut s.inner);
        let out = &mut s.ffn_out[..rows.len() * c.embedding];
        prepared.down(on, layer, &s.inner, cuts, &mut s.cut, &mut s.matmul, out);
        if observed {
            observe(on, &s.x, rows, out, &s.owners, parts, index);
        }
        add_rows(&mut s.x, rows, out, c.embedding);
        for (&row, &read) in rows.iter().zip(&s.cut.read) {
            let stats = &mut parts[s.owners[row].part].sequence.stats;
            stats.unread(index, prepared.unread(layer, read));
        }
    }
}

impl Layer {
    /// Up to how many times a threshold a plan with the factor `coarse` has columns read coarsely, and the share of their bytes
    /// that this saves: of gate and up, and of down.
    pub fn coarse(&self, coarse: f32) -> [(f32, f64); 2] {
        let Some(layouts) = Layouts::new(self, coarse > 0.0) else { return [(0.0, 0.0); 2] };
        let (factors, saves) = (layouts.coarse(coarse), [&layouts.gate, &layouts.down]);
        let share = |i: usize| f64::from(saves[i].coarse_saves());
        [0, 1].map(|i| (factors[i], share(i) / (1.0 + share(i))))
    }
}

/// Writes bits to their place among those of all 32s.
fn store_in(bits: &[AtomicU32]) -> impl FnMut(usize, u32) {
    |n, of_these| bits[n].store(of_these, Ordering::Relaxed)
}

/// Reads them; none, if there are no coarse columns.
fn read_from(bits: &[AtomicU32], coarse: f32) -> impl Fn(usize) -> u32 {
    move |n| if coarse > 0.0 { bits[n].load(Ordering::Relaxed) } else { 0 }
}

fn check_side(layer: usize, side: &CutSide, names: [&'static str; 2], n: usize) -> Result<(), ModelError> {
    check_vector(layer, &side.centre, names[0], n, ("a finite number", f32::is_finite))?;
    check_weight(layer, &side.weight, names[1], n)
}

fn check_weight(layer: usize, vector: &[f32], what: &'static str, n: usize) -> Result<(), ModelError> {
    check_vector(layer, vector, what, n, ("a finite number of at least 0", |v| v.is_finite() && v >= 0.0))
}

/// A vector is empty or has `n` values that fit.
fn check_vector(
    layer: usize,
    vector: &[f32],
    what: &'static str,
    n: usize,
    (expected, fits): (&'static str, fn(f32) -> bool),
) -> Result<(), ModelError> {
    if !vector.is_empty() && vector.len() != n {
        return Err(ModelError::CutShape { layer, what, found: vector.len(), expected: n });
    }
    match vector.iter().position(|&v| !fits(v)) {
        Some(index) => Err(ModelError::CutValue { layer, what, index, found: vector[index], expected }),
        None => Ok(()),
    }
}

fn check_depth(layer: usize, depth: &Depth, n: usize) -> Result<(), ModelError> {
    let what = "depth";
    if !depth.weight.is_empty() && depth.weight.len() != n {
        return Err(ModelError::CutShape { layer, what, found: depth.weight.len(), expected: n });
    }
    let mut values = depth.weight.iter().chain([&depth.bias]).enumerate();
    match values.find(|(_, v)| !v.is_finite()) {
        Some((index, &found)) => {
            Err(ModelError::CutValue { layer, what, index, found, expected: "a finite number" })
        }
        None => Ok(()),
    }
}

impl PreparedCut {
    fn new(on: Compute<'_>, layer: &Layer, plan: LayerCut, layouts: Option<Layouts>, coarse: f32) -> Self {
        let (gate, up, down) = (layer.ffn.gate.matrix(), layer.ffn.up.matrix(), layer.ffn.down.matrix());
        let gate_up_base = base(on, &[gate, up], &plan.inputs);
        let down_base = base(on, &[down], &plan.inner);
        let coarse = layouts.as_ref().map_or([0.0; 2], |layouts| layouts.coarse(coarse));
        Self { plan, gate_up_base, down_base, layouts, coarse, columns: Columns::default() }
    }

    /// `cut(silu(W_gate x) * W_up x)` of the rows `x`. A single row reads what it needs; several need nearly all, and the
    /// dense product reads it once for all.
    #[allow(clippy::too_many_arguments)] // parts of one state, borrowed apart
    fn gate_up(
        &self,
        on: Compute<'_>,
        layer: &Layer,
        x: &Inputs,
        cuts: &[Cut],
        s: &mut CutScratch,
        m: &mut [MatmulScratch],
        inner: &mut Inputs,
    ) {
        let many = x.are_many();
        match (cuts, &self.columns.gate_up) {
            (&[Cut::Columns { inner: threshold, .. }], Some(columns)) if !many => {
                self.gate_up_by_columns(on, columns, x, threshold, s, inner);
            }
            (&[Cut::Neurons { gate, inner: threshold }], _) if !many && self.layouts.is_some() => {
                self.gate_up_of_neurons(on, layer, x, [gate, threshold], s, m, inner);
            }
            _ => self.gate_up_dense(on, layer, x, cuts, s, m, inner),
        }
    }

    fn gate_up_by_columns(
        &self,
        on: Compute<'_>,
        [gate, up]: &[ColumnMatrix; 2],
        x: &Inputs,
        threshold: f32,
        s: &mut CutScratch,
        inner: &mut Inputs,
    ) {
        let coarse = read_from(&s.coarse_inputs, self.coarse[0]);
        x.choose_columns(gate.layout().group_len(), 0, coarse, &mut s.inputs);
        let (list, out, bias) = (&s.inputs, inner.values_mut(), &self.gate_up_base);
        let coarse = &s.coarse_inner;
        swiglu_columns(on, gate, up, list, bias, &mut s.columns, out, |first, inner| {
            self.cut_inner(threshold, first, inner, coarse);
        });
        inner.quantize(on);
        s.read[0].gate_up = GateUpRead::Columns(s.inputs.touched());
    }

    /// Up by rows, of the neurons that the gate tells to matter.
    #[allow(clippy::too_many_arguments)] // parts of one state, borrowed apart
    fn gate_up_of_neurons(
        &self,
        on: Compute<'_>,
        layer: &Layer,
        x: &Inputs,
        [of_gate, of_inner]: [f32; 2],
        s: &mut CutScratch,
        m: &mut [MatmulScratch],
        inner: &mut Inputs,
    ) {
        let (matrices, wanted) = ([layer.ffn.gate.matrix(), layer.ffn.up.matrix()], AtomicUsize::new(0));
        let (out, bias, plan) = (inner.values_mut(), &self.gate_up_base, &self.plan);
        let choose = |first, gate: &[f32], list: &mut Vec<u32>, inner: &mut [f32]| {
            plan.list_neurons(of_gate, first, gate, list, inner);
            wanted.fetch_add(list.len(), Ordering::Relaxed);
        };
        let coarse = &s.coarse_inner;
        let then = |first, inner: &mut [f32]| self.cut_inner(of_inner, first, inner, coarse);
        matmul_swiglu_chosen(on, matrices, x, bias, out, m, choose, then);
        inner.quantize(on);
        s.read[0].gate_up = GateUpRead::Rows(wanted.into_inner());
    }

    /// Cuts neurons of a single row, from `first` on, and marks those whose columns of down are to be read coarsely.
    fn cut_inner(&self, threshold: f32, first: usize, inner: &mut [f32], coarse: &[AtomicU32]) {
        self.plan.inner.apply_from(threshold, first, inner);
        if self.coarse[1] > 0.0 {
            self.plan.inner.below(threshold * self.coarse[1], first, inner, store_in(coarse));
        }
    }

    /// With zeros for what is cut. Many rows are multiplied coarsely where a single one would be: so evaluation measures what
    /// generation does. A few are not, which costs them nothing.
    #[allow(clippy::too_many_arguments)] // parts of one state, borrowed apart
    fn gate_up_dense(
        &self,
        on: Compute<'_>,
        layer: &Layer,
        x: &Inputs,
        cuts: &[Cut],
        s: &mut CutScratch,
        m: &mut [MatmulScratch],
        inner: &mut Inputs,
    ) {
        let (n, ffn) = (x.rows(), layer.ffn.gate.rows());
        let stack = [layer.ffn.gate.matrix(), layer.ffn.up.matrix()];
        let gate_up = &mut s.gate_up[..n * 2 * ffn];
        let apart = x.are_many() && self.coarse[0] > 0.0;
        let (side, threshold) = (&self.plan.inputs, |r: usize| cuts[r].inputs() * self.coarse[0]);
        s.apart.product(on, &stack, x, &self.gate_up_base, (side, apart), threshold, gate_up, m);
        let (gate_up, wanted) = (&*gate_up, &s.wanted);
        inner.fill(on, |i, inner| {
            let (gate, up) = gate_up[i * 2 * ffn..][..2 * ffn].split_at(ffn);
            inner.copy_from_slice(gate);
            let threshold = match cuts[i] {
                Cut::Columns { inner: threshold, .. } => {
                    on.kernels.silu_mul(inner, up);
                    threshold
                }
                Cut::Neurons { gate: of_gate, inner: threshold } => {
                    on.kernels.silu(inner);
                    wanted[i].store(self.plan.meet(of_gate, inner, up), Ordering::Relaxed);
                    threshold
                }
            };
            self.plan.inner.apply(threshold, inner);
        });
        let Some(layouts) = &self.layouts else { return };
        let (x, coarse) = s.apart.or(x, apart);
        on.team.for_plain_tiles(&mut s.read, 1, (16, 1), |mut tile| {
            for r in tile.rows() {
                tile.row(r)[0].gate_up = match cuts[r] {
                    Cut::Columns { .. } => {
                        GateUpRead::Columns(x.touched(coarse, r, layouts.gate.group_len()))
                    }
                    Cut::Neurons { .. } => GateUpRead::Rows(wanted[r].load(Ordering::Relaxed) as usize),
                };
            }
        });
    }

    /// Down of the rows `x`; see [`gate_up`](Self::gate_up).
    #[allow(clippy::too_many_arguments)] // parts of one state, borrowed apart
    fn down(
        &self,
        on: Compute<'_>,
        layer: &Layer,
        x: &Inputs,
        cuts: &[Cut],
        s: &mut CutScratch,
        m: &mut [MatmulScratch],
        out: &mut [f32],
    ) {
        let bias = &self.down_base;
        if let Some(down) = self.columns.down.as_ref().filter(|_| x.rows() == 1 && !x.are_many()) {
            let coarse = read_from(&s.coarse_inner, self.coarse[1]);
            x.choose_columns(down.layout().group_len(), 0, coarse, &mut s.inner);
            matmul_columns(on, down, &s.inner, bias, &mut s.columns, out);
            s.read[0].down = s.inner.touched();
            return;
        }
        let (stack, apart) = ([layer.ffn.down.matrix()], x.are_many() && self.coarse[1] > 0.0);
        let (side, threshold) = (&self.plan.inner, |r: usize| cuts[r].inner() * self.coarse[1]);
        s.apart.product(on, &stack, x, bias, (side, apart), threshold, out, m);
        let Some(layouts) = &self.layouts else { return };
        let (x, coarse) = s.apart.or(x, apart);
        on.team.for_plain_tiles(&mut s.read, 1, (16, 1), |mut tile| {
            for r in tile.rows() {
                tile.row(r)[0].down = x.touched(coarse, r, layouts.down.group_len());
            }
        });
    }

    /// Bytes of the layer's FFN that a row which reads so much of it leaves unread.
    fn unread(&self, layer: &Layer, read: Read) -> i64 {
        let (Some(l), ffn) = (&self.layouts, &layer.ffn) else { return 0 };
        let gate_up = match read.gate_up {
            GateUpRead::Columns(touched) => l.gate.bytes_read(touched) + l.up.bytes_read(touched),
            GateUpRead::Rows(rows) => ffn.gate.bytes() + rows * ffn.up.matrix().row_bytes(),
        };
        ffn.bytes() as i64 - (gate_up + l.down.bytes_read(read.down)) as i64
    }
}

impl Layouts {
    /// `None` if a type has no column form, or gate and up do not share lists of columns. Where columns are to be `coarse`, those
    /// of gate and up are if both can be.
    fn new(layer: &Layer, coarse: bool) -> Option<Self> {
        let layout = |m: Matrix<'_>| ColumnLayout::new(m.ty(), m.rows_len(), m.cols());
        let [gate, up, down] = [&layer.ffn.gate, &layer.ffn.up, &layer.ffn.down]
            .map(|m| layout(m.matrix()).map(|layout| layout.with_coarse(coarse)));
        let (gate, up, down) = (gate?, up?, down?);
        let both = gate.is_coarse() && up.is_coarse();
        let (gate, up) = (gate.with_coarse(both), up.with_coarse(both));
        (gate.group_len() == up.group_len()).then_some(Self { gate, up, down })
    }

    /// Up to how many times a threshold columns are read coarsely, of gate and up, and of down, where it is `factor` times if
    /// that saves half of a column: it goes with the root of what is saved in units of what is read ([`CutPlan::COARSE`]).
    fn coarse(&self, factor: f32) -> [f32; 2] {
        [&self.gate, &self.down].map(|l| if l.is_coarse() { factor * l.coarse_saves().sqrt() } else { 0.0 })
    }

    /// Those of `forms`, of down, gate and up.
    fn of(&self, forms: ColumnForms) -> impl Iterator<Item = &ColumnLayout> {
        let n = match forms {
            ColumnForms::None => 0,
            ColumnForms::Down => 1,
            ColumnForms::All => 3,
        };
        [&self.down, &self.gate, &self.up].into_iter().take(n)
    }

    /// The matrices of `forms`, in the order of [`of`](Self::of).
    fn pack(
        &self,
        on: Compute<'_>,
        layer: &Layer,
        forms: ColumnForms,
        memory: &mut ColumnMemory,
    ) -> Vec<PackedColumns> {
        let matrices = [&layer.ffn.down, &layer.ffn.gate, &layer.ffn.up];
        let pairs = matrices.into_iter().zip(self.of(forms));
        pairs.map(|(matrix, layout)| PackedColumns::new(on, &matrix.matrix(), layout, memory)).collect()
    }
}

/// The product of the stacked matrices with the centre, in f32; nothing where the centre is zero.
fn base(on: Compute<'_>, stack: &[Matrix<'_>], side: &CutSide) -> Vec<f32> {
    if !side.is_centred() {
        return Vec::new();
    }
    let mut out = Vec::new();
    for matrix in stack {
        let mut product = vec![0.0; matrix.rows_len()];
        on.team.for_plain_tiles(&mut product, matrix.rows_len(), (1, 16), |mut tile| {
            let mut row = vec![0.0; matrix.cols()];
            let outputs = tile.cols();
            for (r, out) in outputs.zip(tile.row(0)) {
                matrix.dequantize_row(r, &mut row);
                *out = on.kernels.dot_f32(&row, &side.centre);
            }
        });
        out.extend(product);
    }
    out
}
