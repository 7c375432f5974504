//! Attention: one decode step over every store, context and batch, and the attention of a prefill.

use super::cache::{Heads, Noise, Store};
use super::card::{Card, Launch};
use super::case::{Case, Ready};
use anyhow::Result;
use kvwarp::ffi::{
    KVW_F16, kvw_paged_attn_bytes, kvw_paged_attn_workspace, kvw_prefill_attn_bytes,
};
use kvwarp::slab::Format::{F16, Fp8, Q2, Q4, Q8};
use kvwarp::slab::{Format, Meta};
use kvwarp::{paged_attn, prefill_attn};

/// A store of f16 metadata, 128 tokens of window.
const fn store(name: &'static str, format: Format, group: usize) -> Store {
    Store { name, format, group, meta: Meta::F16, window: 128 }
}

/// The baseline of our own, and the store that the figures and the sweep are about.
pub const HALVES: Store = Store { window: 0, ..store("f16", F16, 32) };
pub const TWO_BIT: Store = store("q2g32", Q2, 32);

/// Every store of the history.
pub const STORES: &[Store] = &[
    HALVES,
    TWO_BIT,
    store("q2g64", Q2, 64),
    store("q2g128", Q2, 128),
    Store { meta: Meta::U8, ..store("q2g32u8", Q2, 32) },
    Store { meta: Meta::U8, ..store("q2g64u8", Q2, 64) },
    store("q4g32", Q4, 32),
    store("q8g32", Q8, 32),
    store("fp8", Fp8, 32),
];

/// Llama-3-8B, Llama-2-7B, and heads of 64 channels as in Llama-3.2-1B.
pub const LLAMA3: Heads = Heads { q: 32, kv: 8, d: 128 };
const MHA: Heads = Heads { q: 32, kv: 32, d: 128 };
const SMALL: Heads = Heads { q: 32, kv: 8, d: 64 };

/// Context and batch, those of the figures first.
const SIZES: [(usize, usize); 9] = [
    (32768, 16),
    (4096, 1),
    (4096, 16),
    (4096, 64),
    (32768, 1),
    (32768, 64),
    (131072, 1),
    (131072, 16),
    (131072, 64),
];

/// CTAs, and units that each takes at least, that a sweep tries; 0 is what the op chooses.
const CUTS: [(i32, i32); 12] = [
    (132, 0),
    (264, 0),
    (396, 0),
    (528, 0),
    (792, 0),
    (0, 1),
    (0, 2),
    (0, 8),
    (0, 16),
    (264, 8),
    (528, 2),
    (528, 8),
];
/// Its sizes: the smallest, where launches and cuts weigh most, and the one of the figures.
const SWEPT: [(usize, usize); 4] = [(4096, 1), (4096, 16), (32768, 1), (32768, 16)];
/// Queries of a speculative step.
const DRAFT: usize = 4;

/// One step of `queries` tokens a sequence; `cut` as in [`CUTS`].
fn decode(store: Store, heads: Heads, at: (usize, usize), queries: usize, cut: (i32, i32)) -> Case {
    let (context, batch) = at;
    let prepare = move |card: &Card| -> Result<Ready> {
        let caches = store.caches(card, heads, context, batch)?;
        let n = batch * queries * heads.q * heads.d;
        let out = card.zeros(n * 2)?;
        let mut args = paged_attn::Args {
            struct_size: size_of::<paged_attn::Args>() as u32,
            q_heads: heads.q as i32,
            cache: caches.each[0],
            q: card.upload(&Noise(1).halves(n, 0.3))? as _,
            out: out as _,
            workspace: 4096 as _, // until its size is known
            workspace_bytes: usize::MAX,
            max_slabs: caches.slabs as i32,
            q_len: queries as i32,
            ctas: cut.0,
            least: cut.1,
            dtype: KVW_F16,
            ..Default::default()
        };
        // SAFETY: live params; nothing behind their pointers is read.
        let (need, bytes) =
            unsafe { (kvw_paged_attn_workspace(&args), kvw_paged_attn_bytes(&args)) };
        (args.workspace, args.workspace_bytes) = (card.zeros(need)? as _, need);
        let launch = |cache| -> Launch {
            let args = paged_attn::Args { cache, ..args };
            // SAFETY: the arena keeps everything until the next case.
            Box::new(move |stream| unsafe { paged_attn::run(&args, stream) })
        };
        let launches = caches.each.into_iter().map(launch).collect();
        Ok(Ready { launches, bytes, operations: 0.0, output: Some((out, n)) })
    };
    Case::new("paged_attn", store.name, &heads.name(), Box::new(prepare))
        .at(context, batch, queries)
}

