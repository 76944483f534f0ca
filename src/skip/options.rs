//! What a user asks for, checked against the model it is for.

use std::ops::Range;

use super::{
    Calibration, Curve, CutCalibration, FfnSkip, Never, Point, Random, ShortGpt, Shortlisting, SkipDecode,
    SkipPolicy, Static, Uniform,
};

/// Which policy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SkipMode {
    /// None.
    #[default]
    Off,
    /// The best that the calibration offers at its stated quality.
    Auto,
    /// The paper's.
    FfnSkip,
    /// The same FFNs for every token.
    Static,
    /// Random FFNs.
    Random,
    /// Whole layers of least influence.
    ShortGpt,
    /// Whole layers, the more the later the token.
    SkipDecode,
    /// Inputs and neurons of every FFN, by columns.
    Cut,
    /// Neurons of every FFN, by rows of up and columns of down.
    Neurons,
    /// FFNs whose stand-in is foretold to be good enough.
    StandIn,
    /// The same, and columns of the others.
    Mixed,
}

/// A policy and its parameters. `None`: the default for the model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SkipOptions {
    /// Which policy.
    pub mode: SkipMode,
    /// Whether most of the output matrix is left unread, too.
    pub output: bool,
    /// Share to be skipped by tokens past the warm-up, 0 to 1: of the FFN blocks, or of the FFN weight bytes
    /// where parts of FFNs are left out. Sets the strength of any policy.
    pub ratio: Option<f32>,
    /// Cosine from which an FFN fires (default 0.98).
    pub threshold: Option<f32>,
    /// FFNs skipped once fired (default 1).
    pub k: Option<usize>,
    /// Tokens that run in full first (default 25: the paper's figure 5 finds no gain beyond 25-30).
    pub warm_up: Option<usize>,
    /// First layer that may be skipped and first after the last that may (default: what calibration found,
    /// else all but the first and the last two, whose FFNs turn the stream most).
    pub cold: Option<(usize, usize)>,
    /// Seed of `random`.
    pub seed: u64,
    /// Whether prompt tokens past the warm-up are governed too.
    pub prefill: bool,
    /// `skipdecode`: tokens over which it reaches its depth (default 512, the length of calibration windows).
    pub horizon: Option<usize>,
}

/// The shapes that policies depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct ModelFacts {
    pub layers: usize,
    pub embedding: usize,
    pub ffn: usize,
}

/// Why options do not fit.
#[derive(Debug, thiserror::Error, PartialEq)]
#[allow(missing_docs)]
pub enum SkipError {
    #[error("unknown skip policy {found:?}; known: {known}")]
    UnknownMode { found: String, known: String },
    #[error("--skip-threshold {found}: a cosine lies between -1 and 1")]
    Threshold { found: f32 },
    #[error("--skip-k {found}: must be between 1 and the number of layers, {layers}")]
    K { found: usize, layers: usize },
    #[error("--skip-cold {start},{end}: expected start <= end <= {layers}, the number of layers")]
    Cold { start: usize, end: usize, layers: usize },
    #[error("--skip-ratio {found}: a share lies between 0 and 1")]
    Ratio { found: f32 },
    #[error("--skip-ratio {found}: {mode} reaches {most:.3} at most with this model and these cold regions")]
    RatioTooHigh { found: f32, mode: &'static str, most: f32 },
    #[error("--skip {mode} has no {flag}: its strength is set with --skip-ratio")]
    Unused { mode: &'static str, flag: &'static str },
    #[error("--skip {mode} has no --skip-ratio: {why}")]
    NoRatio { mode: &'static str, why: &'static str },
    #[error("--skip-ratio sets the threshold: give one of the two")]
    RatioAndThreshold,
    #[error("--skip-ratio is calibrated for --skip-k 1; with {found}, give --skip-threshold")]
    RatioAndK { found: usize },
    #[error("--skip {mode} needs --skip-ratio")]
    NeedsRatio { mode: &'static str },
    #[error(
        "--skip {mode}{with} needs a calibration of the model: make one with `skiff calibrate -m MODEL -f TEXT`, \
         which is found beside the model, or name its file with --skip-file"
    )]
    NeedsCalibration { mode: &'static str, with: &'static str },
    #[error("--skip auto: the calibration file sends it to {found:?}")]
    NoPoint { found: String },
    #[error(
        "--skip {mode}: the calibration file has nothing on it; add it with `skiff calibrate --complete`, or calibrate anew"
    )]
    Uncalibrated { mode: &'static str },
}

