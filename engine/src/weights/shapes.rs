//! The tensors that a configuration calls for.

use crate::config::Config;

/// A tensor that must be there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expected {
    /// Our name.
    pub name: String,
    /// Rows, 1 for a vector.
    pub rows: usize,
    /// Elements of a row.
    pub cols: usize,
}

/// Every tensor of a model of this shape, in the order of the forward pass.
pub fn expected(config: &Config) -> impl Iterator<Item = Expected> {
    let (width, vocab) = (config.width, config.vocab);
    let head = [("token_embd", vocab, width)].into_iter();
    let tail = [("output_norm", 1, width), ("output", vocab, width)];
    let tail = tail.into_iter().take(if config.tied_embeddings { 1 } else { 2 });
    let plain =
        |(name, rows, cols): (&str, usize, usize)| Expected { name: name.to_owned(), rows, cols };
    let blocks = (0..config.layers).flat_map(move |n| block(config, n));
    head.map(plain).chain(blocks).chain(tail.map(plain))
}

fn block(config: &Config, n: usize) -> impl Iterator<Item = Expected> {
    let Config { width, ffn, heads, kv_heads, head_dim, .. } = *config;
    let (q, kv) = (heads * head_dim, kv_heads * head_dim);
    let weights = [
        ("attn_norm", 1, width),
        ("attn_q", q, width),
        ("attn_k", kv, width),
        ("attn_v", kv, width),
        ("attn_output", width, q),
        ("ffn_norm", 1, width),
        ("ffn_gate", ffn, width),
        ("ffn_up", ffn, width),
        ("ffn_down", width, ffn),
    ];
    let biases = [("attn_q.bias", 1, q), ("attn_k.bias", 1, kv), ("attn_v.bias", 1, kv)];
    let biases = biases.into_iter().take(if config.qkv_bias { 3 } else { 0 });
    let named = move |(name, rows, cols)| Expected { name: format!("blk.{n}.{name}"), rows, cols };
    weights.into_iter().chain(biases).map(named)
}
