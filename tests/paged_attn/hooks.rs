//! Several rows a sequence, element types, and what changes scores.

use super::call::{CALL, Call, matches, mixed, ragged, run_op};
use crate::cache::{Cache, Spec};
use crate::exec::{everyone, executors};
use kvwarp::slab::Format::{F16, Q2, Q4};

#[test]
fn rows_match_oracle() {
    for exec in everyone(1) {
        let check = |spec: &Spec, call: Call| {
            matches(&exec.start(), spec, call)
                .unwrap_or_else(|e| panic!("{exec:?}: {call:?}: {e}"));
        };
        // Rows end in the last slab and before it; some sequences are shorter than the rows.
        let few = Spec { lens: vec![64 * 3 + 2, 7, 0, 129], heads: 2, ..mixed() };
        for (q_len, g, ctas) in [(2, 4, 3), (5, 3, 2), (16, 1, 5), (16, 5, 4)] {
            check(&few, Call { q_len, g, ctas, hopper: ctas == 4, ..CALL });
        }
        check(&few, Call { q_len: 5, g: 2, ctas: 3, sliding_window: 65, ..CALL });
        check(&Spec { head_dim: 256, ..few }, Call { q_len: 2, g: 6, ctas: 3, ..CALL });
    }
}

#[test]
fn what_changes_scores_matches_oracle() {
    let off = Call { ctas: 3, ..CALL };
    let calls = [
        Call { bf16: true, ..off },
        Call { softcap: 1.5, ..off },
        Call { softcap: 1e4, ..off },
        Call { sinks: true, ..off },
        Call { k_norm: true, ..off },
        Call { rotation: true, ..off },
        Call {
            rotation: true,
            k_norm: true,
            softcap: 2.0,
            sinks: true,
            bf16: true,
            q_len: 3,
            ..off
        },
    ];
    for exec in executors(1) {
        for call in calls {
            let check = |spec: &Spec| {
                matches(&exec.start(), spec, call)
                    .unwrap_or_else(|e| panic!("{exec:?}: D {}, {call:?}: {e}", spec.head_dim));
            };
            check(&mixed());
            check(&Spec { lens: vec![0, 1, 130], per_head: true, heads: 3, ..mixed() });
        }
    }
    for exec in executors(0) {
        for head_dim in [96, 128, 256] {
            let spec = Spec { head_dim, group: 64, lens: vec![150, 64], ..ragged() };
            for g in [3, 9] {
                matches(&exec.start(), &spec, Call { g, ..calls[6] })
                    .unwrap_or_else(|e| panic!("{exec:?}: D {head_dim}, G {g}: {e}"));
            }
        }
    }
}

#[test]
fn a_sink_alone_is_the_whole_sum() {
    for exec in executors(1) {
        let cache = Cache::new(&Spec { lens: vec![0], formats: vec![Some(Q2)], ..mixed() }, 5);
        let got = run_op(&exec.start(), &cache, Call { sinks: true, ..CALL }).unwrap();
        assert!(got.out.iter().all(|&x| x == 0.0));
        assert!(got.lse.iter().all(|x| x.is_finite() && x.abs() <= 3.0), "{:?}", got.lse);
        assert!(got.lse[0] != got.lse[1]);
    }
}

#[test]
fn the_largest_keys_neither_overflow_nor_drown_the_others() {
    for exec in everyone(1) {
        // Queries that are tiny there: normalised to 1/16 of their largest they are subnormal, hence the error.
        let formats = vec![Some(Q2), Some(F16), Some(Q4)];
        let cache = Cache::new(&Spec { outlier: 30000.0, formats, ..mixed() }, 5);
        let got = run_op(&exec.start(), &cache, CALL).unwrap();
        super::call::compare(&cache, CALL, &got, 5e-3).unwrap_or_else(|e| panic!("{exec:?}: {e}"));
        // Scores of 10^4 and more: one token takes all.
        let got = run_op(&exec.start(), &cache, Call { scale: 1e4, ..CALL }).unwrap();
        assert!(got.out.iter().chain(&got.lse).all(|x| x.is_finite()), "{exec:?}: {:?}", got.lse);
    }
}
