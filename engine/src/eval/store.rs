//! Cells on disk, a JSON line each, so that a sweep goes on where it stopped.
//!
//! A line is written at once and never changed. One that a killed run left cut off, or that cannot be read, is measured
//! again; one of another model, calibration or version is refused, since numbers of both would stand in one table.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Measured, Sample};
use crate::spec::CacheSpec;

/// Raised when a task measures something else.
pub const VERSION: u32 = 1;
/// Name of the file.
const FILE: &str = "cells.jsonl";

/// Where cells come from; those of one table have all of it in common.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// [`VERSION`].
    pub version: u32,
    /// [`crate::calibration::fingerprint`].
    pub model: String,
    /// Form of activations, and hash of the calibration.
    pub setup: String,
}

/// What one sample gave with one cache.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// Where it comes from.
    #[serde(flatten)]
    pub origin: Origin,
    /// What fixed random choices.
    pub seed: u64,
    /// The cache's spec, written back.
    pub cache: String,
    /// The sample.
    pub sample: Sample,
    /// What it gave.
    pub measured: Measured,
}

/// Why cells cannot be kept.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file cannot be read or written.
    #[error("{path}: {why}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system says.
        why: std::io::Error,
    },
    /// Another process has it.
    #[error("{path}: another sweep is writing it")]
    Busy {
        /// The file.
        path: PathBuf,
    },
    /// It has cells of something else.
    #[error(
        "{path}, line {line}: `{field}` is {got}, this run's is {expected}; name another --out"
    )]
    Foreign {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// What differs.
        field: &'static str,
        /// In the file.
        got: String,
        /// Of this run.
        expected: String,
    },
}

/// Cells of one origin in a folder.
pub struct Store {
    path: PathBuf,
    file: File,
    origin: Origin,
    cells: HashMap<String, Measured>,
    /// Lines that cannot be read.
    lost: Vec<usize>,
}

/// What tells cells of one origin apart.
fn key(seed: u64, cache: &str, sample: &Sample) -> String {
    format!("{seed} {cache} {sample:?}")
}

impl Store {
    /// Opens what `folder` has, or makes it.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn open(folder: &Path, origin: Origin) -> Result<Self, StoreError> {
        let path = folder.join(FILE);
        let fail = |why| StoreError::File { path: path.clone(), why };
        std::fs::create_dir_all(folder).map_err(fail)?;
        let mut file = OpenOptions::new();
        let mut file = file.read(true).append(true).create(true).open(&path).map_err(fail)?;
        if file.try_lock().is_err() {
            return Err(StoreError::Busy { path });
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(fail)?;
        let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        let mut store = Self { path, file, origin, cells: HashMap::new(), lost: Vec::new() };
        let mut lines = 0;
        for line in bytes[..whole].split_inclusive(|&byte| byte == b'\n') {
            lines += 1;
            store.take(lines, line)?;
        }
        if whole < bytes.len() {
            store.lost.push(lines + 1);
            store.file.set_len(whole as u64).map_err(|why| store.failed(why))?;
        }
        Ok(store)
    }

    fn failed(&self, why: std::io::Error) -> StoreError {
        StoreError::File { path: self.path.clone(), why }
    }

    fn take(&mut self, line: usize, bytes: &[u8]) -> Result<(), StoreError> {
        // Of another version it may have other fields.
        if let Ok(origin) = serde_json::from_slice::<Origin>(bytes) {
            self.check(line, &origin)?;
        }
        match serde_json::from_slice::<Cell>(bytes) {
            Ok(Cell { seed, cache, sample, measured, .. }) => {
                self.cells.insert(key(seed, &cache, &sample), measured);
            }
            Err(_) => self.lost.push(line),
        }
        Ok(())
    }

    fn check(&self, line: usize, origin: &Origin) -> Result<(), StoreError> {
        let fields = |origin: &Origin| {
            let Origin { version, model, setup } = origin.clone();
            [("version", version.to_string()), ("model", model), ("setup", setup)]
        };
        let pairs = fields(origin).into_iter().zip(fields(&self.origin));
        match pairs.into_iter().find(|(got, expected)| got != expected) {
            None => Ok(()),
            Some(((field, got), (_, expected))) => {
                let path = self.path.clone();
                Err(StoreError::Foreign { path, line, field, got, expected })
            }
        }
    }

    /// Lines that could not be read: their cells are not there.
    pub fn lost(&self) -> &[usize] {
        &self.lost
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What a sample gave, where it is known.
    pub fn get(&self, seed: u64, spec: &CacheSpec, sample: &Sample) -> Option<&Measured> {
        self.cells.get(&key(seed, &spec.to_string(), sample))
    }

    /// Keeps what a sample gave.
    ///
    /// # Errors
    /// [`StoreError::File`].
    pub fn put(
        &mut self,
        seed: u64,
        spec: &CacheSpec,
        sample: &Sample,
        measured: Measured,
    ) -> Result<(), StoreError> {
        let (origin, cache) = (self.origin.clone(), spec.to_string());
        let (key, sample) = (key(seed, &cache, sample), sample.clone());
        let cell = Cell { origin, seed, cache, sample, measured };
        let line = serde_json::to_string(&cell).map_err(|e| self.failed(e.into()))? + "\n";
        self.file.write_all(line.as_bytes()).map_err(|why| self.failed(why))?;
        self.cells.insert(key, cell.measured);
        Ok(())
    }
}
