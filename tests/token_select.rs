//! token_select: every executor and the CPU path against windows in f64 and a sort.

mod kernel;

use crate::cases::{Noise, somewhere};
use crate::cpu_select::hard;
use crate::exec::{Exec, Run, assert_caught, everyone, op};
use kernel::{Select, gather_matches, pool_matches};
use kvwarp::ffi::{self, kvw_token_select_params as Params};
use kvwarp::token_select::{Pool, oracle_pool, oracle_top_k};

const NAN: f32 = f32::NAN;
const INF: f32 = f32::INFINITY;

#[test]
fn oracle_hand_worked() {
    assert_eq!(oracle_top_k(&[1.0, 3.0, 2.0, 3.0, NAN, -INF], 3), [1, 2, 3]);
    assert_eq!(oracle_top_k(&[1.0, 3.0, 2.0, 3.0], 1), [1], "ties to the lower index");
    assert_eq!(oracle_top_k(&[NAN, -INF, NAN], 2), [0, 1], "NaN after minus infinity");
    let rows = [1.0, 2.0, 6.0, 0.0, 0.0, 3.0];
    let means = oracle_pool(&rows, 2, Pool::Avg, 3);
    assert_eq!(means, [1.0, 3.0 + 1.0, 8.0 / 3.0 + 1.0], "edges are divided by 3 too");
    assert_eq!(oracle_pool(&rows, 2, Pool::Max, 3), [2.0 + 0.0, 6.0 + 3.0, 6.0 + 3.0]);
    assert_eq!(oracle_pool(&[NAN, 2.0, NAN], 1, Pool::Max, 1)[1], 2.0);
}

#[test]
fn c_checks_need_no_gpu() {
    let valid = Params {
        struct_size: size_of::<Params>() as u32,
        op: ffi::KVW_SELECT_TOP_K,
        scores: somewhere(),
        k: somewhere::<i32>(),
        indices: somewhere(),
        counts: somewhere(),
        workspace: somewhere::<u8>().cast(),
        rows: 8,
        n: 32_768,
        segment: 1,
        index_stride: 3277,
        ..Default::default()
    };
    let op = op!(kvw_token_select);
    op.refuses(
        valid,
        &[
            ("struct_size", |p| p.struct_size = 4, ffi::KVW_ERR_STRUCT),
            ("op", |p| p.op = 4, ffi::KVW_ERR_SHAPE),
            ("scores", |p| p.scores = std::ptr::null(), ffi::KVW_ERR_NULL),
            ("k", |p| p.k = std::ptr::null(), ffi::KVW_ERR_NULL),
            ("indices", |p| p.indices = std::ptr::null_mut(), ffi::KVW_ERR_NULL),
            ("counts", |p| p.counts = std::ptr::null_mut(), ffi::KVW_ERR_NULL),
            ("kth unaligned", |p| p.kth = 4 as _, ffi::KVW_ERR_ALIGN),
            ("lens unaligned", |p| p.lens = 4 as _, ffi::KVW_ERR_ALIGN),
            ("rows", |p| p.rows = 0, ffi::KVW_ERR_SHAPE),
            ("rows beyond 65535", |p| p.rows = 65_536, ffi::KVW_ERR_SHAPE),
            ("n", |p| p.n = 0, ffi::KVW_ERR_SHAPE),
            ("segment", |p| p.segment = 3, ffi::KVW_ERR_SHAPE),
            ("no segment", |p| p.segment = 0, ffi::KVW_ERR_SHAPE),
            ("index_stride", |p| p.index_stride = 0, ffi::KVW_ERR_SHAPE),
            ("workspace_bytes of a large segment", |p| p.segment = 8, ffi::KVW_ERR_WORKSPACE),
        ],
    );
    let pool = Params {
        op: ffi::KVW_SELECT_POOL,
        out: somewhere::<u8>().cast(),
        group: 4,
        width: 7,
        ..valid
    };
    op.refuses(
        pool,
        &[
            ("out", |p| p.out = std::ptr::null_mut(), ffi::KVW_ERR_NULL),
            ("group", |p| p.group = 0, ffi::KVW_ERR_SHAPE),
            ("width", |p| p.width = 6, ffi::KVW_ERR_SHAPE),
            ("width beyond 255", |p| p.width = 257, ffi::KVW_ERR_SHAPE),
            ("pool", |p| p.pool = 2, ffi::KVW_ERR_SHAPE),
        ],
    );
    let gather = Params {
        op: ffi::KVW_SELECT_GATHER,
        x: somewhere::<u8>().cast(),
        positions: somewhere::<i32>(),
        out_positions: somewhere(),
        row_bytes: 8192,
        ..pool
    };
    op.refuses(
        gather,
        &[
            ("indices", |p| p.indices = std::ptr::null_mut(), ffi::KVW_ERR_NULL),
            ("out", |p| p.out = std::ptr::null_mut(), ffi::KVW_ERR_NULL),
            ("out_positions", |p| p.out_positions = std::ptr::null_mut(), ffi::KVW_ERR_NULL),
            ("positions unaligned", |p| p.positions = 4 as _, ffi::KVW_ERR_ALIGN),
            ("first unaligned", |p| p.first = 4 as _, ffi::KVW_ERR_ALIGN),
            ("row_bytes", |p| p.row_bytes = 8, ffi::KVW_ERR_SHAPE),
            ("index_stride", |p| p.index_stride = 0, ffi::KVW_ERR_SHAPE),
            (
                "neither x nor positions",
                |p| (p.x, p.positions) = (std::ptr::null(), std::ptr::null()),
                ffi::KVW_ERR_NULL,
            ),
        ],
    );
    assert_eq!(op.workspace(&valid), 0);
    let whole = op.workspace(&Params { segment: 8, ..valid });
    assert_eq!(whole, (4 + 8 + 3 * 2048) * 4 + 8 * 4 * 8);
    assert_eq!(op.bytes(&valid), 8 * (32_768 * 4 + 3277 * 4 + 4));
    assert_eq!(op.bytes(&pool), 8 * 32_768 * 4 * 5);
    assert_eq!(op.bytes(&gather), 8 * 3277 * (4 + 2 * 8192 + 8));
}

