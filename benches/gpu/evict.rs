//! Scores without attention over one layer's cache, and what is kept into packed slabs.

use super::attn::{HALVES, LLAMA3, STORES, TWO_BIT};
use super::cache::{Noise, Store};
use super::card::{Card, Launch};
use super::case::{Case, Ready, copies};
use anyhow::Result;
use half::f16;
use kvwarp::ffi::{self, kvw_kv_gather_bytes, kvw_sim_evict_bytes};
use kvwarp::slab::{Format, Layout, TOKENS};
use kvwarp::{kv_gather, sim_evict};

/// LagKV over `partitions` of `lag` tokens from token 64 on.
fn lag(
    store: Store,
    (context, batch): (usize, usize),
    (length, partitions): (usize, usize),
    meta: bool,
) -> Case {
    let prepare = move |card: &Card| -> Result<Ready> {
        let caches = store.caches(card, LLAMA3, context, batch)?;
        let args = sim_evict::Args {
            op: ffi::KVW_EVICT_LAG,
            scores: card.zeros(4 * batch * LLAMA3.kv * partitions * length)? as _,
            first: card.upload(&vec![64; batch])? as _,
            lag: length as i32,
            partitions: partitions as i32,
            reference: if meta { ffi::KVW_LAG_META } else { ffi::KVW_LAG_ELEMENTS },
            v_weight: 1.0,
            ..Default::default()
        };
        Ok(ready(args, caches.each))
    };
    let variant = format!("lag{length}{}", if meta { "meta" } else { "" });
    let name = format!("lag_{}", store.name);
    let case = Case::new("sim_evict", &name, &LLAMA3.name(), Box::new(prepare));
    case.at(context, batch, partitions).variant(variant)
}

fn norm(store: Store, context: usize) -> Case {
    let prepare = move |card: &Card| -> Result<Ready> {
        let caches = store.caches(card, LLAMA3, context, 1)?;
        let args = sim_evict::Args {
            op: ffi::KVW_EVICT_NORM,
            scores: card.zeros(4 * LLAMA3.kv * context)? as _,
            columns: context as i32,
            ..Default::default()
        };
        Ok(ready(args, caches.each))
    };
    let name = format!("norm_{}", store.name);
    Case::new("sim_evict", &name, &LLAMA3.name(), Box::new(prepare)).at(context, 1, 1)
}

/// A launch a cache.
fn ready(args: sim_evict::Args, caches: Vec<ffi::kvw_cache>) -> Ready {
    let of =
        |cache| sim_evict::Args { struct_size: size_of::<sim_evict::Args>() as u32, cache, ..args };
    // SAFETY: live params; nothing behind their pointers is read.
    let bytes = unsafe { kvw_sim_evict_bytes(&of(caches[0])) };
    let launch = |cache| -> Launch {
        let args = of(cache);
        // SAFETY: the arena keeps everything until the next case.
        Box::new(move |stream| unsafe { sim_evict::run(&args, stream) })
    };
    Ready {
        launches: caches.into_iter().map(launch).collect(),
        bytes,
        operations: 0.0,
        output: None,
    }
}

/// Bits of tokens of which each head keeps half, or representatives, an eighth of them.
fn crush(op: i32, name: &str, context: usize, batch: usize) -> Case {
    let prepare = move |card: &Card| -> Result<Ready> {
        let (heads, mut noise) = (LLAMA3.kv, Noise(6));
        let bits: Vec<u32> = (0..batch * context).map(|_| noise.bits() as u32 & 0xFF).collect();
        let even: Vec<i32> = (0..context as i32 / 2).map(|i| 2 * i).collect();
        let args = sim_evict::Args {
            op,
            kept: card.upload(&even.repeat(batch * heads))? as _,
            kept_counts: card.upload(&vec![even.len() as i32; batch * heads])? as _,
            kept_stride: even.len() as i32,
            bits: card.upload(&bits)? as _,
            counts: card.upload(&vec![context as i32; batch])? as _,
            wanted: card.upload(&vec![context as i32 / 8; batch])? as _,
            chosen: card.zeros(4 * batch * context)? as _,
            columns: context as i32,
            anchor: ffi::KVW_ANCHOR_MEAN,
            ..Default::default()
        };
        let shape =
            ffi::kvw_cache { seqs: batch as i32, kv_heads: heads as i32, ..Default::default() };
        Ok(ready(args, vec![shape]))
    };
    Case::new("sim_evict", name, &format!("{}heads", LLAMA3.kv), Box::new(prepare))
        .at(context, batch, 1)
}

