//! What leaving out an input or a neuron costs: the weights of a cut, and the thresholds for shares of bytes.

use super::gather::LayerSums;
use crate::model::{Ffn, Layer, Model};
use crate::ops::Compute;
use crate::skip::{CutPlan, CutSide, Depth, LayerCut};

/// Weights of a layer, and centres to begin with: medians of the inputs, zeros of the neurons.
///
/// Leaving an input `x_j` at its centre changes neuron `i` by about `(p_i G_ij + q_i U_ij) (x_j - c_j)` (see
/// [`LayerSums`]) and the output by the norm of the neuron's down column times that; leaving a neuron out changes
/// it by that norm times `a_i - c_i`. What an error of the output costs is first taken to be in inverse proportion to
/// the stream that it is added to, and then measured ([`sense`](super::sense)). Divided by the root of the bytes of a
/// column - squared errors add up, as bytes do - the weights say what a saved byte costs.
pub(super) fn layer_cut(on: Compute<'_>, ffn: &Ffn, sums: &LayerSums) -> LayerCut {
    let n = sums.tokens.max(1) as f64;
    let sensitivity = 1.0 / f64::from(sums.median_rms().max(f32::MIN_POSITIVE));
    let down_norms = column_energies(on, ffn);
    let input_energies = input_energies(on, ffn, sums, &down_norms);
    let [gate_up_bytes, down_bytes] = column_bytes(ffn);
    let weight = |energy: f64, bytes: f64| (sensitivity * (energy / bytes).sqrt()) as f32;
    LayerCut {
        depth: Depth::default(),
        inputs: CutSide {
            centre: medians(&sums.normed_samples, ffn.gate.cols()),
            weight: input_energies.iter().map(|e| weight(e / n, gate_up_bytes)).collect(),
        },
        inner: CutSide {
            centre: vec![0.0; down_norms.len()],
            weight: down_norms.iter().map(|&e| weight(e, down_bytes)).collect(),
        },
        gate: Vec::new(),
    }
}

/// How much a unit of each neuron's `silu(g)` matters, where `inner` is how much one of the neuron itself does: what it is
/// multiplied with is not known yet and expected to have its mean square. A row of up has other bytes than a column of
/// down.
///
/// With one threshold for both, that is close to the best. Say a neuron comes out as `t z` in units of the threshold, `z` a
/// normal variable of variance 1 that the row of up would tell. Where `|t z| < 1` its column is left out in any case, so
/// leaving out the row as well costs `E[(t z)^2; |t z| > 1]` more, which is what its bytes are worth at `t` = 1.07.
pub(super) fn gate_weights(ffn: &Ffn, sums: &LayerSums, inner: &[f32]) -> Vec<f32> {
    let n = sums.tokens.max(1) as f64;
    let [_, down_bytes] = column_bytes(ffn);
    let bytes = (down_bytes / ffn.up.matrix().row_bytes() as f64).sqrt();
    inner.iter().zip(&sums.uu).map(|(&weight, uu)| weight * ((uu / n).sqrt() * bytes) as f32).collect()
}

/// Bytes of a column of gate and up, and of one of down.
pub(super) fn column_bytes(ffn: &Ffn) -> [f64; 2] {
    let gate_up = (ffn.gate.bytes() + ffn.up.bytes()) as f64 / ffn.gate.cols() as f64;
    [gate_up, ffn.down.bytes() as f64 / ffn.down.cols() as f64]
}

/// What thresholds are compared with, of every entry of samples of a side.
pub(super) fn scores<'s>(side: &'s CutSide, samples: &'s [f32]) -> impl Iterator<Item = f32> + 's {
    let rows = samples.chunks_exact(side.weight.len());
    rows.flat_map(|x| {
        let entries = x.iter().zip(&side.centre).zip(&side.weight);
        entries.map(|((x, centre), weight)| (x - centre).abs() * weight)
    })
}

/// The median of each of `n` columns.
fn medians(samples: &[f32], n: usize) -> Vec<f32> {
    let column = |j: usize| samples.iter().skip(j).step_by(n).copied().collect::<Vec<f32>>();
    (0..n).map(|j| super::median(&column(j))).collect()
}

/// Least samples that a centre is taken from.
const LEAST: usize = 8;

