//! How many sequences a GPU could hold, by opening the model on paper: the arithmetic is that of [`super::open`].

use std::rc::Rc;

use super::metered::Metered;
use super::paper::Paper;
use super::platform::{GpuError, Result};
use super::tally::Use;
use super::{Gpu, Options, open_planned, plan};
use crate::cache::Plan;
use crate::calibration::Calibration;
use crate::fit::{Fit, most};
use crate::source::Source;
use crate::spec::CacheSpec;

/// More than any card has.
const ANY: usize = 1 << 50;

/// How many sequences of `options.context` tokens a GPU with `memory` free bytes could hold all at once; `options.rows` and
/// `options.budget` are not looked at.
///
/// # Errors
/// [`GpuError`], but for memory that is short: no sequence fits then.
pub fn fit(
    source: &Source,
    spec: &CacheSpec,
    calibration: Option<&Calibration>,
    options: &Options,
    memory: usize,
) -> Result<Fit> {
    let question = Question { source, spec, plan: plan(source, spec, calibration), options };
    let one = question.open(1, ANY)?;
    let sequences = most(|rows| question.fits(rows, memory))?;
    let there = if sequences > 1 { question.open(sequences, memory)? } else { one };
    let taken = there.taken();
    let own = [Use::Pools, Use::Rings].map(|of| taken[of as usize]).iter().sum::<usize>();
    let shared = taken.iter().sum::<usize>() - own;
    Ok(Fit { memory, sequence: there.cache.sequence_bytes(), shared, sequences })
}

/// A model and what it is to hold.
struct Question<'a> {
    source: &'a Source,
    spec: &'a CacheSpec,
    plan: Plan,
    options: &'a Options,
}

impl Question<'_> {
    fn open(&self, rows: usize, memory: usize) -> Result<Gpu> {
        let Self { source, spec, plan, options } = self;
        let options = Options { rows, budget: None, ..**options };
        let paper = Metered::new(Rc::new(Paper::new(memory)?));
        open_planned(source, spec, plan, &options, paper, &mut |_, _| {})
    }

    /// Whether all of `rows` sequences can have their whole context at once.
    fn fits(&self, rows: usize, memory: usize) -> Result<bool> {
        match self.open(rows, memory) {
            Ok(gpu) => Ok(gpu.holds_all()),
            Err(GpuError::Memory { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }
}
