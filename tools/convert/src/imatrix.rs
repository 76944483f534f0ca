//! Importance matrices: how large, in the mean of squares, each input of each matrix is on a text. The error of a
//! weight matters as much as what it is multiplied with.
//!
//! The file is llama.cpp's: GGUF of `general.type = imatrix` with two tensors for each matrix, `NAME.in_sum2` (sums of
//! squares) and `NAME.counts` (tokens that were summed). The older format (`.dat`) is read too.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use skiff::gguf::{Builder, GgmlType, Gguf, StringArray};
use skiff::model::{FfnStep, KvType, Matrices, Probe, State};
use skiff::ops::Inputs;
use skiff::session::Engine;
use skiff::skip::Never;
use skiff::tokenizer::EncodeOptions;

use crate::ConvertError;
use crate::output::GgufOutput;
use crate::progress::Progress;

const SUMS: &str = ".in_sum2";
const COUNTS: &str = ".counts";

/// The importances of a model's matrices.
#[derive(Clone, Debug, Default)]
pub struct Imatrix {
    path: PathBuf,
    /// By tensor: the mean square of each column.
    means: BTreeMap<String, Vec<f32>>,
    /// The texts that it was computed on.
    pub datasets: Vec<String>,
    /// Windows that it was computed on.
    pub chunk_count: u32,
}

impl Imatrix {
    /// Reads the file at `path`, in either format.
    ///
    /// # Errors
    /// The file cannot be read or is no importance matrix.
    pub fn read(path: &Path) -> Result<Self, ConvertError> {
        let bytes = std::fs::read(path).map_err(ConvertError::io(path))?;
        let read =
            if bytes.starts_with(b"GGUF") { Self::from_gguf(&bytes) } else { Self::from_legacy(&bytes) };
        let mut imatrix =
            read.map_err(|problem| ConvertError::NotAnImatrix { path: path.to_owned(), problem })?;
        imatrix.path = path.to_owned();
        Ok(imatrix)
    }

    /// The name of the file that it came from.
    pub fn file_name(&self) -> String {
        self.path.display().to_string()
    }

    /// The number of matrices.
    pub fn entries(&self) -> usize {
        self.means.len()
    }

    /// The mean square of each input of the matrix `tensor`, if it was observed.
    ///
    /// # Errors
    /// The matrix has another number of columns.
    pub fn of(&self, tensor: &str, columns: usize) -> Result<Option<&[f32]>, ConvertError> {
        match self.means.get(tensor) {
            Some(means) if means.len() != columns => {
                let (tensor, expected, found) = (tensor.to_owned(), columns, means.len());
                Err(ConvertError::ForeignImatrix { tensor, expected, found })
            }
            found => Ok(found.map(Vec::as_slice)),
        }
    }

