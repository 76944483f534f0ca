//! What calibration reads off a forward pass of the full model.

use half::bf16;

use crate::model::{FfnRows, Probe};

/// Tokens whose vectors are kept for quantiles: 128 of them give each layer tens of thousands of entries.
pub(super) const SAMPLES: usize = 128;
/// Numbers kept, of all layers, for regressions: a gigabyte.
const TRACED: usize = 1 << 29;

/// Sums over the tokens of the calibration text, one [`LayerSums`] a layer.
pub(super) struct Gatherer {
    pub layers: Vec<LayerSums>,
    /// Positions of a window before this one are not counted: the first tokens' activations are outliers
    /// (attention sinks, Xiao et al. 2023), and they run in full anyway.
    warm_up: usize,
    embedding: usize,
    /// Every so many tokens one is kept as a sample.
    every: usize,
    /// Every so many tokens the normed stream and the FFN's output are kept.
    pub trace_every: usize,
    /// The stream that entered the layer before.
    entered: Vec<f32>,
}

#[derive(Clone, Default)]
pub(super) struct LayerSums {
    pub tokens: usize,
    /// `cos(h, h + FFN)` of each token, in order.
    pub cosines: Vec<f32>,
    /// Root mean square of `h + FFN` of each token, in order.
    pub rms: Vec<f32>,
    /// Sum of `cos(layer in, layer out)`.
    pub layer_cosine: f64,
    /// Sums of `p^2`, `pq` and `q^2`, `[ffn]` each, where `p = u silu'(g)` and `q = silu(g)`: how much a neuron
    /// moves with its gate and with its up.
    pub pp: Vec<f64>,
    pub pq: Vec<f64>,
    pub qq: Vec<f64>,
    /// Sums of `u^2`, `[ffn]`.
    pub uu: Vec<f64>,
    /// Samples of the normed stream, of `silu(g)` and of the inner activations, row after row.
    pub normed_samples: Vec<f32>,
    pub gate_samples: Vec<f32>,
    pub inner_samples: Vec<f32>,
    /// The normed stream of more tokens, every [`trace_every`](Gatherer::trace_every)-th, and what the FFN made of it.
    pub traced: Vec<bf16>,
    pub traced_out: Vec<bf16>,
    /// `rms` of those.
    pub traced_rms: Vec<f32>,
}

impl Gatherer {
    /// For `windows` windows of `context` tokens of a model of the given shapes.
    pub fn new(
        layers: usize,
        (embedding, ffn): (usize, usize),
        (windows, context, warm_up): (usize, usize, usize),
    ) -> Self {
        let zeros = || vec![0.0; ffn];
        let sums = LayerSums { pp: zeros(), pq: zeros(), qq: zeros(), uu: zeros(), ..LayerSums::default() };
        let tokens = windows * (context - warm_up);
        let every = tokens.div_ceil(SAMPLES);
        let trace_every = tokens.div_ceil((TRACED / (2 * layers * embedding).max(1)).max(1)).max(1);
        Self { layers: vec![sums; layers], warm_up, embedding, every, trace_every, entered: Vec::new() }
    }
}

/// Windows are evaluated in one step each, so that rows are positions.
impl Probe for Gatherer {
    fn stream(&mut self, layer: usize, x: &[f32]) {
        let d = self.embedding;
        if let Some(before) = layer.checked_sub(1) {
            let rows = self.entered.chunks_exact(d).zip(x.chunks_exact(d)).skip(self.warm_up);
            self.layers[before].layer_cosine += rows.map(|(a, b)| cosine(a, b)).sum::<f64>();
        }
        self.entered.clear();
        self.entered.extend_from_slice(x);
    }

    fn wants_gate_up(&self) -> bool {
        true
    }

    fn ffn(&mut self, layer: usize, rows: FfnRows<'_>) {
        let d = self.embedding;
        let sums = &mut self.layers[layer];
        let ffn = sums.pp.len();
        for (i, &row) in rows.rows.iter().enumerate().filter(|(_, row)| **row >= self.warm_up) {
            let (h, out) = (&rows.stream[row * d..][..d], &rows.out[i * d..][..d]);
            let after: Vec<f32> = h.iter().zip(out).map(|(h, f)| h + f).collect();
            sums.cosines.push(cosine(h, &after) as f32);
            sums.rms.push((after.iter().map(|x| x * x).sum::<f32>() / d as f32).sqrt());
            let (normed, inner) = (&rows.normed[i * d..][..d], &rows.inner[i * ffn..][..ffn]);
            let (gate, up) = rows.gate_up[i * 2 * ffn..][..2 * ffn].split_at(ffn);
            sums.moments(gate, up);
            if sums.tokens.is_multiple_of(self.every) {
                sums.normed_samples.extend_from_slice(normed);
                sums.gate_samples.extend(gate.iter().map(|&g| silu(g)));
                sums.inner_samples.extend_from_slice(inner);
            }
            if sums.tokens.is_multiple_of(self.trace_every) {
                sums.traced.extend(normed.iter().map(|&x| bf16::from_f32(x)));
                sums.traced_out.extend(out.iter().map(|&x| bf16::from_f32(x)));
                sums.traced_rms.extend(sums.rms.last());
            }
            sums.tokens += 1;
        }
    }
}

impl LayerSums {
    fn moments(&mut self, gate: &[f32], up: &[f32]) {
        for (i, (&g, &u)) in gate.iter().zip(up).enumerate() {
            let (sigmoid, q) = (sigmoid(g), silu(g));
            let p = u * (sigmoid + q * (1.0 - sigmoid));
            self.pp[i] += f64::from(p * p);
            self.pq[i] += f64::from(p * q);
            self.qq[i] += f64::from(q * q);
            self.uu[i] += f64::from(u * u);
        }
    }

    pub fn mean_cosine(&self) -> f64 {
        self.cosines.iter().map(|&c| f64::from(c)).sum::<f64>() / self.tokens.max(1) as f64
    }

    /// Median root mean square of the stream behind the FFN.
    pub fn median_rms(&self) -> f32 {
        super::median(&self.rms)
    }

    /// Block Influence (ShortGPT, Men et al. 2024).
    pub fn influence(&self) -> f32 {
        (1.0 - self.layer_cosine / self.tokens.max(1) as f64).clamp(0.0, 2.0) as f32
    }
}

/// Numbers that were kept in few bits.
pub(super) fn widened(x: &[bf16]) -> Vec<f32> {
    x.iter().map(|x| x.to_f32()).collect()
}

fn sigmoid(g: f32) -> f32 {
    1.0 / (1.0 + (-g).exp())
}

fn silu(g: f32) -> f32 {
    g * sigmoid(g)
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| f64::from(x * y)).sum::<f64>();
    let norms = (dot(a, a) * dot(b, b)).sqrt();
    if norms > 0.0 { (dot(a, b) / norms).clamp(-1.0, 1.0) } else { 0.0 }
}
