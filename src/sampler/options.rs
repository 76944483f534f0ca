//! What the user may set, with llama.cpp's names, defaults and meaning.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// A sampling option that cannot be used.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum SamplerError {
    /// A value outside what the option means.
    #[error("{option} = {value}: {expected}")]
    Invalid {
        /// The option's name.
        option: &'static str,
        /// The value that was given.
        value: String,
        /// What would have been accepted.
        expected: &'static str,
    },
    /// A stage named twice in the order.
    #[error("order: stage {0} is named twice")]
    DuplicateStage(Stage),
    /// A name that is no stage.
    #[error("unknown sampling stage {0:?} (known: {names})", names = Stage::NAMES.map(|n| n.1).join(", "))]
    UnknownStage(String),
}

/// One step of the chain from logits to a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Repetition, frequency and presence penalties.
    Penalties,
    /// The DRY penalty for continuing a repeated sequence.
    Dry,
    /// Keep the `top_k` most likely tokens.
    TopK,
    /// Locally typical sampling.
    Typical,
    /// Nucleus sampling: keep the most likely tokens up to probability `top_p`.
    TopP,
    /// Keep tokens at least `min_p` times as likely as the best.
    MinP,
    /// Divide logits by the temperature.
    Temperature,
}

impl Stage {
    /// llama.cpp's default order (its top-n-sigma and XTC stages, off by default, are left out).
    pub const DEFAULT_ORDER: [Stage; 7] = [
        Stage::Penalties,
        Stage::Dry,
        Stage::TopK,
        Stage::Typical,
        Stage::TopP,
        Stage::MinP,
        Stage::Temperature,
    ];

    const NAMES: [(Stage, &'static str); 7] = [
        (Stage::Penalties, "penalties"),
        (Stage::Dry, "dry"),
        (Stage::TopK, "top_k"),
        (Stage::Typical, "typ_p"),
        (Stage::TopP, "top_p"),
        (Stage::MinP, "min_p"),
        (Stage::Temperature, "temperature"),
    ];
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::NAMES.iter().find(|row| row.0 == *self).map_or("", |row| row.1);
        f.write_str(name)
    }
}

impl FromStr for Stage {
    type Err = SamplerError;

    fn from_str(name: &str) -> Result<Self, SamplerError> {
        let row = Self::NAMES.iter().find(|row| row.1 == name);
        row.map(|row| row.0).ok_or_else(|| SamplerError::UnknownStage(name.to_owned()))
    }
}

/// How to turn logits into a token. The default is llama.cpp's.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplerOptions {
    /// Flattens (above 1) or sharpens (below 1) the distribution; 0 or less is greedy.
    pub temperature: f32,
    /// How many of the most likely tokens to keep; 0 keeps all.
    pub top_k: u32,
    /// Keep the most likely tokens until their probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens at least this many times as likely as the best; 0 keeps all.
    pub min_p: f32,
    /// Probability kept by locally typical sampling; 1 keeps all.
    pub typical_p: f32,
    /// Divides positive (multiplies negative) logits of recent tokens; 1 does nothing.
    pub repeat_penalty: f32,
    /// How many recent tokens the three penalties look at; 0 none, -1 all.
    pub repeat_last_n: i32,
    /// Subtracted from a recent token's logit once an occurrence.
    pub frequency_penalty: f32,
    /// Subtracted from a recent token's logit once.
    pub presence_penalty: f32,
    /// Strength of the DRY penalty, `multiplier * base ^ (length - allowed_length)`; 0 is off.
    pub dry_multiplier: f32,
    /// Growth of the DRY penalty with the length of the repeat.
    pub dry_base: f32,
    /// A repeat shorter than this is not penalised.
    pub dry_allowed_length: u32,
    /// How many recent tokens DRY looks at; 0 none, -1 all.
    pub dry_penalty_last_n: i32,
    /// Strings over which no repeat is followed. The caller turns them into token ids, see
    /// [`resolve_breakers`](super::resolve_breakers).
    pub dry_sequence_breakers: Vec<String>,
    /// Added to the logits of these tokens before everything else; `-inf` bans a token.
    pub logit_bias: Vec<(u32, f32)>,
    /// Seed of the random numbers; `None` takes a fresh one.
    pub seed: Option<u64>,
    /// The stages to run, in this order. A stage that is not named does not run.
    pub order: Vec<Stage>,
}

impl Default for SamplerOptions {
    fn default() -> Self {
        Self {
            temperature: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            typical_p: 1.0,
            repeat_penalty: 1.0,
            repeat_last_n: 64,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            dry_multiplier: 0.0,
            dry_base: 1.75,
            dry_allowed_length: 2,
            dry_penalty_last_n: -1,
            dry_sequence_breakers: ["\n", ":", "\"", "*"].map(String::from).to_vec(),
            logit_bias: Vec::new(),
            seed: None,
            order: Stage::DEFAULT_ORDER.to_vec(),
        }
    }
}

