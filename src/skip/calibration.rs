//! What a calibration run has learnt about a model, and its form in a `.skip.gguf` file.
//!
//! The keys are documented in docs/skipping.md. A file is hostile until [`Calibration::read`] has returned:
//! every length is checked against the model's shape and every number against its range.

use std::io;

use super::stand_in::matrix_type;
use super::{CutPlan, CutSide, LayerCut, ModelFacts, OutputCalibration, SkipChoice, StandIn};
use crate::gguf::{Builder, Error as GgufError, GgmlType, Gguf, Metadata, StringArray, WriteError};
use crate::quant;

/// Version of the keys.
const VERSION: u32 = 1;
/// Most entries of a curve and most points: far more than `skiff calibrate` writes.
const MAX_ENTRIES: usize = 1024;

/// What `--skip auto` may cost: mean KL divergence from the full model in nats, and perplexity in units of its own.
const AUTO_KL: f32 = 0.04;
const AUTO_PERPLEXITY: f32 = 1.03;

/// How a policy's strength sets the share that it skips, measured on the calibration text.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Curve {
    /// Shares, 0 to 1, rising.
    pub ratios: Vec<f32>,
    /// The strength that gives each.
    pub strengths: Vec<f32>,
}

impl Curve {
    /// The strength that gives `ratio`, interpolated; `None` beyond the largest measured.
    pub fn strength(&self, ratio: f32) -> Option<f32> {
        let at = self.ratios.iter().position(|&r| r >= ratio)?;
        if at == 0 {
            return self.strengths.first().copied();
        }
        let (low, high) = (self.ratios[at - 1], self.ratios[at]);
        let t = (ratio - low) / (high - low).max(f32::EPSILON);
        Some(self.strengths[at - 1] + t * (self.strengths[at] - self.strengths[at - 1]))
    }

    /// The largest measured share.
    pub fn most(&self) -> f32 {
        self.ratios.last().copied().unwrap_or(0.0)
    }
}

/// What may be cut, and how deep.
///
/// The weight of an entry is the error that a unit of it adds to the model's output, as calibration estimates it,
/// in units of what a byte of its column is worth; so one threshold serves all layers and both sides, and what
/// is left out is always that which costs least for a byte.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CutCalibration {
    /// Centres and weights.
    pub plan: CutPlan,
    /// Threshold of `cut` by share of FFN weight bytes.
    pub curve: Curve,
    /// Threshold of `neurons` by share of FFN weight bytes; empty in files of older versions.
    pub neurons: Curve,
}

/// What may stand in for FFNs, and when.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StandInCalibration {
    /// For each layer; all of one rank.
    pub layers: Vec<StandIn>,
    /// Threshold of `stand-in` by share of blocks.
    pub curve: Curve,
}

/// When stand-ins go before cuts, where both may be.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MixedCalibration {
    /// Threshold of stand-ins, less twice the binary logarithm of that of cuts.
    pub offset: f32,
    /// Threshold of cuts by share of FFN weight bytes that both leave unread.
    pub curve: Curve,
}

impl MixedCalibration {
    /// The threshold of stand-ins that goes with one of cuts.
    pub fn below(&self, threshold: f32) -> f32 {
        2.0 * threshold.log2() + self.offset
    }
}

/// The measured quality of a policy at a strength, on text that it was not calibrated on.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct Point {
    /// Name of the policy.
    pub policy: String,
    /// The `--skip-ratio` that was asked for.
    pub ratio: f32,
    /// Share of FFN blocks skipped.
    pub blocks: f32,
    /// Share of FFN weight bytes left unread.
    pub bytes: f32,
    /// Perplexity in units of the full model's.
    pub perplexity: f32,
    /// Mean KL divergence from the full model, nats.
    pub kl: f32,
    /// Share of tokens whose most likely successor is the full model's.
    pub same_top1: f32,
}

impl Point {
    /// Whether `--skip auto` may take it: mean KL divergence of 0.04 nats and 1.03 times the perplexity at most.
    pub fn is_good(&self) -> bool {
        let skips = self.choice().skips() && (self.bytes > 0.0 || self.choice().output);
        skips && self.kl <= AUTO_KL && self.perplexity <= AUTO_PERPLEXITY
    }

