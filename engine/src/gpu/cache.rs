//! The cache on the device: pools of slabs that all sequences share, a ring a head and row, one page table.
//!
//! The host knows every entry and every length; the device is told of entries by edits before the op that packs the slab,
//! and of lengths by each step. A table row is found by (layer, row, head), a ring likewise.

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
use lines::Sequence;

/// An entry and where it goes in the device's table.
pub type Edit = [u32; 2];

/// Keys and values of up to `rows` sequences.
pub struct Cache {
    platform: Rc<Metered>,
    shape: Shape,
    spec: CacheSpec,
    rows: usize,
    /// Format of a head's slabs after the sinks, `[layers * kv_heads]`.
    stores: Vec<Format>,
    slab_bytes: [usize; Format::ALL.len()],
    pools: [Option<Buffer>; Format::ALL.len()],
    slots: [Slots; Format::ALL.len()],
    /// `[layers, rows, kv_heads, ring_slabs]` f16 slabs
    rings: Buffer,
    /// `[layers, rows, kv_heads, stride]`
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
        let heads = shape.layers * shape.kv_heads;
        let mut slab_bytes = [0; Format::ALL.len()];
        for (format, bytes) in Format::ALL.into_iter().zip(&mut slab_bytes) {
            let meta =
                if [Format::Q4, Format::Q2].contains(&format) { spec.meta } else { Meta::F16 };
            *bytes = Layout::with_meta(format, shape.head_dim, spec.group, meta)?.slab_bytes();
        }
        let stride = shape.context.div_ceil(TOKENS);
        let rings = heads * rows * ring_slabs(spec.window) * slab_bytes[0];
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
            slab_bytes,
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

    /// Bytes of an f16 slab.
    pub fn f16_bytes(&self) -> usize {
        self.slab_bytes[Format::F16 as usize]
    }

    /// Slabs of a row's ring.
    pub fn ring_slabs(&self) -> usize {
        ring_slabs(self.spec.window)
    }

    /// Slabs at hand.
    pub fn free(&self) -> Slabs {
        std::array::from_fn(|f| self.slots[f].available())
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
        let (layer, head) = (h / self.shape.kv_heads, h % self.shape.kv_heads);
        let line = (layer * self.rows + row.0) * self.shape.kv_heads + head;
        (line * self.stride + slab) as u32
    }
}
