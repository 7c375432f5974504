//! Blocks of a GGUF matrix in the order in which the CUDA kernels read them.

use super::blocks;
use super::kind::{WeightType, Weights};
use crate::simd::Level;

/// The bytes of `weights` as the kernels of `embed` and `linear` take them: planes, in the order that
/// `csrc/linear.h` gives, of as many bytes as the blocks have; float formats stay as they are.
#[must_use]
pub fn planes(weights: &Weights<'_>) -> Vec<u8> {
    let (kind, cols) = (weights.kind(), weights.cols());
    let rows = || (0..weights.rows()).map(|row| weights.row(row));
    let mut out = Vec::with_capacity(weights.bytes());
    if kind.quant().is_none() {
        rows().for_each(|row| out.extend_from_slice(row));
        return out;
    }
    let (mut codes, mut scale, mut offset) =
        (vec![0; cols], vec![0.0; cols / 16], vec![0.0; cols / 16]);
    let mut high = Vec::new();
    for row in rows() {
        blocks::unpack(Level::detect(), kind, row, &mut codes, &mut scale, &mut offset);
        match kind {
            WeightType::Q8_0 => codes.chunks(64).for_each(|run| bytes(run, &mut out)),
            _ => codes.chunks(128).for_each(|run| nibbles(run, columns(kind), &mut out)),
        }
        if kind == WeightType::Q6K {
            codes.chunks(256).for_each(|block| pairs(block, columns(kind), &mut high));
        }
    }
    out.append(&mut high);
    for &(first, end) in scales(kind) {
        for block in rows().flat_map(|row| row.chunks_exact(kind.block_bytes())) {
            out.extend_from_slice(&block[first..end]);
        }
    }
    out
}

/// Column, of 32, of code `k` of lane `q`.
type Columns = fn(q: usize, k: usize) -> usize;

fn columns(kind: WeightType) -> Columns {
    match kind {
        WeightType::Q6K => |q, k| k / 2 % 2 * 16 + 4 * q + k % 2 * 2 + k / 4,
        _ => |q, k| 8 * q + k % 4 * 2 + k / 4,
    }
}

/// First byte and end of what makes a plane each, in a block.
fn scales(kind: WeightType) -> &'static [(usize, usize)] {
    match kind {
        WeightType::Q4_1 => &[(0, 4)],
        WeightType::Q4K => &[(0, 16)],
        WeightType::Q6K => &[(192, 208), (208, 210)],
        _ => &[(0, 2)],
    }
}

/// Lane `q` of four and 32 number `j` of `n`.
fn lanes(n: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..4).flat_map(move |q| (0..n).map(move |j| (q, j)))
}

fn bytes(run: &[u8], out: &mut Vec<u8>) {
    for (q, j) in lanes(run.len() / 32) {
        let column = |k: usize| 32 * j + 8 * q + k / 4 * 4 + k % 2 * 2 + k / 2 % 2;
        out.extend((0..8).map(|k| run[column(k)] ^ 128));
    }
}

fn nibbles(run: &[u8], column: Columns, out: &mut Vec<u8>) {
    for (q, j) in lanes(run.len() / 32) {
        let nibble = |k: usize| u32::from(run[32 * j + column(q, k)] & 15) << (4 * k);
        out.extend((0..8).map(nibble).sum::<u32>().to_le_bytes());
    }
}

fn pairs(block: &[u8], column: Columns, out: &mut Vec<u8>) {
    for (q, i) in lanes(4) {
        let pair = |at: usize| {
            let (b, c, a) = (at / 8, at / 4 % 2, at % 4);
            let code = block[32 * (2 * i + c) + column(q, a + 4 * b)];
            u32::from(code >> 4) << (16 * b + 8 * c + 2 * a)
        };
        out.extend((0..16).map(pair).sum::<u32>().to_le_bytes());
    }
}