    fn from_gguf(bytes: &[u8]) -> Result<Self, String> {
        let gguf = Gguf::parse(bytes).map_err(|e| e.to_string())?;
        let meta = &gguf.metadata;
        if meta.opt_str("general.type").ok().flatten() != Some("imatrix") {
            return Err("general.type is not \"imatrix\"".into());
        }
        let values = |name: &str| -> Result<Vec<f32>, String> {
            let t = gguf.tensor(name).ok_or_else(|| format!("tensor {name:?} is missing"))?;
            if t.ty != GgmlType::F32 {
                return Err(format!("tensor {name:?} is of type {} (expected F32)", t.ty));
            }
            // The parser has checked the extent.
            let data = &bytes[t.offset as usize..][..t.n_bytes as usize];
            Ok(data.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
        };
        let mut means = BTreeMap::new();
        for name in gguf.tensors.iter().filter_map(|t| t.name.strip_suffix(SUMS)) {
            let (sums, counts) = (values(&format!("{name}{SUMS}"))?, values(&format!("{name}{COUNTS}"))?);
            let &[count] = counts.as_slice() else {
                return Err(format!("tensor {name:?} has {} experts: not supported", counts.len()));
            };
            means.insert(name.to_owned(), mean(&sums, count));
        }
        let datasets = meta.opt_array_str("imatrix.datasets").map_err(|e| e.to_string())?;
        let datasets = datasets.map_or(Vec::new(), |all| {
            all.iter().map(|name| String::from_utf8_lossy(name).into_owned()).collect()
        });
        let chunk_count = meta.opt_u32("imatrix.chunk_count").map_err(|e| e.to_string())?.unwrap_or(0);
        Self { path: PathBuf::new(), means, datasets, chunk_count }.checked()
    }

    /// The format before GGUF: counts, names and values one after the other.
    fn from_legacy(bytes: &[u8]) -> Result<Self, String> {
        let mut rest = bytes;
        let mut means = BTreeMap::new();
        for _ in 0..take_count(&mut rest)? {
            let length = take_count(&mut rest)?;
            let name = take(&mut rest, length)?;
            let name = std::str::from_utf8(name).map_err(|_| "a name is not UTF-8".to_owned())?;
            let calls = take_count(&mut rest)?;
            let n = take_count(&mut rest)?.checked_mul(4).ok_or("a length overflows")?;
            let values = take(&mut rest, n)?;
            let sums: Vec<f32> = values.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            means.insert(name.to_owned(), mean(&sums, calls.max(1) as f32));
        }
        // Later versions add the number of windows and the name of the text.
        let mut imatrix = Self { means, ..Self::default() };
        if let Ok(chunks) = take_count(&mut rest) {
            imatrix.chunk_count = chunks as u32; // came from 32 bits
            let name = take_count(&mut rest).and_then(|n| take(&mut rest, n)).unwrap_or_default();
            imatrix.datasets = vec![String::from_utf8_lossy(name).into_owned()];
        }
        imatrix.checked()
    }

    /// Refuses values that no sum of squares has.
    fn checked(self) -> Result<Self, String> {
        let bad = self.means.iter().find(|(_, means)| means.iter().any(|m| !m.is_finite() || *m < 0.0));
        match bad {
            Some((name, _)) => Err(format!("tensor {name:?} has values that are negative or not finite")),
            None if self.means.is_empty() => Err("it has no entries".into()),
            None => Ok(self),
        }
    }
}

fn take<'a>(rest: &mut &'a [u8], n: usize) -> Result<&'a [u8], String> {
    let (taken, left) = rest
        .split_at_checked(n)
        .ok_or_else(|| format!("the file ends: {n} bytes needed, {} remain", rest.len()))?;
    *rest = left;
    Ok(taken)
}

fn take_count(rest: &mut &[u8]) -> Result<usize, String> {
    let bytes = take(rest, 4)?;
    let n = i32::from_le_bytes(std::array::from_fn(|i| bytes[i]));
    usize::try_from(n).map_err(|_| format!("a count is {n}"))
}

/// A matrix that saw nothing has no preference.
fn mean(sums: &[f32], count: f32) -> Vec<f32> {
    sums.iter().map(|sum| if count > 0.0 { sum / count } else { 1.0 }).collect()
}

/// What to compute an importance matrix from.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct ComputeOptions<'a> {
    pub model: &'a Path,
    pub text: &'a Path,
    /// Tokens of a window; each starts from nothing.
    pub window: usize,
    /// Windows at most.
    pub chunks: Option<usize>,
    pub threads: Option<usize>,
    pub quiet: bool,
}

