//! `split` and `merge`: one file to several and back, their names and keys as llama.cpp's `gguf-split` has them.

use std::path::{Path, PathBuf};

use skiff::gguf::{Builder, Metadata, ShardName};

use crate::ConvertError;
use crate::output::GgufOutput;
use crate::progress::Progress;
use crate::source::{Source, SourceTensor};

const SPLIT_PREFIX: &str = "split.";

/// Where a model is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// After so many tensors.
    Tensors(usize),
    /// Before a file's tensors have more bytes than this; a larger tensor has a file of its own.
    Bytes(u64),
}

/// Writes the model at `input` as `PREFIX-00001-of-0000N.gguf` and so on; returns the paths.
///
/// # Errors
/// `input` cannot be read, there would be more than 99999 files, or one cannot be written.
pub fn split(input: &Path, prefix: &Path, cut: Cut, quiet: bool) -> Result<Vec<PathBuf>, ConvertError> {
    let source = Source::open(input)?;
    let groups = groups(source.tensors(), cut);
    let count = u16::try_from(groups.len()).ok().filter(|&n| n > 0);
    let count = count.ok_or(ConvertError::TooManyShards { found: groups.len() })?;
    let name = prefix.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let name = ShardName { prefix: name, no: 0, count: count.into() };
    let progress = Progress::new("split", source.bytes(), quiet);
    let mut paths = Vec::new();
    for (no, tensors) in groups.iter().enumerate() {
        let path = prefix.with_file_name(name.sibling(no as u32));
        source.check_output(&path)?;
        // The first file has the model's metadata, as readers expect.
        let mut builder =
            Builder::with_metadata(if no == 0 { plain(source.metadata())? } else { Metadata::new() });
        builder.insert("split.no", no as u16)?;
        builder.insert("split.count", count)?;
        builder.insert("split.tensors.count", source.tensors().len() as i32)?;
        write(&path, builder, tensors, &progress)?;
        paths.push(path);
    }
    Ok(paths)
}

/// Writes the model whose first file is `input` to the one file `out`; returns the number of files read.
///
/// # Errors
/// A file cannot be read or does not belong to the model, or `out` cannot be written.
pub fn merge(input: &Path, out: &Path, quiet: bool) -> Result<usize, ConvertError> {
    let source = Source::open(input)?;
    source.check_output(out)?;
    let progress = Progress::new("merge", source.bytes(), quiet);
    write(out, Builder::with_metadata(plain(source.metadata())?), source.tensors(), &progress)?;
    Ok(source.files())
}

/// Metadata without the keys of a split file.
fn plain(metadata: &Metadata) -> Result<Metadata, ConvertError> {
    let mut plain = Metadata::new();
    for (key, value) in metadata.iter().filter(|(key, _)| !key.starts_with(SPLIT_PREFIX)) {
        plain.insert(key, value.clone())?;
    }
    Ok(plain)
}

fn groups(tensors: &[SourceTensor], cut: Cut) -> Vec<&[SourceTensor]> {
    let (mut groups, mut start, mut bytes) = (Vec::new(), 0, 0);
    for (i, t) in tensors.iter().enumerate() {
        let full = match cut {
            Cut::Tensors(n) => i - start >= n.max(1),
            Cut::Bytes(max) => i > start && bytes + t.info.n_bytes > max,
        };
        if full {
            groups.push(&tensors[start..i]);
            (start, bytes) = (i, 0);
        }
        bytes += t.info.n_bytes;
    }
    groups.push(&tensors[start..]);
    groups
}

fn write(
    path: &Path,
    mut builder: Builder,
    tensors: &[SourceTensor],
    progress: &Progress,
) -> Result<(), ConvertError> {
    for t in tensors {
        builder.tensor(&t.info.name, t.info.ty, &t.info.shape)?;
    }
    let mut output = GgufOutput::create(path, builder)?;
    for t in tensors {
        progress.at(&t.info.name);
        output.tensor(|sink| {
            t.copy(|bytes| {
                progress.add(bytes.len() as u64)?;
                sink.write(bytes)
            })
        })?;
    }
    output.finish()
}
