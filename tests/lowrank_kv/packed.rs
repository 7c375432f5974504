//! Slabs of 4 and 2 bits: bit for bit what the host packs, read back, and attended to beside f16 ones.

use super::append::reads;
use super::case::{Cache, Case, Device, RANGE, SCALE, case, matches};
use crate::cases::{Noise, relative_l2, somewhere};
use crate::exec::{Run, assert_caught, executors, op};
use half::f16;
use kvwarp::ffi::{self, kvw_lowrank_kv_params as Params};
use kvwarp::lowrank_kv::{Scratch, Shape, cpu};
use kvwarp::pages::Entry;
use kvwarp::simd::Level;
use kvwarp::slab::{Format, TOKENS};
use kvwarp::threads::Team;

const STORES: [Format; 2] = [Format::Q4, Format::Q2];

#[test]
fn codes_and_scales_lie_where_the_layout_says() {
    // One head of 4 pairs, rank 16: 24 channels. Channel 0 counts 0 to 63, channel 9 is 15 at token 17 and else 0.
    let shape = Shape::new(1, 4, 16).unwrap();
    let mut slab = vec![0; shape.slab_bytes()];
    for token in 0..TOKENS {
        let mut z = [0.0; 16];
        (z[0], z[9]) = (token as f32, if token == 17 { 15.0 } else { 0.0 });
        shape.write(&mut slab, token, &z, &[0.0; 8]).unwrap();
    }
    let mut packed = vec![0xFF; shape.bytes(Format::Q4)];
    shape.pack(Format::Q4, &slab, 1.0, &mut packed).unwrap();
    let half = |at: usize| f16::from_le_bytes([packed[at], packed[at + 1]]).to_f32();
    // 4 tiles of 3 columns of 16 tokens of 4 bytes, then 32 bytes a column.
    let meta = 4 * 3 * 16 * 4;
    assert_eq!(packed.len(), meta + 3 * 32);
    assert_eq!((half(meta), half(meta + 16)), (f16::from_f32(63.0 / 15.0).to_f32(), 0.0));
    assert_eq!((half(meta + 32 + 2), half(meta + 48 + 2)), (1.0, 0.0));
    // Token 17: tile 1, row 1; channel 9 is the second of its column: the lowest of the upper half of the word.
    assert_eq!(packed[(3 + 1) * 64 + 4..][..4], [0, 0, 15, 0]);
    // Channel 0 of token 63: code 15.
    assert_eq!(packed[3 * 3 * 64 + 15 * 4..][..4], [15, 0, 0, 0]);
    let row = shape.read((Format::Q4, &packed), 17);
    assert_eq!((row[9], row[10]), (15.0, 0.0));
    let mut packed = vec![0xFF; shape.bytes(Format::Q2)];
    shape.pack(Format::Q2, &slab, 1.0, &mut packed).unwrap();
    assert_eq!(packed[(3 + 1) * 32 + 2..][..2], [0, 3]);
    assert_eq!(shape.read((Format::Q2, &packed), 17)[9], 15.0);
    let what = shape.pack(Format::Q8, &slab, 1.0, &mut packed).unwrap_err().to_string();
    assert!(what.contains("format") && what.contains("q4, q2"), "{what}");
}

