//! Page table entries, host pools of slabs, and what one kv head of one sequence looks like to a kernel.

mod pool;
mod slots;

use crate::slab::{Format, Layout, Meta};
pub use pool::Pool;
pub use slots::Slots;

/// Page table entry, as `csrc/slab.h` has it: format tag in the top four bits, index in that format's pool below.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(transparent)]
pub struct Entry(pub u32);

impl Entry {
    /// No slab here: its 64 tokens are skipped.
    pub const HOLE: Self = Self(u32::MAX);

    /// Entry of slab `index` (below 2^28) of `format`.
    pub const fn new(format: Format, index: u32) -> Self {
        Self((format as u32) << 28 | index)
    }

    /// Format and index; `None` for a hole or an unknown tag.
    pub fn get(self) -> Option<(Format, usize)> {
        Format::from_tag(self.0 >> 28).map(|f| (f, (self.0 & 0x0FFF_FFFF) as usize))
    }
}

/// The host pools of a cache, one a format, with their layouts.
#[derive(Clone)]
pub struct Pools {
    /// By tag.
    pools: [(Layout, Pool); Format::ALL.len()],
    /// What the CPU paths turn slabs into where they do not read them as they are, by tag.
    plain: [Layout; Format::ALL.len()],
}

impl Pools {
    /// Empty pools for heads of `head_dim` channels, quantised in groups of `group`, with f16 metadata.
    pub fn new(head_dim: usize, group: usize) -> crate::Result<Self> {
        Self::with_meta(head_dim, group, Meta::F16)
    }

    /// The same with metadata of a kind for q4 and q2.
    pub fn with_meta(head_dim: usize, group: usize, meta: Meta) -> crate::Result<Self> {
        let layout = |f| match f {
            Format::Q4 | Format::Q2 => Layout::with_meta(f, head_dim, group, meta),
            _ => Layout::new(f, head_dim, group),
        };
        let pool = |f| layout(f).map(|l| (l, Pool::new(&l)));
        let [a, b, c, d, e] = Format::ALL.map(pool);
        let pools = [a?, b?, c?, d?, e?];
        let mut plain = [pools[0].0; Format::ALL.len()];
        for (plain, (layout, _)) in plain.iter_mut().zip(&pools) {
            if layout.format.is_quantised() {
                *plain = Layout { meta: Meta::F16, ..*layout };
            }
        }
        Ok(Self { pools, plain })
    }

    /// The layout as which the CPU paths read slabs of `format`: f16 for fp8, f16 metadata for any other.
    pub(crate) fn plain_layout(&self, format: Format) -> &Layout {
        &self.plain[format as usize]
    }

    /// Layout of slabs of `format`.
    pub fn layout(&self, format: Format) -> &Layout {
        &self.pools[format as usize].0
    }

    /// Pool of slabs of `format`.
    pub fn pool(&self, format: Format) -> &Pool {
        &self.pools[format as usize].1
    }

    /// Pool of slabs of `format`, to take from and give to.
    pub fn pool_mut(&mut self, format: Format) -> &mut Pool {
        &mut self.pools[format as usize].1
    }
}

/// One slab as an op reads it.
#[derive(Clone, Copy)]
pub struct SlabRef<'a> {
    /// What the bytes mean.
    pub layout: &'a Layout,
    /// `layout.slab_bytes()` bytes.
    pub bytes: &'a [u8],
}

/// What one kv head of one sequence holds: `packed` slabs through the page table, the later ones in the f16 ring.
#[derive(Clone, Copy)]
pub struct HeadView<'a> {
    /// Where table entries point.
    pub pools: &'a Pools,
    /// At least `packed` entries.
    pub table: &'a [Entry],
    /// `ring_slabs` f16 slabs, 64-byte aligned; slab `i >= packed` lies in slot `i % ring_slabs`.
    pub ring: &'a [u8],
    /// Tokens held.
    pub len: usize,
    /// Slabs in the table.
    pub packed: usize,
}

impl<'a> HeadView<'a> {
    /// Channels a head, D.
    pub const fn head_dim(&self) -> usize {
        self.pools.pools[0].0.head_dim
    }

    /// Slabs that hold tokens.
    pub fn slabs(&self) -> usize {
        self.len.div_ceil(crate::slab::TOKENS)
    }

    /// Slab `i < self.slabs()`, `None` at a hole.
    pub fn slab(&self, i: usize) -> Option<SlabRef<'a>> {
        if i < self.packed {
            let (format, index) = self.table[i].get()?;
            let layout = self.pools.layout(format);
            return Some(SlabRef { layout, bytes: self.pools.pool(format).slab(index) });
        }
        let layout = self.pools.layout(Format::F16);
        let bytes = layout.slab_bytes();
        let slot = i % (self.ring.len() / bytes);
        Some(SlabRef { layout, bytes: &self.ring[slot * bytes..][..bytes] })
    }
}

/// Slabs of `len` tokens that have left a window of `window` tokens: `max(0, (len - window) / 64)`.
pub const fn packed_slabs(len: usize, window: usize) -> usize {
    len.saturating_sub(window) / crate::slab::TOKENS
}

/// Ring slabs that a window needs, `kvw_ring_slabs`.
pub const fn ring_slabs(window: usize) -> usize {
    (window + 126) / 64
}
