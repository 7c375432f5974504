//! A small Llama, Mistral and Qwen2 engine on the kvwarp kernels.

pub mod chat;
pub mod config;
pub mod data;
pub mod error;
pub mod fetch;
pub mod gguf;
pub mod safetensors;
pub mod source;
pub mod tokenizer;
pub mod weights;
