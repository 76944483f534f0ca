//! Groups of flags that several commands share, and the options structs that they become.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, ValueEnum};
use indicatif::ProgressBar;

use super::generate::progress_bar;
use super::{Failure, Outcome, note, text_or_file};
use crate::eval::Trial;
use crate::kernels::Kernels;
use crate::machine::Memory;
use crate::model::{Config, KvCache, KvType, Model};
use crate::ops::Compute;
use crate::pull;
use crate::sampler::{
    Constraint, ConstraintError, Sampler, SamplerOptions, Stage, StopMatcher, resolve_breakers,
};
use crate::session::{DraftMode, DraftOptions, Engine, EngineOptions, MAX_DRAFT, SessionOptions};
use crate::skip::{BUILT_IN, Calibration, Point, SkipChoice, SkipMode, SkipOptions};
use crate::threads::keep_on;
use crate::tokenizer::EncodeOptions;
use crate::topology::CpuSet;
use crate::weights::LoadOptions;

/// Which model.
#[derive(Args)]
pub(super) struct ModelArgs {
    /// GGUF file (first shard of a split one), OWNER/NAME/FILE.gguf, or name [default: smollm2, pulled on first use]
    #[arg(short, long, value_name = "MODEL", help_heading = "Model")]
    pub model: Option<String>,
}

impl ModelArgs {
    /// Where it lies; pulls it if need be.
    pub fn resolve(&self) -> Result<PathBuf, Failure> {
        Ok(pull::resolve(self.model.as_deref())?)
    }
}

/// A model and what runs it.
#[derive(Args)]
pub(super) struct EngineArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Threads [default: the physical cores that this process may use]
    #[arg(short, long, value_name = "N", help_heading = "Threads", value_parser = in_range(1, 1024))]
    pub threads: Option<usize>,
    /// Threads for prompts [default: as many as for generation]
    #[arg(long, value_name = "N", help_heading = "Threads", value_parser = in_range(1, 1024))]
    pub threads_batch: Option<usize>,
    #[command(flatten)]
    pub cpus: CpuArgs,
    #[command(flatten)]
    pub load: LoadArgs,
    /// Kernel to compute with; `skiff info` lists them [default: the best for this CPU]
    #[arg(long, value_name = "NAME", help_heading = "Model", value_parser = kernel_names())]
    pub kernel: Option<String>,
    /// How keys and values are kept: q8_0 takes 53 % of f16's memory, f32 twice of it
    #[arg(long, value_name = "TYPE", help_heading = "Model", value_enum, default_value_t = KvArg::F16)]
    pub kv: KvArg,
}

impl EngineArgs {
    pub fn load(&self) -> Result<Engine, Failure> {
        let path = self.model.resolve()?;
        self.cpus.keep()?;
        let options = EngineOptions {
            threads: self.threads,
            threads_batch: self.threads_batch,
            pinned: self.cpus.cpu_strict,
            kernel: self.kernel.clone(),
            load: self.load.options(),
        };
        let bar = LoadBar::default();
        let engine = Engine::load_with(&path, options, &|done, total| bar.tell(done, total))?;
        bar.finish();
        Ok(engine)
    }
}

/// Which CPUs the threads use.
#[derive(Args)]
#[command(next_help_heading = "Threads")]
pub(super) struct CpuArgs {
    /// CPUs to use, as a hexadecimal mask; bit 0 is CPU 0
    #[arg(short = 'C', long, value_name = "HEX", value_parser = CpuSet::from_mask)]
    cpu_mask: Option<CpuSet>,
    /// CPUs to use, both included
    #[arg(long, value_name = "LO-HI", allow_hyphen_values = true, value_parser = CpuSet::from_range, conflicts_with = "cpu_mask")]
    cpu_range: Option<CpuSet>,
    /// Keep each thread on one CPU, instead of letting the system move them
    #[arg(long)]
    pub cpu_strict: bool,
}

impl CpuArgs {
    /// Keeps this thread, and those to come, on the CPUs asked for. Before threads are counted or started.
    pub fn keep(&self) -> Outcome {
        match self.cpu_mask.as_ref().or(self.cpu_range.as_ref()) {
            Some(cpus) => Ok(keep_on(cpus)?),
            None => Ok(()),
        }
    }
}

