//! Reading many tokens, layer by layer.

use super::layers::Layer;
use super::step::{Of, Piece};
use super::{Model, ModelError, Work};
use crate::cache::Cache;
use crate::policy::{Evict, Observer, Policy, Repeat};
use crate::profile::Launch;
use crate::runner::Row;
use crate::watch::Watch;

/// Rows of a prompt that pass through a layer together: enough to use each weight many times while it is in cache,
/// few enough that their activations stay small.
pub(super) const ROWS: usize = 256;
/// Rows of logits computed together: 64 rows of 49,152 are 12.6 MB.
const LOGIT_ROWS: usize = 64;

/// Tokens on their way through the layers.
pub(super) struct Stream {
    /// Residual stream, `[tokens, width]`.
    pub x: Vec<f32>,
    pub positions: Vec<usize>,
}

impl Model<'_> {
    /// Reads `tokens` after what `row` holds, and keeps of them what the spec has kept; the logits of the last are then in
    /// `work`.
    ///
    /// # Errors
    /// [`ModelError`]; after one `row` must be closed.
    pub fn prefill(
        &self,
        tokens: &[u32],
        (cache, row): (&mut Cache, Row),
        work: &mut Work,
        watch: &mut Watch<'_>,
    ) -> Result<(), ModelError> {
        let x = self.read(tokens, (cache, row), work, watch)?;
        self.logits(&x[x.len() - self.config.width..], false, work)
    }

    /// Reads `tokens` after what `row` holds as if they were decoded, and gives each one's logits `[vocab]` to `take`, in
    /// order: all of them stay, but for what LagKV drops.
    ///
    /// # Errors
    /// As [`Model::prefill`].
    pub fn score(
        &self,
        tokens: &[u32],
        (cache, row): (&mut Cache, Row),
        work: &mut Work,
        watch: &mut Watch<'_>,
        take: &mut dyn FnMut(&[f32]),
    ) -> Result<(), ModelError> {
        let x = self.pass(tokens, (cache, row), None, work, watch)?;
        for x in x.chunks(LOGIT_ROWS * self.config.width) {
            self.logits(x, false, work)?;
            work.logits.chunks_exact(self.config.vocab).for_each(&mut *take);
            watch.step(0)?;
        }
        Ok(())
    }

    /// All layers over `tokens`, layer by layer; returns the residual stream `[tokens, width]` of those that went through
    /// all layers, the last among them. Tokens are chosen among those of a first read; of later ones all stay, but for what
    /// LagKV drops.
    ///
    /// # Errors
    /// As [`Model::prefill`].
    pub fn read(
        &self,
        tokens: &[u32],
        (cache, row): (&mut Cache, Row),
        work: &mut Work,
        watch: &mut Watch<'_>,
    ) -> Result<Vec<f32>, ModelError> {
        let (layers, heads) = (self.layers.len(), self.config.heads);
        let policy = match cache.position(row) {
            0 => Policy::new(cache.spec(), layers, heads, tokens.len()),
            _ => None,
        };
        self.pass(tokens, (cache, row), policy, work, watch)
    }

    fn pass(
        &self,
        tokens: &[u32],
        (cache, row): (&mut Cache, Row),
        mut policy: Option<Policy>,
        work: &mut Work,
        watch: &mut Watch<'_>,
    ) -> Result<Vec<f32>, ModelError> {
        let x = work.clock.time(|| Launch::of("embed"), || self.embed(tokens))?;
        let first = cache.advance(row, tokens.len())?;
        let mut stream = Stream { x, positions: (first..first + tokens.len()).collect() };
        let repeat = policy.as_ref().and_then(Policy::repeats).copied();
        let repeat =
            repeat.map(|evict| Ok::<_, ModelError>((evict, self.repeat()?))).transpose()?;
        // What is said again follows in the same staged ring.
        let room = repeat.map_or(0, |(evict, repeat)| repeat.most(evict.options.chunk.into()));
        for (index, layer) in self.layers.iter().enumerate() {
            let n = stream.positions.len();
            cache.stage(row, index, n + room);
            self.unfold((index, layer), (cache, row), work)?;
            work.observer = policy.as_ref().and_then(|policy| {
                let first: Vec<_> = cache.lens(row, index).collect();
                policy.observer(index, n, &first)
            });
            self.through((index, layer), &mut stream, (cache, row), work, watch)?;
            let observer = work.observer.take();
            match &mut policy {
                None => {
                    let settle = || self.settle((cache, row), index);
                    work.clock.time(|| Launch::of("kv_pack"), settle)?;
                }
                Some(policy) => {
                    let (held, stream) = ((&mut *cache, row), &mut stream);
                    let choose = || self.choose(policy, held, index, stream, observer);
                    work.clock.time(|| Launch::of("token_select"), choose)?;
                }
            }
        }
        if let (Some(policy), Some((evict, repeat))) = (&mut policy, repeat) {
            self.say_again(policy, (&evict, repeat), tokens, (cache, row), work, watch)?;
        }
        if let Some(policy) = &mut policy {
            policy.finish((cache, row), &self.team)?;
        }
        self.pack_latents(std::iter::once(row), cache, work)?;
        cache.unstage();
        Ok(stream.x)
    }

    /// One staged layer over all of `stream`.
    pub(super) fn through(
        &self,
        (index, layer): (usize, &Layer<'_>),
        stream: &mut Stream,
        (cache, row): (&mut Cache, Row),
        work: &mut Work,
        watch: &mut Watch<'_>,
    ) -> Result<(), ModelError> {
        let (width, angles) = (self.config.width, self.angles(stream.positions.iter().copied()));
        for (i, x) in stream.x.chunks_mut(ROWS * width).enumerate() {
            let rows = x.len() / width;
            let piece = Piece { x, angles: &angles, first: i * ROWS, rows, of: Of::Prompt(row) };
            self.layer(index, layer, piece, cache, work)?;
            watch.step(rows)?;
        }
        Ok(())
    }

    /// Packs layer `index`; LagKV drops what it would have while decoding.
    fn settle(&self, (cache, row): (&mut Cache, Row), index: usize) -> Result<(), ModelError> {
        if let Some(evict) = cache.spec().evict.filter(|_| cache.spec().lag().is_some()) {
            cache.lag_staged(row, index, &evict, &self.team)?;
        }
        Ok(cache.compress(row, index, &self.team)?)
    }

    /// What the policy does once layer `index` is done: drops tokens of it, and those that go no deeper.
    fn choose(
        &self,
        policy: &mut Policy,
        (cache, row): (&mut Cache, Row),
        index: usize,
        stream: &mut Stream,
        mut observer: Option<Observer>,
    ) -> Result<(), ModelError> {
        let (n, team) = (stream.positions.len(), &self.team);
        let views = cache.staged_views(row, index);
        let onward = policy.onward(index, n, (team, observer.as_mut()), &views)?;
        policy.after_layer((cache, row), (index, n), observer, team)?;
        let Some(onward) = onward else { return Ok(()) };
        let width = self.config.width;
        let row = |i: &u32| &stream.x[*i as usize * width..][..width];
        stream.x = onward.iter().flat_map(row).copied().collect();
        stream.positions = onward.iter().map(|&i| stream.positions[i as usize]).collect();
        Ok(())
    }

    /// KVzip: all layers over a request to say `tokens` again and over the answer, a chunk at a time; none of it stays.
    fn say_again(
        &self,
        policy: &mut Policy,
        (evict, repeat): (&Evict, &Repeat),
        tokens: &[u32],
        (cache, row): (&mut Cache, Row),
        work: &mut Work,
        watch: &mut Watch<'_>,
    ) -> Result<(), ModelError> {
        let (n, kv_heads, layers) = (tokens.len(), self.config.kv_heads, self.layers.len());
        let position = cache.position(row);
        let mut scores = vec![vec![0.0; kv_heads * n]; layers];
        for start in (0..n).step_by(evict.options.chunk.into()) {
            let part = start..n.min(start + usize::from(evict.options.chunk));
            let said = repeat.tokens(tokens, part.clone());
            let positions = (position..position + said.len()).collect();
            let mut stream = Stream { x: self.embed(&said)?, positions };
            for (index, layer) in self.layers.iter().enumerate() {
                let lens: Vec<_> = cache.lens(row, index).collect();
                let observer = policy.listener(n, part.clone(), said.len(), &lens);
                work.observer = Some(observer);
                self.through((index, layer), &mut stream, (cache, row), work, watch)?;
                let heard = work.observer.take().map(Observer::into_scores).unwrap_or_default();
                let heads = scores[index].chunks_exact_mut(n).zip(heard.chunks_exact(part.len()));
                heads.for_each(|(all, part_of)| all[part.clone()].copy_from_slice(part_of));
                cache.retract(row, index, said.len());
            }
        }
        for (index, scores) in scores.into_iter().enumerate() {
            policy.after_repeat((cache, row), (index, n), scores, &self.team)?;
        }
        Ok(())
    }

    /// The words for it.
    fn repeat(&self) -> Result<&Repeat, ModelError> {
        if let Some(repeat) = self.repeat.get() {
            return Ok(repeat);
        }
        let repeat = Box::new(Repeat::new(self.source)?);
        Ok(self.repeat.get_or_init(|| repeat))
    }
}
