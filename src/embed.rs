//! Token ids to rows of the embedding matrix.

use crate::error::{Error, Result};

/// Row `ids[t]` of `table` `[vocab, width]` for each token, `[T, width]`; zeros for ids outside the vocabulary.
///
/// # Errors
/// [`Error::Len`] when `table` is not whole rows.
pub fn oracle(table: &[f32], width: usize, ids: &[i32]) -> Result<Vec<f32>> {
    if width == 0 || !table.len().is_multiple_of(width) {
        let need = table.len().next_multiple_of(width.max(1));
        return Err(Error::Len { op: "embed", buffer: "table", need, got: table.len() });
    }
    let row = |&id: &i32| {
        let first = usize::try_from(id).ok().map(|id| id * width);
        let row = first.and_then(|first| table.get(first..first + width));
        row.map_or_else(|| vec![0.0; width], <[f32]>::to_vec)
    };
    Ok(ids.iter().flat_map(row).collect())
}

#[cfg(kvw_cuda)]
crate::launch::op! {
    /// Enqueue the CUDA kernel on `stream`.
    kvw_embed, kvw_embed_params, "embed"
}
