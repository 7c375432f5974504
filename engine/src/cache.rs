//! The cache: the only owner of slabs and page tables, and the only one who knows that a slot is not a position.
//!
//! A *slot* is where a token's K and V lie among those that a head holds; a *position* is what its K was rotated by.
//! Slots are counted for each (layer, kv head), positions once for the sequence, and a position never shrinks.
//!
//! Newest tokens live in a ring of f16 slabs, one ring a head; slabs that leave the window are packed into the pool of
//! the spec's format and found through the head's table. A prefill works on one layer at a time: [`Cache::stage`] lays
//! that layer's ring out long enough for the whole prompt, [`Cache::fill`] appends to it, and [`Cache::compress`] packs
//! what has left the window, so only one layer is ever held uncompressed.

mod bytes;
mod head;
mod kivi;
mod plan;
mod stats;

use kvwarp::kv_pack::{self, Rows};
use kvwarp::pages::{HeadView, Pools, ring_slabs};
use kvwarp::slab::{Format, TOKENS};
use kvwarp::threads::Team;

use crate::spec::CacheSpec;
use bytes::AlignedBytes;
use head::Head;
pub use plan::Plan;
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
    /// Most tokens that the sequence may hold.
    pub context: usize,
}

/// Why the cache refused.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// The sequence is longer than the context.
    #[error("{need} tokens do not fit in a context of {context}; raise it with -c/--ctx-size")]
    Full {
        /// Tokens that were to be held.
        need: usize,
        /// Tokens that may be held.
        context: usize,
    },
    /// Tokens to forget have left the ring.
    #[error("cannot forget the newest {n} tokens: only {spare} have not been packed yet")]
    Packed {
        /// Tokens to forget.
        n: usize,
        /// Tokens that could be forgotten.
        spare: usize,
    },
    /// The format or head size has no slab.
    #[error(transparent)]
    Kernel(#[from] kvwarp::Error),
}

/// Keys and values of one sequence.
#[derive(Clone)]
pub struct Cache {
    shape: Shape,
    spec: CacheSpec,
    plan: Plan,
    pools: Pools,
    /// By layer, then kv head.
    heads: Vec<Head>,
    /// `ring_slabs` f16 slabs a head, in the order of `heads`.
    rings: AlignedBytes,
    /// The rings of the layer that is being prefilled; empty between prefills.
    staging: AlignedBytes,
    /// Positions given out.
    position: usize,
    peak: usize,
}