/// Moves each centre to the mean of what is left out at a threshold for inputs and one for neurons: that is what it
/// stands for, and the mean of all values, with their heavy tails, does worse than none.
pub(super) fn trim_centres(cut: &mut LayerCut, sums: &LayerSums, [inputs, inner]: [f32; 2]) {
    let factors = factors(&cut.depth, &sums.normed_samples, cut.inputs.weight.len());
    let sides =
        [(&mut cut.inputs, &sums.normed_samples, inputs), (&mut cut.inner, &sums.inner_samples, inner)];
    for (side, samples, threshold) in sides {
        let n = side.weight.len();
        let (mut sum, mut count) = (vec![0f64; n], vec![0usize; n]);
        for (x, factor) in samples.chunks_exact(n).zip(&factors) {
            for (j, &x) in x.iter().enumerate() {
                if (x - side.centre[j]).abs() * side.weight[j] < threshold * factor {
                    sum[j] += f64::from(x);
                    count[j] += 1;
                }
            }
        }
        for (j, centre) in side.centre.iter_mut().enumerate().filter(|(j, _)| count[*j] >= LEAST) {
            *centre = (sum[j] / count[j] as f64) as f32;
        }
    }
}

/// What the thresholds of each sample of the normed stream are multiplied with.
fn factors(depth: &Depth, samples: &[f32], n: usize) -> Vec<f32> {
    let product = |x: &[f32]| x.iter().zip(&depth.weight).map(|(x, w)| x * w).sum();
    samples.chunks_exact(n).map(|x| depth.factor(product(x))).collect()
}

/// Squared norms of the columns of down, `[ffn]`.
fn column_energies(on: Compute<'_>, ffn: &Ffn) -> Vec<f64> {
    let down = ffn.down.matrix();
    sum_over_rows(on, down.rows_len(), down.cols(), |r, row, sums| {
        down.dequantize_row(r, row);
        sums.iter_mut().zip(&*row).for_each(|(sum, &w)| *sum += f64::from(w * w));
    })
}

/// `sum_i |d_i|^2 sum_t (p_i G_ij + q_i U_ij)^2` for every input `j`, the inner sum over tokens.
fn input_energies(on: Compute<'_>, ffn: &Ffn, sums: &LayerSums, down: &[f64]) -> Vec<f64> {
    let (gate, up) = (ffn.gate.matrix(), ffn.up.matrix());
    let cols = gate.cols();
    sum_over_rows(on, gate.rows_len(), 2 * cols, |i, row, out| {
        let (g, u) = row.split_at_mut(cols);
        gate.dequantize_row(i, g);
        up.dequantize_row(i, u);
        let [pp, pq, qq] = [&sums.pp, &sums.pq, &sums.qq].map(|s| s[i] * down[i]);
        for ((out, &g), &u) in out.iter_mut().zip(&*g).zip(&*u) {
            let (g, u) = (f64::from(g), f64::from(u));
            *out += pp * g * g + 2.0 * pq * g * u + qq * u * u;
        }
    })[..cols]
        .iter()
        .map(|e| e.max(0.0))
        .collect()
}

/// Adds up what `add(row, scratch, sums)` gives for each of `rows`, by all threads; scratch and sums have `n`.
fn sum_over_rows(
    on: Compute<'_>,
    rows: usize,
    n: usize,
    add: impl Fn(usize, &mut [f32], &mut [f64]) + Sync,
) -> Vec<f64> {
    // A fixed number of parts, so that the result does not depend on the threads.
    const PARTS: usize = 16;
    let mut sums = vec![0f64; PARTS * n];
    on.team.for_plain_tiles(&mut sums, n, (1, usize::MAX), |mut tile| {
        let mut scratch = vec![0f32; n];
        for part in tile.rows() {
            let sums = tile.row(part);
            for row in (part..rows).step_by(PARTS) {
                add(row, &mut scratch, sums);
            }
        }
    });
    let (total, parts) = sums.split_at_mut(n);
    for part in parts.chunks_exact(n) {
        total.iter_mut().zip(part).for_each(|(t, p)| *t += p);
    }
    total.to_vec()
}