impl SkipMode {
    /// Its name.
    pub fn name(self) -> &'static str {
        SkipChoice::from(self).name()
    }

    /// Whether there is no policy of this mode without a calibration, whatever the parameters.
    pub fn needs_calibration(self) -> bool {
        !matches!(self, Self::Off | Self::FfnSkip | Self::Random | Self::SkipDecode)
    }
}

/// What a name after `--skip` stands for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SkipChoice {
    /// What decides about FFNs.
    pub mode: SkipMode,
    /// Whether most of the output matrix is left unread, too ([`Shortlisting`]).
    pub output: bool,
}

impl From<SkipMode> for SkipChoice {
    fn from(mode: SkipMode) -> Self {
        Self { mode, output: false }
    }
}

impl SkipChoice {
    /// The output matrix alone.
    pub const OUTPUT: Self = Self { mode: SkipMode::Off, output: true };

    const NAMES: [(&'static str, SkipMode, bool); 16] = [
        ("off", SkipMode::Off, false),
        ("auto", SkipMode::Auto, false),
        ("ffn-skip", SkipMode::FfnSkip, false),
        ("static", SkipMode::Static, false),
        ("random", SkipMode::Random, false),
        ("shortgpt", SkipMode::ShortGpt, false),
        ("skipdecode", SkipMode::SkipDecode, false),
        ("cut", SkipMode::Cut, false),
        ("neurons", SkipMode::Neurons, false),
        ("stand-in", SkipMode::StandIn, false),
        ("mixed", SkipMode::Mixed, false),
        ("output", SkipMode::Off, true),
        ("cut+output", SkipMode::Cut, true),
        ("neurons+output", SkipMode::Neurons, true),
        ("stand-in+output", SkipMode::StandIn, true),
        ("mixed+output", SkipMode::Mixed, true),
    ];

    /// All names, as `--skip` takes them.
    pub fn names() -> impl Iterator<Item = &'static str> {
        Self::NAMES.iter().map(|row| row.0)
    }

    /// Its name; that of its mode, where both together have none.
    pub fn name(self) -> &'static str {
        let named = |output| Self::NAMES.iter().find(|row| (row.1, row.2) == (self.mode, output));
        named(self.output).or(named(false)).map_or("off", |row| row.0)
    }

    /// The choice called `name`.
    pub fn from_name(name: &str) -> Result<Self, SkipError> {
        let row = Self::NAMES.iter().find(|row| row.0 == name);
        row.map(|&(_, mode, output)| Self { mode, output }).ok_or_else(|| SkipError::UnknownMode {
            found: name.into(),
            known: Self::names().collect::<Vec<_>>().join(", "),
        })
    }

    /// Whether anything is skipped at all.
    pub fn skips(self) -> bool {
        self != Self::default()
    }
}

impl SkipOptions {
    /// What they choose.
    pub fn choice(&self) -> SkipChoice {
        SkipChoice { mode: self.mode, output: self.output }
    }

    /// The policy for a model, with what calibration has found about it.
    pub fn policy(
        &self,
        facts: &ModelFacts,
        calibration: Option<&Calibration>,
    ) -> Result<Box<dyn SkipPolicy>, SkipError> {
        self.check(facts)?;
        if self.mode == SkipMode::Auto {
            return self.resolved(calibration)?.policy(facts, calibration);
        }
        let name = self.choice().name();
        if self.output && calibration.is_none() {
            return Err(SkipError::NeedsCalibration { mode: name, with: "" });
        }
        if self.output && calibration.is_none_or(|found| found.output.is_none()) {
            return Err(SkipError::Uncalibrated { mode: name });
        }
        let ffns = self.ffn_policy(facts, calibration)?;
        Ok(if self.output { Box::new(Shortlisting { name, ffns }) } else { ffns })
    }

