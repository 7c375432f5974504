//! Layers that a recovery has finished, a file each in a folder beside the output: an interrupted conversion goes on after the
//! last of them. A file has the layer's tensors of attention that are computed, in f32 as they are in memory, and its name says
//! what they are of, so that those of another conversion are not found.

use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use sha2::{Digest, Sha256};

use super::ConvertError;
use crate::gguf::GgmlType;
use crate::source::Source;
use crate::weights::{Expected, expected};

/// Of the files, and of what recovery computes.
const VERSION: u32 = 1;
/// Digits of a name.
const DIGITS: usize = 16;

/// Finished layers of one recovery.
pub struct Kept {
    folder: PathBuf,
    /// What precedes the number of a layer.
    name: String,
}

/// The folder of what is kept of the conversion that goes on from the file `beside`.
pub fn folder(beside: &Path) -> PathBuf {
    beside.with_added_extension("layers")
}

impl Kept {
    /// Of the recovery `stage` of `staged`, which is of all that `of` says.
    pub fn new(beside: &Path, stage: &str, staged: &Source, of: &str) -> Self {
        let elite = staged.config.elite.as_ref().map(|elite| elite.fingerprint());
        let of = Sha256::digest(format!("{VERSION} {of} {elite:?}"));
        let digits = &format!("{of:x}")[..DIGITS];
        Self { folder: folder(beside), name: format!("{stage}-{digits}") }
    }

    fn path(&self, n: usize) -> PathBuf {
        self.folder.join(format!("{}.{n}", self.name))
    }

    /// Puts layer `n` into `staged`, where it has been finished; whether it has.
    ///
    /// # Errors
    /// [`ConvertError::State`] for a file that is damaged.
    pub fn take(&self, staged: &mut Source, n: usize) -> Result<bool, ConvertError> {
        let path = self.path(n);
        let fail = |why: String| ConvertError::State { path: path.clone(), why };
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(fail(e.to_string())),
        };
        let read = SafeTensors::deserialize(&bytes).map_err(|e| fail(e.to_string()))?;
        let all = attention(staged, n);
        for (name, tensor) in read.iter() {
            let (kind, shape) = (tensor.dtype(), tensor.shape());
            let fits = |e: &Expected| e.name == name && shape == [e.rows, e.cols];
            if kind != Dtype::F32 || !all.iter().any(fits) {
                return Err(fail(format!("`{name}`, {kind:?} {shape:?}, is none of layer {n}")));
            }
            let values = tensor.data().as_chunks().0.iter().map(|x| f32::from_le_bytes(*x));
            staged.weights.put(name, shape[1], &values.collect::<Vec<_>>())?;
        }
        Ok(true)
    }

    /// Writes layer `n` of `staged`, all of it or nothing.
    ///
    /// # Errors
    /// [`ConvertError::State`].
    pub fn keep(&self, staged: &Source, n: usize) -> Result<(), ConvertError> {
        let path = self.path(n);
        let fail = |why: String| ConvertError::State { path: path.clone(), why };
        let mut tensors = Vec::new();
        for Expected { name, rows, cols } in attention(staged, n) {
            let tensor = staged.weights.matrix(&name, rows, cols)?;
            if tensor.kind == GgmlType::F32 {
                let view = TensorView::new(Dtype::F32, vec![rows, cols], tensor.bytes);
                tensors.push((name, view.map_err(|e| fail(e.to_string()))?));
            }
        }
        std::fs::create_dir_all(&self.folder).map_err(|e| fail(e.to_string()))?;
        let partial = path.with_added_extension("partial");
        safetensors::serialize_to_file(tensors, None, &partial).map_err(|e| fail(e.to_string()))?;
        std::fs::rename(&partial, &path).map_err(|e| fail(e.to_string()))
    }
}

/// Tensors of the attention of layer `n`; what is computed is of f32.
fn attention(staged: &Source, n: usize) -> Vec<Expected> {
    let of = format!("blk.{n}.attn_");
    expected(&staged.config).filter(|tensor| tensor.name.starts_with(&of)).collect()
}
