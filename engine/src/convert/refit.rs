//! Closed-form recovery: what a converted layer computes is fitted to what the source's layer computes, on the activations
//! that the converted layers before it leave.
//!
//! With `h` the input of attention in the source and `g` that of the converted model, layer by layer:
//! - `W h`, the rows of all keys and values, is fitted by a linear map of `g` (least squares), and the rows that come from the
//!   latent vector by one of rank `c` (reduced-rank regression): the least-squares map, factorised as the source's was.
//!   Elite rows take theirs whole.
//! - the output projection then fits what attention added to the source's residual stream, and what that stream has lost
//!   before, from what attention gives now.

use faer::Mat;

use super::ConvertError;
use super::algebra::{add_product, least_squares, matrix, stacked, values};
use super::learn::{Streams, input, see};
use super::recover::Recovery;
use super::staged::{Factors, Projections, channels, decoded, put, rank};
use super::weigh::Weights;
use crate::config::Config;
use crate::model::{Layer, Model};
use crate::source::Source;
use crate::watch::Watch;

/// By least squares, to `source`.
pub struct Refit<'a>(pub &'a Source, pub &'a Model<'a>);

impl Recovery for Refit<'_> {
    fn layer(
        &self,
        staged: &mut Source,
        n: usize,
        streams: &mut Streams,
        now: &Streams,
        watch: &mut Watch<'_>,
    ) -> Result<(), ConvertError> {
        let Self(source, model) = *self;
        let layer = Layer::new(&source.weights, &source.config, n)?;
        let (before, mut mixes) = (streams.clone(), Vec::new());
        let mut fit = Fit::new(&source.config);
        for (x, now) in streams.iter_mut().zip(now) {
            let seen = see(model, &layer, x, watch)?;
            let g = input(&source.config, &layer, now)?;
            fit.add(&matrix(&g, source.config.width), &matrix(&seen.h, source.config.width));
            mixes.push(seen.mix);
        }
        let projections = Projections::of(source, n)?;
        let (channels, rank) = (channels(staged, n), rank(staged, n));
        let factors = fit.factors((source, n), &projections, &channels, rank)?;
        put(staged, n, &projections, &factors)?;
        let o = output((source, model), staged, n, [&before, now], &mixes, watch)?;
        Ok(staged.weights.put(&format!("blk.{n}.attn_output"), o.ncols(), &values(&o))?)
    }
}

/// Sums over tokens of products of inputs.
struct Fit {
    /// `g g^T`
    inputs: Mat<f64>,
    /// `h g^T`
    cross: Mat<f64>,
    /// How many.
    tokens: usize,
}

impl Fit {
    fn new(config: &Config) -> Self {
        let zero = || Mat::zeros(config.width, config.width);
        Self { inputs: zero(), cross: zero(), tokens: 0 }
    }

    /// Rows of `g` and `h`.
    fn add(&mut self, g: &Mat<f64>, h: &Mat<f64>) {
        self.tokens += g.nrows();
        add_product(&mut self.inputs, g, g);
        add_product(&mut self.cross, h, g);
    }

    fn factors(
        &self,
        (source, n): (&Source, usize),
        from: &Projections,
        channels: &[Vec<usize>; 2],
        rank: usize,
    ) -> Result<Factors, ConvertError> {
        let [elite, rest] = from.split(channels);
        let all = stacked(&[&elite, &rest]);
        let fitted = least_squares(self.tokens, &self.inputs, &(&all * &self.cross), &all)?;
        let elite = fitted.get(..elite.nrows(), ..).to_owned();
        let rest = fitted.get(elite.nrows().., ..).to_owned();
        let mean = &self.inputs * (1.0 / self.tokens.max(1) as f64);
        let weights = Weights::new(source, n, from, &mean, &channels[1])?;
        let [a, b] = weights.factors(&rest, rank)?;
        Ok(Factors { elite, a, b })
    }
}

/// The output projection of layer `n` of `staged` that fits what the source's attention added to the streams `before`, and
/// what the streams `now` are short of.
fn output(
    (source, model): (&Source, &Model<'_>),
    staged: &Source,
    n: usize,
    [before, now]: [&Streams; 2],
    mixes: &[Vec<f32>],
    watch: &mut Watch<'_>,
) -> Result<Mat<f64>, ConvertError> {
    let Config { width, heads, head_dim, .. } = source.config;
    let inner = heads * head_dim;
    let o = matrix::<f64>(&decoded(source, &format!("blk.{n}.attn_output"), width, inner)?, inner);
    let layer = Layer::new(&staged.weights, &staged.config, n)?;
    let (mut inputs, mut outputs) = (Mat::zeros(inner, inner), Mat::zeros(width, inner));
    for ((before, now), mix) in before.iter().zip(now).zip(mixes) {
        let seen = see(model, &layer, &mut now.clone(), watch)?;
        let mixed = matrix::<f64>(&seen.mix, inner);
        let lost = matrix::<f64>(before, width) - matrix::<f64>(now, width);
        let wanted = matrix::<f64>(mix, inner) * o.transpose() + lost;
        add_product(&mut inputs, &mixed, &mixed);
        add_product(&mut outputs, &wanted, &mixed);
    }
    let tokens = before.iter().map(Vec::len).sum::<usize>() / width;
    Ok(least_squares(tokens, &inputs, &outputs, &o)?)
}
