//! Mapped files and the tensors in them: the weights stay where they are, in the page cache.
//!
//! [`Weights::open`] maps every file of a model and checks their headers; [`Weights::tensor`] hands
//! out a [`Tensor`] once its shape is the expected one. A tensor keeps its file mapped.
//!
//! A mapped file must not be truncated or rewritten while it is in use: the kernel then ends the
//! process (SIGBUS), as with every program that maps its model.

mod error;

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use sha2::{Digest, Sha256};

use crate::gguf::{GgmlType, Gguf, Metadata, ShardSet, TensorInfo};
use crate::quant::Matrix;
pub use error::WeightsError;

/// Places of a file's data that its fingerprint covers, evenly spread, and bytes at each: a page.
const SAMPLES: usize = 256;
const SAMPLE_BYTES: usize = 4096;

/// The files of a model.
pub struct Weights {
    shards: Vec<Shard>,
}

struct Shard {
    path: PathBuf,
    map: Arc<Mmap>,
    gguf: Gguf,
}

/// A matrix of weights in a mapped file. Cheap to clone.
#[derive(Clone)]
pub struct Tensor {
    map: Arc<Mmap>,
    range: Range<usize>,
    ty: GgmlType,
    rows: usize,
    cols: usize,
}

impl Weights {
    /// Opens the model whose first (or only) file is `path`, with all its shards.
    ///
    /// # Errors
    /// The file cannot be read or mapped, a header is malformed, or shards do not fit together.
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        let first = Shard::open(path.to_owned())?;
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default().to_owned();
        let mut shards = vec![first];
        let split = |error| WeightsError::Gguf { path: path.to_owned(), error };
        if let Some(mut set) = ShardSet::begin(&name, &shards[0].gguf).map_err(split)? {
            let missing: Vec<String> = set.missing().collect();
            for sibling in missing {
                let shard = Shard::open(path.with_file_name(&sibling))?;
                let wrong = |error| WeightsError::Gguf { path: shard.path.clone(), error };
                set.add(&sibling, &shard.gguf).map_err(wrong)?;
                shards.push(shard);
            }
            set.finish().map_err(split)?;
        }
        Ok(Self { shards })
    }

    /// The metadata of the model (of its first file).
    pub fn metadata(&self) -> &Metadata {
        &self.shards[0].gguf.metadata
    }

    /// Header of the first file.
    pub fn gguf(&self) -> &Gguf {
        &self.shards[0].gguf
    }

    /// Bytes of the first file.
    pub fn bytes(&self) -> &[u8] {
        &self.shards[0].map
    }

    /// Path of the first file.
    pub fn path(&self) -> &Path {
        &self.shards[0].path
    }

    /// Every tensor of every file, in file order.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.shards.iter().flat_map(|s| &s.gguf.tensors)
    }

    /// Every tensor with the path of the file that holds it, in file order.
    pub fn located_tensors(&self) -> impl Iterator<Item = (&Path, &TensorInfo)> {
        self.shards.iter().flat_map(|s| s.gguf.tensors.iter().map(|t| (s.path.as_path(), t)))
    }

    /// Bytes of all files.
    pub fn file_bytes(&self) -> u64 {
        self.shards.iter().map(|s| s.map.len() as u64).sum()
    }

    /// Asks the system to bring the files into memory, without waiting for it: the first token of a
    /// cold model then reads at the speed of the disk instead of page by page.
    pub fn read_ahead(&self) {
        for shard in &self.shards {
            // Advice: where it is not taken, pages come as they are touched.
            #[cfg(unix)]
            let _ = shard.map.advise(memmap2::Advice::WillNeed);
        }
    }

    /// A name for exactly these weights: SHA-256, in hexadecimal, of every header and of samples of the data
    /// behind it, so that it takes milliseconds whatever the size.
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        for shard in &self.shards {
            let (header, data) = shard.map.split_at(shard.map.len().min(shard.gguf.data_start as usize));
            hash.update((shard.map.len() as u64).to_le_bytes());
            hash.update(header);
            let step = data.len().div_ceil(SAMPLES).max(SAMPLE_BYTES);
            for sample in data.chunks(step) {
                hash.update(&sample[..sample.len().min(SAMPLE_BYTES)]);
            }
        }
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Number of files.
    pub fn files(&self) -> usize {
        self.shards.len()
    }

    /// The tensor called `name`, if there is one, which must be `rows x cols` (`ne = [cols, rows]`; a
    /// vector has one row).
    pub fn opt_tensor(&self, name: &str, rows: usize, cols: usize) -> Result<Option<Tensor>, WeightsError> {
        let found = self.shards.iter().find_map(|s| s.gguf.tensor(name).map(|t| (s, t)));
        let Some((shard, info)) = found else { return Ok(None) };
        let expected = [cols as u64, rows as u64];
        let fits = match info.shape[..] {
            [n] => rows == 1 && n == expected[0],
            [n, m, ref rest @ ..] => [n, m] == expected && rest.iter().all(|&r| r == 1),
            [] => false,
        };
        if !fits {
            return Err(WeightsError::Shape {
                tensor: name.into(),
                expected: expected.to_vec(),
                found: info.shape.clone(),
            });
        }
        // The reader has checked that the extent lies inside the file.
        let start = info.offset as usize;
        let range = start..start + info.n_bytes as usize;
        Ok(Some(Tensor { map: shard.map.clone(), range, ty: info.ty, rows, cols }))
    }

    /// The tensor called `name`, which must be there and `rows x cols`.
    pub fn tensor(&self, name: &str, rows: usize, cols: usize) -> Result<Tensor, WeightsError> {
        self.opt_tensor(name, rows, cols)?.ok_or_else(|| WeightsError::Missing { tensor: name.into() })
    }

    /// The vector called `name` of `len` elements, as f32.
    pub fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, WeightsError> {
        Ok(self.tensor(name, 1, len)?.to_f32())
    }

    /// The vector called `name`, if there is one, as f32.
    pub fn opt_vector(&self, name: &str, len: usize) -> Result<Option<Vec<f32>>, WeightsError> {
        Ok(self.opt_tensor(name, 1, len)?.map(|t| t.to_f32()))
    }

    /// Shape of the tensor called `name`, `ne[0]` first.
    pub fn shape(&self, name: &str) -> Option<&[u64]> {
        self.shards.iter().find_map(|s| s.gguf.tensor(name)).map(|t| &t.shape[..])
    }
}

