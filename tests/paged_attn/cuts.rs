//! One list of work, cut at any unit: the same results, whoever finishes last, whatever was there before.

use super::call::{CALL, Call, mixed, ragged, run_in, run_op, workspace};
use super::call::{compare, matches};
use crate::cache::{Cache, Spec};
use crate::cases::{close, f64s, relative_l2};
use crate::exec::{Exec, everyone, op};
use kvwarp::ffi::{KVW_PAGED_ATTN_TICKETS, kvw_paged_attn_params as Params};
use kvwarp::slab::Format::{F16, Q2};

#[test]
fn cuts_agree_and_repeat_bit_for_bit() {
    let cache = Cache::new(&mixed(), 5);
    for exec in everyone(0) {
        let run = |ctas| run_op(&exec.start(), &cache, Call { ctas, ..CALL }).unwrap();
        let whole = run(1);
        // Two heads of 18 units: cut up to 18 ways, at and between the ends of heads.
        for ctas in [2, 3, 4, 5, 7, 9, 12, 18, 36] {
            let got = run(ctas);
            close("lse", &got.lse, &f64s(&whole.lse), 1e-5, 1e-6).unwrap();
            let apart = relative_l2(&got.out, &f64s(&whole.out));
            // One f16 output that rounds the other way is 2e-5.
            assert!(apart <= 5e-5, "{exec:?}: {ctas} CTAs differ by {apart:.2e}");
        }
    }
    for ctas in [3, 7] {
        let run = |exec: Exec, hopper| {
            run_op(&exec.start(), &cache, Call { ctas, hopper, ..CALL }).unwrap()
        };
        let first = run(Exec::SimtPlain, false);
        for seed in 1..6 {
            let got = run(Exec::SimtChecked(seed), seed > 3);
            assert!(got.out == first.out && got.lse == first.lse, "{ctas} CTAs, schedule {seed}");
        }
    }
}

#[test]
fn a_workspace_serves_call_after_call() {
    // A long batch, then others of more heads, rows and lengths in the same room, tickets zeroed once.
    let largest = Call { ctas: 5, g: 5, q_len: 3, ..CALL };
    let params = Params {
        struct_size: size_of::<Params>() as u32,
        q_heads: 16,
        q_len: 16,
        ..super::valid_params()
    };
    let bytes = op!(kvw_paged_attn).workspace(&params);
    for exec in everyone(2) {
        let run = exec.start();
        let room = workspace(&run, bytes);
        let long = Spec { lens: vec![700], ..mixed() };
        for (spec, call) in [
            (long.clone(), Call { ctas: 7, ..CALL }),
            (ragged(), Call { hopper: true, ..largest }),
            (Spec { lens: vec![80, 0, 200], ..long.clone() }, Call { ctas: 7, ..CALL }),
            (long, Call { ctas: 7, ..CALL }),
        ] {
            let cache = Cache::new(&spec, 5);
            let got = run_in(&run, &cache, call, Some(&room)).unwrap();
            compare(&cache, call, &got, 1e-3).unwrap_or_else(|e| panic!("{exec:?}: {e}"));
        }
    }
}

#[test]
fn ragged_batches_match_oracle() {
    for exec in everyone(1) {
        for (shared_rows, csr) in [(false, false), (true, false), (true, true)] {
            let spec = Spec { shared_rows, csr, ..ragged() };
            for (ctas, least) in [(1, 1), (7, 0), (0, 1)] {
                let call = Call { ctas, least, g: 2, scale: 0.3, ..CALL };
                matches(&exec.start(), &spec, call).unwrap_or_else(|e| panic!("{exec:?}: {e}"));
            }
        }
    }
}

#[test]
fn many_short_heads_are_found_in_the_list() {
    // 1100 lengths, far more than lanes, zeros among them: two rounds of search.
    let lens = (0..550).map(|i| [0, 3, 70, 1, 0, 20][i % 6]).collect();
    let spec = Spec { lens, per_head: true, window: 0, formats: vec![Some(Q2)], ..mixed() };
    let call = Call { ctas: 61, g: 1, ..CALL };
    matches(&Exec::SimtPlain.start(), &spec, call).unwrap();
    matches(&Exec::SimtPlain.start(), &Spec { per_head: false, ..spec }, call).unwrap();
}

#[test]
fn a_long_head_among_short_ones() {
    let spec =
        Spec { lens: vec![5, 6000, 70], formats: vec![Some(Q2), Some(F16), Some(Q2)], ..mixed() };
    for ctas in [0, 23] {
        let call = Call { ctas, least: 0, ..CALL };
        matches(&Exec::SimtPlain.start(), &spec, call).unwrap_or_else(|e| panic!("{ctas}: {e}"));
    }
}

#[test]
fn the_workspace_depends_on_columns_and_ctas_only() {
    let op = op!(kvw_paged_attn);
    let valid = super::valid_params();
    let tickets = KVW_PAGED_ATTN_TICKETS as usize;
    // 4 columns a kv head.
    let want = |ctas: usize, columns: usize| tickets + ctas * 2 * columns * (128 + 4) * 4;
    assert_eq!(op.workspace(&valid), want(396, 4));
    assert_eq!(op.workspace(&Params { ctas: 7, ..valid }), want(7, 4));
    let mut larger = Params { max_slabs: 1000, least: 9, q_heads: 32, ..valid };
    (larger.cache.seqs, larger.cache.kv_heads, larger.cache.table_heads) = (100, 8, 8);
    assert_eq!(op.workspace(&larger), op.workspace(&valid));
    assert_eq!(op.workspace(&Params { q_len: 2, ..valid }), want(396, 8));
    assert_eq!(op.workspace(&Params { q_len: 3, ..valid }), want(396, 12));
    assert_eq!(op.workspace(&Params { q_len: 16, ..valid }), want(396, 16));
}
