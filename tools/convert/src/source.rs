//! Tensors of a GGUF model, read piece by piece: a mapped file would count as memory in use.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use skiff::gguf::{GgmlType, Metadata, TensorInfo};
use skiff::quant;
use skiff::weights::Weights;

use crate::ConvertError;
use crate::encode::Rows;

/// A file that several threads read at positions of their own.
pub(crate) struct SharedFile {
    path: PathBuf,
    file: Mutex<File>,
    len: u64,
}

impl SharedFile {
    pub(crate) fn open(path: &Path) -> Result<Self, ConvertError> {
        let io = ConvertError::io(path);
        let file = File::open(path).map_err(&io)?;
        let len = file.metadata().map_err(&io)?.len();
        Ok(Self { path: path.to_owned(), file: Mutex::new(file), len })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    pub(crate) fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), ConvertError> {
        let mut file = self.file.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let read = file.seek(SeekFrom::Start(offset)).and_then(|_| file.read_exact(out));
        read.map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => ConvertError::Io {
                path: self.path.clone(),
                error: io::Error::new(
                    error.kind(),
                    format!("it ended while {} bytes at {offset} were read", out.len()),
                ),
            },
            _ => ConvertError::io(&self.path)(error),
        })
    }
}

/// A GGUF model whose tensors are read one after the other.
pub struct Source {
    metadata: Metadata,
    tensors: Vec<SourceTensor>,
    paths: Vec<PathBuf>,
    files: usize,
}

/// A tensor of a file.
pub struct SourceTensor {
    /// What the header says of it.
    pub info: TensorInfo,
    file: Arc<SharedFile>,
}

impl Source {
    /// Opens the model whose first (or only) file is `path`, with all its shards.
    ///
    /// # Errors
    /// As [`Weights::open`].
    pub fn open(path: &Path) -> Result<Self, ConvertError> {
        let weights = Weights::open(path)?;
        let mut files: HashMap<PathBuf, Arc<SharedFile>> = HashMap::new();
        let mut tensors = Vec::new();
        let mut paths = vec![path.to_owned()];
        for (path, info) in weights.located_tensors() {
            let file = match files.get(path) {
                Some(file) => file.clone(),
                None => {
                    let file = Arc::new(SharedFile::open(path)?);
                    files.insert(path.to_owned(), file.clone());
                    paths.push(path.to_owned());
                    file
                }
            };
            tensors.push(SourceTensor { info: info.clone(), file });
        }
        Ok(Self { metadata: weights.metadata().clone(), tensors, paths, files: weights.files() })
    }

    /// The metadata of the model.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The tensors, in file order.
    pub fn tensors(&self) -> &[SourceTensor] {
        &self.tensors
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&SourceTensor> {
        self.tensors.iter().find(|t| t.info.name == name)
    }

    /// Number of files.
    pub fn files(&self) -> usize {
        self.files
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> u64 {
        self.tensors.iter().map(|t| t.info.n_bytes).sum()
    }

    /// Refuses to write over the files that are read.
    ///
    /// # Errors
    /// [`ConvertError::OutputIsInput`]
    pub fn check_output(&self, out: &Path) -> Result<(), ConvertError> {
        let same =
            |path: &PathBuf| matches!((path.canonicalize(), out.canonicalize()), (Ok(a), Ok(b)) if a == b);
        match self.paths.iter().any(same) {
            true => Err(ConvertError::OutputIsInput { path: out.to_owned() }),
            false => Ok(()),
        }
    }
}

impl SourceTensor {
    /// Reads bytes of the data, `range` counted from their start.
    ///
    /// # Errors
    /// The file cannot be read, or has become shorter.
    pub fn read_bytes(&self, range: Range<u64>, out: &mut [u8]) -> Result<(), ConvertError> {
        debug_assert!(range.end <= self.info.n_bytes);
        self.file.read(self.info.offset + range.start, out)
    }

    /// Hands all bytes to `sink`, a few megabytes at a time.
    ///
    /// # Errors
    /// Those of reading and of `sink`.
    pub fn copy(&self, mut sink: impl FnMut(&[u8]) -> Result<(), ConvertError>) -> Result<(), ConvertError> {
        const PIECE: u64 = 4 << 20;
        let mut buffer = vec![0; PIECE.min(self.info.n_bytes) as usize];
        for start in (0..self.info.n_bytes).step_by(PIECE as usize) {
            let end = (start + PIECE).min(self.info.n_bytes);
            let piece = &mut buffer[..(end - start) as usize];
            self.read_bytes(start..end, piece)?;
            sink(piece)?;
        }
        Ok(())
    }

    fn ty(&self) -> GgmlType {
        self.info.ty
    }
}

impl Rows for SourceTensor {
    fn shape(&self) -> (usize, usize) {
        // The reader has checked the product, and that the file is as long.
        let cols = self.info.shape[0] as usize;
        (self.info.n_elements() as usize / cols, cols)
    }

    fn row_bytes(&self) -> usize {
        self.ty().row_bytes(self.shape().1)
    }

    fn read(&self, rows: Range<usize>, out: &mut [f32]) -> Result<(), ConvertError> {
        let n = self.row_bytes() as u64;
        let mut bytes = vec![0; out.len() / self.ty().block_len() * self.ty().block_bytes()];
        self.read_bytes(rows.start as u64 * n..rows.end as u64 * n, &mut bytes)?;
        quant::dequantize_row(self.ty(), &bytes, out);
        Ok(())
    }
}
