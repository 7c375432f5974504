//! A model with every layer's keys and values factorised: with each budget of a grid, with the best, or with the layers' own.

use faer::Mat;

use super::algebra::{factors, shares};
use super::budget::ranks;
use super::staged::{self, Factors, Projections, channels, put};
use super::state::State;
use super::weigh::Weights;
use super::{Budget, ConvertError, Request, nats};
use crate::model::Model;
use crate::source::Source;
use crate::watch::Watch;

/// What factors are made of.
pub struct Learnt<'a> {
    pub source: &'a Source,
    pub model: &'a Model<'a>,
    /// Second moments of the inputs of attention, where factors follow them.
    pub moments: Option<&'a Vec<Mat<f64>>>,
}

impl Learnt<'_> {
    /// Of several budgets the one with which a text is predicted best.
    pub fn best(
        &self,
        budgets: &[Budget],
        request: &Request<'_>,
        state: &mut State,
        watch: &mut Watch<'_>,
    ) -> Result<Budget, ConvertError> {
        let mut best = (f64::INFINITY, budgets[0]);
        for &budget in budgets.iter().filter(|_| budgets.len() > 1) {
            let nats = match state.tried(budget) {
                Some(nats) => nats,
                None => {
                    let staged = self.factorised(&state.orders, budget)?;
                    let nats = nats(&self.model.like(&staged)?, request.chosen_on, watch)?;
                    state.tried.push((budget.pairs, budget.rank, nats));
                    state.save()?;
                    nats
                }
            };
            if nats < best.0 {
                best = (nats, budget);
            }
        }
        Ok(best.1)
    }

    /// The model with every layer converted, without recovery.
    pub fn factorised(
        &self,
        orders: &[Vec<Vec<u8>>],
        budget: Budget,
    ) -> Result<Source, ConvertError> {
        self.with(orders, budget.pairs, &vec![budget.rank; orders.len()])
    }

    /// The same with as much of the cache for all layers together, and each layer's latent vector as long as its projections
    /// ask; `staged` has as many pairs.
    pub fn by_layer(
        &self,
        staged: &Source,
        orders: &[Vec<Vec<u8>>],
        budget: Budget,
    ) -> Result<Source, ConvertError> {
        let shares = self.each(|n| {
            let projections = Projections::of(self.source, n)?;
            let [_, rest] = projections.split(&channels(staged, n));
            match self.weights(staged, n, &projections)? {
                Some(weights) => weights.shares(&rest),
                None => Ok(shares(&rest, None)?),
            }
        })?;
        let most = Budget::most(budget.pairs, &self.source.config);
        self.with(orders, budget.pairs, &ranks(&shares, budget.rank, most))
    }

    fn with(
        &self,
        orders: &[Vec<Vec<u8>>],
        pairs: usize,
        ranks: &[usize],
    ) -> Result<Source, ConvertError> {
        let mut staged = staged::open(self.source, orders, pairs, ranks)?;
        let layers = self.each(|n| {
            let projections = Projections::of(self.source, n)?;
            let [elite, rest] = projections.split(&channels(&staged, n));
            let [a, b] = match self.weights(&staged, n, &projections)? {
                Some(weights) => weights.factors(&rest, ranks[n])?,
                None => factors(&rest, None, ranks[n])?,
            };
            Ok((projections, Factors { elite, a, b }))
        })?;
        for (n, (projections, factors)) in layers.iter().enumerate() {
            put(&mut staged, n, projections, factors)?;
        }
        Ok(staged)
    }

    /// How errors of layer `n` count, where factors follow activations.
    fn weights(
        &self,
        staged: &Source,
        n: usize,
        from: &Projections,
    ) -> Result<Option<Weights<'_>>, ConvertError> {
        let of = |moment| Weights::new(self.source, n, from, moment, &channels(staged, n)[1]);
        self.moments.map(|moments| of(&moments[n])).transpose()
    }

    /// Of each layer, on the threads of the model.
    fn each<T: Send>(
        &self,
        of: impl Fn(usize) -> Result<T, ConvertError> + Sync,
    ) -> Result<Vec<T>, ConvertError> {
        let mut layers: Vec<Option<_>> = (0..self.source.config.layers).map(|_| None).collect();
        self.model.team().each_chunk(&mut layers, 1, |n, to| to[0] = Some(of(n)));
        layers.into_iter().flatten().collect()
    }
}
