//! The slab: 64 tokens of one kv head, K and V together, in one byte layout on every side.
//!
//! A slab is four sections, each a multiple of 64 bytes: K codes, K metadata, V codes, V metadata (the
//! metadata only where codes are quantised). Codes are stored in the order in which the lanes of a warp feed
//! `mma.m16n8k16` as its A operand (K: tokens are rows; V: channels are rows).
//!
//! With `r = lane / 4`, `t = lane % 4` and tiles of 16 tokens, a *pair* is two neighbouring elements of one
//! lane, `e` = 0 or 1, the low and the high half of a 32-bit word:
//! - K pair `(tile, j, side)`: token `16 tile + r + 8 side`, channels `8 j + 2 t + e`
//! - V pair `(tile, j, side)`: tokens `16 tile + 2 t + e + 8 side`, channel `8 j + r`
//!
//! Per lane and side the pairs are numbered `f = tile * D / 8 + j`. A 32-bit word holds `16 / bits` pairs of
//! one side, pair `f` in word `w = f / (16 / bits)` at bit `bits * (f % (16 / bits))` of each half. Words are
//! stored as 16-byte units a lane, unit `w / 2`, component `2 * (w % 2) + side`: unit-major, then lane.
//! At 16 bits this is exactly the A fragment (a0, a1, a2, a3) of one mma.
//!
//! K metadata: for each group of tokens the scales of all channels, then their minima, as f16 pairs
//! (channels `8 j + 2 t + e`) in 16-byte units `[j / 4][t]`, component `j % 4`.
//! V metadata: all scales, then all minima, as f16 pairs of tokens in the order `[tile][t][group][side]`.
//!
//! Quantiser (KIVI, arXiv:2402.02750): `min` over the group, `scale = f16((max - min) / (2^bits - 1))`,
//! `code = round_half_even((x - min) / scale)` clamped, `x' = code * scale + min`. A group whose scale is 0 has
//! code 0. K groups run over tokens of a channel, V groups over channels of a token.

mod codec;

pub use codec::{decode, encode, k_value, quantise, v_value};

use crate::error::{Error, Result};

/// Tokens a slab.
pub const TOKENS: usize = 64;
/// Version of the byte layout, `KVW_SLAB_VERSION`.
pub const VERSION: u32 = 1;

/// In how many bits a slab holds an element. The discriminant is the tag of a page table entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
pub enum Format {
    /// Half precision, no metadata.
    F16 = 0,
    /// 8-bit codes, f16 scale and minimum a group.
    Q8 = 1,
    /// 4-bit codes, f16 scale and minimum a group.
    Q4 = 2,
    /// 2-bit codes, f16 scale and minimum a group.
    Q2 = 3,
}

impl Format {
    /// Every format, by tag.
    pub const ALL: [Format; 4] = [Format::F16, Format::Q8, Format::Q4, Format::Q2];

    /// Bits a code.
    pub const fn bits(self) -> usize {
        match self {
            Format::F16 => 16,
            Format::Q8 => 8,
            Format::Q4 => 4,
            Format::Q2 => 2,
        }
    }

    /// The format of a page table tag.
    pub fn from_tag(tag: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|f| *f as u32 == tag)
    }
}

/// Where everything lies in a slab of one format, head dim and group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Element format.
    pub format: Format,
    /// Channels a head, D.
    pub head_dim: usize,
    /// Tokens a K group: the requested group, at most the slab.
    pub k_group: usize,
    /// Channels a V group: the requested group, at most D. The last group may be shorter.
    pub v_group: usize,
}

impl Layout {
    /// Layout for `head_dim` in {64, 96, 128, 256} and `group` in {32, 64, 128} (ignored by f16).
    pub fn new(format: Format, head_dim: usize, group: usize) -> Result<Self> {
        let unsupported = |field, got: usize, supported| {
            Err(Error::Unsupported { op: "slab", field, got: got.to_string(), supported })
        };
        if ![64, 96, 128, 256].contains(&head_dim) {
            return unsupported("head_dim", head_dim, "64, 96, 128, 256");
        }
        if ![32, 64, 128].contains(&group) {
            return unsupported("group", group, "32, 64, 128");
        }
        Ok(Self { format, head_dim, k_group: group.min(TOKENS), v_group: group.min(head_dim) })
    }

