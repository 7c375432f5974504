//! kv_pack: tokens in the ring, packed slabs bit for bit, KIVI's schedule.

mod cpu;
mod device;
mod dropped;
mod kivi;
mod ops;
mod rounded;
mod turned;

use crate::cases::somewhere;
use crate::exec::{assert_caught, everyone, op};
pub use device::{FP8, Host, MIXED, TWO_LEVEL, cache, params};
use half::f16;
use kvwarp::ffi::{self, kvw_kv_pack_params as Params};
use kvwarp::kv_pack::{append, pack};
use kvwarp::slab::{Format, Layout, TOKENS, k_value, v_value};
use rounded::GROUPS;
use std::ptr::{null, null_mut};

#[test]
fn oracle_hand_worked() {
    // Channel 0 of K counts 0 to 63 over the tokens, V counts 0 to 63 over the channels.
    let from = Layout::new(Format::F16, 64, 32).unwrap();
    let mut slab = vec![0; from.slab_bytes()];
    let v: Vec<f32> = (0..64).map(|c| c as f32).collect();
    for t in 0..TOKENS {
        append(&mut slab, &from, t, &[vec![t as f32], vec![1.0; 63]].concat(), &v);
    }
    let to = Layout::new(Format::Q2, 64, 32).unwrap();
    let mut packed = vec![0; to.slab_bytes()];
    pack(&slab, &mut packed, &to);
    // 32 values over 3 steps: scale 31 / 3, codes 0 to 3 change half-way between steps.
    let scale = f16::from_f32(31.0 / 3.0).to_f32();
    for (t, code) in [(0, 0.0), (5, 0.0), (6, 1.0), (15, 1.0), (16, 2.0), (26, 3.0), (31, 3.0)] {
        assert_eq!(k_value(&to, &packed, t, 0), code * scale);
        assert_eq!(k_value(&to, &packed, 32 + t, 0), code * scale + 32.0);
        assert_eq!(v_value(&to, &packed, 9, t), code * scale);
        assert_eq!(v_value(&to, &packed, 9, 32 + t), code * scale + 32.0);
        assert_eq!(k_value(&to, &packed, t, 1), 1.0, "a constant column is exact");
    }
}

