//! EliteKV's cache (arXiv:2503.01586): of a token and layer one latent `z` of `c` elements for all heads, and `2 r`
//! rotated elements of the key of each kv head.
//!
//! A query head scores a token by `scale (q . z + q_elite . k)`, with the part of its query that does not turn absorbed
//! into `q = B_K q_rest`; its output is `B_V` times the sum of `p z`. Slabs are 64 tokens of all heads, in the byte order
//! of `csrc/common/latent.cuh`: of f16, or full ones of 4 or 2 bits with a scale and a minimum of each channel.

mod cpu;
mod oracle;
mod packed;
mod task;

pub use cpu::{Scratch, cpu};
pub use oracle::oracle;

use crate::error::{Error, Result};
use crate::pages::{Entry, Pool};
use crate::slab::{Format, TOKENS};
use half::f16;

const OP: &str = "lowrank_kv";
/// Tokens of a tile, and channels of one of its columns.
const TILE: usize = 16;
const COLUMN: usize = 8;
/// A column of a tile: 16 tokens of 8 f16.
const COLUMN_BYTES: usize = 2 * TILE * COLUMN;

/// What the cache holds of a token and layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    kv_heads: usize,
    pairs: usize,
    rank: usize,
}

impl Shape {
    /// `kv_heads` heads with `pairs` elite pairs each (r, 1 to 64; r H a multiple of 4), a latent of `rank` elements
    /// (c, a multiple of 16 to 2432).
    ///
    /// # Errors
    /// [`Error::Unsupported`] names what is out of range.
    pub fn new(kv_heads: usize, pairs: usize, rank: usize) -> Result<Self> {
        let refuse = |field, got: usize, supported| {
            Err(Error::Unsupported { op: OP, field, got: got.to_string(), supported })
        };
        if kv_heads == 0 || kv_heads > 1024 {
            return refuse("kv_heads", kv_heads, "1 to 1024");
        }
        if pairs == 0 || pairs > 64 || !(pairs * kv_heads).is_multiple_of(4) {
            return refuse("pairs", pairs, "1 to 64, times the kv heads a multiple of 4");
        }
        if !(16..=2432).contains(&rank) || !rank.is_multiple_of(16) {
            return refuse("rank", rank, "multiples of 16 to 2432");
        }
        Ok(Self { kv_heads, pairs, rank })
    }

    /// kv heads, H.
    pub const fn kv_heads(self) -> usize {
        self.kv_heads
    }

    /// Elite pairs a head, r.
    pub const fn pairs(self) -> usize {
        self.pairs
    }

    /// Elements of the latent, c.
    pub const fn rank(self) -> usize {
        self.rank
    }

    /// Elements of a row, `c + 2 r H`: all that the cache holds of a token and layer.
    pub const fn width(self) -> usize {
        self.rank + 2 * self.pairs * self.kv_heads
    }

    /// Bytes of a slab: 64 rows of f16.
    pub const fn slab_bytes(self) -> usize {
        2 * TOKENS * self.width()
    }

    /// Bytes of a tile, and where in a slab element `channel` of a token's row lies.
    const fn tile_bytes(self) -> usize {
        self.width() / COLUMN * COLUMN_BYTES
    }

    const fn at(self, token: usize, channel: usize) -> usize {
        let row = channel / COLUMN * COLUMN_BYTES + token % TILE * 2 * COLUMN;
        token / TILE * self.tile_bytes() + row + channel % COLUMN * 2
    }

    /// Write the row of token `token` of a slab: `z` `[c]`, `k` `[H, 2 r]`, rotated; beyond the range of f16 +-65504.
    ///
    /// # Errors
    /// [`Error::Len`] where the sizes do not fit.
    pub fn write(self, slab: &mut [u8], token: usize, z: &[f32], k: &[f32]) -> Result<()> {
        check_len("slab", self.slab_bytes(), slab.len())?;
        check_len("z", self.rank, z.len())?;
        check_len("k", self.width() - self.rank, k.len())?;
        for (i, x) in z.chunks_exact(COLUMN).chain(k.chunks_exact(COLUMN)).enumerate() {
            let to = &mut slab[self.at(token % TOKENS, i * COLUMN)..][..2 * COLUMN];
            for (to, x) in to.as_chunks_mut::<2>().0.iter_mut().zip(x) {
                *to = f16::from_f32(x.clamp(-65504.0, 65504.0)).to_le_bytes();
            }
        }
        Ok(())
    }

    /// Write zeros to the row of token `token` of a slab.
    ///
    /// # Panics
    /// If `slab` is shorter than a slab.
    pub fn clear(self, slab: &mut [u8], token: usize) {
        for channel in (0..self.width()).step_by(COLUMN) {
            slab[self.at(token % TOKENS, channel)..][..2 * COLUMN].fill(0);
        }
    }

    /// The row of token `token` of a slab, `[c + 2 r H]`.
    ///
    /// # Panics
    /// If `slab` is shorter than a slab.
    pub fn read(self, (format, slab): (Format, &[u8]), token: usize) -> Vec<f32> {
        if format != Format::F16 {
            return self.read_packed(format, slab, token);
        }
        let element = |channel| {
            let at = self.at(token, channel);
            f16::from_le_bytes([slab[at], slab[at + 1]]).to_f32()
        };
        (0..self.width()).map(element).collect()
    }
}

/// What one sequence holds in one layer.
#[derive(Clone, Copy)]
pub struct View<'a> {
    /// Of its rows.
    pub shape: Shape,
    /// Slabs of `shape.slab_bytes()`.
    pub pool: &'a Pool,
    /// Slabs of 4 or 2 bits, of `shape.bytes()` of the format.
    pub packed: Option<(Format, &'a Pool)>,
    /// An entry a slab, of [`Format::F16`] or that of `packed`; of another format: a hole.
    pub table: &'a [Entry],
    /// Tokens held.
    pub len: usize,
}

impl<'a> View<'a> {
    /// Slabs that hold tokens.
    pub fn slabs(&self) -> usize {
        self.len.div_ceil(TOKENS)
    }

    /// Slab `i < self.slabs()` and its format, `None` at a hole.
    pub fn slab(&self, i: usize) -> Option<(Format, &'a [u8])> {
        let (format, index) = self.table[i].get()?;
        let pool = match self.packed {
            _ if format == Format::F16 => self.pool,
            Some((own, pool)) if own == format => pool,
            _ => return None,
        };
        Some((format, pool.slab(index)))
    }
}

fn check_len(buffer: &'static str, need: usize, got: usize) -> Result<()> {
    if got == need { Ok(()) } else { Err(Error::Len { op: OP, buffer, need, got }) }
}

#[cfg(kvw_cuda)]
crate::launch::op! {
    /// Enqueue the CUDA kernel on `stream`.
    kvw_lowrank_kv, kvw_lowrank_kv_params, "lowrank_kv"
}