    /// What decides about FFNs.
    fn ffn_policy(
        &self,
        facts: &ModelFacts,
        calibration: Option<&Calibration>,
    ) -> Result<Box<dyn SkipPolicy>, SkipError> {
        let warm_up = self.warm_up.unwrap_or(25);
        let (start, end) = self.warm_layers(facts, calibration);
        let (layers, warm) = (facts.layers, start..end);
        Ok(match self.mode {
            SkipMode::Off | SkipMode::Auto => Box::new(Never),
            SkipMode::FfnSkip => {
                let threshold = self.ffn_skip_threshold(calibration)?;
                Box::new(FfnSkip::new(threshold, self.k.unwrap_or(1), warm_up, (start, end)))
            }
            SkipMode::Static => {
                let order = self.calibrated(calibration)?.static_order(warm);
                Box::new(Static::new(self.first_of(&order, layers)?, layers, warm_up))
            }
            SkipMode::Random => {
                let ratio = self.needed_ratio()?;
                let most = warm.len() as f32 / layers as f32;
                if ratio > most {
                    return Err(self.too_high(ratio, most));
                }
                let probability = f64::from(ratio) / f64::from(most.max(f32::MIN_POSITIVE));
                Box::new(Random::new(probability, self.seed, warm_up, warm))
            }
            SkipMode::ShortGpt => {
                let order = self.calibrated(calibration)?.influence_order(warm);
                Box::new(ShortGpt::new(self.first_of(&order, layers)?, layers, warm_up))
            }
            SkipMode::SkipDecode => {
                let ratio = self.needed_ratio()?;
                let times = warm_up..self.horizon.unwrap_or(SkipDecode::HORIZON);
                let slope = SkipDecode::slope(f64::from(ratio), layers, &times, &warm);
                let slope = slope.ok_or_else(|| self.too_high(ratio, warm.len() as f32 / layers as f32))?;
                Box::new(SkipDecode::new(slope, times, warm))
            }
            SkipMode::Cut => {
                let threshold = self.cut_threshold(calibration, |cut| &cut.curve)?;
                Box::new(Uniform::columns(threshold, warm_up, self.layers_but_cold(layers)))
            }
            SkipMode::Neurons => {
                let threshold = self.cut_threshold(calibration, |cut| &cut.neurons)?;
                Box::new(Uniform::neurons(threshold, warm_up, self.layers_but_cold(layers)))
            }
            SkipMode::StandIn => {
                let known = self.calibrated(calibration)?.stand_ins.as_ref().map(|found| &found.curve);
                let below = self.strength(known)?;
                Box::new(Uniform::stand_ins(below, warm_up, self.layers_but_cold(layers)))
            }
            SkipMode::Mixed => {
                let known = self.calibrated(calibration)?;
                let known = known.mixed.as_ref().filter(|_| known.cut.is_some() && known.stand_ins.is_some());
                let threshold = self.strength(known.map(|found| &found.curve))?;
                let below = known.map_or(f32::NEG_INFINITY, |found| found.below(threshold));
                Box::new(Uniform::mixed(below, threshold, warm_up, self.layers_but_cold(layers)))
            }
        })
    }

    /// Where cuts and stand-ins may be: everywhere, unless cold regions were asked for. A plan knows which layers cannot be cut, and
    /// a probe what a stand-in costs; the calibrated regions are those of blocks that are skipped without.
    fn layers_but_cold(&self, layers: usize) -> Range<usize> {
        let (start, end) = self.cold.unwrap_or((0, layers));
        start..end
    }

    fn cut_threshold(
        &self,
        calibration: Option<&Calibration>,
        curve: fn(&CutCalibration) -> &Curve,
    ) -> Result<f32, SkipError> {
        self.strength(self.calibrated(calibration)?.cut.as_ref().map(curve))
    }

    /// The strength at which a curve of the calibration gives the ratio.
    fn strength(&self, curve: Option<&Curve>) -> Result<f32, SkipError> {
        let none = SkipError::Uncalibrated { mode: self.choice().name() };
        let curve = curve.filter(|curve| !curve.ratios.is_empty()).ok_or(none)?;
        let ratio = self.needed_ratio()?;
        curve.strength(ratio).ok_or_else(|| self.too_high(ratio, curve.most()))
    }

    /// These options with `auto` replaced by what it stands for: nothing, where no setting of the calibration is good
    /// enough.
    pub fn resolved(&self, calibration: Option<&Calibration>) -> Result<Self, SkipError> {
        if self.mode != SkipMode::Auto {
            return Ok(self.clone());
        }
        let Some(point) = self.calibrated(calibration)?.auto_point() else {
            return Ok(self.off());
        };
        self.at(point)
    }

    /// These options at the setting of a measured point.
    pub fn at(&self, point: &Point) -> Result<Self, SkipError> {
        let SkipChoice { mode, output } = SkipChoice::from_name(&point.policy)?;
        match mode {
            SkipMode::Auto => Err(SkipError::NoPoint { found: point.policy.clone() }),
            SkipMode::Off => Ok(Self { output, ..self.off() }),
            mode => Ok(Self { mode, output, ratio: Some(point.ratio), ..self.clone() }),
        }
    }

    /// These options without any skipping.
    pub fn off(&self) -> Self {
        Self { mode: SkipMode::Off, output: false, ratio: None, ..self.clone() }
    }