/// A quarter of a staged prompt into a cache.
fn gather(store: Store, context: usize, feedback: bool) -> Case {
    let prepare = move |card: &Card| -> Result<Ready> {
        let (heads, kept) = (LLAMA3, context / 4);
        let f16_layout = Layout::new(Format::F16, heads.d, 32)?;
        let staged = heads.kv * context / TOKENS * f16_layout.slab_bytes();
        let halves: Vec<f16> = Noise(7).halves(1 << 19, 1.0);
        let from = (0..copies(card, staged).min(4)).map(|_| {
            let at = card.take(staged)?;
            card.fill(at, bytemuck::cast_slice(&halves), staged)?;
            Ok(at)
        });
        let from = from.collect::<Result<Vec<u64>>>()?;
        let weights = Noise(3).halves(heads.kv * heads.d * heads.d, 0.05);
        let slots: Vec<i32> = (0..kept).map(|i| (4 * i + i * 7 % 4) as i32).collect();
        let caches = store.caches(card, heads, kept, 1)?;
        let args = kv_gather::Args {
            struct_size: size_of::<kv_gather::Args>() as u32,
            max_slabs: (kept / TOKENS) as i32,
            cache: caches.each[0],
            from: from[0] as _,
            slots: card.upload(&slots.repeat(heads.kv))? as _,
            feedback: if feedback { card.upload(&weights)? as _ } else { std::ptr::null() },
            range: if feedback { 0.9 } else { 1.0 },
            from_slabs: (context / TOKENS) as i32,
            slots_stride: kept as i32,
            ..Default::default()
        };
        // SAFETY: live params; nothing behind their pointers is read.
        let bytes = unsafe { kvw_kv_gather_bytes(&args) };
        let launch = |(i, cache): (usize, ffi::kvw_cache)| -> Launch {
            let args = kv_gather::Args { cache, from: from[i % from.len()] as _, ..args };
            // SAFETY: the arena keeps everything until the next case.
            Box::new(move |stream| unsafe { kv_gather::run(&args, stream) })
        };
        let launches = caches.each.into_iter().enumerate().map(launch).collect();
        Ok(Ready { launches, bytes, operations: 0.0, output: None })
    };
    let case = Case::new("kv_gather", store.name, &LLAMA3.name(), Box::new(prepare));
    let variant = if feedback { "feedback" } else { "" };
    case.at(context, 1, 1).variant(variant.into()).alone()
}

pub fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for store in [HALVES, TWO_BIT] {
        // A whole prompt, and what comes due in a step of decoding.
        for context in [8192, 32768] {
            all.extend([128, 1024].map(|length| {
                let partitions = (context - 64) / length - 1;
                lag(store, (context, 1), (length, partitions), false).alone()
            }));
        }
        all.push(lag(store, (4096, 16), (128, 1), false));
        all.push(norm(store, 32768).alone());
    }
    all.push(lag(TWO_BIT, (32768, 1), (128, 254), true).alone());
    all.push(lag(TWO_BIT, (4096, 16), (128, 1), true));
    for (context, batch) in [(8192, 1), (32768, 1), (32768, 16)] {
        all.push(crush(ffi::KVW_EVICT_BITS, "bits", context, batch));
        all.push(crush(ffi::KVW_EVICT_REPRESENT, "represent", context, batch));
    }
    for &store in STORES {
        all.push(gather(store, 32768, false));
    }
    all.push(gather(TWO_BIT, 32768, true));
    all
}
