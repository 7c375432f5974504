//! The presets, a row each.

use kvwarp::slab::{Format, Meta};

use super::CacheSpec;

/// KIVI's residual length and group, the default of the quantised stores.
const KIVI_WINDOW: usize = 128;
const KIVI_GROUP: usize = 32;

/// KIVI's recipe (arXiv:2402.02750).
const fn kivi(preset: &'static str, store: Format, window: usize) -> CacheSpec {
    CacheSpec {
        preset,
        store,
        latent: false,
        window,
        sinks: 0,
        group: KIVI_GROUP,
        meta: Meta::F16,
        hadamard: false,
        range: 100,
        keep: 0,
        kivi_exact: false,
        evict: None,
        refine: None,
        budget: None,
        tsp: None,
    }
}

/// Two bits with little loss; the README's table says how little.
const fn low_error(preset: &'static str, window: usize) -> CacheSpec {
    CacheSpec {
        sinks: 64,
        group: 64,
        meta: Meta::U8,
        hadamard: true,
        range: 88,
        keep: 2,
        ..kivi(preset, Format::Q2, window)
    }
}

/// Latents in 4 or 2 bits, a scale and a minimum of an element's 64 tokens; slabs are packed whole.
const fn latent(preset: &'static str, store: Format) -> CacheSpec {
    CacheSpec { latent: true, group: 64, sinks: 64, ..kivi(preset, store, 64) }
}

/// Every preset. The first is f16, the last is what a converted model has of its own.
pub const PRESETS: [CacheSpec; 10] = [
    kivi("f16", Format::F16, 0),
    kivi("q8", Format::Q8, KIVI_WINDOW),
    kivi("fp8", Format::Fp8, KIVI_WINDOW),
    CacheSpec { hadamard: true, ..kivi("q4", Format::Q4, KIVI_WINDOW) },
    low_error("q2", 64),
    low_error("q2-small", 0),
    kivi("q2-kivi", Format::Q2, KIVI_WINDOW),
    latent("latent-q4", Format::Q4),
    CacheSpec { range: 75, ..latent("latent-q2", Format::Q2) },
    CacheSpec { latent: true, ..kivi("latent", Format::F16, 0) },
];
