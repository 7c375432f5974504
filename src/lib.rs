//! Kernels for compressed KV caches: CUDA sources behind a plain C ABI, and a fast CPU path for each.
//!
//! A cache is made of *slabs* ([`slab`]): 64 tokens of one kv head, K and V together, in f16, 4 or 2 bits, found
//! through a page table whose entries carry the format ([`pages`]). One module a kernel family; each has the
//! f64 `oracle` that gives its meaning and, where an engine needs it without a GPU, a `cpu` path.
#![deny(unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]
#![warn(missing_docs)]

#[cfg(kvw_cuda)]
mod cabi;
pub mod device;
pub mod embed;
mod error;
pub mod exp;
#[allow(non_camel_case_types, missing_docs, rustdoc::all)]
#[allow(clippy::all, clippy::undocumented_unsafe_blocks)]
#[rustfmt::skip]
pub mod ffi;
pub mod hadamard;
pub mod head_linear;
pub mod kernels;
pub mod kv_gather;
pub mod kv_pack;
mod lanes;
#[cfg(kvw_cuda)]
mod launch;
pub mod linear;
pub mod lowrank_kv;
pub mod page_table;
pub mod paged_attn;
pub mod pages;
pub mod prefill_attn;
mod range;
mod rank;
pub mod rms_norm;
pub mod rope_select;
pub mod sample;
pub mod sim_evict;
pub mod simd;
pub mod slab;
pub mod swiglu;
pub mod threads;
pub mod token_score;
pub mod token_select;
#[cfg(any(feature = "cudarc", feature = "cust"))]
pub mod view;

pub use error::{Error, Result};

/// A page whose program is a doctest: it runs where there is a device.
#[cfg(all(doctest, kvw_cuda, feature = "cudarc"))]
#[doc = include_str!("../csrc/link/rust.md")]
mod page {}
