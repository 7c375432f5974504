//! Scores of tokens on the CPU.
//!
//! A task is some consecutive slabs of one kv head. It decodes the keys of each once a chunk of query rows
//! ([`crate::prefill_attn::chunk`]), multiplies them with the blocks of rows and adds what comes out to sums of its own, so a
//! column's result does not depend on how slabs are shared out.

use super::Reduce;
use crate::error::Result;
use crate::lanes::{self, Lanes};
use crate::paged_attn::slabs::{RUN, Slab};
use crate::pages::HeadView;
use crate::prefill_attn::chunk::{Chunk, Shape, check_len, unsupported};
use crate::prefill_attn::rows::{Blocked, Blocks, Rows, Scores};
use crate::prefill_attn::tile::Tile;
use crate::simd::Level;
use crate::slab::TOKENS;
use crate::threads::Team;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

pub(super) const OP: &str = "token_score";

/// Buffers kept between calls.
pub struct Scratch {
    pub(super) level: Level,
    /// What tasks leave.
    pub(super) parts: Vec<f32>,
    pub(super) tiles: Vec<Mutex<Tile>>,
}

impl Default for Scratch {
    fn default() -> Self {
        Self::at(Level::detect())
    }
}

impl Scratch {
    /// Empty buffers for kernels of `level`, or of the best one below it that this CPU has.
    pub fn at(level: Level) -> Self {
        Self { level, parts: Vec::new(), tiles: Vec::new() }
    }

    pub(super) fn reserve(&mut self, workers: usize) {
        while self.tiles.len() < workers {
            self.tiles.push(Mutex::default());
        }
    }
}

/// Adds to the scores of slots `first[h]..first[h] + count` of each head what rows `q` `[n, H * G, D]` of natural
/// log-sum-exps `lse` `[n, H * G]` give them: `scores` `[H, G, count]` += sums, or `[H, count]` = the larger of the
/// score and the maximum. So rows may come in pieces. `scale` 0 for `1 / sqrt(D)`; a row whose log-sum-exp is minus
/// infinity gives nothing.
///
/// # Errors
/// [`crate::Error::Len`] and [`crate::Error::Unsupported`], naming the argument that does not fit the others.
#[allow(clippy::too_many_arguments)]
pub fn cpu(
    team: &Team,
    q: &[f32],
    n: usize,
    lse: &[f32],
    heads: &[HeadView<'_>],
    scale: f32,
    first: &[usize],
    count: usize,
    reduce: Reduce,
    scores: &mut [f32],
    scratch: &mut Scratch,
) -> Result<()> {
    let shape = Shape::of(OP, q, n, heads, scale)?;
    check_len(OP, "lse", n * shape.q_heads, lse.len())?;
    check_len(OP, "first", heads.len(), first.len())?;
    let columns = if reduce == Reduce::Sum { shape.group } else { 1 };
    if n == 0 || count == 0 {
        return Ok(());
    }
    check_len(OP, "scores", heads.len() * columns * count, scores.len())?;
    for (head, first) in heads.iter().zip(first) {
        if first.checked_add(count).is_none_or(|end| end > head.len) {
            return unsupported(
                OP,
                "first",
                *first,
                "slots that end within the length of their head",
            );
        }
    }
    scratch.reserve(team.workers());
    let Scratch { level, parts, tiles } = scratch;
    // Slabs that a head has in its range at most, and a task; four tasks a worker.
    let slabs = (count + TOKENS - 2) / TOKENS + 1;
    let run = (heads.len() * slabs / (4 * team.workers())).clamp(1, RUN);
    let part = columns * TOKENS;
    parts.clear();
    parts.resize(slabs.div_ceil(run) * heads.len() * run * part, 0.0);
    let todo = (0..slabs.div_ceil(run)).flat_map(|i| (0..heads.len()).map(move |h| (i, h)));
    let todo = Mutex::new(todo.zip(parts.chunks_exact_mut(run * part)));
    let take = || todo.lock().unwrap_or_else(PoisonError::into_inner).next();
    team.run(|worker, _| {
        let mut tile = tiles[worker].lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(((i, h), part)) = take() {
            let last = (first[h] + count).div_ceil(TOKENS);
            let start = first[h] / TOKENS + i * run;
            let rows = Chunk { shape: &shape, q, head: &heads[h], h, range: 0..n };
            let task = Columns { rows, lse, slabs: start..last.min(start + run), reduce };
            lanes::dispatch(*level, Blocks((task, &mut *tile, part)));
        }
    });
    team.each_chunk(scores, count, |row, scores| {
        let (h, column) = (row / columns, row % columns);
        for (i, score) in scores.iter_mut().enumerate() {
            let (slab, token) = ((first[h] % TOKENS + i) / TOKENS, (first[h] + i) % TOKENS);
            let at = (slab / run * heads.len() + h) * run + slab % run;
            let x = parts[at * part + column * TOKENS + token];
            *score = if reduce == Reduce::Sum { *score + x } else { score.max(x) };
        }
    });
    Ok(())
}

/// Some slabs of one kv head, and all its query rows.
struct Columns<'a> {
    rows: Chunk<'a>,
    lse: &'a [f32],
    slabs: Range<usize>,
    reduce: Reduce,
}

