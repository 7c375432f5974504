//! lowrank_kv: every executor and the CPU path against the f64 oracle over the rows as stored.

mod append;
mod case;
mod cpu;
mod packed;
mod proofs;

use crate::cases::{f64s, relative_l2, somewhere};
use crate::exec::{Exec, Run, assert_caught, executors, op};
use case::{Cache, Case, attend, case, compare, matches};
use kvwarp::ffi::{self, kvw_lowrank_kv_params as Params};
use kvwarp::lowrank_kv::{Shape, View, oracle};
use kvwarp::pages::{Entry, Pool};
use kvwarp::slab::Format;

#[test]
fn oracle_hand_worked() {
    // One head with four pairs. Two tokens: z = 2 and 4 in channel 0, k = 0 and ln 3 in its first element.
    let shape = Shape::new(1, 4, 128).unwrap();
    let mut pool = Pool::of(shape.slab_bytes());
    let index = pool.take().unwrap();
    let (mut z, mut k) = (vec![0.0; 128], vec![0.0; 8]);
    for (token, x, y) in [(0, 2.0, 0.0), (1, 4.0, 3f32.ln())] {
        (z[0], k[0]) = (x, y);
        shape.write(pool.slab_mut(index as usize), token, &z, &k).unwrap();
    }
    let ln3 = f64::from(shape.read((Format::F16, pool.slab(index as usize)), 1)[128]);
    let table = [Entry::new(Format::F16, index)];
    let view = View { shape, pool: &pool, packed: None, table: &table, len: 2 };
    let one = |q0: f32, k0: f32, view: View<'_>| {
        let (mut q, mut q_elite) = (vec![0.0; 128], vec![0.0; 8]);
        (q[0], q_elite[0]) = (q0, k0);
        let (out, lse) = oracle(&q, &q_elite, &view, 1.0);
        assert!(out[1..].iter().all(|&x| x == 0.0));
        (out[0], lse[0])
    };
    let near = |(out, lse): (f64, f64), want: f64, want_lse: f64| {
        let off = (out - want).abs().max((lse - want_lse).abs());
        assert!(off < 1e-6, "{out} {lse}, want {want} {want_lse}");
    };
    // Elite keys alone: weights 1 and 3. The latent alone, q z = 2 and 4 times ln 3 / 2: weights 3 and 9, that is 1 and 3.
    // Both: 3 and 27. (ln 3 as f16 has it.)
    let e = ln3.exp();
    near(one(0.0, 1.0, view), (2.0 + 4.0 * e) / (1.0 + e), (1.0 + e).ln());
    near(one(3f32.ln() / 2.0, 0.0, view), 3.5, 12f64.ln());
    near(one(3f32.ln() / 2.0, 1.0, view), (6.0 + 36.0 * e) / (3.0 + 9.0 * e), (3.0 + 9.0 * e).ln());
    near(one(0.7, 1.0, View { len: 1, ..view }), 2.0, f64::from(0.7f32 * 2.0));
    assert_eq!(one(1.0, 1.0, View { len: 0, ..view }), (0.0, f64::NEG_INFINITY));
    let hole = View { table: &[Entry::HOLE], ..view };
    assert_eq!(one(1.0, 1.0, hole), (0.0, f64::NEG_INFINITY));
}

fn valid_cache() -> ffi::kvw_latent {
    ffi::kvw_latent {
        pool: somewhere(),
        packed: std::ptr::null_mut(),
        table: somewhere::<u32>(),
        lens: somewhere::<i32>(),
        seqs: 2,
        kv_heads: 4,
        pairs: 3,
        rank: 512,
        table_stride: 8,
        format: ffi::KVW_SLAB_F16,
    }
}

