//! Reader of GGUF version 2 and 3 files: metadata, tensor table, data ranges.
//!
//! The file is treated as hostile: a length is compared with the bytes that are left before
//! anything is allocated for it, so parsing never asks for more than a small multiple of the file's
//! own size, and every refusal names field and offset.
//!
//! Layout (little endian): magic, version u32, tensor count u64, metadata count u64; metadata as
//! key, type u32, value; tensors as name, rank u32, extents u64 (fastest first), type u32, offset
//! u64; padding to the alignment; tensor data.

mod read;
mod types;
mod value;

use std::collections::BTreeMap;
use std::ops::Range;

use crate::error::{Error, Result};
use read::Cursor;
pub use types::GgmlType;
pub use value::{Array, Value};

const MAGIC: &[u8; 4] = b"GGUF";
/// Longest key and tensor name accepted, bytes. The format allows 65,535 and 64.
const MAX_NAME: u64 = 65_535;
/// Bytes of the smallest metadata entry: key length, type, one byte.
const MIN_ENTRY: u64 = 8 + 4 + 1;
/// Bytes of the smallest tensor entry: name length, rank, type, offset.
const MIN_TENSOR: u64 = 8 + 4 + 4 + 8;

/// One tensor of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Element type.
    pub kind: GgmlType,
    /// Extents, fastest first; unused trailing extents are 1.
    pub shape: [u64; 4],
    /// Extents given in the file, 1 to 4.
    pub rank: u8,
    /// Bytes of the data in the file.
    pub range: Range<usize>,
}

/// A parsed file: everything but the tensor data itself, which stays in the bytes that were parsed.
#[derive(Debug, Clone, PartialEq)]
pub struct Gguf {
    version: u32,
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, TensorInfo>,
}

/// Parses the header, metadata and tensor table of `bytes`, which must be the whole file.
///
/// # Errors
/// [`Error::Gguf`] naming the field and its offset for anything malformed, truncated or of an
/// unknown type.
pub fn parse(bytes: &[u8]) -> Result<Gguf> {
    let mut cursor = Cursor::new(bytes);
    let version = header(&mut cursor)?;
    let tensor_count = cursor.count(MIN_TENSOR, "tensor count")?;
    let entry_count = cursor.count(MIN_ENTRY, "metadata count")?;
    let mut metadata = BTreeMap::new();
    for index in 0..entry_count {
        let at = cursor.offset();
        let key = cursor.name(MAX_NAME, &format!("metadata key {index}"))?;
        let value = value::read(&mut cursor, &key)?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(Error::Gguf(format!("metadata key `{key}` at offset {at} appears twice")));
        }
    }
    let table =
        (0..tensor_count).map(|index| entry(&mut cursor, index)).collect::<Result<Vec<_>>>()?;
    let alignment = alignment(&metadata)?;
    let start = cursor.offset().next_multiple_of(alignment);
    let mut tensors = BTreeMap::new();
    for entry in table {
        let info = entry.place(start, alignment, bytes.len())?;
        if tensors.insert(entry.name.clone(), info).is_some() {
            return Err(Error::Gguf(format!("tensor `{}` appears twice", entry.name)));
        }
    }
    Ok(Gguf { version, metadata, tensors })
}

fn header(cursor: &mut Cursor) -> Result<u32> {
    let magic = cursor.array::<4>("magic")?;
    if &magic != MAGIC {
        return Err(Error::Gguf(format!("the file starts with {magic:?}, not with \"GGUF\"")));
    }
    match cursor.u32("version")? {
        version @ (2 | 3) => Ok(version),
        1 => Err(Error::Gguf(
            "version 1 is not supported (2 and 3 are); convert the file again".into(),
        )),
        version if matches!(version.swap_bytes(), 1..=3) => {
            Err(Error::Gguf("big-endian files are not supported; convert to little endian".into()))
        }
        version => Err(Error::Gguf(format!("version {version} is not supported (2 and 3 are)"))),
    }
}

