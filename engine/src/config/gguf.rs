//! GGUF metadata to [`Config`].

use super::{Arch, Config, Pairing, Rope, Scaling, extent};
use crate::error::{Error, Result};
use crate::gguf::{Array, GgmlType, Gguf, Value};

/// Metadata under the architecture's own prefix, such as `llama.block_count`.
struct Keys<'a> {
    file: &'a Gguf,
    prefix: &'a str,
}

pub fn config(file: &Gguf, data: &[u8]) -> Result<Config> {
    let prefix =
        file.text("general.architecture")?.ok_or_else(|| missing("general.architecture"))?;
    let (arch, pairing) = match prefix {
        "llama" => (Arch::Llama, Pairing::Interleaved),
        "qwen2" => (Arch::Qwen2, Pairing::HalfSplit),
        other => {
            let name: String = other.chars().take(64).collect();
            return Err(Error::Config(format!(
                "architecture `{name}` is not supported (llama and qwen2 are)"
            )));
        }
    };
    let keys = Keys { file, prefix };
    keys.refuse_unsupported()?;
    let heads = keys.extent("attention.head_count")?;
    let width = keys.extent("embedding_length")?;
    let head_dim = keys.head_dim(width, heads)?;
    Ok(Config {
        arch,
        name: file.text("general.name")?.unwrap_or_default().to_owned(),
        layers: keys.extent("block_count")?,
        width,
        heads,
        kv_heads: keys.optional_extent("attention.head_count_kv")?.unwrap_or(heads),
        head_dim,
        ffn: keys.extent("feed_forward_length")?,
        vocab: vocab(file)?,
        context: keys.extent("context_length")?,
        rms_eps: keys
            .float("attention.layer_norm_rms_epsilon")?
            .ok_or_else(|| missing(&format!("{prefix}.attention.layer_norm_rms_epsilon")))?
            as f32,
        rope: Rope {
            theta: keys.float("rope.freq_base")?.unwrap_or(1e4) as f32,
            pairing,
            scaling: keys.scaling()?,
            factors: factors(file, data)?,
        },
        sliding_window: keys.optional_extent("attention.sliding_window")?,
        tied_embeddings: !file.tensors().contains_key("output.weight"),
        qkv_bias: file.tensors().contains_key("blk.0.attn_q.bias"),
        elite: None,
    })
}

fn missing(key: &str) -> Error {
    Error::Config(format!("the GGUF metadata has no `{key}`"))
}

/// Rows of the embedding: the slower of its two extents.
fn vocab(file: &Gguf) -> Result<usize> {
    let embedding = file.tensors().get("token_embd.weight");
    let embedding =
        embedding.ok_or_else(|| Error::Weights("tensor `token_embd.weight` is missing".into()))?;
    extent("rows of token_embd.weight", embedding.shape[1])
}

/// Frequency divisors that the file stores as a tensor.
fn factors(file: &Gguf, data: &[u8]) -> Result<Option<Vec<f32>>> {
    let Some(info) = file.tensors().get("rope_freqs.weight") else { return Ok(None) };
    if info.kind != GgmlType::F32 {
        return Err(Error::Config(format!(
            "rope_freqs.weight has type {:?}, expected F32",
            info.kind
        )));
    }
    let outside = || Error::Config("rope_freqs.weight lies outside the bytes given".into());
    let bytes = data.get(info.range.clone()).ok_or_else(outside)?;
    Ok(Some(bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect()))
}

impl Keys<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.prefix)
    }

    fn extent(&self, name: &str) -> Result<usize> {
        self.optional_extent(name)?.ok_or_else(|| missing(&self.key(name)))
    }

    /// A count given as one number, or as an array with the same number for every layer.
    fn optional_extent(&self, name: &str) -> Result<Option<usize>> {
        let key = self.key(name);
        if let Some(Value::Array(Array::I32(values))) = self.file.metadata().get(&key) {
            let first = values.first().copied().unwrap_or(0);
            if values.iter().any(|&v| v != first) {
                return Err(Error::Config(format!(
                    "`{key}` differs from layer to layer, which is not supported"
                )));
            }
            return extent(&key, first.try_into().unwrap_or(0)).map(Some);
        }
        self.file.uint(&key)?.map(|value| extent(&key, value)).transpose()
    }

    fn float(&self, name: &str) -> Result<Option<f64>> {
        self.file.float(&self.key(name))
    }

    /// Head size: given, or width over heads; keys, values and rotation must agree on it.
    fn head_dim(&self, width: usize, heads: usize) -> Result<usize> {
        let head_dim = match self.optional_extent("attention.key_length")? {
            Some(given) => given,
            None if width.is_multiple_of(heads) => width / heads,
            None => {
                return Err(Error::Config(format!(
                    "width {width} is no multiple of {heads} heads"
                )));
            }
        };
        for name in ["attention.value_length", "rope.dimension_count"] {
            match self.optional_extent(name)? {
                Some(other) if other != head_dim => {
                    let key = self.key(name);
                    return Err(Error::Config(format!(
                        "`{key}` is {other}; only the head size {head_dim} is supported"
                    )));
                }
                _ => {}
            }
        }
        Ok(head_dim)
    }

    fn scaling(&self) -> Result<Scaling> {
        let key = self.key("rope.scaling.type");
        let factor = match self.float("rope.scaling.factor")? {
            Some(factor) => Some(factor),
            None => self.float("rope.scale_linear")?,
        };
        match (self.file.text(&key)?, factor) {
            (Some("none"), _) | (None, None | Some(1.0)) => Ok(Scaling::None),
            (Some("linear") | None, Some(factor)) => Ok(Scaling::Linear { factor }),
            (Some("linear"), None) => Err(missing(&self.key("rope.scaling.factor"))),
            (Some(other), _) => {
                let name: String = other.chars().take(64).collect();
                Err(Error::Config(format!("`{key}` is `{name}` (none and linear are supported)")))
            }
        }
    }

    /// Parts of a model that no kernel here computes.
    fn refuse_unsupported(&self) -> Result<()> {
        let key = self.key("expert_count");
        if let Some(experts @ 1..) = self.file.uint(&key)? {
            return Err(Error::Config(format!(
                "`{key}` is {experts}: mixtures of experts are not supported"
            )));
        }
        let unsupported = [
            ("blk.0.attn_q_norm.weight", "query and key norms"),
            ("blk.0.attn_output.bias", "an output projection bias"),
            ("blk.0.ffn_gate_inp.weight", "mixtures of experts"),
            ("blk.0.ffn_up.bias", "feed-forward biases"),
            ("output.bias", "an output bias"),
        ];
        match unsupported.iter().find(|(tensor, _)| self.file.tensors().contains_key(*tensor)) {
            Some((tensor, what)) => {
                Err(Error::Config(format!("tensor `{tensor}`: {what} are not supported")))
            }
            None => Ok(()),
        }
    }
}
