//! The policies that the paper compares its rule with. None of them looks at what is computed.

use std::ops::Range;

use super::{Decision, SkipPolicy};

/// The same FFNs for every token past the warm-up: the paper's baseline without input adaptivity.
#[derive(Clone, Debug)]
pub struct Static {
    /// Whether the FFN of a layer is skipped.
    skipped: Vec<bool>,
    warm_up: usize,
    warming_up: bool,
}

impl Static {
    /// Skips the FFNs of `layers` of a model of `total`.
    pub fn new(layers: &[usize], total: usize, warm_up: usize) -> Self {
        Self { skipped: marked(layers, total), warm_up, warming_up: true }
    }
}

/// For each of `total` layers, whether it is in `layers`.
fn marked(layers: &[usize], total: usize) -> Vec<bool> {
    (0..total).map(|layer| layers.contains(&layer)).collect()
}

impl SkipPolicy for Static {
    fn name(&self) -> &'static str {
        "static"
    }

    fn begin_token(&mut self, index: usize) {
        self.warming_up = index < self.warm_up;
    }

    fn decide(&mut self, layer: usize) -> Decision {
        if !self.warming_up && self.skipped[layer] { Decision::Skip } else { Decision::Run }
    }

    fn boxed_clone(&self) -> Box<dyn SkipPolicy> {
        Box::new(self.clone())
    }
}

/// Each FFN of the warm region with the same probability, every token anew.
///
/// A draw is a hash of seed, token and layer, so that a text is skipped alike however it is cut into steps.
#[derive(Clone, Debug)]
pub struct Random {
    probability: f64,
    seed: u64,
    warm_up: usize,
    warm: Range<usize>,
    index: usize,
}

impl Random {
    /// Skips an FFN of the layers `warm` with `probability`.
    pub fn new(probability: f64, seed: u64, warm_up: usize, warm: Range<usize>) -> Self {
        Self { probability, seed, warm_up, warm, index: 0 }
    }

