//! The weights of a checkpoint: one safetensors file, or several with an index. Only headers are held.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde_json::Value;
use skiff::gguf::GgmlType;
use skiff::quant;

use super::json::JsonFile;
use crate::ConvertError;
use crate::encode::Rows;
use crate::source::SharedFile;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The longest header that the format's own reader takes.
const MAX_HEADER: u64 = 100_000_000;

/// The tensors of a directory.
pub(super) struct Checkpoint {
    dir: PathBuf,
    files: Vec<SharedFile>,
    tensors: HashMap<String, Located>,
}

/// A tensor in a file.
struct Located {
    file: usize,
    ty: GgmlType,
    shape: Vec<usize>,
    /// Where its data start in the file.
    offset: u64,
}

impl Checkpoint {
    pub(super) fn open(dir: &Path) -> Result<Self, ConvertError> {
        let mut checkpoint = Self { dir: dir.to_owned(), files: Vec::new(), tensors: HashMap::new() };
        for name in file_names(dir)? {
            checkpoint.add(&dir.join(name))?;
        }
        Ok(checkpoint)
    }

    pub(super) fn path(&self) -> &Path {
        &self.dir
    }

    /// The names of all tensors, sorted: an error is the same each time.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        let mut names: Vec<&str> = self.tensors.keys().map(String::as_str).collect();
        names.sort_unstable();
        names.into_iter()
    }

    /// The tensor called `name`, if there is one, which must be of `shape`.
    pub(super) fn rows(
        &self,
        name: &str,
        shape: &[usize],
        permute_heads: Option<usize>,
    ) -> Result<Option<HfRows<'_>>, ConvertError> {
        let Some(located) = self.tensors.get(name) else { return Ok(None) };
        let file = &self.files[located.file];
        if located.shape != shape {
            let problem =
                format!("tensor {name:?} is of shape {:?}, by config.json it is {shape:?}", located.shape);
            return Err(ConvertError::Checkpoint { path: file.path().to_owned(), problem });
        }
        // A vector that is permuted has a row for each element.
        let (rows, cols) = match (shape, permute_heads) {
            (&[rows, cols], _) => (rows, cols),
            (&[n], Some(_)) => (n, 1),
            _ => (1, shape.iter().product()),
        };
        Ok(Some(HfRows { file, ty: located.ty, offset: located.offset, rows, cols, permute_heads }))
    }

    fn add(&mut self, path: &Path) -> Result<(), ConvertError> {
        let file = SharedFile::open(path)?;
        let wrong = |problem: String| ConvertError::Checkpoint { path: path.to_owned(), problem };
        let (header, data_start) = read_header(&file)?;
        let header: Metadata = serde_json::from_slice(&header)
            .map_err(|e| wrong(format!("malformed safetensors header: {e}")))?;
        for (name, info) in header.tensors() {
            // The crate has checked that offsets follow each other and fit the shapes.
            let end = data_start.saturating_add(info.data_offsets.1 as u64);
            if end > file.len() {
                return Err(wrong(format!(
                    "tensor {name:?} ends at {end}, the file has {} bytes",
                    file.len()
                )));
            }
            let ty = match info.dtype {
                Dtype::F32 => GgmlType::F32,
                Dtype::F16 => GgmlType::F16,
                Dtype::BF16 => GgmlType::BF16,
                other => {
                    return Err(wrong(format!("tensor {name:?} is of type {other:?}, not F32, F16 or BF16")));
                }
            };
            let offset = data_start + info.data_offsets.0 as u64;
            let located = Located { file: self.files.len(), ty, shape: info.shape.clone(), offset };
            if self.tensors.insert(name.clone(), located).is_some() {
                return Err(wrong(format!("tensor {name:?} is in two files")));
            }
        }
        self.files.push(file);
        Ok(())
    }
}