impl Cache {
    /// An empty cache for sequences of at most `shape.context` tokens.
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
        let mut pools = Pools::with_meta(shape.head_dim, spec.group, spec.meta)?;
        let heads = shape.layers * shape.kv_heads;
        let mut slabs = [0; Format::ALL.len()];
        for h in 0..heads {
            let rules = plan.rules(spec, h, shape.head_dim);
            for (format, n) in rules.slabs(shape.context) {
                slabs[format as usize] += n;
            }
        }
        for (format, slabs) in Format::ALL.into_iter().zip(slabs) {
            pools.pool_mut(format).reserve(slabs);
        }
        let ring = ring_slabs(spec.window) * pools.layout(Format::F16).slab_bytes();
        let mut cache = Self {
            shape,
            spec: *spec,
            plan,
            pools,
            heads: vec![Head::default(); heads],
            rings: AlignedBytes::zeroed(heads * ring),
            staging: AlignedBytes::default(),
            position: 0,
            peak: 0,
        };
        cache.note_peak();
        Ok(cache)
    }

    /// How this cache keeps its tokens.
    pub fn spec(&self) -> &CacheSpec {
        &self.spec
    }

    /// Position of the next token.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Most tokens that it may hold.
    pub fn context(&self) -> usize {
        self.shape.context
    }

    /// Whether no more tokens fit.
    pub fn is_full(&self) -> bool {
        self.position == self.shape.context
    }

    /// Takes the next `n` positions; every layer must then be given their K and V.
    ///
    /// # Errors
    /// [`CacheError::Full`] past the context; nothing changes then.
    pub fn advance(&mut self, n: usize) -> Result<usize, CacheError> {
        let (first, context) = (self.position, self.shape.context);
        match first.checked_add(n) {
            Some(need) if need <= context => self.position = need,
            need => return Err(CacheError::Full { need: need.unwrap_or(usize::MAX), context }),
        }
        Ok(first)
    }

    /// Writes one token of every head of `layer`: `k` (rotated) and `v`, each `[kv_heads, head_dim]`.
    ///
    /// # Errors
    /// [`CacheError::Kernel`] when a pool is full.
    pub fn append(&mut self, layer: usize, k: &[f32], v: &[f32]) -> Result<(), CacheError> {
        let (d, ring_bytes) = (self.shape.head_dim, self.ring_bytes());
        let (spec, plan) = (self.spec, self.plan.clone());
        let f16 = *self.pools.layout(Format::F16);
        for h in self.range(layer) {
            let rules = plan.rules(&spec, h, d);
            let ring = self.rings.slice_mut(h * ring_bytes, ring_bytes);
            let head = &mut self.heads[h];
            let row = h % self.shape.kv_heads * d;
            head.before_append(&rules, ring, &mut self.pools)?;
            kv_pack::append(ring, &f16, head.len, &k[row..row + d], &v[row..row + d]);
            head.len += 1;
            head.after_append(&rules, ring, &mut self.pools)?;
        }
        Ok(())
    }

    /// Lays out the ring of `layer` so that `n` more tokens fit without packing any.
    pub fn stage(&mut self, layer: usize, n: usize) {
        let (slab, ring_bytes) = (self.slab_bytes(), self.ring_bytes());
        let first = self.range(layer).start;
        let held = |head: &Head| (head.len + n).div_ceil(TOKENS) - head.packed;
        let slabs = self.range(layer).map(|h| held(&self.heads[h])).max().unwrap_or(0);
        self.staging.resize(self.shape.kv_heads * slabs * slab);
        for h in self.range(layer) {
            let ring = self.rings.slice(h * ring_bytes, ring_bytes);
            let staged = self.staging.slice_mut((h - first) * slabs * slab, slabs * slab);
            self.heads[h].move_ring(ring, staged, slab);
        }
        self.note_peak();
    }

    /// Writes `n` tokens of every head of the staged `layer`: `k` (rotated) and `v`, each `[n, kv_heads, head_dim]`.
    pub fn fill(&mut self, layer: usize, k: &[f32], v: &[f32], n: usize) {
        let (d, stride) = (self.shape.head_dim, self.shape.kv_heads * self.shape.head_dim);
        let f16 = *self.pools.layout(Format::F16);
        let bytes = self.staged_bytes();
        for (i, h) in self.range(layer).enumerate() {
            let ring = self.staging.slice_mut(i * bytes, bytes);
            let head = &mut self.heads[h];
            let [k, v] = [k, v].map(|data| Rows { data: &data[i * d..], stride });
            kv_pack::fill(ring, &f16, head.len, k, v, n);
            head.len += n;
        }
    }

    /// Packs what has left the window of the staged `layer`, a slab a thread of `team`, and returns the rest to its ring.
    ///
    /// # Errors
    /// [`CacheError::Kernel`] when a pool is full.
    pub fn compress(&mut self, layer: usize, team: &Team) -> Result<(), CacheError> {
        let (spec, plan) = (self.spec, self.plan.clone());
        let (slab, ring_bytes, staged) =
            (self.slab_bytes(), self.ring_bytes(), self.staged_bytes());
        for (i, h) in self.range(layer).enumerate() {
            let rules = plan.rules(&spec, h, self.shape.head_dim);
            let from = self.staging.slice_mut(i * staged, staged);
            let head = &mut self.heads[h];
            head.after_fill(&rules, from, &mut self.pools, team)?;
            head.move_ring(from, self.rings.slice_mut(h * ring_bytes, ring_bytes), slab);
        }
        self.note_peak();
        Ok(())
    }

    /// Gives the memory of staging back; every staged layer must have been compressed.
    pub fn unstage(&mut self) {
        self.staging = AlignedBytes::default();
    }

    /// What attention over `layer` reads, a view a kv head: the ring of the layer.
    pub fn views(&self, layer: usize) -> Vec<HeadView<'_>> {
        let bytes = self.ring_bytes();
        let ring = |h: usize| self.rings.slice(h * bytes, bytes);
        self.range(layer).map(|h| self.heads[h].view(&self.pools, ring(h))).collect()
    }

    /// What attention over the staged `layer` reads, a view a kv head.
    pub fn staged_views(&self, layer: usize) -> Vec<HeadView<'_>> {
        let bytes = self.staged_bytes();
        let ring = |i: usize| self.staging.slice(i * bytes, bytes);
        let heads = self.heads[self.range(layer)].iter().enumerate();
        heads.map(|(i, head)| head.view(&self.pools, ring(i))).collect()
    }

    /// Forgets the newest `n` tokens as if they had never been given.
    ///
    /// # Errors
    /// [`CacheError::Packed`] when some of them have left the ring; nothing changes then.
    pub fn rollback(&mut self, n: usize) -> Result<(), CacheError> {
        let spare = self.heads.iter().map(|head| head.len - head.fixed()).min().unwrap_or(0);
        if n > spare {
            return Err(CacheError::Packed { n, spare });
        }
        self.heads.iter_mut().for_each(|head| head.len -= n);
        self.position -= n;
        Ok(())
    }

    /// Moves what head `h` of all layers has in f16 slabs, sinks left out, to `store`, and what it will have.
    ///
    /// # Errors
    /// [`CacheError::Kernel`] when a pool is full.
    pub fn repack(&mut self, h: usize, store: Format) -> Result<(), CacheError> {
        let spec_stores = || vec![self.spec.store; self.heads.len()];
        let mut stores =
            self.plan.stores.as_ref().map_or_else(spec_stores, |stores| stores.to_vec());
        stores[h] = store;
        self.plan.stores = Some(stores.into());
        let plan = self.plan.clone();
        let rules = plan.rules(&self.spec, h, self.shape.head_dim);
        Ok(self.heads[h].repack(&rules, &mut self.pools)?)
    }

    fn range(&self, layer: usize) -> std::ops::Range<usize> {
        layer * self.shape.kv_heads..(layer + 1) * self.shape.kv_heads
    }

    fn slab_bytes(&self) -> usize {
        self.pools.layout(Format::F16).slab_bytes()
    }

    fn ring_bytes(&self) -> usize {
        ring_slabs(self.spec.window) * self.slab_bytes()
    }

    fn staged_bytes(&self) -> usize {
        self.staging.len() / self.shape.kv_heads
    }
}
