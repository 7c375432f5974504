//! A document as a cache keeps it, in a file: read once, asked many times (KVzip, arXiv:2505.23416).
//!
//! The file is safetensors: `tokens` `[n]`; `heads` `[layers, kv_heads, 3]`, what each holds: tokens, slabs that have left
//! the ring, tokens chosen; `entries`, the page table entries of all heads one after the other; all u32; and for each
//! format that occurs its slabs as they lie in memory, `slabs.q2` `[slabs, bytes]`, u8. An entry's index counts the slabs
//! of its format, so each slab has one place and the same sequence always gives the same bytes. Of latents there is one
//! table, `heads` `[1, 1, 3]`, and a slab is 64 tokens of all layers, one layer after the other. Metadata says by which
//! model, spec and calibration the document was read, and whether it begins a user's turn: what is asked goes on there.

mod read;
mod write;

use std::fs::File;
use std::path::{Path, PathBuf};

use kvwarp::slab;
use memmap2::Mmap;

use crate::cache::{Cache, CacheError, Shape};
use crate::model::Model;
use crate::runner::Frozen;
use crate::spec::CacheSpec;
use crate::watch::Interrupted;
pub use read::{Contents, parse};
pub use write::Writer;

/// Version of the file's format.
const VERSION: &str = "1";

/// Why a cache file cannot be used or made.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file cannot be read or written.
    #[error("{path}: {why}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system or the format says.
        why: String,
    },
    /// It is of something else, or contradicts itself.
    #[error("{path}: `{field}` is {got}, expected {expected}; make one with `kvwarp compress`")]
    Mismatch {
        /// The file.
        path: PathBuf,
        /// Metadata or tensor.
        field: String,
        /// What the file says.
        got: String,
        /// What was needed.
        expected: String,
    },
    /// Slabs of this spec are quantised in part.
    #[error("a cache of `{0}` cannot be kept in a file: some of its slabs are quantised in part")]
    Spec(CacheSpec),
    /// The cache has no room.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// Someone asked to stop; there is no file then.
    #[error(transparent)]
    Interrupted(#[from] Interrupted),
}

/// The same of bytes that have no name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// No safetensors, or not all of it.
    #[error("{0}")]
    Format(String),
    /// A field, what it is and what it should be.
    #[error("`{0}` is {1}, expected {2}")]
    Field(String, String, String),
}

impl Fault {
    fn field(name: impl Into<String>, got: impl ToString, expected: impl ToString) -> Self {
        Self::Field(name.into(), got.to_string(), expected.to_string())
    }

    fn at(self, path: &Path) -> StoreError {
        let path = path.into();
        match self {
            Self::Format(why) => StoreError::File { path, why },
            Self::Field(field, got, expected) => {
                StoreError::Mismatch { path, field, got, expected }
            }
        }
    }
}

/// What was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// Its tokens, those before it in a prompt among them.
    pub tokens: Vec<u32>,
    /// Whether it begins a turn of the model's chat template.
    pub chat: bool,
}

/// By what it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reader {
    /// [`Model::fingerprint`]
    pub model: String,
    /// Layers, kv heads, channels a head.
    pub shape: [usize; 3],
    /// How the cache keeps it.
    pub spec: CacheSpec,
    /// [`Model::followed`]
    pub calibration: Option<String>,
}

impl Reader {
    /// A model with a cache of `spec`.
    pub fn new(model: &Model<'_>, spec: &CacheSpec) -> Self {
        let Shape { layers, kv_heads, head_dim, .. } = model.shape(0);
        let calibration = model.followed(spec).map(str::to_owned);
        let shape = [layers, kv_heads, head_dim];
        Self { model: model.fingerprint(), shape, spec: *spec, calibration }
    }

    /// Page tables, by layer and kv head.
    fn tables(&self) -> [usize; 2] {
        if self.spec.latent { [1, 1] } else { [self.shape[0], self.shape[1]] }
    }

    /// As metadata has it.
    fn fields(&self) -> [(&'static str, String); 8] {
        let [layers, kv_heads, head_dim] = self.shape.map(|n| n.to_string());
        [
            ("kvwarp.cache", VERSION.to_owned()),
            ("slab", slab::VERSION.to_string()),
            ("model", self.model.clone()),
            ("layers", layers),
            ("kv_heads", kv_heads),
            ("head_dim", head_dim),
            ("spec", self.spec.to_string()),
            ("calibration", self.calibration.clone().unwrap_or_else(|| "none".to_owned())),
        ]
    }

    /// Whether it is `expected`.
    fn check(&self, expected: &Self) -> Result<(), Fault> {
        for ((name, got), (_, expected)) in self.fields().into_iter().zip(expected.fields()) {
            if got != expected {
                return Err(Fault::field(name, got, expected));
            }
        }
        Ok(())
    }
}

/// A cache file of a model, mapped; what it says has been checked.
pub struct Stored {
    path: PathBuf,
    map: Mmap,
    contents: Contents,
}

impl Stored {
    /// Maps `path`, which must be of this model, with the calibration that it has.
    ///
    /// # Errors
    /// [`StoreError::File`]; [`StoreError::Mismatch`] with the field at fault.
    pub fn open(path: &Path, model: &Model<'_>) -> Result<Self, StoreError> {
        let fail = |e: std::io::Error| StoreError::File { path: path.into(), why: e.to_string() };
        let file = File::open(path).map_err(fail)?;
        // SAFETY: the mapping is read-only and private to this process; as with a mapped model, changing or truncating
        // the file while it is in use is outside the contract.
        let map = unsafe { Mmap::map(&file) }.map_err(fail)?;
        let checked = || {
            let contents = parse(&map)?;
            let spec = contents.reader.spec;
            contents.reader.check(&Reader::new(model, &spec))?;
            contents.check(&model.plan(&spec), model.config().vocab)?;
            Ok(contents)
        };
        let contents = checked().map_err(|fault: Fault| fault.at(path))?;
        Ok(Self { path: path.into(), map, contents })
    }

    /// What was read.
    pub fn document(&self) -> &Document {
        &self.contents.document
    }

    /// How the cache keeps it.
    pub fn spec(&self) -> &CacheSpec {
        &self.contents.reader.spec
    }

    /// Bytes of the file.
    pub fn bytes(&self) -> usize {
        self.map.len()
    }

    /// Puts the document into a cache, where sequences continue from it as from any that was frozen there.
    ///
    /// # Errors
    /// [`StoreError::Mismatch`] for a cache of another shape or spec; [`StoreError::Cache`] when it has no room.
    pub fn load(&self, cache: &mut Cache) -> Result<Frozen, StoreError> {
        let Contents { reader, document, heads, entries, .. } = &self.contents;
        let Shape { layers, kv_heads, head_dim, .. } = cache.shape();
        let shape = [layers, kv_heads, head_dim];
        let of_cache = Reader { shape, spec: *cache.spec(), ..reader.clone() };
        reader.check(&of_cache).map_err(|fault| fault.at(&self.path))?;
        let slab = |entry| self.contents.slab(&self.map, entry);
        let slabs = entries.iter().filter_map(|&entry| slab(entry));
        Ok(cache.adopt(document.tokens.len(), heads.clone(), slabs)?)
    }
}
