//! Tokens that an eviction leaves, gathered: f16 rows of slabs move to the front of a ring.
//!
//! Slots ascend, so a token never moves to a later place, and one ring may be source and destination.

mod cpu;
mod oracle;

pub use cpu::{compact, cpu};
pub use oracle::oracle;

#[cfg(kvw_cuda)]
crate::launch::op! {
    /// Enqueue the CUDA kernel on `stream`.
    kvw_kv_gather, kvw_kv_gather_params, "kv_gather"
}