/// Packs three slabs of which one has NaN and one is nobody's; the pool of codes has another slab that must stay.
fn packs(run: &Run, store: Format, range: f32) -> Result<(), String> {
    let cache = Cache::new(&Case { holes: 0, lens: vec![192], store, rank: 144, ..case() });
    let (shape, bytes) = (cache.shape, cache.shape.bytes(store));
    let mut noise = Noise(3);
    let mut slabs = vec![0; 3 * shape.slab_bytes()];
    for (i, slab) in slabs.chunks_exact_mut(shape.slab_bytes()).enumerate() {
        for token in 0..TOKENS {
            let mut row: Vec<f32> = noise.values(shape.width());
            row[3] = if i == 0 { f32::NAN } else { 0.5 };
            row[5] *= if token % 9 == 0 { 60_000.0 } else { 1.0 };
            row[7] = if token == 5 { f32::NAN } else { row[7] };
            let (z, k) = row.split_at(shape.rank());
            shape.write(slab, token, z, k).unwrap();
        }
    }
    let device = Device::new(run, &cache, &slabs);
    let blank = vec![0xFF; 4 * bytes];
    let to = run.upload("codes", &blank);
    let entry = |format, i| Entry::new(format, i).0;
    let moves = [
        [entry(Format::F16, 2), entry(store, 0)],
        [Entry::HOLE.0, entry(store, 1)],
        [entry(Format::F16, 0), entry(store, 3)],
        [entry(Format::F16, 1), Entry::HOLE.0],
    ];
    let list = run.upload("moves", moves.as_flattened());
    let params = Params {
        struct_size: size_of::<Params>() as u32,
        op: ffi::KVW_LOWRANK_PACK,
        cache: ffi::kvw_latent { packed: to.ptr().cast(), ..device.params() },
        moves: list.ptr(),
        tokens: 4,
        range,
        ..Default::default()
    };
    run.call(&op!(kvw_lowrank_kv), &params)?;
    let mut want = blank;
    for (from, to) in [(2, 0), (0, 3)] {
        let slab = &slabs[from * shape.slab_bytes()..][..shape.slab_bytes()];
        shape.pack(store, slab, range, &mut want[to * bytes..][..bytes]).unwrap();
    }
    match to.download().iter().zip(&want).position(|(a, b)| a != b) {
        None => Ok(()),
        Some(at) => Err(format!("byte {} of slab {} differs", at % bytes, at / bytes)),
    }
}

#[test]
fn packed_slabs_are_the_host_s() {
    for exec in executors(2) {
        for store in STORES {
            for range in [1.0, RANGE] {
                packs(&exec.start(), store, range)
                    .unwrap_or_else(|e| panic!("{exec:?} {store:?} {range}: {e}"));
            }
        }
    }
}

#[test]
fn packed_rows_are_read_back() {
    for exec in executors(1) {
        for store in STORES {
            let case = Case { store, lens: vec![200, 64, 391], ..case() };
            reads(&exec.start(), &case, &[200, 3, 90], true)
                .unwrap_or_else(|e| panic!("{exec:?} {store:?}: {e}"));
        }
    }
}

/// Whole caches of codes, with a tail, and with f16 slabs between; every way to copy them.
#[test]
fn attention_reads_codes_and_elements() {
    for exec in executors(2) {
        for (i, (kv_heads, group, pairs, rank)) in
            [(3, 3, 4, 144), (1, 3, 4, 16), (8, 4, 4, 448), (32, 1, 4, 272)].into_iter().enumerate()
        {
            for store in STORES {
                let case = Case { kv_heads, group, pairs, rank, store, ..case() };
                let case = Case { lens: vec![64 * 7 + 9, 128, 5], hopper: i % 2 == 0, ..case };
                for (ctas, rows) in [(1, 1), (5, 2)] {
                    let case = Case { ctas, rows, ..case.clone() };
                    matches(&exec.start(), &case)
                        .unwrap_or_else(|e| panic!("{exec:?}: {case:?}: {e}"));
                }
            }
        }
    }
}

#[test]
fn the_cpu_reads_codes_too() {
    for store in STORES {
        let cache = Cache::new(&Case { store, lens: vec![64 * 11 + 3, 640], ..case() });
        let (want, _) = cache.want();
        for level in Level::available() {
            let (mut scratch, mut all) = (Scratch::at(level), Vec::new());
            for (q, q_elite, view) in cache.queries() {
                let mut out = vec![f32::NAN; q.len()];
                let team = Team::new(2);
                cpu(&team, q, q_elite, &view, SCALE, &mut out, &mut scratch).unwrap();
                all.extend(out);
            }
            let error = relative_l2(&all, &want);
            assert!(error <= 2e-5, "{store:?} {level:?}: relative L2 {error:.2e}");
        }
    }
}

