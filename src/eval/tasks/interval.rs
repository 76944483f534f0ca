//! Estimates with 95 % intervals.

use serde::Serialize;

/// Quantile of the normal distribution that leaves 2.5 % above.
const Z: f64 = 1.959_963_984_540_054;

/// A mean, and where the true one lies with 95 % confidence.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[allow(missing_docs)]
pub struct Estimate {
    pub mean: f64,
    pub low: f64,
    pub high: f64,
    pub n: usize,
}

impl Estimate {
    /// Of a share, from `n` times yes or no: Wilson's interval (Wilson 1927). `None` without any.
    pub fn share(yes: usize, n: usize) -> Option<Self> {
        if n == 0 {
            return None;
        }
        let (p, m) = (yes as f64 / n as f64, n as f64);
        let centre = (p + Z * Z / (2.0 * m)) / (1.0 + Z * Z / m);
        let half = Z / (1.0 + Z * Z / m) * (p * (1.0 - p) / m + Z * Z / (4.0 * m * m)).sqrt();
        Some(Self { mean: p, low: (centre - half).max(0.0), high: (centre + half).min(1.0), n })
    }

    /// Of a mean: the normal approximation. One value gives an interval of no width. `None` without any.
    pub fn mean(values: &[f64]) -> Option<Self> {
        let n = values.len();
        if n == 0 {
            return None;
        }
        let mean = values.iter().sum::<f64>() / n as f64;
        let squares: f64 = values.iter().map(|v| (v - mean) * (v - mean)).sum();
        let half = Z * (squares / n.saturating_sub(1).max(1) as f64 / n as f64).sqrt();
        Some(Self { mean, low: mean - half, high: mean + half, n })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Brown, Cai and DasGupta 2001 use 0 of 10, among others: (0, 0.2775); Newcombe 1998, table I: 81 of 263 is
    /// 0.2553 to 0.3662, 15 of 148 is 0.0624 to 0.1605.
    #[test]
    fn wilson_as_published() {
        for (yes, n, low, high) in [
            (81, 263, 0.2553, 0.3662),
            (15, 148, 0.0624, 0.1605),
            (0, 20, 0.0, 0.1611),
            (1, 29, 0.0061, 0.1718),
        ] {
            let got = Estimate::share(yes, n).unwrap();
            assert!((got.low - low).abs() < 1e-4 && (got.high - high).abs() < 1e-4, "{got:?}");
        }
        assert_eq!(Estimate::share(0, 0), None);
    }

    #[test]
    fn means_have_an_interval() {
        let got = Estimate::mean(&[1.0, 2.0, 3.0]).unwrap();
        assert_eq!((got.mean, got.n), (2.0, 3));
        assert!((got.high - 2.0 - Z / 3f64.sqrt()).abs() < 1e-12);
        assert_eq!(Estimate::mean(&[]), None);
        assert_eq!(Estimate::mean(&[4.0]).unwrap().high, 4.0);
    }
}