    fn check(&self, facts: &ModelFacts) -> Result<(), SkipError> {
        let (layers, mode) = (facts.layers, self.choice().name());
        if let Some(found) = self.ratio.filter(|r| !(0.0..=1.0).contains(r)) {
            return Err(SkipError::Ratio { found });
        }
        if let Some(found) = self.threshold.filter(|t| !(-1.0..=1.0).contains(t)) {
            return Err(SkipError::Threshold { found });
        }
        if let Some(found) = self.k.filter(|k| !(1..=layers).contains(k)) {
            return Err(SkipError::K { found, layers });
        }
        if let Some((start, end)) = self.cold.filter(|&(start, end)| start > end || end > layers) {
            return Err(SkipError::Cold { start, end, layers });
        }
        let no_ratio = match self.choice() {
            SkipChoice { mode: SkipMode::Auto, .. } => Some("calibration has found one"),
            SkipChoice::OUTPUT => Some("what it leaves unread is always as much"),
            _ => None,
        };
        if let Some(why) = no_ratio.filter(|_| self.ratio.is_some()) {
            return Err(SkipError::NoRatio { mode, why });
        }
        if !matches!(self.mode, SkipMode::FfnSkip | SkipMode::Off) {
            let given = [("--skip-threshold", self.threshold.is_some()), ("--skip-k", self.k.is_some())];
            if let Some((flag, _)) = given.into_iter().find(|g| g.1) {
                return Err(SkipError::Unused { mode, flag });
            }
        }
        Ok(())
    }

    fn warm_layers(&self, facts: &ModelFacts, calibration: Option<&Calibration>) -> (usize, usize) {
        let layers = facts.layers;
        let guess = (1.min(layers), layers.saturating_sub(2).max(1));
        self.cold.or(calibration.map(|c| c.cold)).unwrap_or(guess)
    }

    fn ffn_skip_threshold(&self, calibration: Option<&Calibration>) -> Result<f32, SkipError> {
        let Some(ratio) = self.ratio else { return Ok(self.threshold.unwrap_or(0.98)) };
        if self.threshold.is_some() {
            return Err(SkipError::RatioAndThreshold);
        }
        if let Some(found) = self.k.filter(|&k| k != 1) {
            return Err(SkipError::RatioAndK { found });
        }
        let curve = &self.calibrated(calibration)?.ffn_skip;
        curve.strength(ratio).ok_or_else(|| self.too_high(ratio, curve.most()))
    }