impl SamplerOptions {
    /// The options of a greedy sampler without penalties.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// Checks every value; the error names the first option that cannot be used.
    pub fn validate(&self) -> Result<(), SamplerError> {
        check("temperature", self.temperature, f32::is_finite, "expected a finite number")?;
        for (option, p) in [("top_p", self.top_p), ("min_p", self.min_p), ("typical_p", self.typical_p)] {
            check(option, p, |p| (0.0..=1.0).contains(&p), "expected a number from 0 to 1")?;
        }
        check(
            "repeat_penalty",
            self.repeat_penalty,
            |x| x.is_finite() && x > 0.0,
            "expected a positive number",
        )?;
        check("frequency_penalty", self.frequency_penalty, f32::is_finite, "expected a finite number")?;
        check("presence_penalty", self.presence_penalty, f32::is_finite, "expected a finite number")?;
        check(
            "dry_multiplier",
            self.dry_multiplier,
            |x| x.is_finite() && x >= 0.0,
            "expected 0 or a positive number",
        )?;
        check("dry_base", self.dry_base, |x| x.is_finite() && x >= 1.0, "expected a number of at least 1")?;
        for (option, n) in
            [("repeat_last_n", self.repeat_last_n), ("dry_penalty_last_n", self.dry_penalty_last_n)]
        {
            check(option, n, |n| n >= -1, "expected a count, or -1 for all tokens")?;
        }
        for &(id, bias) in &self.logit_bias {
            if bias.is_nan() || bias == f32::INFINITY {
                return Err(SamplerError::Invalid {
                    option: "logit_bias",
                    value: format!("{bias} for token {id}"),
                    expected: "expected a number or -inf",
                });
            }
        }
        self.validate_order()
    }

    fn validate_order(&self) -> Result<(), SamplerError> {
        for (i, stage) in self.order.iter().enumerate() {
            if self.order[..i].contains(stage) {
                return Err(SamplerError::DuplicateStage(*stage));
            }
        }
        Ok(())
    }
}

fn check<T: Copy + fmt::Display>(
    option: &'static str,
    value: T,
    is_valid: impl Fn(T) -> bool,
    expected: &'static str,
) -> Result<(), SamplerError> {
    if is_valid(value) {
        Ok(())
    } else {
        Err(SamplerError::Invalid { option, value: value.to_string(), expected })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid() {
        assert_eq!(SamplerOptions::default().validate(), Ok(()));
        assert_eq!(SamplerOptions::greedy().validate(), Ok(()));
    }

    #[test]
    fn errors_name_the_option_and_the_value() {
        type Edit = fn(&mut SamplerOptions);
        let cases: [(Edit, &str); 14] = [
            (|o| o.temperature = f32::NAN, "temperature = NaN"),
            (|o| o.temperature = f32::INFINITY, "temperature = inf"),
            (|o| o.top_p = 1.5, "top_p = 1.5"),
            (|o| o.top_p = f32::NAN, "top_p = NaN"),
            (|o| o.min_p = -0.1, "min_p = -0.1"),
            (|o| o.typical_p = 2.0, "typical_p = 2"),
            (|o| o.repeat_penalty = 0.0, "repeat_penalty = 0"),
            (|o| o.repeat_last_n = -2, "repeat_last_n = -2"),
            (|o| o.frequency_penalty = f32::NEG_INFINITY, "frequency_penalty = -inf"),
            (|o| o.presence_penalty = f32::NAN, "presence_penalty = NaN"),
            (|o| o.dry_multiplier = -1.0, "dry_multiplier = -1"),
            (|o| o.dry_base = 0.5, "dry_base = 0.5"),
            (|o| o.dry_penalty_last_n = -7, "dry_penalty_last_n = -7"),
            (|o| o.logit_bias = vec![(3, f32::NAN)], "logit_bias = NaN for token 3"),
        ];
        for (edit, expected) in cases {
            let mut options = SamplerOptions::default();
            edit(&mut options);
            let error = options.validate().unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        }
    }

    #[test]
    fn a_stage_may_not_run_twice() {
        let order = vec![Stage::TopK, Stage::MinP, Stage::TopK];
        let options = SamplerOptions { order, ..SamplerOptions::default() };
        assert_eq!(options.validate(), Err(SamplerError::DuplicateStage(Stage::TopK)));
    }

    #[test]
    fn stage_names_round_trip() {
        for stage in Stage::DEFAULT_ORDER {
            assert_eq!(stage.to_string().parse(), Ok(stage));
        }
        let error = "xtc".parse::<Stage>().unwrap_err().to_string();
        assert!(error.contains("\"xtc\"") && error.contains("top_k"), "{error}");
    }
}
