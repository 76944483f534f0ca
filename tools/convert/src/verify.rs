//! `verify`: is a file what it says? Structure and extents are checked by the reader; here every value is read.

use std::path::Path;

use rayon::prelude::*;
use sha2::{Digest, Sha256};
use skiff::gguf::GgmlType;
use skiff::quant;

use crate::ConvertError;
use crate::encode::Rows;
use crate::progress::Progress;
use crate::source::{Source, SourceTensor};

/// What was found in a tensor.
#[derive(Clone, Debug)]
pub struct TensorReport {
    /// Its name.
    pub name: String,
    /// Its type.
    pub ty: GgmlType,
    /// SHA-256 of its data, in hexadecimal digits.
    pub sha256: String,
    /// Weights that are NaN or infinite: of a block with such a scale, all of them.
    pub not_finite: u64,
    /// The first of them: row and column.
    pub first: Option<(usize, usize)>,
}

/// What was found in a model.
#[derive(Clone, Debug)]
pub struct ModelReport {
    /// Number of files.
    pub files: usize,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// In file order.
    pub tensors: Vec<TensorReport>,
}

impl ModelReport {
    /// The tensors with values that are not finite.
    pub fn bad(&self) -> impl Iterator<Item = &TensorReport> {
        self.tensors.iter().filter(|t| t.not_finite > 0)
    }
}

/// Reads every value of the model whose first file is `input`.
///
/// # Errors
/// A file cannot be read or is malformed. Values that are not finite are no error here but part of the report.
pub fn verify(input: &Path, quiet: bool) -> Result<ModelReport, ConvertError> {
    let source = Source::open(input)?;
    let progress = Progress::new("verify", source.bytes(), quiet);
    let mut tensors = Vec::new();
    for tensor in source.tensors() {
        progress.at(&tensor.info.name);
        tensors.push(check(tensor, &progress)?);
    }
    Ok(ModelReport { files: source.files(), bytes: source.bytes(), tensors })
}

/// Bytes that are read, hashed and decoded at a time.
const PIECE: usize = 16 << 20;
/// Bytes that a thread decodes at a time.
const SHARE: usize = 256 << 10;

fn check(tensor: &SourceTensor, progress: &Progress) -> Result<TensorReport, ConvertError> {
    let info = &tensor.info;
    let (block, len) = (info.ty.block_bytes(), info.ty.block_len());
    let whole = |n: usize| n / block * block;
    let mut hash = Sha256::new();
    let (mut not_finite, mut first) = (0, None);
    let mut buffer = vec![0; whole(PIECE).min(info.n_bytes as usize)];
    for start in (0..info.n_bytes).step_by(whole(PIECE)) {
        let n = (info.n_bytes - start).min(buffer.len() as u64) as usize;
        let bytes = &mut buffer[..n];
        tensor.read_bytes(start..start + n as u64, bytes)?;
        let bytes = &*bytes;
        let (_, found) = rayon::join(
            || hash.update(bytes),
            || {
                let shares = bytes.par_chunks(whole(SHARE)).enumerate();
                let bad = shares
                    .map(|(i, share)| not_finite_in(info.ty, share).offset(i * whole(SHARE) / block * len));
                bad.reduce(Bad::default, Bad::and)
            },
        );
        not_finite += found.count;
        let at = found.first.map(|at| start as usize / block * len + at);
        first = first.or(at.map(|at| (at / tensor.shape().1, at % tensor.shape().1)));
        progress.add(n as u64)?;
    }
    let sha256 = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(TensorReport { name: info.name.clone(), ty: info.ty, sha256, not_finite, first })
}

/// Values that are not finite: how many, and which is the first.
#[derive(Clone, Copy, Default)]
struct Bad {
    count: u64,
    first: Option<usize>,
}

impl Bad {
    fn offset(self, by: usize) -> Self {
        Self { first: self.first.map(|at| at + by), ..self }
    }

    fn and(self, other: Self) -> Self {
        let first = match (self.first, other.first) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        Self { count: self.count + other.count, first }
    }
}

fn not_finite_in(ty: GgmlType, bytes: &[u8]) -> Bad {
    let mut values = vec![0.0; bytes.len() / ty.block_bytes() * ty.block_len()];
    quant::dequantize_row(ty, bytes, &mut values);
    let count = values.iter().filter(|v| !v.is_finite()).count() as u64;
    Bad { count, first: values.iter().position(|v| !v.is_finite()) }
}
