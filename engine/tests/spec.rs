//! Cache specs: what they say when they are wrong, and that writing one and reading it back changes nothing.

use kvwarp::slab::{Format, Meta};
use kvwarp_engine::spec::{CacheSpec, PRESETS};
use proptest::prelude::*;

#[test]
fn spec_errors_name_the_part_and_what_is_allowed() {
    for (spec, parts) in [
        (
            "q3",
            &["unknown preset `q3`", "f16, q8, fp8, q4, q2, q2-small, q2-kivi", "did you mean"][..],
        ),
        ("", &["unknown preset ``", "f16, q8, fp8, q4, q2, q2-small, q2-kivi"]),
        ("q2,windw=1", &["unknown part `windw`", "did you mean `window`"]),
        ("q2,window=-1", &["`window` is `-1`", "0 to 1048576 tokens"]),
        ("q2,window=", &["`window` is ``", "0 to 1048576 tokens"]),
        ("q2,group=48", &["`group` is `48`", "32, 64 or 128"]),
        ("q2-kivi,kivi_exact=1", &["`kivi_exact` takes no value"]),
        ("q2-kivi,window=40,kivi_exact", &["`window` is 40", "multiple of the group, 32"]),
        ("q2-kivi,sinks=4,kivi_exact", &["`sinks` is 4", "only 0"]),
        ("q2,window=1,window=2", &["`window` is given twice"]),
        ("q2,meta=f8", &["`meta` is `f8`", "f16 or u8"]),
        ("q8,meta=u8", &["`meta` is `u8`", "q4 and q2, not q8"]),
        ("q2,meta=u8,group=128", &["`meta` is `u8`", "32 or 64"]),
        ("q2-kivi,meta=u8,kivi_exact", &["`meta` is `u8`", "not for `kivi_exact`"]),
        ("q2,kivi_exact", &["`kivi_exact`", "start from q2-kivi", "hadamard=off"]),
        ("q2,range=120", &["`range` is `120`", "50 to 100"]),
        ("q4,range=80", &["`range` has no effect on q4"]),
        ("q4,keep=5", &["`keep` has no effect on q4"]),
        ("q2,keep=101", &["`keep` is `101`", "0 to 100"]),
        ("q2,hadamard", &["`hadamard` is ``", "on or off"]),
        ("fp8,group=64", &["`group` has no effect on fp8"]),
        ("f16,window=1", &["`window` has no effect on f16"]),
        ("f16,evict=snap:0.5", &["`evict` is `snap:0.5`", "METHOD:SHARE"]),
        ("f16,evict=snapkv", &["`evict` is `snapkv`", "a share of 0 to 1"]),
        ("f16,evict=snapkv:1.5", &["`evict` is `snapkv:1.5`"]),
        ("f16,evict=snapkv:0.5:lag=64", &["`evict` is `snapkv:0.5:lag=64`"]),
        ("f16,evict=lagkv:0.5:lag=63", &["`evict` is `lagkv:0.5:lag=63`"]),
        ("f16,budget=pyramid", &["`budget` has no effect without `evict`"]),
        ("f16,refine=kvcrush:0.1", &["`refine` has no effect without `evict`"]),
        ("f16,refine=kvcrush:0.1:median", &["`refine` is `kvcrush:0.1:median`", "alternate"]),
        (
            "f16,evict=lagkv:0.5,budget=global",
            &["`lagkv` chooses within partitions", "lagkv-kvpress"],
        ),
        ("f16,evict=kvzip-head:0.5,budget=global", &["`kvzip-head` keeps whole heads"]),
        ("f16,evict=kvzip:0.5,tsp=0.5", &["`kvzip` asks every layer", "`tsp`"]),
        ("f16,budget=flat", &["`budget` is `flat`", "dynamickv"]),
        ("f16,tsp=x:0.5", &["`tsp` is `x:0.5`", "[LAYER:]RATE"]),
        ("q2-kivi,kivi_exact,evict=h2o:0.5", &["`kivi_exact` counts every token"]),
    ] {
        let error = spec.parse::<CacheSpec>().unwrap_err().to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{spec}: {error}");
        assert!(!error.contains('\n'));
    }
}