    /// A number in 0..1.
    fn draw(&self, layer: usize) -> f64 {
        let at = (self.index as u64) << 16 | layer as u64;
        let bits = mix(mix(self.seed).wrapping_add(at));
        (bits >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// The output function of SplitMix64 (Steele, Lea and Flood 2014).
fn mix(z: u64) -> u64 {
    let z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl SkipPolicy for Random {
    fn name(&self) -> &'static str {
        "random"
    }

    fn begin_token(&mut self, index: usize) {
        self.index = index;
    }

    fn decide(&mut self, layer: usize) -> Decision {
        let may = self.index >= self.warm_up && self.warm.contains(&layer);
        if may && self.draw(layer) < self.probability { Decision::Skip } else { Decision::Run }
    }

    fn boxed_clone(&self) -> Box<dyn SkipPolicy> {
        Box::new(self.clone())
    }
}

/// Whole layers dropped for good: those of least Block Influence, `1 - mean cos(layer in, layer out)`
/// (ShortGPT, Men et al. 2024, arXiv 2403.03853).
#[derive(Clone, Debug)]
pub struct ShortGpt {
    dropped: Vec<bool>,
    warm_up: usize,
    warming_up: bool,
}

impl ShortGpt {
    /// Drops `layers` of a model of `total`.
    pub fn new(layers: &[usize], total: usize, warm_up: usize) -> Self {
        Self { dropped: marked(layers, total), warm_up, warming_up: true }
    }
}

impl SkipPolicy for ShortGpt {
    fn name(&self) -> &'static str {
        "shortgpt"
    }

    fn begin_token(&mut self, index: usize) {
        self.warming_up = index < self.warm_up;
    }

    fn runs_layer(&mut self, layer: usize) -> bool {
        self.warming_up || !self.dropped[layer]
    }

    fn decide(&mut self, _: usize) -> Decision {
        Decision::Run
    }

    fn boxed_clone(&self) -> Box<dyn SkipPolicy> {
        Box::new(self.clone())
    }
}

/// Whole layers, the more the later a token comes, the lowest of the warm region first (SkipDecode, Del
/// Corro et al. 2023, arXiv 2307.02628). A layer that a token runs was run by all tokens before it.
///
/// The number of layers left out grows linearly from none at the end of the warm-up to the most at the horizon, the
/// greatest length that is expected, and stays there.
#[derive(Clone, Debug)]
pub struct SkipDecode {
    /// Layers more for each token.
    slope: f64,
    /// From the end of the warm-up to the horizon.
    times: Range<usize>,
    warm: Range<usize>,
    index: usize,
}

impl SkipDecode {
    /// The horizon where no other is given: the length of calibration windows.
    pub const HORIZON: usize = 512;

    /// The slope with which a share `ratio` of all `layers` is left out, on average over the tokens `times`, from the
    /// end of the warm-up to the horizon; `None` if even all of `warm` are fewer.
    pub fn slope(ratio: f64, layers: usize, times: &Range<usize>, warm: &Range<usize>) -> Option<f64> {
        let tokens = times.len().max(1);
        let share = |slope: f64| {
            let skipped: f64 = (0..tokens).map(|t| (slope * t as f64).floor().min(warm.len() as f64)).sum();
            skipped / (tokens * layers.max(1)) as f64
        };
        let (mut low, mut high) = (0.0, warm.len() as f64);
        if share(high) < ratio {
            return None;
        }
        for _ in 0..60 {
            let middle = (low + high) / 2.0;
            *(if share(middle) < ratio { &mut low } else { &mut high }) = middle;
        }
        Some(high)
    }

    /// Leaves out `slope` layers more with each of the tokens `times`, of the layers `warm`.
    pub fn new(slope: f64, times: Range<usize>, warm: Range<usize>) -> Self {
        Self { slope, times, warm, index: 0 }
    }
}

impl SkipPolicy for SkipDecode {
    fn name(&self) -> &'static str {
        "skipdecode"
    }

    fn begin_token(&mut self, index: usize) {
        self.index = index;
    }

    fn runs_layer(&mut self, layer: usize) -> bool {
        let t = self.index.min(self.times.end.saturating_sub(1)).saturating_sub(self.times.start);
        let skipped = (self.slope * t as f64).floor().min(self.warm.len() as f64) as usize;
        !(self.warm.start..self.warm.start + skipped).contains(&layer)
    }

    fn decide(&mut self, _: usize) -> Decision {
        Decision::Run
    }

    fn boxed_clone(&self) -> Box<dyn SkipPolicy> {
        Box::new(self.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// FFNs that token `index` skips, by `decide` or with their layer.
    fn skipped(policy: &mut dyn SkipPolicy, index: usize, layers: usize) -> Vec<usize> {
        policy.begin_token(index);
        (0..layers).filter(|&l| !policy.runs_layer(l) || policy.decide(l) == Decision::Skip).collect()
    }

    #[test]
    fn fixed_layers_are_left_out_after_the_warm_up() {
        let mut ffns = Static::new(&[2, 5], 8, 3);
        let mut layers = ShortGpt::new(&[2, 5], 8, 3);
        assert!(skipped(&mut ffns, 2, 8).is_empty() && skipped(&mut layers, 2, 8).is_empty());
        assert_eq!(skipped(&mut ffns, 3, 8), [2, 5]);
        assert_eq!(skipped(&mut layers, 3, 8), [2, 5]);
        assert!(ffns.runs_layer(2), "`static` leaves attention alone");
    }

    #[test]
    fn random_skips_its_share_and_repeats_itself() {
        let run = |seed| {
            let mut policy = Random::new(0.3, seed, 5, 2..12);
            (0..1005).map(|t| skipped(&mut policy, t, 16)).collect::<Vec<_>>()
        };
        let (a, b, other) = (run(1), run(1), run(2));
        assert_eq!(a, b);
        assert_ne!(a, other);
        assert!(a[..5].iter().all(Vec::is_empty), "warm-up");
        let all: Vec<usize> = a.concat();
        assert!(all.iter().all(|layer| (2..12).contains(layer)));
        // 10000 draws: the standard deviation is 46.
        assert!((2800..3200).contains(&all.len()), "{}", all.len());
        for layer in 2..12 {
            let n = all.iter().filter(|&&l| l == layer).count();
            assert!((230..370).contains(&n), "layer {layer}: {n} of 1000");
        }
    }

    #[test]
    fn depth_falls_with_the_position_bottom_first() {
        let slope = SkipDecode::slope(0.25, 20, &(12..SkipDecode::HORIZON), &(1..18)).unwrap();
        let mut policy = SkipDecode::new(slope, 12..SkipDecode::HORIZON, 1..18);
        let counts: Vec<usize> = (0..SkipDecode::HORIZON)
            .map(|t| {
                let skipped = skipped(&mut policy, t, 20);
                assert!(skipped.iter().copied().eq(1..1 + skipped.len()), "{skipped:?}");
                skipped.len()
            })
            .collect();
        assert!(counts[..13].iter().all(|&n| n == 0));
        assert!(counts.is_sorted());
        let share = counts.iter().sum::<usize>() as f64 / (20 * (SkipDecode::HORIZON - 12)) as f64;
        assert!((share - 0.25).abs() < 0.002, "{share}");
        assert_eq!(skipped(&mut policy, 100_000, 20).len(), counts[SkipDecode::HORIZON - 1]);
        assert_eq!(SkipDecode::slope(0.86, 20, &(12..SkipDecode::HORIZON), &(1..18)), None);
    }
}
