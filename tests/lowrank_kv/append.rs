//! Rows written by the kernel, bit for bit what the host writes.

use super::case::{Cache, Case, Device, case};
use crate::cases::{Noise, somewhere};
use crate::exec::{Run, assert_caught, executors, op};
use half::f16;
use kvwarp::ffi::{self, kvw_lowrank_kv_params as Params};
use kvwarp::slab::TOKENS;

/// Appends the newest `new[s]` tokens of each sequence to slabs of NaN; all rows but these must stay.
fn writes(run: &Run, case: &Case, new: &[usize], ragged: bool) -> Result<(), String> {
    let cache = Cache::new(case);
    let blank = vec![0xFF; cache.bytes().len()];
    let device = Device::new(run, &cache, &blank);
    let (rank, elite) = (case.rank, cache.shape.width() - case.rank);
    let (z_stride, k_stride) = (rank + 8, elite + 16);
    let tokens: usize = new.iter().sum();
    let mut noise = Noise(5);
    let (z, k) = (noise.halves(tokens * z_stride), noise.halves(tokens * k_stride));
    let mut rows = vec![0];
    new.iter().for_each(|n| rows.push(rows.last().unwrap() + *n as i32));
    let (dz, dk) = (run.upload("z", &z), run.upload("k", &k));
    let cu_tokens = run.upload("cu_tokens", &rows);
    let params = Params {
        struct_size: size_of::<Params>() as u32,
        op: ffi::KVW_LOWRANK_APPEND,
        cache: device.params(),
        z: dz.ptr().cast(),
        k: dk.ptr().cast(),
        cu_tokens: if ragged { cu_tokens.ptr() } else { std::ptr::null() },
        z_stride: z_stride as i64,
        k_stride: k_stride as i64,
        tokens: tokens as i32,
        max_tokens: *new.iter().max().unwrap() as i32,
        ..Default::default()
    };
    run.call(&op!(kvw_lowrank_kv), &params)?;
    let (mut want, bytes) = (blank, cache.shape.slab_bytes());
    for (s, (&len, &n)) in case.lens.iter().zip(new).enumerate() {
        for (slot, row) in (len - n..len).zip(rows[s] as usize..) {
            let entry = cache.table[s * cache.stride + slot / TOKENS];
            let Some((kvwarp::slab::Format::F16, index)) = entry.get() else { continue };
            let wide = |x: &[f16]| -> Vec<f32> { x.iter().map(|x| x.to_f32()).collect() };
            let (z, k) = (&z[row * z_stride..][..rank], &k[row * k_stride..][..elite]);
            let slab = &mut want[index * bytes..][..bytes];
            cache.shape.write(slab, slot % TOKENS, &wide(z), &wide(k)).unwrap();
        }
    }
    match device.pool.download().iter().zip(&want).position(|(a, b)| a != b) {
        None => Ok(()),
        Some(at) => Err(format!("byte {} of slab {} differs", at % bytes, at / bytes)),
    }
}

#[test]
fn appended_rows_are_the_host_s() {
    for exec in executors(3) {
        let run = exec.start();
        let check = |lens: &[usize], new: &[usize], ragged: bool| {
            let case = Case { lens: lens.to_vec(), ..case() };
            writes(&run, &case, new, ragged)
                .unwrap_or_else(|e| panic!("{exec:?} {lens:?} {new:?}: {e}"));
        };
        // A token each, at every kind of slot; prompts; chunks that begin and end within tiles; nothing.
        check(&[1, 16, 17, 64, 65, 130], &[1; 6], false);
        check(&[1, 16, 17, 64, 65, 130], &[1; 6], true);
        check(&[200, 1, 64, 70], &[200, 1, 64, 70], true);
        check(&[200, 90, 64, 70], &[37, 0, 1, 69], true);
        let wide = Case { kv_heads: 8, pairs: 8, rank: 448, holes: 0, lens: vec![70], ..case() };
        writes(&run, &wide, &[40], true).unwrap();
    }
}