/// Byte multiple on which tensor data starts.
fn alignment(metadata: &BTreeMap<String, Value>) -> Result<u64> {
    match metadata.get("general.alignment") {
        None => Ok(32),
        Some(Value::U32(n)) if n.is_power_of_two() && *n <= 1 << 20 => Ok(u64::from(*n)),
        Some(other) => {
            let found = other.describe();
            Err(Error::Gguf(format!(
                "`general.alignment` is {found}; a u32 power of two up to 2^20 is expected"
            )))
        }
    }
}

/// A row of the tensor table as the file holds it; `offset` counts from the start of the data.
struct Entry {
    name: String,
    kind: GgmlType,
    shape: [u64; 4],
    rank: u8,
    offset: u64,
}

fn entry(cursor: &mut Cursor, index: u64) -> Result<Entry> {
    let name = cursor.name(MAX_NAME, &format!("name of tensor {index}"))?;
    let what = format!("tensor `{name}`");
    let rank = cursor.u32(&what)?;
    if !(1..=4).contains(&rank) {
        return Err(Error::Gguf(format!("{what}: rank {rank}, expected 1 to 4")));
    }
    let mut shape = [1; 4];
    for extent in shape.iter_mut().take(rank as usize) {
        *extent = cursor.u64(&what)?;
    }
    let id = cursor.u32(&what)?;
    let kind = GgmlType::from_id(id).ok_or_else(|| {
        Error::Gguf(format!("{what}: unknown element type {id} at offset {}", cursor.offset() - 4))
    })?;
    Ok(Entry { name, kind, shape, rank: rank as u8, offset: cursor.u64(&what)? })
}

impl Entry {
    fn place(&self, start: u64, alignment: u64, file: usize) -> Result<TensorInfo> {
        let Self { name, kind, shape, rank, offset } = self;
        let bytes = kind.bytes(shape).ok_or_else(|| {
            let block = kind.block().0;
            Error::Gguf(format!(
                "tensor `{name}`: shape {shape:?} overflows or its rows are no multiple of {block}"
            ))
        })?;
        if offset % alignment != 0 {
            return Err(Error::Gguf(format!(
                "tensor `{name}`: offset {offset} is no multiple of {alignment}"
            )));
        }
        let outside = || {
            Error::Gguf(format!(
                "tensor `{name}`: {bytes} bytes at offset {} lie outside the file of {file} bytes (truncated download?)",
                start.saturating_add(*offset)
            ))
        };
        let first = start.checked_add(*offset).ok_or_else(outside)?;
        let end = first.checked_add(bytes).filter(|&end| end <= file as u64).ok_or_else(outside)?;
        Ok(TensorInfo {
            kind: *kind,
            shape: *shape,
            rank: *rank,
            range: first as usize..end as usize,
        })
    }
}

impl Gguf {
    /// Format version, 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Every metadata entry, by key.
    pub fn metadata(&self) -> &BTreeMap<String, Value> {
        &self.metadata
    }

    /// Every tensor, by name.
    pub fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    /// A metadata value read through `pick`; `None` when the key is absent.
    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        pick: fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        pick(value).map(Some).ok_or_else(|| {
            Error::Gguf(format!("`{key}` is {}, expected {expected}", value.describe()))
        })
    }

    /// A whole number that is not negative, of any stored width.
    pub fn uint(&self, key: &str) -> Result<Option<u64>> {
        self.typed(key, "a whole number that is not negative", Value::as_uint)
    }

    /// A float of either width.
    pub fn float(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a float", Value::as_float)
    }

    /// A truth value.
    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "a bool", Value::as_bool)
    }

    /// A string.
    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", Value::as_str)
    }

    /// An array of strings.
    pub fn texts(&self, key: &str) -> Result<Option<&[String]>> {
        self.typed(key, "an array of strings", Value::as_strings)
    }

    /// An array of i32.
    pub fn ints(&self, key: &str) -> Result<Option<&[i32]>> {
        self.typed(key, "an array of i32", Value::as_i32s)
    }

    /// An array of f32.
    pub fn floats(&self, key: &str) -> Result<Option<&[f32]>> {
        self.typed(key, "an array of f32", Value::as_f32s)
    }
}