/// How the weights come to memory.
#[derive(Args)]
#[command(next_help_heading = "Memory")]
pub(super) struct LoadArgs {
    /// Keep weights and cache in memory; the system may need to be asked for more (ulimit -l)
    #[arg(long)]
    mlock: bool,
    /// Read the file into memory of our own in huge pages, instead of using the page cache
    #[arg(long)]
    no_mmap: bool,
}

impl LoadArgs {
    pub fn options(&self) -> LoadOptions {
        LoadOptions { no_mmap: self.no_mmap, mlock: self.mlock }
    }
}

/// A bar for a load that takes long enough to be looked at.
#[derive(Default)]
pub(super) struct LoadBar {
    started: OnceLock<Instant>,
    bar: OnceLock<ProgressBar>,
}

/// What is read in less flickers by.
const PATIENCE: Duration = Duration::from_millis(500);

impl LoadBar {
    /// So many bytes are in memory.
    pub fn tell(&self, done: u64, total: u64) {
        if self.started.get_or_init(Instant::now).elapsed() < PATIENCE {
            return;
        }
        let template = "load {wide_bar} {bytes}/{total_bytes}, {bytes_per_sec}, {eta} left";
        let bar = self.bar.get_or_init(|| progress_bar(total as usize, template, false));
        bar.set_position(done);
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        if let Some(bar) = self.bar.get() {
            bar.finish_and_clear();
        }
    }
}

pub(super) fn kernel_names() -> PossibleValuesParser {
    PossibleValuesParser::new(Kernels::list().map(|(name, ..)| name))
}

/// A number from `low` to `high`.
pub(super) fn in_range(low: usize, high: usize) -> impl Fn(&str) -> Result<usize, String> + Clone {
    move |text| match text.parse() {
        Ok(n) if (low..=high).contains(&n) => Ok(n),
        _ => Err(format!("expected a number from {low} to {high}")),
    }
}

/// `--kv`
#[derive(Clone, Copy, ValueEnum)]
pub(super) enum KvArg {
    #[value(name = "f32")]
    F32,
    #[value(name = "f16")]
    F16,
    #[value(name = "q8_0")]
    Q8_0,
}

impl From<KvArg> for KvType {
    fn from(kv: KvArg) -> Self {
        match kv {
            KvArg::F32 => KvType::F32,
            KvArg::F16 => KvType::F16,
            KvArg::Q8_0 => KvType::Q8_0,
        }
    }
}

/// Far beyond any model's, and far below what would overflow.
pub(super) const MAX_CONTEXT: usize = 1 << 24;

/// Room for the sequence.
#[derive(Args)]
pub(super) struct ContextArgs {
    /// Tokens that fit, prompt and reply together [default: the model's own, at most 8192]
    #[arg(short = 'c', long = "ctx-size", alias = "context", value_name = "N", help_heading = "Context", value_parser = in_range(2, MAX_CONTEXT))]
    pub context: Option<usize>,
    /// Prompt tokens evaluated at a time
    #[arg(short, long = "batch-size", value_name = "N", help_heading = "Context", default_value_t = 512, value_parser = in_range(1, 4096))]
    pub batch: usize,
    /// Drop the older half when the context is full, instead of stopping
    #[arg(long, help_heading = "Context")]
    pub context_shift: bool,
}

impl ContextArgs {
    pub fn options(
        &self,
        engine: &mut Engine,
        kv: KvArg,
        skip: &SkipArgs,
        draft: &DraftArgs,
    ) -> Result<SessionOptions, Failure> {
        let options = SessionOptions {
            context: self.context,
            batch: self.batch,
            kv: kv.into(),
            skip: skip.where_it_pays(engine, draft)?,
            context_shift: self.context_shift,
            draft: draft.options(skip)?,
        };
        if let Some(context) = self.context {
            check_context(engine, context, kv)?;
        }
        Ok(options)
    }
}

/// Refuses a context that this machine cannot hold.
pub(super) fn check_context(engine: &Engine, context: usize, kv: KvArg) -> Result<(), Failure> {
    check_cache(engine.model().config(), "-c", context, kv)
}

