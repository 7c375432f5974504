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
    let keys_values = match &config.elite {
        None => vec![("attn_k", kv, width), ("attn_v", kv, width)],
        Some(elite) => {
            let (k, latent) = (2 * elite.pairs * kv_heads, elite.ranks[n]);
            let (a, b) = (("attn_kv_a", latent, width), ("attn_v_b", kv, latent));
            let rest = (kv > k).then_some(("attn_k_b", kv - k, latent));
            [("attn_k", k, width), a].into_iter().chain(rest).chain([b]).collect()
        }
    };
    let projections = [("attn_q", q, width)].into_iter().chain(keys_values);
    let biased = |name: &str| config.qkv_bias && name != "attn_kv_a";
    let weights = projections.clone().chain([
        ("attn_output", width, q),
        ("ffn_gate", ffn, width),
        ("ffn_up", ffn, width),
        ("ffn_down", width, ffn),
    ]);
    let weights = weights.map(|(name, rows, cols)| (name.to_owned(), rows, cols));
    let biases = projections.filter(move |(name, ..)| biased(name));
    let biases = biases.map(|(name, rows, _)| (format!("{name}.bias"), 1, rows));
    let norms = ["attn_norm", "ffn_norm"].map(|name| (name.to_owned(), 1, width));
    let named = move |(name, rows, cols)| Expected { name: format!("blk.{n}.{name}"), rows, cols };
    let all: Vec<_> = norms.into_iter().chain(weights).chain(biases).map(named).collect();
    all.into_iter()
}
