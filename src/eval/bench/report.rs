//! What a benchmark found, with llama-bench's keys first.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use super::Run;
use crate::machine::Machine;
use crate::model::Model;

/// One test. Speeds are tokens a second, `gbps` is 1e9 bytes a second.
///
/// llama-bench's `avg_ts` is the mean; what we add is computed from the median, which one disturbed repetition does
/// not move.
#[derive(Clone, Debug, Serialize)]
#[allow(missing_docs)] // llama-bench's names, most of them
pub struct Report {
    pub build_commit: &'static str,
    pub build_number: u32,
    pub cpu_info: String,
    pub gpu_info: &'static str,
    pub backends: &'static str,
    pub model_filename: String,
    /// Architecture, parameters, type of most weights.
    pub model_type: String,
    /// Bytes of all tensors.
    pub model_size: u64,
    pub model_n_params: u64,
    pub n_batch: usize,
    pub n_ubatch: usize,
    pub n_threads: usize,
    pub type_k: &'static str,
    pub type_v: &'static str,
    pub n_gpu_layers: u32,
    pub use_mmap: bool,
    pub embeddings: bool,
    pub n_prompt: usize,
    pub n_gen: usize,
    pub n_depth: usize,
    /// When it began, UTC.
    pub test_time: String,
    pub avg_ns: u64,
    pub stddev_ns: u64,
    pub avg_ts: f64,
    pub stddev_ts: f64,
    pub samples_ns: Vec<u64>,
    pub samples_ts: Vec<f64>,
    /// `pp512`, as in llama-bench's table.
    pub test: String,
    pub median_ts: f64,
    /// Weight bytes that a generated token read, skipped ones left out, times the median speed; of generation only.
    pub weight_gbps: Option<f64>,
    /// Likewise the bytes of the key/value cache that it read.
    pub kv_gbps: Option<f64>,
    /// Median of reading 1 GiB with the same threads, before, between and after the repetitions; of generation.
    pub sweep_gbps: Option<f64>,
    /// `(weight_gbps + kv_gbps) / sweep_gbps`
    pub sweep_share: Option<f64>,
    /// Integer operations of the matrix products, two a weight and token, times the median speed, 1e12 a second; of
    /// prompts only.
    pub tops: Option<f64>,
    /// Median of what the kernels' integer instruction does on registers, 1e12 a second, with the same threads, before,
    /// between and after the repetitions; of prompts, with kernels whose peak is measured.
    pub peak_tops: Option<f64>,
    /// `tops / peak_tops`
    pub peak_share: Option<f64>,
    pub kernel: &'static str,
    pub skip: &'static str,
    /// Share of the FFN blocks of the timed tokens that was skipped.
    pub ffn_skipped: f64,
    /// Share of the bytes of the output matrix that they left unread.
    pub output_bytes_skipped: f64,
    pub skipped_by_layer: Vec<f64>,
    /// The same test with another program.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub vs: Option<Rival>,
}

/// What another llama-bench measured in the same minutes.
#[derive(Clone, Debug, Serialize)]
#[allow(missing_docs)]
pub struct Rival {
    pub vs_build_commit: String,
    pub vs_avg_ts: f64,
    pub vs_stddev_ts: f64,
    pub vs_median_ts: f64,
    pub vs_samples_ts: Vec<f64>,
    /// Our median speed divided by the other's.
    pub vs_ratio: f64,
}

impl Report {
    pub(super) fn new(run: &Run<'_>) -> Self {
        let (model, tokens) = (run.model, run.test.tokens() as f64);
        let seconds: Vec<f64> = run.samples.iter().map(|time| time.as_secs_f64().max(1e-9)).collect();
        let samples_ns: Vec<u64> = run.samples.iter().map(|time| time.as_nanos() as u64).collect();
        let samples_ts: Vec<f64> = seconds.iter().map(|s| tokens / s).collect();
        let in_ns: Vec<f64> = samples_ns.iter().map(|&ns| ns as f64).collect();
        let median_ts = median(&samples_ts);
        let stats = &run.stats;
        let ffn_bytes = |layer: usize| model.layers()[layer].ffn.bytes() as u64;
        let ffns = model.ffn_bytes() as f64 * stats.weighted_share(ffn_bytes);
        let read = model.decode_bytes() as f64 - ffns - stats.output_unread_by_token();
        let gbps = |bytes: f64| (run.test.generate > 0).then_some(bytes * median_ts / 1e9);
        let (weight_gbps, kv_gbps) = (gbps(read), gbps(kv_bytes(run)));
        let sweep_gbps = (!run.sweeps.is_empty()).then(|| median(&run.sweeps) / 1e9);
        let peak_tops = (!run.peaks.is_empty()).then(|| median(&run.peaks) / 1e12);
        let tops = (run.test.prompt > 0).then(|| operations(run) * median_ts / tokens / 1e12);
        let kv = run.state.kv().kind().name();
        Self {
            build_commit: concat!("skiff-", env!("CARGO_PKG_VERSION")),
            build_number: 0,
            cpu_info: Machine::detect().cpu.unwrap_or_default(),
            gpu_info: "",
            backends: "CPU",
            model_filename: model.weights().path().to_string_lossy().into_owned(),
            model_type: model_type(model),
            model_size: model.weights().tensors().map(|t| t.n_bytes).sum(),
            model_n_params: parameters(model),
            n_batch: run.options.batch,
            n_ubatch: run.options.batch,
            n_threads: run.on.team.threads(),
            type_k: kv,
            type_v: kv,
            n_gpu_layers: 0,
            use_mmap: model.weights().is_mapped(),
            embeddings: false,
            n_prompt: run.test.prompt,
            n_gen: run.test.generate,
            n_depth: run.test.depth,
            test_time: utc(run.started),
            avg_ns: mean(&in_ns) as u64,
            stddev_ns: deviation(&in_ns) as u64,
            avg_ts: mean(&samples_ts),
            stddev_ts: deviation(&samples_ts),
            samples_ns,
            samples_ts,
            test: run.test.name(),
            median_ts,
            weight_gbps,
            kv_gbps,
            sweep_gbps,
            sweep_share: weight_gbps.zip(kv_gbps).zip(sweep_gbps).map(|((w, kv), sweep)| (w + kv) / sweep),
            tops,
            peak_tops,
            peak_share: tops.zip(peak_tops).map(|(tops, peak)| tops / peak),
            kernel: run.on.kernels.name(),
            skip: run.state.policy_name(),
            ffn_skipped: stats.share(),
            output_bytes_skipped: model.output_share(stats),
            skipped_by_layer: stats.share_by_layer(),
            vs: None,
        }
    }

