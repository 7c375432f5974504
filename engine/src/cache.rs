//! The cache: the only owner of slabs and page tables, and the only one who knows that a slot is not a position.
//!
//! It holds any number of sequences, each with its own tables, rings and positions, over one set of pools. A *slot* is
//! where a token's K and V lie among those that a head holds; a *position* is what its K was rotated by. Slots are counted
//! for each (layer, kv head), positions once for the sequence, and a position never shrinks.
//!
//! Newest tokens live in a ring of f16 slabs, one ring a head; slabs that leave the window are packed into the pool of
//! the spec's format and found through the head's table. A prefill works on one layer at a time: [`Cache::stage`] lays
//! that layer's ring out long enough for the whole prompt, [`Cache::fill`] appends to it, [`Cache::keep`] drops the tokens
//! that a policy does not choose, and [`Cache::compress`] packs what has left the window, so only one layer is ever held
//! uncompressed, unless a policy needs all of them before it can choose.

mod bytes;
mod error;
mod evict;
mod head;
mod kivi;
mod latent;
mod plan;
mod share;
mod stage;
mod stats;

use std::ops::Range;

use kvwarp::kv_pack;
use kvwarp::pages::{Entry, HeadView, Pools, ring_slabs};
use kvwarp::slab::{Format, TOKENS};

use crate::runner::{Row, plus};
use crate::spec::CacheSpec;
use bytes::AlignedBytes;
pub use error::CacheError;
use head::Head;
use latent::Latents;
pub use latent::{beside, newest, stride};
pub use plan::{Plan, need};
pub use share::formats;
pub use stats::{CacheStats, full_bytes};

/// The part of a model's shape that a cache depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Transformer blocks.
    pub layers: usize,
    /// Key and value heads a layer.
    pub kv_heads: usize,
    /// Channels a head.
    pub head_dim: usize,
    /// Most tokens that a sequence may hold.
    pub context: usize,
}

/// One sequence: what its heads hold, and the positions given out.
#[derive(Clone)]
struct Sequence {
    /// By layer, then kv head.
    heads: Vec<Head>,
    /// `ring_slabs` f16 slabs a head, in the order of `heads`; none where there are latents.
    rings: AlignedBytes,
    /// Slots of latents; none where there are keys and values.
    table: Vec<Entry>,
    /// Of these, those that have left the window.
    packed: usize,
    position: usize,
    /// Most bytes it took.
    peak: usize,
}

/// Keys and values of sequences, each named by its [`Row`]; a row that is not open is an error of the caller.
#[derive(Clone)]
pub struct Cache {
    shape: Shape,
    spec: CacheSpec,
    plan: Plan,
    pools: Pools,
    /// Of a converted model that keeps them and no keys and values.
    latents: Option<Latents>,
    /// By row.
    sequences: Vec<Option<Sequence>>,
    /// The rings of each layer that is being prefilled; empty between prefills.
    staging: Vec<AlignedBytes>,
    /// A buffer of staging that is not in use.
    spare: AlignedBytes,
    /// [`Cache::most_bytes`]
    most: [usize; 3],
}

impl Cache {
    /// An empty cache for sequences of at most `shape.context` tokens, with memory for one of them.
    ///
    /// # Errors
    /// [`CacheError::Kernel`] for a head size or group that no slab has.
    pub fn new(spec: &CacheSpec, shape: Shape) -> Result<Self, CacheError> {
        Self::planned(spec, shape, Plan::default())
    }

    /// The same with what a calibration found.
    ///
    /// # Errors
    /// As [`Cache::new`].
    pub fn planned(spec: &CacheSpec, shape: Shape, plan: Plan) -> Result<Self, CacheError> {
        let pools = Pools::with_meta(shape.head_dim, spec.group, spec.meta)?;
        let (sequences, spare) = (Vec::new(), AlignedBytes::default());
        let staging = vec![AlignedBytes::default(); shape.layers];
        let (spec, most) = (*spec, [0; 3]);
        let latents = plan.latents.as_deref().map(|shapes| Latents::new(&spec, shapes));
        if spec.latent != latents.is_some() {
            let (op, field, got) = ("cache", "latent", "no rows of a converted model".into());
            let supported = "those of its layers";
            return Err(kvwarp::Error::Unsupported { op, field, got, supported }.into());
        }
        let mut cache = Self { shape, spec, plan, pools, latents, sequences, staging, spare, most };
        cache.reserve(&plus(cache.need(0, shape.context), cache.begun(1, shape.context)));
        Ok(cache)
    }

    /// An empty sequence.
    pub fn open(&mut self) -> Row {
        let heads = self.shape.layers * self.shape.kv_heads;
        let rings = AlignedBytes::zeroed(heads * self.ring_bytes());
        let heads = vec![Head::default(); heads];
        let table = Vec::new();
        let sequence = Sequence { heads, rings, table, packed: 0, position: 0, peak: 0 };
        self.latents.iter_mut().for_each(|latents| latents.count(1, 0));
        let free = self.sequences.iter().position(Option::is_none);
        let row = free.unwrap_or_else(|| {
            self.sequences.push(None);
            self.sequences.len() - 1
        });
        self.sequences[row] = Some(sequence);
        self.note_peak(Row(row));
        Row(row)
    }

    /// Ends a sequence and gives its slabs back.
    pub fn close(&mut self, row: Row) {
        let Some(sequence) = self.sequences[row.0].take() else { return };
        for entry in sequence.heads.iter().flat_map(|head| &head.table) {
            give(&mut self.pools, *entry);
        }
        if let Some(latents) = &mut self.latents {
            sequence.table.iter().for_each(|&entry| latents.give(entry));
            latents.count(0, 1);
        }
    }

