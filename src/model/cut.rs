//! FFNs with a cut: what is prepared at load, and the part of the forward pass that uses it.

use std::sync::atomic::{AtomicU32, Ordering};

use super::forward::observe;
use super::{Buffers, Layer, Model, ModelError, Part};
use crate::kernels::ColumnList;
use crate::ops::{
    ColumnMatrix, ColumnMemory, ColumnScratch, Compute, Epilogue, Inputs, MatmulScratch, PackedColumns,
    add_rows, matmul, matmul_columns, rms_norm_then, swiglu_columns,
};
use crate::quant::Matrix;
use crate::quant::columns::{ColumnLayout, Touched};
use crate::skip::{Cut, CutPlan, CutSide, Depth, LayerCut};

/// A layer that may be cut.
pub(super) struct PreparedCut {
    plan: LayerCut,
    /// `W_gate centre` and `W_up centre`, `[2 ffn]`; empty where the centre is zero.
    gate_up_base: Vec<f32>,
    /// `W_down centre`, `[embedding]`; empty where the centre is zero.
    down_base: Vec<f32>,
    /// `None` where a matrix is not quantised: nothing is saved then.
    layouts: Option<Layouts>,
    /// `None` where the layer was prepared to be measured, not to be fast.
    columns: Option<Columns>,
}

/// Column forms of an FFN's matrices.
struct Layouts {
    gate: ColumnLayout,
    up: ColumnLayout,
    down: ColumnLayout,
}

struct Columns {
    gate: ColumnMatrix,
    up: ColumnMatrix,
    down: ColumnMatrix,
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
    /// What each row touches of gate and up, and of down.
    touched: Vec<[Touched; 2]>,
}

impl CutScratch {
    /// For steps of up to `batch` rows.
    pub fn new(model: &Model, batch: usize) -> Self {
        if !model.has_cuts() {
            return Self::default();
        }
        let (d, ffn) = (model.config.embedding, model.config.ffn);
        let mut columns = ColumnScratch::default();
        let prepared = model.cuts.iter().flatten().filter_map(|cut| cut.columns.as_ref());
        columns.reserve(prepared.flat_map(|c| [&c.gate, &c.up, &c.down]));
        Self {
            gate_up: vec![0.0; batch * 2 * ffn],
            inputs: ColumnList::with_capacity(d),
            inner: ColumnList::with_capacity(ffn),
            columns,
            factors: (0..batch).map(|_| AtomicU32::default()).collect(),
            touched: Vec::with_capacity(batch),
        }
    }
}

