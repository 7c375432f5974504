//! Prefill attention on the CPU.
//!
//! A task is some consecutive queries of one kv head with all its query heads. It walks over the slabs that they
//! see, decodes each once to f32 ([`tile`]) and adds it to blocks of query rows that stay in the first-level
//! cache ([`block`]). A row's result does not depend on how rows are shared out.

use super::Mask;
use super::block::Block;
use super::chunk::{Chunk, Shape, check_len};
use super::rows::{Blocked, Blocks, PANEL};
use super::tile::Tile;
use crate::error::Result;
use crate::lanes::{self, Lanes};
use crate::paged_attn::slabs::Slab;
use crate::pages::HeadView;
use crate::simd::Level;
use crate::slab::TOKENS;
use crate::threads::Team;
use std::sync::{Mutex, PoisonError};

const OP: &str = "prefill_attn";

/// Where the log-sum-exp of the newest rows goes.
pub struct LseRows<'a> {
    /// `[rows, H * G]`, natural log, -inf where a row sees no token. With fewer queries than rows the leading
    /// rows stay as they are.
    pub out: &'a mut [f32],
    /// How many of the newest rows.
    pub rows: usize,
}

/// Buffers kept between calls.
pub struct Scratch {
    level: Level,
    /// Log-sum-exp of every row, `[task][query][G]`.
    lse: Vec<f32>,
    tiles: Vec<Mutex<Tile>>,
}

impl Default for Scratch {
    fn default() -> Self {
        Self::at(Level::detect())
    }
}

impl Scratch {
    /// Empty buffers for kernels of `level`, or of the best one below it that this CPU has.
    pub fn at(level: Level) -> Self {
        Self { level, lse: Vec::new(), tiles: Vec::new() }
    }
}

/// Rows of the output, of which each task writes its own.
struct Out(*mut f32);

// SAFETY: tasks write disjoint elements: each query and kv head belongs to one task.
unsafe impl Sync for Out {}

/// Attention of the newest `n` tokens: `q` and `out` `[n, H * G, D]` with one [`HeadView`] a kv head that already
/// holds them; row `i` is token `len - n + i` and sees the tokens up to itself. `scale` 0 for `1 / sqrt(D)`.
#[allow(clippy::too_many_arguments)]
pub fn cpu(
    team: &Team,
    q: &[f32],
    n: usize,
    heads: &[HeadView<'_>],
    scale: f32,
    mask: Mask,
    out: &mut [f32],
    lse: Option<LseRows<'_>>,
    scratch: &mut Scratch,
) -> Result<()> {
    let shape = Shape::of(OP, q, n, heads, scale)?;
    check_len(OP, "out", q.len(), out.len())?;
    if let Some(lse) = &lse {
        check_len(OP, "lse", lse.rows * shape.q_heads, lse.out.len())?;
    }
    if n == 0 {
        return Ok(());
    }
    let Scratch { level, lse: all_lse, tiles } = scratch;
    while tiles.len() < team.workers() {
        tiles.push(Mutex::default());
    }
    // Late queries, which see most, first.
    let queries = shape.chunk(heads.len(), team.workers());
    let tasks = n.div_ceil(queries);
    all_lse.resize(tasks * heads.len() * queries * shape.group, 0.0);
    let todo = (0..tasks).rev().flat_map(|task| (0..heads.len()).map(move |h| (task, h)));
    let todo = Mutex::new(todo.zip(all_lse.chunks_exact_mut(queries * shape.group)));
    let take = || todo.lock().unwrap_or_else(PoisonError::into_inner).next();
    let rows = Out(out.as_mut_ptr());
    team.run(|worker, _| {
        let mut tile = tiles[worker].lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(((task, h), lse)) = take() {
            let range = task * queries..n.min((task + 1) * queries);
            let chunk = Chunk { shape: &shape, q, head: &heads[h], h, range };
            let task = Task { chunk, mask, out: &rows };
            lanes::dispatch(*level, Blocks((task, &mut *tile, lse)));
        }
    });
    if let Some(lse) = lse {
        for (i, row) in (n.saturating_sub(lse.rows)..n).enumerate() {
            let at = (lse.rows.saturating_sub(n) + i) * shape.q_heads;
            for (h, to) in lse.out[at..][..shape.q_heads].chunks_exact_mut(shape.group).enumerate()
            {
                let task = (tasks - 1 - row / queries) * heads.len() + h;
                let from = (task * queries + row % queries) * shape.group;
                to.copy_from_slice(&all_lse[from..][..shape.group]);
            }
        }
    }
    Ok(())
}

/// A chunk of queries.
struct Task<'a> {
    chunk: Chunk<'a>,
    mask: Mask,
    out: &'a Out,
}

impl Blocked for (Task<'_>, &mut Tile, &mut [f32]) {
    #[inline(always)]
    fn run<L: Lanes, const M: usize, const V: usize>(self, l: L) {
        let (task, tile, lse) = self;
        let (chunk, mut blocks) = (&task.chunk, task.blocks::<M>());
        let end = chunk.end(chunk.range.end - 1);
        let first = task.mask.first(chunk.end(chunk.range.start));
        for i in first / TOKENS..end.div_ceil(TOKENS) {
            let Some(slab) = Slab::of(chunk.head, i) else { continue };
            tile.decode(l, slab, chunk.head);
            for block in &mut blocks {
                block.see::<L, V>(l, tile, slab.start);
            }
        }
        for (row, lse) in lse[..chunk.rows()].iter_mut().enumerate() {
            let block = &blocks[row / M];
            task.write(row, block, row % M);
            *lse = block.lse(row % M);
        }
    }
}

impl Task<'_> {
    /// The rows in blocks; the last may have rows that see nothing.
    fn blocks<const M: usize>(&self) -> Vec<Block<M>> {
        let (chunk, d) = (&self.chunk, self.chunk.shape.head_dim);
        let mut blocks: Vec<_> = (0..chunk.rows().div_ceil(M)).map(|_| Block::new(d, d)).collect();
        for row in 0..chunk.rows() {
            let (rows, end) = (&mut blocks[row / M].rows, chunk.row_end(row));
            chunk.put(row, rows);
            rows.seen[row % M] = (self.mask.first(end), end);
        }
        blocks
    }

    fn write<const M: usize>(&self, row: usize, block: &Block<M>, r: usize) {
        let (d, index) = (self.chunk.shape.head_dim, self.chunk.index(row));
        // SAFETY: `index` is a row of `out`, which has the length of `q`, and a row belongs to one task.
        let out = unsafe { std::slice::from_raw_parts_mut(self.out.0.add(index * d), d) };
        let inverse = if block.sum[r] == 0.0 { 0.0 } else { 1.0 / block.sum[r] };
        for (to, from) in out.as_chunks_mut::<PANEL>().0.iter_mut().zip(&block.out) {
            *to = from[r].map(|x| x * inverse);
        }
    }
}
