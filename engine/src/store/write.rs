//! Writing a cache file.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use kvwarp::pages::Entry;
use kvwarp::slab::{Format, TOKENS};
use serde_json::{Map, Value, json};

use super::{Document, Reader, StoreError, read};
use crate::cache::Cache;
use crate::runner::{Frozen, Held};
use crate::watch::Watch;

/// A cache file on its way: it has its name once all of it is written.
pub struct Writer {
    reader: Reader,
    path: PathBuf,
    partial: PathBuf,
    file: File,
}

impl Writer {
    /// Begins `path`, for a document that `reader` will have read.
    ///
    /// # Errors
    /// [`StoreError::Spec`] with `kivi_exact`; [`StoreError::File`].
    pub fn create(path: &Path, reader: Reader) -> Result<Self, StoreError> {
        if reader.spec.kivi_exact {
            return Err(StoreError::Spec(reader.spec));
        }
        let (path, partial) = (path.to_owned(), path.with_added_extension("partial"));
        match File::create(&partial) {
            Ok(file) => Ok(Self { reader, path, partial, file }),
            Err(e) => Err(StoreError::File { path: partial, why: e.to_string() }),
        }
    }

    /// Writes what `cache`, of the reader's shape and spec, keeps of a document as `frozen`; returns the bytes of the file.
    ///
    /// # Errors
    /// [`StoreError::File`]; [`StoreError::Interrupted`].
    pub fn write(
        self,
        document: &Document,
        (cache, frozen): (&Cache, &Frozen),
        watch: &mut Watch<'_>,
    ) -> Result<u64, StoreError> {
        let fail = |e: io::Error| StoreError::File { path: self.path.clone(), why: e.to_string() };
        let reader = &self.reader;
        let header = header(reader, document, (cache, frozen));
        let mut to = BufWriter::with_capacity(1 << 20, &self.file);
        to.write_all(&(header.len() as u64).to_le_bytes()).map_err(fail)?;
        to.write_all(header.as_bytes()).map_err(fail)?;
        let mut counts = [0; Format::ALL.len()];
        let entries = frozen.entries.iter().filter_map(|entry| entry.get());
        let entries = entries.map(|(format, _)| {
            counts[format as usize] += 1;
            Entry::new(format, counts[format as usize] - 1).0
        });
        let heads = frozen
            .heads
            .iter()
            .flat_map(|&Held { len, packed, chosen }| [len, packed, chosen].map(|n| n as u32));
        for n in entries.chain(heads).chain(document.tokens.iter().copied()) {
            to.write_all(&n.to_le_bytes()).map_err(fail)?;
        }
        for format in Format::ALL {
            for (entry, tokens) in of(frozen, format) {
                watch.step(0)?;
                to.write_all(&cache.slab(entry, tokens)).map_err(fail)?;
            }
        }
        to.flush().map_err(fail)?;
        drop(to);
        let bytes = self.file.metadata().map_err(fail)?.len();
        std::fs::rename(&self.partial, &self.path).map_err(fail)?;
        Ok(bytes)
    }
}

impl Drop for Writer {
    /// Leaves no part behind; of a whole file there is none.
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.partial);
    }
}

/// Entries of a format, in order, and the tokens of each slab.
fn of(frozen: &Frozen, format: Format) -> impl Iterator<Item = (Entry, usize)> {
    let tokens = frozen
        .heads
        .iter()
        .flat_map(|held| (0..held.len).step_by(TOKENS).map(|first| TOKENS.min(held.len - first)));
    let all = frozen.entries.iter().copied().zip(tokens);
    all.filter(move |(entry, _)| entry.get().is_some_and(|(f, _)| f == format))
}

/// Keys in order, so that equal caches give equal bytes.
fn header(reader: &Reader, document: &Document, (cache, frozen): (&Cache, &Frozen)) -> String {
    let (mut tensors, mut at) = (Map::new(), 0);
    let mut put = |name: &str, kind: &str, shape: &[usize], bytes: usize| {
        let tensor = json!({ "dtype": kind, "shape": shape, "data_offsets": [at, at + bytes] });
        tensors.insert(name.to_owned(), tensor);
        at += bytes;
    };
    let [layers, kv_heads] = reader.tables();
    put("entries", "U32", &[frozen.entries.len()], 4 * frozen.entries.len());
    put("heads", "U32", &[layers, kv_heads, 3], 12 * layers * kv_heads);
    put("tokens", "U32", &[document.tokens.len()], 4 * document.tokens.len());
    for format in Format::ALL {
        let (slabs, bytes) = (of(frozen, format).count(), cache.slab_bytes_of(format));
        if slabs > 0 {
            put(&read::slabs_of(format), "U8", &[slabs, bytes], slabs * bytes);
        }
    }
    let mut metadata: Map<_, _> =
        reader.fields().into_iter().map(|(name, value)| (name.into(), value.into())).collect();
    metadata.insert("prompt".into(), read::prompt(document.chat).into());
    tensors.insert("__metadata__".into(), Value::Object(metadata));
    let mut header = Value::Object(tensors).to_string();
    // Numbers lie at multiples of their size.
    let blanks = header.len().next_multiple_of(8) - header.len();
    header.extend(std::iter::repeat_n(' ', blanks));
    header
}
