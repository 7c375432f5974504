//! A policy at work on one read.

use std::ops::Range;

use kvwarp::pages::HeadView;
use kvwarp::threads::Team;
use kvwarp::token_select::{self, Pool};

use super::budget::{self, DYNAMIC_MOST, DYNAMIC_PERIOD};
use super::choose::{Scored, kept};
use super::cut::{Cut, Onward};
use super::observe::{Observer, Wants};
use super::scores::scores;
use super::{Budget, Evict, Method, Share};
use crate::cache::{Cache, CacheError};
use crate::runner::Row;
use crate::spec::CacheSpec;

/// What a policy knows of a read.
pub struct Policy {
    pub(super) spec: CacheSpec,
    layers: usize,
    q_heads: usize,
    /// Tokens of the read.
    tokens: usize,
    /// Layers whose budgets are not settled.
    pub(super) waiting: Vec<Scored>,
}

impl Policy {
    /// For a read of `tokens` tokens by a model of so many layers and query heads; `None` where every token stays.
    pub fn new(spec: &CacheSpec, layers: usize, q_heads: usize, tokens: usize) -> Option<Self> {
        let waiting = Vec::new();
        spec.selects().then_some(Self { spec: *spec, layers, q_heads, tokens, waiting })
    }

    /// What layer `layer` has to be asked while `n` tokens pass through it, the first of them into slots `first`.
    pub fn observer(&self, layer: usize, n: usize, first: &[usize]) -> Option<Observer> {
        let method = self.evict().map(|evict| (evict.method(), evict.options.window));
        let (window, wants) = match method {
            Some((Method::Column, _)) => (0, Wants::Sums),
            Some((Method::Window, window)) => (usize::from(window), Wants::Nothing),
            _ => (0, Wants::Nothing),
        };
        let newest = if self.goes_on(layer) { window.max(Onward::WINDOW) } else { window };
        let asks = newest > 0 || wants != Wants::Nothing;
        asks.then(|| Observer::new((newest, wants), self.q_heads, n, first.to_vec()))
    }

    /// Whether all layers are to be read before any of them is packed.
    pub fn waits(&self) -> bool {
        self.evict().is_some_and(|evict| evict.says_again() || self.spec.budget().waits())
    }

    /// The method where it says the text again.
    pub fn repeats(&self) -> Option<&Evict> {
        self.evict().filter(|evict| evict.says_again())
    }

    /// What hears `said` tokens say part `part` of a read of `n` again, after heads that hold `lens`.
    pub fn listener(&self, n: usize, part: Range<usize>, said: usize, lens: &[usize]) -> Observer {
        let sink = self.evict().map_or(0, |evict| usize::from(evict.options.sink));
        // Heads hold the same tokens until the policy has chosen, so one list of slots serves all.
        let len = lens.first().copied().unwrap_or(0);
        let first = len - n;
        let oldest = 0..first + sink.min(part.start);
        let seen = vec![oldest, first + part.start..first + part.end, len..len + said];
        let wants = Wants::Most { tokens: part, seen };
        Observer::new((0, wants), self.q_heads, n, lens.iter().map(|len| len - n).collect())
    }

    /// Tokens of a read of `n` that go deeper than `layer`, ascending; `None` where all do.
    ///
    /// # Errors
    /// [`CacheError::Kernel`].
    pub fn onward(
        &self,
        layer: usize,
        n: usize,
        (team, observer): (&Team, Option<&mut Observer>),
        heads: &[HeadView<'_>],
    ) -> Result<Option<Vec<u32>>, CacheError> {
        let asked = Onward::new(&self.spec, self.tokens, (layer, self.layers), n);
        let (Some(Onward { kept, window, pool }), Some(observer)) = (asked, observer) else {
            return Ok(None);
        };
        let open = n - window;
        let attention = observer.window(team, window, heads)?;
        let mut total = vec![0.0; open];
        // Each query head is pooled by itself, so the group may be all heads.
        let columns: Vec<f32> =
            attention.chunks_exact(n).flat_map(|row| &row[..open]).copied().collect();
        token_select::pool(&columns, self.q_heads, Pool::Max, pool, &mut total);
        let mut onward = token_select::top_k(&total, kept - window);
        onward.extend(open as u32..n as u32);
        Ok(Some(onward))
    }

    /// Chooses among the `n` tokens that staged layer `layer` of `row` has read, and packs what stays; or keeps their
    /// scores until the budgets are settled.
    ///
    /// # Errors
    /// [`CacheError::Kernel`].
    pub fn after_layer(
        &mut self,
        (cache, row): (&mut Cache, Row),
        (layer, n): (usize, usize),
        observer: Option<Observer>,
        team: &Team,
    ) -> Result<(), CacheError> {
        let Some(evict) = self.evict().copied() else { return cache.compress(row, layer, team) };
        match evict.method() {
            Method::Lag => {
                cache.lag_staged(row, layer, &evict, team)?;
                return cache.compress(row, layer, team);
            }
            Method::Repeat | Method::RepeatHeads => return Ok(()),
            _ => {}
        }
        let views = cache.staged_views(row, layer);
        let mut scored = self.scored(n, views.iter().map(|h| h.len - n).collect());
        scored.scores = scores((&evict, layer), &scored, &views, observer, team)?;
        self.take(scored, layer, &mut keep_staged((cache, row), team))
    }

    /// Takes the scores `[heads, n]` that staged layer `layer` has from saying `n` tokens again.
    ///
    /// # Errors
    /// [`CacheError::Kernel`].
    pub fn after_repeat(
        &mut self,
        (cache, row): (&mut Cache, Row),
        (layer, n): (usize, usize),
        scores: Vec<f32>,
        team: &Team,
    ) -> Result<(), CacheError> {
        let first = cache.staged_views(row, layer).iter().map(|h| h.len - n).collect();
        let scored = Scored { scores, ..self.scored(n, first) };
        self.take(scored, layer, &mut keep_staged((cache, row), team))
    }

    /// Settles the budgets that are not, and packs those layers.
    ///
    /// # Errors
    /// [`CacheError::Kernel`].
    pub fn finish(&mut self, held: (&mut Cache, Row), team: &Team) -> Result<(), CacheError> {
        self.settle_all(&mut keep_staged(held, team))
    }

    /// Settles the budgets that are not.
    ///
    /// # Errors
    /// What `keep` returns.
    pub fn settle_all<E>(&mut self, keep: &mut impl Keep<E>) -> Result<(), E> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let chosen = self.settle();
        let layers = std::mem::take(&mut self.waiting).into_iter().zip(chosen).enumerate();
        for (layer, (mut scored, heads)) in layers {
            keep(layer, &mut scored, heads, true)?;
        }
        Ok(())
    }

