//! Many tokens: 16 rows are decoded to a panel once and meet all tokens, eight at a time.

use super::kind::{Quant, Weights};
use super::out::Out;
use super::panel::{Codes, Lanes, ROWS, with_scratch};
use super::q8::{BLOCK, Block, GROUP, row_blocks};
use crate::simd::Level;
use std::ops::Range;

/// Results of one panel for one group of tokens.
pub(super) type Tile = [[f32; ROWS]; GROUP];

/// `y[.., rows]` for all tokens of `x` (`[n, cols]`); `rows` is at most a panel.
pub(super) fn rows(
    level: Level,
    weights: &Weights<'_>,
    rows: Range<usize>,
    x: &[f32],
    q: Option<&[Block<GROUP>]>,
    y: &Out<'_>,
) {
    let cols = weights.cols();
    let tokens = x.len() / cols;
    with_scratch(|scratch| match (q, weights.kind().quant()) {
        (Some(q), Some(quant)) => {
            scratch.unpack_panel(level, weights, rows.clone(), quant.group);
            for (group, q) in q.chunks_exact(row_blocks(cols)).enumerate() {
                let first = group * GROUP;
                let tile = integer_tile(level, quant, &scratch.codes, q, tokens - first);
                store(y, first..tokens.min(first + GROUP), &rows, &tile);
            }
        }
        _ => {
            scratch.decode_panel(level, weights, rows.clone());
            for (group, x) in x.chunks(GROUP * cols).enumerate() {
                let first = group * GROUP;
                let tile = float_tile(level, &scratch.floats, x);
                store(y, first..tokens.min(first + GROUP), &rows, &tile);
            }
        }
    });
}

fn store(y: &Out<'_>, tokens: Range<usize>, rows: &Range<usize>, tile: &Tile) {
    for (token, values) in tokens.zip(tile) {
        // SAFETY: rows of different units are disjoint.
        unsafe { y.put(token, rows.start, &values[..rows.len()]) };
    }
}

/// `tokens` may be fewer than a group: the rest of the tile is then unspecified.
fn integer_tile(
    level: Level,
    quant: Quant,
    codes: &Codes,
    q: &[Block<GROUP>],
    tokens: usize,
) -> Tile {
    match level.usable() {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => super::x86::gemm512::integer_tile(quant, codes, q, tokens),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => super::x86::avx2::integer_tile(quant, codes, q, tokens),
        _ => integer_tile_plain(quant, codes, q),
    }
}

/// `x` is `[up to GROUP, cols]`.
fn float_tile(level: Level, floats: &[Lanes<f32>], x: &[f32]) -> Tile {
    match level.usable() {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => super::x86::gemm512::float_tile(floats, x),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => super::x86::avx2::float_tile(floats, x),
        _ => float_tile_plain(floats, x),
    }
}

fn integer_tile_plain(quant: Quant, codes: &Codes, q: &[Block<GROUP>]) -> Tile {
    let mut tile = [[0f32; ROWS]; GROUP];
    let per_block = BLOCK / quant.group;
    let words = codes.words.chunks_exact(quant.group / 4);
    let groups = words.zip(codes.scale.iter().zip(&codes.offset));
    for (at, (words, (scale, offset))) in groups.enumerate() {
        let (block, part) = (&q[at / per_block], at % per_block);
        let neg = if per_block == 2 { block.neg_half[part] } else { block.neg };
        for (token, sums) in tile.iter_mut().enumerate() {
            let mut dot = [quant.bias * neg[token]; ROWS];
            for (word, q) in words.iter().zip(&block.q[part * 4..]) {
                let q = q[token].map(i32::from);
                for (dot, word) in dot.iter_mut().zip(&word.0) {
                    let codes = word.to_le_bytes().map(i32::from);
                    *dot += codes[0] * q[0] + codes[1] * q[1] + codes[2] * q[2] + codes[3] * q[3];
                }
            }
            for row in 0..ROWS {
                let scaled = dot[row] as f32 * block.d[token] * scale.0[row];
                sums[row] += scaled + offset.0[row] * block.dsum[token];
            }
        }
    }
    tile
}

fn float_tile_plain(floats: &[Lanes<f32>], x: &[f32]) -> Tile {
    let mut tile = [[0f32; ROWS]; GROUP];
    for (x, sums) in x.chunks_exact(floats.len()).zip(&mut tile) {
        for (column, x) in floats.iter().zip(x) {
            for (sum, w) in sums.iter_mut().zip(&column.0) {
                *sum += w * x;
            }
        }
    }
    tile
}
