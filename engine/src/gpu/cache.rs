//! The cache on the device: pools of slabs that all sequences share, a ring a head and row, one page table.
//!
//! The host knows every entry and every length; the device is told of entries by edits before the op that packs the slab,
//! and of lengths by each step. A table row is found by (layer, row, head), a ring likewise.

mod latent;
mod lines;
mod pool;
mod share;
mod view;

use std::rc::Rc;

use kvwarp::pages::{Entry, Slots, ring_slabs};
use kvwarp::slab::{Format, Layout, Meta, TOKENS};

use super::metered::Metered;
use super::platform::{Buffer, GpuError, Result};
use super::tally::Use;
use crate::cache::{Plan, Shape, need};
use crate::runner::{Row, Slabs};
use crate::spec::CacheSpec;
use latent::Latents;
use lines::Sequence;

/// An entry and where it goes in the device's table.
pub type Edit = [u32; 2];

/// Keys and values of up to `rows` sequences.
pub struct Cache {
    platform: Rc<Metered>,
    shape: Shape,
    spec: CacheSpec,
    rows: usize,
    /// Format of a head's slabs after the sinks, `[layers * kv_heads]`; of latents, which are one for all, `[1]`.
    stores: Vec<Format>,
    latents: Option<Latents>,
    slab_bytes: [usize; Format::ALL.len()],
    /// Bytes of 64 keys and values of a head while a prompt is read.
    staged_bytes: usize,
    pools: [Option<Buffer>; Format::ALL.len()],
    slots: [Slots; Format::ALL.len()],
    /// `[layers, rows, kv_heads, ring_slabs]` f16 slabs; of latents a byte a row, which nobody reads
    rings: Buffer,
    /// `[layers, rows, kv_heads, stride]`; of latents `[rows, stride]`
    table: Buffer,
    stride: usize,
    /// `[layers * kv_heads, D, D]` f16
    feedback: Option<Buffer>,
    sequences: Vec<Option<Sequence>>,
}

impl Cache {
    /// Without pools, which take what memory is left in the end ([`Cache::fund`]).
    pub fn new(
        platform: &Rc<Metered>,
        spec: &CacheSpec,
        shape: Shape,
        plan: &Plan,
        rows: usize,
    ) -> Result<Self> {
        if spec.kivi_exact {
            let what = "`kivi_exact` quantises slabs in part, for parity tests on the CPU";
            return Err(GpuError::Unsupported(what.into()));
        }
        let latents = plan.latents.as_ref().map(Latents::new);
        let heads = if latents.is_some() { 1 } else { shape.layers * shape.kv_heads };
        let mut slab_bytes = [0; Format::ALL.len()];
        for (format, bytes) in Format::ALL.into_iter().zip(&mut slab_bytes) {
            let meta =
                if [Format::Q4, Format::Q2].contains(&format) { spec.meta } else { Meta::F16 };
            *bytes = Layout::with_meta(format, shape.head_dim, spec.group, meta)?.slab_bytes();
        }
        let (stride, staged_bytes) =
            (shape.context.div_ceil(TOKENS), slab_bytes[Format::F16 as usize]);
        let rings = match &latents {
            None => heads * rows * ring_slabs(spec.window) * slab_bytes[0],
            Some(latents) => {
                for format in [spec.store, Format::F16] {
                    slab_bytes[format as usize] = latents.slot_bytes(format);
                }
                rows
            }
        };
        let stores = (0..heads).map(|h| plan.store(spec, h)).collect();
        let feedback = plan.feedback.as_ref().map(|rows| {
            Buffer::of(
                platform,
                (Use::Weights, "weights of rounding errors"),
                bytemuck::cast_slice(rows),
            )
        });
        Ok(Self {
            platform: Rc::clone(platform),
            shape,
            spec: *spec,
            rows,
            stores,
            latents,
            slab_bytes,
            staged_bytes,
            pools: Default::default(),
            slots: std::array::from_fn(|_| Slots::new(0)),
            // Kernels read slabs whole, also those that are partly written.
            rings: Buffer::zeroed(platform, (Use::Rings, "recent tokens"), rings)?,
            table: Buffer::new(
                platform,
                (Use::Rings, "page tables"),
                heads * rows * stride * size_of::<Entry>(),
            )?,
            stride,
            feedback: feedback.transpose()?,
            sequences: (0..rows).map(|_| None).collect(),
        })
    }

    /// How keys and values are kept.
    pub fn spec(&self) -> &CacheSpec {
        &self.spec
    }

    /// Of the model, and the most tokens of a sequence.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Most sequences.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Entries of the device's table, and its address.
    pub fn table(&self) -> (usize, u64) {
        (self.table.bytes() / size_of::<Entry>(), self.table.at())
    }

    /// Most edits that `slabs` new slabs of every head take.
    pub fn edits(&self, slabs: usize) -> usize {
        self.stores.len() * slabs
    }

    /// Bytes of an f16 slab, or of a slot of latents.
    pub fn f16_bytes(&self) -> usize {
        self.slab_bytes[Format::F16 as usize]
    }

    /// Bytes of 64 keys and values of a head while a prompt is read, and slabs that may hold tokens read before it: of latents
    /// all are expanded.
    pub fn staged(&self) -> (usize, usize) {
        (self.staged_bytes, if self.has_latents() { self.stride } else { self.ring_slabs() })
    }

    /// Slabs of a row's ring.
    pub fn ring_slabs(&self) -> usize {
        ring_slabs(self.spec.window)
    }

    /// Slabs at hand.
    pub fn free(&self) -> Slabs {
        std::array::from_fn(|f| self.slots[f].available() - self.unbegun(f))
    }

    /// Slabs in use.
    pub fn used(&self) -> Slabs {
        std::array::from_fn(|f| self.slots[f].used())
    }

    /// Slabs that a sequence of `len` tokens takes for `n` more.
    pub fn need(&self, len: usize, n: usize) -> Slabs {
        need(self.stores.iter().copied(), &self.spec, len, n)
    }

    /// Entry `slab` of head `h`, counted over all layers.
    fn table_index(&self, row: Row, h: usize, slab: usize) -> u32 {
        let (layer, head) = (h / self.heads(), h % self.heads());
        let line = (layer * self.rows + row.0) * self.heads() + head;
        (line * self.stride + slab) as u32
    }

    /// Heads of a layer that have a line of the table each: of latents one.
    pub fn heads(&self) -> usize {
        if self.has_latents() { 1 } else { self.shape.kv_heads }
    }

    /// Slabs of a sequence of the whole context.
    pub fn table_slabs(&self) -> usize {
        self.stride
    }

    /// Address of the lines of a row in a layer, of latents of all layers.
    fn table_at(&self, layer: usize, row: Row) -> u64 {
        let line =
            if self.has_latents() { row.0 } else { (layer * self.rows + row.0) * self.heads() };
        self.table.at() + (line * self.stride * size_of::<Entry>()) as u64
    }
}
