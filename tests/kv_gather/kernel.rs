//! The kernel on the executors: what it writes is what gathering in f16 and then packing gives.

use super::{slabs, some};
use crate::cases::Noise;
use crate::exec::{Exec, Run, everyone, op};
use crate::kv_pack::{FP8, Host, MIXED, TWO_LEVEL};
use kvwarp::ffi::kvw_kv_gather_params as Params;
use kvwarp::kv_gather::oracle;
use kvwarp::slab::{Format, TOKENS};

/// With feedback, and a range that 2-bit codes do not span.
pub const FED: Host = Host { feedback: true, range: 0.85, ..HOST };

const HOST: Host = Host { d: 64, group: 32, heads: 2, seqs: 2, slabs: 5, ..MIXED };

pub struct Call {
    pub host: Host,
    /// Slots of the staged ring, which begins with slot `start`.
    pub staged: usize,
    pub start: usize,
    /// Tokens gathered of each head, in whole slabs `packed` of them in the table; the first slab written.
    pub kept: [usize; 4],
    pub packed: [usize; 4],
    pub first: usize,
}

impl Default for Call {
    fn default() -> Self {
        Self {
            host: HOST,
            staged: 7,
            start: 130,
            kept: [250, 300, 64, 1],
            packed: [3, 4, 1, 0],
            first: 0,
        }
    }
}

/// Packed slabs bit for bit, the ring's rows, with zeros after the last; what is not written stays.
pub fn gathered(run: &Run, call: &Call) -> Result<(), String> {
    let (mut noise, host) = (Noise(53), &call.host);
    let f16_layout = host.layout(Format::F16);
    let bytes = f16_layout.slab_bytes();
    let finite = |b: &mut [u8]| {
        for half in b.chunks_exact_mut(2) {
            half[1] = half[1] & 0x83 | 0x38; // 0.5 to 2 in size
        }
    };
    let mut from = slabs(&mut noise, &f16_layout, host.rows() * call.staged);
    finite(&mut from);
    let device = host.device(run, true);
    let stride = call.kept.iter().max().unwrap() + 3;
    let (mut slots, mut lens, mut packed) = (Vec::new(), Vec::new(), Vec::new());
    for row in 0..host.rows() {
        let end = call.start / TOKENS * TOKENS + call.staged * TOKENS;
        slots.push(some(&mut noise, call.start, end, call.kept[row]));
        lens.push((call.first * TOKENS + call.kept[row]) as i32);
        packed.push((call.first + call.packed[row]) as i32);
    }
    let padded = |row: &Vec<u32>| {
        let mut row: Vec<i32> = row.iter().map(|&slot| slot as i32).collect();
        row.resize(stride, 64);
        row
    };
    let lists: Vec<i32> = slots.iter().flat_map(padded).collect();
    let (device_from, lists) = (run.upload("from", &from), run.upload("slots", &lists));
    let (device_lens, packed_mem) = (run.upload("lens", &lens), run.upload("packed", &packed));
    let first = run.upload("first", &vec![call.first as i32; host.rows()]);
    let mut cache = host.cache(&device, &device_lens, true);
    (cache.packed, cache.lens_heads) = (packed_mem.ptr(), host.heads as i32);
    let mut rounding = crate::kv_pack::params(0, cache);
    host.round(&mut rounding, &device);
    let p = Params {
        struct_size: size_of::<Params>() as u32,
        max_slabs: host.slabs as i32,
        cache,
        from: device_from.ptr().cast(),
        slots: lists.ptr(),
        first: if call.first > 0 { first.ptr() } else { std::ptr::null() },
        feedback: rounding.feedback,
        from_slabs: call.staged as i32,
        slots_stride: stride as i32,
        range: rounding.range,
        reserved: 0,
    };
    run.call(&op!(kvw_kv_gather), &p)?;

    let ring = device.ring.download();
    for (row, slots) in slots.iter().enumerate() {
        // The staged ring from slot 0 on, as the oracle reads it.
        let own = &from[row * call.staged * bytes..][..call.staged * bytes];
        let whole: Vec<u8> = (0..call.start / TOKENS + call.staged)
            .flat_map(|i| own[i % call.staged * bytes..][..bytes].iter().copied())
            .collect();
        let mut want = vec![0xFF; call.first * bytes];
        want.extend(oracle(&whole, &f16_layout, slots));
        let in_table = packed[row] as usize;
        host.packed_ok(&device, row, call.first..in_table, &want)?;
        let got = &ring[row * host.slabs * bytes..][..host.slabs * bytes];
        want.resize(got.len(), 0xFF);
        want[..in_table * bytes].fill(0xFF);
        if got != want {
            let at = got.iter().zip(&want).position(|(a, b)| a != b).unwrap();
            return Err(format!("D {} row {row}: the ring differs at byte {at}", host.d));
        }
    }
    Ok(())
}

