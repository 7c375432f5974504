//! APPEND to heads that have dropped tokens: more slabs are in the table than lengths say.

use super::device::{Host, MIXED, params};
use crate::cases::Noise;
use crate::exec::{Run, everyone, op};
use half::f16;
use kvwarp::ffi;
use kvwarp::kv_pack::append;
use kvwarp::slab::{Format, TOKENS};

/// Slabs before, and whether slab 1 leaves a window of 64 tokens with token 192: it left before, it does now, and the
/// table is one slab behind, so that none does.
const CASES: [(i32, bool); 3] = [(2, false), (1, true), (0, false)];

pub fn packs_once(run: &Run) -> Result<(), String> {
    let host = Host { window: TOKENS, seqs: CASES.len(), formats: &[Format::Q2], ..MIXED };
    let (from, d) = (host.layout(Format::F16), host.d);
    let device = host.device(run, false);
    let mut noise = Noise(21);
    // Of slab 1 in its place of a ring of two, and token 191, which lies in the other one.
    let mut slabs = Vec::new();
    for _ in CASES {
        let mut slab = vec![0; from.slab_bytes()];
        for t in 0..TOKENS {
            let token = noise.values(2 * d);
            append(&mut slab, &from, t, &token[..d], &token[d..]);
        }
        slabs.push(slab);
    }
    let other = vec![0; from.slab_bytes()];
    let ring: Vec<u8> = slabs.iter().flat_map(|slab| [&other[..], slab].concat()).collect();
    let ring = run.upload("ring", &ring);
    let lens = run.upload("lens", &CASES.map(|_| 192));
    let packed = run.upload("packed", &CASES.map(|(before, _)| before));
    let token = run.upload("k", &vec![f16::ONE; CASES.len() * d]);
    let mut cache = host.cache(&device, &lens, false);
    (cache.packed, cache.ring) = (packed.ptr(), ring.ptr().cast());
    let mut p = params(ffi::KVW_PACK_APPEND, cache);
    (p.k, p.v) = (token.ptr().cast(), token.ptr().cast());
    run.call(&op!(kvw_kv_pack), &p)?;
    for (row, ((_, leaves), slab)) in CASES.iter().zip(&slabs).enumerate() {
        let want = [other.clone(), slab.clone()].concat();
        match (host.packed_ok(&device, row, 1..2, &want), leaves) {
            (Ok(()), true) | (Err(_), false) => {}
            (Ok(()), false) => return Err(format!("slab 1 of row {row} was packed again")),
            (Err(e), true) => return Err(e),
        }
    }
    Ok(())
}

#[test]
fn a_slab_leaves_once() {
    for exec in everyone(2) {
        packs_once(&exec.start()).unwrap_or_else(|e| panic!("{exec:?}: {e}"));
    }
}
