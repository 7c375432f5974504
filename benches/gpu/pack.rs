//! Writing the cache: one token a sequence, and the slabs of a prefill.

use super::attn::{LLAMA3, STORES};
use super::cache::{Noise, Store};
use super::card::{Card, Launch};
use super::case::{Case, Ready};
use anyhow::Result;
use kvwarp::ffi::{
    KVW_F16, KVW_PACK_APPEND, KVW_PACK_FILL, KVW_PACK_FLUSH, KVW_ROPE_HALF, kvw_kv_pack_bytes,
};
use kvwarp::kv_pack;
use kvwarp::pages::ring_slabs;
use kvwarp::slab::{Format, TOKENS};

/// `op` on caches that hold `context` tokens a sequence; FILL and FLUSH write all of them. With `feedback` K makes up
/// for its errors and 2-bit codes span nine tenths of a range.
fn rounded(
    op: i32,
    name: &str,
    store: Store,
    (context, batch): (usize, usize),
    feedback: bool,
) -> Case {
    let whole = op != KVW_PACK_APPEND;
    let prepare = move |card: &Card| -> Result<Ready> {
        let heads = LLAMA3;
        let ring = if whole { context.div_ceil(TOKENS) } else { ring_slabs(store.window).max(1) };
        let caches = store.caches_with_ring(card, heads, context, batch, ring)?;
        let tokens = if op == KVW_PACK_FILL { batch * context } else { batch };
        let rows = tokens * heads.kv * heads.d;
        let mut noise = Noise(3);
        let position = |i: usize| if whole { i % context } else { context - 1 };
        let positions: Vec<i32> = (0..tokens).map(|i| position(i) as i32).collect();
        let turns = |i: usize| 5e5f32.powf(-2.0 * i as f32 / heads.d as f32);
        let inv_freq: Vec<f32> = (0..heads.d / 2).map(turns).collect();
        let cu_tokens: Vec<i32> = (0..=batch).map(|s| (s * context) as i32).collect();
        let slabs = (context - store.window) / TOKENS;
        let most = if op == KVW_PACK_FILL { context } else { slabs };
        let weights = card.upload(&noise.halves(heads.kv * heads.d * heads.d, 0.05))?;
        let args = kv_pack::Args {
            struct_size: size_of::<kv_pack::Args>() as u32,
            op,
            cache: caches.each[0],
            k: card.upload(&noise.halves(rows, 1.0))? as _,
            v: card.upload(&noise.halves(rows, 1.0))? as _,
            positions: card.upload(&positions)? as _,
            inv_freq: card.upload(&inv_freq)? as _,
            cu_tokens: card.upload(&cu_tokens)? as _,
            first: card.zeros(4 * batch)? as _,
            feedback: if feedback { weights as _ } else { std::ptr::null() },
            range: if feedback { 0.9 } else { 1.0 },
            k_stride: (heads.kv * heads.d) as i64,
            v_stride: (heads.kv * heads.d) as i64,
            tokens: tokens as i32,
            max_tokens: most as i32,
            pairing: KVW_ROPE_HALF,
            dtype: KVW_F16,
            ..Default::default()
        };
        // SAFETY: live params; nothing behind their pointers is read.
        let bytes = unsafe { kvw_kv_pack_bytes(&args) };
        let launch = |cache| -> Launch {
            let args = kv_pack::Args { cache, ..args };
            // SAFETY: the arena keeps everything until the next case.
            Box::new(move |stream| unsafe { kv_pack::run(&args, stream) })
        };
        let launches = caches.each.into_iter().map(launch).collect();
        Ok(Ready { launches, bytes, operations: 0.0, output: None })
    };
    let format = format!("{name}_{}", store.name);
    Case::new("kv_pack", &format, &LLAMA3.name(), Box::new(prepare)).at(context, batch, 1)
}

fn case(op: i32, name: &str, store: Store, context: usize, batch: usize) -> Case {
    rounded(op, name, store, (context, batch), false)
}

/// The same with feedback, as a variant.
fn fed(op: i32, name: &str, store: Store, context: usize, batch: usize) -> Case {
    rounded(op, name, store, (context, batch), true).variant("feedback".into())
}

pub fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for batch in [1, 16, 64] {
        for &store in STORES {
            // A slab leaves the window with token 4096, none with the next.
            all.extend([4096, 4097].map(|len| case(KVW_PACK_APPEND, "append", store, len, batch)));
        }
    }
    for &store in STORES {
        let (op, name) = if store.format == Format::F16 {
            (KVW_PACK_FILL, "fill")
        } else {
            (KVW_PACK_FLUSH, "flush")
        };
        all.push(case(op, name, store, 8192, 1).alone());
    }
    for &store in STORES.iter().filter(|store| store.format == Format::Q2) {
        all.extend([1, 64].map(|batch| fed(KVW_PACK_APPEND, "append", store, 4096, batch)));
        all.push(fed(KVW_PACK_FLUSH, "flush", store, 8192, 1).alone());
    }
    all
}