fn valid_params() -> Params {
    Params {
        struct_size: size_of::<Params>() as u32,
        op: ffi::KVW_LOWRANK_ATTEND,
        cache: valid_cache(),
        q: somewhere::<u8>().cast(),
        q_elite: somewhere::<u8>().cast(),
        out: somewhere(),
        workspace: somewhere(),
        workspace_bytes: 1 << 30,
        q_elite_stride: 8 * 64,
        head_stride: 64,
        q_heads: 8,
        q_len: 1,
        max_slabs: 10,
        scale: 0.125,
        ..Default::default()
    }
}

#[test]
fn c_checks_need_no_gpu() {
    let (op, valid) = (op!(kvw_lowrank_kv), valid_params());
    op.refuses(
        valid,
        &[
            ("struct_size", |p| p.struct_size += 8, ffi::KVW_ERR_STRUCT),
            ("op", |p| p.op = 4, ffi::KVW_ERR_SHAPE),
            ("pool", |p| p.cache.pool = std::ptr::null_mut(), ffi::KVW_ERR_NULL),
            ("pool unaligned", |p| p.cache.pool = 8 as _, ffi::KVW_ERR_ALIGN),
            ("table", |p| p.cache.table = std::ptr::null(), ffi::KVW_ERR_NULL),
            ("lens", |p| p.cache.lens = std::ptr::null(), ffi::KVW_ERR_NULL),
            ("seqs", |p| p.cache.seqs = 0, ffi::KVW_ERR_SHAPE),
            ("kv_heads", |p| p.cache.kv_heads = 0, ffi::KVW_ERR_SHAPE),
            ("pairs", |p| p.cache.pairs = 0, ffi::KVW_ERR_SHAPE),
            (
                "pairs, half a column",
                |p| (p.cache.kv_heads, p.cache.pairs) = (2, 5),
                ffi::KVW_ERR_SHAPE,
            ),
            ("rank", |p| p.cache.rank = 520, ffi::KVW_ERR_SHAPE),
            ("rank of 0", |p| p.cache.rank = 0, ffi::KVW_ERR_SHAPE),
            ("rank of 2448", |p| p.cache.rank = 2448, ffi::KVW_ERR_SHAPE),
            ("table_stride", |p| p.cache.table_stride = 0, ffi::KVW_ERR_SHAPE),
            (
                "format",
                |p| (p.cache.format, p.cache.packed) = (ffi::KVW_SLAB_Q8, somewhere()),
                ffi::KVW_ERR_FORMAT,
            ),
            ("packed", |p| p.cache.format = ffi::KVW_SLAB_Q4, ffi::KVW_ERR_NULL),
            ("packed, for nothing", |p| p.cache.packed = somewhere(), ffi::KVW_ERR_NULL),
            ("q", |p| p.q = std::ptr::null(), ffi::KVW_ERR_NULL),
            ("q_elite", |p| p.q_elite = std::ptr::null(), ffi::KVW_ERR_NULL),
            ("out", |p| p.out = std::ptr::null_mut(), ffi::KVW_ERR_NULL),
            ("lse unaligned", |p| p.lse = 4 as _, ffi::KVW_ERR_ALIGN),
            ("workspace", |p| p.workspace = std::ptr::null_mut(), ffi::KVW_ERR_NULL),
            ("workspace_bytes", |p| p.workspace_bytes = 15, ffi::KVW_ERR_WORKSPACE),
            ("q_heads", |p| p.q_heads = 6, ffi::KVW_ERR_SHAPE),
            ("q_heads of 1028", |p| p.q_heads = 1028, ffi::KVW_ERR_SHAPE),
            ("head_stride", |p| p.head_stride = 5, ffi::KVW_ERR_SHAPE),
            ("head_stride, odd", |p| p.head_stride = 61, ffi::KVW_ERR_SHAPE),
            ("q_elite_stride", |p| p.q_elite_stride = 7 * 64 + 4, ffi::KVW_ERR_SHAPE),
            ("max_slabs", |p| p.max_slabs = 0, ffi::KVW_ERR_SHAPE),
            ("max_slabs of 2^31 units", |p| p.max_slabs = 1 << 30, ffi::KVW_ERR_SHAPE),
            ("ctas", |p| p.ctas = 4097, ffi::KVW_ERR_SHAPE),
            ("least", |p| p.least = -1, ffi::KVW_ERR_SHAPE),
            ("scale", |p| p.scale = 0.0, ffi::KVW_ERR_SHAPE),
            ("scale NaN", |p| p.scale = f32::NAN, ffi::KVW_ERR_SHAPE),
            ("q_len of 0", |p| p.q_len = 0, ffi::KVW_ERR_SHAPE),
            ("q_len of 17", |p| p.q_len = 17, ffi::KVW_ERR_SHAPE),
        ],
    );
    // Two sequences of ten slabs, queries of c and 2 r, outputs of c.
    let row = 2 * (512 + 2 * 3 * 4);
    assert_eq!(op.bytes(&valid), 2 * 10 * 64 * row + 2 * 8 * 2 * (512 + 6 + 512));
    // Of each sequence 8 bytes; 264 CTAs of 16 heads, no more than 20 slabs make, 8 for each.
    let block = 16 * (512 + 4) * 4;
    assert_eq!(op.workspace(&valid), 16 + 3 * 2 * block);
    assert_eq!(op.workspace(&Params { least: 1, ctas: 7, ..valid }), 16 + 7 * 2 * block);
    // Four query tokens are 32 heads: CTAs of 32 at this rank.
    let four = Params { least: 1, ctas: 7, q_len: 4, ..valid };
    assert_eq!(op.workspace(&four), 16 + 7 * 2 * 2 * block);
    let mut large = Params { least: 1, ctas: 9, q_heads: 16, q_elite_stride: 1024, ..valid };
    large.cache.rank = 2432;
    assert_eq!(op.workspace(&large), 16 + 2 * 4 * 2 * 8 * (2432 + 4) * 4);
}

