//! Tensor table of a safetensors file.

use std::collections::BTreeMap;
use std::ops::Range;

use safetensors::{Dtype, SafeTensors};

use crate::error::{Error, Result};
use crate::gguf::GgmlType;

/// Longest header accepted, bytes; 1,000 times that of a model with 300 tensors.
const MAX_HEADER: u64 = 32 << 20;

/// One tensor of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Element type: F32, F16 or BF16.
    pub kind: GgmlType,
    /// Extents, slowest first.
    pub shape: Vec<usize>,
    /// Bytes of the data in the file.
    pub range: Range<usize>,
}

/// Parses the header of `bytes`, which must be the whole file; tensors by name.
///
/// # Errors
/// [`Error::Safetensors`] naming the tensor or the part that is malformed, truncated or of an
/// unsupported type.
pub fn parse(bytes: &[u8]) -> Result<BTreeMap<String, TensorInfo>> {
    let length = bytes.first_chunk::<8>().map(|first| u64::from_le_bytes(*first));
    let left = bytes.len().saturating_sub(8) as u64;
    match length {
        None => {
            return Err(Error::Safetensors(format!(
                "the file has {} bytes, fewer than 8",
                bytes.len()
            )));
        }
        Some(length) if length > MAX_HEADER || length > left => {
            return Err(Error::Safetensors(format!(
                "header length {length} at offset 0: {left} bytes are left and at most {MAX_HEADER} are accepted \
                 (truncated download, or no safetensors file?)"
            )));
        }
        Some(_) => {}
    }
    let (header, metadata) = SafeTensors::read_metadata(bytes)
        .map_err(|e| Error::Safetensors(format!("{e} (file of {} bytes)", bytes.len())))?;
    let start = 8 + header;
    let entry = |(name, info): (String, &safetensors::tensor::TensorInfo)| {
        let kind = kind(info.dtype).ok_or_else(|| {
            let dtype = info.dtype;
            Error::Safetensors(format!(
                "tensor `{name}` has type {dtype:?}; F32, F16 and BF16 are supported"
            ))
        })?;
        let (from, to) = info.data_offsets;
        Ok((name, TensorInfo { kind, shape: info.shape.clone(), range: start + from..start + to }))
    };
    metadata.tensors().into_iter().map(entry).collect()
}

/// What the header of `bytes` says under `key`.
pub fn metadata(bytes: &[u8], key: &str) -> Option<String> {
    let (_, header) = SafeTensors::read_metadata(bytes).ok()?;
    header.metadata().as_ref()?.get(key).cloned()
}

fn kind(dtype: Dtype) -> Option<GgmlType> {
    match dtype {
        Dtype::F32 => Some(GgmlType::F32),
        Dtype::F16 => Some(GgmlType::F16),
        Dtype::BF16 => Some(GgmlType::BF16),
        _ => None,
    }
}