/// Refuses a cache that this machine cannot hold: allocating it would end the process. `flag` asked for it.
pub(super) fn check_cache(config: &Config, flag: &str, context: usize, kv: KvArg) -> Result<(), Failure> {
    let needed = KvCache::bytes_needed(config, context, kv.into());
    let available = Memory::read().map_or(u64::MAX, |m| m.total);
    if needed.is_none_or(|needed| needed > available) {
        let gb = |bytes: u64| format!("{:.1} GB", bytes as f64 / 1e9);
        let needed = needed.map_or("more".into(), gb);
        return Err(Failure::Error(format!(
            "{flag} {context}: the cache takes {needed} and this machine has {}",
            gb(available)
        )));
    }
    let trained = config.trained_context;
    if context > trained {
        note(&format!("warning: {flag} {context}: the model was trained for {trained} tokens"));
    }
    Ok(())
}

/// Of the settings whose tokens take no more than this, in units of the fastest, `--skip auto` takes the one that costs least.
const AS_FAST: f64 = 1.05;

/// Skipping.
#[derive(Args, Default)]
#[command(next_help_heading = "Skipping")]
pub(super) struct SkipArgs {
    /// Policy that decides what is skipped, of FFNs, of the output matrix or of both; auto: the best that calibration offers
    #[arg(long, value_name = "POLICY", default_value = "off", value_parser = policies())]
    pub skip: SkipChoice,
    /// Calibration file [default: MODEL.skip.gguf beside the model, else what is built in for it]
    #[arg(long, value_name = "S.skip.gguf")]
    pub skip_file: Option<PathBuf>,
    /// Share to skip, 0 to 1, of tokens past the warm-up: sets the strength of any policy
    #[arg(long, value_name = "R")]
    pub skip_ratio: Option<f32>,
    /// ffn-skip: cosine of the stream before and after an FFN from which the next ones are skipped [default: 0.98]
    #[arg(long, value_name = "COSINE", allow_negative_numbers = true)]
    pub skip_threshold: Option<f32>,
    /// ffn-skip: FFNs that are skipped each time [default: 1]
    #[arg(long, value_name = "K")]
    pub skip_k: Option<usize>,
    /// Tokens that run in full first [default: 25]
    #[arg(long, value_name = "N")]
    pub skip_warmup: Option<usize>,
    /// First layer that may be skipped and the one after the last [default: as calibrated, else all but the first and the last two]
    #[arg(long, value_name = "S,E", value_parser = pair)]
    pub skip_cold: Option<(usize, usize)>,
    /// random: seed of its draws
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub skip_seed: u64,
    /// Skip in the prompt too, after the warm-up
    #[arg(long)]
    pub skip_prefill: bool,
    /// Print the share skipped in each layer
    #[arg(long)]
    pub skip_report: bool,
}

impl SkipArgs {
    /// [`options`](Self::options) for the model of an engine.
    pub fn of_engine(&self, engine: &mut Engine) -> Result<SkipOptions, Failure> {
        let (model, on) = engine.model_mut().ok_or_else(|| Failure::Error("the model is in use".into()))?;
        let options = self.options(model, on)?;
        announce(model, &options);
        Ok(options)
    }

    /// [`of_engine`](Self::of_engine) for generating text: see [`if_it_pays`](Self::if_it_pays). Drafts are not judged by
    /// the time of a token.
    fn where_it_pays(&self, engine: &mut Engine, draft: &DraftArgs) -> Result<SkipOptions, Failure> {
        if draft.mode() == DraftMode::Skip {
            return self.of_engine(engine);
        }
        let (model, on) = engine.model_mut().ok_or_else(|| Failure::Error("the model is in use".into()))?;
        let options = self.options(model, on)?;
        self.if_it_pays(model, on, options)
    }

