//! Tensors that were computed, among those of a file.

use std::path::Path;

use memmap2::MmapMut;

use super::{Entry, Weights};
use crate::error::{Error, Result};
use crate::gguf::GgmlType;

impl Weights {
    /// Puts `values` `[rows, cols]` in f32 under a name, in place of what is there; memory is given back with the last of
    /// them.
    ///
    /// # Errors
    /// [`Error::Io`] when there is no memory.
    pub(crate) fn put(&mut self, name: &str, cols: usize, values: &[f32]) -> Result<()> {
        let bytes = 4 * values.len();
        let memory = |e| Error::io(Path::new("memory"), e);
        let mut map = MmapMut::map_anon(bytes.max(1)).map_err(memory)?;
        for (to, x) in map.as_chunks_mut().0.iter_mut().zip(values) {
            *to = x.to_le_bytes();
        }
        let map = map.make_read_only().map_err(memory)?;
        let rows = values.len() / cols.max(1);
        let entry =
            Entry { file: self.files.len(), kind: GgmlType::F32, rows, cols, range: 0..bytes };
        self.tensors.insert(name.to_owned(), entry);
        self.files.push(map);
        Ok(())
    }

    /// Leaves the tensor of this name out.
    pub(crate) fn remove(&mut self, name: &str) {
        self.tensors.remove(name);
    }
}
