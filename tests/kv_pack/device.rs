//! A cache on an executor, and what its bytes must be.

use crate::cases::{Noise, somewhere};
use crate::exec::{Mem, Run};
use crate::kv_pack_cpu::weights;
use half::f16;
use kvwarp::ffi::{self, kvw_cache, kvw_kv_pack_params as Params};
use kvwarp::pages::{Entry, ring_slabs};
use kvwarp::slab::{Format, Layout, Meta, Rounding, TOKENS, encode_rounded};
use std::ops::Range;
use std::ptr::{null, null_mut};

pub fn cache(d: usize, group: usize, window: usize) -> kvw_cache {
    kvw_cache {
        pools: [null_mut(); Format::ALL.len()],
        ring: somewhere(),
        table: somewhere(),
        indptr: null(),
        lens: somewhere(),
        packed: null(),
        seqs: 1,
        kv_heads: 1,
        head_dim: d as i32,
        group: group as i32,
        window: window as i32,
        ring_slabs: ring_slabs(window).max(1) as i32,
        table_stride: 16,
        table_heads: 1,
        lens_heads: 1,
        meta: 0,
    }
}

pub fn params(op: i32, cache: kvw_cache) -> Params {
    Params {
        struct_size: size_of::<Params>() as u32,
        op,
        cache,
        k: somewhere(),
        v: somewhere(),
        positions: null(),
        inv_freq: null(),
        q: null(),
        q_out: null_mut(),
        cu_tokens: somewhere(),
        first: somewhere(),
        feedback: null(),
        k_stride: i64::from(cache.kv_heads * cache.head_dim),
        v_stride: i64::from(cache.kv_heads * cache.head_dim),
        q_stride: 0,
        tokens: cache.seqs,
        max_tokens: 1,
        q_heads: 0,
        hadamard: 0,
        pairing: ffi::KVW_ROPE_HALF,
        kivi_exact: 0,
        range: 0.0,
        dtype: ffi::KVW_F16,
    }
}

/// A cache on an executor: `seqs` sequences of `heads` heads, a table row a head, `slabs` slabs a row.
pub struct Host {
    pub d: usize,
    pub group: usize,
    pub window: usize,
    pub heads: usize,
    pub seqs: usize,
    pub slabs: usize,
    /// Of the table's slabs in turn.
    pub formats: &'static [Format],
    pub meta: Meta,
    /// Of 2-bit codes; 0 for all of it.
    pub range: f32,
    /// Whether K's errors are made up for, by [`Host::weights`].
    pub feedback: bool,
}

/// Every format that may be in one cache, f16 metadata.
pub const MIXED: Host = Host {
    d: 64,
    group: 32,
    window: 0,
    heads: 1,
    seqs: 1,
    slabs: 3,
    formats: &[Format::F16, Format::Q8, Format::Q4, Format::Q2],
    meta: Meta::F16,
    range: 0.0,
    feedback: false,
};

/// The same with two-level metadata.
pub const TWO_LEVEL: Host =
    Host { formats: &[Format::Q2, Format::F16, Format::Q4], meta: Meta::U8, ..MIXED };

pub const FP8: Host = Host { formats: &[Format::Fp8, Format::F16], ..MIXED };

pub struct Device {
    pub ring: Mem<u8>,
    pub pools: Vec<(Format, Mem<u8>)>,
    pub table: Mem<u32>,
    feedback: Mem<f16>,
}

impl Host {
    pub fn layout(&self, format: Format) -> Layout {
        let meta = if matches!(format, Format::Q4 | Format::Q2) { self.meta } else { Meta::F16 };
        Layout::with_meta(format, self.d, self.group, meta).unwrap()
    }

    pub fn rows(&self) -> usize {
        self.seqs * self.heads
    }

    /// `[H, D, D]`.
    fn weights(&self) -> Vec<f16> {
        let mut noise = Noise(self.d as u64);
        (0..self.heads).flat_map(|_| weights(self.d, &mut noise)).collect()
    }

    /// Range and feedback of `params`.
    pub fn round(&self, params: &mut Params, device: &Device) {
        params.range = self.range;
        params.feedback = if self.feedback { device.feedback.ptr().cast() } else { null() };
    }

