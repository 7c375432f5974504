//! Prefill attention on the CPU.
//!
//! A task is some consecutive queries of one kv head with all its query heads. It walks over the slabs that they
//! see, decodes each once to f32 ([`tile`]) and adds it to blocks of query rows that stay in the first-level
//! cache ([`block`]). A row's result does not depend on how rows are shared out.

use super::Mask;
use super::block::{Block, PANEL};
use super::tile::Tile;
use crate::error::{Error, Result};
use crate::lanes::{self, Kernel, Lanes};
use crate::paged_attn::slabs::Slab;
use crate::paged_attn::{MAX_GROUP, check_head};
use crate::pages::HeadView;
use crate::simd::Level;
use crate::slab::TOKENS;
use crate::threads::Team;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

const OP: &str = "prefill_attn";
/// Query rows a task: enough to pay for decoding the slabs, few enough to stay in the second-level cache.
const TASK_ROWS: usize = 384;

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

/// What the arguments come to.
struct Shape {
    head_dim: usize,
    /// Query heads a kv head, G, and in all, H * G.
    group: usize,
    q_heads: usize,
    /// Of `q . k`, base 2.
    scale: f32,
    mask: Mask,
    /// Queries.
    n: usize,
}

fn unsupported<T>(field: &'static str, got: usize, supported: &'static str) -> Result<T> {
    Err(Error::Unsupported { op: OP, field, got: got.to_string(), supported })
}

impl Shape {
    fn of(q: &[f32], n: usize, heads: &[HeadView<'_>], scale: f32, mask: Mask) -> Result<Self> {
        let Some(head_dim) = heads.first().map(HeadView::head_dim) else {
            return unsupported("heads", 0, "at least 1");
        };
        let q_heads = q.len() / (n.max(1) * head_dim);
        let group = q_heads / heads.len();
        let whole = q.len() == n * heads.len() * group * head_dim;
        if !whole || n > 0 && (group == 0 || group > MAX_GROUP) {
            return unsupported("q", q.len(), "n times 1 to 16 rows of D for each kv head");
        }
        for head in heads {
            if head.head_dim() != head_dim {
                return unsupported("head_dim", head.head_dim(), "the same for every head");
            }
            if head.len < n {
                return unsupported("len", head.len, "at least n");
            }
            check_head(OP, head)?;
        }
        let scale = if scale == 0.0 { (head_dim as f32).powf(-0.5) } else { scale };
        Ok(Self { head_dim, group, q_heads, scale: scale * std::f32::consts::LOG2_E, mask, n })
    }
}

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
    let shape = Shape::of(q, n, heads, scale, mask)?;
    check_len("out", q.len(), out.len())?;
    if let Some(lse) = &lse {
        check_len("lse", lse.rows * shape.q_heads, lse.out.len())?;
    }
    if n == 0 {
        return Ok(());
    }
    let Scratch { level, lse: all_lse, tiles } = scratch;
    while tiles.len() < team.workers() {
        tiles.push(Mutex::default());
    }
    // At least two tasks a worker, and late queries, which see most, first.
    let fair = (n * heads.len()).div_ceil(2 * team.workers());
    let queries = (TASK_ROWS / shape.group).min(fair.max(16));
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
            let task = Task { shape: &shape, q, head: &heads[h], h, range, out: &rows };
            lanes::dispatch(*level, (task, &mut *tile, lse));
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

fn check_len(buffer: &'static str, need: usize, got: usize) -> Result<()> {
    if got == need { Ok(()) } else { Err(Error::Len { op: OP, buffer, need, got }) }
}

/// Some queries of one kv head.
struct Task<'a> {
    shape: &'a Shape,
    q: &'a [f32],
    head: &'a HeadView<'a>,
    h: usize,
    range: Range<usize>,
    out: &'a Out,
}

impl Kernel for (Task<'_>, &mut Tile, &mut [f32]) {
    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let (task, tile, lse) = self;
        // Sums that fill the registers: 24 of 32, 12 pairs of 16, 2 fours of 16.
        if L::HEADS >= 4 {
            task.run::<L, 12, 2>(l, tile, lse);
        } else if L::HEADS >= 2 {
            task.run::<L, 6, 1>(l, tile, lse);
        } else {
            task.run::<L, 2, 1>(l, tile, lse);
        }
    }
}

impl Task<'_> {
    #[inline(always)]
    fn run<L: Lanes, const M: usize, const V: usize>(
        &self,
        l: L,
        tile: &mut Tile,
        lse: &mut [f32],
    ) {
        let mut blocks = self.blocks::<M>();
        let end = self.position(self.range.end - 1) + 1;
        let first = self.shape.mask.first(self.position(self.range.start) + 1);
        for i in first / TOKENS..end.div_ceil(TOKENS) {
            let Some(slab) = Slab::of(self.head, i) else { continue };
            let (start, plain) = (slab.start, self.head.pools.plain_layout(slab.layout.format));
            tile.decode(l, slab, plain, (self.head.len - start).min(TOKENS));
            for block in &mut blocks {
                block.see::<L, V>(l, tile, start);
            }
        }
        for (b, block) in blocks.iter().enumerate() {
            for row in 0..M.min(self.rows() - b * M) {
                let at = b * M + row;
                self.write(at, block, row);
                lse[at] = (block.top[row] + block.sum[row].log2()) * std::f32::consts::LN_2;
            }
        }
    }

    /// Rows of this task: queries, heads within.
    fn rows(&self) -> usize {
        self.range.len() * self.shape.group
    }

    /// The token that query `i` is.
    fn position(&self, i: usize) -> usize {
        self.head.len - self.shape.n + i
    }

    /// Element of `q` and `out` where row `row` of this task starts.
    fn at(&self, row: usize) -> usize {
        let (query, g) = (self.range.start + row / self.shape.group, row % self.shape.group);
        (query * self.shape.q_heads + self.h * self.shape.group + g) * self.shape.head_dim
    }

    /// The rows in blocks; the last may have rows that see nothing.
    fn blocks<const M: usize>(&self) -> Vec<Block<M>> {
        let d = self.shape.head_dim;
        let mut blocks: Vec<_> = (0..self.rows().div_ceil(M)).map(|_| Block::new(d)).collect();
        for row in 0..self.rows() {
            let (block, r) = (&mut blocks[row / M], row % M);
            let end = self.position(self.range.start + row / self.shape.group) + 1;
            block.seen[r] = (self.shape.mask.first(end), end);
            let q = self.q[self.at(row)..][..d].as_chunks::<PANEL>().0;
            for (to, from) in block.queries.iter_mut().zip(q) {
                to[r] = from.map(|x| x * self.shape.scale);
            }
        }
        blocks
    }

    fn write<const M: usize>(&self, row: usize, block: &Block<M>, r: usize) {
        let d = self.shape.head_dim;
        // SAFETY: `at` is a row of `out`, which has the length of `q`, and a row belongs to one task.
        let out = unsafe { std::slice::from_raw_parts_mut(self.out.0.add(self.at(row)), d) };
        let inverse = if block.sum[r] == 0.0 { 0.0 } else { 1.0 / block.sum[r] };
        for (to, from) in out.as_chunks_mut::<PANEL>().0.iter_mut().zip(&block.out) {
            *to = from[r].map(|x| x * inverse);
        }
    }
}
