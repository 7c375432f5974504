//! The seam to scheduling.

use super::Gpu;
use super::platform::GpuError;
use super::tally::Use;
use crate::cache::{CacheError, CacheStats};
use crate::config::Config;
use crate::model::ModelError;
use crate::profile::Profile;
use crate::runner::{Frozen, Row, RunError, Runner, Slabs, TURN, Turn, check, need_of, plus};
use crate::spec::CacheSpec;
use crate::watch::Watch;

impl From<GpuError> for RunError {
    fn from(error: GpuError) -> Self {
        match error {
            GpuError::Kernel(error) => Self::Kernel(error),
            error => Self::Gpu(Box::new(error)),
        }
    }
}

impl Gpu {
    /// That tokens are of the vocabulary and fit after what `row` holds.
    fn fits(&self, row: Row, tokens: &[u32]) -> Result<(), ModelError> {
        ModelError::check_tokens(tokens, self.net.config.vocab)?;
        let (need, context) = (self.cache.len(row) + tokens.len(), self.context());
        match need > context {
            true => Err(CacheError::Full { need, context }.into()),
            false => Ok(()),
        }
    }

    fn check_turns(&self, turns: &[Turn<'_>]) -> Result<(), RunError> {
        let mut need = Slabs::default();
        for turn in turns {
            need = plus(need, need_of(self, turn)?);
            self.fits(turn.row, turn.tokens)?;
            turn.choice.sampling.check()?;
        }
        check(&need, &self.free())
    }
}

impl Runner for Gpu {
    fn config(&self) -> &Config {
        &self.net.config
    }

    fn spec(&self) -> &CacheSpec {
        self.cache.spec()
    }

    fn rows(&self) -> usize {
        self.cache.rows()
    }

    fn context(&self) -> usize {
        self.cache.shape().context
    }

    fn open(&mut self) -> Result<Row, RunError> {
        self.cache.open()
    }

    fn close(&mut self, row: Row) {
        self.cache.close(row);
    }

    fn len(&self, row: Row) -> usize {
        self.cache.len(row)
    }

    fn free(&self) -> Slabs {
        self.cache.free()
    }

    fn need(&self, len: usize, n: usize) -> Slabs {
        self.cache.need(len, n)
    }

    fn read(&mut self, row: Row, tokens: &[u32], watch: &mut Watch<'_>) -> Result<(), RunError> {
        self.fits(row, tokens)?;
        check(&self.need(self.len(row), tokens.len()), &self.free())?;
        let most = self.cache.spec().at_once();
        tokens.chunks(most).try_for_each(|tokens| self.read_block(row, tokens, watch))
    }

    /// Turns of as many tokens run together.
    fn step(&mut self, turns: &[Turn<'_>], out: &mut Vec<Vec<u32>>) -> Result<(), RunError> {
        self.check_turns(turns)?;
        out.clear();
        out.resize(turns.len(), Vec::new());
        for each in 1..=TURN {
            let alike = |i: &usize| turns[*i].tokens.len() == each;
            let (places, alike): (Vec<_>, Vec<_>) =
                (0..turns.len()).filter(alike).map(|i| (i, &turns[i])).unzip();
            if alike.is_empty() {
                continue;
            }
            for (i, chosen) in places.into_iter().zip(self.run(&alike, each)?) {
                out[i] = chosen;
            }
        }
        Ok(())
    }

    fn rollback(&mut self, row: Row, n: usize) -> Result<(), RunError> {
        let spare = self.cache.spare(row);
        if n > spare {
            return Err(ModelError::from(CacheError::Packed { n, spare }).into());
        }
        self.cache.retreat(row, n);
        Ok(())
    }

    /// None where the token before them packs a slab: several tokens are written at once, and pack nothing.
    fn drafts(&self, row: Row) -> usize {
        let room = self.context().saturating_sub(self.len(row) + 1).min(TURN - 1);
        self.cache.loose(row, room)
    }

    fn freeze(&mut self, row: Row) -> Result<Frozen, RunError> {
        self.cache.freeze(row)
    }

    fn thaw(&mut self, frozen: &Frozen) -> Result<Row, RunError> {
        let mut edits = Vec::new();
        let row = self.cache.thaw(frozen, &mut edits)?;
        self.control.edit(&self.net.ops, self.cache.table(), &edits)?;
        Ok(row)
    }

    fn melt(&mut self, frozen: Frozen) {
        self.cache.melt(frozen);
    }

    fn stats(&self, row: Row) -> CacheStats {
        self.cache.stats(row)
    }

    fn memory(&self) -> Vec<(&'static str, usize)> {
        Use::ALL.into_iter().map(Use::name).zip(self.taken()).collect()
    }

    fn start_profile(&mut self) {
        self.platform.start();
    }

    fn end_profile(&mut self) -> Result<Profile, RunError> {
        Ok(self.platform.stop()?)
    }
}