    /// V groups a token.
    pub const fn v_groups(&self) -> usize {
        self.head_dim.div_ceil(self.v_group)
    }

    /// Bytes of the codes of K, and of V.
    pub const fn code_bytes(&self) -> usize {
        TOKENS * self.head_dim * self.format.bits() / 8
    }

    /// Bytes of the scales and minima of K.
    pub const fn k_meta_bytes(&self) -> usize {
        match self.format {
            Format::F16 => 0,
            _ => TOKENS / self.k_group * self.head_dim * 4,
        }
    }

    /// Bytes of the scales and minima of V.
    pub const fn v_meta_bytes(&self) -> usize {
        match self.format {
            Format::F16 => 0,
            _ => TOKENS * self.v_groups() * 4,
        }
    }

    /// Byte offset of K's metadata; K's codes start at 0.
    pub const fn k_meta(&self) -> usize {
        self.code_bytes()
    }

    /// Byte offset of V's codes.
    pub const fn v_codes(&self) -> usize {
        self.k_meta() + self.k_meta_bytes()
    }

    /// Byte offset of V's scales; the minima follow after half of `v_meta_bytes`.
    pub const fn v_meta(&self) -> usize {
        self.v_codes() + self.code_bytes()
    }

    /// Bytes of the whole slab, rounded up to 128.
    pub const fn slab_bytes(&self) -> usize {
        (self.v_meta() + self.v_meta_bytes()).next_multiple_of(128)
    }

    /// Bits an element, metadata and padding included.
    pub fn effective_bits(&self) -> f64 {
        (self.slab_bytes() * 8) as f64 / (2 * TOKENS * self.head_dim) as f64
    }

    /// Byte offset within a code section and shift within its 16-bit half, of pair `(tile, j, side)` of `lane`,
    /// low or high half `e`.
    pub const fn pair(
        &self,
        tile: usize,
        j: usize,
        side: usize,
        lane: usize,
        e: usize,
    ) -> (usize, usize) {
        let slots = 16 / self.format.bits();
        let f = tile * (self.head_dim / 8) + j;
        let (w, slot) = (f / slots, f % slots);
        ((w / 2 * 32 + lane) * 16 + (2 * (w % 2) + side) * 4 + 2 * e, slot * self.format.bits())
    }

    /// [`Self::pair`] of K's element (token, channel).
    pub const fn k_at(&self, token: usize, channel: usize) -> (usize, usize) {
        let (tile, row) = (token / 16, token % 16);
        let lane = row % 8 * 4 + channel % 8 / 2;
        self.pair(tile, channel / 8, row / 8, lane, channel % 2)
    }

    /// [`Self::pair`] of V's element (token, channel), relative to [`Self::v_codes`].
    pub const fn v_at(&self, token: usize, channel: usize) -> (usize, usize) {
        let (tile, row) = (token / 16, token % 16);
        let lane = channel % 8 * 4 + row % 8 / 2;
        self.pair(tile, channel / 8, row / 8, lane, row % 2)
    }

    /// Byte offset in the slab of K's scale for the group of `token` and `channel`; the minimum lies
    /// `2 * head_dim` bytes later.
    pub const fn k_scale_at(&self, token: usize, channel: usize) -> usize {
        let (j, t) = (channel / 8, channel % 8 / 2);
        let unit = (j / 4 * 4 + t) * 16 + j % 4 * 4 + channel % 2 * 2;
        self.k_meta() + token / self.k_group * self.head_dim * 4 + unit
    }

    /// Byte offset in the slab of V's scale for `token` and the group of `channel`; the minimum lies
    /// `v_meta_bytes / 2` bytes later.
    pub const fn v_scale_at(&self, token: usize, channel: usize) -> usize {
        let (tile, row) = (token / 16, token % 16);
        let unit = (tile * 4 + row % 8 / 2) * self.v_groups() + channel / self.v_group;
        self.v_meta() + unit * 8 + row / 8 * 4 + row % 2 * 2
    }
}
