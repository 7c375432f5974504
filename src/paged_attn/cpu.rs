//! Decode attention on the CPU.
//!
//! A task is [`RUN`] slabs of one kv head with all its query heads; tasks are cut at fixed tokens and merged in
//! order, so the result does not depend on the number of threads. [`task`] does the work.

use super::Mask;
use super::slabs::RUN;
use super::task::{Task, Work};
use crate::error::{Error, Result};
use crate::lanes::{self, Row};
use crate::pages::HeadView;
use crate::simd::Level;
use crate::slab::{Format, TOKENS};
use crate::threads::Team;
use std::sync::{Mutex, PoisonError};

const OP: &str = "paged_attn";
/// Most query heads a kv head.
pub(crate) const MAX_GROUP: usize = 16;

/// Buffers kept between calls.
pub struct Scratch {
    level: Level,
    /// `[q_heads][D / 32][2]`, then `[D / 16][2]` rows.
    queries: Vec<Row<f32>>,
    /// A part a task.
    parts: Vec<f32>,
    workers: Vec<Mutex<Work>>,
}

impl Default for Scratch {
    fn default() -> Self {
        Self::at(Level::detect())
    }
}

impl Scratch {
    /// Empty buffers for kernels of `level`, or of the best one below it that this CPU has.
    pub fn at(level: Level) -> Self {
        Self { level, queries: Vec::new(), parts: Vec::new(), workers: Vec::new() }
    }
}

/// What the arguments come to.
pub(super) struct Shape {
    pub head_dim: usize,
    /// Query heads a kv head, G.
    pub group: usize,
    /// Rows of a query head in `queries`.
    pub rows: usize,
}

