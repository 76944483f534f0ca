//! What a user asks for, checked against the model it is for.

use super::{FfnSkip, Never, SkipPolicy};

/// Which policy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SkipMode {
    /// None.
    #[default]
    Off,
    /// The paper's.
    FfnSkip,
}

/// A policy and its parameters. `None`: the default for the model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SkipOptions {
    /// Which policy.
    pub mode: SkipMode,
    /// Cosine from which an FFN fires (default 0.98).
    pub threshold: Option<f32>,
    /// FFNs skipped once fired (default 1).
    pub k: Option<usize>,
    /// Tokens that run in full first (default 25: the paper's figure 5 finds no gain beyond 25-30).
    pub warm_up: Option<usize>,
    /// First layer that may be skipped and first after the last that may (default: all but the first
    /// and the last two, whose FFNs turn the stream most).
    pub cold: Option<(usize, usize)>,
    /// Whether prompt tokens past the warm-up are governed too.
    pub prefill: bool,
}

/// Why options do not fit.
#[derive(Debug, thiserror::Error, PartialEq)]
#[allow(missing_docs)]
pub enum SkipError {
    #[error("unknown skip policy {found:?}; known: {known}")]
    UnknownMode { found: String, known: &'static str },
    #[error("--skip-threshold {found}: a cosine lies between -1 and 1")]
    Threshold { found: f32 },
    #[error("--skip-k {found}: must be between 1 and the number of layers, {layers}")]
    K { found: usize, layers: usize },
    #[error("--skip-cold {start},{end}: expected start <= end <= {layers}, the number of layers")]
    Cold { start: usize, end: usize, layers: usize },
}

impl SkipMode {
    const NAMES: [(&'static str, Self); 2] = [("off", Self::Off), ("ffn-skip", Self::FfnSkip)];
    const KNOWN: &'static str = "off, ffn-skip";

    /// The mode called `name`.
    pub fn from_name(name: &str) -> Result<Self, SkipError> {
        let row = Self::NAMES.iter().find(|row| row.0 == name);
        row.map(|row| row.1).ok_or_else(|| SkipError::UnknownMode { found: name.into(), known: Self::KNOWN })
    }
}

impl SkipOptions {
    /// The policy for a model of `layers` layers.
    pub fn policy(&self, layers: usize) -> Result<Box<dyn SkipPolicy>, SkipError> {
        let threshold = self.threshold.unwrap_or(0.98);
        let k = self.k.unwrap_or(1);
        let (start, end) = self.cold.unwrap_or((1.min(layers), layers.saturating_sub(2).max(1)));
        if !(-1.0..=1.0).contains(&threshold) {
            return Err(SkipError::Threshold { found: threshold });
        }
        if !(1..=layers).contains(&k) {
            return Err(SkipError::K { found: k, layers });
        }
        if start > end || end > layers {
            return Err(SkipError::Cold { start, end, layers });
        }
        Ok(match self.mode {
            SkipMode::Off => Box::new(Never),
            SkipMode::FfnSkip => {
                Box::new(FfnSkip::new(threshold, k, self.warm_up.unwrap_or(25), (start, end)))
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_options_are_named() {
        let with = |f: fn(&mut SkipOptions)| {
            let mut o = SkipOptions { mode: SkipMode::FfnSkip, ..Default::default() };
            f(&mut o);
            o.policy(30).map(|p| p.name())
        };
        assert_eq!(with(|_| {}), Ok("ffn-skip"));
        assert_eq!(with(|o| o.threshold = Some(1.5)), Err(SkipError::Threshold { found: 1.5 }));
        assert!(with(|o| o.threshold = Some(f32::NAN)).is_err());
        assert_eq!(with(|o| o.k = Some(0)), Err(SkipError::K { found: 0, layers: 30 }));
        assert_eq!(with(|o| o.cold = Some((3, 31))), Err(SkipError::Cold { start: 3, end: 31, layers: 30 }));
        assert!(SkipMode::from_name("ffnskip").is_err());
    }
}
