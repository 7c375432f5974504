//! A task of decode attention: runs of slabs of one format go through scores, softmax and values, [`keys`] and
//! [`values`] for codes, [`halves`] for f16.

#![allow(clippy::needless_range_loop)] // Constant counts, indices into several arrays at once.

use super::cpu::{MAX_GROUP, Shape};
use super::plain::Room;
use super::slabs::{RUN, Slab};
use super::{halves, keys, values};
use crate::lanes::{Kernel, Lanes, Line, Row, with_heads};
use crate::pages::HeadView;
use crate::slab::{Format, TOKENS};

/// Buffers of one worker.
pub(super) struct Work {
    /// V of a slab that is not full.
    copy: Vec<Line>,
    /// Scores, then weights, `[head][slab]` of four tile rows.
    scores: Vec<[Row<f32>; 4]>,
    folds: Box<keys::Folds>,
    weights: values::Weights,
    fanned: Vec<Row<f32>>,
    room: Room,
}

impl Default for Work {
    fn default() -> Self {
        Self {
            copy: Vec::new(),
            scores: vec![[Row::default(); 4]; MAX_GROUP * RUN],
            folds: Box::default(),
            weights: values::Weights::default(),
            fanned: Vec::new(),
            room: Room::default(),
        }
    }
}

/// Slabs `chunk * RUN..` of a head.
pub(super) struct Task<'a> {
    pub head: &'a HeadView<'a>,
    pub shape: &'a Shape,
    pub queries: &'a [Row<f32>],
    pub chunk: usize,
    /// First visible token.
    pub first: usize,
}

impl Kernel for (Task<'_>, &mut Work, &mut [f32]) {
    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let (task, work, part) = self;
        let group = task.shape.group;
        let (tops, rest) = part.split_at_mut(group);
        let (sums, values) = rest.split_at_mut(group);
        tops.fill(f32::NEG_INFINITY);
        sums.fill(0.0);
        values.fill(0.0);
        let from = (task.chunk * RUN).max(task.first / TOKENS);
        let to = ((task.chunk + 1) * RUN).min(task.head.slabs());
        let mut copy = std::mem::take(&mut work.copy);
        let mut room = std::mem::take(&mut work.room);
        let mut held = (from..to).filter_map(|i| Slab::of(task.head, i)).peekable();
        while let Some(&first) = held.peek() {
            let (mut run, mut n) = ([first; RUN], 0);
            while let Some(slab) = held.next_if(|s| s.layout.format == first.layout.format) {
                if n > 0 {
                    run[n - 1].soon[1] = slab.k;
                }
                (run[n], n) = (slab, n + 1);
            }
            let (mut rest, lines) = room.lines(first.layout, n);
            for slab in &mut run[..n] {
                let (room, after) = rest.split_at_mut(lines);
                slab.make_plain(l, task.head.pools.plain_layout(slab.layout.format), room);
                rest = after;
            }
            if run[n - 1].start + TOKENS > task.head.len {
                run[n - 1].hold(task.head.len - run[n - 1].start, &mut copy);
                task.run(l, &run[..n], work, tops, sums, values);
                break;
            }
            task.run(l, &run[..n], work, tops, sums, values);
        }
        (work.copy, work.room) = (copy, room);
    }
}

/// Heads in blocks of nearly equal size, at most `most` each: first and count.
#[inline(always)]
fn blocks(heads: usize, most: usize) -> impl Iterator<Item = (usize, usize)> {
    let count = heads.div_ceil(most);
    (0..count).map(move |b| (heads * b / count, heads * (b + 1) / count - heads * b / count))
}

