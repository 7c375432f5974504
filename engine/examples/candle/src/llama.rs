//! A Llama of a GGUF file, on candle's tensors.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use candle_core::quantized::tokenizer::TokenizerFromGguf;
use candle_core::quantized::{QMatMul, QTensor, gguf_file::Content};
use candle_core::{D, DType, Device, Module, Result, Tensor, bail};
use kvwarp::rope_select::{Scaling, inv_freq};
use tokenizers::Tokenizer;

use crate::attention::{Attention, Shape, Store};

struct Block {
    attn_norm: Tensor,
    q: QMatMul,
    k: QMatMul,
    v: QMatMul,
    attention: Attention,
    o: QMatMul,
    ffn_norm: Tensor,
    gate: QMatMul,
    up: QMatMul,
    down: QMatMul,
}

/// A model and one sequence.
pub struct Llama {
    pub tokenizer: Tokenizer,
    device: Device,
    shape: Shape,
    eps: f64,
    /// `[vocab, width]`
    embedding: Tensor,
    /// `[context, 1, head_dim / 2]`
    turns: [Tensor; 2],
    blocks: Vec<Block>,
    norm: Tensor,
    output: QMatMul,
    position: usize,
}

impl Llama {
    /// The model of a file, for at most `context` tokens that are kept as `store` says.
    pub fn open(path: &Path, store: Store, context: usize, device: &Device) -> Result<Self> {
        let mut file = File::open(path)?;
        let content = Content::read(&mut file)?;
        let field = |name: &str| match content.metadata.get(name) {
            Some(value) => Ok(value),
            None => bail!("{}: no {name}", path.display()),
        };
        let architecture = field("general.architecture")?.to_string()?;
        if architecture != "llama" || content.metadata.contains_key("llama.rope.scaling.type") {
            bail!("{}: {architecture:?}; supported: llama, without rope scaling", path.display());
        }
        let size = |name: &str| Ok::<_, candle_core::Error>(field(name)?.to_u32()? as usize);
        let q_heads = size("llama.attention.head_count")?;
        let head_dim = size("llama.embedding_length")? / q_heads;
        let kv_heads = size("llama.attention.head_count_kv")?;
        let shape = Shape { q_heads, kv_heads, head_dim, context };
        let eps = f64::from(field("llama.attention.layer_norm_rms_epsilon")?.to_f32()?);
        let theta = content.metadata.get("llama.rope.freq_base").map(|x| x.to_f32()).transpose()?;
        let tokenizer = Tokenizer::from_gguf(&content)?;

        let mut tensor = |name: &str| content.tensor(&mut file, &format!("{name}.weight"), device);
        let table = Arc::new(tensor("token_embd")?);
        let output = match content.tensor_infos.contains_key("output.weight") {
            true => QMatMul::from_qtensor(tensor("output")?)?,
            false => QMatMul::from_arc(table.clone())?,
        };
        let norm = tensor("output_norm")?.dequantize(device)?;
        let block = |n| Block::new(n, &mut tensor, Attention::new(store, shape, device)?, device);
        let blocks = (0..size("llama.block_count")?).map(block).collect::<Result<_>>()?;
        let freq = inv_freq(theta.unwrap_or(1e4).into(), head_dim, Scaling::None);
        let angles = Tensor::arange(0, context as u32, device)?.to_dtype(DType::F32)?;
        let angles = angles.reshape((context, 1, 1))?;
        let angles =
            angles.broadcast_mul(&Tensor::new(freq, device)?.reshape((1, 1, head_dim / 2))?)?;
        Ok(Self {
            tokenizer,
            device: device.clone(),
            shape,
            eps,
            embedding: table.dequantize(device)?,
            turns: [angles.cos()?, angles.sin()?],
            blocks,
            norm,
            output,
            position: 0,
        })
    }

