//! How many sequences a GPU could hold, by opening the model on paper: the arithmetic is that of [`super::open`].

use std::rc::Rc;

use kvwarp::slab::TOKENS;

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

/// What a GPU with `memory` free bytes could hold where it cannot hold `options.rows` sequences of `options.context` tokens,
/// in words; empty where that is nothing.
///
/// # Errors
/// As of [`fit`].
pub fn instead(
    source: &Source,
    spec: &CacheSpec,
    calibration: Option<&Calibration>,
    options: &Options,
    memory: usize,
) -> Result<String> {
    let sequences = |spec: &CacheSpec, context: usize| {
        let options = Options { context, block: options.block.min(context), ..*options };
        fit(source, spec, calibration, &options, memory).map(|fit| fit.sequences)
    };
    let (context, bits) = (options.context, "q2");
    let many = |n: usize| if n == 1 { "1 sequence".into() } else { format!("{n} sequences") };
    let as_asked = sequences(spec, context)?;
    let mut words = Vec::new();
    if as_asked > 0 {
        words.push(format!("{} of {context} tokens would fit", many(as_asked)));
    } else {
        let tokens = TOKENS
            * most(|slabs| {
                Ok::<_, GpuError>(slabs * TOKENS < context && sequences(spec, slabs * TOKENS)? > 0)
            })?;
        words.extend((tokens > 0).then(|| format!("1 sequence of {tokens} tokens would fit")));
    }
    if let Some(fewer) = CacheSpec::preset(bits) {
        let with_fewer = sequences(&fewer, context)?;
        let of = format!("{} of {context} tokens with --cache {bits}", many(with_fewer));
        words.extend((with_fewer > as_asked).then_some(of));
    }
    Ok(words.join(", "))
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
        let options = Options { rows, budget: None, least: options.context, ..**options };
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