    /// The options; for `auto` those of the candidate that costs least of the fastest ones here, or none, if none is faster than
    /// a token in full.
    pub fn if_it_pays(
        &self,
        model: &mut Model,
        on: Compute<'_>,
        options: SkipOptions,
    ) -> Result<SkipOptions, Failure> {
        let candidates = model.calibration().map(Calibration::auto_candidates).unwrap_or_default();
        let candidates: Vec<Point> = candidates.into_iter().cloned().collect();
        if options.mode != SkipMode::Auto || candidates.is_empty() {
            announce(model, &options);
            return Ok(options);
        }
        let mut settings = Vec::new();
        for point in &candidates {
            note(&format!("skip auto: {}", measured(point)));
            let asked = options.at(point).map_err(Failure::usage)?;
            prepare(model, on, &asked)?;
            settings.push(asked);
        }
        let trials = Trial::of_each(model, on, &settings)?;
        let ms = trials.first().map_or(0.0, |trial| 1e3 * trial.full);
        if let Some(i) = cheapest(&trials, &candidates) {
            model.trim_skip(on, &settings[i])?;
            let (policy, gain) = (&candidates[i].policy, trials[i].gain());
            note(&format!(
                "skip auto: {policy}, {gain:.0} % faster here than the {ms:.1} ms of a token in full"
            ));
            return Ok(settings.swap_remove(i));
        }
        model.drop_cuts();
        model.drop_shortlist();
        let tried = candidates.iter().zip(&trials);
        let tried: Vec<String> =
            tried.map(|(p, trial)| format!("{} {:+.0} %", p.policy, trial.gain())).collect();
        note(&format!(
            "skip auto: no faster here ({}) than the {ms:.1} ms of a token in full, so tokens run in full; \
             --skip {} skips all the same",
            tried.join(", "),
            setting(&candidates[0], " --skip-ratio")
        ));
        Ok(options.off())
    }

    /// [`of_engine`](Self::of_engine) for measuring quality: what is cut is read all the same, which gives the same
    /// results in any company; `skipdecode` reaches its depth over `horizon` tokens.
    pub fn by_rows(&self, engine: &mut Engine, horizon: usize) -> Result<SkipOptions, Failure> {
        let (model, on) = engine.model_mut().ok_or_else(|| Failure::Error("the model is in use".into()))?;
        let options = SkipOptions { horizon: Some(horizon), ..self.checked(model)? };
        announce(model, &options);
        model.policy(&options).map_err(Failure::usage)?;
        model.prepare_skip_by_rows(on, &options)?;
        Ok(options)
    }

    /// The options, checked for the model they are for, which is made ready for them.
    pub fn options(&self, model: &mut Model, on: Compute<'_>) -> Result<SkipOptions, Failure> {
        let options = self.checked(model)?;
        prepare(model, on, &options)?;
        Ok(options)
    }

    fn checked(&self, model: &Model) -> Result<SkipOptions, Failure> {
        let options = SkipOptions {
            mode: self.skip.mode,
            output: self.skip.output,
            ratio: self.skip_ratio,
            threshold: self.skip_threshold,
            k: self.skip_k,
            warm_up: self.skip_warmup,
            cold: self.skip_cold,
            seed: self.skip_seed,
            prefill: self.skip_prefill,
            horizon: None,
        };
        self.calibrate(model)?;
        model.policy(&options).map_err(Failure::usage)?;
        Ok(options)
    }

    /// Reads the calibration file that was named, or the one beside the model, or what is built in for it.
    fn calibrate(&self, model: &Model) -> Outcome {
        if let Some(path) = &self.skip_file {
            model.load_calibration(path)?;
            return Ok(());
        }
        let beside = calibration_path(model.weights().path());
        if self.skip.skips() && beside.is_file() {
            match model.load_calibration(&beside) {
                Ok(_) => {}
                Err(error) => note(&format!("warning: {error}")),
            }
        }
        if self.skip.skips() && model.calibration().is_none() {
            // Those of other models do not fit.
            let _ = BUILT_IN.iter().find(|(name, bytes)| model.read_calibration(name, bytes).is_ok());
        }
        Ok(())
    }
}

/// Names of policies.
pub(super) fn policies() -> impl TypedValueParser<Value = SkipChoice> {
    PossibleValuesParser::new(SkipChoice::names()).try_map(|name| SkipChoice::from_name(&name))
}

/// The policies `named`; without any all but `auto` and those that are two at once. The full model is there in any case.
pub(super) fn contending(named: &[SkipChoice]) -> Vec<SkipChoice> {
    let all = SkipChoice::names().filter_map(|name| SkipChoice::from_name(name).ok());
    let single = |choice: &SkipChoice| !choice.output || *choice == SkipChoice::OUTPUT;
    let choices: Vec<SkipChoice> = match named {
        [] => all.filter(|choice| choice.mode != SkipMode::Auto && single(choice)).collect(),
        _ => named.to_vec(),
    };
    choices.into_iter().filter(|choice| choice.skips()).collect()
}

/// Refuses ratios that are no per cent.
pub(super) fn check_ratios(ratios: &[f32]) -> Outcome {
    match ratios.iter().find(|ratio| !(0.0..=100.0).contains(*ratio)) {
        Some(ratio) => {
            Err(Failure::Usage(format!("--ratios {ratio}: a share lies between 0 and 100 percent")))
        }
        None => Ok(()),
    }
}

