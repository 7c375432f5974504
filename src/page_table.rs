//! Edits of page tables (see [`crate::pages`]) by a count that lives on the device.

/// `table` after the first `count` (at most all) of `edits`, pairs of index and entry; an index beyond the
/// table is skipped. Indices differ from one another.
#[must_use]
pub fn oracle(table: &[u32], edits: &[[u32; 2]], count: i32) -> Vec<u32> {
    let mut out = table.to_vec();
    for &[index, entry] in edits.iter().take(usize::try_from(count).unwrap_or(0)) {
        if let Some(slot) = usize::try_from(index).ok().and_then(|i| out.get_mut(i)) {
            *slot = entry;
        }
    }
    out
}

#[cfg(kvw_cuda)]
crate::launch::op! {
    /// Enqueue the CUDA kernel on `stream`.
    kvw_page_table, kvw_page_table_params, "page_table"
}