/// `M` rows, and their log-sum-exps, base 2.
type Shares<const M: usize> = (Rows<M>, [f32; M]);

impl Blocked for (Columns<'_>, &mut Tile, &mut [f32]) {
    /// Fills the part, `[slab][G]` or `[slab]` of 64 tokens.
    #[inline(always)]
    fn run<L: Lanes, const M: usize, const V: usize>(self, l: L) {
        let (task, tile, part) = self;
        let (rows, sum) = (&task.rows, task.reduce == Reduce::Sum);
        let columns = if sum { rows.shape.group } else { 1 };
        part.fill(if sum { 0.0 } else { f32::NEG_INFINITY });
        for start in rows.range.clone().step_by(rows.shape.most_queries()) {
            let range = start..rows.range.end.min(start + rows.shape.most_queries());
            let (last, chunk) = (rows.end(range.end - 1), Chunk { range, ..*rows });
            let blocks = task.blocks::<M>(&chunk);
            for (i, part) in task.slabs.clone().zip(part.chunks_exact_mut(columns * TOKENS)) {
                if i * TOKENS >= last {
                    break;
                }
                let Some(slab) = Slab::of(chunk.head, i) else { continue };
                tile.decode_keys(l, slab, chunk.head);
                for (b, (rows, lse)) in
                    blocks.iter().enumerate().filter(|(_, b)| b.0.see(slab.start))
                {
                    let scores = rows.scores::<L, V>(l, &tile.keys, slab.start);
                    task.add(l, b * M, &scores, lse, part);
                }
            }
        }
        if !sum {
            for x in part.as_chunks_mut::<16>().0 {
                l.put(x, exp2(l, l.get(x)));
            }
        }
    }
}

impl Columns<'_> {
    /// The rows in blocks, with their log-sum-exps; the last may have rows that see nothing.
    fn blocks<const M: usize>(&self, chunk: &Chunk<'_>) -> Vec<Shares<M>> {
        let new = || (Rows::new(chunk.shape.head_dim), [0.0; M]);
        let mut blocks: Vec<Shares<M>> = (0..chunk.rows().div_ceil(M)).map(|_| new()).collect();
        for row in 0..chunk.rows() {
            let (rows, of_block) = &mut blocks[row / M];
            let lse = self.lse[chunk.index(row)];
            if lse != f32::NEG_INFINITY {
                chunk.put(row, rows);
                of_block[row % M] = lse * std::f32::consts::LOG2_E;
                rows.seen[row % M] = (0, chunk.row_end(row));
            }
        }
        blocks
    }

    /// Adds rows from `first` on of a chunk to the sums of the 64 tokens.
    #[inline(always)]
    fn add<L: Lanes, const M: usize>(
        &self,
        l: L,
        first: usize,
        scores: &Scores<M>,
        lse: &[f32; M],
        part: &mut [f32],
    ) {
        for row in 0..M {
            let lse = l.splat(lse[row]);
            let column = match self.reduce {
                Reduce::Sum => (first + row) % self.rows.shape.group,
                Reduce::Max => 0,
            };
            let sums = part[column * TOKENS..][..TOKENS].as_chunks_mut::<16>().0;
            let scores = scores.iter().flat_map(|panel| panel[row].as_chunks::<16>().0);
            for (sum, score) in sums.iter_mut().zip(scores) {
                let (x, so_far) = (l.sub(l.get(score), lse), l.get(sum));
                l.put(
                    sum,
                    match self.reduce {
                        Reduce::Sum => l.add(so_far, exp2(l, x)),
                        Reduce::Max => l.max(x, so_far),
                    },
                );
            }
        }
    }
}

/// `2^x`, at most 2^127: a subset's log-sum-exp may be below a score.
#[inline(always)]
fn exp2<L: Lanes>(l: L, x: L::F) -> L::F {
    l.exp2(l.min(l.splat(127.0), x))
}