/// Runs the model over a text and writes its importance matrix to `out`; returns windows and matrices.
///
/// # Errors
/// The model cannot be run, the text is shorter than a window, or `out` cannot be written.
pub fn compute(options: &ComputeOptions<'_>, out: &Path) -> Result<(usize, usize), ConvertError> {
    let bytes = std::fs::read(options.text).map_err(ConvertError::io(options.text))?;
    let text = String::from_utf8_lossy(&bytes);
    let engine = Engine::load(options.model, options.threads, None)?;
    let tokens =
        engine.tokenizer().encode(&text, EncodeOptions { add_special: true, parse_special: false })?;
    let chunks = (tokens.len() / options.window).min(options.chunks.unwrap_or(usize::MAX));
    if chunks == 0 {
        let (path, tokens, window) = (options.text.to_owned(), tokens.len(), options.window);
        return Err(ConvertError::TextTooShort { path, tokens, window });
    }
    // As llama.cpp does: every window begins as a text would.
    let plain = engine.tokenizer().encode("", EncodeOptions { add_special: true, parse_special: false })?;
    let first = plain.first().copied();

    let sums = Arc::new(Mutex::new(Sums::default()));
    let mut state = State::new(
        engine.model(),
        engine.team(),
        (options.window, options.window.min(512)),
        KvType::F16,
        Box::new(Never),
    );
    state.set_probe(Some(Box::new(sums.clone())));
    let progress = Progress::counting("imatrix", "tokens", (chunks * options.window) as u64, options.quiet);
    for window in tokens.chunks_exact(options.window).take(chunks) {
        let mut window = window.to_vec();
        window[0] = first.unwrap_or(window[0]);
        state.truncate(0);
        for step in window.chunks(state.batch()) {
            engine.model().forward(engine.compute(), &mut state, step, FfnStep::Full)?;
            progress.add(step.len() as u64)?;
        }
    }
    let sums = sums.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    write(&sums, options, chunks, out)?;
    Ok((chunks, sums.entries().count()))
}

/// Sums of squares by layer and matrices, and tokens.
#[derive(Default)]
struct Sums(BTreeMap<(usize, Matrices), (Vec<f64>, u64)>);

impl Sums {
    /// Tensor names with their sums and tokens.
    fn entries(&self) -> impl Iterator<Item = (String, &[f64], u64)> {
        self.0.iter().flat_map(|((layer, matrices), (sums, tokens))| {
            matrices.names().iter().map(move |name| (format!("blk.{layer}.{name}"), sums.as_slice(), *tokens))
        })
    }
}

impl Probe for Sums {
    fn matmul(&mut self, layer: usize, matrices: Matrices, x: &Inputs) {
        let entry = self.0.entry((layer, matrices)).or_insert_with(|| (vec![0.0; x.cols()], 0));
        for row in x.values().chunks_exact(x.cols()) {
            for (sum, &x) in entry.0.iter_mut().zip(row) {
                *sum += f64::from(x) * f64::from(x);
            }
            entry.1 += 1;
        }
    }
}

fn write(sums: &Sums, options: &ComputeOptions<'_>, chunks: usize, out: &Path) -> Result<(), ConvertError> {
    let mut builder = Builder::new();
    builder.insert("general.type", "imatrix")?;
    let dataset: StringArray = [options.text.display().to_string()].iter().collect();
    builder.insert("imatrix.datasets", dataset)?;
    builder.insert("imatrix.chunk_count", chunks as u32)?;
    builder.insert("imatrix.chunk_size", options.window as u32)?;
    let mut entries: Vec<_> = sums.entries().collect();
    entries.sort_by(|a, b| a.0.cmp(&b.0));
    for (name, sums, _) in &entries {
        builder.tensor(format!("{name}{SUMS}"), GgmlType::F32, &[sums.len() as u64, 1])?;
        builder.tensor(format!("{name}{COUNTS}"), GgmlType::F32, &[1, 1])?;
    }
    let mut output = GgufOutput::create(out, builder)?;
    for (_, sums, tokens) in entries {
        let bytes: Vec<u8> = sums.iter().flat_map(|&sum| (sum as f32).to_le_bytes()).collect();
        output.tensor(|sink| sink.write(&bytes))?;
        output.tensor(|sink| sink.write(&(tokens as f32).to_le_bytes()))?;
    }
    output.finish()
}