impl Model {
    /// Makes the layers of `plan` ready to be cut: checks their vectors, multiplies the centres with the weights, and
    /// lays their FFNs out by columns, so that what is cut is not read. That takes about as much memory as those
    /// layers' FFNs have ([`column_bytes`](Self::column_bytes)), besides the file's own, which prompts still use.
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
        progress: impl FnMut(usize, usize),
    ) -> Result<(), ModelError> {
        self.prepare(on, plan, true, progress)
    }

    /// [`prepare_cuts`](Self::prepare_cuts) without the layout by columns: the same results, and the same counts of
    /// bytes that would be left unread, but every product reads all. For measuring what cuts cost in quality.
    pub fn prepare_cuts_by_rows(
        &mut self,
        on: Compute<'_>,
        plan: CutPlan,
        progress: impl FnMut(usize, usize),
    ) -> Result<(), ModelError> {
        self.prepare(on, plan, false, progress)
    }

    fn prepare(
        &mut self,
        on: Compute<'_>,
        plan: CutPlan,
        by_columns: bool,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<(), ModelError> {
        let layers = self.layers.len();
        if plan.layers.len() != layers {
            return Err(ModelError::CutLayers { found: plan.layers.len(), layers });
        }
        for (i, cut) in plan.layers.iter().enumerate() {
            let Some(cut) = cut else { continue };
            check_depth(i, &cut.depth, self.config.embedding)?;
            check_side(i, &cut.inputs, ["centre of inputs", "weight of inputs"], self.config.embedding)?;
            check_side(i, &cut.inner, ["centre of neurons", "weight of neurons"], self.config.ffn)?;
        }
        let layouts: Vec<_> = self.layers.iter().map(Layouts::new).collect();
        let needed = layouts.iter().zip(&plan.layers).filter(|(_, cut)| by_columns && cut.is_some());
        let needed = needed.filter_map(|(layouts, _)| layouts.as_ref());
        let mut memory = ColumnMemory::new(needed.flat_map(|l| [&l.gate, &l.up, &l.down]))?;
        let (mut cuts, mut packed) = (Vec::with_capacity(layers), Vec::with_capacity(layers));
        for (i, (cut, layouts)) in plan.layers.into_iter().zip(layouts).enumerate() {
            let layer = &self.layers[i];
            let of_cut = layouts.as_ref().filter(|_| by_columns && cut.is_some());
            packed.push(of_cut.map(|layouts| layouts.pack(on, layer, &mut memory)));
            cuts.push(cut.map(|cut| PreparedCut::new(on, layer, cut, layouts)));
            progress(i + 1, layers);
        }
        let memory = memory.finish();
        for (cut, packed) in cuts.iter_mut().zip(packed) {
            if let (Some(cut), Some(packed)) = (cut, packed) {
                let [gate, up, down] = packed.map(|packed| packed.read(&memory));
                cut.columns = Some(Columns { gate, up, down });
            }
        }
        self.cuts = cuts;
        Ok(())
    }

    /// Bytes of memory that FFNs laid out by columns take.
    pub fn column_bytes(&self) -> usize {
        let columns = self.cuts.iter().flatten().filter_map(|cut| cut.columns.as_ref());
        columns.map(|c| c.gate.bytes() + c.up.bytes() + c.down.bytes()).sum()
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
        let (cuts, factors) = (&mut s.cuts[..], &s.cut.factors[..]);
        s.cut.touched.clear();
        s.cut.touched.resize(rows.len(), Default::default());
        rms_norm_then(on, &s.x, rows, &layer.ffn.norm, c.norm_eps, &mut s.normed, |i, x| {
            let depth = &plan.depth;
            let product = if depth.weight.is_empty() { 0.0 } else { on.kernels.dot_f32(&depth.weight, x) };
            let factor = depth.factor(product);
            factors[i].store(factor.to_bits(), Ordering::Relaxed);
            plan.inputs.apply(cuts[i].inputs * factor, x);
        });
        for (cut, factor) in cuts.iter_mut().zip(factors) {
            cut.inner *= f32::from_bits(factor.load(Ordering::Relaxed));
        }
        s.inner.reshape(rows.len(), c.ffn);
        prepared.gate_up(on, layer, &s.normed, cuts, &mut s.cut, &mut s.matmul, &mut s.inner);
        let out = &mut s.ffn_out[..rows.len() * c.embedding];
        prepared.down(on, layer, &s.inner, &mut s.cut, &mut s.matmul, out);
        if observed {
            observe(on, &s.x, rows, out, &s.owners, parts, index);
        }
        add_rows(&mut s.x, rows, out, c.embedding);
        for (&row, &touched) in rows.iter().zip(&s.cut.touched) {
            let stats = &mut parts[s.owners[row].part].sequence.stats;
            stats.unread(index, prepared.unread(layer, touched));
        }
    }
}

