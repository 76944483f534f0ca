//! A GGUF file in the making: under a temporary name until it is whole, written by a thread of its own.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use skiff::gguf::{Builder, WriteError, Writer};

use crate::ConvertError;

/// Bytes handed to the writing thread at a time.
const PIECE: usize = 1 << 20;
/// Pieces that may wait for the disk: enough to bridge its pauses, little enough to stay small.
const WAITING: usize = 64;

/// Ends the name of an unfinished file; no program takes such a file for a model.
const UNFINISHED: &str = ".unfinished";

/// A GGUF file being written. Dropped before [`finish`](Self::finish), it leaves nothing behind; a process that is
/// killed leaves a file called `OUT.unfinished`, which the next run overwrites.
pub struct GgufOutput {
    /// `None` once the writer has been taken apart.
    writer: Option<Writer<Background>>,
    path: PathBuf,
    temporary: PathBuf,
    needed: u64,
    written: u64,
}

impl GgufOutput {
    /// Creates the file with everything up to the data of the first tensor.
    ///
    /// # Errors
    /// The file cannot be created, or `builder` does not describe a valid one.
    pub fn create(path: &Path, builder: Builder) -> Result<Self, ConvertError> {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(UNFINISHED);
        let temporary = path.with_file_name(name);
        let file = File::create(&temporary).map_err(ConvertError::io(&temporary))?;
        let needed = builder.data_bytes();
        let (path, writer, written) = (path.to_owned(), None, 0);
        let mut output = Self { writer, path, temporary, needed, written };
        match builder.start(Background::new(file)) {
            Ok(writer) => output.writer = Some(writer),
            Err(error) => return Err(output.failure(error)), // `output` removes the file
        }
        Ok(output)
    }

    /// Has `produce` write the data of the next tensor, piece by piece.
    ///
    /// # Errors
    /// That of `produce`; too many or too few bytes; the disk is full or fails.
    pub fn tensor(
        &mut self,
        produce: impl FnOnce(&mut TensorSink<'_>) -> Result<(), ConvertError>,
    ) -> Result<(), ConvertError> {
        let mut failure = None;
        let Some(writer) = &mut self.writer else {
            return Err(self.failure(WriteError::NoTensorLeft { count: 0 }));
        };
        let n_bytes = writer.next_tensor().map_or(0, |t| t.n_bytes);
        let outcome = writer.write_tensor_with(|out| {
            produce(&mut TensorSink(out)).map_err(|error| {
                failure = Some(error);
                io::Error::other("the data of a tensor could not be produced")
            })
        });
        match (outcome, failure) {
            (Ok(()), _) => {
                self.written += n_bytes;
                Ok(())
            }
            (Err(_), Some(ConvertError::Output(error))) => Err(self.failure(error.into())),
            (Err(_), Some(error)) => Err(error),
            (Err(error), None) => Err(self.failure(error)),
        }
    }

    /// Checks that everything is there, and gives the file its name.
    pub fn finish(mut self) -> Result<(), ConvertError> {
        let Some(writer) = self.writer.take() else { return Ok(()) };
        let file = writer.finish().and_then(|out| Ok(out.finish()?)).map_err(|error| self.failure(error))?;
        // What is not on the disk yet may still not fit.
        file.sync_all().map_err(|error| self.failure(error.into()))?;
        skiff::memory::leave_page_cache(&file);
        drop(file);
        fs::rename(&self.temporary, &self.path).map_err(ConvertError::io(&self.path))
    }

    fn failure(&self, error: WriteError) -> ConvertError {
        let path = self.path.clone();
        match error {
            WriteError::Io(e)
                if matches!(e.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) =>
            {
                ConvertError::DiskFull { path, written: self.written, needed: self.needed }
            }
            error => ConvertError::Write { path, error },
        }
    }
}

impl Drop for GgufOutput {
    fn drop(&mut self) {
        drop(self.writer.take()); // ends the thread
        // After `finish` there is no such file.
        let _ = fs::remove_file(&self.temporary);
    }
}

/// Where the data of one tensor go.
pub struct TensorSink<'a>(&'a mut dyn Write);

impl TensorSink<'_> {
    /// Appends `bytes`.
    ///
    /// # Errors
    /// [`ConvertError::Output`]; [`GgufOutput::tensor`] adds the path.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), ConvertError> {
        self.0.write_all(bytes).map_err(ConvertError::Output)
    }
}

/// A file written by a thread, so that computing and writing overlap. An error shows at a later write or at the end.
struct Background {
    buffer: Vec<u8>,
    pieces: Option<SyncSender<Vec<u8>>>,
    thread: Option<JoinHandle<io::Result<File>>>,
}

impl Background {
    fn new(file: File) -> Self {
        let (pieces, waiting) = sync_channel(WAITING);
        let thread = std::thread::spawn(move || write_pieces(file, &waiting));
        Self { buffer: Vec::with_capacity(PIECE), pieces: Some(pieces), thread: Some(thread) }
    }

    fn send(&mut self) -> io::Result<()> {
        let piece = std::mem::replace(&mut self.buffer, Vec::with_capacity(PIECE));
        let sent = self.pieces.as_ref().is_some_and(|pieces| pieces.send(piece).is_ok());
        // A thread that takes no more pieces has failed.
        if sent { Ok(()) } else { self.join().map(drop) }
    }

    fn join(&mut self) -> io::Result<File> {
        self.pieces = None;
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(outcome)) => outcome,
            _ => Err(io::Error::other("the writing thread is gone")),
        }
    }

    fn finish(mut self) -> io::Result<File> {
        self.flush()?;
        self.join()
    }
}

fn write_pieces(mut file: File, waiting: &Receiver<Vec<u8>>) -> io::Result<File> {
    for piece in waiting {
        file.write_all(&piece)?;
    }
    Ok(file)
}

impl Write for Background {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = bytes.len().min(PIECE - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..n]);
        if self.buffer.len() == PIECE {
            self.send()?;
        }
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() { Ok(()) } else { self.send() }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        let _ = self.join();
    }
}