/// Where the calibration file of the model at `path` is looked for: `model.skip.gguf` for `model.gguf`.
pub(super) fn calibration_path(path: &Path) -> PathBuf {
    path.with_extension("skip.gguf")
}

/// Makes the model ready for the options, and says what time and memory that took.
fn prepare(model: &mut Model, on: Compute<'_>, options: &SkipOptions) -> Outcome {
    let (started, before, had_shortlist) = (Instant::now(), model.column_bytes(), model.has_shortlist());
    let bar = progress_bar(model.config().layers, "skip: FFNs by columns {wide_bar} {pos}/{len}", false);
    let prepared = model.prepare_skip(on, options, |done, _| bar.set_position(done as u64));
    bar.finish_and_clear();
    prepared?;
    let (bytes, seconds) = (model.column_bytes() as f64, started.elapsed().as_secs_f64());
    if model.column_bytes() > before {
        note(&format!(
            "skip: FFNs laid out by columns in {seconds:.1} s, {:.2} GB of memory more",
            bytes / 1e9
        ));
    }
    if model.has_shortlist() && !had_shortlist {
        let gb = model.shortlist_bytes().unwrap_or(0) as f64 / 1e9;
        note(&format!("skip: copy of the output matrix in 4 bits, {gb:.2} GB of memory more"));
    }
    Ok(())
}

/// Says what `--skip auto` does, and how good it was found to be.
fn announce(model: &Model, options: &SkipOptions) {
    if options.mode != SkipMode::Auto {
        return;
    }
    match model.calibration().and_then(Calibration::auto_point) {
        Some(point) => note(&format!("skip auto: {}", measured(point))),
        None => note("skip auto: the calibration has no setting that is good enough; running in full"),
    }
}

/// Of the settings that pay and are about as fast as the fastest, the one that costs least.
fn cheapest(trials: &[Trial], points: &[Point]) -> Option<usize> {
    let fastest = trials.iter().map(|trial| trial.share).min_by(f64::total_cmp)?;
    let as_fast = |i: &usize| trials[*i].pays() && trials[*i].share <= AS_FAST * fastest;
    (0..trials.len()).filter(as_fast).min_by(|&a, &b| points[a].kl.total_cmp(&points[b].kl))
}

/// A setting and how good it was found to be.
fn measured(point: &Point) -> String {
    let unread = match point.choice() {
        SkipChoice::OUTPUT => "logits of likely tokens exact".into(),
        _ => format!("{:.1} % of FFN bytes unread", 100.0 * point.bytes),
    };
    format!(
        "{}, measured {unread}, perplexity x {:.3}, KL {:.4}, same top 1 {:.1} %",
        setting(point, " at ratio"),
        point.perplexity,
        point.kl,
        100.0 * point.same_top1
    )
}

/// A point's policy, and its ratio if it has one.
fn setting(point: &Point, ratio: &str) -> String {
    match point.choice() {
        SkipChoice::OUTPUT => point.policy.clone(),
        _ => format!("{}{ratio} {:.2}", point.policy, point.ratio),
    }
}

/// Guessing ahead.
#[derive(Args)]
pub(super) struct DraftArgs {
    /// Guess tokens ahead and verify them together, for the same text in other time: off; skip, guesses of the model with
    /// FFNs skipped as --skip says; lookup, what followed the last tokens earlier in the context
    #[arg(long, value_name = "SOURCE", help_heading = "Drafting", default_value = "off", value_parser = PossibleValuesParser::new(DraftMode::names()))]
    draft: String,
    /// Tokens guessed at a time, at most: fewer, or none, when guesses have not been paying
    #[arg(long, value_name = "N", help_heading = "Drafting", default_value_t = DraftOptions::default().max, value_parser = in_range(1, MAX_DRAFT))]
    draft_tokens: usize,
    /// Always guess --draft-tokens, whether it pays or not
    #[arg(long, help_heading = "Drafting")]
    draft_fixed: bool,
}

impl DraftArgs {
    fn mode(&self) -> DraftMode {
        DraftMode::from_name(&self.draft).unwrap_or_default()
    }