    fn calibrated<'c>(&self, calibration: Option<&'c Calibration>) -> Result<&'c Calibration, SkipError> {
        let with = if self.mode.needs_calibration() { "" } else { " with --skip-ratio" };
        calibration.ok_or(SkipError::NeedsCalibration { mode: self.choice().name(), with })
    }

    fn needed_ratio(&self) -> Result<f32, SkipError> {
        self.ratio.ok_or(SkipError::NeedsRatio { mode: self.choice().name() })
    }

    fn too_high(&self, found: f32, most: f32) -> SkipError {
        SkipError::RatioTooHigh { found, mode: self.choice().name(), most }
    }

    /// As many of `order` as come closest to the ratio, of `layers`.
    fn first_of<'o>(&self, order: &'o [usize], layers: usize) -> Result<&'o [usize], SkipError> {
        let ratio = self.needed_ratio()?;
        let n = (ratio * layers as f32).round() as usize;
        order.get(..n).ok_or_else(|| self.too_high(ratio, order.len() as f32 / layers as f32))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FACTS: ModelFacts = ModelFacts { layers: 30, embedding: 64, ffn: 96 };

    fn with(mode: SkipMode, f: fn(&mut SkipOptions)) -> Result<&'static str, SkipError> {
        let mut o = SkipOptions { mode, ..Default::default() };
        f(&mut o);
        o.policy(&FACTS, None).map(|p| p.name())
    }

    #[test]
    fn wrong_options_are_named() {
        use SkipMode::*;
        assert_eq!(with(FfnSkip, |_| {}), Ok("ffn-skip"));
        assert_eq!(with(FfnSkip, |o| o.threshold = Some(1.5)), Err(SkipError::Threshold { found: 1.5 }));
        assert!(with(FfnSkip, |o| o.threshold = Some(f32::NAN)).is_err());
        assert_eq!(with(FfnSkip, |o| o.k = Some(0)), Err(SkipError::K { found: 0, layers: 30 }));
        let cold = SkipError::Cold { start: 3, end: 31, layers: 30 };
        assert_eq!(with(FfnSkip, |o| o.cold = Some((3, 31))), Err(cold));
        assert!(SkipChoice::from_name("ffnskip").is_err());
        assert_eq!(with(Random, |_| {}), Err(SkipError::NeedsRatio { mode: "random" }));
        assert_eq!(with(Random, |o| o.ratio = Some(0.2)), Ok("random"));
        assert_eq!(with(Random, |o| o.ratio = Some(1.2)), Err(SkipError::Ratio { found: 1.2 }));
        assert!(matches!(with(Random, |o| o.ratio = Some(0.95)), Err(SkipError::RatioTooHigh { .. })));
        let of = |choice: SkipChoice| SkipOptions {
            mode: choice.mode,
            output: choice.output,
            ..Default::default()
        };
        let beside = of(SkipChoice { mode: Cut, output: true });
        let error =
            beside.policy(&FACTS, Some(&Calibration { output: Some(Default::default()), ..calibration() }));
        assert_eq!(error.err().unwrap().to_string().split(':').next(), Some("--skip cut+output"));
        let ratio = SkipOptions { ratio: Some(0.2), ..of(SkipChoice::OUTPUT) };
        assert!(matches!(ratio.policy(&FACTS, None), Err(SkipError::NoRatio { mode: "output", .. })));
        let unused = SkipError::Unused { mode: "skipdecode", flag: "--skip-k" };
        let k = |o: &mut SkipOptions| (o.ratio, o.k) = (Some(0.2), Some(2));
        assert_eq!(with(SkipDecode, k), Err(unused));
    }

    #[test]
    fn what_needs_a_calibration_says_how_to_make_one() {
        for mode in [SkipMode::Auto, SkipMode::Static, SkipMode::ShortGpt, SkipMode::Cut, SkipMode::Neurons] {
            let error = with(mode, |o| o.ratio = (o.mode != SkipMode::Auto).then_some(0.1)).unwrap_err();
            assert!(error.to_string().contains("skiff calibrate"), "{error}");
        }
        let error = with(SkipMode::FfnSkip, |o| o.ratio = Some(0.1)).unwrap_err();
        assert!(error.to_string().contains("ffn-skip with --skip-ratio needs"), "{error}");
    }

    fn calibration() -> Calibration {
        Calibration {
            cosines: (0..30).map(|l| if l % 2 == 0 { 0.9 } else { 0.95 + l as f32 / 1000.0 }).collect(),
            influence: (0..30).map(|l| l as f32 / 100.0).collect(),
            cold: (2, 28),
            ffn_skip: crate::skip::Curve { ratios: vec![0.1, 0.3], strengths: vec![0.99, 0.97] },
            ..Calibration::default()
        }
    }

    /// Layers that the token after the warm-up skips.
    fn skipped(options: &SkipOptions) -> Vec<usize> {
        let mut policy = options.policy(&FACTS, Some(&calibration())).unwrap();
        policy.begin_token(25);
        let skips = |l: &usize| !policy.runs_layer(*l) || policy.decide(*l) == crate::skip::Decision::Skip;
        (0..30).filter(skips).collect()
    }

    #[test]
    fn calibration_chooses_the_layers() {
        let of = |mode| SkipOptions { mode, ratio: Some(0.1), ..Default::default() };
        assert_eq!(skipped(&of(SkipMode::Static)), [23, 25, 27]);
        assert_eq!(skipped(&of(SkipMode::ShortGpt)), [2, 3, 4]);
        let cold = SkipOptions { cold: Some((0, 20)), ..of(SkipMode::Static) };
        assert_eq!(skipped(&cold), [15, 17, 19]);
        let most = SkipOptions { ratio: Some(0.9), ..of(SkipMode::Static) };
        let error = most.policy(&FACTS, Some(&calibration())).err().unwrap();
        assert!(matches!(error, SkipError::RatioTooHigh { mode: "static", .. }), "{error}");
    }

    #[test]
    fn auto_is_what_the_file_says() {
        let mut calibration = calibration();
        let auto = SkipOptions { mode: SkipMode::Auto, ..Default::default() };
        assert_eq!(auto.resolved(Some(&calibration)).unwrap().mode, SkipMode::Off, "nothing is good enough");
        assert_eq!(auto.policy(&FACTS, Some(&calibration)).unwrap().name(), "off");
        calibration.points = vec![super::super::Point {
            policy: "static".into(),
            ratio: 0.2,
            blocks: 0.2,
            bytes: 0.2,
            perplexity: 1.5,
            kl: 0.4,
            same_top1: 0.6,
        }];
        calibration.auto = Some(0);
        let resolved = auto.resolved(Some(&calibration)).unwrap();
        assert_eq!((resolved.mode, resolved.ratio), (SkipMode::Static, Some(0.2)));
        // A file cannot send it round in circles.
        calibration.points[0].policy = "auto".into();
        assert!(matches!(auto.resolved(Some(&calibration)), Err(SkipError::NoPoint { .. })));
    }
}
