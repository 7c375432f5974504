//! What budgets that wait for all layers come to.

use kvwarp::token_select;

use super::budget;
use super::choose::Scored;
use super::run::Policy;
use super::{Budget, Method, Share};

impl Policy {
    /// What each head of each waiting layer keeps.
    pub(super) fn settle(&self) -> Vec<Vec<Vec<u32>>> {
        let waiting = &self.waiting;
        let by = |budgets: Vec<usize>| {
            let heads =
                |(l, k): (&Scored, usize)| (0..l.heads()).map(|h| self.pick(l, h, k)).collect();
            waiting.iter().zip(budgets).map(heads).collect()
        };
        let Some(evict) = self.evict() else { return Vec::new() };
        if evict.method() == Method::RepeatHeads {
            return self.whole_heads();
        }
        match self.spec.budget() {
            Budget::PrefixKv => by(budget::prefix(waiting, self.total())),
            Budget::DynamicKv => by(budget::dynamic(waiting, self.total())),
            Budget::Global => {
                let total = waiting.iter().map(|l| l.heads() * self.even(l)).sum();
                let strictly = evict.method() == Method::Repeat;
                let chosen = budget::global(waiting, total, strictly);
                let layer = |(l, heads): (&Scored, Vec<Vec<u32>>)| {
                    heads
                        .into_iter()
                        .enumerate()
                        .map(|(h, best)| match &self.spec.refine {
                            Some(refine) => l.refined(h, best.len(), refine),
                            None => l.protected(best),
                        })
                        .collect()
                };
                waiting.iter().zip(chosen).map(layer).collect()
            }
            Budget::Uniform | Budget::Pyramid => by(waiting.iter().map(|l| self.even(l)).collect()),
        }
    }

    /// KVzip's head mode: heads that any token of them stands out in keep everything, the others what is protected.
    fn whole_heads(&self) -> Vec<Vec<Vec<u32>>> {
        let best = |l: &Scored, h| l.of(h).iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let all = self.waiting.iter().flat_map(|l| (0..l.heads()).map(move |h| best(l, h)));
        let all: Vec<f32> = all.collect();
        let share = self.evict().map_or(Share::ALL, |evict| evict.keep);
        let chosen = token_select::top_k(&all, share.of(all.len()));
        let mut number = 0..all.len() as u32;
        let mut head = |l: &Scored| {
            let whole = number.next().is_some_and(|i| chosen.binary_search(&i).is_ok());
            l.protected(if whole { (0..l.open() as u32).collect() } else { Vec::new() })
        };
        self.waiting.iter().map(|l| (0..l.heads()).map(|_| head(l)).collect()).collect()
    }
}