    /// The options, checked against those of skipping.
    fn options(&self, skip: &SkipArgs) -> Result<DraftOptions, Failure> {
        let mode = self.mode();
        let skips = skip.skip.skips();
        let usage = |message: &str| Err(Failure::Usage(message.into()));
        match mode {
            DraftMode::Skip if !skips => usage("--draft skip: name the policy that drafts with --skip"),
            DraftMode::Lookup if skips => {
                usage("--draft lookup: the text is the full model's, so --skip would have no effect")
            }
            DraftMode::Skip if skip.skip_prefill => usage(
                "--skip-prefill: with --draft skip the text is the full model's, so prompts run in full",
            ),
            _ => Ok(DraftOptions { mode, max: self.draft_tokens, adaptive: !self.draft_fixed }),
        }
    }
}

pub(super) fn pair(text: &str) -> Result<(usize, usize), String> {
    let expected = || "expected two layers: S,E".to_owned();
    let (start, end) = text.split_once(',').ok_or_else(expected)?;
    match (start.trim().parse(), end.trim().parse()) {
        (Ok(start), Ok(end)) => Ok((start, end)),
        _ => Err(expected()),
    }
}

/// How the next token is chosen.
#[derive(Args)]
#[command(next_help_heading = "Sampling", allow_negative_numbers = true)]
pub(super) struct SamplingArgs {
    /// Temperature; 0 always takes the most likely token [default: what the model's makers recommend, if that is known, else 0.8]
    #[arg(long = "temp", alias = "temperature", value_name = "T")]
    temperature: Option<f32>,
    /// Keep the K most likely tokens; 0 keeps all [default: as recommended, else 40]
    #[arg(long, value_name = "K")]
    top_k: Option<u32>,
    /// Keep the most likely tokens up to probability P; 1 keeps all [default: as recommended, else 0.95]
    #[arg(long, value_name = "P")]
    top_p: Option<f32>,
    /// Keep tokens at least P times as likely as the best; 0 keeps all [default: as recommended, else 0.05]
    #[arg(long, value_name = "P")]
    min_p: Option<f32>,
    /// Locally typical sampling; 1 keeps all
    #[arg(long = "typical", alias = "typical-p", value_name = "P", default_value_t = defaults().typical_p)]
    typical: f32,
    /// Divide the logits of recent tokens; 1 does nothing
    #[arg(long, value_name = "R", default_value_t = defaults().repeat_penalty)]
    repeat_penalty: f32,
    /// Recent tokens that the penalties look at; 0 none, -1 all
    #[arg(long, value_name = "N", default_value_t = defaults().repeat_last_n)]
    repeat_last_n: i32,
    /// Subtracted from a token's logit for each recent occurrence
    #[arg(long, value_name = "F", default_value_t = defaults().frequency_penalty)]
    frequency_penalty: f32,
    /// Subtracted from a token's logit once if it occurred
    #[arg(long, value_name = "F", default_value_t = defaults().presence_penalty)]
    presence_penalty: f32,
    /// Strength of DRY, the penalty on repeated sequences; 0 is off
    #[arg(long, value_name = "F", default_value_t = defaults().dry_multiplier)]
    dry_multiplier: f32,
    /// Growth of the DRY penalty with the length of the repeat
    #[arg(long, value_name = "F", default_value_t = defaults().dry_base)]
    dry_base: f32,
    /// Repeats shorter than this are free
    #[arg(long, value_name = "N", default_value_t = defaults().dry_allowed_length)]
    dry_allowed_length: u32,
    /// Recent tokens that DRY looks at; 0 none, -1 all
    #[arg(long, value_name = "N", default_value_t = defaults().dry_penalty_last_n)]
    dry_penalty_last_n: i32,
    /// Text over which DRY follows no repeat (repeatable; replaces the default: newline : " *)
    #[arg(long, value_name = "TEXT")]
    dry_sequence_breaker: Vec<String>,
    /// Add VALUE (or -inf) to the logit of token ID (repeatable)
    #[arg(short = 'l', long, value_name = "ID=VALUE", value_parser = logit_bias)]
    logit_bias: Vec<(u32, f32)>,
    /// Stages in order, separated by `;` or `,` [default: penalties;dry;top_k;typ_p;top_p;min_p;temperature]
    #[arg(long, value_name = "STAGES", value_parser = stages)]
    samplers: Option<Stages>,
    /// Seed of the random numbers [default: a fresh one]
    #[arg(short, long, value_name = "N")]
    seed: Option<u64>,
    /// Text that ends the output and is not part of it (repeatable)
    #[arg(long = "stop", short = 'r', alias = "reverse-prompt", value_name = "TEXT")]
    stop: Vec<String>,
    /// Go on after an end-of-generation token
    #[arg(long)]
    ignore_eos: bool,
    #[command(flatten)]
    constraint: ConstraintArgs,
}

