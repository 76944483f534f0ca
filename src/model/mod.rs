//! A LLaMA-family model: typed config, named weights, forward pass, KV cache.
//!
//! [`Model::load`] checks every tensor against the shape that the config demands; after that nothing
//! about the file can go wrong. [`Model::forward_parts`] is the whole computation of a step.

mod buffers;
mod config;
mod cut;
mod error;
mod forward;
mod kv;
mod layers;
mod probe;
mod sequence;
mod shortlist;
mod stand_in;
mod state;

use std::path::Path;
use std::sync::OnceLock;

pub use buffers::{Buffers, Products};
pub use config::{Architecture, Config, RopeConfig};
pub use cut::ColumnForms;
pub use error::ModelError;
pub use kv::{KvCache, KvType};
pub use layers::{Attention, Ffn, Layer};
pub use probe::{FfnRows, Matrices, Probe};
pub use sequence::{FfnStep, Part, Sequence};
pub use state::State;

use crate::gguf::Gguf;
use crate::ops::Compute;
use crate::skip::{
    Calibration, CalibrationError, CutPlan, ModelFacts, SkipError, SkipMode, SkipOptions, SkipPolicy, StandIn,
};
use crate::weights::{LoadOptions, Progress, Tensor, Weights};
use cut::PreparedCut;
use shortlist::Shortlist;

/// A model whose weights are mapped. Shared by any number of sequences.
pub struct Model {
    config: Config,
    weights: Weights,
    /// `[vocab, embedding]`
    embedding: Tensor,
    layers: Vec<Layer>,
    /// What may be cut, by layer; empty until [`prepare_cuts`](Self::prepare_cuts).
    cuts: Vec<Option<PreparedCut>>,
    /// What those have laid out by columns.
    column_forms: ColumnForms,
    /// What may stand in for each FFN; empty until [`prepare_stand_ins`](Self::prepare_stand_ins).
    stand_ins: Vec<StandIn>,
    /// What tells which logits must be exact; nothing until [`prepare_shortlist`](Self::prepare_shortlist).
    shortlist: Option<Shortlist>,
    /// The weights are kept in memory, and so are copies that are made of them.
    locked: bool,
    output_norm: Vec<f32>,
    /// `[vocab, embedding]`; the embedding itself where the file has no matrix of its own.
    output: Tensor,
    /// Angle per position of each pair of a head's rotated elements.
    rope_frequencies: Vec<f32>,
    /// What is known about skipping in this model, once a file of it was read.
    calibration: OnceLock<Calibration>,
}

impl Model {
    /// Maps the model at `path` (a GGUF file, or the first of a split one). What the page cache lacks is read when it
    /// is first used.
    ///
    /// # Errors
    /// The file is unreadable or malformed, its architecture is not known, or a key or tensor is
    /// missing or has another shape than the config demands; the error names it.
    pub fn load(path: &Path) -> Result<Self, ModelError> {
        Self::of(Weights::open(path)?)
    }

    /// [`load`](Self::load), and brings the weights into memory as `options` say; `progress` is told of bytes that have
    /// to be read.
    pub fn load_with(path: &Path, options: LoadOptions, progress: Progress<'_>) -> Result<Self, ModelError> {
        // Everything about the header is checked before the first weight is read.
        let mut weights = Self::load(path)?.weights;
        weights.bring_in(options, progress)?;
        Ok(Self { locked: options.mlock, ..Self::of(weights)? })
    }

    fn of(weights: Weights) -> Result<Self, ModelError> {
        let config = Config::read(&weights)?;
        let (d, vocab) = (config.embedding, config.vocab);
        let embedding = weights.tensor("token_embd.weight", vocab, d)?;
        let output = weights.opt_tensor("output.weight", vocab, d)?.unwrap_or_else(|| embedding.clone());
        let output_norm = weights.vector("output_norm.weight", d)?;
        let layers =
            (0..config.layers).map(|i| Layer::read(&weights, &config, i)).collect::<Result<_, _>>()?;
        let factors = weights.opt_vector("rope_freqs.weight", config.rope.dimensions / 2)?;
        let rope_frequencies = config.rope.frequencies(factors.as_deref());
        Ok(Self {
            config,
            weights,
            embedding,
            layers,
            cuts: Vec::new(),
            column_forms: ColumnForms::None,
            stand_ins: Vec::new(),
            shortlist: None,
            locked: false,
            output_norm,
            output,
            rope_frequencies,
            calibration: OnceLock::new(),
        })
    }

    /// Shapes and constants.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The files.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// The layers, in order.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// Weight bytes that decoding a token reads: every matrix once, and one row of the embedding
    /// (all of it where it is the output matrix too).
    pub fn decode_bytes(&self) -> u64 {
        let layers: usize = self.layers.iter().map(|l| l.attention.bytes() + l.ffn.bytes()).sum();
        (layers + self.output.bytes()) as u64
    }

    /// Weight bytes of all FFNs.
    pub fn ffn_bytes(&self) -> u64 {
        self.layers.iter().map(|l| l.ffn.bytes() as u64).sum()
    }

    /// The shapes that skip policies depend on.
    pub fn facts(&self) -> ModelFacts {
        let Config { layers, embedding, ffn, .. } = self.config;
        ModelFacts { layers, embedding, ffn }
    }

