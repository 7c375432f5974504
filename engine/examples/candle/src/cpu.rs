//! A layer in host memory, by the CPU paths of kvwarp.

use std::sync::OnceLock;

use kvwarp::kv_pack::{self, Rows};
use kvwarp::paged_attn::{self, Mask};
use kvwarp::pages::{Entry, HeadView, Pools, packed_slabs, ring_slabs};
use kvwarp::prefill_attn;
use kvwarp::slab::{Format, TOKENS};
use kvwarp::threads::{Team, physical_cores};
use kvwarp::{Error, Result};

use crate::attention::{Shape, Store};

/// What one kv head holds: slabs that have left the window through the table, later ones in the ring.
#[derive(Default)]
struct Head {
    table: Vec<Entry>,
    ring: Vec<u8>,
}

pub struct Layer {
    store: Store,
    shape: Shape,
    pools: Pools,
    heads: Vec<Head>,
    len: usize,
    one: paged_attn::Scratch,
    many: prefill_attn::Scratch,
}

/// The threads of all layers.
fn team() -> &'static Team {
    static TEAM: OnceLock<Team> = OnceLock::new();
    TEAM.get_or_init(|| Team::new(physical_cores()))
}

impl Layer {
    pub fn new(store: Store, shape: Shape) -> Result<Self> {
        let pools = Pools::new(shape.head_dim, store.group)?;
        let ring = ring_slabs(store.window).max(1) * pools.layout(Format::F16).slab_bytes();
        let head = || Head { table: Vec::new(), ring: vec![0; ring] };
        let heads = (0..shape.kv_heads).map(|_| head()).collect();
        let (one, many) = Default::default();
        Ok(Self { store, shape, pools, heads, len: 0, one, many })
    }

    pub fn bytes(&self) -> usize {
        let rings: usize = self.heads.iter().map(|head| head.ring.len()).sum();
        rings + self.pools.pool(self.store.format).used_bytes()
    }

    /// Appends `n` tokens and attends: `q` `[n, q_heads, D]`, `k` and `v` `[n, kv_heads, D]`.
    pub fn attend(&mut self, n: usize, q: &[f32], k: &[f32], v: &[f32]) -> Result<Vec<f32>> {
        let mut out = vec![0.0; q.len()];
        if n == 1 {
            self.append(k, v)?;
            let views = views(&self.heads, &self.pools, self.len);
            paged_attn::cpu(team(), q, &views, 0.0, Mask::default(), &mut out, &mut self.one)?;
        } else if n > 1 {
            self.extend(n, q, k, v, &mut out)?;
        }
        Ok(out)
    }

    /// One token, and the slab that it pushes out of the window.
    fn append(&mut self, k: &[f32], v: &[f32]) -> Result<()> {
        let Self { store, shape, pools, heads, len, .. } = self;
        let (f16, d) = (*pools.layout(Format::F16), shape.head_dim);
        *len += 1;
        for (h, head) in heads.iter_mut().enumerate() {
            let token = (&k[h * d..][..d], &v[h * d..][..d]);
            let leaves = packed_slabs(*len, store.window) > head.table.len();
            let layout = *pools.layout(store.format);
            let leaving = match leaves {
                true => Some((&layout, open(pools, store.format, &mut head.table)?)),
                false => None,
            };
            kv_pack::step(&mut head.ring, &f16, store.window, *len, token, leaving);
        }
        Ok(())
    }

    /// Many tokens: their attention is exact, what leaves the window is packed after it. Until then all that is f16 lies
    /// in a longer ring.
    fn extend(&mut self, n: usize, q: &[f32], k: &[f32], v: &[f32], out: &mut [f32]) -> Result<()> {
        let Self { store, shape, pools, heads, len, many, .. } = self;
        let (f16, d, stride) =
            (*pools.layout(Format::F16), shape.head_dim, shape.kv_heads * shape.head_dim);
        let (bytes, first) = (f16.slab_bytes(), *len);
        *len += n;
        let mut rings = Vec::with_capacity(heads.len());
        for (h, head) in heads.iter_mut().enumerate() {
            let slabs = (len.div_ceil(TOKENS) - head.table.len()) * bytes;
            let mut staged = vec![0; slabs.max(head.ring.len())];
            move_ring(&head.ring, &mut staged, head.table.len()..first.div_ceil(TOKENS), bytes);
            let rows = |data| Rows { data, stride };
            kv_pack::fill(&mut staged, &f16, first, rows(&k[h * d..]), rows(&v[h * d..]), n);
            rings.push(std::mem::replace(&mut head.ring, staged));
        }
        let (views, mask) = (views(heads, pools, *len), Mask::default());
        prefill_attn::cpu(team(), q, n, &views, 0.0, mask, out, None, many)?;
        for (head, mut ring) in heads.iter_mut().zip(rings) {
            let layout = *pools.layout(store.format);
            for i in head.table.len()..packed_slabs(*len, store.window) {
                let from = i * bytes % head.ring.len();
                let to = open(pools, store.format, &mut head.table)?;
                kv_pack::pack(&head.ring[from..from + bytes], to, &layout);
            }
            move_ring(&head.ring, &mut ring, head.table.len()..len.div_ceil(TOKENS), bytes);
            head.ring = ring;
        }
        Ok(())
    }
}

fn views<'a>(heads: &'a [Head], pools: &'a Pools, len: usize) -> Vec<HeadView<'a>> {
    let view =
        |Head { table, ring }: &'a Head| HeadView { pools, table, ring, len, packed: table.len() };
    heads.iter().map(view).collect()
}

/// The next slab of a table.
fn open<'a>(pools: &'a mut Pools, format: Format, table: &mut Vec<Entry>) -> Result<&'a mut [u8]> {
    let full = Error::TooBig { op: "cache", size: 1 << 28 };
    let slot = pools.pool_mut(format).take().ok_or(full)?;
    table.push(Entry::new(format, slot));
    Ok(pools.pool_mut(format).slab_mut(slot as usize))
}

/// Copies slabs between rings of different lengths: slab `i` lies at `i` modulo their number.
fn move_ring(from: &[u8], to: &mut [u8], slabs: std::ops::Range<usize>, bytes: usize) {
    for i in slabs {
        let (at, then) = (i * bytes % from.len(), i * bytes % to.len());
        to[then..then + bytes].copy_from_slice(&from[at..at + bytes]);
    }
}
