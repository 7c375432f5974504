//! Planted bugs: without a fault a kernel passes under every schedule, with it the checked build names the
//! defect and the line, at the very first schedule.
use super::*;

const EXCHANGE: [(i32, &str); 8] = [
    (10, "write-write race in shared memory"),
    (11, "race in shared memory"),
    (13, "shared memory never written in this block"),
    (14, "out of bounds at byte 256 of in, 256 bytes long"),
    (15, "out of bounds of a piece of shared memory"),
    (16, "out of bounds of a static shared array"),
    (23, "of out, never written"),
    (24, "race in shared memory"),
];
const SINGLE_THREAD: [(i32, &str); 5] = [
    (17, "misaligned access"),
    (25, "out of bounds of a"),
    (26, "null pointer"),
    (29, "shift of a"),
    (30, "misaligned 16-byte access"),
];
const MEETING: [(i32, &str); 5] = [
    (12, "race in shared memory: ldmatrix"),
    (18, "warp divergence"),
    (19, "deadlock"),
    (21, "threads meet at different __syncthreads"),
    (31, "is not in its own mask"),
];
const BETWEEN_BLOCKS: [(i32, &str); 2] =
    [(20, "read-after-write race in out memory"), (28, "write-write race in out memory")];

/// One block reads 64 words and finds 64 unwritten ones in `out`; more blocks read up to 128 and need a written `out`.
fn run(lib: &'static Simt, kernel: &str, out: &[u32]) -> Result<Vec<u32>, String> {
    let x = lib.buf("in", &random_words(11, if out.is_empty() { 64 } else { 128 }));
    let y = if out.is_empty() { lib.unwritten("out", 64) } else { lib.buf("out", out) };
    let op: Op = lib.get(format!("simt_selftest_{kernel}").as_bytes());
    // SAFETY: as in `launch`.
    lib.check(unsafe { op(x.ptr(), y.ptr()) })?;
    Ok(y.to_vec())
}

fn finds(kernel: &str, out: &[u32], bugs: &[(i32, &str)]) {
    let lib = Simt::checked();
    for seed in SEEDS {
        let session = lib.seeded(seed);
        run(lib, kernel, out).unwrap_or_else(|e| panic!("{kernel}, seed {seed}: {e}"));
        for &(fault, text) in bugs {
            session.fault(fault);
            let found =
                run(lib, kernel, out).expect_err(&format!("{kernel}: fault {fault}, seed {seed}"));
            assert!(found.contains(text), "fault {fault}, seed {seed}: {found}");
            assert!(
                found.contains("selftest_bugs.cu:"),
                "fault {fault}: no source line in: {found}"
            );
        }
        session.fault(0);
    }
}

#[test]
fn shared_and_device_memory_bugs_are_found() {
    finds("exchange", &[], &EXCHANGE);
    let lib = Simt::checked();
    let session = lib.seeded(0);
    session.fault(27);
    let found = run(lib, "exchange", &[]).unwrap_err();
    assert!(
        found.contains("takes 768 bytes of dynamic shared memory, launch gives 512"),
        "{found}"
    );
}

#[test]
fn bugs_of_one_thread_are_found() {
    finds("single_thread_bugs", &[], &SINGLE_THREAD);
}

#[test]
fn missing_and_mistaken_meetings_are_found() {
    finds("meeting_bugs", &[], &MEETING);
}

#[test]
fn a_missing_fence_is_found_and_a_correct_merge_is_not() {
    let mut out = [0; 2 + 3];
    out[2..].fill(u32::MAX);
    finds("last_block_merges", &out, &BETWEEN_BLOCKS);
    let total = random_words(11, 96).into_iter().fold(0, u32::wrapping_add);
    assert_eq!(run(Simt::checked(), "last_block_merges", &out).unwrap()[..2], [total, 3]);
    let total = random_words(11, 128).into_iter().fold(0, u32::wrapping_add);
    let out = [0; 2 + 128];
    assert_eq!(run(Simt::checked(), "last_warp_merges", &out).unwrap()[..2], [total, 4]);
    finds(
        "last_warp_merges",
        &out,
        &[33, 34, 35].map(|f| (f, "read-after-write race in out memory")),
    );
    finds("spin_barrier", &[0; 2 + 3 * 32 + 3], &[(32, "read-after-write race in out memory")]);
}

#[test]
fn an_early_read_of_an_async_copy_is_found() {
    let lib = Simt::checked();
    let session = lib.seeded(0);
    session.fault(1);
    let found = launch(lib, "async", &[0; 256], &[0; 256]).unwrap_err();
    assert!(found.contains("with a cp.async in flight"), "{found}");
}

#[test]
fn a_launch_that_no_device_takes_is_refused() {
    let found = launch(Simt::plain(), "too_much_shared", &[0; 1], &[0; 1]).unwrap_err();
    assert!(found.contains("more than 227 KB of dynamic shared memory"), "{found}");
}
