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

/// Share of the mean gain of a layer that a text of a thousand tokens cannot tell from none.
const DOUBTFUL: f64 = 1.0 / 16.0;

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
        let mut staged = staged::open(self.source, orders, budget.pairs)?;
        self.put(&mut staged, &vec![budget.rank; orders.len()])?;
        Ok(staged)
    }

    /// `staged` with as much of the cache for all layers together, and each layer's latent vector as long as it is worth:
    /// elements weigh what they take of the layer's error, errors of layers the root of what each gains a text alone. The
    /// root, because what several layers gain together is less than the sum. Layers stay alike where none gains.
    pub fn by_layer(
        &self,
        staged: &mut Source,
        budget: Budget,
        text: &[u32],
        state: &mut State,
        watch: &mut Watch<'_>,
    ) -> Result<(), ConvertError> {
        let most = Budget::most(budget.pairs, &self.source.config);
        if budget.rank >= most {
            return Ok(());
        }
        let gains = self.gains((staged, most), budget, text, state, watch)?;
        let least = gains.iter().sum::<f64>() / gains.len() as f64 * DOUBTFUL;
        if least <= 0.0 {
            return Ok(());
        }
        let shares = self.each(|n| {
            let projections = Projections::of(self.source, n)?;
            let [_, rest] = projections.split(&channels(staged, n));
            let mut shares = match self.weights(staged, n, &projections)? {
                Some(weights) => weights.shares(&rest)?,
                None => shares(&rest, None)?,
            };
            let dropped = shares[budget.rank..].iter().sum::<f64>().max(f64::MIN_POSITIVE);
            let weight = gains[n].max(least).sqrt() / dropped;
            shares.iter_mut().for_each(|share| *share *= weight);
            Ok(shares)
        })?;
        self.put(staged, &ranks(&shares, budget.rank, most))
    }

    /// What the prediction of `text` gains where one layer has `most` elements, all that it has use for.
    fn gains(
        &self,
        (staged, most): (&mut Source, usize),
        budget: Budget,
        text: &[u32],
        state: &mut State,
        watch: &mut Watch<'_>,
    ) -> Result<Vec<f64>, ConvertError> {
        let alike = match state.tried(budget) {
            Some(nats) => nats,
            None => nats(&self.model.like(staged)?, text, watch)?,
        };
        for n in state.gains(budget).len()..self.source.config.layers {
            for rank in [most, budget.rank] {
                let (projections, factors) = self.layer(staged, n, rank)?;
                put(staged, n, &projections, &factors)?;
                if rank == most {
                    let gain = alike - nats(&self.model.like(staged)?, text, watch)?;
                    state.gains(budget).push(gain);
                    state.save()?;
                }
            }
        }
        Ok(state.gains(budget).clone())
    }

    fn put(&self, staged: &mut Source, ranks: &[usize]) -> Result<(), ConvertError> {
        let layers = self.each(|n| self.layer(staged, n, ranks[n]))?;
        let mut layers = layers.iter().enumerate();
        layers.try_for_each(|(n, (projections, factors))| put(staged, n, projections, factors))
    }

    fn layer(
        &self,
        staged: &Source,
        n: usize,
        rank: usize,
    ) -> Result<(Projections, Factors), ConvertError> {
        let projections = Projections::of(self.source, n)?;
        let [elite, rest] = projections.split(&channels(staged, n));
        let [a, b] = match self.weights(staged, n, &projections)? {
            Some(weights) => weights.factors(&rest, rank)?,
            None => factors(&rest, None, rank)?,
        };
        Ok((projections, Factors { elite, a, b }))
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