impl Shape {
    fn of(q: &[f32], heads: &[HeadView<'_>], out: &[f32]) -> Result<Self> {
        let Some(head_dim) = heads.first().map(HeadView::head_dim) else {
            return unsupported("heads", 0, "at least 1");
        };
        let per_head = heads.len() * head_dim;
        let group = q.len() / per_head;
        if group == 0 || group > MAX_GROUP || q.len() != group * per_head {
            let got = q.len();
            return unsupported("q", got, "1 to 16 rows of D elements for each kv head");
        }
        if out.len() != q.len() {
            return Err(Error::Len { op: OP, buffer: "out", need: q.len(), got: out.len() });
        }
        for head in heads {
            if head.head_dim() != head_dim {
                return unsupported("head_dim", head.head_dim(), "the same for every head");
            }
            check_head(OP, head)?;
        }
        Ok(Self { head_dim, group, rows: head_dim * 3 / 16 })
    }

    /// Elements of a task's part: maxima, sums `[G]` each, weighted values `[G, D]`.
    fn part(&self) -> usize {
        self.group * (self.head_dim + 2)
    }
}

fn unsupported<T>(field: &'static str, got: usize, supported: &'static str) -> Result<T> {
    Err(Error::Unsupported { op: OP, field, got: got.to_string(), supported })
}

/// The table and the ring hold what `len` and `packed` say.
pub(crate) fn check_head(op: &'static str, head: &HeadView<'_>) -> Result<()> {
    let need = head.packed.min(head.slabs());
    if head.table.len() < need {
        return Err(Error::Len { op, buffer: "table", need, got: head.table.len() });
    }
    let in_ring = head.slabs() - need;
    let bytes = head.pools.layout(Format::F16).slab_bytes();
    if head.ring.len() < in_ring * bytes {
        return Err(Error::Len { op, buffer: "ring", need: in_ring * bytes, got: head.ring.len() });
    }
    Ok(())
}

/// One decode step: `q` and `out` `[H * G, D]` with one [`HeadView`] a kv head, `scale` 0 for `1 / sqrt(D)`.
///
/// Query head `h * G + g` reads kv head `h`. Zeros where a head holds no tokens.
pub fn cpu(
    team: &Team,
    q: &[f32],
    heads: &[HeadView<'_>],
    scale: f32,
    mask: Mask,
    out: &mut [f32],
    scratch: &mut Scratch,
) -> Result<()> {
    let shape = Shape::of(q, heads, out)?;
    let scale = if scale == 0.0 { (shape.head_dim as f32).powf(-0.5) } else { scale };
    let Scratch { level, queries, parts, workers } = scratch;
    order_queries(q, &shape, scale * std::f32::consts::LOG2_E, queries);
    while workers.len() < team.workers() {
        workers.push(Mutex::default());
    }
    let chunks = |head: &HeadView<'_>| {
        mask.first(head.len) / (RUN * TOKENS)..head.len.div_ceil(RUN * TOKENS)
    };
    parts.resize(heads.iter().map(|h| chunks(h).len()).sum::<usize>() * shape.part(), 0.0);
    let todo = heads.iter().enumerate().flat_map(|(h, head)| chunks(head).map(move |c| (h, c)));
    let todo = Mutex::new(todo.zip(parts.chunks_exact_mut(shape.part())));
    let take = || todo.lock().unwrap_or_else(PoisonError::into_inner).next();
    team.run(|worker, _| {
        let mut work = workers[worker].lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(((h, chunk), part)) = take() {
            let queries = &queries[h * shape.group * shape.rows..][..shape.group * shape.rows];
            let first = mask.first(heads[h].len);
            let task = Task { head: &heads[h], shape: &shape, queries, chunk, first };
            lanes::dispatch(*level, (task, &mut *work, part));
        }
    });
    let mut parts = parts.as_slice();
    for (head, out) in heads.iter().zip(out.chunks_exact_mut(shape.group * shape.head_dim)) {
        let (of_head, rest) = parts.split_at(chunks(head).len() * shape.part());
        merge(&shape, of_head, out);
        parts = rest;
    }
    Ok(())
}

/// Queries times `scale`, in the orders of quantised K metadata and of f16 K lines.
fn order_queries(q: &[f32], shape: &Shape, scale: f32, rows: &mut Vec<Row<f32>>) {
    let d = shape.head_dim;
    rows.resize(q.len() / d * shape.rows, Row::default());
    for (q, rows) in q.chunks_exact(d).zip(rows.chunks_exact_mut(shape.rows)) {
        let (codes, halves) = rows.split_at_mut(d / 16);
        for (i, row) in codes.iter_mut().enumerate() {
            for (lane, x) in row.0.iter_mut().enumerate() {
                let (t, j, e) = (lane / 4, 2 * i + lane / 2 % 2, lane % 2);
                *x = q[8 * j + 2 * t + e] * scale;
            }
        }
        for (i, row) in halves.iter_mut().enumerate() {
            for (lane, x) in row.0.iter_mut().enumerate() {
                let (t, j, e) = (i % 2 * 2 + lane / 8, i / 2 * 2 + lane / 4 % 2, lane % 2);
                *x = q[8 * j + 2 * t + e] * scale;
            }
        }
    }
}

/// Adds up the parts of one kv head: `out` `[G, D]`.
fn merge(shape: &Shape, parts: &[f32], out: &mut [f32]) {
    let parts = parts.chunks_exact(shape.part());
    for (g, out) in out.chunks_exact_mut(shape.head_dim).enumerate() {
        let top = parts.clone().map(|part| part[g]).fold(f32::NEG_INFINITY, f32::max);
        let mut sum = 0.0;
        out.fill(0.0);
        for part in parts.clone().filter(|part| part[g] != f32::NEG_INFINITY) {
            let weight = (part[g] - top).exp2();
            sum += weight * part[shape.group + g];
            let values = &part[2 * shape.group + g * shape.head_dim..][..shape.head_dim];
            out.iter_mut().zip(values).for_each(|(o, v)| *o += weight * v);
        }
        let inverse = if sum == 0.0 { 0.0 } else { 1.0 / sum };
        out.iter_mut().for_each(|o| *o *= inverse);
    }
}
