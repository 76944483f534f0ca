//! What was skipped, and what the cosines were.

/// Counts of a sequence (or of several, added up), by layer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SkipStats {
    layers: Vec<Layer>,
    /// Tokens whose logits were shortlisted, and bytes that their output matrices left unread.
    shortlisted: u64,
    output_unread: i64,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Layer {
    ran: u64,
    skipped: u64,
    left_out: u64,
    /// Bytes of the FFNs that ran which cuts left unread; less than nothing where the cut form is larger, or stand-ins were read.
    unread: i64,
    cosine_sum: f64,
    cosines: u64,
}

impl SkipStats {
    /// For a model of `layers` layers.
    pub fn new(layers: usize) -> Self {
        Self { layers: vec![Layer::default(); layers], ..Self::default() }
    }

    /// An FFN ran for `rows` tokens.
    pub fn ran(&mut self, layer: usize, rows: u64) {
        self.layers[layer].ran += rows;
    }

    /// An FFN was skipped for `rows` tokens.
    pub fn skipped(&mut self, layer: usize, rows: u64) {
        self.layers[layer].skipped += rows;
    }

    /// An FFN was skipped for a token that read `bytes` weight bytes of something in its place.
    pub fn stood_in(&mut self, layer: usize, bytes: i64) {
        let layer = &mut self.layers[layer];
        layer.skipped += 1;
        layer.unread -= bytes;
    }

    /// The layer was left out as a whole for `rows` tokens, whose FFNs are counted as skipped too.
    pub fn left_out(&mut self, layer: usize, rows: u64) {
        self.layers[layer].left_out += rows;
    }

    /// Of an FFN that [`ran`](Self::ran), so many weight bytes were not read.
    pub fn unread(&mut self, layer: usize, bytes: i64) {
        self.layers[layer].unread += bytes;
    }

    /// The logits of some tokens were shortlisted, which left so many bytes of their output matrices unread.
    pub fn output_unread(&mut self, (tokens, bytes): (u64, i64)) {
        self.shortlisted += tokens;
        self.output_unread += bytes;
    }

    /// Bytes of the output matrix that a token left unread whose logits were shortlisted; 0 if there is none.
    pub fn output_unread_by_token(&self) -> f64 {
        self.output_unread as f64 / self.shortlisted.max(1) as f64
    }

    /// The cosine of an FFN that ran.
    pub fn cosine(&mut self, layer: usize, cosine: f32) {
        let layer = &mut self.layers[layer];
        if cosine.is_finite() {
            layer.cosine_sum += f64::from(cosine);
            layer.cosines += 1;
        }
    }

    /// Adds the counts of another run of the same model.
    pub fn add(&mut self, other: &Self) {
        self.output_unread((other.shortlisted, other.output_unread));
        self.layers.resize(self.layers.len().max(other.layers.len()), Layer::default());
        for (a, b) in self.layers.iter_mut().zip(&other.layers) {
            a.ran += b.ran;
            a.skipped += b.skipped;
            a.left_out += b.left_out;
            a.unread += b.unread;
            a.cosine_sum += b.cosine_sum;
            a.cosines += b.cosines;
        }
    }

    /// Share of FFN blocks skipped, 0 to 1.
    pub fn share(&self) -> f64 {
        let sum = |of: fn(&Layer) -> u64| -> u64 { self.layers.iter().map(of).sum() };
        let (skipped, all) = (sum(|l| l.skipped), sum(|l| l.ran + l.skipped));
        if all == 0 { 0.0 } else { skipped as f64 / all as f64 }
    }

    /// Share of layers left out as a whole, 0 to 1.
    pub fn layer_share(&self) -> f64 {
        let sum = |of: fn(&Layer) -> u64| self.layers.iter().map(of).sum::<u64>();
        let all = sum(|l| l.ran + l.skipped);
        if all == 0 { 0.0 } else { sum(|l| l.left_out) as f64 / all as f64 }
    }

    /// Share of FFN weight bytes left unread, up to 1, where tokens are decoded one at a time: those of
    /// skipped blocks and those that cuts left out. `bytes(layer)` is the size of a layer's FFN.
    pub fn weighted_share(&self, bytes: impl Fn(usize) -> u64) -> f64 {
        let sum = |of: fn(&Layer) -> u64| -> f64 {
            self.layers.iter().enumerate().map(|(i, l)| (of(l) * bytes(i)) as f64).sum()
        };
        let cut: f64 = self.layers.iter().map(|l| l.unread as f64).sum();
        let (skipped, all) = (sum(|l| l.skipped), sum(|l| l.ran + l.skipped));
        if all == 0.0 { 0.0 } else { (skipped + cut) / all }
    }

    /// Bytes that cuts left unread in each layer, of all tokens; below 0 where the cut form is larger.
    pub fn unread_by_layer(&self) -> impl Iterator<Item = i64> {
        self.layers.iter().map(|l| l.unread)
    }

    /// Share of FFN blocks skipped in each layer, 0 to 1.
    pub fn share_by_layer(&self) -> Vec<f64> {
        let share = |l: &Layer| l.skipped as f64 / (l.ran + l.skipped).max(1) as f64;
        self.layers.iter().map(share).collect()
    }

    /// Share of the weight bytes of each layer's FFN left unread, as in [`weighted_share`](Self::weighted_share).
    pub fn weighted_share_by_layer(&self, bytes: impl Fn(usize) -> u64) -> Vec<f64> {
        let share = |(i, l): (usize, &Layer)| {
            let all = ((l.ran + l.skipped) * bytes(i)).max(1);
            ((l.skipped * bytes(i)) as f64 + l.unread as f64) / all as f64
        };
        self.layers.iter().enumerate().map(share).collect()
    }

    /// Mean cosine in each layer, of the FFNs that ran and were measured.
    pub fn mean_cosines(&self) -> Vec<Option<f64>> {
        self.layers.iter().map(|l| (l.cosines > 0).then(|| l.cosine_sum / l.cosines as f64)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_and_means() {
        let mut stats = SkipStats::new(2);
        assert_eq!(stats.share(), 0.0);
        stats.ran(0, 3);
        stats.skipped(1, 1);
        stats.left_out(1, 1);
        stats.cosine(0, 0.5);
        stats.cosine(0, 1.0);
        stats.cosine(0, f32::NAN);
        assert_eq!(stats.share(), 0.25);
        assert_eq!(stats.weighted_share(|layer| [1, 3][layer]), 0.5);
        assert_eq!(stats.layer_share(), 0.25);
        assert_eq!(stats.share_by_layer(), [0.0, 1.0]);
        assert_eq!(stats.mean_cosines(), [Some(0.75), None]);
        let mut twice = stats.clone();
        twice.add(&stats);
        assert_eq!(twice.share(), 0.25);
        // Two of the three bytes that layer 0 would have read.
        stats.unread(0, 2);
        assert_eq!(stats.share(), 0.25);
        assert_eq!(stats.weighted_share(|layer| [1, 3][layer]), 5.0 / 6.0);
        assert_eq!(stats.weighted_share_by_layer(|layer| [1, 3][layer]), [2.0 / 3.0, 1.0]);
        // An FFN of ten bytes had one of two in its place.
        let mut stats = SkipStats::new(1);
        stats.ran(0, 3);
        stats.stood_in(0, 2);
        assert_eq!((stats.share(), stats.weighted_share(|_| 10)), (0.25, 0.2));
    }
}
