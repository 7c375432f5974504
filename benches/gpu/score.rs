//! Scoring and selecting tokens: windows, all rows, KVzip's chunk; pooling, selections of a row, a layer and a model.

use super::attn::{HALVES, LLAMA3, TWO_BIT};
use super::cache::{Noise, Store};
use super::card::{Card, Launch};
use super::case::{Case, Ready, copies};
use anyhow::Result;
use kvwarp::ffi::{
    KVW_F16, KVW_POOL_AVG, KVW_SCORE_LSE, KVW_SCORE_MAX, KVW_SCORE_SUM, KVW_SELECT_ABOVE,
    KVW_SELECT_GATHER, KVW_SELECT_POOL, KVW_SELECT_TOP_K, kvw_token_score_bytes,
    kvw_token_select_bytes, kvw_token_select_workspace,
};
use kvwarp::slab::TOKENS;
use kvwarp::{token_score, token_select};

/// Slots that KVzip's rows are normalised over: sinks, a chunk, themselves.
const CHUNK: usize = 2048;

/// `op` of the newest `queries` of `context` tokens over `columns` of them from slot `first` on.
fn score(
    (op, name): (i32, &str),
    store: Store,
    (context, queries): (usize, usize),
    (first, columns): (usize, usize),
) -> Case {
    let prepare = move |card: &Card| -> Result<Ready> {
        let heads = LLAMA3;
        let caches = store.caches(card, heads, context, 1)?;
        let q = card.upload(&Noise(6).halves(queries * heads.q * heads.d, 0.3))?;
        let lines = if op == KVW_SCORE_SUM { heads.q } else { heads.kv };
        let seen = [0, 4, first, first + CHUNK, context - queries, context].map(|x| x as i32);
        let by_row = op == KVW_SCORE_LSE;
        let args = token_score::Args {
            struct_size: size_of::<token_score::Args>() as u32,
            op,
            cache: caches.each[0],
            q: q as _,
            lse: card.upload(&vec![10f32; queries * heads.q])? as _,
            scores: card.zeros(4 * lines * columns)? as _,
            cu_tokens: card.upload(&[0, queries as i32])? as _,
            first: card.upload(&[first as i32])? as _,
            seen: if by_row { card.upload(&seen)? as _ } else { std::ptr::null() },
            q_heads: heads.q as i32,
            tokens: queries as i32,
            max_tokens: queries as i32,
            lse_rows: queries as i32,
            columns: columns as i32,
            ranges: if by_row { 3 } else { 0 },
            max_slabs: ((CHUNK + queries) / TOKENS + 1) as i32,
            dtype: KVW_F16,
            ..Default::default()
        };
        // SAFETY: live params; nothing behind their pointers is read.
        let bytes = unsafe { kvw_token_score_bytes(&args) };
        let launch = |cache| -> Launch {
            let args = token_score::Args { cache, ..args };
            // SAFETY: the arena keeps everything until the next case.
            Box::new(move |stream| unsafe { token_score::run(&args, stream) })
        };
        let (n, keys) = (queries as f64, if by_row { 4 + CHUNK } else { columns } as f64);
        let own = if by_row || first + columns == context { n * (n + 1.0) / 2.0 } else { 0.0 };
        let seen = if by_row {
            n * keys + own
        } else {
            n * keys - if own > 0.0 { n * n - own } else { 0.0 }
        };
        let operations = 2.0 * seen * (heads.q * heads.d) as f64;
        let launches = caches.each.into_iter().map(launch).collect();
        Ok(Ready { launches, bytes, operations, output: None })
    };
    let format = format!("{name}_{}", store.name);
    Case::new("token_score", &format, &LLAMA3.name(), Box::new(prepare)).at(context, 1, queries)
}

