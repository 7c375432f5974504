//! What runs beside the threads on sm_90: bulk copies and mbarriers, and the bugs that the checker must find.
use super::*;

const RING: [(i32, &str); 16] = [
    (40, "read of shared memory"),
    (41, "brings 256 bytes, its mbarrier expects 240 more"),
    (42, "0 arrivals and 16 bytes missing"),
    (43, "no fence after mbarrier.init"),
    (44, "bulk_ring"), // how this one, 47 and 55 show depends on the schedule
    (45, "deadlock"),
    (46, "without fence.proxy.async after it"),
    (47, "bulk_ring"),
    (48, "mbarrier initialised again"),
    (49, "no mbarrier was initialised there"),
    (50, "ends with a bulk copy in flight"),
    (51, "all 1 arrivals of this phase have been made"),
    (53, "of shared memory"),
    (54, "multiples of 16"),
    (55, "bulk_ring"),
    (56, "shared memory"),
];

fn on_hopper(lib: &'static Simt, seed: u64, fault: i32, kernel: &str) -> Result<Vec<u32>, String> {
    let session = lib.seeded(seed);
    session.hopper(true).fault(fault);
    launch(lib, kernel, &random_words(21, 320), &random_words(22, 320))
}

#[test]
fn bulk_copies_go_round_a_ring() {
    let (x, y) = (random_words(21, 320), random_words(22, 320));
    let reversed: Vec<u32> = x.chunks(64).flat_map(|tile| tile.iter().rev().copied()).collect();
    let mut source = [&x[..64], &y[64..]].concat();
    y[..64].iter().rev().zip(&mut source[64..]).for_each(|(from, to)| *to = *from);
    for lib in [Simt::plain(), Simt::checked()] {
        for seed in 0..20 {
            assert_eq!(on_hopper(lib, seed, 0, "bulk_ring").unwrap(), reversed, "seed {seed}");
            assert_eq!(lib.report().copy_bulk, 5);
            assert_eq!(on_hopper(lib, seed, 0, "bulk_source").unwrap(), source, "seed {seed}");
        }
    }
}

#[test]
fn bulk_copy_bugs_are_found() {
    for seed in 0..3 {
        for (fault, text) in RING {
            let found = on_hopper(Simt::checked(), seed, fault, "bulk_ring");
            let found = found.expect_err(&format!("fault {fault}, seed {seed}"));
            assert!(found.contains(text), "fault {fault}, seed {seed}: {found}");
            let line = found.contains("selftest_async.cu:") || fault == 50;
            assert!(line, "fault {fault}: no source line in: {found}");
        }
        let found = on_hopper(Simt::checked(), seed, 52, "bulk_source").unwrap_err();
        assert!(found.contains("write-after-read race in out memory"), "{found}");
        let found = on_hopper(Simt::checked(), seed, 57, "bulk_source").unwrap_err();
        assert!(found.contains("write-after-read race in out memory"), "{found}");
    }
}

#[test]
fn a_copy_that_nobody_waits_for_is_found_in_both_builds() {
    let found = on_hopper(Simt::plain(), 0, 57, "bulk_source").unwrap_err();
    assert!(found.contains("ends with a bulk copy in flight"), "{found}");
}

#[test]
fn an_older_device_has_no_mbarriers() {
    let _session = Simt::plain().seeded(0);
    let found = launch(Simt::plain(), "bulk_ring", &[0; 320], &[0; 320]).unwrap_err();
    assert!(found.contains("mbarrier.init") && found.contains("sm_90"), "{found}");
}
