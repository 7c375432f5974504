//! A quantised Llama of candle whose attention and KV cache are kvwarp's.
//!
//! [`Attention`] is the part to take into another model: an op of candle that keeps the keys and values of a layer in
//! slabs and attends to them where they lie. [`Llama`] is what candle-transformers' `quantized_llama` would be, had it a
//! place for it.

mod attention;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod llama;

pub use attention::{Attention, Shape, Store};
pub use llama::Llama;
