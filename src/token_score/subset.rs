//! Log-sum-exps over a subset of slots on the CPU: attention without values, by rows.

use super::cpu::{OP, Scratch};
use crate::error::Result;
use crate::lanes::{self, Lanes};
use crate::paged_attn::slabs::Slab;
use crate::pages::HeadView;
use crate::prefill_attn::block::Block;
use crate::prefill_attn::chunk::{Chunk, Shape, check_len, unsupported};
use crate::prefill_attn::rows::{Blocked, Blocks};
use crate::prefill_attn::tile::Tile;
use crate::slab::TOKENS;
use crate::threads::Team;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Natural log-sum-exp of each row of `q` `[n, H * G, D]` over the slots that it may see of `seen`, ascending ranges
/// that do not overlap, the same for all heads: `out` `[n, H * G]`, minus infinity where a row sees none. KVzip's
/// softmax is over the sinks, a chunk and its repetition. `scale` 0 for `1 / sqrt(D)`.
///
/// # Errors
/// [`crate::Error::Len`] and [`crate::Error::Unsupported`], naming the argument that does not fit the others.
#[allow(clippy::too_many_arguments)]
pub fn lse(
    team: &Team,
    q: &[f32],
    n: usize,
    heads: &[HeadView<'_>],
    scale: f32,
    seen: &[Range<usize>],
    out: &mut [f32],
    scratch: &mut Scratch,
) -> Result<()> {
    let shape = Shape::of(OP, q, n, heads, scale)?;
    check_len(OP, "out", n * shape.q_heads, out.len())?;
    if !seen.is_sorted_by(|a, b| a.end <= b.start) {
        return unsupported(OP, "seen", seen.len(), "ascending ranges that do not overlap");
    }
    if n == 0 {
        return Ok(());
    }
    scratch.reserve(team.workers());
    let Scratch { level, parts, tiles } = scratch;
    let queries = shape.chunk(heads.len(), team.workers());
    let (tasks, part) = (n.div_ceil(queries), queries * shape.group);
    parts.resize(tasks * heads.len() * part, 0.0);
    // Late queries, which may see most, first.
    let todo = (0..tasks).rev().flat_map(|task| (0..heads.len()).map(move |h| (task, h)));
    let todo = Mutex::new(todo.zip(parts.chunks_exact_mut(part)));
    let take = || todo.lock().unwrap_or_else(PoisonError::into_inner).next();
    team.run(|worker, _| {
        let mut tile = tiles[worker].lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(((task, h), part)) = take() {
            let range = task * queries..n.min((task + 1) * queries);
            let rows = Chunk { shape: &shape, q, head: &heads[h], h, range };
            lanes::dispatch(*level, Blocks((Subset { rows, seen }, &mut *tile, part)));
        }
    });
    for (i, to) in out.chunks_exact_mut(shape.group).enumerate() {
        let (query, h) = (i / heads.len(), i % heads.len());
        let task = (tasks - 1 - query / queries) * heads.len() + h;
        to.copy_from_slice(&parts[task * part + query % queries * shape.group..][..shape.group]);
    }
    Ok(())
}

/// Some query rows of one kv head, and the slots that count.
struct Subset<'a> {
    rows: Chunk<'a>,
    seen: &'a [Range<usize>],
}

impl Blocked for (Subset<'_>, &mut Tile, &mut [f32]) {
    #[inline(always)]
    fn run<L: Lanes, const M: usize, const V: usize>(self, l: L) {
        let (Subset { rows: chunk, seen }, tile, lse) = self;
        let new = || Block::<M>::new(chunk.shape.head_dim, 0);
        let mut blocks: Vec<_> = (0..chunk.rows().div_ceil(M)).map(|_| new()).collect();
        (0..chunk.rows()).for_each(|row| chunk.put(row, &mut blocks[row / M].rows));
        let last = chunk.end(chunk.range.end - 1);
        for range in seen {
            for row in 0..chunk.rows() {
                blocks[row / M].rows.seen[row % M] =
                    (range.start, range.end.min(chunk.row_end(row)));
            }
            for i in range.start / TOKENS..range.end.min(last).div_ceil(TOKENS) {
                let Some(slab) = Slab::of(chunk.head, i) else { continue };
                tile.decode_keys(l, slab, chunk.head);
                for block in &mut blocks {
                    block.see::<L, V>(l, tile, slab.start);
                }
            }
        }
        for (row, lse) in lse[..chunk.rows()].iter_mut().enumerate() {
            *lse = blocks[row / M].lse(row % M);
        }
    }
}
