//! Causal attention of a chunk of queries over slabs that already hold the chunk's own keys and values.
//!
//! The `n` query rows are the newest `n` tokens of the sequence: row `i` is token `len - n + i` and sees the
//! tokens before it and itself. The chunk's own K and V are f16 slabs in the ring (a long staging ring, `packed`
//! explicit); what came before lies behind the page table, in any format.

pub(crate) mod block;
pub(crate) mod chunk;
mod cpu;
mod oracle;
pub(crate) mod rows;
pub(crate) mod tile;

pub use crate::paged_attn::Mask;
pub use cpu::{LseRows, Scratch, cpu};
pub use oracle::oracle;

#[cfg(kvw_cuda)]
crate::launch::op! {
    /// Enqueue the CUDA kernel on `stream`.
    kvw_prefill_attn, kvw_prefill_attn_params, "prefill_attn"
}
