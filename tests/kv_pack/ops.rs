//! FILL, FLUSH and APPEND: rings and packed slabs bit for bit, rotated keys against the oracle.

use super::device::{FP8, Host, MIXED, TWO_LEVEL, params};
use crate::cases::{Noise, close, f64s, widen};
use crate::exec::{Exec, Run, everyone, op};
use half::{bf16, f16};
use kvwarp::ffi;
use kvwarp::kv_pack::append;
use kvwarp::pages::packed_slabs;
use kvwarp::rope_select::{Pairing, Scaling, inv_freq, oracle};
use kvwarp::slab::{Format, Layout, TOKENS, k_value, v_value};

/// Groups of every kind: noise, constants, ties, zeros of both signs, one outlier, the ends of f16, NaN; in one of
/// eight slabs none but such that begin at 0.
pub fn hard_rows(noise: &mut Noise, rows: usize, width: usize) -> Vec<f16> {
    let mut x = noise.halves(rows * width);
    for (i, x) in x.iter_mut().enumerate() {
        let (row, column) = (i / width, i % width);
        if row / TOKENS % 8 == 3 {
            let zero = row % 16 == 0 || column % 16 == 0;
            *x = f16::from_f32(if zero { 0.0 } else { x.to_f32().abs() });
            continue;
        }
        let value = match (row / 32 + column / 32) % 8 {
            1 => 7.25,
            2 => [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0][(row * 3 + column) % 7],
            3 => [0.0, -0.0][(row + column) % 2],
            4 if (row + column) % 32 == 5 => 6e4,
            5 => [65504.0, -65504.0][(row ^ column) % 2],
            6 if (row + column) % 5 == 0 => f32::NAN,
            _ => continue,
        };
        *x = f16::from_f32(value);
    }
    x
}

/// FILL of ragged sequences, then FLUSH of what left the window: ring and packed slabs bit for bit.
pub fn fill_and_flush(run: &Run, host: &Host, lens: &[usize]) -> Result<(), String> {
    let mut noise = Noise(11);
    let width = host.heads * host.d;
    let total: usize = lens.iter().sum();
    let (k, v) = (hard_rows(&mut noise, total, width), hard_rows(&mut noise, total, width));
    let device = host.device(run, true);
    let starts: Vec<i32> =
        (0..=lens.len()).map(|s| lens[..s].iter().sum::<usize>() as i32).collect();
    let device_lens = run.upload("lens", &lens.iter().map(|&n| n as i32).collect::<Vec<_>>());
    let (dk, dv) = (run.upload("k", &k), run.upload("v", &v));
    let (cu, first) = (run.upload("cu_tokens", &starts), run.upload("first", &vec![0; lens.len()]));
    let mut p = params(ffi::KVW_PACK_FILL, host.cache(&device, &device_lens, true));
    (p.k, p.v, p.cu_tokens, p.first) = (dk.ptr().cast(), dv.ptr().cast(), cu.ptr(), first.ptr());
    (p.tokens, p.max_tokens) = (total as i32, *lens.iter().max().unwrap() as i32);
    host.round(&mut p, &device);
    run.call(&op!(kvw_kv_pack), &p)?;
    p.op = ffi::KVW_PACK_FLUSH;
    p.max_tokens = host.slabs as i32;
    run.call(&op!(kvw_kv_pack), &p)?;

    let from = host.layout(Format::F16);
    let ring = device.ring.download();
    for row in 0..host.rows() {
        let (s, h) = (row / host.heads, row % host.heads);
        let mut want = vec![0xFF; host.slabs * from.slab_bytes()];
        for t in 0..lens[s] {
            let at = (starts[s] as usize + t) * width + h * host.d;
            let token = |x: &[f16]| widen(&x[at..at + host.d]);
            append(&mut want, &from, t, &token(&k), &token(&v));
        }
        // NaN keeps its place, not its bits.
        let same = |a: &[u8], b: &[u8]| {
            let half = |x: &[u8]| f16::from_le_bytes([x[0], x[1]]);
            a == b || half(a).is_nan() && half(b).is_nan()
        };
        let got = &ring[row * want.len()..][..want.len()];
        let off = got.chunks(2).zip(want.chunks(2)).position(|(a, b)| !same(a, b));
        if let Some(at) = off {
            return Err(format!("D {} row {row}: ring differs at half {at}", host.d));
        }
        host.packed_ok(&device, row, 0..packed_slabs(lens[s], host.window), got)?;
    }
    Ok(())
}

