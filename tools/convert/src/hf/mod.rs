//! Hugging Face checkpoints: a directory of config.json, safetensors and tokenizer files to one GGUF file, with the
//! names, keys and values of llama.cpp's converter (its `conversion/` folder).
//!
//! Every file is hostile: sizes are limited, numbers checked, and each error names the file and the key.

mod card;
mod checkpoint;
mod config;
mod general;
mod json;
mod proto;
mod vocab;

use std::path::Path;

use skiff::gguf::{Builder, GgmlType};

use crate::ConvertError;
use crate::encode::encode;
use crate::imatrix::Imatrix;
use crate::output::GgufOutput;
use crate::progress::Progress;
use crate::quantize::{QUANTIZATION_VERSION, Report};
use crate::recipe::{ModelShape, Recipe};
use checkpoint::{Checkpoint, HfRows};
use config::HfConfig;
use json::JsonFile;

/// What to convert to.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct HfOptions<'a> {
    pub recipe: Recipe,
    pub imatrix: Option<&'a Imatrix>,
    /// `tokenizer.ggml.pre`, where it cannot be told from the tokenizer.
    pub pre: Option<&'a str>,
    pub quiet: bool,
}

/// Converts the checkpoint in the directory `dir`.
///
/// # Errors
/// A file is missing, malformed, or not of a kind that skiff runs; `out` cannot be written.
pub fn convert(dir: &Path, out: &Path, options: &HfOptions<'_>) -> Result<Report, ConvertError> {
    let config = HfConfig::read(&JsonFile::required(dir, "config.json")?)?;
    let checkpoint = Checkpoint::open(dir)?;
    let tensors = plan(&checkpoint, &config)?;
    let mut builder = Builder::new();
    // What is made here counts as no weight.
    let read = tensors.iter().filter(|t| matches!(t.data, Data::Rows(_)));
    let weights = read.map(|t| t.shape.iter().product::<u64>()).sum();
    general::write(&mut builder, dir, &config, weights)?;
    config.write(&mut builder, options.recipe.mix.file_type())?;
    vocab::write(&mut builder, dir, &config, options.pre)?;
    builder.insert("general.quantization_version", QUANTIZATION_VERSION)?;

    let model = ModelShape {
        layers: config.layers,
        heads_a_kv_head: config.heads / config.kv_heads,
        has_output: tensors.iter().any(|t| t.name == "output.weight"),
    };
    let mut recipe = options.recipe.clone();
    recipe.has_imatrix = options.imatrix.is_some();
    for t in &tensors {
        let ty = recipe.type_of(&t.name, &t.shape, model).unwrap_or(GgmlType::F32);
        builder.tensor(&t.name, ty, &t.shape)?;
    }
    write(out, builder, &tensors, options)
}

fn write(
    out: &Path,
    builder: Builder,
    tensors: &[Planned<'_>],
    options: &HfOptions<'_>,
) -> Result<Report, ConvertError> {
    let types: Vec<(GgmlType, u64)> = builder.tensors().iter().map(|t| (t.ty, t.n_bytes)).collect();
    let bytes_in = tensors.iter().map(|t| t.data.bytes()).sum();
    let mut report = Report::new(bytes_in);
    let progress = Progress::new("convert", bytes_in, options.quiet);
    let mut output = GgufOutput::create(out, builder)?;
    for (t, (ty, n_bytes)) in tensors.iter().zip(types) {
        progress.at(&t.name);
        let quantised = skiff::quant::is_quantised(ty);
        let importance = match options.imatrix.filter(|_| quantised) {
            Some(imatrix) => {
                let found = imatrix.of(&t.name, t.shape[0] as usize)?;
                if found.is_none() {
                    report.without_importance.push(t.name.clone());
                }
                found
            }
            None => None,
        };
        output.tensor(|sink| match &t.data {
            Data::Rows(rows) => encode(rows, ty, importance, &progress, |blocks| sink.write(blocks)),
            Data::Values(values) => {
                sink.write(&values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>())
            }
        })?;
        report.count(ty, t.shape.iter().product(), n_bytes);
    }
    output.finish()?;
    report.time = progress.finish();
    Ok(report)
}

/// A tensor of the output.
struct Planned<'a> {
    name: String,
    /// Contiguous dimension first.
    shape: Vec<u64>,
    data: Data<'a>,
}

enum Data<'a> {
    Rows(HfRows<'a>),
    /// f32, made here.
    Values(Vec<f32>),
}

impl Data<'_> {
    fn bytes(&self) -> u64 {
        match self {
            Self::Rows(rows) => rows.bytes(),
            Self::Values(values) => 4 * values.len() as u64,
        }
    }
}

/// Every tensor of the output, in the order of the layers; one that is not known is an error, so that nothing of a
/// model gets lost.
fn plan<'a>(checkpoint: &'a Checkpoint, config: &HfConfig) -> Result<Vec<Planned<'a>>, ConvertError> {
    let mut plan = Vec::new();
    if let Some(factors) = config.rope_factors()? {
        let shape = vec![factors.len() as u64];
        plan.push(Planned { name: "rope_freqs.weight".into(), shape, data: Data::Values(factors) });
    }
    let mut known = std::collections::HashSet::new();
    for row in config.tensors() {
        known.insert(row.hf.clone());
        let Some(rows) = checkpoint.rows(&row.hf, &row.shape, row.permute_heads)? else {
            if row.optional {
                continue;
            }
            return Err(ConvertError::Checkpoint {
                path: checkpoint.path().to_owned(),
                problem: format!("tensor {:?} is missing", row.hf),
            });
        };
        let shape = row.shape.iter().rev().map(|&n| n as u64).collect();
        plan.push(Planned { name: row.gguf, shape, data: Data::Rows(rows) });
    }
    // The frequencies of the rotary embedding follow from the config.
    let derived = |name: &str| name.ends_with(".rotary_emb.inv_freq");
    let tied = |name: &str| name == "lm_head.weight" && config.tied;
    match checkpoint.names().find(|name| !known.contains(*name) && !derived(name) && !tied(name)) {
        Some(name) => Err(ConvertError::Checkpoint {
            path: checkpoint.path().to_owned(),
            problem: format!("tensor {name:?} has no place in a {} model", config.architecture),
        }),
        None => Ok(plan),
    }
}
