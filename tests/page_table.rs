//! page_table: edits by a count on the device, on every executor.

use crate::cases::somewhere;
use crate::exec::{Run, assert_caught, executors, op};
use kvwarp::ffi::{self, kvw_page_table_params as Params};
use kvwarp::page_table::oracle;

#[test]
fn oracle_hand_worked() {
    let edits = [[2, 90], [0, 70], [3, 1], [1, 80]];
    assert_eq!(oracle(&[7, 8, 9], &edits, 3), [70, 8, 90]);
    assert_eq!(oracle(&[7, 8, 9], &edits, 9), [70, 80, 90]);
    assert_eq!(oracle(&[7, 8, 9], &edits, -1), [7, 8, 9]);
}

fn params(entries: usize, max_edits: usize) -> Params {
    Params {
        struct_size: size_of::<Params>() as u32,
        max_edits: max_edits as i32,
        table: somewhere(),
        edits: somewhere(),
        count: somewhere(),
        entries: entries as i32,
        reserved: 0,
    }
}

#[test]
fn c_checks_need_no_gpu() {
    let valid = params(100, 300);
    op!(kvw_page_table).refuses(
        valid,
        &[
            ("struct_size", |p| p.struct_size = 0, ffi::KVW_ERR_STRUCT),
            ("max_edits", |p| p.max_edits = 0, ffi::KVW_ERR_SHAPE),
            ("table", |p| p.table = std::ptr::null_mut(), ffi::KVW_ERR_NULL),
            ("edits", |p| p.edits = std::ptr::null(), ffi::KVW_ERR_NULL),
            ("count", |p| p.count = std::ptr::null(), ffi::KVW_ERR_NULL),
            ("edits unaligned", |p| p.edits = 8 as _, ffi::KVW_ERR_ALIGN),
            ("entries", |p| p.entries = 0, ffi::KVW_ERR_SHAPE),
            ("reserved", |p| p.reserved = 1, ffi::KVW_ERR_SHAPE),
        ],
    );
    assert_eq!(op!(kvw_page_table).bytes(&valid), 4 + 12 * 300);
    assert_eq!(op!(kvw_page_table).workspace(&valid), 0);
}

/// Every other entry edited, one index beyond the table in the middle.
fn edited(run: &Run, entries: usize, count: i32) -> Result<(), String> {
    let table: Vec<u32> = (0..entries as u32).collect();
    let mut edits: Vec<[u32; 2]> =
        (0..entries as u32).step_by(2).map(|i| [i, 0x3000_0000 | i]).collect();
    let middle = edits.len() / 2;
    edits[middle][0] = entries as u32;
    edits.push([u32::MAX, 5]);
    let (t, c) = (run.upload("table", &table), run.upload("count", &[count]));
    let e = run.upload("edits", &edits.concat());
    let params =
        Params { table: t.ptr(), edits: e.ptr(), count: c.ptr(), ..params(entries, edits.len()) };
    run.call(&op!(kvw_page_table), &params)?;
    let (got, want) = (t.download(), oracle(&table, &edits, count));
    if got == want { Ok(()) } else { Err(format!("{entries} entries, {count} edits: {got:?}")) }
}

#[test]
fn executors_match_oracle() {
    for exec in executors(2) {
        for entries in [1, 7, 600, 1024] {
            for count in [i32::MIN, 0, 1, 200, i32::MAX] {
                edited(&exec.start(), entries, count).unwrap();
            }
        }
    }
}

#[test]
fn faults_are_caught() {
    assert_caught(361, "edits past the count are done", |run| edited(run, 40, 3));
    assert_caught(362, "an index past the table is followed", |run| edited(run, 40, 40));
}