#[test]
fn filled_and_flushed_slabs_are_the_codecs() {
    for exec in everyone(1) {
        for d in [64, 96, 128, 256] {
            for group in [32, 64, 128] {
                let host = Host { d, group, window: 20, heads: 2, seqs: 2, slabs: 4, ..MIXED };
                fill_and_flush(&exec.start(), &host, &[233, 77]).unwrap();
            }
        }
        let host = Host { d: 64, group: 32, window: 0, heads: 3, seqs: 3, slabs: 3, ..MIXED };
        fill_and_flush(&exec.start(), &host, &[192, 1, 64]).unwrap();
        for d in [64, 96, 128, 256] {
            let other = |host| Host { d, heads: 2, seqs: 2, ..host };
            fill_and_flush(&exec.start(), &other(FP8), &[192, 70]).unwrap();
            for group in [32, 64] {
                let host = Host { group, ..other(TWO_LEVEL) };
                fill_and_flush(&exec.start(), &host, &[192, 70]).unwrap();
            }
        }
    }
}

/// APPEND token by token: the ring holds the tokens, and every slab that leaves is what packing it gives.
pub fn stream(run: &Run, host: &Host, n: usize) -> Result<(), String> {
    let mut noise = Noise(12);
    let row = host.heads * host.d + 8;
    let device = host.device(run, false);
    let from = host.layout(Format::F16);
    let mut exact = vec![vec![0u8; n.div_ceil(TOKENS) * from.slab_bytes()]; host.rows()];
    for len in 1..=n {
        let (k, v) = (noise.halves(host.seqs * row), noise.halves(host.seqs * row));
        let lens = run.upload("lens", &vec![len as i32; host.seqs]);
        let (dk, dv) = (run.upload("k", &k), run.upload("v", &v));
        let mut p = params(ffi::KVW_PACK_APPEND, host.cache(&device, &lens, false));
        (p.k, p.v, p.k_stride, p.v_stride) =
            (dk.ptr().cast(), dv.ptr().cast(), row as i64, row as i64);
        host.round(&mut p, &device);
        run.call(&op!(kvw_kv_pack), &p)?;
        let (packed, before) = (packed_slabs(len, host.window), packed_slabs(len - 1, host.window));
        let looked_at = len % 67 == 1 || packed > before || len == n;
        let ring = if looked_at { device.ring.download() } else { Vec::new() };
        let slabs = host.ring_slabs(false);
        for r in 0..host.rows() {
            let (s, h) = (r / host.heads, r % host.heads);
            let token = |x: &[f16]| widen(&x[s * row + h * host.d..][..host.d]);
            append(&mut exact[r], &from, len - 1, &token(&k), &token(&v));
            if !looked_at {
                continue;
            }
            for i in packed..len.div_ceil(TOKENS) {
                let got = &ring[(r * slabs + i % slabs) * from.slab_bytes()..];
                for t in 0..TOKENS.min(len - i * TOKENS) {
                    same_token(&from, got, &exact[r][i * from.slab_bytes()..], t)?;
                }
            }
            host.packed_ok(&device, r, 0..packed, &exact[r])?;
        }
    }
    Ok(())
}

pub fn same_token(layout: &Layout, got: &[u8], want: &[u8], t: usize) -> Result<(), String> {
    for c in 0..layout.head_dim {
        let (k, v) = (layout.k_at(t, c).0, layout.v_codes() + layout.v_at(t, c).0);
        if got[k..k + 2] != want[k..k + 2] || got[v..v + 2] != want[v..v + 2] {
            return Err(format!("D {}: token {t} channel {c} differs", layout.head_dim));
        }
    }
    Ok(())
}

