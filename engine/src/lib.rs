//! A small Llama, Mistral and Qwen2 engine on the kvwarp kernels.

pub mod config;
pub mod error;
pub mod gguf;
pub mod tokenizer;
