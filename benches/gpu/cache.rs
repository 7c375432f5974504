//! A cache in the arena: real slabs of random numbers, at random places, as many copies as keep L2 cold.

use super::card::Card;
use super::case::copies;
use anyhow::Result;
use half::f16;
use kvwarp::ffi::kvw_cache;
use kvwarp::pages::{Entry, ring_slabs};
use kvwarp::slab::{Format, Layout, Meta, TOKENS, encode};

/// Slabs packed on the CPU; a pool repeats them.
const DISTINCT: usize = 192;

/// How a cache stores its history.
#[derive(Clone, Copy)]
pub struct Store {
    pub name: &'static str,
    pub format: Format,
    pub group: usize,
    pub meta: Meta,
    /// Tokens that stay f16 in the ring.
    pub window: usize,
}

/// Heads and their size.
#[derive(Clone, Copy)]
pub struct Heads {
    pub q: usize,
    pub kv: usize,
    pub d: usize,
}

impl Heads {
    pub fn name(self) -> String {
        format!("{}x{}d{}", self.q, self.kv, self.d)
    }
}

/// splitmix64.
pub struct Noise(pub u64);

impl Noise {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// About normal, of size `size`.
    pub fn halves(&mut self, n: usize, size: f32) -> Vec<f16> {
        let mut unit = || (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0;
        (0..n).map(|_| f16::from_f32(size * (unit() + unit() + unit()))).collect()
    }

    pub fn shuffled(&mut self, n: usize) -> Vec<u32> {
        let mut all: Vec<u32> = (0..n as u32).collect();
        for i in (1..n).rev() {
            all.swap(i, (self.bits() % (i as u64 + 1)) as usize);
        }
        all
    }
}

/// `DISTINCT` slabs of random numbers.
fn packed(layout: &Layout) -> Vec<u8> {
    let mut noise = Noise(layout.slab_bytes() as u64);
    let mut slabs = vec![0; DISTINCT * layout.slab_bytes()];
    for slab in slabs.chunks_exact_mut(layout.slab_bytes()) {
        let mut values = || noise.halves(TOKENS * layout.head_dim, 1.0);
        encode(layout, &values(), &values(), slab);
    }
    slabs
}

/// Equal caches of other slabs, for `batch` sequences of `context` tokens.
pub struct Caches {
    pub each: Vec<kvw_cache>,
    /// Slabs that a head holds, in the table and the ring.
    pub slabs: usize,
}

impl Store {
    pub fn caches(self, card: &Card, heads: Heads, context: usize, batch: usize) -> Result<Caches> {
        self.caches_with_ring(card, heads, context, batch, ring_slabs(self.window).max(1))
    }

    /// The same with a ring of `ring` slabs a head.
    pub fn caches_with_ring(
        self,
        card: &Card,
        heads: Heads,
        context: usize,
        batch: usize,
        ring: usize,
    ) -> Result<Caches> {
        let layout = Layout::with_meta(self.format, heads.d, self.group, self.meta)?;
        let f16_layout = Layout::new(Format::F16, heads.d, self.group)?;
        let rows = batch * heads.kv;
        let packed_slabs = context.saturating_sub(self.window) / TOKENS;
        let ring_bytes = rows * ring * f16_layout.slab_bytes();
        let n = copies(card, rows * packed_slabs * layout.slab_bytes() + ring_bytes);

        let slabs = n * rows * packed_slabs;
        let pool = card.take(slabs * layout.slab_bytes())?;
        card.fill(pool, &packed(&layout), slabs * layout.slab_bytes())?;
        let places = Noise(context as u64).shuffled(slabs);
        let lens = card.upload(&vec![context as i32; batch])?;
        let mut pools = [std::ptr::null_mut(); kvwarp::ffi::KVW_SLAB_FORMATS as usize];
        pools[self.format as usize] = pool as _;
        let f16_slabs = packed(&f16_layout);
        let cache = |places: &[u32]| -> Result<kvw_cache> {
            let table: Vec<Entry> = places.iter().map(|&p| Entry::new(self.format, p)).collect();
            let at = card.take(ring_bytes)?;
            card.fill(at, &f16_slabs, ring_bytes)?;
            Ok(kvw_cache {
                pools,
                ring: at as _,
                table: card.upload(&table)? as _,
                lens: lens as _,
                seqs: batch as i32,
                kv_heads: heads.kv as i32,
                head_dim: heads.d as i32,
                group: self.group as i32,
                meta: self.meta as i32,
                window: self.window as i32,
                ring_slabs: ring as i32,
                table_stride: packed_slabs.max(1) as i32,
                table_heads: heads.kv as i32,
                lens_heads: 1,
                ..Default::default()
            })
        };
        let entries = rows * packed_slabs;
        let each =
            (0..n).map(|i| cache(&places[i * entries..][..entries])).collect::<Result<_>>()?;
        Ok(Caches { each, slabs: context.div_ceil(TOKENS) })
    }
}