/// The newest `queries` of `context` tokens, the rest a history in `store`; f16: all in the ring.
fn prefill(store: Store, heads: Heads, context: usize, queries: usize) -> Case {
    let prepare = move |card: &Card| -> Result<Ready> {
        let history = context - queries;
        let ring_store = Store { window: if history > 0 { queries } else { context }, ..store };
        let caches = ring_store.caches(card, heads, context, 1)?;
        let n = queries * heads.q * heads.d;
        let (q, out) = (card.upload(&Noise(2).halves(n, 0.3))?, card.zeros(n * 2)?);
        let packed = card.upload(&[(history / kvwarp::slab::TOKENS) as i32])?;
        let rows = card.upload(&[0, queries as i32])?;
        let args = |mut cache: kvwarp::ffi::kvw_cache| {
            cache.packed = packed as _;
            prefill_attn::Args {
                struct_size: size_of::<prefill_attn::Args>() as u32,
                q_heads: heads.q as i32,
                cache,
                q: q as _,
                out: out as _,
                cu_tokens: rows as _,
                tokens: queries as i32,
                max_tokens: queries as i32,
                max_slabs: context.div_ceil(kvwarp::slab::TOKENS) as i32,
                dtype: kvwarp::ffi::KVW_F16,
                ..Default::default()
            }
        };
        // SAFETY: live params; nothing behind their pointers is read.
        let bytes = unsafe { kvw_prefill_attn_bytes(&args(caches.each[0])) };
        let launch = |cache| -> Launch {
            let args = args(cache);
            // SAFETY: the arena keeps everything until the next case.
            Box::new(move |stream| unsafe { prefill_attn::run(&args, stream) })
        };
        let seen = queries as f64 * (history as f64 + (queries as f64 + 1.0) / 2.0);
        let operations = 4.0 * seen * (heads.q * heads.d) as f64;
        let launches = caches.each.into_iter().map(launch).collect();
        Ok(Ready { launches, bytes, operations, output: Some((out, n)) })
    };
    let case = Case::new("prefill_attn", store.name, &heads.name(), Box::new(prepare));
    case.at(context, 1, queries).alone()
}

pub fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for at in SIZES {
        all.extend(STORES.iter().map(|&store| decode(store, LLAMA3, at, 1, (0, 0))));
    }
    for &store in STORES {
        let queries = if store.format == F16 { 8192 } else { 2048 };
        all.push(prefill(store, LLAMA3, 8192, queries));
    }
    all.push(prefill(HALVES, LLAMA3, 32768, 32768));
    for heads in [MHA, SMALL] {
        all.extend(STORES.iter().map(|&store| decode(store, heads, (32768, 4), 1, (0, 0))));
    }
    for at in [(4096, 1), (32768, 16)] {
        all.extend([HALVES, TWO_BIT].map(|store| decode(store, LLAMA3, at, DRAFT, (0, 0))));
    }
    for at in SWEPT {
        let name = |(ctas, least)| format!("ctas={ctas};least={least}");
        all.extend(CUTS.map(|cut| decode(TWO_BIT, LLAMA3, at, 1, cut).variant(name(cut))));
    }
    all
}
