//! Shape and constants of a model, from GGUF metadata or from a Hugging Face `config.json`.

mod elite;
mod gguf;
mod hf;
mod rope;

use crate::error::{Error, Result};
pub use elite::Elite;
pub use rope::{Pairing, Rope, Scaling};

/// Head sizes for which kernels exist.
pub const HEAD_DIMS: [usize; 4] = [64, 96, 128, 256];
/// Largest value accepted for a count or an extent: keeps every product of two in 64 bits.
const MAX_EXTENT: u64 = 1 << 24;

/// Model family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Arch {
    Llama,
    Mistral,
    Qwen2,
}

/// Everything about a model but its weights and vocabulary.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Model family; a Mistral in a GGUF file calls itself Llama.
    pub arch: Arch,
    /// Name the file gives the model; may be empty.
    pub name: String,
    /// Transformer blocks.
    pub layers: usize,
    /// Width of the residual stream.
    pub width: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements of one head: 64, 96, 128 or 256.
    pub head_dim: usize,
    /// Width of the feed-forward layer.
    pub ffn: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Positions the model was trained for.
    pub context: usize,
    /// Added to the mean square in every RMS norm.
    pub rms_eps: f32,
    /// Rotary embedding.
    pub rope: Rope,
    /// Tokens a query sees, itself included; `None` sees all.
    pub sliding_window: Option<usize>,
    /// The output matrix is the token embedding.
    pub tied_embeddings: bool,
    /// The q, k and v projections have biases.
    pub qkv_bias: bool,
    /// Of a model that [`crate::convert`] has made.
    pub elite: Option<Elite>,
}

impl Config {
    /// From the metadata and tensor names of a GGUF file whose bytes are `data`.
    ///
    /// # Errors
    /// [`Error::Config`] naming the key, its value and what is supported.
    pub fn from_gguf(file: &crate::gguf::Gguf, data: &[u8]) -> Result<Self> {
        gguf::config(file, data)?.checked()
    }

    /// From the text of a Hugging Face `config.json`.
    ///
    /// # Errors
    /// [`Error::Config`] naming the field, its value and what is supported.
    pub fn from_json(text: &str) -> Result<Self> {
        hf::config(text)?.checked()
    }

    /// Query heads that share one key and value head.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Refuses what the kernels and the cache cannot run.
    fn checked(self) -> Result<Self> {
        let Self { heads, kv_heads, head_dim, .. } = self;
        if !HEAD_DIMS.contains(&head_dim) {
            return Err(Error::Config(format!(
                "head size {head_dim} is not supported (64, 96, 128 and 256 are)"
            )));
        }
        if !heads.is_multiple_of(kv_heads) {
            return Err(Error::Config(format!(
                "{heads} query heads are no multiple of {kv_heads} key and value heads"
            )));
        }
        if !(self.rms_eps > 0.0 && self.rms_eps < 1.0) {
            return Err(Error::Config(format!(
                "RMS norm epsilon {} lies outside 0 to 1",
                self.rms_eps
            )));
        }
        self.rope.check(head_dim)?;
        if let Some(elite) = &self.elite {
            elite.check(&self)?;
        }
        Ok(self)
    }
}

/// `value` as an extent: at least 1 and small enough that products cannot overflow.
fn extent(field: &str, value: u64) -> Result<usize> {
    if !(1..=MAX_EXTENT).contains(&value) {
        return Err(Error::Config(format!("`{field}` is {value}, expected 1 to {MAX_EXTENT}")));
    }
    Ok(value as usize)
}