#[test]
fn executors_match_oracle() {
    for exec in executors(5) {
        let run = exec.start();
        let hopper = matches!(exec, Exec::SimtChecked(seed) if seed % 2 == 1);
        let check = |what: &str, case: Case| {
            matches(&run, &Case { hopper, ..case })
                .unwrap_or_else(|e| panic!("{exec:?}: {what}: {e}"));
        };
        check("one CTA", case());
        check("cuts", Case { ctas: 3, ..case() });
        check(
            "ragged",
            Case { lens: vec![0, 1, 15, 16, 17, 63, 64, 65, 128, 130], ctas: 2, ..case() },
        );
    }
}

#[test]
fn every_shape_matches_oracle() {
    // Each kernel, and what is odd about heads, pairs and ranks: groups of heads that are not full, keys of one kv head for
    // two tiles, one buffer a warp.
    let shapes = [
        (1, 8, 4, 128),
        (4, 2, 1, 160),
        (8, 4, 4, 192),
        (32, 1, 4, 256),
        (1, 24, 8, 272),
        (8, 4, 8, 448),
        (2, 20, 6, 512),
        (16, 1, 3, 512),
        (20, 1, 2, 640),
        (4, 8, 12, 1024),
        (8, 2, 4, 1792),
        (20, 1, 12, 2048),
        (8, 1, 64, 2432),
        (1, 3, 4, 16),
        (3, 3, 12, 112),
    ];
    for exec in executors(0) {
        for (i, (kv_heads, group, pairs, rank)) in shapes.into_iter().enumerate() {
            let lens = if rank < 600 { vec![200, 0, 65] } else { vec![85, 3] };
            let shape = Case { kv_heads, group, pairs, rank, lens, holes: 0, ..case() };
            for (ctas, hopper) in [(1, i % 2 == 0), (7, i % 2 == 1)] {
                let case = Case { ctas, hopper, ..shape.clone() };
                matches(&exec.start(), &case).unwrap_or_else(|e| panic!("{exec:?}: {case:?}: {e}"));
            }
        }
    }
}

