//! Stand-ins: low-rank linear maps in the place of FFNs, and what foretells how good they are.
//!
//! A map that serves all tokens explains 40 to 60 % of an FFN's output. It need not serve all: where its error would cost
//! much, the FFN runs. So each is learnt from the tokens that will have it - those with the least error foretold - and who
//! has it is foretold anew, in turns, as in expectation maximisation. What foretells an error is a regression of its
//! logarithm on the normed stream, which explains nine tenths of its variance (docs/skipping.md, "Stand-ins").

use super::gather::{LayerSums, widened};
use super::linear::{Ridge, centre, cross, dots, leading, means, product};
use super::{Alone, Progress, Result, Stage, Trials, report};
use crate::kernels::Kernels;
use crate::model::Model;
use crate::ops::Compute;
use crate::skip::{Decision, StandIn};

/// Rank for each neuron of an FFN, and the largest: a stand-in has a few per cent of an FFN's bytes.
const RANK_SHARE: f64 = 1.0 / 16.0;
const LARGEST_RANK: usize = 256;
/// Ranks are a multiple of this, a block of quantised weights.
const RANK_STEP: usize = 32;
/// Rounds in which maps and who has them are learnt in turn.
const ROUNDS: usize = 3;
/// Share of all tokens and layers that the maps are learnt from.
const SHARE: f64 = 0.2;
/// The weight of a token falls from 1 to 0 over about two octaves of foretold cost, and no further than to this.
const LEAST_WEIGHT: f32 = 1e-3;
/// Added to errors before their logarithm is taken, in units of the stream's mean square.
const LEAST_ERROR: f32 = 1e-9;

/// A layer's map, before it is rounded.
struct Map {
    /// `[rank, embedding]`
    narrow: Vec<f32>,
    /// `[rank, embedding]`: the transpose of what a [`StandIn`] has.
    wide: Vec<f32>,
    base: Vec<f32>,
    probe: Vec<f32>,
    bias: f32,
    /// Binary logarithms, as the probe foretells them, of each token's error.
    foretold: Vec<f32>,
    /// Mean error of all tokens.
    error: f32,
}

/// A stand-in for each FFN.
pub(super) fn learn(
    model: &mut Model,
    on: Compute<'_>,
    trials: &Trials<'_>,
    layers: &[LayerSums],
    progress: Progress<'_>,
) -> Result<Vec<StandIn>> {
    let (embedding, n) = (model.config().embedding, layers.len());
    let rank = rank(model.config().ffn, embedding);
    // Fitting a layer takes about as long as trying it.
    let all = (ROUNDS + 2) * n;
    let mut maps = maps(on, layers, |_| None, (embedding, rank));
    report(&mut *progress, Stage::StandIns, n, all)?;
    model.prepare_stand_ins(maps.iter().map(Map::rounded).collect())?;
    let mut costs = Vec::new();
    for (layer, map) in maps.iter().enumerate() {
        let always = Decision::StandIn { below: f32::INFINITY, otherwise: None };
        let trial = trials.run(model, on, Box::new(Alone::new(layer, always)))?;
        costs.push((trial.kl.max(1e-6) as f32 / map.error.max(LEAST_ERROR)).log2());
        report(&mut *progress, Stage::StandIns, n + layer + 1, all)?;
    }
    for round in 0..ROUNDS {
        let below = threshold(&maps, &costs, SHARE);
        let weights = |layer: usize| {
            let foretold: &[f32] = &maps[layer].foretold;
            Some(foretold.iter().map(|f| weight(f + costs[layer] - below)).collect())
        };
        maps = self::maps(on, layers, weights, (embedding, rank));
        report(&mut *progress, Stage::StandIns, (round + 3) * n, all)?;
    }
    for (map, cost) in maps.iter_mut().zip(&costs) {
        map.bias += cost;
    }
    Ok(maps.iter().map(Map::rounded).collect())
}

/// What the probes foretell of each token and layer of the calibration's windows.
pub(super) struct Foretold {
    /// Rising; of all windows, and of those that settings are tried on, which are the first.
    all: Vec<f32>,
    tried: Vec<f32>,
}

impl Foretold {
    /// `tried`: share of the windows that settings are tried on.
    pub fn of(on: Compute<'_>, layers: &[LayerSums], stand_ins: &[StandIn], tried: f64) -> Self {
        let mut found = Self { all: Vec::new(), tried: Vec::new() };
        for (sums, stand_in) in layers.iter().zip(stand_ins) {
            let x = widened(&sums.traced);
            let rows = x.chunks_exact(stand_in.probe.len());
            let first = found.all.len();
            found.all.extend(rows.map(|x| on.kernels.dot_f32(x, &stand_in.probe) + stand_in.bias));
            let n = ((found.all.len() - first) as f64 * tried).round() as usize;
            found.tried.extend(&found.all[first..][..n]);
        }
        found.all.sort_by(f32::total_cmp);
        found.tried.sort_by(f32::total_cmp);
        found
    }

