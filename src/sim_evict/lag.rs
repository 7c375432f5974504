//! LagKV on the CPU.
//!
//! Slabs are decoded once each, from the last to the first: a partition is scored against the one after it, whose
//! extremes are known by then, while its own are gathered for the one before. Deviations are taken in one pass, from the
//! token's first channel that takes part: that is one of the numbers, so that what cancels is bounded by their count.

use super::channels::{Extremes, Scaling};
use super::{Lag, MAX_LAG, OP, Reference, check_len, unsupported};
use crate::error::Result;
use crate::lanes::{self, Kernel, Lanes};
use crate::paged_attn::check_head;
use crate::paged_attn::slabs::Slab;
use crate::pages::{HeadView, SlabRef};
use crate::prefill_attn::tile::Tile;
use crate::simd::Level;
use crate::slab::TOKENS;
use std::ops::Range;

/// LagKV's scores of `partitions * lag` tokens from slot `first` on: `out` `[partitions, lag]`. The
/// `(partitions + 1) * lag` tokens are there; `lag` is a multiple of 16, at most 1024.
///
/// # Errors
/// [`crate::Error::Unsupported`] and [`crate::Error::Len`], naming the field.
pub fn lag(
    head: &HeadView<'_>,
    first: usize,
    lag: usize,
    partitions: usize,
    v_weight: f32,
    out: &mut [f32],
) -> Result<()> {
    let lag = Lag { first, lag, partitions, v_weight, reference: Reference::Elements };
    lag_at(Level::detect(), head, &lag, out)
}

/// [`lag`] with the instructions of `level`, or of the best one below it that this CPU has.
pub fn lag_at(level: Level, head: &HeadView<'_>, lag: &Lag, out: &mut [f32]) -> Result<()> {
    if lag.lag == 0 || lag.lag > MAX_LAG || !lag.lag.is_multiple_of(16) {
        return unsupported("lag", lag.lag, "multiples of 16 up to 1024");
    }
    check_len(lag.partitions * lag.lag, out.len())?;
    check_head(OP, head)?;
    if lag.partitions == 0 {
        return Ok(());
    }
    if lag.first.saturating_add((lag.partitions + 1) * lag.lag) > head.len {
        return unsupported("partitions", lag.partitions, "one less than there are tokens for");
    }
    lanes::dispatch(level, Walk { head, lag, out });
    Ok(())
}

/// The way through the slabs of one head.
struct Walk<'a> {
    head: &'a HeadView<'a>,
    lag: &'a Lag,
    out: &'a mut [f32],
}

/// What has been found out on the way.
struct State {
    tile: Tile,
    /// Of the partition at hand, for the one before it.
    extremes: Extremes,
    /// Of the one after it.
    scaling: Scaling,
    /// Of K and V of the partition at hand, `[lag]`.
    variances: [Vec<f32>; 2],
}

impl Kernel for Walk<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let Walk { head, lag, out } = self;
        let mut state = State {
            tile: Tile::default(),
            extremes: Extremes::new(head.head_dim()),
            scaling: Scaling::default(),
            variances: [vec![0.0; lag.lag], vec![0.0; lag.lag]],
        };
        let end = lag.first + (lag.partitions + 1) * lag.lag;
        for i in (lag.first / TOKENS..end.div_ceil(TOKENS)).rev() {
            let start = i * TOKENS;
            let slab = Slab::of(head, i);
            let found = slab.is_some();
            if let Some(slab) = slab {
                state.tile.decode(l, slab, head);
            }
            let [first, last] = [start.max(lag.first), end.min(start + TOKENS) - 1]
                .map(|slot| (slot - lag.first) / lag.lag);
            for p in (first..=last).rev() {
                let begin = lag.first + p * lag.lag;
                let (from, until) = (begin.max(start), (begin + lag.lag).min(start + TOKENS));
                if p < lag.partitions {
                    state.score(l, from - start..until - start, from - begin, found);
                }
                if p > 0 && found {
                    state.see(l, head, lag.reference, i, from - start..until - start);
                }
                if from > begin {
                    continue; // the slab before has more of it
                }
                if p < lag.partitions {
                    softmaxes(
                        l,
                        &mut state.variances,
                        lag.v_weight,
                        &mut out[p * lag.lag..][..lag.lag],
                    );
                }
                if p > 0 {
                    state.extremes.scaling(&mut state.scaling);
                    state.extremes.clear();
                }
            }
        }
    }
}

impl State {
    /// Variances of `tokens` of the decoded slab, which are those from `at` on of their partition; NaN if there is no slab.
    #[inline(always)]
    fn score<L: Lanes>(&mut self, l: L, tokens: Range<usize>, at: usize, found: bool) {
        let [keys, values] = self.variances.each_mut().map(|x| &mut x[at..][..tokens.len()]);
        if found {
            self.scaling.score_keys(l, &self.tile, tokens.clone(), keys);
            self.scaling.score_values(l, &self.tile, tokens, values);
        } else {
            keys.fill(f32::NAN);
            values.fill(f32::NAN);
        }
    }

    /// Extremes of `tokens` of the decoded slab `i`.
    #[inline(always)]
    fn see<L: Lanes>(
        &mut self,
        l: L,
        head: &HeadView<'_>,
        reference: Reference,
        i: usize,
        tokens: Range<usize>,
    ) {
        let (tile, extremes) = (&self.tile, &mut self.extremes);
        extremes.see_values(l, tile, tokens.clone());
        let whole = |slab: &SlabRef<'_>| {
            let group = slab.layout.k_group;
            tokens.start.next_multiple_of(group)..tokens.end / group * group
        };
        let from_meta = head
            .slab(i)
            .filter(|slab| reference == Reference::Metadata && slab.layout.format.is_quantised());
        let Some(slab) = from_meta.filter(|slab| !whole(slab).is_empty()) else {
            return extremes.see_keys(l, tile, tokens);
        };
        let groups = whole(&slab);
        groups.clone().step_by(slab.layout.k_group).for_each(|t| extremes.see_bounds(&slab, t));
        extremes.see_keys(l, tile, tokens.start..groups.start);
        extremes.see_keys(l, tile, groups.end..tokens.end);
    }
}

/// The sum of the softmaxes of the deviations of K and of V, `v_weight` of V's. NaN takes no part and stays.
#[inline(always)]
fn softmaxes<L: Lanes>(l: L, variances: &mut [Vec<f32>; 2], v_weight: f32, out: &mut [f32]) {
    let mut factors = [1.0, v_weight];
    for (x, factor) in variances.iter_mut().zip(&mut factors) {
        let mut top = l.splat(f32::NEG_INFINITY);
        for x in x.as_chunks_mut::<16>().0 {
            *x = x.map(f32::sqrt);
            top = l.max(l.get(x), top);
        }
        let top = l.splat(l.top(top));
        let mut sum = l.splat(0.0);
        for x in x.as_chunks_mut::<16>().0 {
            let away = l.mul(l.sub(l.get(x), top), l.splat(std::f32::consts::LOG2_E));
            let weight = l.exp2(away);
            sum = l.add(sum, l.positive(weight, weight));
            l.put(x, weight);
        }
        *factor /= l.sum(sum);
    }
    let [keys, values] = variances;
    for ((out, k), v) in out.iter_mut().zip(keys).zip(values) {
        *out = *k * factors[0] + *v * factors[1];
    }
}