fn check_side(layer: usize, side: &CutSide, names: [&'static str; 2], n: usize) -> Result<(), ModelError> {
    for (what, vector) in names.into_iter().zip([&side.centre, &side.weight]) {
        if !vector.is_empty() && vector.len() != n {
            return Err(ModelError::CutShape { layer, what, found: vector.len(), expected: n });
        }
    }
    let value =
        |what, vector: &[f32], expected, fits: fn(f32) -> bool| match vector.iter().position(|&v| !fits(v)) {
            Some(index) => Err(ModelError::CutValue { layer, what, index, found: vector[index], expected }),
            None => Ok(()),
        };
    value(names[0], &side.centre, "a finite number", f32::is_finite)?;
    value(names[1], &side.weight, "a finite number of at least 0", |v| v.is_finite() && v >= 0.0)
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
    fn new(on: Compute<'_>, layer: &Layer, plan: LayerCut, layouts: Option<Layouts>) -> Self {
        let (gate, up, down) = (layer.ffn.gate.matrix(), layer.ffn.up.matrix(), layer.ffn.down.matrix());
        let gate_up_base = base(on, &[gate, up], &plan.inputs);
        let down_base = base(on, &[down], &plan.inner);
        Self { plan, gate_up_base, down_base, layouts, columns: None }
    }

    /// `cut(silu(W_gate x) * W_up x)` of the rows `x`, by column for a single row, else by row, with zeros for what is
    /// cut: several rows need nearly all columns, and the dense product reads them once for all.
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
        let (bias, side, n, ffn) =
            (&self.gate_up_base[..], &self.plan.inner, x.rows(), layer.ffn.gate.rows());
        if let Some(c) = self.columns.as_ref().filter(|_| n == 1 && !x.are_many()) {
            x.choose_columns(c.gate.layout().group_len(), 0, &mut s.inputs);
            let (list, out) = (&s.inputs, inner.values_mut());
            swiglu_columns(on, &c.gate, &c.up, list, bias, &mut s.columns, out, |first, inner| {
                side.apply_from(cuts[0].inner, first, inner);
            });
            inner.quantize(on);
            s.touched[0][0] = s.inputs.touched();
            return;
        }
        let stack = [layer.ffn.gate.matrix(), layer.ffn.up.matrix()];
        let gate_up = &mut s.gate_up[..n * 2 * ffn];
        matmul(on, &stack, x, Epilogue::Bias(bias), gate_up, m);
        count(on, self.layouts.as_ref().map(|l| &l.gate), x, &mut s.touched, 0);
        inner.fill(on, |i, inner| {
            let (gate, up) = gate_up[i * 2 * ffn..][..2 * ffn].split_at(ffn);
            inner.copy_from_slice(gate);
            on.kernels.silu_mul(inner, up);
            side.apply(cuts[i].inner, inner);
        });
    }

    /// Down of the rows `x`; see [`gate_up`](Self::gate_up).
    fn down(
        &self,
        on: Compute<'_>,
        layer: &Layer,
        x: &Inputs,
        s: &mut CutScratch,
        m: &mut [MatmulScratch],
        out: &mut [f32],
    ) {
        let (bias, n) = (&self.down_base, x.rows());
        match self.columns.as_ref().filter(|_| n == 1 && !x.are_many()) {
            Some(c) => {
                x.choose_columns(c.down.layout().group_len(), 0, &mut s.inner);
                matmul_columns(on, &c.down, &s.inner, bias, &mut s.columns, out);
                s.touched[0][1] = s.inner.touched();
            }
            None => {
                matmul(on, &[layer.ffn.down.matrix()], x, Epilogue::Bias(bias), out, m);
                count(on, self.layouts.as_ref().map(|l| &l.down), x, &mut s.touched, 1);
            }
        }
    }

    /// Bytes of the layer's FFN that a row which touches so much of it leaves unread.
    fn unread(&self, layer: &Layer, [inputs, inner]: [Touched; 2]) -> i64 {
        let Some(l) = &self.layouts else { return 0 };
        let read = l.gate.bytes_read(inputs) + l.up.bytes_read(inputs) + l.down.bytes_read(inner);
        layer.ffn.bytes() as i64 - read as i64
    }
}

impl Layouts {
    /// `None` if a type has no column form, or gate and up do not share lists of columns.
    fn new(layer: &Layer) -> Option<Self> {
        let layout = |m: Matrix<'_>| ColumnLayout::new(m.ty(), m.rows_len(), m.cols());
        let (gate, up) = (layout(layer.ffn.gate.matrix())?, layout(layer.ffn.up.matrix())?);
        let down = layout(layer.ffn.down.matrix())?;
        (gate.group_len() == up.group_len()).then_some(Self { gate, up, down })
    }

    /// Gate, up and down.
    fn pack(&self, on: Compute<'_>, layer: &Layer, memory: &mut ColumnMemory) -> [PackedColumns; 3] {
        let ffn = &layer.ffn;
        [(&ffn.gate, &self.gate), (&ffn.up, &self.up), (&ffn.down, &self.down)]
            .map(|(matrix, layout)| PackedColumns::new(on, &matrix.matrix(), layout, memory))
    }
}

/// What each row of `x` would touch of a matrix laid out by columns.
fn count(on: Compute<'_>, layout: Option<&ColumnLayout>, x: &Inputs, to: &mut [[Touched; 2]], side: usize) {
    let Some(group_len) = layout.map(|l| l.group_len()) else { return };
    on.team.for_plain_tiles(to, 1, (16, 1), |mut tile| {
        for r in tile.rows() {
            tile.row(r)[0][side] = x.touched(r, group_len);
        }
    });
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
