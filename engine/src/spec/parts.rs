//! The parts of a cache spec, a row each.

use kvwarp::slab::Meta;

use super::CacheSpec;
use crate::policy::parse;

/// Bound on `window` and `sinks`: both are f16 memory for every layer and head.
const MAX_TOKENS: usize = 1 << 20;

/// One part of the grammar.
pub(super) struct Part {
    pub name: &'static str,
    /// What its value may be, as help and errors say it; empty for a bare name.
    pub accepts: &'static str,
    pub help: &'static str,
    /// Whether it chooses tokens, which every store can do without.
    pub chooses: bool,
    /// Takes the value; `false` when it is not acceptable.
    pub read: fn(&mut CacheSpec, &str) -> bool,
    /// The value to write where it is not the preset's.
    pub write: fn(&CacheSpec) -> String,
}

pub(super) const PARTS: [Part; 12] = [
    Part {
        name: "window",
        accepts: "0 to 1048576 tokens",
        help: "newest tokens that stay f16 (default 128; q2 and latents 64, q2-small 0)",
        chooses: false,
        read: |spec, value| tokens(value).is_some_and(|n| set(&mut spec.window, n)),
        write: |spec| spec.window.to_string(),
    },
    Part {
        name: "sinks",
        accepts: "0 to 1048576 tokens",
        help: "oldest tokens that stay f16, in slabs of 64 (default 0; q2 and latents 64)",
        chooses: false,
        read: |spec, value| tokens(value).is_some_and(|n| set(&mut spec.sinks, n)),
        write: |spec| spec.sinks.to_string(),
    },
    Part {
        name: "group",
        accepts: "32, 64 or 128",
        help: "elements that share a scale and a minimum (default 32; q2 64)",
        chooses: false,
        read: |spec, value| {
            let group = [32, 64, 128].into_iter().find(|n| n.to_string() == value);
            group.is_some_and(|n| set(&mut spec.group, n))
        },
        write: |spec| spec.group.to_string(),
    },
    Part {
        name: "meta",
        accepts: "f16 or u8",
        help: "kind of scales and minima of q4 and q2, u8 with group 32 or 64 (default f16; q2 u8)",
        chooses: false,
        read: |spec, value| {
            let kinds = [("f16", Meta::F16), ("u8", Meta::U8)];
            let kind = kinds.into_iter().find(|(name, _)| *name == value);
            kind.is_some_and(|(_, meta)| set(&mut spec.meta, meta))
        },
        write: |spec| if spec.meta == Meta::U8 { "u8" } else { "f16" }.to_owned(),
    },
    Part {
        name: "hadamard",
        accepts: "on or off",
        help: "turn K and V so that outliers spread, and round K as calibrated (default off; q4, q2 on)",
        chooses: false,
        read: |spec, value| {
            let turns = [("on", true), ("off", false)].into_iter().find(|(name, _)| *name == value);
            turns.is_some_and(|(_, turn)| set(&mut spec.hadamard, turn))
        },
        write: |spec| if spec.hadamard { "on" } else { "off" }.to_owned(),
    },
    Part {
        name: "range",
        accepts: "50 to 100 percent",
        help: "share of a group's range that 2-bit codes span (default 100; q2 88, latent-q2 75)",
        chooses: false,
        read: |spec, value| {
            let percent = value.parse().ok().filter(|n| (50..=100).contains(n));
            percent.is_some_and(|n| set(&mut spec.range, n))
        },
        write: |spec| spec.range.to_string(),
    },
    Part {
        name: "keep",
        accepts: "0 to 100 percent",
        help: "kv heads that stay at 4 bits, those that lose most by the calibration (default 0; q2 2)",
        chooses: false,
        read: |spec, value| {
            let percent = value.parse().ok().filter(|n| *n <= 100);
            percent.is_some_and(|n| set(&mut spec.keep, n))
        },
        write: |spec| spec.keep.to_string(),
    },
    Part {
        name: "kivi_exact",
        accepts: "",
        help: "KIVI's own K and V boundaries; window is its residual length",
        chooses: false,
        read: |spec, value| value.is_empty() && set(&mut spec.kivi_exact, true),
        write: |_| String::new(),
    },
    Part {
        name: "evict",
        accepts: "METHOD:SHARE[:OPTION...], a share of 0 to 1 and a method of the list",
        help: "tokens of a prompt that stay, for example snapkv:0.25 or lagkv:0.5:lag=64",
        chooses: true,
        read: |spec, value| {
            parse::evict(value).is_some_and(|evict| set(&mut spec.evict, Some(evict)))
        },
        write: |spec| spec.evict.map(|evict| evict.to_string()).unwrap_or_default(),
    },
    Part {
        name: "refine",
        accepts: "kvcrush:SHARE[:mean|random|alternate|zeros|ones]",
        help: "share of what `evict` keeps that stands for the rest (KVCrush), for example kvcrush:0.05",
        chooses: true,
        read: |spec, value| {
            parse::refine(value).is_some_and(|refine| set(&mut spec.refine, Some(refine)))
        },
        write: |spec| spec.refine.map(|refine| refine.to_string()).unwrap_or_default(),
    },
    Part {
        name: "budget",
        accepts: "uniform, pyramid, dynamickv, prefixkv or global",
        help: "how many each layer and head keeps (default uniform; kvzip global)",
        chooses: true,
        read: |spec, value| {
            parse::budget(value).is_some_and(|budget| set(&mut spec.budget, Some(budget)))
        },
        write: |spec| {
            spec.budget.map(|budget| parse::budget_name(budget).to_owned()).unwrap_or_default()
        },
    },
    Part {
        name: "tsp",
        accepts: "[LAYER:]RATE, a layer and a rate of 0 to 1",
        help: "share of a prompt that goes deeper than a layer (FastKV), for example 0.2 or 15:0.2",
        chooses: true,
        read: |spec, value| parse::tsp(value).is_some_and(|tsp| set(&mut spec.tsp, Some(tsp))),
        write: |spec| spec.tsp.map(|tsp| tsp.to_string()).unwrap_or_default(),
    },
];

fn set<T>(field: &mut T, value: T) -> bool {
    *field = value;
    true
}

fn tokens(value: &str) -> Option<usize> {
    let digits = !value.is_empty() && value.bytes().all(|b| b.is_ascii_digit());
    value.parse().ok().filter(|n| digits && *n <= MAX_TOKENS)
}