/// Bins of thresholds an octave, and the octaves: from 2^-40 to 2^40.
const BINS: f32 = 32.0;
const OCTAVES: f32 = 40.0;

/// Share of FFN bytes below each threshold, as the samples of the calibration text have it.
pub(super) struct Shares {
    /// Bytes whose entries' scores fall in each bin.
    bins: Vec<f64>,
    all: f64,
}

impl Shares {
    /// Of `cut`.
    pub fn of_columns(model: &Model, plan: &CutPlan, layers: &[LayerSums]) -> Self {
        Self::new(model, plan, layers, |shares, layer, cut, sums, factors| {
            let [gate_up, down] = column_bytes(&layer.ffn);
            let coarse = layer.coarse(plan.coarse);
            for (side, samples, bytes, coarse) in [
                (&cut.inputs, &sums.normed_samples, gate_up, coarse[0]),
                (&cut.inner, &sums.inner_samples, down, coarse[1]),
            ] {
                let scores = scores(side, samples);
                let factors =
                    factors.iter().flat_map(|&factor| std::iter::repeat_n(factor, side.weight.len()));
                scores.zip(factors).for_each(|(score, factor)| {
                    shares.add_column(score / factor, score / factor, bytes, coarse);
                });
            }
        })
    }

    /// Of `neurons`.
    pub fn of_neurons(model: &Model, plan: &CutPlan, layers: &[LayerSums]) -> Self {
        Self::new(model, plan, layers, |shares, layer, cut, sums, factors| {
            let [_, down] = column_bytes(&layer.ffn);
            let up = layer.ffn.up.matrix().row_bytes() as f64;
            let [_, coarse] = layer.coarse(plan.coarse);
            let n = cut.gate.len();
            let of_gate = sums.gate_samples.iter().zip(cut.gate.iter().cycle()).map(|(q, w)| q.abs() * w);
            let factors = factors.iter().flat_map(|&factor| std::iter::repeat_n(factor, n));
            for ((gate, inner), factor) in of_gate.zip(scores(&cut.inner, &sums.inner_samples)).zip(factors) {
                shares.add(gate / factor, up);
                // Without its row of up, a neuron has no use for its column of down.
                shares.add_column(gate.min(inner) / factor, inner / factor, down, coarse);
            }
        })
    }

    fn new(
        model: &Model,
        plan: &CutPlan,
        layers: &[LayerSums],
        add: impl Fn(&mut Self, &Layer, &LayerCut, &LayerSums, &[f32]),
    ) -> Self {
        let mut shares = Self { bins: vec![0.0; (2.0 * OCTAVES * BINS) as usize], all: 0.0 };
        for ((layer, cut), sums) in model.layers().iter().zip(&plan.layers).zip(layers) {
            let ffn = &layer.ffn;
            let samples = (sums.normed_samples.len() / ffn.gate.cols()).max(1) as f64;
            shares.all += samples * ffn.bytes() as f64;
            let Some(cut) = cut else { continue };
            let factors = factors(&cut.depth, &sums.normed_samples, ffn.gate.cols());
            add(&mut shares, layer, cut, sums, &factors);
        }
        shares
    }

    /// A column of `bytes` that is left out above a threshold of `out`, and that already one `factor` times below `score` has read
    /// coarsely, which saves a `share` of it.
    fn add_column(&mut self, out: f32, score: f32, bytes: f64, (factor, share): (f32, f64)) {
        let coarse = if factor > 0.0 { out.min(score / factor) } else { out };
        self.add(coarse, bytes * share);
        self.add(out, bytes * (1.0 - share));
    }

    fn add(&mut self, score: f32, bytes: f64) {
        let last = self.bins.len() - 1;
        // A score of 0 has no logarithm; the cast puts it into the first bin.
        self.bins[(((score.log2() + OCTAVES) * BINS) as usize).min(last)] += bytes;
    }

    /// The threshold that leaves out `ratio` of all bytes; `None` if there are not so many.
    pub fn threshold(&self, ratio: f64) -> Option<f32> {
        let mut below = 0.0;
        let bin = self.bins.iter().position(|bytes| {
            below += bytes;
            below >= ratio * self.all
        })?;
        Some(((bin as f32 + 1.0) / BINS - OCTAVES).exp2())
    }
}