#[test]
fn c_checks_need_no_gpu() {
    let kv_pack = op!(kvw_kv_pack);
    let valid = params(ffi::KVW_PACK_APPEND, cache(128, 32, 128));
    kv_pack.refuses(
        valid,
        &[
            ("struct_size", |p| p.struct_size -= 4, ffi::KVW_ERR_STRUCT),
            ("op", |p| p.op = 3, ffi::KVW_ERR_SHAPE),
            ("head_dim", |p| p.cache.head_dim = 80, ffi::KVW_ERR_SHAPE),
            ("group", |p| p.cache.group = 16, ffi::KVW_ERR_FORMAT),
            ("ring", |p| p.cache.ring = null_mut(), ffi::KVW_ERR_NULL),
            ("ring_slabs", |p| p.cache.ring_slabs = 2, ffi::KVW_ERR_SHAPE),
            (
                "packed, kivi",
                |p| (p.kivi_exact, p.cache.window, p.cache.packed) = (1, 32, somewhere()),
                ffi::KVW_ERR_SHAPE,
            ),
            (
                "packed, flushed",
                |p| (p.op, p.cache.packed) = (ffi::KVW_PACK_FLUSH, somewhere()),
                ffi::KVW_ERR_SHAPE,
            ),
            ("meta", |p| p.cache.meta = 2, ffi::KVW_ERR_FORMAT),
            (
                "byte metadata, group",
                |p| (p.cache.meta, p.cache.group) = (1, 128),
                ffi::KVW_ERR_FORMAT,
            ),
            (
                "byte metadata, q8",
                |p| (p.cache.meta, p.cache.pools[1]) = (1, somewhere()),
                ffi::KVW_ERR_FORMAT,
            ),
            (
                "fp8 with q2",
                |p| (p.cache.pools[3], p.cache.pools[4]) = (somewhere(), somewhere()),
                ffi::KVW_ERR_FORMAT,
            ),
            ("kivi, byte metadata", |p| (p.cache.meta, p.kivi_exact) = (1, 1), ffi::KVW_ERR_FORMAT),
            (
                "kivi, fp8",
                |p| (p.cache.pools[4], p.kivi_exact) = (somewhere(), 1),
                ffi::KVW_ERR_FORMAT,
            ),
            ("dtype", |p| p.dtype = ffi::KVW_F32, ffi::KVW_ERR_FORMAT),
            ("k", |p| p.k = null(), ffi::KVW_ERR_NULL),
            ("v", |p| p.v = null(), ffi::KVW_ERR_NULL),
            ("k unaligned", |p| p.k = 8 as _, ffi::KVW_ERR_ALIGN),
            ("inv_freq missing", |p| p.positions = somewhere(), ffi::KVW_ERR_NULL),
            ("positions missing", |p| p.inv_freq = somewhere(), ffi::KVW_ERR_NULL),
            ("pairing", |p| p.pairing = -1, ffi::KVW_ERR_SHAPE),
            ("k_stride", |p| p.k_stride = 127, ffi::KVW_ERR_SHAPE),
            ("v_stride odd", |p| p.v_stride = 129, ffi::KVW_ERR_SHAPE),
            ("tokens", |p| p.tokens = 2, ffi::KVW_ERR_SHAPE),
            ("kivi_exact", |p| p.kivi_exact = 2, ffi::KVW_ERR_SHAPE),
            ("range", |p| p.range = 1.01, ffi::KVW_ERR_SHAPE),
            ("range, negative", |p| p.range = -0.5, ffi::KVW_ERR_SHAPE),
            ("range, NaN", |p| p.range = f32::NAN, ffi::KVW_ERR_SHAPE),
            ("feedback unaligned", |p| p.feedback = 8 as _, ffi::KVW_ERR_ALIGN),
            (
                "kivi, range",
                |p| (p.kivi_exact, p.cache.window, p.range) = (1, 32, 0.9),
                ffi::KVW_ERR_FORMAT,
            ),
            (
                "kivi, feedback",
                |p| (p.kivi_exact, p.cache.window, p.feedback) = (1, 32, somewhere()),
                ffi::KVW_ERR_FORMAT,
            ),
            ("window of kivi", |p| (p.kivi_exact, p.cache.window) = (1, 0), ffi::KVW_ERR_SHAPE),
            ("kivi, odd window", |p| (p.kivi_exact, p.cache.window) = (1, 48), ffi::KVW_ERR_SHAPE),
        ],
    );
    let turning = Params {
        positions: somewhere(),
        inv_freq: somewhere(),
        q: somewhere(),
        q_out: somewhere(),
        q_stride: 3 * 128,
        q_heads: 3,
        hadamard: 1,
        ..valid
    };
    kv_pack.refuses(
        turning,
        &[
            ("hadamard", |p| p.hadamard = 2, ffi::KVW_ERR_SHAPE),
            ("q unaligned", |p| p.q = 8 as _, ffi::KVW_ERR_ALIGN),
            ("q_out missing", |p| p.q_out = null_mut(), ffi::KVW_ERR_NULL),
            ("q_out alone", |p| p.q = null(), ffi::KVW_ERR_NULL),
            ("dtype", |p| p.dtype = ffi::KVW_BF16, ffi::KVW_ERR_FORMAT),
            ("q_heads", |p| p.q_heads = 0, ffi::KVW_ERR_SHAPE),
            ("q_stride", |p| p.q_stride = 376, ffi::KVW_ERR_SHAPE),
            ("q_stride odd", |p| p.q_stride = 385, ffi::KVW_ERR_SHAPE),
            ("q_stride in place", |p| p.q_stride = 512, ffi::KVW_ERR_SHAPE),
            (
                "hadamard without positions",
                |p| (p.positions, p.inv_freq) = (null(), null()),
                ffi::KVW_ERR_SHAPE,
            ),
            ("q without positions", unturned, ffi::KVW_ERR_SHAPE),
            ("hadamard filled", |p| p.op = ffi::KVW_PACK_FILL, ffi::KVW_ERR_SHAPE),
            ("q filled", |p| (p.op, p.hadamard) = (ffi::KVW_PACK_FILL, 0), ffi::KVW_ERR_SHAPE),
        ],
    );
    assert_eq!(kv_pack.bytes(&turning), kv_pack.bytes(&valid) + 3 * 128 * 4);
    // A token; a 64th of an f16 slab read and of one written, f16 or q2.
    assert_eq!(kv_pack.bytes(&valid), 128 * 8 + (32768 + 32768) / 64);
    let mut q2 = valid;
    q2.cache.pools[3] = somewhere();
    assert_eq!(kv_pack.bytes(&q2), 128 * 8 + (32768 + 6144) / 64);
    (q2.cache.meta, q2.op) = (1, ffi::KVW_PACK_FLUSH);
    assert_eq!(kv_pack.bytes(&q2), 32768 + 5152);
    q2.feedback = somewhere();
    assert_eq!(kv_pack.bytes(&q2), 32768 + 5152 + 128 * 127);
    assert_eq!(kv_pack.workspace(&valid), 0);
    kv_pack.refuses(
        Params { op: ffi::KVW_PACK_FILL, tokens: 7, max_tokens: 5, ..valid },
        &[
            ("cu_tokens", |p| p.cu_tokens = null(), ffi::KVW_ERR_NULL),
            ("tokens", |p| p.tokens = 0, ffi::KVW_ERR_SHAPE),
            ("max_tokens", |p| p.max_tokens = 0, ffi::KVW_ERR_SHAPE),
            ("more than the ring", |p| p.max_tokens = 64 * 3 + 1, ffi::KVW_ERR_SHAPE),
            ("kivi_exact", |p| p.kivi_exact = 1, ffi::KVW_ERR_SHAPE),
        ],
    );
    kv_pack.refuses(
        Params { op: ffi::KVW_PACK_FLUSH, k: null(), v: null(), ..valid },
        &[
            ("first", |p| p.first = null(), ffi::KVW_ERR_NULL),
            ("table", |p| p.cache.table = null(), ffi::KVW_ERR_NULL),
            ("max_tokens", |p| p.max_tokens = 0, ffi::KVW_ERR_SHAPE),
            ("first unaligned", |p| p.first = 4 as _, ffi::KVW_ERR_ALIGN),
            (
                "lengths past int32",
                |p| (p.cache.seqs, p.cache.kv_heads) = (65535, 65535),
                ffi::KVW_ERR_SHAPE,
            ),
        ],
    );
}

