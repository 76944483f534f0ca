//! Writing float32 matrices in NumPy's `.npy` format, version 1.0 (NEP 1), row by row.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

/// A file that grows by rows; the shape is known beforehand.
pub(super) struct NpyWriter {
    file: BufWriter<File>,
}

impl NpyWriter {
    pub(super) fn create(path: &Path, rows: usize, cols: usize) -> io::Result<Self> {
        let mut file = BufWriter::new(File::create(path)?);
        let mut header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {cols}), }}");
        // Magic, version, length and header end at a multiple of 64 bytes, with a newline.
        let padded = (10 + header.len() + 1).next_multiple_of(64) - 11;
        header.extend(std::iter::repeat_n(' ', padded - header.len()));
        header.push('\n');
        file.write_all(b"\x93NUMPY\x01\x00")?;
        file.write_all(&(header.len() as u16).to_le_bytes())?;
        file.write_all(header.as_bytes())?;
        Ok(Self { file })
    }

    pub(super) fn write(&mut self, values: &[f32]) -> io::Result<()> {
        for v in values {
            self.file.write_all(&v.to_le_bytes())?;
        }
        Ok(())
    }

    pub(super) fn finish(mut self) -> io::Result<()> {
        self.file.flush()
    }
}
