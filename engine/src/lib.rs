//! A small Llama, Mistral and Qwen2 engine on the kvwarp kernels.

pub mod batch;
pub mod bench;
pub mod cache;
pub mod calibration;
pub mod chat;
pub mod cli;
pub mod config;
pub mod data;
pub mod error;
pub mod fetch;
pub mod generate;
pub mod gguf;
pub mod gpu;
pub mod lookup;
pub mod model;
pub mod perplexity;
pub mod policy;
pub mod profile;
pub mod runner;
pub mod safetensors;
pub mod source;
pub mod spec;
pub mod store;
pub mod tokenizer;
pub mod watch;
pub mod weights;
