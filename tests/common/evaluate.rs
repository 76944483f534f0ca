//! Evaluates sequences of tiny models in many ways, and tells how far results are apart.

use std::sync::OnceLock;

use skiff::gguf::GgmlType;
use skiff::kernels::Kernels;
use skiff::model::{FfnStep, KvType, Model, State};
use skiff::ops::Compute;
use skiff::skip::{Never, SkipPolicy};
use skiff::threads::Team;

use super::models::{ModelFile, SMALL, WIDE};

pub const GOVERNED: FfnStep = FfnStep::Governed { index: 0 };

/// What a sequence is evaluated with. `batches`: sizes of the steps, repeated until the tokens are used up.
pub struct Run<'a> {
    pub model: &'a Model,
    pub kernels: Kernels,
    pub threads: usize,
    pub kv: KvType,
    pub batches: &'a [usize],
    pub policy: Box<dyn SkipPolicy>,
    pub step: FfnStep,
}

impl<'a> Run<'a> {
    pub fn new(model: &'a Model) -> Self {
        Self {
            model,
            kernels: best(),
            threads: 1,
            kv: KvType::F16,
            batches: &[512],
            policy: Box::new(Never),
            step: FfnStep::Full,
        }
    }

    /// Logits of every position, `[tokens][vocab]`.
    pub fn logits(self, tokens: &[u32]) -> Vec<f32> {
        let team = Team::new(self.threads).unwrap();
        let on = Compute { team: &team, kernels: self.kernels };
        let mut state = State::new(self.model, &team, (tokens.len(), 512), self.kv, self.policy);
        let mut out = Vec::new();
        let mut rest = tokens;
        for &n in self.batches.iter().cycle() {
            let (now, later) = rest.split_at(n.min(rest.len()));
            out.extend(step(self.model, on, &mut state, now, self.step));
            rest = later;
            if rest.is_empty() {
                break;
            }
        }
        out
    }
}

/// Evaluates one step and returns the logits of its rows.
pub fn step(model: &Model, on: Compute<'_>, state: &mut State, tokens: &[u32], step: FfnStep) -> Vec<f32> {
    model.forward(on, state, tokens, step).unwrap();
    let mut out = vec![0.0; tokens.len() * model.config().vocab];
    model.logits_of(on, state, 0..tokens.len(), &mut out);
    out
}

pub fn best() -> Kernels {
    Kernels::available().next().unwrap()
}

pub fn small(ty: GgmlType) -> Model {
    ModelFile::llama(SMALL, ty).load().unwrap()
}

/// A quantised model: the path of real models, with integer kernels.
pub fn quantised() -> &'static Model {
    static MODEL: OnceLock<Model> = OnceLock::new();
    MODEL.get_or_init(|| ModelFile::llama(WIDE, GgmlType::Q4_1).load().unwrap())
}

pub fn ids(n: usize, vocab: usize) -> Vec<u32> {
    (0..n).map(|i| ((i * 37 + i * i / 3 + 5) % vocab) as u32).collect()
}

/// Largest difference, in units of the root mean square of `want`.
pub fn distance(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let rms = (want.iter().map(|w| w * w).sum::<f32>() / want.len() as f32).sqrt();
    got.iter()
        .zip(want)
        .map(|(g, w)| if g.is_nan() { f32::INFINITY } else { (g - w).abs() })
        .fold(0.0, f32::max)
        / rms
}

/// Root mean square of the difference, in the same units. Where activations are rounded to 8 bits a difference
/// in the last bit may tip a rounding, so the largest difference is up to chance; this is not.
pub fn mean_distance(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let square = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x) * f64::from(x)).sum::<f64>();
    let difference = square(&mut got.iter().zip(want).map(|(g, w)| g - w));
    let distance = (difference / square(&mut want.iter().copied())).sqrt();
    if distance.is_nan() { f32::INFINITY } else { distance as f32 }
}

pub fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|v| v.to_bits()).collect()
}