    /// Reads `tokens` after those before; the logits that follow the last of them.
    pub fn forward(&mut self, tokens: &[u32]) -> Result<Tensor> {
        let (n, Shape { q_heads, kv_heads, head_dim, context }) = (tokens.len(), self.shape);
        if n == 0 || self.position + n > context {
            bail!("tokens: {n} after {}; supported: 1 and more, {context} in all", self.position);
        }
        let turns = [0, 1].map(|i| self.turns[i].narrow(0, self.position, n));
        let [Ok(cos), Ok(sin)] = turns else { bail!("position: beyond the context") };
        self.position += n;
        let ids = Tensor::new(tokens, &self.device)?;
        let mut x = self.embedding.index_select(&ids, 0)?;
        // What the kernels of a GPU read.
        let kind = if self.device.is_cuda() { DType::F16 } else { DType::F32 };
        for block in &self.blocks {
            let h = rms_norm(&x, &block.attn_norm, self.eps)?;
            let heads = |m: &QMatMul, heads| m.forward(&h)?.reshape((n, heads, head_dim));
            let q = rotate(&heads(&block.q, q_heads)?, &cos, &sin)?.to_dtype(kind)?;
            let k = rotate(&heads(&block.k, kv_heads)?, &cos, &sin)?.to_dtype(kind)?;
            let v = heads(&block.v, kv_heads)?.to_dtype(kind)?;
            let mixed = q.apply_op3_no_bwd(&k, &v, &block.attention)?.to_dtype(DType::F32)?;
            x = (x + block.o.forward(&mixed)?)?;
            let h = rms_norm(&x, &block.ffn_norm, self.eps)?;
            let gated = (block.gate.forward(&h)?.silu()? * block.up.forward(&h)?)?;
            x = (x + block.down.forward(&gated)?)?;
        }
        let last = x.narrow(0, n - 1, 1)?;
        self.output.forward(&rms_norm(&last, &self.norm, self.eps)?)?.squeeze(0)
    }

    /// Reads `prompt` and says the `n` most probable tokens, one after another.
    pub fn greedy(&mut self, prompt: &[u32], n: usize) -> Result<Vec<u32>> {
        let (mut next, mut said) = (prompt.to_vec(), Vec::with_capacity(n));
        while said.len() < n {
            let token = self.forward(&next)?.argmax(D::Minus1)?.to_scalar::<u32>()?;
            said.push(token);
            next = vec![token];
        }
        Ok(said)
    }

    /// Bytes of the cache in use.
    pub fn cache_bytes(&self) -> usize {
        self.blocks.iter().map(|block| block.attention.bytes()).sum()
    }
}

impl Block {
    fn new(
        n: usize,
        tensor: &mut impl FnMut(&str) -> Result<QTensor>,
        attention: Attention,
        device: &Device,
    ) -> Result<Self> {
        let mut part = |name: &str| tensor(&format!("blk.{n}.{name}"));
        let [attn_norm, ffn_norm] =
            [part("attn_norm")?, part("ffn_norm")?].map(|x| x.dequantize(device));
        let mut matrix = |name| QMatMul::from_qtensor(part(name)?);
        Ok(Self {
            attn_norm: attn_norm?,
            q: matrix("attn_q")?,
            k: matrix("attn_k")?,
            v: matrix("attn_v")?,
            attention,
            o: matrix("attn_output")?,
            ffn_norm: ffn_norm?,
            gate: matrix("ffn_gate")?,
            up: matrix("ffn_up")?,
            down: matrix("ffn_down")?,
        })
    }
}

fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let mean = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?;
    x.broadcast_div(&mean.sqrt()?)?.broadcast_mul(weight)
}

/// Turns the pairs of channels `(2 i, 2 i + 1)` of `x` `[T, heads, D]`.
fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (tokens, heads, d) = x.dims3()?;
    let pairs = x.reshape((tokens, heads, d / 2, 2))?;
    let [a, b] = [0, 1].map(|i| pairs.narrow(3, i, 1)?.squeeze(3));
    let (a, b) = (a?, b?);
    let first = (a.broadcast_mul(cos)? - b.broadcast_mul(sin)?)?;
    let second = (a.broadcast_mul(sin)? + b.broadcast_mul(cos)?)?;
    Tensor::stack(&[first, second], 3)?.reshape((tokens, heads, d))
}