fn defaults() -> SamplerOptions {
    SamplerOptions::default()
}

/// How the model's file, or else what is known of its makers, says that tokens are drawn (keys as llama.cpp's converter writes
/// them), and llama.cpp's defaults for the rest.
fn recommended(engine: &Engine) -> Result<SamplerOptions, Failure> {
    let (file, defaults) = (engine.metadata(), defaults());
    let known = pull::recommended(engine.model().weights().path());
    let number = |key: &str| file.opt_f32(&format!("general.sampling.{key}"));
    let top_k = file.opt_usize("general.sampling.top_k")?.and_then(|k| u32::try_from(k).ok());
    Ok(SamplerOptions {
        temperature: number("temp")?.or(known.temperature).unwrap_or(defaults.temperature),
        top_k: top_k.or(known.top_k).unwrap_or(defaults.top_k),
        top_p: number("top_p")?.or(known.top_p).unwrap_or(defaults.top_p),
        min_p: number("min_p")?.unwrap_or(defaults.min_p),
        ..defaults
    })
}

/// A list of stages; clap would take a bare `Vec` for a repeatable flag.
type Stages = Box<[Stage]>;

fn stages(text: &str) -> Result<Stages, String> {
    let names = text.split([';', ',']).map(str::trim).filter(|name| !name.is_empty());
    names.map(|name| Stage::from_str(name).map_err(|e| e.to_string())).collect()
}

/// `ID=VALUE`, or llama.cpp's `ID+VALUE` and `ID-VALUE`.
fn logit_bias(text: &str) -> Result<(u32, f32), String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (id, value) = text.split_at(digits);
    let value = value.strip_prefix('=').unwrap_or(value);
    match (id.parse(), value.parse()) {
        (Ok(id), Ok(value)) => Ok((id, value)),
        _ => Err("expected ID=VALUE, such as 42=-1.5 or 42=-inf".into()),
    }
}

/// What the output must look like.
#[derive(Args)]
#[group(multiple = false)]
struct ConstraintArgs {
    /// Output valid under a JSON schema, given as text or @FILE
    #[arg(short = 'j', long, value_name = "SCHEMA|@FILE", help_heading = "Constrained output")]
    json_schema: Option<String>,
    /// Output that is a JSON object
    #[arg(long, help_heading = "Constrained output")]
    json_object: bool,
    /// Output that follows a Lark grammar, given as text or @FILE
    #[arg(long, value_name = "GRAMMAR|@FILE", help_heading = "Constrained output")]
    grammar: Option<String>,
}

impl SamplingArgs {
    /// Refuses flags that make no sense.
    pub fn check(&self) -> Outcome {
        self.options(defaults()).map(drop)
    }

    /// The sampler's options, checked, with what no flag says from `defaults`.
    fn options(&self, defaults: SamplerOptions) -> Result<SamplerOptions, Failure> {
        let breakers = match self.dry_sequence_breaker.is_empty() {
            true => defaults.dry_sequence_breakers,
            false => self.dry_sequence_breaker.clone(),
        };
        let options = SamplerOptions {
            temperature: self.temperature.unwrap_or(defaults.temperature),
            top_k: self.top_k.unwrap_or(defaults.top_k),
            top_p: self.top_p.unwrap_or(defaults.top_p),
            min_p: self.min_p.unwrap_or(defaults.min_p),
            typical_p: self.typical,
            repeat_penalty: self.repeat_penalty,
            repeat_last_n: self.repeat_last_n,
            frequency_penalty: self.frequency_penalty,
            presence_penalty: self.presence_penalty,
            dry_multiplier: self.dry_multiplier,
            dry_base: self.dry_base,
            dry_allowed_length: self.dry_allowed_length,
            dry_penalty_last_n: self.dry_penalty_last_n,
            dry_sequence_breakers: breakers,
            logit_bias: self.logit_bias.clone(),
            seed: self.seed,
            order: self.samplers.as_ref().map_or(defaults.order, |stages| stages.to_vec()),
        };
        options.validate().map_err(Failure::usage)?;
        Ok(options)
    }