fn unturned(p: &mut Params) {
    (p.positions, p.inv_freq, p.hadamard) = (null(), null(), 0);
}

#[test]
fn executors_match_oracle() {
    for exec in everyone(2) {
        let host = Host { d: 64, group: 32, window: 0, heads: 3, seqs: 3, slabs: 3, ..MIXED };
        ops::fill_and_flush(&exec.start(), &host, &[192, 1, 64]).unwrap();
        let host = Host { d: 64, group: 32, window: 64, heads: 2, seqs: 2, slabs: 4, ..MIXED };
        ops::stream(&exec.start(), &host, 130).unwrap();
        let host = Host { window: 20, heads: 2, ..TWO_LEVEL };
        ops::stream(&exec.start(), &host, 150).unwrap();
    }
}

#[test]
fn faults_are_caught() {
    let host = |d, group, window| Host { d, group, window, ..MIXED };
    let flush = |run: &crate::exec::Run| ops::fill_and_flush(run, &host(96, 64, 0), &[192]);
    assert_caught(201, "no barrier between a group's extremes and its codes", flush);
    assert_caught(203, "a row's short last group takes as many channels as the others", flush);
    assert_caught(204, "rows r and r + 8 change places in the packed words", flush);
    assert_caught(
        202,
        "a token falls on the slab that it makes leave, before that is packed",
        |run| ops::stream(run, &host(64, 32, 1), 70),
    );
    assert_caught(205, "a tile is written whole though some of its tokens are not new", |run| {
        let (half, fill) = (kvwarp::rope_select::Pairing::Half, ffi::KVW_PACK_FILL);
        ops::rotated(run, 64, half, fill, ffi::KVW_F16)
    });
    let two_level = |run: &crate::exec::Run| ops::fill_and_flush(run, &TWO_LEVEL, &[192]);
    assert_caught(208, "codes are made before their scales are on the grid", two_level);
    assert_caught(209, "e4m3 ties go up", |run| ops::fill_and_flush(run, &FP8, &[64]));
    assert_caught(210, "the scale of two-level metadata is rounded down", two_level);
    let rounded = |host: Host| {
        let host = Host { range: 0.1, slabs: 4, ..host };
        move |run: &crate::exec::Run| ops::fill_and_flush(run, &host, &[256])
    };
    let fed = |host: Host| rounded(Host { feedback: true, ..host });
    assert_caught(211, "errors are used before they are there", fed(GROUPS));
    assert_caught(212, "the upper end of a group reaches twice as far", rounded(GROUPS));
    assert_caught(213, "a minimum off the grid is kept", rounded(TWO_LEVEL));
    assert_caught(216, "the grid of minima ends with the smallest elements", rounded(TWO_LEVEL));
    assert_caught(214, "an error is taken from what was wanted, not from the key", fed(GROUPS));
    assert_caught(215, "errors of the same eight channels are left out", fed(TWO_LEVEL));
    let turned = |hadamard, window| {
        let case = turned::Case { hadamard, window, ..turned::CASE };
        move |run: &crate::exec::Run| turned::appended(run, &case)
    };
    assert_caught(217, "no barrier between turning a key and writing it", turned(true, 0));
    assert_caught(218, "a query is written over while others read it", turned(false, 64));
    assert_caught(219, "keys are not multiplied", turned(true, 64));
    assert_caught(220, "a slab leaves as if no token had been dropped", dropped::packs_once);
    assert_caught(
        207,
        "a value's codes wipe out its neighbour's, in the other half of the words",
        |run| kivi::stream(run, 64, 32, 32, 40),
    );
}