/// Every k that is an edge, for each row and for all rows as one segment, exact and strict.
fn selects(run: &Run, rows: &[Vec<f32>], n: usize) -> Result<(), String> {
    let all: usize = rows.iter().map(Vec::len).sum();
    for (segment, of) in [(1, rows[0].len()), (rows.len(), all)] {
        for k in [0, 1, 2, of / 10, of / 2, of.saturating_sub(1), of, of + 7] {
            for strict in [false, true] {
                let k = vec![k as i32; rows.len() / segment];
                let call = Select { rows, n, segment, strict, k: &k, index_stride: n };
                call.matches(run)
                    .map_err(|e| format!("segment {segment}, k {k:?}, {strict}: {e}"))?;
            }
        }
    }
    Ok(())
}

/// Six kinds of rows, of ragged lengths, one of them empty.
fn ragged(n: usize) -> Vec<Vec<f32>> {
    let mut rows = hard(n, 5);
    for (row, cut) in rows.iter_mut().zip([0, n / 3, 1, 0, 5, 0]) {
        row.truncate(n - cut.min(n));
    }
    rows.push(vec![]);
    rows
}

/// More scores than one CTA takes: few values, so that ties cross rows and slices.
fn large() -> Vec<Vec<f32>> {
    let mut noise = Noise(8);
    [12_000, 20_000, 0, 16_384, 19_999]
        .map(|len| (0..len).map(|_| noise.below(40) as f32 / 7.0 - 1.0).collect())
        .to_vec()
}