/// Query tokens of which some see nothing, some the whole; tiles in which two tokens and more meet.
#[test]
fn each_query_token_sees_those_up_to_itself() {
    for exec in executors(2) {
        for (i, (kv_heads, group, rows)) in
            [(1, 3, 16), (3, 3, 2), (4, 2, 5), (8, 1, 3), (2, 10, 4)].into_iter().enumerate()
        {
            let lens = vec![64 * 3 + 2, 0, 1, 7, 16, 65, 128];
            let case = Case { kv_heads, group, rows, lens, ..case() };
            for ctas in [1, 6] {
                let case = Case { ctas, hopper: i % 2 == 1, ..case.clone() };
                matches(&exec.start(), &case).unwrap_or_else(|e| panic!("{exec:?}: {case:?}: {e}"));
            }
        }
    }
}

#[test]
fn cuts_agree_and_repeat_bit_for_bit() {
    let cut = |ctas| Cache::new(&Case { lens: vec![64 * 9 + 5, 300], ctas, ..case() });
    let whole = attend(&Exec::SimtPlain.start(), &cut(1)).unwrap();
    for ctas in [2, 3, 5, 8, 13, 15] {
        let cache = cut(ctas);
        let first = attend(&Exec::SimtPlain.start(), &cache).unwrap();
        compare(&cache, &first).unwrap();
        let apart = relative_l2(&first.0, &f64s(&whole.0));
        // One f16 output that rounds the other way is 2e-5.
        assert!(apart <= 5e-5, "{ctas} CTAs differ by {apart:.2e}");
        for seed in 1..4 {
            let got = attend(&Exec::SimtChecked(seed).start(), &cache).unwrap();
            assert!(got == first, "{ctas} CTAs, schedule {seed}");
        }
    }
}

#[test]
fn one_token_is_given_back() {
    // A softmax of one token weighs it 1, whatever its score: the latent as stored.
    for exec in executors(1) {
        let cache = Cache::new(&Case { lens: vec![1], holes: 0, ..case() });
        let (out, _) = attend(&exec.start(), &cache).unwrap();
        let row = cache.shape.read(cache.view(0).slab(0).unwrap(), 0);
        for head in out.chunks(cache.case.rank) {
            assert_eq!(head, &row[..cache.case.rank], "{exec:?}");
        }
    }
}

#[test]
fn faults_are_caught() {
    let with = |case: Case| move |run: &Run| matches(run, &case);
    let (plain, cut) = (with(case()), with(Case { ctas: 3, ..case() }));
    let hopper = with(Case { hopper: true, ..case() });
    assert_caught(411, "parts are added before all warps have theirs", &plain);
    assert_caught(412, "scores are read before they are there", &plain);
    assert_caught(413, "the tail holds a token too many", &plain);
    assert_caught(414, "registers 1 and 2 of z as values are not exchanged", &plain);
    assert_caught(415, "outputs are not rescaled when the maximum grows", &plain);
    assert_caught(416, "z past the length is used as it lies there", &plain);
    assert_caught(417, "a tile is read before its copy has landed", &plain);
    assert_caught(417, "a tile is read before its bulk copy has landed", &hopper);
    assert_caught(418, "a buffer is filled again while lanes still read it", &plain);
    assert_caught(
        418,
        "a buffer is filled again by a bulk copy while lanes still read it",
        &hopper,
    );
    assert_caught(419, "all heads meet the keys of the first kv head", &plain);
    assert_caught(420, "the last warp's channels are lost", &plain);
    assert_caught(421, "the last part is lost in the merge", &cut);
    assert_caught(422, "a slab at a cut is taken twice", &cut);
    let across = with(Case { lens: vec![300, 290], ctas: 3, ..case() });
    assert_caught(423, "both parts of a CTA go to one place", across);
    let two = with(Case { lens: vec![70, 200], hopper: true, ..case() });
    assert_caught(425, "a bulk copy follows stores without a fence between the proxies", &two);
    let later = with(Case { rows: 3, ..case() });
    assert_caught(431, "a query token sees the one after it", &later);
    assert_caught(426, "every round of the ring waits for the first one's phase", &hopper);
}