#[test]
fn gathered_and_packed_slabs_are_the_codecs() {
    for exec in everyone(1) {
        let run = exec.start();
        for d in [64, 96, 128, 256] {
            for group in [32, 64, 128] {
                let call = Call { host: Host { d, group, ..HOST }, ..Call::default() };
                gathered(&run, &call).unwrap();
            }
            for host in [TWO_LEVEL, FP8] {
                let host = Host { d, heads: 2, seqs: 2, slabs: 5, ..host };
                gathered(&run, &Call { host, ..Call::default() }).unwrap();
            }
            if d == 64 || exec == Exec::SimtPlain {
                gathered(&run, &Call { host: Host { d, ..FED }, ..Call::default() }).unwrap();
            }
        }
        // After two slabs that are there already; nothing in the table, nothing at all of two heads.
        let after =
            Call { first: 2, kept: [130, 192, 0, 64], packed: [2, 3, 0, 0], ..Call::default() };
        gathered(&run, &after).unwrap();
        let ring = Call { kept: [320, 17, 0, 0], packed: [0; 4], start: 0, ..Call::default() };
        gathered(&run, &ring).unwrap();
    }
}

/// The same bytes from the two ops in turn: rows gathered into a ring, then kv_pack's FLUSH of it.
#[test]
fn one_pass_is_gather_then_flush() {
    use kvwarp::ffi;
    for exec in everyone(1) {
        let run = exec.start();
        for host in
            [Host { d: 128, ..HOST }, FED, Host { heads: 2, seqs: 2, slabs: 5, ..TWO_LEVEL }]
        {
            let mut noise = Noise(54);
            let from = slabs(&mut noise, &host.layout(Format::F16), host.rows() * 9);
            let slots: Vec<i32> = (0..host.rows())
                .flat_map(|_| some(&mut noise, 0, 9 * TOKENS, 320))
                .map(|slot| slot as i32)
                .collect();
            let (from, slots) = (run.upload("from", &from), run.upload("slots", &slots));
            let lens = run.upload("lens", &vec![320; host.rows()]);
            let [none, all] = [0, 5].map(|n| run.upload("packed", &vec![n; host.rows()]));
            let first = run.upload("first", &vec![0; host.rows()]);
            let pools = [true, false].map(|at_once| {
                let device = host.device(&run, true);
                let mut cache = host.cache(&device, &lens, true);
                cache.lens_heads = host.heads as i32;
                cache.packed = if at_once { all.ptr() } else { none.ptr() };
                let mut flush = crate::kv_pack::params(ffi::KVW_PACK_FLUSH, cache);
                host.round(&mut flush, &device);
                let gather = Params {
                    struct_size: size_of::<Params>() as u32,
                    max_slabs: 5,
                    cache,
                    from: from.ptr().cast(),
                    slots: slots.ptr(),
                    first: std::ptr::null(),
                    feedback: flush.feedback,
                    from_slabs: 9,
                    slots_stride: 320,
                    range: flush.range,
                    reserved: 0,
                };
                run.call(&op!(kvw_kv_gather), &gather).unwrap();
                if !at_once {
                    (flush.cache.packed, flush.cache.window) = (std::ptr::null(), 0);
                    (flush.first, flush.max_tokens) = (first.ptr(), 5);
                    run.call(&op!(kvw_kv_pack), &flush).unwrap();
                }
                device.pools.into_iter().map(|(f, pool)| (f, pool.download())).collect::<Vec<_>>()
            });
            assert!(pools[0] == pools[1], "D {}", host.d);
        }
    }
}
