//! Slab formats in attention, one at a time: what is special about each.

use crate::cache::Spec;
use crate::exec::{Run, assert_caught, everyone};
use crate::paged_attn::{CALL, Call, matches};
use crate::prefill_attn;
use kvwarp::slab::Format::{self, F16, Fp8, Q2, Q4, Q8};
use kvwarp::slab::Meta;

/// Slabs of `format` only, and the ring.
fn only(format: Format) -> Spec {
    Spec { formats: vec![Some(format)], lens: vec![64 * 5 + 21], ..Spec::default() }
}

/// What may be in one cache with two-level metadata, a hole and a tail.
fn two_level() -> Spec {
    let formats = vec![Some(Q2), Some(F16), None, Some(Q4), Some(Q2), Some(Q2), Some(Q4)];
    Spec { formats, lens: vec![64 * 13 + 21], meta: Meta::U8, ..Spec::default() }
}

fn fp8() -> Spec {
    let formats = vec![Some(Fp8), Some(Fp8), None, Some(F16), Some(Fp8)];
    Spec { formats, lens: vec![64 * 9 + 21], ..Spec::default() }
}

/// A prefill's history in the formats of `spec`, on the way of sm_90 and on the other.
fn prefill(run: &Run, spec: &Spec) -> Result<(), String> {
    for hopper in [false, true] {
        prefill_on(hopper, run, spec).map_err(|e| format!("hopper {hopper}: {e}"))?;
        let expected = hopper && spec.head_dim <= 128;
        if run.wgmma().is_some_and(|n| (n > 0) != expected) {
            return Err(format!("hopper {hopper}: warpgroups where they are not expected"));
        }
    }
    Ok(())
}

fn prefill_on(hopper: bool, run: &Run, spec: &Spec) -> Result<(), String> {
    let call =
        prefill_attn::Call { g: 3, rows: vec![150], lse_rows: 8, sliding_window: 0, bf16: false };
    let (lens, packed) = (vec![64 * 5 + 150], Some(5));
    let spec = Spec { lens, packed, heads: 1, outlier: 4.0, ..spec.clone() };
    run.hopper(hopper);
    let result = prefill_attn::matches(run, &spec, &call);
    run.hopper(false);
    result
}

#[test]
fn two_level_metadata_matches_oracle() {
    for exec in everyone(1) {
        let run = exec.start();
        let check = |what: &str, spec: Spec, call: Call| {
            matches(&run, &spec, call).unwrap_or_else(|e| panic!("{exec:?}: {what}: {e}"));
        };
        check("splits", two_level(), Call { ctas: 3, ..CALL });
        check("a table only", Spec { packed: Some(99), ..two_level() }, CALL);
        let sliding = Call { sliding_window: 301, ..CALL };
        check("sliding", two_level(), sliding);
        check("outliers", Spec { outlier: 300.0, ..two_level() }, CALL);
        prefill(&run, &two_level()).unwrap_or_else(|e| panic!("{exec:?}: prefill: {e}"));
    }
}

#[test]
fn fp8_matches_oracle() {
    for exec in everyone(1) {
        let run = exec.start();
        let check = |what: &str, spec: Spec, call: Call| {
            matches(&run, &spec, call).unwrap_or_else(|e| panic!("{exec:?}: {what}: {e}"));
        };
        check("splits", fp8(), Call { ctas: 3, ..CALL });
        check("a table only", Spec { packed: Some(99), ..fp8() }, CALL);
        check("beyond its range", Spec { outlier: 900.0, ..fp8() }, CALL);
        prefill(&run, &fp8()).unwrap_or_else(|e| panic!("{exec:?}: prefill: {e}"));
    }
}

#[test]
fn every_shape_matches_oracle() {
    for exec in everyone(0) {
        for head_dim in [64, 96, 128, 256] {
            for (group, spec) in [(32, two_level()), (64, two_level()), (128, fp8())] {
                let spec = Spec { head_dim, group, lens: vec![700, 129], ..spec };
                let what = format!("{exec:?}: D {head_dim} group {group} {:?}", spec.meta);
                for g in [4, 11] {
                    let got = matches(&exec.start(), &spec, Call { g, ..CALL });
                    got.unwrap_or_else(|e| panic!("{what} G {g}: {e}"));
                }
                prefill(&exec.start(), &spec).unwrap_or_else(|e| panic!("{what}: prefill: {e}"));
            }
        }
    }
}

/// V up to the largest f16, with groups from -65504 to 65504: the largest codes stand for 65536.
fn saturated() -> Spec {
    Spec { group: 64, v_outlier: 6e4, ..only(Q2) }
}

#[test]
fn faults_of_warpgroups_are_caught() {
    let fp8 = |run: &Run| prefill_on(true, run, &only(Fp8));
    assert_caught(150, "fp8 is taken without its power of two", fp8);
    let two_level = |run: &Run| prefill_on(true, run, &Spec { meta: Meta::U8, ..only(Q2) });
    assert_caught(151, "the base of two-level minima is left out", two_level);
    let saturated = |run: &Run| prefill_on(true, run, &saturated());
    assert_caught(152, "numbers past the largest f16 become infinite", saturated);
    let wide = |run: &Run| prefill_on(true, run, &Spec { group: 64, head_dim: 96, ..only(Q4) });
    assert_caught(153, "every 32 channels of V have metadata of their own", wide);
}

#[test]
fn faults_are_caught() {
    let q8 = |run: &Run| matches(run, &only(Q8), CALL);
    assert_caught(115, "8-bit V is weighed as if its fold did not count", q8);
    assert_caught(116, "8-bit codes meet the query words in the order of the minima", q8);
    let fp8 = |run: &Run| matches(run, &only(Fp8), CALL);
    assert_caught(117, "fp8 V is taken for f16", fp8);
    let two_level = |run: &Run| matches(run, &Spec { meta: Meta::U8, ..only(Q2) }, CALL);
    assert_caught(118, "the base of two-level K minima is left out", two_level);
    assert_caught(119, "probabilities are summed in the unit of a slab's step", two_level);
}