/// `op` on `rows` of `n` scores, `segment` rows a selection, which keeps one in ten.
fn select((op, name): (i32, &'static str), rows: usize, n: usize, segment: usize) -> Case {
    let prepare = move |card: &Card| -> Result<Ready> {
        let group = if op == KVW_SELECT_POOL { 4 } else { 1 };
        let noise: Vec<f32> =
            Noise(7).halves(1 << 19, 4.0).iter().map(|x| x.to_f32().exp()).collect();
        let floats = rows * group * n;
        let args = |card: &Card| -> Result<token_select::Args> {
            let scores = card.take(4 * floats)?;
            card.fill(scores, bytemuck::cast_slice(&noise), 4 * floats)?;
            let kept = segment * n / 10;
            let mut args = token_select::Args {
                struct_size: size_of::<token_select::Args>() as u32,
                op,
                scores: scores as _,
                k: card.upload(&vec![kept as i32; rows / segment])? as _,
                indices: card.zeros(4 * rows * n)? as _,
                counts: card.zeros(4 * rows)? as _,
                out: card.zeros(4 * rows * n)? as _,
                workspace: 4096 as _, // until its size is known
                workspace_bytes: usize::MAX,
                rows: rows as i32,
                n: n as i32,
                group: group as i32,
                width: 7,
                pool: KVW_POOL_AVG,
                segment: segment as i32,
                index_stride: if segment == 1 { kept } else { n } as i32,
                ..Default::default()
            };
            // SAFETY: live params; nothing behind their pointers is read.
            let need = unsafe { kvw_token_select_workspace(&args) }.max(16);
            (args.workspace, args.workspace_bytes) = (card.zeros(need)? as _, need);
            Ok(args)
        };
        let all = (0..copies(card, 4 * floats + 8 * rows * n)).map(|_| args(card));
        ready(all.collect::<Result<Vec<_>>>()?)
    };
    Case::new("token_select", name, &format!("{rows}x{n}"), Box::new(prepare))
}

/// A tenth of the hidden rows of `n` tokens, 4,096 halves each.
fn gather(n: usize) -> Case {
    const BYTES: usize = 8192;
    let prepare = move |card: &Card| -> Result<Ready> {
        let kept: Vec<i32> = (0..n as i32).step_by(10).collect();
        let args = |card: &Card| -> Result<token_select::Args> {
            Ok(token_select::Args {
                struct_size: size_of::<token_select::Args>() as u32,
                op: KVW_SELECT_GATHER,
                indices: card.upload(&kept)? as _,
                x: card.zeros(n * BYTES)? as _,
                positions: card.zeros(4 * n)? as _,
                out: card.zeros(kept.len() * BYTES)? as _,
                out_positions: card.zeros(4 * kept.len())? as _,
                rows: 1,
                index_stride: kept.len() as i32,
                row_bytes: BYTES as i32,
                ..Default::default()
            })
        };
        let all = (0..copies(card, n * BYTES * 11 / 10)).map(|_| args(card));
        ready(all.collect::<Result<Vec<_>>>()?)
    };
    Case::new("token_select", "gather", &format!("{n}x4096"), Box::new(prepare))
}

fn ready(all: Vec<token_select::Args>) -> Result<Ready> {
    // SAFETY: live params; nothing behind their pointers is read.
    let bytes = unsafe { kvw_token_select_bytes(&all[0]) };
    let launch = |args| -> Launch {
        // SAFETY: the arena keeps everything until the next case.
        Box::new(move |stream| unsafe { token_select::run(&args, stream) })
    };
    let launches = all.into_iter().map(launch).collect();
    Ok(Ready { launches, bytes, operations: 0.0, output: None })
}

pub fn cases() -> Vec<Case> {
    let (sum, max, lse) = ((KVW_SCORE_SUM, "sum"), (KVW_SCORE_MAX, "max"), (KVW_SCORE_LSE, "lse"));
    let mut all = Vec::new();
    for store in [HALVES, TWO_BIT] {
        all.extend([8, 64].map(|rows| score(sum, store, (32768, rows), (0, 32768))));
        all.push(score(max, store, (32768, 2080), (8192, CHUNK)));
    }
    all.push(score(lse, HALVES, (32768, 2080), (8192, 0)));
    all.extend([8192, 32768].map(|n| score(sum, HALVES, (n, n), (0, n)).alone()));
    all.push(select((KVW_SELECT_POOL, "pool"), 8, 32768, 1));
    for n in [32768, 131_072] {
        all.push(select((KVW_SELECT_TOP_K, "top_k"), 8, n, 1));
        all.push(select((KVW_SELECT_TOP_K, "top_k_layer"), 8, n, 8));
    }
    all.push(select((KVW_SELECT_ABOVE, "above_model"), 256, 32768, 256));
    all.push(gather(32768));
    all
}
