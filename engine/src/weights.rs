//! The tensors of a model under one set of names, whatever file they come from.
//!
//! Names are those of GGUF without `.weight`: `token_embd`, `output_norm`, `output`, and for block
//! N `blk.N.attn_norm`, `attn_q`, `attn_k`, `attn_v`, `attn_output`, `ffn_norm`, `ffn_gate`,
//! `ffn_up`, `ffn_down`; biases end in `.bias`. A converted model ([`crate::config::Elite`]) has the elite rows of `attn_k`,
//! and `attn_kv_a`, `attn_k_b`, `attn_v_b` instead of the others and of `attn_v`.

mod names;
mod put;
mod shapes;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::Range;
use std::path::Path;

use half::{bf16, f16};
use memmap2::{Mmap, MmapMut};

use crate::error::{Error, Result};
use crate::gguf::{self, GgmlType, Gguf};
use crate::safetensors;
pub(crate) use names::theirs;
pub use shapes::{Expected, expected};

/// Key of the metadata of a converted model's tensors: [`crate::config::Elite::fingerprint`].
pub const ELITE: &str = "kvwarp.elitekv";

/// A tensor as it lies in the file; rows are contiguous. Bytes need not be aligned to the element.
#[derive(Debug, Clone, Copy)]
pub struct Tensor<'a> {
    /// Our name.
    pub name: &'a str,
    /// Element type.
    pub kind: GgmlType,
    /// Rows, 1 for a vector.
    pub rows: usize,
    /// Elements of a row.
    pub cols: usize,
    /// The data, `rows` times the bytes of a row.
    pub bytes: &'a [u8],
}

struct Entry {
    file: usize,
    kind: GgmlType,
    rows: usize,
    cols: usize,
    range: Range<usize>,
}

/// Memory-mapped tensors of one model.
pub struct Weights {
    files: Vec<Mmap>,
    tensors: BTreeMap<String, Entry>,
    /// Messages use the names of a Hugging Face folder.
    folder: bool,
    /// Of which conversion the files say they are.
    elite: Option<String>,
}

impl Weights {
    /// Maps a GGUF file, and returns its parsed header as well.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Gguf`] and [`Error::Weights`] with the path.
    pub fn from_gguf(path: &Path) -> Result<(Self, Gguf)> {
        let map = map(path)?;
        let header = gguf::parse(&map).map_err(|e| e.at(path))?;
        let tensors = header.tensors().iter().map(|(name, info)| {
            let [cols, rows, more @ ..] = info.shape;
            if more != [1, 1] {
                let shape = &info.shape[..usize::from(info.rank)];
                return Err(Error::Weights(format!(
                    "tensor `{name}` has shape {shape:?}, expected at most 2 extents"
                )));
            }
            let (rows, cols) = (rows as usize, cols as usize);
            let entry = Entry { file: 0, kind: info.kind, rows, cols, range: info.range.clone() };
            Ok((name.strip_suffix(".weight").unwrap_or(name).to_owned(), entry))
        });
        let tensors = tensors.collect::<Result<_>>().map_err(|e| e.at(path))?;
        Ok((Self { files: vec![map], tensors, folder: false, elite: None }, header))
    }

