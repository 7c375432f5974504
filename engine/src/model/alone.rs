//! One layer by itself.

use super::layers::Layer;
use super::read::Stream;
use super::{Model, ModelError, Work};
use crate::cache::{Cache, Shape};
use crate::spec::CacheSpec;
use crate::watch::Watch;

impl Model<'_> {
    /// `layer`, which need not be one of this model's, over a text that stands by itself: `x` is its residual stream
    /// `[tokens, width]`, before and after.
    ///
    /// # Errors
    /// As [`Model::prefill`].
    pub(crate) fn alone(
        &self,
        layer: &Layer<'_>,
        x: &mut Vec<f32>,
        work: &mut Work,
        watch: &mut Watch<'_>,
    ) -> Result<(), ModelError> {
        let tokens = x.len() / self.config.width;
        let shape = Shape { layers: 1, ..self.shape(tokens) };
        let mut cache = Cache::new(&CacheSpec::default(), shape)?;
        let row = cache.open();
        cache.advance(row, tokens)?;
        cache.stage(row, 0, tokens);
        let mut stream = Stream { x: std::mem::take(x), positions: (0..tokens).collect() };
        let done = self.through((0, layer), &mut stream, (&mut cache, row), work, watch);
        *x = stream.x;
        done
    }
}
