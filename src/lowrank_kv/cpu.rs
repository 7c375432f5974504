//! Attention on the CPU.
//!
//! A task is [`RUN`] slabs with at most [`HEADS`] query heads; tasks are cut at fixed tokens and heads and merged in
//! order, so the result does not depend on the number of threads. [`super::task`] does the work.

use super::task::{Task, Work};
use super::{COLUMN, OP, View, check_len};
use crate::error::{Error, Result};
use crate::lanes::{self, Row};
use crate::simd::Level;
use crate::threads::Team;
use std::sync::{Mutex, PoisonError};

/// Slabs of a task, and its query heads.
pub(super) const RUN: usize = 4;
pub(super) const HEADS: usize = 8;

/// Buffers kept between calls.
pub struct Scratch {
    level: Level,
    queries: Queries,
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
        let queries = Queries::default();
        Self { level, queries, parts: Vec::new(), workers: Vec::new() }
    }
}

/// Queries as the columns of a tile meet them: the 8 elements of a column twice, for two tokens at once.
#[derive(Default)]
pub(super) struct Queries {
    /// `[H * G][c / 8]`
    latent: Vec<Row<f32>>,
    /// `[H * G][elite columns]`, zeros where a column is of other heads
    elite: Vec<Row<f32>>,
    /// First elite column of each head.
    first: Vec<usize>,
    columns: usize,
    elite_columns: usize,
}

impl Queries {
    fn arrange(&mut self, q: &[f32], q_elite: &[f32], view: &View<'_>, scale: f32) {
        let (rank, elite) = (view.shape.rank(), 2 * view.shape.pairs());
        let (heads, columns) = (q.len() / rank, view.shape.width() / COLUMN);
        let group = heads / view.shape.kv_heads();
        (self.columns, self.elite_columns) = (rank / COLUMN, elite.div_ceil(COLUMN) + 1);
        self.latent.clear();
        self.latent.extend(q.chunks_exact(COLUMN).map(|q| twice(|i| q[i] * scale)));
        (self.elite, self.first) = (Vec::new(), Vec::new());
        for (h, q) in q_elite.chunks_exact(elite).enumerate() {
            let key = rank + h / group * elite;
            // All of its columns exist: fewer of another head's where the row ends.
            let first = (key / COLUMN).min(columns - self.elite_columns.min(columns));
            self.first.push(first);
            for column in first..first + self.elite_columns {
                let element =
                    |i: usize| (column * COLUMN + i).checked_sub(key).and_then(|e| q.get(e));
                self.elite.push(twice(|i| element(i).map_or(0.0, |q| q * scale)));
            }
        }
    }

    /// Columns of z, and the queries of head `h` there.
    pub fn latent(&self, h: usize) -> &[Row<f32>] {
        &self.latent[h * self.columns..][..self.columns]
    }

    /// First column of a head's keys, and its queries from there on.
    pub fn elite(&self, h: usize) -> (usize, &[Row<f32>]) {
        (self.first[h], &self.elite[h * self.elite_columns..][..self.elite_columns])
    }
}

fn twice(f: impl Fn(usize) -> f32) -> Row<f32> {
    Row(std::array::from_fn(|i| f(i % COLUMN)))
}

fn check(q: &[f32], q_elite: &[f32], view: &View<'_>, out: &[f32]) -> Result<usize> {
    let shape = view.shape;
    let q_heads = q.len() / shape.rank();
    if q_heads == 0
        || !q_heads.is_multiple_of(shape.kv_heads())
        || q.len() != q_heads * shape.rank()
    {
        return Err(Error::Unsupported {
            op: OP,
            field: "q",
            got: q.len().to_string(),
            supported: "rows of c elements, as many for each kv head",
        });
    }
    check_len("q_elite", q_heads * 2 * shape.pairs(), q_elite.len())?;
    check_len("out", q.len(), out.len())?;
    if view.table.len() < view.slabs() {
        let (need, got) = (view.slabs(), view.table.len());
        return Err(Error::Len { op: OP, buffer: "table", need, got });
    }
    Ok(q_heads)
}

/// The newest token of a sequence: `q` and `out` `[H * G, c]`, `q_elite` `[H * G, 2 r]`, rotated; `scale` of a score,
/// `1 / sqrt(D)`. Zeros where no tokens are held.
///
/// # Errors
/// [`Error::Len`] and [`Error::Unsupported`] where the sizes do not fit.
pub fn cpu(
    team: &Team,
    q: &[f32],
    q_elite: &[f32],
    view: &View<'_>,
    scale: f32,
    out: &mut [f32],
    scratch: &mut Scratch,
) -> Result<()> {
    let (q_heads, rank) = (check(q, q_elite, view, out)?, view.shape.rank());
    let Scratch { level, queries, parts, workers } = scratch;
    queries.arrange(q, q_elite, view, scale * std::f32::consts::LOG2_E);
    while workers.len() < team.workers() {
        workers.push(Mutex::default());
    }
    let (runs, blocks) = (view.slabs().div_ceil(RUN), q_heads.div_ceil(HEADS));
    let part = HEADS * (rank + 2);
    parts.resize(runs * blocks * part, 0.0);
    let todo = Mutex::new(parts.chunks_exact_mut(part).enumerate());
    let take = || todo.lock().unwrap_or_else(PoisonError::into_inner).next();
    team.run(|worker, _| {
        let mut work = workers[worker].lock().unwrap_or_else(PoisonError::into_inner);
        while let Some((i, part)) = take() {
            let first = i % blocks * HEADS;
            let heads = first..q_heads.min(first + HEADS);
            let task = Task { view, queries, heads, run: i / blocks };
            lanes::dispatch(*level, (task, &mut *work, part));
        }
    });
    let parts = &*parts;
    team.each_chunk(out, rank, |h, out| {
        let of_block = parts.chunks_exact(part).skip(h / HEADS).step_by(blocks);
        merge(of_block, h % HEADS, out);
    });
    Ok(())
}

/// Adds up the parts of head `h` of its block, in order: maxima and sums `[HEADS]` each, then weighted rows.
fn merge<'a>(parts: impl Iterator<Item = &'a [f32]> + Clone, h: usize, out: &mut [f32]) {
    let top = parts.clone().map(|part| part[h]).fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    let rank = out.len();
    out.fill(0.0);
    for part in parts.filter(|part| part[h] != f32::NEG_INFINITY) {
        let weight = (part[h] - top).exp2();
        sum += weight * part[HEADS + h];
        let values = &part[2 * HEADS + h * rank..][..rank];
        out.iter_mut().zip(values).for_each(|(o, v)| *o += weight * v);
    }
    let inverse = if sum == 0.0 { 0.0 } else { 1.0 / sum };
    out.iter_mut().for_each(|o| *o *= inverse);
}
