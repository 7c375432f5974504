//! Recovery by gradients: what a converted layer's attention adds to the residual stream is trained to be what the source's
//! adds, and what the stream has lost before, layer by layer on the activations that the converted layers before it leave.
//!
//! Queries, elite keys, factors and the output projection are trained together, by Adam on the mean squared error of a few
//! texts at a time. Some texts are only looked at, and what is kept is what served them best.

mod adam;
mod block;
mod layer;
#[cfg(test)]
mod tests;

use faer::Mat;

use super::ConvertError;
use super::algebra::matrix;
use super::learn::{Streams, input, see};
use super::recover::Recovery;
use super::staged::decoded;
use crate::model::{Layer, Model, ModelError};
use crate::source::Source;
use crate::watch::Watch;
use adam::Adam;
use block::{Block, Example, Weights};

/// Texts of a step.
const BATCH: usize = 2;
/// Of so many texts one is only looked at.
const LOOKED_AT: usize = 8;
/// Steps from a look to the next.
const APART: usize = 10;

/// Tokens that pass through a layer where there are so many texts of `window` tokens.
pub fn work(texts: usize, window: usize, steps: usize) -> usize {
    let seen = if looked_at(texts) > 0 { looked_at(texts) } else { texts };
    let looks = (steps.div_ceil(APART) + 1) * seen;
    (2 * texts + steps * BATCH + looks) * window
}

/// The newest of so many texts that are only looked at; where there are few, all are trained on.
fn looked_at(texts: usize) -> usize {
    texts / LOOKED_AT
}

/// To `source`, for so many steps a layer.
pub struct Distil<'a>(pub &'a Source, pub &'a Model<'a>, pub usize);

impl Recovery for Distil<'_> {
    fn layer(
        &self,
        staged: &mut Source,
        n: usize,
        before: &mut Streams,
        now: &Streams,
        watch: &mut Watch<'_>,
    ) -> Result<(), ConvertError> {
        let Self(source, model, steps) = *self;
        let examples = examples((source, model), n, (before, now), watch)?;
        let (block, weights) = layer::read(staged, n)?;
        let trained = train((&block, weights), &examples, steps, model, watch)?;
        layer::write(source, staged, n, &trained)
    }
}

/// Inputs of attention in the streams `now`, and what it should add to them: what layer `n` of the source adds to the streams
/// `before`, which pass through it, and what those are ahead.
fn examples(
    (source, model): (&Source, &Model<'_>),
    n: usize,
    (before, now): (&mut Streams, &Streams),
    watch: &mut Watch<'_>,
) -> Result<Vec<Example>, ConvertError> {
    let (config, layer) = (&source.config, Layer::new(&source.weights, &source.config, n)?);
    let inner = config.heads * config.head_dim;
    let o: Mat<f32> =
        matrix(&decoded(source, &format!("blk.{n}.attn_output"), config.width, inner)?, inner);
    let mut examples = Vec::new();
    for (before, now) in before.iter_mut().zip(now.iter()) {
        let g = input(config, &layer, now)?;
        let ahead = matrix::<f32>(before, config.width) - matrix::<f32>(now, config.width);
        let mix = matrix::<f32>(&see(model, &layer, before, watch)?.mix, inner);
        let wanted = mix * o.transpose() + ahead;
        examples.push(Example { g: matrix(&g, config.width), wanted });
    }
    Ok(examples)
}

/// The best weights that training passes, by the mean squared error of the texts that are looked at.
fn train(
    (block, mut weights): (&Block, Weights),
    examples: &[Example],
    steps: usize,
    model: &Model<'_>,
    watch: &mut Watch<'_>,
) -> Result<Weights, ConvertError> {
    let (trained, seen) = examples.split_at(examples.len() - looked_at(examples.len()));
    let seen: Vec<_> = if seen.is_empty() { trained } else { seen }.iter().collect();
    let (mut adam, mut best) = (Adam::new(&weights), (f64::INFINITY, weights.clone()));
    for step in 0..=steps {
        if step % APART == 0 || step == steps {
            let errors = each(model, &seen, watch, |example| block.error(&weights, example))?;
            let error = errors.iter().sum();
            if error < best.0 {
                best = (error, weights.clone());
            }
        }
        if step == steps {
            break;
        }
        let batch = (0..BATCH).map(|i| &trained[(step * BATCH + i) % trained.len()]);
        let batch: Vec<_> = batch.collect();
        let gradients = each(model, &batch, watch, |example| block.gradient(&weights, example))?;
        let left = 1.0 - step as f32 / steps as f32;
        adam.step(&mut weights, &gradients, left);
    }
    Ok(best.1)
}

/// Of each example, on the threads of the model.
fn each<T: Send>(
    model: &Model<'_>,
    examples: &[&Example],
    watch: &mut Watch<'_>,
    of: impl Fn(&Example) -> T + Sync,
) -> Result<Vec<T>, ConvertError> {
    let mut all: Vec<Option<T>> = examples.iter().map(|_| None).collect();
    model.team().each_chunk(&mut all, 1, |i, to| to[0] = Some(of(examples[i])));
    let rows = examples.iter().map(|example| example.g.nrows()).sum();
    watch.step(rows).map_err(ModelError::from)?;
    Ok(all.into_iter().flatten().collect())
}