impl Task<'_> {
    /// One run: its scores, their softmax, and the values they weigh.
    #[inline(always)]
    fn run<L: Lanes>(
        &self,
        l: L,
        run: &[Slab<'_>],
        work: &mut Work,
        tops: &mut [f32],
        sums: &mut [f32],
        values: &mut [f32],
    ) {
        for (first, n) in blocks(self.shape.group, L::HEADS) {
            with_heads!(n, N => self.scores::<L, N>(l, run, first, work));
        }
        let head_dim = self.shape.head_dim;
        for g in 0..self.shape.group {
            let scores = &mut work.scores[g * RUN..][..run.len()];
            self.hide(run, scores);
            let scale = softmax(l, scores, &mut tops[g], &mut sums[g]);
            values[g * head_dim..][..head_dim].iter_mut().for_each(|v| *v *= scale);
        }
        for (first, n) in blocks(self.shape.group, L::HEADS) {
            let values = &mut values[first * head_dim..][..n * head_dim];
            with_heads!(n, N => self.values::<L, N>(l, run, first, work, values));
        }
    }

    #[inline(always)]
    fn scores<L: Lanes, const N: usize>(
        &self,
        l: L,
        run: &[Slab<'_>],
        first: usize,
        work: &mut Work,
    ) {
        let mut codes: [&[Row<f32>]; N] = [&[]; N];
        let mut halves = codes;
        for g in 0..N {
            let rows = &self.queries[(first + g) * self.shape.rows..][..self.shape.rows];
            (codes[g], halves[g]) = rows.split_at(self.shape.head_dim / 16);
        }
        run[0].k.iter().for_each(|line| l.fetch(line));
        for (s, slab) in run.iter().enumerate() {
            slab.fetch_meta(l);
            let out = &mut work.scores[first * RUN + s..];
            match slab.layout.format {
                Format::F16 => halves::scores(l, slab, halves, out),
                _ => keys::scores(l, slab, codes, &mut work.folds, out),
            }
        }
    }

    /// Minus infinity for the tokens of `run` outside `first..len`.
    #[inline(always)]
    fn hide(&self, run: &[Slab<'_>], scores: &mut [[Row<f32>; 4]]) {
        for (slab, tiles) in run.iter().zip(scores) {
            if slab.start >= self.first && slab.start + TOKENS <= self.head.len {
                continue;
            }
            for (i, score) in tiles.iter_mut().flat_map(|tile| &mut tile.0).enumerate() {
                let token = slab.start + i / 16 * 16 + i % 16 / 4 * 2 + i % 2 + i / 2 % 2 * 8;
                if token < self.first || token >= self.head.len {
                    *score = f32::NEG_INFINITY;
                }
            }
        }
    }

    #[inline(always)]
    fn values<L: Lanes, const N: usize>(
        &self,
        l: L,
        run: &[Slab<'_>],
        first: usize,
        work: &mut Work,
        values: &mut [f32],
    ) {
        let mut weights: [&[[Row<f32>; 4]]; N] = [&[]; N];
        for g in 0..N {
            weights[g] = &work.scores[(first + g) * RUN..][..run.len()];
        }
        match run[0].layout.format {
            Format::F16 => halves::add(l, run, weights, &mut work.fanned, values),
            _ => values::add(l, run, weights, &mut work.weights, values),
        }
    }
}

/// Scores of a run to weights relative to the new maximum; returns what earlier sums are worth.
#[inline(always)]
fn softmax<L: Lanes>(l: L, scores: &mut [[Row<f32>; 4]], top: &mut f32, sum: &mut f32) -> f32 {
    let rows = scores.as_flattened_mut();
    let mut highest = l.splat(*top);
    for row in rows.iter() {
        highest = l.max(l.get(&row.0), highest);
    }
    let highest = l.top(highest);
    let mut total = l.splat(0.0);
    for row in rows {
        let p = l.exp2(l.sub(l.get(&row.0), l.splat(highest)));
        l.put(&mut row.0, p);
        total = l.add(total, p);
    }
    let scale = (*top - highest).exp2();
    *sum = *sum * scale + l.sum(total);
    *top = highest;
    scale
}