    /// A sampler for the engine's vocabulary, with `seed` in place of the flag's if there is one.
    pub fn sampler(&self, engine: &Engine, seed: Option<u64>) -> Result<Sampler, Failure> {
        let mut options = self.options(recommended(engine)?)?;
        options.seed = seed.or(options.seed);
        let vocab = engine.tokenizer().vocab_size();
        if let Some((id, _)) = options.logit_bias.iter().find(|(id, _)| *id as usize >= vocab) {
            return Err(Failure::Usage(format!("--logit-bias {id}: the vocabulary has {vocab} tokens")));
        }
        let mut sampler = Sampler::new(options).map_err(Failure::usage)?;
        if self.dry_multiplier > 0.0 {
            sampler.set_dry_breakers(&self.breakers(engine, sampler.options())?);
        }
        Ok(sampler)
    }

    fn breakers(&self, engine: &Engine, options: &SamplerOptions) -> Result<Vec<Vec<u32>>, Failure> {
        let tokenizer = engine.tokenizer();
        let mut failed = None;
        let vocabulary = (0..tokenizer.vocab_size() as u32).map(|id| (id, tokenizer.token_bytes(id)));
        let breakers = resolve_breakers(&options.dry_sequence_breakers, vocabulary, |text| {
            tokenizer.encode(text, EncodeOptions::default()).unwrap_or_else(|error| {
                failed = Some(error);
                Vec::new()
            })
        });
        failed.map_or(Ok(breakers), |error| Err(error.into()))
    }

    /// The constraint, if one is asked for.
    pub fn constraint(&self, engine: &Engine) -> Result<Option<Constraint>, Failure> {
        let ConstraintArgs { json_schema, json_object, grammar } = &self.constraint;
        let table = || -> Result<_, ConstraintError> { engine.token_table() };
        Ok(match (json_schema, grammar) {
            (Some(schema), _) => Some(Constraint::json_schema(&text_or_file(schema)?, table()?)?),
            (_, Some(grammar)) => Some(Constraint::grammar(&text_or_file(grammar)?, table()?)?),
            _ if *json_object => Some(Constraint::json_object(table()?)?),
            _ => None,
        })
    }

    /// The stop strings.
    pub fn stop(&self) -> StopMatcher {
        StopMatcher::new(self.stop.iter().cloned())
    }

    pub fn ignore_eos(&self) -> bool {
        self.ignore_eos
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A few per cent of time are not worth a worse text, and what is slower than the full model is nothing at all.
    #[test]
    fn auto_takes_the_best_of_the_fastest() {
        let choice = |settings: &[(f64, f32)]| {
            let trials = settings.iter().map(|&(share, _)| Trial { full: 0.01, share });
            let points = settings.iter().map(|&(_, kl)| Point { kl, ..Point::default() });
            cheapest(&trials.collect::<Vec<_>>(), &points.collect::<Vec<_>>())
        };
        assert_eq!(choice(&[(0.86, 0.03), (0.89, 0.001), (0.88, 0.02)]), Some(1));
        assert_eq!(choice(&[(0.80, 0.03), (0.89, 0.001), (0.81, 0.02)]), Some(2));
        assert_eq!(choice(&[(0.97, 0.03), (1.0, 0.001)]), Some(0));
        assert_eq!(choice(&[(1.2, 0.03), (1.0, 0.001)]), None);
        assert_eq!(choice(&[]), None);
    }

    #[test]
    fn biases_in_both_notations() {
        assert_eq!(logit_bias("42=-1.5"), Ok((42, -1.5)));
        assert_eq!(logit_bias("42+1"), Ok((42, 1.0)));
        assert_eq!(logit_bias("42-inf"), Ok((42, f32::NEG_INFINITY)));
        for bad in ["", "=1", "42", "42=", "x=1", "-1=1", "99999999999=1"] {
            assert!(logit_bias(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn pairs_and_stages() {
        assert_eq!(pair("2, 28"), Ok((2, 28)));
        assert!(pair("2").is_err() && pair("2,x").is_err());
        assert_eq!(stages("top_k; temperature").as_deref(), Ok(&[Stage::TopK, Stage::Temperature][..]));
        assert!(stages("top_k;xtc").is_err_and(|e| e.contains("xtc")));
    }
}
