//! Writing the cache: tokens go into the ring as f16, and a slab that leaves the window is packed.
//!
//! The ring holds f16 slabs; token `slot` lies in ring slab `slot / 64 % ring_slabs`. What is quantised is
//! what the ring holds, so a packed slab depends on nothing but its 64 tokens, its format and its group.
//!
//! [`boundaries`] and [`advance`] are KIVI's own schedule (arXiv:2402.02750) on the same slabs: K is quantised
//! `window` tokens at a time, V one token a step, straight into the table's slab, and the ring's copy becomes
//! the dequantised value. Attention reads the ring until both halves of a slab are complete, as always.

mod cpu;
mod kivi;
mod quantise;
mod rounded;

pub use cpu::{Rows, append, fill, pack, pack_at, pack_rounded, step};
pub use kivi::{advance, boundaries};

#[cfg(kvw_cuda)]
crate::launch::op! {
    /// Enqueue the CUDA kernel on `stream`.
    kvw_kv_pack, kvw_kv_pack_params, "kv_pack"
}
