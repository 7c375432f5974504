//! kv_gather: rows of f16 slabs moved bit for bit, and packed as kv_pack packs them.

mod kernel;

use crate::cases::{Noise, somewhere};
use crate::cpu_attn::D;
use crate::exec::{Run, assert_caught, everyone, op};
use kernel::{Call, FED, gathered};
use kvwarp::ffi::{self, kvw_kv_gather_params as Params};
use kvwarp::kv_gather::{compact, cpu, oracle};
use kvwarp::slab::{Format, Layout, TOKENS};

/// Slabs of any bits.
fn slabs(noise: &mut Noise, layout: &Layout, n: usize) -> Vec<u8> {
    (0..n * layout.slab_bytes()).map(|_| noise.bits() as u8).collect()
}

/// `n` ascending slots from `first` up to `end`.
fn some(noise: &mut Noise, first: usize, end: usize, n: usize) -> Vec<u32> {
    let mut slots: Vec<u32> = (first as u32..end as u32).collect();
    while slots.len() > n {
        slots.remove(noise.below(slots.len()));
    }
    slots
}

/// The halves of a token, keys then values.
fn token(ring: &[u8], layout: &Layout, slot: usize) -> Vec<[u8; 2]> {
    let bytes = layout.slab_bytes();
    let slab = &ring[slot / TOKENS % (ring.len() / bytes) * bytes..][..bytes];
    let at = |i: usize| match i.checked_sub(layout.head_dim) {
        None => layout.k_at(slot % TOKENS, i).0,
        Some(c) => layout.v_codes() + layout.v_at(slot % TOKENS, c).0,
    };
    (0..2 * layout.head_dim).map(|i| [slab[at(i)], slab[at(i) + 1]]).collect()
}

#[test]
fn oracle_hand_worked() {
    // Token t of K is t everywhere, of V 100 + t; slots 1, 2, 63 and 65 of two slabs.
    let layout = Layout::new(Format::F16, 64, 32).unwrap();
    let mut ring = vec![0; 2 * layout.slab_bytes()];
    for slot in 0..128 {
        let (k, v) = (vec![slot as f32; 64], vec![100.0 + slot as f32; 64]);
        kvwarp::kv_pack::append(&mut ring, &layout, slot, &k, &v);
    }
    let mut got = vec![0xAA; layout.slab_bytes()];
    cpu(&ring, &layout, &[1, 2, 63, 65], &mut got).unwrap();
    for slabs in [oracle(&ring, &layout, &[1, 2, 63, 65]), got.clone()] {
        for (i, slot) in [1.0, 2.0, 63.0, 65.0].into_iter().enumerate() {
            assert_eq!(kvwarp::slab::k_value(&layout, &slabs, i, 5), slot);
            assert_eq!(kvwarp::slab::v_value(&layout, &slabs, i, 63), 100.0 + slot);
        }
    }
    assert!(token(&got, &layout, 4).iter().all(|x| *x == [0xAA; 2]), "what is after them stays");
}

#[test]
fn gathered_rows_are_the_oracles() {
    let mut noise = Noise(51);
    for d in D {
        let layout = Layout::new(Format::F16, d, 32).unwrap();
        for n in [0, 1, 15, 16, 17, 63, 64, 65, 150, 320] {
            let (from, before) = (slabs(&mut noise, &layout, 5), slabs(&mut noise, &layout, 5));
            let slots = some(&mut noise, 0, 320, n);
            let (want, mut to) = (oracle(&from, &layout, &slots), before.clone());
            cpu(&from, &layout, &slots, &mut to).unwrap();
            for slot in 0..320 {
                let want = if slot < n { &want } else { &before };
                let same = token(&to, &layout, slot) == token(want, &layout, slot);
                assert!(same, "D {d}: {n} slots, slot {slot}");
            }
        }
    }
}

