//! kivi_exact on every executor: after each step the same bytes as the Rust schedule, streamed or at once.

use super::device::{Device, Host, MIXED, params};
use crate::cases::{Noise, widen};
use crate::exec::{Mem, Run, everyone, op};
use half::f16;
use kvwarp::ffi;
use kvwarp::kv_pack::{advance, append, boundaries};
use kvwarp::pages::Entry;
use kvwarp::slab::{Format, TOKENS};

/// The Rust side: one head, every slab's f16 copy and its table slab.
struct Head {
    ring: Vec<Vec<u8>>,
    table: Vec<Vec<u8>>,
}

impl Head {
    fn new(host: &Host, row: usize) -> Self {
        let f16_bytes = host.layout(Format::F16).slab_bytes();
        let bytes = |i| host.entry(row, i).get().map_or(0, |(f, _)| host.layout(f).slab_bytes());
        let table = (0..host.slabs).map(|i| vec![0x5A; bytes(i)]).collect();
        Self { ring: vec![vec![0xFF; f16_bytes]; host.slabs], table }
    }

    fn write(&mut self, host: &Host, slot: usize, k: &[f16], v: &[f16]) {
        let slab = &mut self.ring[slot / TOKENS];
        append(slab, &host.layout(Format::F16), slot % TOKENS, &widen(k), &widen(v));
    }

    fn advance(&mut self, host: &Host, row: usize, done: (usize, usize), goal: (usize, usize)) {
        for i in 0..host.slabs {
            if let Some((format, _)) = host.entry(row, i).get() {
                let (ring, table) = (&mut self.ring[i], &mut self.table[i]);
                advance(i, done, goal, ring, table, &host.layout(format));
            }
        }
    }

    /// Ring slabs from `packed` on, and every table slab.
    fn same(
        &self,
        host: &Host,
        row: usize,
        device: &Device,
        filled: bool,
        len: usize,
    ) -> Result<(), String> {
        let (ring, slots) = (device.ring.download(), host.ring_slabs(filled));
        let packed = len.saturating_sub(host.window) / TOKENS;
        for i in packed..len.div_ceil(TOKENS) {
            let bytes = self.ring[i].len();
            let got = &ring[(row * slots + i % slots) * bytes..][..bytes];
            // Slots past len may still hold an older slab's tokens.
            let layout = host.layout(Format::F16);
            for t in 0..TOKENS.min(len - i * TOKENS) {
                super::ops::same_token(&layout, got, &self.ring[i], t)
                    .map_err(|e| format!("len {len}, ring slab {i}: {e}"))?;
            }
        }
        for (i, want) in self.table.iter().enumerate() {
            let entry: Entry = host.entry(row, i);
            let Some((format, index)) = entry.get() else { continue };
            let pool = &device.pools.iter().find(|(f, _)| *f == format).unwrap().1;
            if pool.download()[index * want.len()..][..want.len()] != want[..] {
                return Err(format!("len {len}: table slab {i} of row {row}, {format:?}"));
            }
        }
        Ok(())
    }
}

struct Tokens {
    k: Vec<f16>,
    v: Vec<f16>,
}

fn upload(run: &Run, x: &[f16]) -> Mem<f16> {
    run.upload("rows", x)
}

/// `n` steps of two heads (rows of the table: all formats, a hole).
pub fn stream(run: &Run, d: usize, group: usize, window: usize, n: usize) -> Result<(), String> {
    let host = Host { d, group, window, heads: 2, seqs: 1, slabs: n.div_ceil(TOKENS), ..MIXED };
    let mut noise = Noise(14);
    let device = host.device(run, false);
    let mut heads = [Head::new(&host, 0), Head::new(&host, 1)];
    for len in 1..=n {
        let x = Tokens { k: noise.halves(2 * d), v: noise.halves(2 * d) };
        let (k, v, lens) =
            (upload(run, &x.k), upload(run, &x.v), run.upload("lens", &[len as i32]));
        let mut p = params(ffi::KVW_PACK_APPEND, host.cache(&device, &lens, false));
        (p.k, p.v, p.kivi_exact) = (k.ptr().cast(), v.ptr().cast(), 1);
        run.call(&op!(kvw_kv_pack), &p)?;
        let (done, goal) = (boundaries(len - 1, window), boundaries(len, window));
        for (row, head) in heads.iter_mut().enumerate() {
            head.write(&host, len - 1, &x.k[row * d..][..d], &x.v[row * d..][..d]);
            head.advance(&host, row, done, goal);
            if len % window < 2 || len % 23 == 0 || len == n {
                head.same(&host, row, &device, false, len)?;
            }
        }
    }
    Ok(())
}

/// FILL of `len` tokens, then FLUSH to KIVI's boundaries.
fn at_once(run: &Run, d: usize, group: usize, window: usize, len: usize) -> Result<(), String> {
    let host = Host { d, group, window, heads: 2, seqs: 1, slabs: len.div_ceil(TOKENS), ..MIXED };
    let mut noise = Noise(15);
    let device = host.device(run, true);
    let x = Tokens { k: noise.halves(len * 2 * d), v: noise.halves(len * 2 * d) };
    let (k, v, lens) = (upload(run, &x.k), upload(run, &x.v), run.upload("lens", &[len as i32]));
    let (cu, first) = (run.upload("cu_tokens", &[0, len as i32]), run.upload("first", &[0]));
    let mut p = params(ffi::KVW_PACK_FILL, host.cache(&device, &lens, true));
    (p.k, p.v, p.cu_tokens, p.first) = (k.ptr().cast(), v.ptr().cast(), cu.ptr(), first.ptr());
    (p.tokens, p.max_tokens) = (len as i32, len as i32);
    run.call(&op!(kvw_kv_pack), &p)?;
    (p.op, p.kivi_exact, p.max_tokens) = (ffi::KVW_PACK_FLUSH, 1, host.slabs as i32);
    run.call(&op!(kvw_kv_pack), &p)?;
    for row in 0..2 {
        let mut head = Head::new(&host, row);
        for t in 0..len {
            let at = (t * 2 + row) * d;
            head.write(&host, t, &x.k[at..at + d], &x.v[at..at + d]);
        }
        head.advance(&host, row, (0, 0), boundaries(len, window));
        head.same(&host, row, &device, true, len)?;
    }
    Ok(())
}

#[test]
fn steps_follow_the_schedule() {
    for exec in everyone(1) {
        let n = if exec == crate::exec::Exec::SimtPlain { 300 } else { 140 };
        for (d, group, window) in
            [(64, 32, 32), (96, 32, 64), (128, 64, 64), (96, 32, 96), (256, 128, 128)]
        {
            stream(&exec.start(), d, group, window, n)
                .unwrap_or_else(|e| panic!("D {d} R {window}: {e}"));
        }
    }
}

#[test]
fn a_prompt_is_brought_to_the_same_boundaries() {
    for exec in everyone(2) {
        for (d, group, window, len) in [
            (64, 32, 32, 200),
            (96, 32, 32, 161),
            (128, 64, 128, 256),
            (96, 64, 64, 300),
            (64, 32, 32, 129),
        ] {
            at_once(&exec.start(), d, group, window, len)
                .unwrap_or_else(|e| panic!("D {d} R {window} len {len}: {e}"));
        }
    }
}