    /// Maps a folder with `model.safetensors`, or with the shards that
    /// `model.safetensors.index.json` lists.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Safetensors`] and [`Error::Weights`] with the path.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        let index = folder.join("model.safetensors.index.json");
        let shards = match std::fs::read_to_string(&index) {
            Ok(text) => names::shards(&text).map_err(|e| e.at(&index))?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                BTreeMap::from([("model.safetensors".to_owned(), BTreeSet::new())])
            }
            Err(e) => return Err(Error::io(&index, e)),
        };
        let (files, tensors) = (Vec::new(), BTreeMap::new());
        let mut weights = Self { files, tensors, folder: true, elite: None };
        for (shard, listed) in &shards {
            let path = folder.join(shard);
            weights.add_shard(&path, listed).map_err(|e| e.at(&path))?;
        }
        Ok(weights)
    }

    /// f16 tensors of `config` without a file: norms are 1, matrices lie one after another in `bytes` bytes that
    /// `fill` writes, from the start again where they end.
    ///
    /// # Errors
    /// [`Error::Io`] when there is no memory; [`Error::Weights`] when a matrix is larger than that.
    pub(crate) fn filled(
        config: &crate::config::Config,
        bytes: usize,
        fill: impl FnOnce(&mut [u8]),
    ) -> Result<Self> {
        let ones = 2 * config.width;
        let mut map =
            MmapMut::map_anon(ones + bytes).map_err(|e| Error::io(Path::new("memory"), e))?;
        map[..ones].as_chunks_mut().0.fill(f16::ONE.to_le_bytes());
        fill(&mut map[ones..]);
        let (mut at, mut tensors) = (0, BTreeMap::new());
        for Expected { name, rows, cols } in expected(config) {
            let need = rows * cols * 2;
            let range = if rows == 1 {
                0..need
            } else if need > bytes {
                return Err(Error::Weights(format!(
                    "tensor `{name}` is larger than {bytes} bytes"
                )));
            } else {
                at = if at + need > bytes { 0 } else { at };
                at += need;
                ones + at - need..ones + at
            };
            tensors.insert(name, Entry { file: 0, kind: GgmlType::F16, rows, cols, range });
        }
        let map = map.make_read_only().map_err(|e| Error::io(Path::new("memory"), e))?;
        Ok(Self { files: vec![map], tensors, folder: false, elite: None })
    }

    fn add_shard(&mut self, path: &Path, listed: &BTreeSet<String>) -> Result<()> {
        let map = map(path)?;
        let table = safetensors::parse(&map)?;
        self.elite = self.elite.take().or_else(|| safetensors::metadata(&map, ELITE));
        if let Some(name) = listed.iter().find(|name| !table.contains_key(*name)) {
            return Err(Error::Weights(format!(
                "tensor `{name}` is missing, though the index puts it in this file"
            )));
        }
        for (name, info) in table {
            let Some(ours) = names::ours(&name)? else { continue };
            let (rows, cols) = match info.shape[..] {
                [cols] => (1, cols),
                [rows, cols] => (rows, cols),
                ref shape => {
                    return Err(Error::Weights(format!(
                        "tensor `{name}` has shape {shape:?}, expected 1 or 2 extents"
                    )));
                }
            };
            let entry =
                Entry { file: self.files.len(), kind: info.kind, rows, cols, range: info.range };
            if self.tensors.insert(ours, entry).is_some() {
                return Err(Error::Weights(format!("tensor `{name}` is in two files")));
            }
        }
        self.files.push(map);
        Ok(())
    }

    /// The tensor of this name.
    pub fn get(&self, name: &str) -> Option<Tensor<'_>> {
        let (name, entry) = self.tensors.get_key_value(name)?;
        Some(self.view(name, entry))
    }

    /// Every tensor, by name.
    pub fn iter(&self) -> impl Iterator<Item = Tensor<'_>> {
        self.tensors.iter().map(|(name, entry)| self.view(name, entry))
    }

    fn view<'a>(&'a self, name: &'a str, entry: &Entry) -> Tensor<'a> {
        let Entry { file, kind, rows, cols, ref range } = *entry;
        Tensor { name, kind, rows, cols, bytes: &self.files[file][range.clone()] }
    }

    /// Bytes of a mapped file, the first being the GGUF file itself.
    pub fn file(&self, index: usize) -> Option<&[u8]> {
        self.files.get(index).map(|map| &map[..])
    }

    /// The tensor of this name with this shape.
    ///
    /// # Errors
    /// [`Error::Weights`] when it is missing or has another shape.
    pub fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Tensor<'_>> {
        let shown = || if self.folder { names::theirs(name) } else { name.to_owned() };
        let tensor = self
            .get(name)
            .ok_or_else(|| Error::Weights(format!("tensor `{}` is missing", shown())))?;
        if (tensor.rows, tensor.cols) != (rows, cols) {
            let found = format!("{} rows of {}", tensor.rows, tensor.cols);
            return Err(Error::Weights(format!(
                "tensor `{}` has {found}, expected {rows} of {cols}",
                shown()
            )));
        }
        Ok(tensor)
    }

    /// The elements of a vector in f32, such as a norm's weights or a bias.
    ///
    /// # Errors
    /// [`Error::Weights`] when it is missing, has another length, or is quantised.
    pub fn vector(&self, name: &str, length: usize) -> Result<Vec<f32>> {
        let tensor = self.matrix(name, 1, length)?;
        let halves = |decode: fn([u8; 2]) -> f32| {
            tensor.bytes.as_chunks().0.iter().map(|&b| decode(b)).collect()
        };
        match tensor.kind {
            GgmlType::F32 => {
                Ok(tensor.bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect())
            }
            GgmlType::F16 => Ok(halves(|b| f16::from_le_bytes(b).to_f32())),
            GgmlType::BF16 => Ok(halves(|b| bf16::from_le_bytes(b).to_f32())),
            other => Err(Error::Weights(format!(
                "tensor `{name}` has type {other:?}; F32, F16 and BF16 are supported here"
            ))),
        }
    }

    /// Checks that every tensor that `config` calls for is there with its shape, and of the same conversion.
    ///
    /// # Errors
    /// [`Error::Weights`] naming the first that is not.
    pub fn check(&self, config: &crate::config::Config) -> Result<()> {
        if let Some(elite) = config.elite.as_ref().filter(|_| self.folder) {
            let (want, got) = (elite.fingerprint(), self.elite.as_deref().unwrap_or("missing"));
            if want != got {
                let message =
                    format!("`{ELITE}` is {got}, by config.json {want}: of another conversion");
                return Err(Error::Weights(message));
            }
        }
        expected(config).try_for_each(|e| self.matrix(&e.name, e.rows, e.cols).map(drop))
    }
}

fn map(path: &Path) -> Result<Mmap> {
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    // SAFETY: the mapping is read-only and private to this process; as with every mapped model,
    // changing or truncating the file while it is in use is outside the contract.
    unsafe { Mmap::map(&file) }.map_err(|e| Error::io(path, e))
}