fn specs() -> impl Strategy<Value = CacheSpec> {
    let preset = prop::sample::select(PRESETS[1..].to_vec());
    let group = prop::sample::select(vec![32usize, 64, 128]);
    let switches = (any::<bool>(), any::<bool>(), any::<bool>());
    let parts = (preset, 0usize..2000, 0usize..2000, group, switches, 50u8..=100);
    parts.prop_map(|(preset, window, sinks, group, (kivi_exact, bytes, hadamard), range)| {
        let keep = if preset.store == Format::Q2 { range - 50 } else { 0 };
        let with_bytes = bytes && preset.store != Format::Q8 && group < 128;
        let meta = if with_bytes { Meta::U8 } else { Meta::F16 };
        let range = if preset.store == Format::Q2 { range } else { 100 };
        let zones = CacheSpec { window, sinks, ..preset };
        match (preset.store, kivi_exact && !preset.hadamard) {
            (Format::F16, _) => preset,
            (Format::Fp8, _) => zones,
            _ if preset.latent => CacheSpec { range, ..zones },
            (_, true) => {
                CacheSpec { window: (window / group + 1) * group, group, kivi_exact, ..preset }
            }
            _ => CacheSpec { group, meta, hadamard, range, keep, ..zones },
        }
    })
}

/// Parts that choose tokens, as texts.
fn choices() -> impl Strategy<Value = String> {
    let method = prop::sample::select(vec![
        "lagkv-kvpress:0.25:lag=64",
        "snapkv:0.3333:window=16:pool=7:max=1",
        "fastkv:0.1",
        "h2o:0",
        "kvzip:0.3:sink=0:chunk=512",
        "keynorm:0.5",
        "streaming:0.5:sink=9",
        "random:1:seed=7",
    ]);
    let refine =
        prop::sample::select(vec!["", ",refine=kvcrush:0.25", ",refine=kvcrush:0.05:random"]);
    let budget =
        prop::sample::select(vec!["", ",budget=uniform", ",budget=prefixkv", ",budget=global"]);
    (method, refine, budget)
        .prop_map(|(method, refine, budget)| format!("evict={method}{refine}{budget}"))
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn specs_survive_being_written(spec in specs()) {
        prop_assert_eq!(spec.to_string().parse(), Ok(spec));
    }

    #[test]
    fn choices_survive_being_written(store in prop::sample::select(vec!["f16", "q2", "fp8"]), choice in choices()) {
        let text = format!("{store},{choice}");
        let spec: CacheSpec = text.parse().unwrap();
        prop_assert_eq!(spec.to_string(), text);
    }

    #[test]
    fn lagkv_has_room_in_the_window(lag in 1..=64usize, window in 0..3000usize) {
        let spec: CacheSpec = format!("q2,window={window},evict=lagkv:0.5:lag={},tsp=0.5", 16 * lag).parse().unwrap();
        prop_assert_eq!(spec.window, window.max(32 * lag));
        prop_assert_eq!(spec.to_string().parse(), Ok(spec));
    }

    #[test]
    fn likely_texts_are_specs_or_errors(
        text in "(f16|q8|fp8|q4|q2|q2-kivi)(,(window|sinks|group|meta|hadamard|range|keep|kivi_exact|evict|refine|budget|tsp)(=[0-9a-z:.=-]{0,14})?){0,4}",
    ) {
        match text.parse::<CacheSpec>() {
            Ok(spec) => prop_assert_eq!(spec.to_string().parse(), Ok(spec)),
            Err(error) => prop_assert!(error.to_string().starts_with("cache spec `")),
        }
    }
}