#[test]
fn executors_match_oracle() {
    for exec in everyone(2) {
        let run = exec.start();
        for n in [1, 31, 32, 33, 700] {
            selects(&run, &ragged(n), n).unwrap_or_else(|e| panic!("{exec:?}, {n} scores: {e}"));
        }
        let cut = hard(300, 9);
        let call = Select {
            rows: &cut,
            n: 300,
            segment: 1,
            strict: false,
            k: &[200; 6],
            index_stride: 90,
        };
        call.matches(&run).unwrap_or_else(|e| panic!("{exec:?}: indices that do not fit: {e}"));
        for (n, group, width) in [(1, 1, 1), (5, 2, 7), (1500, 3, 7), (1024, 1, 255), (1030, 4, 3)]
        {
            for kind in [Pool::Avg, Pool::Max] {
                let mut noise = Noise(n as u64);
                let mut scores: Vec<f32> = (0..2 * group * n).map(|_| noise.value()).collect();
                scores[n / 2] = NAN;
                let lens = [n as i32, n as i32 / 2];
                for lens in [None, Some(&lens[..])] {
                    pool_matches(&run, &scores, (2, group, n), (kind, width), lens)
                        .unwrap_or_else(|e| panic!("{exec:?}: {e}"));
                }
            }
        }
        let lists = [vec![0, 3, 4, 40], vec![], (0..70).map(|i| 2 * i).collect()];
        for (first, bytes) in [(None, 16), (Some(&[5, 0, 9][..]), 2064), (None, 8192)] {
            gather_matches(&run, &lists, first, bytes).unwrap_or_else(|e| panic!("{exec:?}: {e}"));
        }
    }
}

#[test]
fn ctas_share_large_segments() {
    for exec in everyone(1) {
        let (run, rows) = (exec.start(), large());
        let all: usize = rows.iter().map(Vec::len).sum();
        let ks = if exec == Exec::SimtPlain {
            vec![0, 1, 6_000, 30_001, all, all + 1]
        } else {
            vec![30_001]
        };
        for k in ks {
            for strict in [false, true] {
                let k = [k as i32];
                let call = Select {
                    rows: &rows,
                    n: 20_000,
                    segment: 5,
                    strict,
                    k: &k,
                    index_stride: 20_000,
                };
                call.matches(&run).unwrap_or_else(|e| panic!("{exec:?}, k {k:?}, {strict}: {e}"));
            }
        }
        let alike = vec![vec![0.5; 40_000]; 4];
        let call = Select {
            rows: &alike,
            n: 40_000,
            segment: 2,
            strict: false,
            k: &[45_000, 79_999],
            index_stride: 40_000,
        };
        call.matches(&run).unwrap_or_else(|e| panic!("{exec:?}: all alike: {e}"));
    }
}

#[test]
fn faults_are_caught() {
    let rows = ragged(700);
    let alone = |run: &Run| {
        let k = vec![60; rows.len()];
        Select { rows: &rows, n: 700, segment: 1, strict: false, k: &k, index_stride: 700 }
            .matches(run)
    };
    let few: Vec<_> = (0..3).map(|row| hard(700, row)[1].clone()).collect();
    let joined = |run: &Run| {
        let (rows, k) = (&few, &[1000]);
        Select { rows, n: 700, segment: 3, strict: false, k, index_stride: 700 }.matches(run)
    };
    // A slice a row, for what stages tell each other; few scores in all, as checked accesses take their time.
    let mut noise = Noise(9);
    let shared = [300, 90, 0, 150, 33, 10, 0, 20, 5000]
        .map(|len| (0..len).map(|_| noise.below(40) as f32 / 7.0 - 1.0).collect());
    let together = |run: &Run| {
        let (rows, k) = (&shared, &[2_001]);
        Select { rows, n: 8192, segment: 9, strict: false, k, index_stride: 8192 }.matches(run)
    };
    let scores: Vec<f32> = (0..2 * 3 * 1500).map(|i| (i % 77) as f32).collect();
    let pooled = |run: &Run| pool_matches(run, &scores, (2, 3, 1500), (Pool::Avg, 7), None);
    let lists = [vec![0, 3, 4, 40], vec![7, 9]];
    let gathered = |run: &Run| gather_matches(run, &lists, Some(&[5, 2]), 2064);
    assert_caught(391, "no barrier between the histogram and its search", alone);
    assert_caught(392, "a warp does not know the ties before it", alone);
    assert_caught(393, "indices count from one", alone);
    assert_caught(394, "scores past the length take part", alone);
    assert_caught(395, "every row of a segment has the ties of the first", joined);
    assert_caught(396, "a stage is said to be over before what it wrote is seen", together);
    assert_caught(398, "a row has the ties of the first", together);
    assert_caught(399, "the workspace is not left as it was found", together);
    assert_caught(400, "a window is overwritten while threads still read it", pooled);
    assert_caught(401, "means are divided by one less than their width", pooled);
    assert_caught(402, "lists have as many entries as they have room for", gathered);
    assert_caught(403, "every list begins at row 0", gathered);
}
