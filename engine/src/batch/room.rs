//! Who gets slabs: prefixes are melted first, then the youngest gives way.

use super::Batch;
use crate::runner::{Row, RunError, Slabs, check, plus};

impl Batch<'_> {
    /// Whether the first who waits could read all its tokens beside what the others have still to read; prefixes that
    /// are in the way are melted, if that is of use.
    pub(super) fn has_room_for_first(&mut self) -> bool {
        let promised = self.active.iter().fold(Slabs::default(), |sum, job| {
            let held = job.held(&*self.runner);
            plus(sum, self.runner.need(held, job.tokens.len() - held))
        });
        loop {
            let Some(job) = self.waiting.front() else { return false };
            let shared = self.prefixes.reach(&job.keys);
            let more = self.runner.need(shared, job.tokens.len() - shared);
            let (need, free) = (plus(promised, more), self.runner.free());
            if check(&need, &free).is_ok() {
                return true;
            }
            let of_use = check(&need, &plus(free, self.prefixes.slabs())).is_ok();
            if !((of_use || self.active.is_empty()) && self.melt_one()) {
                // Alone, it fits: it was checked when it came.
                return self.active.is_empty();
            }
        }
    }

    /// Makes room for the request of this arrival to read; false when it had to give way itself.
    ///
    /// # Errors
    /// [`RunError::Exhausted`] when even alone it does not fit.
    pub(super) fn make_room_to_read(
        &mut self,
        arrival: u64,
        need: Slabs,
    ) -> Result<bool, RunError> {
        while let Err(error) = check(&need, &self.runner.free()) {
            if self.melt_one() {
                continue;
            }
            let [_, .., youngest] = &self.active[..] else { return Err(error) };
            let itself = youngest.arrival == arrival;
            self.preempt(self.active.len() - 1);
            if itself {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Makes room for a step; who takes part in it, by place.
    ///
    /// # Errors
    /// The only one left and [`RunError::Exhausted`] when even alone it does not fit.
    pub(super) fn make_room_to_step(&mut self) -> Result<Vec<usize>, (usize, RunError)> {
        loop {
            let (members, runner) = (self.members(), &*self.runner);
            members.iter().for_each(|&i| self.active[i].lay_out(runner));
            let need = members.iter().filter_map(|&i| self.active[i].turn(&*self.runner));
            let need = need.fold(Slabs::default(), |sum, turn| {
                plus(sum, self.runner.need(self.runner.len(turn.row), turn.tokens.len()))
            });
            let Err(error) = check(&need, &self.runner.free()) else { return Ok(members) };
            if self.melt_one() {
                continue;
            }
            match self.active.len() {
                1 => return Err((0, error)),
                n => self.preempt(n - 1),
            }
        }
    }

    /// Who can take a step; only the first suspect while there is one.
    fn members(&self) -> Vec<usize> {
        let ready = |&i: &usize| !self.active[i].is_reading(&*self.runner);
        let members: Vec<_> = (0..self.active.len()).filter(ready).collect();
        match self.active.iter().position(super::Job::is_suspect) {
            Some(suspect) => members.into_iter().filter(|&i| i == suspect).collect(),
            None => members,
        }
    }

    /// Closes an admitted request, which then waits in the order of arrival.
    pub(super) fn preempt(&mut self, i: usize) {
        let mut job = self.active.remove(i);
        if job.close(self.runner) {
            job.preempted();
        }
        let place = self.waiting.partition_point(|other| other.arrival < job.arrival);
        self.waiting.insert(place, job);
    }

    /// Melts the prefix used longest ago; false when there is none.
    pub(super) fn melt_one(&mut self) -> bool {
        self.prefixes.forget().map(|frozen| self.runner.melt(frozen)).is_some()
    }

    /// Has a request continue from the longest prefix that is longer than what it holds.
    pub(super) fn adopt_prefix(&mut self, i: usize) -> Result<(), RunError> {
        let job = &mut self.active[i];
        if self.prefixes.reach(&job.keys) <= job.held(&*self.runner) {
            return Ok(());
        }
        job.close(self.runner);
        if let Some(frozen) = self.prefixes.longest(&job.keys) {
            job.adopt(self.runner.thaw(frozen)?);
            job.shared = frozen.len;
        }
        Ok(())
    }

    /// Keeps what a request holds at the end of block `block` of its prompt, where there is room for it.
    pub(super) fn keep_prefix(&mut self, i: usize, row: Row, block: usize) {
        let Some(&key) = self.active[i].keys.get(block) else { return };
        if self.prefixes.contains(&key) {
            return;
        }
        loop {
            match self.runner.freeze(row) {
                Ok(frozen) => {
                    let old = self.prefixes.insert(key, frozen);
                    return old.into_iter().for_each(|old| self.runner.melt(old));
                }
                Err(RunError::Exhausted { .. }) if self.melt_one() => {}
                Err(_) => return,
            }
        }
    }
}
