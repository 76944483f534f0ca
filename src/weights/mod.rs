//! Mapped files and the tensors in them: the weights stay where they are, in the page cache.
//!
//! [`Weights::open`] maps every file of a model and checks their headers; [`Weights::tensor`] hands
//! out a [`Tensor`] once its shape is the expected one. A tensor keeps its file mapped. [`Weights::bring_in`] waits
//! until the bytes are in memory: those of the page cache, or, if asked to, copies in huge pages of our own.
//!
//! A mapped file must not be truncated or rewritten while it is in use: the kernel then ends the
//! process (SIGBUS), as with every program that maps its model.

mod error;
mod lock;
mod numa;
mod residency;

use std::fs::File;
use std::io;
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use sha2::{Digest, Sha256};

use crate::gguf::{GgmlType, Gguf, Metadata, ShardSet, TensorInfo};
use crate::memory::Pages;
use crate::quant::Matrix;
use crate::topology::Memory;
pub use error::WeightsError;
pub use lock::locked;
pub use numa::interleave;
use residency::Done;

/// Places of a file's data that its fingerprint covers, evenly spread, and bytes at each: a page.
const SAMPLES: usize = 256;
const SAMPLE_BYTES: usize = 4096;

/// The files of a model.
pub struct Weights {
    shards: Vec<Shard>,
}

struct Shard {
    path: PathBuf,
    file: File,
    bytes: Arc<Bytes>,
    gguf: Gguf,
}

/// The bytes of a file.
enum Bytes {
    Mapped(Mmap),
    Owned(Pages<u8>),
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Owned(pages) => pages,
        }
    }
}

/// How weights come to memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadOptions {
    /// Read the files into memory of our own, instead of using the page cache's.
    pub no_mmap: bool,
    /// Keep the weights from being swapped or dropped.
    pub mlock: bool,
}

/// What is told of bytes that are on their way: so many are here, of so many.
pub type Progress<'a> = &'a (dyn Fn(u64, u64) + Sync);

/// A matrix of weights in a file. Cheap to clone.
#[derive(Clone)]
pub struct Tensor {
    bytes: Arc<Bytes>,
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
        &self.shards[0].bytes
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
        self.shards.iter().map(|s| s.bytes.len() as u64).sum()
    }

    /// Brings the files into memory, by several threads, and returns when they are there. Bytes that are in the page
    /// cache already cost nothing; `progress` is told of the others.
    ///
    /// With [`no_mmap`](LoadOptions::no_mmap) tensors that were handed out before keep the map.
    ///
    /// # Errors
    /// A file that cannot be read or has become shorter, memory that cannot be had or locked.
    pub fn bring_in(&mut self, options: LoadOptions, progress: Progress<'_>) -> Result<(), WeightsError> {
        let available = Memory::read().map_or(u64::MAX, |memory| memory.available);
        let bytes = self.file_bytes();
        if options.no_mmap && bytes > available {
            return Err(WeightsError::TooLarge { path: self.path().to_owned(), bytes, available });
        }
        let parts: Vec<_> =
            self.shards.iter().map(|shard| residency::parts(&shard.bytes, options.no_mmap)).collect();
        let total = parts.iter().flatten().map(|part| part.len() as u64).sum();
        let done = Done::new(total, progress);
        for (shard, parts) in self.shards.iter_mut().zip(parts) {
            let io = |error| WeightsError::Io { path: shard.path.clone(), error };
            if options.no_mmap {
                shard.own(options.mlock, &done)?;
                continue;
            }
            residency::touch(&shard.bytes, &shard.file, &parts, &done).map_err(io)?;
            if let (Bytes::Mapped(map), true) = (&*shard.bytes, options.mlock) {
                locked(&shard.path.display().to_string(), map.len(), lock::lock(map))?;
            }
        }
        Ok(())
    }

    /// Whether the weights are used where they lie in the page cache.
    pub fn is_mapped(&self) -> bool {
        matches!(*self.shards[0].bytes, Bytes::Mapped(_))
    }

    /// A name for exactly these weights: SHA-256, in hexadecimal, of every header and of samples of the data
    /// behind it, so that it takes milliseconds whatever the size.
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        for shard in &self.shards {
            let (header, data) = shard.bytes.split_at(shard.bytes.len().min(shard.gguf.data_start as usize));
            hash.update((shard.bytes.len() as u64).to_le_bytes());
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
        Ok(Some(Tensor { bytes: shard.bytes.clone(), range, ty: info.ty, rows, cols }))
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
        let bytes = map(&file).map_err(io)?;
        let gguf = Gguf::parse(&bytes).map_err(|error| WeightsError::Gguf { path: path.clone(), error })?;
        Ok(Self { path, file, bytes: Arc::new(bytes), gguf })
    }

    /// The checked header stays valid for what is read now: it speaks of this file, whatever its path leads to, and
    /// of ranges inside its length of then, all of which is read or an error.
    fn own(&mut self, lock: bool, done: &Done<'_>) -> Result<(), WeightsError> {
        let pages = Pages::try_zeroed(self.bytes.len());
        let mut pages = pages.map_err(|error| WeightsError::Memory { path: self.path.clone(), error })?;
        interleave(&mut pages);
        let parts = residency::parts(&self.bytes, true);
        let io = |error| WeightsError::Io { path: self.path.clone(), error };
        residency::read(&self.file, &parts, &mut pages, done).map_err(io)?;
        if lock {
            locked(&self.path.display().to_string(), pages.len(), pages.lock())?;
        }
        self.bytes = Arc::new(Bytes::Owned(pages));
        Ok(())
    }
}

fn map(file: &File) -> io::Result<Bytes> {
    // SAFETY: the map is read-only and its bytes are only ever read as integers, for which every
    // bit pattern is valid. The file changing underneath is the documented limit of this module.
    let map = unsafe { Mmap::map(file) }?;
    // A huge page saves 512 page-table walks a pass (on SmolLM2 a fifth of decoding). It takes a file system with large
    // folios, and pages that are not in the page cache yet: these are brought in as huge ones and stay so.
    #[cfg(target_os = "linux")]
    let _ = map.advise(memmap2::Advice::HugePage);
    Ok(Bytes::Mapped(map))
}

impl Tensor {
    /// The weights, in place.
    pub fn matrix(&self) -> Matrix<'_> {
        Matrix::new(self.ty, self.rows, self.cols, &self.bytes[self.range.clone()])
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