#[test]
fn appended_tokens_and_leaving_slabs_are_exact() {
    for exec in everyone(2) {
        let run = exec.start();
        for (d, group, window) in [(64, 32, 65), (96, 64, 0), (128, 128, 1), (256, 32, 20)] {
            let host = Host { d, group, window, heads: 2, seqs: 1, slabs: 4, ..MIXED };
            let n = if exec == Exec::SimtPlain { 260 } else { 195 };
            stream(&run, &host, n).unwrap();
        }
    }
}

/// APPEND and FILL of rotated keys: within f16's rounding of the oracle.
pub fn rotated(run: &Run, d: usize, pairing: Pairing, op: i32, dtype: i32) -> Result<(), String> {
    let mut noise = Noise(13);
    let host = Host { d, group: 32, window: 64, heads: 2, seqs: 1, slabs: 2, ..MIXED };
    let n = if op == ffi::KVW_PACK_FILL { 21 } else { 1 };
    let (mut k, mut v) = (noise.values(n * 2 * d), noise.values(n * 2 * d));
    (v[3], v[4]) = (65504.0, -65504.0);
    let bits = |x: &mut [f32]| -> Vec<u16> {
        if dtype == ffi::KVW_BF16 {
            (x[3], x[4]) = (x[3] * 9.0, x[4] * 9.0); // past f16 in V
        }
        let round = |x: &mut f32| {
            let (half, brain) = (f16::from_f32(*x), bf16::from_f32(*x));
            let is_half = dtype == ffi::KVW_F16;
            *x = if is_half { half.to_f32() } else { brain.to_f32() };
            if is_half { half.to_bits() } else { brain.to_bits() }
        };
        x.iter_mut().map(round).collect()
    };
    let (k_bits, v_bits) = (bits(&mut k), bits(&mut v));
    let positions: Vec<i32> = (0..n).map(|t| (t * t * 300) as i32 + 3).collect();
    let freq = inv_freq(10000.0, d, Scaling::None);
    let mut want = f64s(&k);
    oracle(&mut want, 2, d, &positions, &freq, pairing).unwrap();

    let device = host.device(run, true);
    let (lens, cu) = (run.upload("lens", &[40]), run.upload("cu_tokens", &[0, n as i32]));
    let (dk, dv) = (run.upload("k", &k_bits), run.upload("v", &v_bits));
    let (dp, df) = (run.upload("positions", &positions), run.upload("inv_freq", &freq));
    let mut p = params(op, host.cache(&device, &lens, true));
    (p.k, p.v, p.cu_tokens) = (dk.ptr().cast(), dv.ptr().cast(), cu.ptr());
    (p.positions, p.inv_freq, p.pairing) = (dp.ptr(), df.ptr(), pairing as i32);
    (p.tokens, p.max_tokens, p.dtype) = (n as i32, n as i32, dtype);
    run.call(&op!(kvw_kv_pack), &p)?;
    let (from, ring) = (host.layout(Format::F16), device.ring.download());
    for (t, h) in (0..n).flat_map(|t| [(t, 0), (t, 1)]) {
        let slab = &ring[h * 2 * from.slab_bytes()..];
        let got: Vec<f32> = (0..d).map(|c| k_value(&from, slab, 40 - n + t, c)).collect();
        close("rotated key", &got, &want[(t * 2 + h) * d..][..d], 1e-5, 5e-4)?;
        let got: Vec<f32> = (0..d).map(|c| v_value(&from, slab, 40 - n + t, c)).collect();
        let exact = |x: &f32| f16::from_f32(x.clamp(-65504.0, 65504.0)).to_f64();
        let exact: Vec<f64> = v[(t * 2 + h) * d..][..d].iter().map(exact).collect();
        close("value", &got, &exact, 0.0, 0.0)?;
    }
    Ok(())
}

#[test]
fn keys_are_rotated_as_the_oracle_rotates_them() {
    for exec in everyone(2) {
        for d in [64, 96, 128, 256] {
            for pairing in [Pairing::Interleaved, Pairing::Half] {
                for op in [ffi::KVW_PACK_APPEND, ffi::KVW_PACK_FILL] {
                    rotated(&exec.start(), d, pairing, op, ffi::KVW_F16).unwrap();
                    rotated(&exec.start(), d, pairing, op, ffi::KVW_BF16).unwrap();
                }
            }
        }
    }
}