    /// What the share `ratio` is below.
    pub fn threshold(&self, ratio: f32) -> f32 {
        let at = (f64::from(ratio) * self.all.len() as f64) as usize;
        self.all.get(at.min(self.all.len().saturating_sub(1))).copied().unwrap_or(f32::NEG_INFINITY)
    }

    /// The shares below a threshold: of all windows, and of those that settings are tried on.
    pub fn shares(&self, below: f32) -> (f64, f64) {
        let share = |costs: &[f32]| costs.partition_point(|&c| c < below) as f64 / costs.len().max(1) as f64;
        (share(&self.all), share(&self.tried))
    }
}

/// A multiple of [`RANK_STEP`] if the embedding is as large.
fn rank(ffn: usize, embedding: usize) -> usize {
    let rank = (ffn as f64 * RANK_SHARE) as usize / RANK_STEP * RANK_STEP;
    rank.clamp(RANK_STEP, LARGEST_RANK).min(embedding)
}

/// By how far a token's foretold cost lies above the threshold, in octaves.
fn weight(above: f32) -> f32 {
    1.0 / (1.0 + above.exp2()) + LEAST_WEIGHT
}

/// What a share of all tokens' foretold costs is below.
fn threshold(maps: &[Map], costs: &[f32], share: f64) -> f32 {
    let costs = maps.iter().zip(costs).flat_map(|(map, cost)| map.foretold.iter().map(move |f| f + cost));
    let mut costs: Vec<f32> = costs.collect();
    let at = (costs.len() as f64 * share) as usize;
    if at < costs.len() { *costs.select_nth_unstable_by(at, f32::total_cmp).1 } else { 0.0 }
}

/// The maps of all layers, side by side, from tokens as often as their weights say (`None`: all once).
fn maps(
    on: Compute<'_>,
    layers: &[LayerSums],
    weights: impl Fn(usize) -> Option<Vec<f32>> + Sync,
    shape: (usize, usize),
) -> Vec<Map> {
    let mut maps: Vec<Option<Map>> = layers.iter().map(|_| None).collect();
    on.team.for_plain_tiles(&mut maps, 1, (1, 1), |mut tile| {
        for layer in tile.rows() {
            tile.row(layer)[0] = Some(Map::of(on.kernels, &layers[layer], weights(layer), shape));
        }
    });
    maps.into_iter().flatten().collect()
}

impl Map {
    fn of(kernels: Kernels, sums: &LayerSums, weights: Option<Vec<f32>>, (d, rank): (usize, usize)) -> Self {
        let (mut x, mut y) = (widened(&sums.traced), widened(&sums.traced_out));
        let rows = x.len() / d;
        let weights = weights.unwrap_or_else(|| vec![1.0; rows]);
        let (x_mean, y_mean) = (means(kernels, &x, &weights), means(kernels, &y, &weights));
        centre(&mut x, &x_mean);
        centre(&mut y, &y_mean);
        let mut weighed = x.clone();
        for (x, w) in weighed.chunks_exact_mut(d).zip(&weights) {
            x.iter_mut().for_each(|x| *x *= w);
        }
        // C^T = Y^T W X and B^T, whose rows solve (X^T W X) b = c.
        let to = cross(kernels, &y, d, &weighed, d);
        let mut full = to.clone();
        Ridge::of(kernels, cross(kernels, &weighed, d, &x, d), d).solve(&mut full);
        // What the full map explains: C^T B. Its first directions are the best map of that rank (Izenman 1975).
        let wide = leading(kernels, &dots(kernels, &to, &full, d), d, rank);
        let narrow = product(kernels, &wide, d, &full, d);

        let guessed = product(kernels, &dots(kernels, &x, &narrow, d), rank, &wide, d);
        let errors = guessed.chunks_exact(d).zip(y.chunks_exact(d)).zip(&sums.traced_rms);
        let error = |((guess, y), rms): ((&[f32], &[f32]), &f32)| {
            let square: f32 = guess.iter().zip(y).map(|(g, y)| (g - y) * (g - y)).sum();
            square / (d as f32 * rms * rms).max(f32::MIN_POSITIVE)
        };
        let errors: Vec<f32> = errors.map(error).collect();
        let from_mean: Vec<f32> = narrow.chunks_exact(d).map(|row| kernels.dot_f32(row, &x_mean)).collect();
        let shift = product(kernels, &from_mean, rank, &wide, d);
        let base = y_mean.iter().zip(&shift).map(|(y, s)| y - s).collect();
        let logarithms: Vec<f32> = errors.iter().map(|e| (e + LEAST_ERROR).log2()).collect();
        let (probe, bias, foretold) = foretell(kernels, x, &x_mean, &logarithms);
        let error = errors.iter().sum::<f32>() / rows.max(1) as f32;
        Self { narrow, wide, base, probe, bias, foretold, error }
    }