    /// Chooses by the scores of layer `layer`, or keeps them until the budgets are settled.
    ///
    /// # Errors
    /// What `keep` returns.
    pub fn take<E>(
        &mut self,
        mut scored: Scored,
        layer: usize,
        keep: &mut impl Keep<E>,
    ) -> Result<(), E> {
        let (even, heads) = (self.even(&scored), scored.heads());
        match self.spec.budget() {
            Budget::Uniform | Budget::Pyramid => {
                let place = (layer, self.layers);
                let cut = Cut::first_read(&self.spec, self.tokens, place, scored.n);
                let k = cut.map_or(scored.open(), |cut| cut.k);
                let chosen = (0..heads).map(|h| self.pick(&scored, h, k)).collect();
                return keep(layer, &mut scored, chosen, true);
            }
            Budget::DynamicKv => {
                let most = (0..heads).map(|h| scored.best(h, DYNAMIC_MOST * even)).collect();
                keep(layer, &mut scored, most, false)?;
                self.waiting.push(scored);
                if (layer + 1).is_multiple_of(DYNAMIC_PERIOD) && layer + 1 < self.layers {
                    self.tighten(keep)?;
                }
            }
            Budget::PrefixKv | Budget::Global => self.waiting.push(scored),
        }
        Ok(())
    }

    /// DynamicKV's budgets for the layers read so far, which share the whole model's.
    fn tighten<E>(&mut self, keep: &mut impl Keep<E>) -> Result<(), E> {
        let budgets = budget::dynamic(&self.waiting, self.total());
        for (layer, (scored, k)) in self.waiting.iter_mut().zip(budgets).enumerate() {
            let best = (0..scored.heads()).map(|h| scored.best(h, k)).collect();
            keep(layer, scored, best, false)?;
        }
        Ok(())
    }

    pub(super) fn pick(&self, scored: &Scored, h: usize, k: usize) -> Vec<u32> {
        match &self.spec.refine {
            Some(refine) => scored.refined(h, k, refine),
            None => scored.best(h, k),
        }
    }

    /// What a layer of which `n` tokens were read may choose among, before there are scores; they begin at slots `first` of
    /// its heads.
    pub fn scored(&self, n: usize, first: Vec<usize>) -> Scored {
        let protects = self
            .evict()
            .map_or((n, 0), |evict| evict.protects(n, kept(evict.keep, self.tokens, n)));
        let held = vec![(0..n as u32).collect(); first.len()];
        Scored { n, scores: Vec::new(), protects, held, first }
    }

    /// Tokens that a head of a layer keeps beside the protected ones where all keep as many.
    pub(super) fn even(&self, scored: &Scored) -> usize {
        let share = self.evict().map_or(Share::ALL, |evict| evict.keep);
        let protected = scored.n - scored.open();
        kept(share, self.tokens, scored.n).saturating_sub(protected)
    }

    /// Such tokens of a head in all layers, as many as the newest waiting one's for those that are still to come.
    pub(super) fn total(&self) -> usize {
        let read: usize = self.waiting.iter().map(|l| self.even(l)).sum();
        let next = self.waiting.last().map_or(0, |l| self.even(l));
        read + next * (self.layers - self.waiting.len())
    }

    fn goes_on(&self, layer: usize) -> bool {
        self.spec.tsp.is_some_and(|tsp| tsp.layer(self.layers) == layer)
    }

    pub(super) fn evict(&self) -> Option<&Evict> {
        self.spec.evict.as_ref()
    }
}

/// Has each head of a layer keep these tokens of what it holds, ascending; once the layer is settled, for good.
pub trait Keep<E>: FnMut(usize, &mut Scored, Vec<Vec<u32>>, bool) -> Result<(), E> {}

impl<E, F: FnMut(usize, &mut Scored, Vec<Vec<u32>>, bool) -> Result<(), E>> Keep<E> for F {}

/// In staged layers of a cache, which are packed in the end.
fn keep_staged((cache, row): (&mut Cache, Row), team: &Team) -> impl Keep<CacheError> {
    move |layer, scored, chosen, settled| {
        for (h, kept) in chosen.into_iter().enumerate() {
            let first = scored.first[h];
            let slots = scored.narrow(h, kept);
            cache.keep(row, layer, h, first, &slots)?;
        }
        match settled {
            true => cache.compress(row, layer, team),
            false => {
                cache.tighten(row, layer);
                Ok(())
            }
        }
    }
}
