//! A GGUF model in other types, tensor by tensor.

use std::path::Path;
use std::time::Duration;

use skiff::gguf::{Builder, GgmlType, Metadata};

use crate::ConvertError;
use crate::encode::encode;
use crate::imatrix::Imatrix;
use crate::output::GgufOutput;
use crate::progress::Progress;
use crate::recipe::{ModelShape, Recipe};
use crate::source::Source;

/// What was done.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Report {
    /// Bytes of all tensors.
    pub bytes_in: u64,
    pub bytes_out: u64,
    pub elements: u64,
    /// Of each type in the output: tensors and bytes.
    pub types: Vec<(GgmlType, usize, u64)>,
    /// Matrices without an entry in the importance matrix that was given.
    pub without_importance: Vec<String>,
    pub time: Duration,
}

impl Report {
    /// Counts a tensor of the output.
    pub(crate) fn count(&mut self, ty: GgmlType, elements: u64, bytes: u64) {
        self.elements += elements;
        self.bytes_out += bytes;
        match self.types.iter_mut().find(|t| t.0 == ty) {
            Some(row) => (row.1, row.2) = (row.1 + 1, row.2 + bytes),
            None => self.types.push((ty, 1, bytes)),
        }
    }

    pub(crate) fn new(bytes_in: u64) -> Self {
        let (types, without_importance, time) = (Vec::new(), Vec::new(), Duration::ZERO);
        Self { bytes_in, bytes_out: 0, elements: 0, types, without_importance, time }
    }
}

/// Writes the model at `input` to `out` with the types of `recipe`.
///
/// # Errors
/// `input` cannot be read or is malformed, `imatrix` is of another model, or `out` cannot be written.
pub fn quantize(
    input: &Path,
    out: &Path,
    recipe: &Recipe,
    imatrix: Option<&Imatrix>,
    quiet: bool,
) -> Result<Report, ConvertError> {
    let source = Source::open(input)?;
    source.check_output(out)?;
    let mut recipe = recipe.clone();
    recipe.has_imatrix = imatrix.is_some();
    let model = model_shape(&source)?;
    let mut builder = Builder::with_metadata(metadata(source.metadata(), &recipe, imatrix)?);
    let mut report = Report::new(source.bytes());
    for tensor in source.tensors() {
        let info = &tensor.info;
        let ty = recipe.type_of(&info.name, &info.shape, model).unwrap_or(info.ty);
        builder.tensor(&info.name, ty, &info.shape)?;
    }
    let types: Vec<(GgmlType, u64)> = builder.tensors().iter().map(|t| (t.ty, t.n_bytes)).collect();
    let progress = Progress::new("quantize", source.bytes(), quiet);
    let mut output = GgufOutput::create(out, builder)?;
    for (tensor, (ty, n_bytes)) in source.tensors().iter().zip(types) {
        let info = &tensor.info;
        progress.at(&info.name);
        let importance = match imatrix {
            Some(imatrix) if ty != info.ty && skiff::quant::is_quantised(ty) => {
                let found = imatrix.of(&info.name, info.shape[0] as usize)?;
                if found.is_none() {
                    report.without_importance.push(info.name.clone());
                }
                found
            }
            _ => None,
        };
        output.tensor(|sink| match ty == info.ty {
            true => tensor.copy(|bytes| {
                progress.add(bytes.len() as u64)?;
                sink.write(bytes)
            }),
            false => encode(tensor, ty, importance, &progress, |blocks| sink.write(blocks)),
        })?;
        report.count(ty, info.n_elements(), n_bytes);
    }
    output.finish()?;
    report.time = progress.finish();
    Ok(report)
}

/// What the rules of mixes need to know; what a file does not say counts as the plainest model.
fn model_shape(source: &Source) -> Result<ModelShape, ConvertError> {
    let meta = source.metadata();
    let architecture = meta.opt_str("general.architecture")?.unwrap_or_default();
    let number = |key: &str| meta.opt_usize(&format!("{architecture}.{key}"));
    let heads = number("attention.head_count").unwrap_or(None).unwrap_or(1);
    let kv_heads = number("attention.head_count_kv").unwrap_or(None).unwrap_or(heads);
    Ok(ModelShape {
        layers: number("block_count")?.unwrap_or(0),
        heads_a_kv_head: heads / kv_heads.max(1),
        has_output: source.tensor("output.weight").is_some(),
    })
}

/// Keys that say what this command changes.
const OWN_KEYS: [&str; 2] = ["general.file_type", "general.quantization_version"];
/// Keys of one file of several, and of an earlier importance matrix.
const OWN_PREFIXES: [&str; 2] = ["split.", "quantize.imatrix."];

/// The version of ggml's quantised formats (`GGML_QNT_VERSION`): all of skiff's types have their present layout since 2.
pub(crate) const QUANTIZATION_VERSION: u32 = 2;

fn metadata(from: &Metadata, recipe: &Recipe, imatrix: Option<&Imatrix>) -> Result<Metadata, ConvertError> {
    let mut meta = Metadata::new();
    let kept =
        |key: &str| !OWN_KEYS.contains(&key) && !OWN_PREFIXES.iter().any(|prefix| key.starts_with(prefix));
    for (key, value) in from.iter().filter(|(key, _)| kept(key)) {
        meta.insert(key, value.clone())?;
    }
    meta.insert(OWN_KEYS[0], recipe.mix.file_type())?;
    meta.insert(OWN_KEYS[1], QUANTIZATION_VERSION)?;
    if let Some(imatrix) = imatrix {
        meta.insert("quantize.imatrix.file", imatrix.file_name())?;
        if let Some(dataset) = imatrix.datasets.first() {
            meta.insert("quantize.imatrix.dataset", dataset.as_str())?;
        }
        meta.insert("quantize.imatrix.entries_count", imatrix.entries() as u32)?;
        meta.insert("quantize.imatrix.chunks_count", imatrix.chunk_count)?;
    }
    Ok(meta)
}
