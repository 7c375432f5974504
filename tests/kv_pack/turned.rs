//! APPEND of keys that are turned by RoPE and a Hadamard matrix, with the queries of their tokens.

use super::device::{Host, MIXED, params};
use crate::cases::{Noise, close, f64s, widen};
use crate::exec::{Run, everyone, op};
use crate::rope_select::times_hadamard;
use half::f16;
use kvwarp::ffi::{self, kvw_rope_select_params};
use kvwarp::rope_select::{Pairing, Scaling, inv_freq, oracle};
use kvwarp::slab::{Format, k_value};

/// Tokens of some sequences, one each.
#[derive(Clone, Copy)]
pub struct Case {
    pub d: usize,
    pub pairing: Pairing,
    pub hadamard: bool,
    /// Query heads; two for keys.
    pub queries: usize,
    /// Queries lie densely and are turned where they lie.
    pub in_place: bool,
    pub window: usize,
}

pub const CASE: Case =
    Case { d: 96, pairing: Pairing::Half, hadamard: true, queries: 6, in_place: true, window: 64 };

const HEADS: usize = 2;
/// Lengths with the new token; a sequence without one is left alone.
const LENS: [i32; 3] = [40, 0, 1];
const POSITIONS: [i32; 3] = [131_072, 0, 77];

/// What the oracle makes of `heads` heads of each token.
fn wanted(case: &Case, x: &[f16], heads: usize) -> Vec<f64> {
    let mut x = f64s(&widen(x));
    let freq = inv_freq(500_000.0, case.d, Scaling::None);
    oracle(&mut x, heads, case.d, &POSITIONS, &freq, case.pairing).unwrap();
    if case.hadamard {
        x.chunks_exact_mut(case.d).for_each(times_hadamard);
    }
    x
}

pub fn appended(run: &Run, case: &Case) -> Result<(), String> {
    let &Case { d, queries, in_place, window, .. } = case;
    let host = Host { d, group: 32, window, heads: HEADS, seqs: 3, slabs: 2, ..MIXED };
    let mut noise = Noise(14);
    let (q, k) = (noise.halves(3 * queries * d), noise.halves(3 * HEADS * d));
    // Rows of queries and keys as a fused projection leaves them.
    let row = if in_place { queries * d } else { (queries + HEADS) * d };
    let mut rows = vec![f16::ZERO; 3 * row];
    for (rows, q) in rows.chunks_exact_mut(row).zip(q.chunks_exact(queries * d)) {
        rows[..queries * d].copy_from_slice(q);
    }
    let device = host.device(run, false);
    let (lens, dq, dk) = (run.upload("lens", &LENS), run.upload("q", &rows), run.upload("k", &k));
    let freq = inv_freq(500_000.0, d, Scaling::None);
    let (positions, freq) = (run.upload("positions", &POSITIONS), run.upload("inv_freq", &freq));
    let dense = run.alloc::<f16>("q_out", 3 * queries * d);
    let to = if in_place { &dq } else { &dense };
    let mut p = params(ffi::KVW_PACK_APPEND, host.cache(&device, &lens, false));
    (p.k, p.v, p.q, p.q_out) = (dk.ptr().cast(), dk.ptr().cast(), dq.ptr().cast(), to.ptr().cast());
    (p.positions, p.inv_freq) = (positions.ptr(), freq.ptr());
    (p.q_stride, p.q_heads) = (row as i64, queries as i32);
    (p.pairing, p.hadamard) = (case.pairing as i32, case.hadamard.into());
    run.call(&op!(kvw_kv_pack), &p)?;

    let turned = widen(&to.download());
    close("queries", &turned, &wanted(case, &q, queries), 1e-5, 5e-4)?;
    let (from, ring, keys) =
        (host.layout(Format::F16), device.ring.download(), wanted(case, &k, HEADS));
    for (s, h) in [(0, 0), (0, 1), (2, 0), (2, 1)] {
        let slab = &ring[(s * HEADS + h) * host.ring_slabs(false) * from.slab_bytes()..];
        let token = LENS[s] as usize - 1;
        let got: Vec<f32> = (0..d).map(|c| k_value(&from, slab, token, c)).collect();
        close("key", &got, &keys[(s * HEADS + h) * d..][..d], 1e-5, 5e-4)?;
    }
    let empty = &ring[HEADS * host.ring_slabs(false) * from.slab_bytes()..][..from.slab_bytes()];
    if empty.iter().any(|byte| *byte != 0xFF) {
        return Err("a sequence without tokens was written".into());
    }
    // The same bits as in a launch of its own.
    let (apart, out) = (run.upload("q", &q), run.alloc::<f16>("out", q.len()));
    let rope = kvw_rope_select_params {
        struct_size: size_of::<kvw_rope_select_params>() as u32,
        pairing: case.pairing as i32,
        x: apart.ptr().cast(),
        out: out.ptr().cast(),
        positions: positions.ptr(),
        inv_freq: freq.ptr(),
        x_stride: (queries * d) as i64,
        out_stride: (queries * d) as i64,
        tokens: 3,
        heads: queries as i32,
        head_dim: d as i32,
        hadamard: case.hadamard.into(),
        ..Default::default()
    };
    run.call(&op!(kvw_rope_select), &rope)?;
    close("queries", &turned, &f64s(&widen(&out.download())), 0.0, 0.0)
}

#[test]
fn keys_and_queries_are_turned_in_one_launch() {
    for exec in everyone(2) {
        for d in [64, 96, 128, 256] {
            for (pairing, hadamard) in [
                (Pairing::Half, true),
                (Pairing::Interleaved, true),
                (Pairing::Half, false),
                (Pairing::Interleaved, false),
            ] {
                for (queries, in_place, window) in [(7, false, 64), (8, true, 0)] {
                    let case = Case { d, pairing, hadamard, queries, in_place, window };
                    appended(&exec.start(), &case)
                        .unwrap_or_else(|e| panic!("{exec:?} {d} {pairing:?} {hadamard}: {e}"));
                }
            }
        }
    }
}
