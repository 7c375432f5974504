//! A model whose matrices are in blocks.

use std::path::Path;

use kvwarp_engine::source::Source;

use crate::simt;
use crate::support::{self, Tensor};

/// A random model in a GGUF file: blocks of three kinds, neighbouring channels rotated together.
pub fn in_blocks(folder: &Path) -> Source {
    let matrix = |name: &str, cols: u64, rows: u64, kind: u32, scale: f32| {
        let words = simt::random_words(rows + name.len() as u64, (cols * rows) as usize);
        let scale = half::f16::from_f32(scale).to_le_bytes();
        let block = |codes: &[u32]| {
            let bytes = codes.iter().map(|&word| (word >> 24) as u8);
            let codes: Vec<u8> = bytes.take(if kind == 8 { 32 } else { 16 }).collect();
            let minimum = half::f16::from_f32(-0.3).to_le_bytes();
            let minimum = if kind == 3 { &minimum[..] } else { &[] };
            [&scale[..], minimum, &codes].concat()
        };
        let data = words.chunks(32).flat_map(block).collect();
        Tensor { name: format!("{name}.weight"), shape: vec![cols, rows], kind, data }
    };
    let norm = |name: &str| {
        let data = std::iter::repeat_n(1f32.to_le_bytes(), 128).flatten().collect();
        Tensor { name: format!("{name}.weight"), shape: vec![128], kind: 0, data }
    };
    let (q8, q4) = (8, 2);
    let tensors = [
        matrix("token_embd", 128, 160, q8, 0.01),
        norm("blk.0.attn_norm"),
        matrix("blk.0.attn_q", 128, 128, q4, 0.03),
        matrix("blk.0.attn_k", 128, 64, q4, 0.03),
        matrix("blk.0.attn_v", 128, 64, q8, 0.002),
        matrix("blk.0.attn_output", 128, 128, q8, 0.002),
        norm("blk.0.ffn_norm"),
        matrix("blk.0.ffn_gate", 128, 64, 3, 0.04),
        matrix("blk.0.ffn_up", 128, 64, 3, 0.04),
        matrix("blk.0.ffn_down", 64, 128, q8, 0.002),
        norm("output_norm"),
        matrix("output", 128, 160, q4, 0.03),
    ];
    let path = folder.join("blocks.gguf");
    std::fs::write(&path, support::gguf(&support::model_metadata("llama"), &tensors)).unwrap();
    Source::open(&path).unwrap()
}