    pub fn ring_slabs(&self, filled: bool) -> usize {
        if filled { self.slabs } else { ring_slabs(self.window).max(1) }
    }

    /// Slab i of row r has format r + i of the turn, hole at i = 2 of row 1; pool order is scrambled.
    pub fn entry(&self, row: usize, i: usize) -> Entry {
        let index = (row * self.slabs + i) as u32;
        match (row, i) {
            (1, 2) => Entry::HOLE,
            _ => Entry::new(self.formats[(row + i) % self.formats.len()], index ^ 1),
        }
    }

    pub fn device(&self, run: &Run, filled: bool) -> Device {
        let slab = |f| self.layout(f).slab_bytes();
        let bytes = self.rows() * self.ring_slabs(filled) * slab(Format::F16);
        let count = (self.rows() * self.slabs + 1) & !1;
        let pool = |&f: &Format| (f, run.upload("pool", &vec![0x5Au8; count * slab(f)]));
        let pools = self.formats.iter().map(pool).collect();
        let entries = (0..self.rows() * self.slabs)
            .map(|n| self.entry(n / self.slabs, n % self.slabs).0)
            .collect::<Vec<_>>();
        let ring = run.upload("ring", &vec![0xFFu8; bytes]);
        let feedback = run.upload("feedback", &self.weights());
        Device { ring, pools, table: run.upload("table", &entries), feedback }
    }

    pub fn cache(&self, device: &Device, lens: &Mem<i32>, filled: bool) -> kvw_cache {
        let mut c = cache(self.d, self.group, self.window);
        device.pools.iter().for_each(|(f, pool)| c.pools[*f as usize] = pool.ptr().cast());
        c.meta = self.meta as i32;
        c.ring = device.ring.ptr().cast();
        c.table = device.table.ptr();
        c.lens = lens.ptr();
        (c.seqs, c.kv_heads) = (self.seqs as i32, self.heads as i32);
        (c.table_heads, c.lens_heads) = (self.heads as i32, 1);
        c.table_stride = self.slabs as i32;
        c.ring_slabs = self.ring_slabs(filled) as i32;
        c
    }

    /// Keys and values `[64, D]` of an f16 slab.
    fn tokens(&self, slab: &[u8]) -> [Vec<f16>; 2] {
        let from = self.layout(Format::F16);
        let at = |v: bool, i: usize| {
            let (token, channel) = (i / self.d, i % self.d);
            let k = from.k_at(token, channel).0;
            if v { from.v_codes() + from.v_at(token, channel).0 } else { k }
        };
        let half = |at: usize| f16::from_le_bytes([slab[at], slab[at + 1]]);
        [false, true].map(|v| (0..TOKENS * self.d).map(|i| half(at(v, i))).collect())
    }

    /// Whether slabs `packed` of `row` hold the codec's bits of `want` (f16 slabs, from slab 0 on).
    pub fn packed_ok(
        &self,
        device: &Device,
        row: usize,
        packed: Range<usize>,
        want: &[u8],
    ) -> Result<(), String> {
        let f16_bytes = self.layout(Format::F16).slab_bytes();
        let square = self.d * self.d;
        let weights = &self.weights()[row % self.heads * square..][..square];
        let range = if self.range == 0.0 { 1.0 } else { self.range };
        let rounding = Rounding { range, feedback: self.feedback.then_some(weights) };
        for i in packed {
            let Some((format, index)) = self.entry(row, i).get() else { continue };
            let layout = self.layout(format);
            let mut slab = vec![0; layout.slab_bytes()];
            let [k, v] = self.tokens(&want[i * f16_bytes..][..f16_bytes]);
            encode_rounded(&layout, &rounding, &k, &v, &mut slab);
            let pool = &device.pools.iter().find(|(f, _)| *f == format).unwrap().1;
            let got = &pool.download()[index * slab.len()..][..slab.len()];
            if got != slab {
                let at = got.iter().zip(&slab).position(|(a, b)| a != b).unwrap_or(0);
                return Err(format!("{layout:?} row {row} slab {i}: byte {at} of {}", slab.len()));
            }
        }
        Ok(())
    }
}
