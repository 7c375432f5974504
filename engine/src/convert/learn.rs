//! What a conversion learns of the source, layer by layer over texts that each stand alone: the second moment of what goes
//! into attention, and which pairs matter.

use faer::Mat;
use kvwarp::rms_norm;

use super::algebra::{add_product, matrix};
use super::search::{Heads, Text, search};
use super::state::State;
use super::{ConvertError, Request};
use crate::config::Config;
use crate::model::{Layer, Model, Seen, Work};
use crate::source::Source;
use crate::watch::Watch;

/// Residual streams of texts, `[tokens, width]` each.
pub type Streams = Vec<Vec<f32>>;

/// The beginning of the streams of `tokens` in pieces of `window`.
pub fn streams(model: &Model<'_>, tokens: &[u32], window: usize) -> Result<Streams, ConvertError> {
    Ok(tokens.chunks(window).map(|piece| model.embed(piece)).collect::<Result<_, _>>()?)
}

/// Passes one stream through `layer`, and returns what went through its attention.
pub fn see(
    model: &Model<'_>,
    layer: &Layer<'_>,
    x: &mut Vec<f32>,
    watch: &mut Watch<'_>,
) -> Result<Seen, ConvertError> {
    let mut work = Work::seeing();
    model.alone(layer, x, &mut work, watch)?;
    Ok(work.seen.unwrap_or_default())
}

/// The input of attention in `layer`, of the residual stream `x`.
pub fn input(config: &Config, layer: &Layer<'_>, x: &[f32]) -> kvwarp::Result<Vec<f32>> {
    let mut h = vec![0.0; x.len()];
    rms_norm::cpu(x, &layer.attn_norm, config.rms_eps, &mut h)?;
    Ok(h)
}

/// Adds the order of pairs of each layer to `state`, as far as it has none, saving it after each; returns the second
/// moments `E[h h^T]`, `[layers]`.
pub fn learn(
    (source, model): (&Source, &Model<'_>),
    request: &Request<'_>,
    rounds: usize,
    state: &mut State,
    watch: &mut Watch<'_>,
) -> Result<Vec<Mat<f64>>, ConvertError> {
    let config = &source.config;
    let inv_freq = config.rope.frequencies(config.head_dim);
    let heads = Heads {
        kv_heads: config.kv_heads,
        group: config.group(),
        head_dim: config.head_dim,
        inv_freq: &inv_freq,
        pairing: crate::model::pairing(config),
    };
    let mut streams = streams(model, request.tokens, request.window)?;
    let searched = request.searched.div_ceil(request.window);
    let mut moments = Vec::new();
    for n in 0..config.layers {
        let layer = Layer::new(&source.weights, config, n)?;
        let (mut moment, mut texts) = (Mat::zeros(config.width, config.width), Vec::new());
        for (i, x) in streams.iter_mut().enumerate() {
            let seen = see(model, &layer, x, watch)?;
            let h = matrix(&seen.h, config.width);
            add_product(&mut moment, &h, &h);
            if i < searched {
                texts.push(seen);
            }
        }
        moments.push(moment * (1.0 / request.tokens.len() as f64));
        if state.orders.len() == n {
            let texts: Vec<_> = texts.iter().map(|seen| Text { q: &seen.q, k: &seen.k }).collect();
            state.orders.push(search(heads, &texts, rounds, model.team(), watch)?);
            state.save()?;
        }
    }
    Ok(moments)
}
