//! A text that a model has read and a cache keeps, to ask questions of.

use super::Held;
use crate::cache::Cache;
use crate::model::{Model, ModelError, Work};
use crate::runner::Row;
use crate::spec::CacheSpec;
use crate::watch::Watch;

/// One sequence with a cache of its own.
pub struct Context<'m> {
    model: &'m Model<'m>,
    cache: Cache,
    row: Row,
    work: Work,
    /// Of what follows the newest token.
    logits: Vec<f32>,
}

impl<'m> Context<'m> {
    /// An empty one for `tokens` tokens.
    ///
    /// # Errors
    /// As of [`Model::cache`].
    pub fn new(model: &'m Model<'m>, spec: &CacheSpec, tokens: usize) -> Result<Self, ModelError> {
        let mut cache = model.cache(spec, tokens)?;
        let row = cache.open();
        Ok(Self { model, cache, row, work: Work::default(), logits: Vec::new() })
    }

    /// Reads a text; it is compressed when this returns.
    ///
    /// # Errors
    /// [`ModelError`]; the context is of no use then.
    pub fn read(&mut self, tokens: &[u32], watch: &mut Watch<'_>) -> Result<(), ModelError> {
        let Self { model, cache, row, work, logits } = self;
        model.prefill(tokens, (cache, *row), work, watch)?;
        work.logits().clone_into(logits);
        Ok(())
    }

    /// Reads what follows a compressed text.
    ///
    /// # Errors
    /// As of [`Context::read`].
    pub fn append(&mut self, tokens: &[u32], watch: &mut Watch<'_>) -> Result<(), ModelError> {
        let Self { model, cache, row, work, logits } = self;
        model.score(tokens, (cache, *row), work, watch, &mut |newest| newest.clone_into(logits))
    }

    /// The same context once more.
    pub fn copy(&self) -> Self {
        let Self { model, cache, row, logits, .. } = self;
        let (cache, logits) = (cache.clone(), logits.clone());
        Self { model, cache, row: *row, work: Work::default(), logits }
    }

    /// Says the `steps` most probable tokens, one after the other, fewer where `ends` has one; that one is left out.
    ///
    /// # Errors
    /// As of [`Context::read`].
    pub fn say(
        &mut self,
        steps: usize,
        ends: &dyn Fn(u32) -> bool,
        watch: &mut Watch<'_>,
    ) -> Result<Vec<u32>, ModelError> {
        let mut said = Vec::with_capacity(steps);
        for _ in 0..steps {
            let best = self.logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
            // A vocabulary has fewer than 2^32 tokens.
            let best = best.map_or(0, |(token, _)| token as u32);
            if ends(best) {
                break;
            }
            said.push(best);
            let Self { model, cache, row, work, logits } = self;
            model.step(&[(*row, &[best])], cache, work)?;
            work.logits().clone_into(logits);
            watch.step(0)?;
        }
        Ok(said)
    }

    /// What the cache takes now.
    pub fn held(&self) -> Held {
        let tokens = self.cache.position(self.row);
        Held::new(&self.cache.stats(self.row), tokens, self.model.shape(tokens))
    }
}
