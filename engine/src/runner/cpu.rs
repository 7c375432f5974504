//! Many sequences over one set of pools in host memory.

use kvwarp::sample;
use kvwarp::slab::Format;

use super::{Frozen, Row, RunError, Runner, Slabs, TURN, Turn, check, need_of, plus};
use crate::cache::{Cache, CacheStats};
use crate::config::Config;
use crate::model::{Model, ModelError, Work};
use crate::profile::{Launch, Profile};
use crate::spec::CacheSpec;
use crate::watch::Watch;

/// A model that runs on this machine's processor.
pub struct CpuRunner<'m> {
    model: &'m Model<'m>,
    cache: Cache,
    work: Work,
    rows: usize,
    open: usize,
}

impl<'m> CpuRunner<'m> {
    /// At most `rows` sequences of at most `context` tokens; the pools grow as they must.
    ///
    /// # Errors
    /// [`ModelError`], as of [`Model::cache`].
    pub fn new(
        model: &'m Model<'m>,
        spec: &CacheSpec,
        rows: usize,
        context: usize,
    ) -> Result<Self, ModelError> {
        let cache = model.cache(spec, context)?;
        Ok(Self { model, cache, work: Work::default(), rows, open: 0 })
    }

    /// The same with pools of so many slabs, taken from the allocator at once.
    #[must_use]
    pub fn with_pools(mut self, slabs: &Slabs) -> Self {
        self.cache.limit(slabs);
        self.cache.reserve(&plus(*slabs, self.cache.begun(self.rows, 1)));
        self
    }

    /// Where its sequences lie, to put one there from elsewhere ([`crate::store`]).
    pub fn cache_mut(&mut self) -> &mut Cache {
        &mut self.cache
    }

    /// Slabs of each format that `bytes` hold, the rings of all rows taken off, in the proportion in which sequences of
    /// `len` tokens need them to run and to be frozen.
    pub fn slabs_in(&self, bytes: usize, len: usize) -> Slabs {
        let mix = self.slabs_for(1, len);
        let beside = self.cache.beside(self.rows) * self.cache.slab_stride(Format::F16);
        let bytes = bytes.saturating_sub(beside);
        let each = |format: Format| mix[format as usize] * self.cache.slab_stride(format);
        let all: usize = Format::ALL.into_iter().map(each).sum();
        let shares = bytes as f64 / all as f64;
        mix.map(|slabs| (slabs as f64 * shares) as usize)
    }

    /// Slabs that `rows` sequences of `len` tokens need to run, and their rings to be frozen.
    pub fn slabs_for(&self, rows: usize, len: usize) -> Slabs {
        let mut slabs = self.cache.need(0, len).map(|slabs| slabs * rows);
        slabs[Format::F16 as usize] += self.cache.rings() * rows;
        slabs
    }

    /// The next token of each row of a turn, from the logits of the last step.
    fn choose(&mut self, turns: &[Turn<'_>], out: &mut Vec<Vec<u32>>) -> Result<(), RunError> {
        let vocab = self.model.config().vocab;
        let draws = turns.iter().flat_map(|turn| (0..turn.tokens.len()).map(move |i| (turn, i)));
        let draws: Vec<_> = draws.collect();
        let mut chosen: Vec<_> = draws.iter().map(|_| Ok(0)).collect();
        let (logits, clock) = self.work.timed_logits();
        let choose = |row: usize, to: &mut [kvwarp::Result<u32>]| {
            let (turn, i) = draws[row];
            let draw = sample::draw(turn.choice.seed, turn.draw.wrapping_add(i as i32));
            let (logits, sampling) = (&logits[row * vocab..][..vocab], &turn.choice.sampling);
            to[0] = sample::cpu(logits, sampling, &turn.seen(i), draw);
        };
        let team = self.model.team();
        clock.time(|| Launch::of("sample"), || team.each_chunk(&mut chosen, 1, choose));
        let mut chosen = chosen.into_iter();
        out.clear();
        for turn in turns {
            out.push(chosen.by_ref().take(turn.tokens.len()).collect::<Result<_, _>>()?);
        }
        Ok(())
    }

    fn check_row(&self) -> Result<(), RunError> {
        if self.open == self.rows {
            return Err(RunError::Rows { rows: self.rows });
        }
        Ok(())
    }
}

impl Runner for CpuRunner<'_> {
    fn config(&self) -> &Config {
        self.model.config()
    }

    fn spec(&self) -> &CacheSpec {
        self.cache.spec()
    }

    fn rows(&self) -> usize {
        self.rows
    }

    fn context(&self) -> usize {
        self.cache.context()
    }

    fn open(&mut self) -> Result<Row, RunError> {
        self.check_row()?;
        self.open += 1;
        Ok(self.cache.open())
    }

    fn close(&mut self, row: Row) {
        self.open -= 1;
        self.cache.close(row);
    }

    fn len(&self, row: Row) -> usize {
        self.cache.position(row)
    }

    fn free(&self) -> Slabs {
        self.cache.free()
    }

    fn need(&self, len: usize, n: usize) -> Slabs {
        self.cache.need(len, n)
    }

    fn read(&mut self, row: Row, tokens: &[u32], watch: &mut Watch<'_>) -> Result<(), RunError> {
        check(&self.need(self.len(row), tokens.len()), &self.free())?;
        let most = self.cache.spec().at_once();
        let mut read =
            |tokens| self.model.read(tokens, (&mut self.cache, row), &mut self.work, watch);
        let read = tokens.chunks(most).try_for_each(|tokens| read(tokens).map(drop));
        self.cache.unstage();
        Ok(read?)
    }

    fn step(&mut self, turns: &[Turn<'_>], out: &mut Vec<Vec<u32>>) -> Result<(), RunError> {
        let mut need = Slabs::default();
        for turn in turns {
            need = plus(need, need_of(self, turn)?);
        }
        check(&need, &self.free())?;
        let tokens: Vec<_> = turns.iter().map(|turn| (turn.row, turn.tokens)).collect();
        self.model.step(&tokens, &mut self.cache, &mut self.work)?;
        self.choose(turns, out)
    }

    fn rollback(&mut self, row: Row, n: usize) -> Result<(), RunError> {
        Ok(self.cache.rollback(row, n)?)
    }

    fn drafts(&self, row: Row) -> usize {
        let len = self.len(row);
        let room = self.context().saturating_sub(len + 1).min(TURN - 1);
        (1..=room).take_while(|&n| self.cache.is_loose(row, n)).count()
    }

    fn freeze(&mut self, row: Row) -> Result<Frozen, RunError> {
        if self.spec().kivi_exact {
            return Err(RunError::Shared { spec: Box::new(*self.spec()) });
        }
        let mut need = Slabs::default();
        need[Format::F16 as usize] = self.cache.need_frozen(row);
        check(&need, &self.free())?;
        Ok(self.cache.freeze(row)?)
    }

    fn thaw(&mut self, frozen: &Frozen) -> Result<Row, RunError> {
        self.check_row()?;
        self.open += 1;
        Ok(self.cache.thaw(frozen))
    }

    fn melt(&mut self, frozen: Frozen) {
        self.cache.melt(frozen);
    }

    fn stats(&self, row: Row) -> CacheStats {
        self.cache.stats(row)
    }

    fn memory(&self) -> Vec<(&'static str, usize)> {
        ["pools", "rings", "staging"].into_iter().zip(self.cache.most_bytes()).collect()
    }

    fn start_profile(&mut self) {
        self.work.clock.start();
    }

    fn end_profile(&mut self) -> Result<Profile, RunError> {
        Ok(self.work.clock.stop())
    }
}