    /// How this cache keeps its tokens.
    pub fn spec(&self) -> &CacheSpec {
        &self.spec
    }

    /// For which heads and tokens it is.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Position of the next token of `row`.
    pub fn position(&self, row: Row) -> usize {
        self.sequence(row).position
    }

    /// Tokens that each head of `layer` of `row` holds.
    pub fn lens(&self, row: Row, layer: usize) -> impl Iterator<Item = usize> {
        self.sequence(row).heads[self.range(layer)].iter().map(|head| head.len)
    }

    /// Most tokens that a sequence may hold.
    pub fn context(&self) -> usize {
        self.shape.context
    }

    /// Takes the next `n` positions of `row`; every layer must then be given their K and V.
    ///
    /// # Errors
    /// [`CacheError::Full`] past the context; nothing changes then.
    pub fn advance(&mut self, row: Row, n: usize) -> Result<usize, CacheError> {
        let (first, context) = (self.position(row), self.shape.context);
        match first.checked_add(n) {
            Some(need) if need <= context => self.sequence_mut(row).position = need,
            need => return Err(CacheError::Full { need: need.unwrap_or(usize::MAX), context }),
        }
        Ok(first)
    }

    /// Writes one token of every head of `layer` of `row`: `k` (rotated) and `v`, each `[kv_heads, head_dim]`.
    ///
    /// # Errors
    /// [`CacheError::Kernel`] when a pool is full.
    pub fn append(
        &mut self,
        row: Row,
        layer: usize,
        k: &[f32],
        v: &[f32],
    ) -> Result<(), CacheError> {
        let (d, ring_bytes, range) = (self.shape.head_dim, self.ring_bytes(), self.range(layer));
        let f16 = *self.pools.layout(Format::F16);
        let Self { spec, plan, pools, sequences, .. } = self;
        let Sequence { heads, rings, .. } = open_mut(sequences, row);
        for (i, h) in range.enumerate() {
            let rules = plan.rules(spec, h, d);
            let ring = rings.slice_mut(h * ring_bytes, ring_bytes);
            let (head, at) = (&mut heads[h], i * d..(i + 1) * d);
            head.before_append(&rules, ring, pools)?;
            kv_pack::append(ring, &f16, head.len, &k[at.clone()], &v[at]);
            head.len += 1;
            head.after_append(&rules, ring, pools)?;
        }
        Ok(())
    }

    /// What attention over `layer` of `row` reads, a view a kv head: the ring of the layer.
    pub fn views(&self, row: Row, layer: usize) -> Vec<HeadView<'_>> {
        let (sequence, bytes) = (self.sequence(row), self.ring_bytes());
        let ring = |h: usize| sequence.rings.slice(h * bytes, bytes);
        self.range(layer).map(|h| sequence.heads[h].view(&self.pools, ring(h))).collect()
    }

    /// Forgets the newest `n` tokens of `row` as if they had never been given.
    ///
    /// # Errors
    /// [`CacheError::Packed`] when some of them have left the ring; nothing changes then.
    pub fn rollback(&mut self, row: Row, n: usize) -> Result<(), CacheError> {
        let sequence = self.sequence_mut(row);
        let packed = sequence.packed * TOKENS;
        let loose = |head: &Head| head.len - head.fixed().max(packed);
        let spare = sequence.heads.iter().map(loose).min().unwrap_or(0);
        if n > spare {
            return Err(CacheError::Packed { n, spare });
        }
        sequence.heads.iter_mut().for_each(|head| head.len -= n);
        sequence.position -= n;
        Ok(())
    }

    /// Moves what head `h` of all layers has in f16 slabs, sinks left out, to `store`, and what it will have.
    ///
    /// # Errors
    /// [`CacheError::Kernel`] when a pool is full.
    pub fn repack(&mut self, h: usize, store: Format) -> Result<(), CacheError> {
        let heads = self.shape.layers * self.shape.kv_heads;
        let spec_stores = || vec![self.spec.store; heads];
        let mut stores =
            self.plan.stores.as_ref().map_or_else(spec_stores, |stores| stores.to_vec());
        stores[h] = store;
        self.plan.stores = Some(stores.into());
        let rules = self.plan.rules(&self.spec, h, self.shape.head_dim);
        for sequence in self.sequences.iter_mut().flatten() {
            sequence.heads[h].repack(&rules, &mut self.pools)?;
        }
        Ok(())
    }

    fn sequence(&self, row: Row) -> &Sequence {
        self.sequences[row.0].as_ref().expect("the row is open")
    }

    fn sequence_mut(&mut self, row: Row) -> &mut Sequence {
        open_mut(&mut self.sequences, row)
    }

    fn range(&self, layer: usize) -> Range<usize> {
        layer * self.shape.kv_heads..(layer + 1) * self.shape.kv_heads
    }

    fn slab_bytes(&self) -> usize {
        self.pools.layout(Format::F16).slab_bytes()
    }

    fn ring_bytes(&self) -> usize {
        if self.latents.is_some() { 0 } else { ring_slabs(self.spec.window) * self.slab_bytes() }
    }

    /// Page tables of a sequence.
    fn tables(&self) -> usize {
        if self.latents.is_some() { 1 } else { self.shape.layers * self.shape.kv_heads }
    }
}

/// The sequence of an open row, the other fields of its cache left to be borrowed.
fn open_mut(sequences: &mut [Option<Sequence>], row: Row) -> &mut Sequence {
    sequences[row.0].as_mut().expect("the row is open")
}

/// Gives a slab back.
fn give(pools: &mut Pools, entry: Entry) {
    if let Some((format, slot)) = entry.get() {
        pools.pool_mut(format).give(slot as u32);
    }
}
