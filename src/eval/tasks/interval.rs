//! Estimates with 95 % intervals.

use serde::Serialize;

/// Quantile of the normal distribution that leaves 2.5 % above.
const Z: f64 = 1.959_963_984_540_054;

/// The same quantile of Student's distribution with 1, 2, .. degrees of freedom: a group has as few as two answers.
const T: [f64; 30] = [
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604,
    2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555,
    2.0518, 2.0484, 2.0452, 2.0423,
];

/// Student's quantile; past the table by the first terms of its series in 1 / `freedom`.
fn student(freedom: usize) -> f64 {
    let (inverse, z3, z5) = (1.0 / freedom as f64, Z.powi(3), Z.powi(5));
    let series =
        || Z + (z3 + Z) / 4.0 * inverse + (5.0 * z5 + 16.0 * z3 + 3.0 * Z) / 96.0 * inverse * inverse;
    T.get(freedom - 1).copied().unwrap_or_else(series)
}

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

    /// Of a mean: Student's interval. One value has none, its ends are the value. `None` without any.
    pub fn mean(values: &[f64]) -> Option<Self> {
        let n = values.len();
        if n == 0 {
            return None;
        }
        let mean = values.iter().sum::<f64>() / n as f64;
        let squares: f64 = values.iter().map(|v| (v - mean) * (v - mean)).sum();
        let half = match n - 1 {
            0 => 0.0,
            freedom => student(freedom) * (squares / freedom as f64 / n as f64).sqrt(),
        };
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
        assert!((got.high - 2.0 - 4.3027 / 3f64.sqrt()).abs() < 1e-12);
        assert_eq!(Estimate::mean(&[]), None);
        assert_eq!(Estimate::mean(&[4.0]).unwrap().high, 4.0);
    }

    /// Any table of Student's distribution has 2.0211 for 40 and 1.9840 for 100 degrees of freedom.
    #[test]
    fn student_joins_his_table_and_ends_as_normal() {
        for (freedom, expected) in [(1, 12.7062), (30, 2.0423), (40, 2.0211), (100, 1.9840), (1 << 40, Z)] {
            assert!((student(freedom) - expected).abs() < 1e-4, "{freedom}: {}", student(freedom));
        }
        assert!((29..60).all(|freedom| student(freedom) > student(freedom + 1)));
    }
}