    /// The policy that `options` ask for.
    pub fn policy(&self, options: &SkipOptions) -> Result<Box<dyn SkipPolicy>, SkipError> {
        options.policy(&self.facts(), self.calibration())
    }

    /// Makes ready what the policy of `options` needs beyond the file's weights; for cuts, see
    /// [`prepare_cuts`](Self::prepare_cuts). States made before do not have the buffers for it.
    pub fn prepare_skip(
        &mut self,
        on: Compute<'_>,
        options: &SkipOptions,
        progress: impl FnMut(usize, usize),
    ) -> Result<(), ModelError> {
        self.prepare_all_but_cuts(on, options)?;
        match self.plan_to_prepare(options)? {
            Some((plan, forms)) => self.prepare_cuts(on, plan, forms, progress),
            None => Ok(()),
        }
    }

    /// [`prepare_skip`](Self::prepare_skip) for measuring what skipping costs in quality: with [`ColumnForms::None`].
    pub fn prepare_skip_by_rows(&mut self, on: Compute<'_>, options: &SkipOptions) -> Result<(), ModelError> {
        self.prepare_all_but_cuts(on, options)?;
        match self.plan_to_prepare(options)? {
            Some((plan, _)) => self.prepare_cuts(on, plan, ColumnForms::None, |_, _| {}),
            None => Ok(()),
        }
    }

    /// Gives back the memory of columns that other options needed and `options` do not. States made before must not be
    /// used any more.
    pub fn trim_skip(&mut self, on: Compute<'_>, options: &SkipOptions) -> Result<(), ModelError> {
        if self.has_cuts() && self.needed_columns(options)?.is_none_or(|needed| needed < self.column_forms) {
            self.drop_cuts();
        }
        if !options.resolved(self.calibration())?.output {
            self.drop_shortlist();
        }
        self.prepare_skip(on, options, |_, _| {})
    }

    /// What does not depend on how cuts are read: stand-ins and the shortlist.
    fn prepare_all_but_cuts(&mut self, on: Compute<'_>, options: &SkipOptions) -> Result<(), ModelError> {
        let SkipOptions { mode, output, .. } = options.resolved(self.calibration())?;
        let Some(known) = self.calibration() else { return Ok(()) };
        let stand_ins =
            known.stand_ins.as_ref().filter(|_| matches!(mode, SkipMode::StandIn | SkipMode::Mixed));
        let stand_ins = stand_ins.filter(|_| self.stand_ins.is_empty()).map(|found| found.layers.clone());
        let of_output = known.output.as_ref().filter(|_| output && !self.has_shortlist()).cloned();
        stand_ins.map_or(Ok(()), |stand_ins| self.prepare_stand_ins(stand_ins))?;
        of_output.map_or(Ok(()), |known| self.prepare_shortlist(on, known))
    }

    /// `None`: no cuts at all.
    fn needed_columns(&self, options: &SkipOptions) -> Result<Option<ColumnForms>, ModelError> {
        Ok(match options.resolved(self.calibration())?.mode {
            SkipMode::Cut | SkipMode::Mixed => Some(ColumnForms::All),
            SkipMode::Neurons => Some(ColumnForms::Down),
            _ => None,
        })
    }

    /// What `options` need that is not there yet.
    fn plan_to_prepare(&self, options: &SkipOptions) -> Result<Option<(CutPlan, ColumnForms)>, ModelError> {
        let Some(forms) = self.needed_columns(options)? else { return Ok(None) };
        let plan = self.calibration().and_then(|c| c.cut.as_ref()).map(|cut| &cut.plan);
        let there = self.has_cuts() && self.column_forms >= forms;
        Ok(plan.filter(|_| !there).map(|plan| (plan.clone(), forms)))
    }

    /// What is known about skipping in this model.
    pub fn calibration(&self) -> Option<&Calibration> {
        self.calibration.get()
    }

    /// Takes `calibration` for this model's; the first one stays.
    pub fn set_calibration(&self, calibration: Calibration) -> &Calibration {
        self.calibration.get_or_init(|| calibration)
    }

    /// Reads the calibration file at `path`.
    ///
    /// # Errors
    /// It cannot be read, is malformed, or was made for another model.
    pub fn load_calibration(&self, path: &Path) -> Result<&Calibration, ModelError> {
        let wrong =
            |error| ModelError::Calibration { name: path.display().to_string(), error: Box::new(error) };
        let file = Weights::open(path)?;
        let read = Calibration::read(file.gguf(), file.bytes(), &self.facts(), &self.weights.fingerprint());
        Ok(self.set_calibration(read.map_err(wrong)?))
    }

    /// Reads a calibration file from memory; `name` is for errors.
    pub fn read_calibration(&self, name: &str, bytes: &[u8]) -> Result<&Calibration, ModelError> {
        let wrong = |error| ModelError::Calibration { name: name.into(), error: Box::new(error) };
        let file = Gguf::parse(bytes).map_err(|error| wrong(CalibrationError::Gguf(error)))?;
        let read = Calibration::read(&file, bytes, &self.facts(), &self.weights.fingerprint());
        Ok(self.set_calibration(read.map_err(wrong)?))
    }
}