#[test]
fn appends_are_checked() {
    let valid = Params {
        op: ffi::KVW_LOWRANK_APPEND,
        z: somewhere::<u8>().cast(),
        k: somewhere::<u8>().cast(),
        cu_tokens: somewhere::<i32>(),
        z_stride: 512,
        k_stride: 24,
        tokens: 9,
        max_tokens: 5,
        ..super::valid_params()
    };
    op!(kvw_lowrank_kv).refuses(
        valid,
        &[
            ("z", |p| p.z = std::ptr::null_mut(), ffi::KVW_ERR_NULL),
            ("k unaligned", |p| p.k = 8 as _, ffi::KVW_ERR_ALIGN),
            ("cu_tokens unaligned", |p| p.cu_tokens = 8 as _, ffi::KVW_ERR_ALIGN),
            ("z_stride", |p| p.z_stride = 504, ffi::KVW_ERR_SHAPE),
            ("z_stride, odd", |p| p.z_stride = 516, ffi::KVW_ERR_SHAPE),
            ("k_stride", |p| p.k_stride = 16, ffi::KVW_ERR_SHAPE),
            ("tokens", |p| p.tokens = 0, ffi::KVW_ERR_SHAPE),
            ("tokens of one row each", |p| p.cu_tokens = std::ptr::null(), ffi::KVW_ERR_SHAPE),
            ("max_tokens", |p| p.max_tokens = 10, ffi::KVW_ERR_SHAPE),
        ],
    );
    assert_eq!(op!(kvw_lowrank_kv).bytes(&valid), 9 * 2 * 2 * (512 + 24));
}

#[test]
fn faults_of_appends_are_caught() {
    let chunk = |run: &Run| writes(run, &Case { lens: vec![40], ..case() }, &[20], true);
    assert_caught(427, "rows come a slot late", chunk);
    assert_caught(430, "rows before the new ones are written too", chunk);
}

/// Reads the newest `n[s]` tokens of each sequence; what lies between rows, and rows in holes, must stay.
pub fn reads(run: &Run, case: &Case, n: &[usize], ragged: bool) -> Result<(), String> {
    let cache = Cache::new(case);
    let device = Device::new(run, &cache, &cache.bytes());
    let (rank, width) = (case.rank, cache.shape.width());
    let (stride, tokens) = (width + 8, n.iter().sum::<usize>());
    let mut rows = vec![0];
    n.iter().for_each(|n| rows.push(rows.last().unwrap() + *n as i32));
    let mut want = vec![f16::from_f32(7.0); tokens * stride];
    let (out, cu_tokens) = (run.upload("rows", &want), run.upload("cu_tokens", &rows));
    let params = Params {
        struct_size: size_of::<Params>() as u32,
        op: ffi::KVW_LOWRANK_READ,
        cache: device.params(),
        z: out.ptr().cast(),
        k: out.ptr().wrapping_add(rank).cast(),
        cu_tokens: if ragged { cu_tokens.ptr() } else { std::ptr::null() },
        z_stride: stride as i64,
        k_stride: stride as i64,
        tokens: tokens as i32,
        max_tokens: *n.iter().max().unwrap() as i32,
        ..Default::default()
    };
    run.call(&op!(kvw_lowrank_kv), &params)?;
    for (s, (&len, &n)) in case.lens.iter().zip(n).enumerate() {
        for (slot, row) in (len - n..len).zip(rows[s] as usize..) {
            let Some(slab) = cache.view(s).slab(slot / TOKENS) else { continue };
            let held = cache.shape.read(slab, slot % TOKENS);
            let to = &mut want[row * stride..][..width];
            to.iter_mut().zip(held).for_each(|(to, x)| *to = f16::from_f32(x));
        }
    }
    match out.download().iter().zip(&want).position(|(a, b)| a.to_bits() != b.to_bits()) {
        None => Ok(()),
        Some(at) => Err(format!("element {} of row {} differs", at % stride, at / stride)),
    }
}

#[test]
fn read_rows_are_those_held() {
    for exec in executors(3) {
        let run = exec.start();
        let check = |lens: &[usize], n: &[usize], ragged: bool| {
            let case = Case { lens: lens.to_vec(), ..case() };
            reads(&run, &case, n, ragged)
                .unwrap_or_else(|e| panic!("{exec:?} {lens:?} {n:?}: {e}"));
        };
        check(&[1, 16, 17, 64, 65, 130], &[1; 6], false);
        check(&[200, 1, 64, 70], &[200, 1, 64, 70], true);
        check(&[200, 90, 64, 270], &[37, 0, 1, 269], true);
        let wide = Case { kv_heads: 8, pairs: 8, rank: 448, holes: 0, lens: vec![70], ..case() };
        reads(&run, &wide, &[40], true).unwrap();
    }
    let late = |run: &Run| reads(run, &Case { lens: vec![40], holes: 0, ..case() }, &[20], true);
    assert_caught(427, "rows are read a slot late", late);
}