/// The header's JSON, and where data start.
fn read_header(file: &SharedFile) -> Result<(Vec<u8>, u64), ConvertError> {
    let wrong = |problem: String| ConvertError::Checkpoint { path: file.path().to_owned(), problem };
    if file.len() < 8 {
        return Err(wrong(format!("not a safetensors file: it has {} bytes", file.len())));
    }
    let mut length = [0; 8];
    file.read(0, &mut length)?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER || length > file.len() - 8 {
        return Err(wrong(format!(
            "not a safetensors file: a header of {length} bytes in a file of {}",
            file.len()
        )));
    }
    let mut header = vec![0; length as usize];
    file.read(8, &mut header)?;
    Ok((header, 8 + length))
}

fn file_names(dir: &Path) -> Result<Vec<String>, ConvertError> {
    if let Some(index) = JsonFile::optional(dir, INDEX)? {
        let map = index.get("weight_map").and_then(Value::as_object);
        let map = map.ok_or_else(|| index.wrong("weight_map", "is missing or no object"))?;
        let mut names = Vec::new();
        for (tensor, file) in map {
            // A name, not a path: the index must not lead out of the directory.
            let file =
                file.as_str().filter(|name| !name.is_empty() && !name.contains(['/', '\\']) && *name != "..");
            let file = file.ok_or_else(|| index.wrong(tensor, "is in no file of this directory"))?;
            names.push(file.to_owned());
        }
        names.sort_unstable();
        names.dedup();
        return Ok(names);
    }
    if dir.join(SINGLE).is_file() {
        return Ok(vec![SINGLE.to_owned()]);
    }
    let pickled = |name: &str| name.ends_with(".bin") || name.ends_with(".pth") || name.ends_with(".pt");
    let entries = std::fs::read_dir(dir).map_err(ConvertError::io(dir))?;
    let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    let problem = match names.into_iter().find(|name| pickled(name)) {
        Some(name) => format!(
            "{name} is a PyTorch pickle, which can run code when it is read, so skiff does not: get {SINGLE} from the \
             hub, or write it in Python with AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(DIR)"
        ),
        None => format!("there is neither {SINGLE} nor {INDEX}"),
    };
    Err(ConvertError::Checkpoint { path: dir.to_owned(), problem })
}

/// Rows of a tensor as f32, in GGUF's order.
pub(super) struct HfRows<'a> {
    file: &'a SharedFile,
    ty: GgmlType,
    offset: u64,
    rows: usize,
    cols: usize,
    permute_heads: Option<usize>,
}

impl HfRows<'_> {
    pub(super) fn bytes(&self) -> u64 {
        self.rows as u64 * self.row_bytes() as u64
    }

    /// Which row of the checkpoint is row `row` of GGUF. transformers rotates element `i` of a head together with
    /// element `i + n/2`, llama.cpp's `llama` neighbours: row `h n/2 + i` there is row
    /// `2 i + h` here.
    fn origin(&self, row: usize) -> usize {
        let Some(heads) = self.permute_heads else { return row };
        let n = self.rows / heads;
        let (head, r) = (row / n, row % n);
        head * n + r % 2 * (n / 2) + r / 2
    }
}

impl Rows for HfRows<'_> {
    fn shape(&self) -> (usize, usize) {
        // A permuted vector is read by its elements but written as one row.
        if self.cols == 1 { (1, self.rows) } else { (self.rows, self.cols) }
    }

    fn row_bytes(&self) -> usize {
        self.ty.row_bytes(self.cols)
    }

    fn read(&self, rows: Range<usize>, out: &mut [f32]) -> Result<(), ConvertError> {
        let rows = if self.cols == 1 { 0..self.rows } else { rows };
        let n = self.row_bytes();
        let mut bytes = vec![0; out.len() * self.ty.block_bytes()];
        if self.permute_heads.is_none() {
            self.file.read(self.offset + (rows.start * n) as u64, &mut bytes)?;
        } else {
            for (row, bytes) in rows.zip(bytes.chunks_exact_mut(n)) {
                self.file.read(self.offset + (self.origin(row) * n) as u64, bytes)?;
            }
        }
        quant::dequantize_row(self.ty, &bytes, out);
        Ok(())
    }
}