/// In place, from any slot on, in a ring that wraps: what is moved is what was there, and nothing else changes.
#[test]
fn a_ring_is_compacted_in_place() {
    let mut noise = Noise(52);
    for round in 0..200 {
        let layout = Layout::new(Format::F16, D[round % 4], 32).unwrap();
        let ring_slabs = 2 + noise.below(4);
        let first = noise.below(1000);
        let end = (first / TOKENS + ring_slabs) * TOKENS;
        let n = noise.below(end - first + 1);
        let slots = some(&mut noise, first, end, n);
        let before = slabs(&mut noise, &layout, ring_slabs);
        let mut ring = before.clone();
        compact(&mut ring, &layout, first, &slots).unwrap();
        for slot in first / TOKENS * TOKENS..end {
            let moved = slot.checked_sub(first).and_then(|i| slots.get(i));
            let from = moved.map_or(slot, |&s| s as usize);
            let same = token(&ring, &layout, slot) == token(&before, &layout, from);
            assert!(same, "{first}.. of {ring_slabs} slabs: slot {slot} from {from}");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let layout = Layout::new(Format::F16, 64, 32).unwrap();
    let q8 = Layout::new(Format::Q8, 64, 32).unwrap();
    let (from, mut to) = (vec![0; 2 * layout.slab_bytes()], vec![0; layout.slab_bytes()]);
    let mut moved = |layout, slots: &[u32]| {
        cpu(&from, layout, slots, &mut to).map_err(|e| e.to_string()).err().unwrap_or_default()
    };
    assert_eq!(moved(&layout, &[0, 127]), "");
    assert_eq!(moved(&layout, &[640, 767]), "", "slabs 10 and 11 of a ring of two");
    assert!(moved(&layout, &[5, 5]).contains("`slots`"));
    assert!(moved(&layout, &[63, 192]).contains("`ring` holds 2 elements, needs 4"));
    assert!(moved(&q8, &[0]).contains("`layout` is Q8"));
    let many: Vec<u32> = (0..65).collect();
    assert!(moved(&layout, &many).contains("`to_ring` holds 1 elements, needs 2"));
    let mut ring = from.clone();
    assert!(compact(&mut ring, &layout, 9, &[8]).is_err(), "backwards");
    assert!(compact(&mut ring, &layout, 9, &[9, 128]).is_err(), "past the ring");
    assert!(compact(&mut [], &layout, 0, &[]).is_err(), "no ring");
}

#[test]
fn c_checks_need_no_gpu() {
    let cache = crate::kv_pack::cache(128, 32, 64);
    let valid = Params {
        struct_size: size_of::<Params>() as u32,
        max_slabs: 4,
        cache: ffi::kvw_cache { ring: 8192 as _, seqs: 2, ..cache },
        from: somewhere::<u8>().cast(),
        slots: somewhere::<i32>(),
        from_slabs: 9,
        slots_stride: 256,
        ..Default::default()
    };
    let kv_gather = op!(kvw_kv_gather);
    kv_gather.refuses(
        valid,
        &[
            ("struct_size", |p| p.struct_size = 0, ffi::KVW_ERR_STRUCT),
            ("max_slabs", |p| p.max_slabs = 0, ffi::KVW_ERR_SHAPE),
            ("group", |p| p.cache.group = 16, ffi::KVW_ERR_FORMAT),
            ("from", |p| p.from = std::ptr::null(), ffi::KVW_ERR_NULL),
            ("from, in place", |p| p.from = p.cache.ring, ffi::KVW_ERR_SHAPE),
            ("slots", |p| p.slots = std::ptr::null(), ffi::KVW_ERR_NULL),
            ("slots unaligned", |p| p.slots = 4 as _, ffi::KVW_ERR_ALIGN),
            ("first unaligned", |p| p.first = 4 as _, ffi::KVW_ERR_ALIGN),
            ("feedback unaligned", |p| p.feedback = 8 as _, ffi::KVW_ERR_ALIGN),
            ("from_slabs", |p| p.from_slabs = 0, ffi::KVW_ERR_SHAPE),
            ("slots_stride", |p| p.slots_stride = 0, ffi::KVW_ERR_SHAPE),
            ("range", |p| p.range = 1.01, ffi::KVW_ERR_SHAPE),
            ("range NaN", |p| p.range = f32::NAN, ffi::KVW_ERR_SHAPE),
            ("reserved", |p| p.reserved = 1, ffi::KVW_ERR_SHAPE),
        ],
    );
    // Four slabs of rows of 512 bytes and slots; two f16 slabs of the window and two of 6,144 bytes.
    let mut q2 = valid;
    q2.cache.pools[3] = somewhere();
    assert_eq!(kv_gather.bytes(&q2), 2 * (256 * 516 + 2 * 32768 + 2 * 6144));
    q2.feedback = somewhere::<u8>().cast();
    assert_eq!(kv_gather.bytes(&q2), 2 * (256 * 516 + 2 * 32768 + 2 * 6144) + 128 * 127);
    assert_eq!(kv_gather.workspace(&q2), 0);
}

#[test]
fn executors_match_oracle() {
    for exec in everyone(3) {
        gathered(&exec.start(), &Call::default()).unwrap();
        gathered(&exec.start(), &Call { host: FED, ..Call::default() }).unwrap();
    }
}

#[test]
fn faults_are_caught() {
    let plain = |run: &Run| gathered(run, &Call::default());
    assert_caught(751, "the staged ring is a slab shorter", plain);
    assert_caught(752, "a value's halves change places", plain);
    assert_caught(753, "slots past the last are followed", plain);
    assert_caught(754, "codes are made before all tokens are there", plain);
    assert_caught(755, "every head has the first one's feedback", |run| {
        gathered(run, &Call { host: FED, ..Call::default() })
    });
}