/// To the last bit what single rows of codes are.
#[test]
fn unpacked_slabs_are_their_rows() {
    for (store, [kv_heads, pairs, rank]) in
        STORES.into_iter().flat_map(|store| [[3, 12, 112], [1, 4, 16]].map(|shape| (store, shape)))
    {
        let shape = Shape::new(kv_heads, pairs, rank).unwrap();
        let mut exact = vec![0; shape.slab_bytes()];
        for token in 0..64 {
            let x = |i: usize| ((token * 7 + i * 13) % 101) as f32 * 0.37 - 11.0;
            let row: Vec<f32> = (0..shape.width()).map(x).collect();
            let (z, k) = row.split_at(rank);
            shape.write(&mut exact, token, z, k).unwrap();
        }
        let mut packed = vec![0; shape.bytes(store)];
        shape.pack(store, &exact, 0.9, &mut packed).unwrap();
        for level in Level::available() {
            let mut out = vec![0xFF; shape.slab_bytes()];
            shape.unpack(level, (store, &packed), &mut out).unwrap();
            for token in 0..64 {
                let [want, got] = [(store, &packed), (Format::F16, &out)]
                    .map(|(format, slab)| shape.read((format, slab), token));
                assert_eq!(got, want, "{store:?} {level:?}, token {token}");
            }
            assert!(shape.unpack(level, (store, &packed[1..]), &mut out).is_err());
            assert!(shape.unpack(level, (store, &packed), &mut out[1..]).is_err());
        }
    }
}

/// What codes cost the attention of latents whose channels are of like size.
#[test]
fn fewer_bits_are_near_what_they_stand_for() {
    let out = |store| {
        let cache = Cache::new(&Case { store, holes: 0, lens: vec![640], ..case() });
        cache.want().0
    };
    let exact: Vec<f32> = out(Format::F16).iter().map(|&x| x as f32).collect();
    let [q4, q2] = STORES.map(|store| relative_l2(&exact, &out(store)));
    assert!(q4 < 0.2 && q4 < q2 / 2.0, "{q4} {q2}");
}

#[test]
fn packing_is_checked() {
    let mut valid = Params {
        op: ffi::KVW_LOWRANK_PACK,
        moves: somewhere::<u32>(),
        tokens: 3,
        range: 1.0,
        ..super::valid_params()
    };
    (valid.cache.format, valid.cache.packed) = (ffi::KVW_SLAB_Q2, somewhere());
    op!(kvw_lowrank_kv).refuses(
        valid,
        &[
            ("moves", |p| p.moves = std::ptr::null(), ffi::KVW_ERR_NULL),
            (
                "format",
                |p| (p.cache.format, p.cache.packed) = (ffi::KVW_SLAB_F16, std::ptr::null_mut()),
                ffi::KVW_ERR_FORMAT,
            ),
            ("tokens", |p| p.tokens = 0, ffi::KVW_ERR_SHAPE),
            ("range", |p| p.range = 0.0, ffi::KVW_ERR_SHAPE),
            ("range above 1", |p| p.range = 1.1, ffi::KVW_ERR_SHAPE),
        ],
    );
    let width = 512 + 2 * 3 * 4;
    assert_eq!(op!(kvw_lowrank_kv).bytes(&valid), 3 * (width * (128 + 20) + 8));
}

#[test]
fn faults_of_packed_slabs_are_caught() {
    let with = |hopper| {
        let case = Case { store: Format::Q2, hopper, holes: 0, lens: vec![256], ..case() };
        move |run: &Run| matches(run, &case)
    };
    assert_caught(432, "values overwrite codes that others have not read", with(false));
    assert_caught(
        433,
        "a bulk copy follows values without a fence between the proxies",
        with(true),
    );
}