impl Shard {
    fn open(path: PathBuf) -> Result<Self, WeightsError> {
        let io = |error| WeightsError::Io { path: path.clone(), error };
        let file = File::open(&path).map_err(io)?;
        let meta = file.metadata().map_err(io)?;
        if !meta.is_file() {
            return Err(WeightsError::NotAFile { path });
        }
        // SAFETY: the map is read-only and its bytes are only ever read as integers, for which every
        // bit pattern is valid. The file changing underneath is the documented limit of this module.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        let gguf = Gguf::parse(&map).map_err(|error| WeightsError::Gguf { path: path.clone(), error })?;
        Ok(Self { path, map: Arc::new(map), gguf })
    }
}

impl Tensor {
    /// The weights, in place.
    pub fn matrix(&self) -> Matrix<'_> {
        Matrix::new(self.ty, self.rows, self.cols, &self.map[self.range.clone()])
            .expect("the reader has checked shape and extent")
    }

    /// Element type.
    pub fn ty(&self) -> GgmlType {
        self.ty
    }

    /// Number of rows (outputs).
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns (inputs).
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes of weights.
    pub fn bytes(&self) -> usize {
        self.range.len()
    }

    fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.cols];
        let matrix = self.matrix();
        for (r, out) in out.chunks_exact_mut(self.cols.max(1)).enumerate() {
            matrix.dequantize_row(r, out);
        }
        out
    }
}