    /// What its policy is; nothing, where it has a name that this program does not know.
    pub fn choice(&self) -> SkipChoice {
        SkipChoice::from_name(&self.policy).unwrap_or_default()
    }
}

/// What `skiff calibrate` measures. Vectors have an entry a layer unless they say otherwise.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Calibration {
    /// [Fingerprint](crate::weights::Weights::fingerprint) of the model.
    pub model: String,
    /// Name of the calibration text.
    pub text: String,
    /// Tokens of it that were evaluated.
    pub tokens: u32,
    /// Mean `cos(h, h + FFN(norm(h)))`.
    pub cosines: Vec<f32>,
    /// Block Influence, `1 - mean cos(layer in, layer out)`.
    pub influence: Vec<f32>,
    /// Mean KL divergence that skipping this FFN alone causes, nats.
    pub damage: Vec<f32>,
    /// First layer whose FFN may be skipped, and the first after the last.
    pub cold: (usize, usize),
    /// `ffn-skip` with `k` = 1: cosine threshold by share of blocks.
    pub ffn_skip: Curve,
    /// What `cut` needs.
    pub cut: Option<CutCalibration>,
    /// What `stand-in` needs; nothing in files of older versions.
    pub stand_ins: Option<StandInCalibration>,
    /// What `mixed` needs beside these two; nothing in files of older versions.
    pub mixed: Option<MixedCalibration>,
    /// What `output` needs; nothing in files of older versions, and where the output matrix has few bits anyway.
    pub output: Option<OutputCalibration>,
    /// Measured points, in no order.
    pub points: Vec<Point>,
    /// Index of the point that `--skip auto` takes.
    pub auto: Option<usize>,
}