    /// Adds what the other program measured: its commit and its speeds, at least one.
    pub fn compare(&mut self, build_commit: String, samples: Vec<f64>) {
        self.vs = Some(Rival {
            vs_build_commit: build_commit,
            vs_avg_ts: mean(&samples),
            vs_stddev_ts: deviation(&samples),
            vs_median_ts: median(&samples),
            vs_ratio: self.median_ts / median(&samples),
            vs_samples_ts: samples,
        });
    }
}

/// Operations of the matrix products with weights in a prompt; the output matrix is used once.
fn operations(run: &Run<'_>) -> f64 {
    let weights = |t: &crate::weights::Tensor| (t.rows() * t.cols()) as f64;
    let tokens = run.test.prompt as f64;
    let skipped = run.stats.share_by_layer();
    let layers = run.model.layers().iter().zip(skipped).map(|(layer, skipped)| {
        let (a, f) = (&layer.attention, &layer.ffn);
        let attention: f64 = [&a.q, &a.k, &a.v, &a.output].into_iter().map(weights).sum();
        let ffn: f64 = [&f.gate, &f.up, &f.down].into_iter().map(weights).sum();
        attention + ffn * (1.0 - skipped)
    });
    let config = run.model.config();
    2.0 * (tokens * layers.sum::<f64>() + (config.vocab * config.embedding) as f64)
}

fn parameters(model: &Model) -> u64 {
    model.weights().tensors().map(|t| t.shape.iter().product::<u64>()).sum()
}

/// Bytes of the key/value cache that a generated token reads in all layers (policies that drop some read less), on average: each
/// token looks back on one position more.
fn kv_bytes(run: &Run<'_>) -> f64 {
    let (cache, seen) = (run.state.kv(), run.test.depth as f64 + (run.test.generate as f64 + 1.0) / 2.0);
    cache.bytes() as f64 / cache.context() as f64 * seen
}

/// `llama 135M Q4_1`: the type is the one that most weights have.
fn model_type(model: &Model) -> String {
    let mut counts = std::collections::BTreeMap::new();
    for tensor in model.weights().tensors() {
        *counts.entry(tensor.ty).or_insert(0u64) += tensor.shape.iter().product::<u64>();
    }
    let most = counts.into_iter().max_by_key(|&(_, count)| count).map_or("", |(ty, _)| ty.name());
    let n = parameters(model) as f64;
    let size = if n < 999.5e6 { format!("{:.0}M", n / 1e6) } else { format!("{:.1}B", n / 1e9) };
    format!("{} {size} {most}", format!("{:?}", model.config().architecture).to_lowercase())
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Of the sample, as llama-bench's.
fn deviation(values: &[f64]) -> f64 {
    if values.len() < 2 {
        return 0.0;
    }
    let mean = mean(values);
    (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (values.len() - 1) as f64).sqrt()
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let half = sorted.len() / 2;
    if sorted.len().is_multiple_of(2) { (sorted[half - 1] + sorted[half]) / 2.0 } else { sorted[half] }
}

/// `2025-01-31T23:59:59Z`
fn utc(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let (h, m, s) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{h:02}:{m:02}:{s:02}Z")
}

/// Year, month and day, `days` after 1970-01-01.
fn civil(mut days: u64) -> (u64, u64, u64) {
    let leap = |y: u64| (y.is_multiple_of(4) && !y.is_multiple_of(100)) || y.is_multiple_of(400);
    let mut year = 1970;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let february = 28 + u64::from(leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    (year, month, days + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn statistics() {
        assert_eq!((median(&[3.0, 1.0, 2.0]), median(&[4.0, 1.0])), (2.0, 2.5));
        assert_eq!((mean(&[1.0, 3.0]), deviation(&[1.0, 3.0]), deviation(&[5.0])), (2.0, 2f64.sqrt(), 0.0));
    }

    #[test]
    fn dates() {
        let at = |seconds| utc(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(0), "1970-01-01T00:00:00Z");
        assert_eq!(at(951_782_399), "2000-02-28T23:59:59Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(at(1_735_689_599), "2024-12-31T23:59:59Z");
    }
}
