//! What a model and its calibration add to a spec.

use std::sync::Arc;

use half::f16;
use kvwarp::lowrank_kv;
use kvwarp::slab::{Format, TOKENS};

use super::head::Rules;
use crate::config::Config;
use crate::runner::Slabs;
use crate::spec::CacheSpec;

/// Heads are counted over all layers, `layer * kv_heads + head`.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    /// Weights of K's rounding errors, `[heads, D, D]` ([`kvwarp::slab::feedback`]).
    pub feedback: Option<Arc<[f16]>>,
    /// Store of each head's history, `[heads]`; the spec's where there is none.
    pub stores: Option<Arc<[Format]>>,
    /// Rows of each layer, `[layers]`, where latents are kept and no keys and values.
    pub latents: Option<Arc<[lowrank_kv::Shape]>>,
}

impl Plan {
    /// For `heads` heads in all, of which `losers`, those that lose most first, and `feedback` come from a calibration.
    pub fn new(
        spec: &CacheSpec,
        heads: usize,
        losers: &[usize],
        feedback: Option<Arc<[f16]>>,
    ) -> Self {
        let kept = spec.kept(heads);
        let mut stores = vec![spec.store; heads];
        losers.iter().take(kept).for_each(|&h| stores[h] = Format::Q4);
        Self {
            feedback: feedback.filter(|_| spec.hadamard),
            stores: (kept > 0).then(|| stores.into()),
            latents: None,
        }
    }

    /// The same with the rows of a converted model, where `spec` and the model have latents.
    #[must_use]
    pub fn with_latents(self, spec: &CacheSpec, config: &Config) -> Self {
        let elite = config.elite.as_ref().filter(|_| spec.latent);
        let latents = elite.and_then(|elite| elite.latents(config).ok());
        Self { latents: latents.map(Into::into), ..self }
    }

    /// Store of head `h`.
    pub fn store(&self, spec: &CacheSpec, h: usize) -> Format {
        self.stores.as_ref().map_or(spec.store, |stores| stores[h])
    }

    /// Rules of head `h`, of `d` channels.
    pub(super) fn rules<'a>(&'a self, spec: &CacheSpec, h: usize, d: usize) -> Rules<'a> {
        let feedback = self.feedback.as_ref().map(|rows| &rows[h * d * d..(h + 1) * d * d]);
        let store = self.store(spec, h);
        Rules { store, ..Rules::new(spec, feedback) }
    }
}

/// Slabs that a sequence of `len` tokens takes for `n` more, with heads of these stores.
pub fn need(stores: impl Iterator<Item = Format>, spec: &CacheSpec, len: usize, n: usize) -> Slabs {
    let mut need = Slabs::default();
    if spec.selects() {
        return bound(stores, spec, len, n);
    }
    for store in stores {
        let rules = Rules { store, ..Rules::new(spec, None) };
        for ((format, after), (_, before)) in rules.slabs(len + n).into_iter().zip(rules.slabs(len))
        {
            need[format as usize] += after - before;
        }
    }
    need
}

/// The same where tokens are dropped: at most. Heads then hold different numbers of tokens, of which only the sum is known
/// before, so each may begin a slab more; and a slab leaves the window of a head when it will.
fn bound(stores: impl Iterator<Item = Format>, spec: &CacheSpec, len: usize, n: usize) -> Slabs {
    let mut need = Slabs::default();
    for store in stores {
        let rules = Rules { store, ..Rules::new(spec, None) };
        let slabs = if len == 0 { spec.stays(n).div_ceil(TOKENS) + 1 } else { n.div_ceil(TOKENS) };
        let sinks = slabs.min(rules.sink_slabs);
        need[Format::F16 as usize] += sinks;
        need[store as usize] += if len == 0 { slabs - sinks } else { slabs };
    }
    need
}