/// Why a calibration file does not serve.
#[derive(Debug, thiserror::Error, PartialEq)]
#[allow(missing_docs)]
pub enum CalibrationError {
    #[error(transparent)]
    Gguf(#[from] GgufError),
    #[error("not a calibration file: general.architecture is {found:?}, expected \"skip\"")]
    NotOne { found: String },
    #[error("skip.version {found}: this program reads version {VERSION}; calibrate anew")]
    Version { found: u32 },
    #[error("calibrated for another model ({key} {found}, this model has {expected}); calibrate anew")]
    OtherModel { key: &'static str, found: String, expected: String },
    #[error("{key} has {found} entries, expected {expected}")]
    Length { key: String, found: usize, expected: usize },
    #[error("{key}[{index}] is {found}, expected {expected}")]
    Value { key: String, index: usize, found: f32, expected: &'static str },
    #[error("tensor {tensor:?} is {found}, expected {ty} {expected:?}")]
    Tensor { tensor: String, found: String, ty: GgmlType, expected: [u64; 2] },
    #[error("{key} is {found}, expected {expected}")]
    Number { key: &'static str, found: usize, expected: String },
}

type Result<T> = std::result::Result<T, CalibrationError>;

impl Calibration {
    /// The layers of `warm`, best to skip first: those whose FFN turns the stream least.
    pub fn static_order(&self, warm: std::ops::Range<usize>) -> Vec<usize> {
        let mut layers: Vec<usize> = warm.collect();
        layers.sort_by(|&a, &b| self.cosines[b].total_cmp(&self.cosines[a]));
        layers
    }

    /// The layers of `warm`, least influence first.
    pub fn influence_order(&self, warm: std::ops::Range<usize>) -> Vec<usize> {
        let mut layers: Vec<usize> = warm.collect();
        layers.sort_by(|&a, &b| self.influence[a].total_cmp(&self.influence[b]));
        layers
    }

    /// The point that `--skip auto` takes.
    pub fn auto_point(&self) -> Option<&Point> {
        self.auto.and_then(|i| self.points.get(i))
    }

    /// The points among which `--skip auto` chooses where it can time them: its own, and of each other way to skip FFNs the one
    /// with the most bytes unread of those that are good enough, rather with the output matrix left unread, too.
    pub fn auto_candidates(&self) -> Vec<&Point> {
        let Some(own) = self.auto_point() else { return Vec::new() };
        let mut candidates = vec![own];
        let depth = |point: &Point| (point.choice().output, point.bytes);
        let others = self.points.iter().filter(|point| point.choice().mode != own.choice().mode);
        for point in others.filter(|point| point.is_good()) {
            match candidates.iter_mut().find(|found| found.choice().mode == point.choice().mode) {
                Some(found) if depth(found) < depth(point) => *found = point,
                Some(_) => {}
                None => candidates.push(point),
            }
        }
        candidates
    }

    /// Reads the file `bytes`, whose header is `file`, for a model of the shapes `facts` and with `fingerprint`.
    pub fn read(file: &Gguf, bytes: &[u8], facts: &ModelFacts, fingerprint: &str) -> Result<Self> {
        let metadata = &file.metadata;
        check_kind(metadata, facts, fingerprint)?;
        let r = Reader { file, bytes, metadata };
        let layers = facts.layers;
        let (start, end) = (metadata.usize("skip.cold.start")?, metadata.usize("skip.cold.end")?);
        if start > end || end > layers {
            let expected = format!("a layer from {start} to {layers}");
            return Err(CalibrationError::Number { key: "skip.cold.end", found: end, expected });
        }
        let points = r.points()?;
        let auto = metadata.opt_usize("skip.auto")?;
        if let Some(found) = auto.filter(|&i| i >= points.len()) {
            let expected = format!("the index of one of {} points", points.len());
            return Err(CalibrationError::Number { key: "skip.auto", found, expected });
        }
        Ok(Self {
            model: fingerprint.to_owned(),
            text: metadata.opt_str("skip.text")?.unwrap_or_default().to_owned(),
            tokens: metadata.u32("skip.tokens")?,
            cosines: r.numbers("skip.cosine", layers, &COSINE)?,
            influence: r.numbers("skip.influence", layers, &INFLUENCE)?,
            damage: r.numbers("skip.damage", layers, &POSITIVE)?,
            cold: (start, end),
            ffn_skip: r.curve("skip.ffn_skip", &COSINE)?,
            cut: r.cut(facts)?,
            stand_ins: r.stand_ins(facts)?,
            mixed: r.mixed()?,
            output: r.output(facts)?,
            points,
            auto,
        })
    }

    /// Writes the file.
    pub fn write<W: io::Write>(&self, facts: &ModelFacts, out: W) -> std::result::Result<W, WriteError> {
        let mut file = Builder::new();
        self.keys(&mut file, facts)?;
        let sides = self.cut.as_ref().map_or_else(Vec::new, |cut| {
            file_sides(facts).map(|(name, n, _, of)| (name, n, matrix(&cut.plan, n, of))).to_vec()
        });
        let sides: Vec<_> = sides.into_iter().filter(|(_, _, values)| !values.is_empty()).collect();
        for (name, n, _) in &sides {
            file.tensor(*name, stored_type(*n), &[*n as u64, facts.layers as u64])?;
        }
        let stand_ins = self.stand_ins.as_ref().map_or_else(Vec::new, |found| stand_in_tensors(facts, found));
        for (name, ty, cols, bytes) in &stand_ins {
            let rows = bytes.len() / ty.row_bytes(*cols);
            file.tensor(*name, *ty, &[*cols as u64, rows as u64])?;
        }
        let (n, ty) = (facts.embedding, stored_type(facts.embedding));
        let output =
            self.output.iter().flat_map(|found| [(CENTRE, &found.centre), (DIRECTIONS, &found.directions)]);
        for (name, values) in output.clone() {
            file.tensor(name, ty, &[n as u64, (values.len() / n) as u64])?;
        }
        let mut out = file.start(out)?;
        for (_, n, values) in &sides {
            out.write_tensor(&stored(*n, stored_type(*n), values))?;
        }
        for (_, _, _, bytes) in &stand_ins {
            out.write_tensor(bytes)?;
        }
        for (_, values) in output {
            out.write_tensor(&stored(n, ty, values))?;
        }
        out.finish()
    }

    fn keys(&self, file: &mut Builder, facts: &ModelFacts) -> std::result::Result<(), GgufError> {
        file.insert("general.architecture", "skip")?;
        file.insert("skip.version", VERSION)?;
        file.insert("skip.model.fingerprint", self.model.as_str())?;
        file.insert("skip.model.layers", facts.layers as u32)?;
        file.insert("skip.model.embedding", facts.embedding as u32)?;
        file.insert("skip.model.ffn", facts.ffn as u32)?;
        file.insert("skip.text", self.text.as_str())?;
        file.insert("skip.tokens", self.tokens)?;
        file.insert("skip.cosine", self.cosines.clone())?;
        file.insert("skip.influence", self.influence.clone())?;
        file.insert("skip.damage", self.damage.clone())?;
        file.insert("skip.cold.start", self.cold.0 as u32)?;
        file.insert("skip.cold.end", self.cold.1 as u32)?;
        file.insert("skip.ffn_skip.ratio", self.ffn_skip.ratios.clone())?;
        file.insert("skip.ffn_skip.strength", self.ffn_skip.strengths.clone())?;
        if let Some(cut) = &self.cut {
            let cuttable: Vec<bool> = cut.plan.layers.iter().map(Option::is_some).collect();
            file.insert("skip.cut.layer", cuttable)?;
            let bias = |layer: &Option<LayerCut>| layer.as_ref().map_or(0.0, |cut| cut.depth.bias);
            file.insert("skip.cut.depth", cut.plan.layers.iter().map(bias).collect::<Vec<f32>>())?;
            file.insert("skip.cut.coarse", cut.plan.coarse)?;
            file.insert("skip.cut.ratio", cut.curve.ratios.clone())?;
            file.insert("skip.cut.strength", cut.curve.strengths.clone())?;
            file.insert("skip.neurons.ratio", cut.neurons.ratios.clone())?;
            file.insert("skip.neurons.strength", cut.neurons.strengths.clone())?;
        }
        if let Some(found) = &self.stand_ins {
            file.insert("skip.stand_in.rank", found.layers.first().map_or(1, StandIn::rank) as u32)?;
            file.insert("skip.stand_in.bias", found.layers.iter().map(|l| l.bias).collect::<Vec<f32>>())?;
            file.insert("skip.stand_in.ratio", found.curve.ratios.clone())?;
            file.insert("skip.stand_in.strength", found.curve.strengths.clone())?;
        }
        if let Some(found) = &self.mixed {
            file.insert("skip.mixed.offset", found.offset)?;
            file.insert("skip.mixed.ratio", found.curve.ratios.clone())?;
            file.insert("skip.mixed.strength", found.curve.strengths.clone())?;
        }
        self.write_points(file)
    }

    fn write_points(&self, file: &mut Builder) -> std::result::Result<(), GgufError> {
        let policies: StringArray = self.points.iter().map(|p| p.policy.as_str()).collect();
        file.insert("skip.point.policy", policies)?;
        for (name, of) in POINT_FIELDS {
            let values: Vec<f32> = self.points.iter().map(|p| *of(&mut p.clone())).collect();
            file.insert(format!("skip.point.{name}"), values)?;
        }
        self.auto.map_or(Ok(()), |i| file.insert("skip.auto", i as u32))
    }
}

/// A tensor of the file: name, columns, what its values may be, and the vector of a layer that is a row of it.
type FileSide = (&'static str, usize, &'static Range, fn(&mut LayerCut) -> &mut Vec<f32>);

fn file_sides(facts: &ModelFacts) -> [FileSide; 6] {
    [
        ("cut.depth.weight", facts.embedding, &FINITE, |cut| &mut cut.depth.weight),
        ("cut.inputs.centre", facts.embedding, &FINITE, |cut| &mut cut.inputs.centre),
        ("cut.inputs.weight", facts.embedding, &POSITIVE, |cut| &mut cut.inputs.weight),
        ("cut.inner.centre", facts.ffn, &FINITE, |cut| &mut cut.inner.centre),
        ("cut.inner.weight", facts.ffn, &POSITIVE, |cut| &mut cut.inner.weight),
        ("cut.gate.weight", facts.ffn, &POSITIVE, |cut| &mut cut.gate),
    ]
}

/// The tensors of stand-ins: name, type, columns and bytes. Layers are one under the other.
fn stand_in_tensors(
    facts: &ModelFacts,
    found: &StandInCalibration,
) -> Vec<(&'static str, GgmlType, usize, Vec<u8>)> {
    let (n, rank) = (facts.embedding, found.layers.first().map_or(1, StandIn::rank));
    let vectors = |of: fn(&StandIn) -> &[f32]| {
        let values: Vec<f32> = found.layers.iter().flat_map(of).copied().collect();
        (stored_type(n), n, stored(n, stored_type(n), &values))
    };
    let matrices = |cols, of: fn(&StandIn) -> &[u8]| {
        (matrix_type(cols), cols, found.layers.iter().flat_map(of).copied().collect())
    };
    let named = |name, (ty, cols, bytes)| (name, ty, cols, bytes);
    vec![
        named(PROBE, vectors(|layer| &layer.probe)),
        named(BASE, vectors(|layer| &layer.base)),
        named(NARROW, matrices(n, |layer| layer.narrow().bytes())),
        named(WIDE, matrices(rank, |layer| layer.wide().bytes())),
    ]
}

const PROBE: &str = "stand_in.probe.weight";
const BASE: &str = "stand_in.base";
const NARROW: &str = "stand_in.narrow.weight";
const WIDE: &str = "stand_in.wide.weight";
const CENTRE: &str = "output.centre";
const DIRECTIONS: &str = "output.directions";

/// The vectors of all layers, one after the other, zeros for those that have none; nothing if no layer has one.
fn matrix(plan: &CutPlan, n: usize, of: fn(&mut LayerCut) -> &mut Vec<f32>) -> Vec<f32> {
    let vectors = plan.layers.iter().map(|cut| cut.clone().map(|mut cut| std::mem::take(of(&mut cut))));
    let vectors: Vec<Vec<f32>> = vectors.map(Option::unwrap_or_default).collect();
    if vectors.iter().all(Vec::is_empty) {
        return Vec::new();
    }
    vectors
        .into_iter()
        .flat_map(|mut vector| {
            vector.resize(n, 0.0);
            vector
        })
        .collect()
}

/// The type in which vectors of `n` entries are stored: a byte an entry is exact enough, where blocks fit.
pub(super) fn stored_type(n: usize) -> GgmlType {
    if n.is_multiple_of(GgmlType::Q8_0.block_len()) { GgmlType::Q8_0 } else { GgmlType::F16 }
}

/// Rows of `n` values in blocks of `ty`.
pub(super) fn stored(n: usize, ty: GgmlType, values: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; ty.row_bytes(n) * (values.len() / n)];
    for (row, bytes) in values.chunks_exact(n).zip(bytes.chunks_exact_mut(ty.row_bytes(n))) {
        quant::quantize_row(ty, row, bytes);
    }
    bytes
}

/// What [`stored`] has made of rows of `n` values.
pub(super) fn restored(n: usize, ty: GgmlType, bytes: &[u8]) -> Vec<f32> {
    let mut values = vec![0.0; bytes.len() / ty.row_bytes(n) * n];
    for (row, bytes) in values.chunks_exact_mut(n).zip(bytes.chunks_exact(ty.row_bytes(n))) {
        quant::dequantize_row(ty, bytes, row);
    }
    values
}

impl OutputCalibration {
    /// This as it comes back from a file.
    pub fn as_stored(&self) -> Self {
        let (n, ty) = (self.centre.len(), stored_type(self.centre.len()));
        let round = |values: &[f32]| restored(n, ty, &stored(n, ty, values));
        Self { centre: round(&self.centre), directions: round(&self.directions) }
    }
}

impl CutPlan {
    /// The plan as it comes back from a file.
    pub fn as_stored(&self) -> Self {
        let round = |vector: &mut Vec<f32>| {
            if !vector.is_empty() {
                let (n, ty) = (vector.len(), stored_type(vector.len()));
                *vector = restored(n, ty, &stored(n, ty, vector));
            }
        };
        let round_side = |side: &mut CutSide| {
            round(&mut side.centre);
            round(&mut side.weight);
        };
        let mut plan = self.clone();
        for cut in plan.layers.iter_mut().flatten() {
            round(&mut cut.depth.weight);
            round_side(&mut cut.inputs);
            round_side(&mut cut.inner);
            round(&mut cut.gate);
        }
        plan
    }
}

/// A number of a point: the end of its key, and where it is.
type PointField = (&'static str, fn(&mut Point) -> &mut f32);

const POINT_FIELDS: [PointField; 6] = [
    ("ratio", |p| &mut p.ratio),
    ("blocks", |p| &mut p.blocks),
    ("bytes", |p| &mut p.bytes),
    ("perplexity", |p| &mut p.perplexity),
    ("kl", |p| &mut p.kl),
    ("same_top1", |p| &mut p.same_top1),
];

/// What a number may be, in words and as a test.
type Range = (&'static str, fn(f32) -> bool);
const COSINE: Range = ("a cosine, -1 to 1", |v| (-1.0..=1.0).contains(&v));
const INFLUENCE: Range = ("0 to 2", |v| (0.0..=2.0).contains(&v));
const SHARE: Range = ("a share, 0 to 1", |v| (0.0..=1.0).contains(&v));
const FINITE: Range = ("a finite number", f32::is_finite);
const POSITIVE: Range = ("a number from 0 on", |v| v >= 0.0 && v.is_finite());

fn check_kind(metadata: &Metadata, facts: &ModelFacts, fingerprint: &str) -> Result<()> {
    let kind = metadata.str("general.architecture")?;
    if kind != "skip" {
        return Err(CalibrationError::NotOne { found: kind.to_owned() });
    }
    let found = metadata.u32("skip.version")?;
    if found != VERSION {
        return Err(CalibrationError::Version { found });
    }
    let other = |key, found: &str, expected: &str| {
        Err(CalibrationError::OtherModel { key, found: found.to_owned(), expected: expected.to_owned() })
    };
    let shapes = [
        ("skip.model.layers", facts.layers),
        ("skip.model.embedding", facts.embedding),
        ("skip.model.ffn", facts.ffn),
    ];
    for (key, expected) in shapes {
        let found = metadata.usize(key)?;
        if found != expected {
            return other(key, &found.to_string(), &expected.to_string());
        }
    }
    let found = metadata.str("skip.model.fingerprint")?;
    if found != fingerprint { other("skip.model.fingerprint", found, fingerprint) } else { Ok(()) }
}

/// Checked lookups.
struct Reader<'a> {
    file: &'a Gguf,
    bytes: &'a [u8],
    metadata: &'a Metadata,
}

impl Reader<'_> {
    /// The array at `key`, of `expected` entries in `range`.
    fn numbers(&self, key: &str, expected: usize, range: &Range) -> Result<Vec<f32>> {
        let values = self.metadata.array_f32(key)?;
        if values.len() != expected {
            return Err(CalibrationError::Length { key: key.into(), found: values.len(), expected });
        }
        match values.iter().position(|&v| !range.1(v)) {
            Some(index) => {
                let (key, found, expected) = (key.to_owned(), values[index], range.0);
                Err(CalibrationError::Value { key, index, found, expected })
            }
            None => Ok(values.to_vec()),
        }
    }

    /// The curve whose keys begin with `prefix`.
    fn curve(&self, prefix: &str, strength: &Range) -> Result<Curve> {
        let key = format!("{prefix}.ratio");
        let n = self.metadata.array_f32(&key)?.len().min(MAX_ENTRIES);
        let ratios = self.numbers(&key, n, &SHARE)?;
        if let Some(i) = ratios.windows(2).position(|pair| pair[0] > pair[1]) {
            let (index, found, expected) = (i + 1, ratios[i + 1], "no less than the entry before");
            return Err(CalibrationError::Value { key, index, found, expected });
        }
        let strengths = self.numbers(&format!("{prefix}.strength"), n, strength)?;
        Ok(Curve { ratios, strengths })
    }

    fn cut(&self, facts: &ModelFacts) -> Result<Option<CutCalibration>> {
        let key = "skip.cut.layer";
        let Some(cuttable) = self.metadata.opt_array_bool(key)? else { return Ok(None) };
        if cuttable.len() != facts.layers {
            let (found, expected) = (cuttable.len(), facts.layers);
            return Err(CalibrationError::Length { key: key.into(), found, expected });
        }
        let mut layers: Vec<_> = cuttable.iter().map(|&c| c.then(LayerCut::default)).collect();
        let key = "skip.cut.depth";
        if self.metadata.opt_array_f32(key)?.is_some() {
            for (cut, bias) in layers.iter_mut().zip(self.numbers(key, facts.layers, &FINITE)?) {
                cut.iter_mut().for_each(|cut| cut.depth.bias = bias);
            }
        }
        for (name, n, range, of) in file_sides(facts) {
            let Some(values) = self.tensor(name, n, facts.layers, range)? else { continue };
            for (cut, values) in layers.iter_mut().zip(values.chunks_exact(n)) {
                cut.iter_mut().for_each(|cut| *of(cut) = values.to_vec());
            }
        }
        let curve = self.curve("skip.cut", &POSITIVE)?;
        let neurons = match self.metadata.opt_array_f32("skip.neurons.ratio")? {
            Some(_) => self.curve("skip.neurons", &POSITIVE)?,
            None => Curve::default(),
        };
        let key = "skip.cut.coarse";
        let coarse = self.metadata.opt_f32(key)?.unwrap_or(0.0);
        if !POSITIVE.1(coarse) {
            let (key, found, expected) = (key.into(), coarse, POSITIVE.0);
            return Err(CalibrationError::Value { key, index: 0, found, expected });
        }
        Ok(Some(CutCalibration { plan: CutPlan { coarse, layers }, curve, neurons }))
    }

    /// The tensor `name`, `[rows, n]`, if there is one.
    fn tensor(&self, name: &str, n: usize, rows: usize, range: &Range) -> Result<Option<Vec<f32>>> {
        let ty = stored_type(n);
        let Some(bytes) = self.tensor_bytes(name, ty, [n, rows])? else { return Ok(None) };
        let values = restored(n, ty, bytes);
        match values.iter().position(|&v| !range.1(v)) {
            Some(index) => {
                let (key, found, expected) = (name.to_owned(), values[index], range.0);
                Err(CalibrationError::Value { key, index, found, expected })
            }
            None => Ok(Some(values)),
        }
    }

    /// The bytes of the tensor `name`, if there is one.
    fn tensor_bytes(&self, name: &str, ty: GgmlType, [n, rows]: [usize; 2]) -> Result<Option<&[u8]>> {
        let Some(info) = self.file.tensor(name) else { return Ok(None) };
        let expected = [n as u64, rows as u64];
        if info.ty != ty || info.shape != expected {
            let (tensor, found) = (name.to_owned(), format!("{} {:?}", info.ty, info.shape));
            return Err(CalibrationError::Tensor { tensor, found, ty, expected });
        }
        // The reader has checked that the extent lies inside the file.
        Ok(Some(&self.bytes[info.offset as usize..][..info.n_bytes as usize]))
    }

    fn stand_ins(&self, facts: &ModelFacts) -> Result<Option<StandInCalibration>> {
        let Some(rank) = self.metadata.opt_usize("skip.stand_in.rank")? else { return Ok(None) };
        let (n, layers) = (facts.embedding, facts.layers);
        let block = matrix_type(rank).block_len();
        if rank == 0 || rank > n || !rank.is_multiple_of(block) {
            let expected = format!("1 to {n}, the embedding");
            return Err(CalibrationError::Number { key: "skip.stand_in.rank", found: rank, expected });
        }
        let bias = self.numbers("skip.stand_in.bias", layers, &FINITE)?;
        let missing = |tensor: &str, ty, expected: [usize; 2]| {
            let expected = expected.map(|n| n as u64);
            CalibrationError::Tensor { tensor: tensor.into(), found: "missing".into(), ty, expected }
        };
        let vectors = |name| {
            let values = self.tensor(name, n, layers, &FINITE)?;
            values.ok_or_else(|| missing(name, stored_type(n), [n, layers]))
        };
        let matrices = |name, shape: [usize; 2]| {
            let ty = matrix_type(shape[0]);
            self.tensor_bytes(name, ty, shape)?.ok_or_else(|| missing(name, ty, shape))
        };
        let (probe, base) = (vectors(PROBE)?, vectors(BASE)?);
        let narrow = matrices(NARROW, [n, rank * layers])?;
        let wide = matrices(WIDE, [rank, n * layers])?;
        let vectors = probe.chunks_exact(n).zip(base.chunks_exact(n)).zip(bias);
        let sizes = (StandIn::narrow_bytes(n, rank), StandIn::wide_bytes(n, rank));
        let matrices = narrow.chunks_exact(sizes.0).zip(wide.chunks_exact(sizes.1));
        let made = vectors.zip(matrices).map(|(((probe, base), bias), (narrow, wide))| {
            StandIn::from_bytes((probe, bias, base), rank, narrow, wide)
        });
        let layers = made.enumerate().map(|(index, made)| {
            let key = format!("{NARROW} or {WIDE}");
            made.ok_or(CalibrationError::Value { key, index, found: f32::NAN, expected: FINITE.0 })
        });
        let layers = layers.collect::<Result<_>>()?;
        Ok(Some(StandInCalibration { layers, curve: self.curve("skip.stand_in", &FINITE)? }))
    }

    fn mixed(&self) -> Result<Option<MixedCalibration>> {
        let key = "skip.mixed.offset";
        match self.metadata.opt_f32(key)? {
            Some(offset) if offset.is_finite() => {
                Ok(Some(MixedCalibration { offset, curve: self.curve("skip.mixed", &POSITIVE)? }))
            }
            Some(found) => {
                Err(CalibrationError::Value { key: key.into(), index: 0, found, expected: FINITE.0 })
            }
            None => Ok(None),
        }
    }

    fn output(&self, facts: &ModelFacts) -> Result<Option<OutputCalibration>> {
        let (n, rows) = (facts.embedding, OutputCalibration::DIRECTIONS);
        let Some(centre) = self.tensor(CENTRE, n, 1, &FINITE)? else { return Ok(None) };
        let directions = self.tensor(DIRECTIONS, n, rows, &FINITE)?.ok_or_else(|| {
            let (tensor, found, expected) = (DIRECTIONS.into(), "missing".into(), [n as u64, rows as u64]);
            CalibrationError::Tensor { tensor, found, ty: stored_type(n), expected }
        })?;
        Ok(Some(OutputCalibration { centre, directions }))
    }

    fn points(&self) -> Result<Vec<Point>> {
        let policies = self.metadata.array_str("skip.point.policy")?;
        let n = policies.len();
        if n > MAX_ENTRIES {
            let key = "skip.point.policy".to_owned();
            return Err(CalibrationError::Length { key, found: n, expected: MAX_ENTRIES });
        }
        let name = |i| String::from_utf8_lossy(policies.get(i).unwrap_or_default()).into_owned();
        let point = |i| Point { policy: name(i), ..Point::default() };
        let mut points: Vec<Point> = (0..n).map(point).collect();
        for (name, of) in POINT_FIELDS {
            let range = if matches!(name, "perplexity" | "kl") { &POSITIVE } else { &SHARE };
            let values = self.numbers(&format!("skip.point.{name}"), n, range)?;
            points.iter_mut().zip(values).for_each(|(point, value)| *of(point) = value);
        }
        Ok(points)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_chooses_among_the_deepest_good_setting_of_each_policy() {
        let point = |policy: &str, bytes, kl| Point {
            policy: policy.into(),
            ratio: bytes,
            bytes,
            perplexity: 1.01,
            kl,
            ..Point::default()
        };
        let points = vec![
            point("neurons", 0.1, 0.01),
            point("cut", 0.3, 0.03),
            point("neurons", 0.2, 0.03),
            point("neurons", 0.25, 0.05),
            point("cut", 0.2, 0.01),
            point("static", 0.1, 0.5),
        ];
        let found = Calibration { points, auto: Some(1), ..Calibration::default() };
        let shares = |found: &Calibration| -> Vec<(String, f32)> {
            found.auto_candidates().iter().map(|p| (p.policy.clone(), p.ratio)).collect()
        };
        assert_eq!(shares(&found), [("cut".into(), 0.3), ("neurons".into(), 0.2)]);
        let mut newer = found.clone();
        newer.points.extend([point("neurons+output", 0.19, 0.03), point("output", 0.0, 0.001)]);
        assert_eq!(shares(&newer)[1..], [("neurons+output".into(), 0.19), ("output".into(), 0.0)]);
        assert!(Calibration { auto: None, ..found }.auto_candidates().is_empty());
    }

    #[test]
    fn curves_interpolate_and_end() {
        let curve = Curve { ratios: vec![0.1, 0.2, 0.2, 0.4], strengths: vec![5.0, 4.0, 3.0, 1.0] };
        assert_eq!(curve.strength(0.05), Some(5.0));
        assert!((curve.strength(0.15).unwrap() - 4.5).abs() < 1e-5);
        assert_eq!(curve.strength(0.2), Some(4.0));
        assert!((curve.strength(0.3).unwrap() - 2.0).abs() < 1e-5);
        assert_eq!((curve.strength(0.41), curve.most()), (None, 0.4));
        assert_eq!(Curve::default().strength(0.1), None);
    }
}
