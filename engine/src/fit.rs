//! How many sequences fit in so much memory.

use kvwarp::pages::Entry;
use kvwarp::slab::Format;

use crate::cache::{CacheError, Plan, Shape, full_bytes, newest, stride};
use crate::config::{Config, Elite};
use crate::model::{Model, Work};
use crate::source::Source;
use crate::spec::CacheSpec;

/// An answer, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fit {
    /// Memory that there is.
    pub memory: usize,
    /// Keys, values and page tables of a sequence of the tokens that were asked for.
    pub sequence: usize,
    /// What all sequences have together: weights, activations, scratch.
    pub shared: usize,
    /// How many there may be at once; none where not even one fits.
    pub sequences: usize,
}

/// Nobody asks for more.
const MOST: usize = 1 << 16;

/// The largest number up to 65,536 of which `fits` says so; it says so of all that are smaller.
pub(crate) fn most<E>(mut fits: impl FnMut(usize) -> Result<bool, E>) -> Result<usize, E> {
    let (mut good, mut bad) = (0, 1);
    while bad <= MOST && fits(bad)? {
        (good, bad) = (bad, 2 * bad);
    }
    bad = bad.min(MOST + 1);
    while bad - good > 1 {
        let middle = good + (bad - good) / 2;
        if fits(middle)? { good = middle } else { bad = middle }
    }
    Ok(good)
}

/// How many sequences of `tokens` tokens the host could hold in `memory` bytes beside the model of `source`, of whose
/// prompts `block` tokens are read together.
///
/// # Errors
/// [`CacheError::Kernel`] for a head size that no slab has.
pub fn on_host(
    (model, source): (&Model<'_>, &Source),
    spec: &CacheSpec,
    (tokens, block): (usize, usize),
    memory: usize,
) -> Result<Fit, CacheError> {
    let shape = model.shape(tokens);
    // Its ring once more, for the day it is frozen; of latents what has not left the window.
    let plan = model.plan(spec);
    let full = |context| full_bytes(spec, Shape { context, ..shape }, &plan);
    let ring = match &plan.latents {
        Some(shapes) => newest(spec) * (stride(shapes.iter(), Format::F16) + size_of::<Entry>()),
        None => full(1)?,
    };
    let sequence = full(tokens)? + ring;
    // While a prompt is read one layer of it is exact.
    let layer = Shape { layers: 1, ..shape };
    let exact = full_bytes(&CacheSpec::default(), layer, &Plan::default())?;
    // Latents of a block are packed when all layers have read it.
    let read = match spec.packs().is_some() {
        true => full_bytes(&CacheSpec::of(model.config()), model.shape(block), &plan)?,
        false => 0,
    };
    let weights: usize = source.weights.iter().map(|tensor| tensor.bytes.len()).sum();
    let weights = weights + absorbed(model.config(), spec);
    let shared = weights + exact + read + Work::bytes(model.config(), block);
    let sequences = memory.saturating_sub(shared) / sequence.max(1);
    Ok(Fit { memory, sequence, shared, sequences: sequences.min(MOST) })
}

/// Bytes of the f16 matrices with which latents are attended to, beside those of the file.
fn absorbed(config: &Config, spec: &CacheSpec) -> usize {
    let Config { kv_heads, head_dim, .. } = *config;
    let elite = config.elite.iter().filter(|_| spec.latent);
    let rows = |elite: &Elite| kv_heads * 2 * (head_dim - elite.pairs);
    elite.map(|elite| 2 * elite.ranks.iter().sum::<usize>() * rows(elite)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_that_fits_is_found() {
        for limit in [0, 1, 2, 3, 7, 8, 100, 65_535, 65_536, 1 << 20] {
            let mut asked = 0;
            let found = most(|n| {
                asked += 1;
                Ok::<_, ()>(n <= limit)
            });
            assert_eq!(found, Ok(limit.min(1 << 16)));
            assert!(asked < 36, "{asked} for {limit}");
        }
        assert_eq!(most(|n| if n < 5 { Ok(true) } else { Err(n) }), Err(8));
    }
}