    fn rounded(&self) -> StandIn {
        let d = self.base.len();
        let rank = self.wide.len() / d;
        let mut wide = vec![0.0; d * rank];
        for (k, row) in self.wide.chunks_exact(d).enumerate() {
            row.iter().enumerate().for_each(|(j, &v)| wide[j * rank + k] = v);
        }
        StandIn::new(&self.probe, self.bias, &self.base, &self.narrow, &wide)
    }
}

/// The regression of `targets` on the rows of `x`, from which `mean` was subtracted: weights, what is added to their
/// product with a row as it was, and what they make of each row.
fn foretell(kernels: Kernels, mut x: Vec<f32>, mean: &[f32], targets: &[f32]) -> (Vec<f32>, f32, Vec<f32>) {
    let d = mean.len();
    let more = means(kernels, &x, &vec![1.0; targets.len()]);
    centre(&mut x, &more);
    let level = targets.iter().sum::<f32>() / targets.len().max(1) as f32;
    let centred: Vec<f32> = targets.iter().map(|t| t - level).collect();
    let mut probe = cross(kernels, &centred, 1, &x, d);
    Ridge::of(kernels, cross(kernels, &x, d, &x, d), d).solve(&mut probe);
    let foretold = x.chunks_exact(d).map(|x| kernels.dot_f32(x, &probe) + level).collect();
    let bias = level - kernels.dot_f32(&probe, mean) - kernels.dot_f32(&probe, &more);
    (probe, bias, foretold)
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    const D: usize = 32;

    /// Tokens of two kinds, told apart by the first entry: of one the FFN is linear, of the other it is not.
    fn sums(rows: usize) -> LayerSums {
        let mut seed = 7u64;
        let mut next = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        let mut sums = LayerSums { traced_rms: vec![1.0; rows], ..LayerSums::default() };
        for t in 0..rows {
            let mut x: Vec<f32> = (0..D).map(|_| next()).collect();
            let easy = t % 2 == 0;
            x[0] = if easy { 3.0 } else { -3.0 };
            let y = (0..D).map(|j| if easy { x[(j + 1) % D] } else { 3.0 * next() });
            sums.traced_out.extend(y.map(bf16::from_f32));
            sums.traced.extend(x.into_iter().map(bf16::from_f32));
        }
        sums
    }

    #[test]
    fn a_map_learns_from_the_tokens_that_will_have_it() {
        let kernels = Kernels::select(None).unwrap();
        let sums = sums(2000);
        let all = Map::of(kernels, &sums, None, (D, D));
        let split = |map: &Map| {
            let of = |kind| map.foretold.iter().skip(kind).step_by(2).sum::<f32>() / 1000.0;
            (of(0), of(1))
        };
        let (easy, hard) = split(&all);
        assert!(easy + 2.0 < hard, "{easy} {hard}");
        let below = threshold(std::slice::from_ref(&all), &[0.0], 0.4);
        let weights = all.foretold.iter().map(|f| weight(f - below)).collect();
        let (again, _) = split(&Map::of(kernels, &sums, Some(weights), (D, D)));
        assert!(again + 2.0 < easy, "{again}, with all tokens {easy}");
    }

    #[test]
    fn shares_are_those_of_the_windows() {
        let found = Foretold { all: (0..100).map(|i| i as f32).collect(), tried: vec![5.0, 6.0, 50.0, 90.0] };
        assert_eq!(found.threshold(0.2), 20.0);
        assert_eq!(found.shares(20.0), (0.2, 0.5));
        let none = Foretold { all: vec![], tried: vec![] };
        assert_eq!((none.threshold(0.5), none.shares(0.0)), (f32::NEG_INFINITY, (0.0, 0.0)));
    }

    #[test]
    fn ranks_fit_blocks_and_models() {
        assert_eq!([rank(1536, 576), rank(8960, 1536), rank(96, 64), rank(96, 20)], [96, 256, 32, 20]);
    }
}
