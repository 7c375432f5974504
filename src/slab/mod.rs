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
//! With [`Meta::U8`] scales and minima are bytes in the same order, two neighbouring pairs (`j` and `j + 1`, or the
//! sides of a token pair) in a word as the pairs of 8-bit codes are, and the slab ends in the f32 [`Steps`] of K
//! and of V that say what a byte stands for.
//!
//! Quantiser (KIVI, arXiv:2402.02750): `min` over the group, `scale = f16((max - min) / (2^bits - 1))`,
//! `code = round_half_even((x - min) / scale)` clamped, `x' = code * scale + min`. A group whose scale is 0 has
//! code 0. K groups run over tokens of a channel, V groups over channels of a token. [`Rounding`] chooses codes for
//! less error where it counts; what a slab's bytes mean does not depend on it.

mod codec;
mod feedback;
mod fp8;
mod steps;

pub(crate) use codec::{Coder, max_code};
pub use codec::{Rounding, decode, encode, encode_rounded, k_bounds, k_value, quantise, v_value};
pub use feedback::feedback;
pub use fp8::{fp8, fp8_value};
pub use steps::Steps;

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
    /// e4m3, beyond +-448 that, no metadata.
    Fp8 = 4,
}

/// How scales and minima of 4- and 2-bit codes are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(u32)]
pub enum Meta {
    /// As f16.
    #[default]
    F16 = 0,
    /// As bytes, in steps that each slab has for K and for V.
    U8 = 1,
}

impl Format {
    /// Every format, by tag.
    pub const ALL: [Format; 5] = [Format::F16, Format::Q8, Format::Q4, Format::Q2, Format::Fp8];

    /// Bits a code.
    pub const fn bits(self) -> usize {
        match self {
            Format::F16 => 16,
            Format::Q8 | Format::Fp8 => 8,
            Format::Q4 => 4,
            Format::Q2 => 2,
        }
    }

    /// Whether codes have scales and minima.
    pub const fn is_quantised(self) -> bool {
        matches!(self, Format::Q8 | Format::Q4 | Format::Q2)
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
    /// Of its scales and minima; F16 where there are none.
    pub meta: Meta,
    /// Channels a head, D.
    pub head_dim: usize,
    /// Tokens a K group: the requested group, at most the slab.
    pub k_group: usize,
    /// Channels a V group: the requested group, at most D. The last group may be shorter.
    pub v_group: usize,
}

impl Layout {
    /// Layout for `head_dim` in {64, 96, 128, 256} and `group` in {32, 64, 128} (ignored by f16 and fp8), with f16
    /// metadata.
    pub fn new(format: Format, head_dim: usize, group: usize) -> Result<Self> {
        Self::with_meta(format, head_dim, group, Meta::F16)
    }

    /// Layout with metadata of a kind; U8 for q4 and q2 and groups of 32 and 64.
    pub fn with_meta(format: Format, head_dim: usize, group: usize, meta: Meta) -> Result<Self> {
        let unsupported = |field, got: usize, supported| {
            Err(Error::Unsupported { op: "slab", field, got: got.to_string(), supported })
        };
        if ![64, 96, 128, 256].contains(&head_dim) {
            return unsupported("head_dim", head_dim, "64, 96, 128, 256");
        }
        if ![32, 64, 128].contains(&group) {
            return unsupported("group", group, "32, 64, 128");
        }
        if meta == Meta::U8 {
            if !matches!(format, Format::Q4 | Format::Q2) {
                let got = format!("U8 of {format:?}");
                return Err(Error::Unsupported {
                    op: "slab",
                    field: "meta",
                    got,
                    supported: "Q4, Q2",
                });
            }
            if group == 128 {
                return unsupported("group", group, "32, 64 with U8 metadata");
            }
        }
        Ok(Self {
            format,
            meta,
            head_dim,
            k_group: group.min(TOKENS),
            v_group: group.min(head_dim),
        })
    }

    /// V groups a token.
    pub const fn v_groups(&self) -> usize {
        self.head_dim.div_ceil(self.v_group)
    }

    /// Bytes of the codes of K, and of V.
    pub const fn code_bytes(&self) -> usize {
        TOKENS * self.head_dim * self.format.bits() / 8
    }

    /// Bytes of a scale, and of a minimum; 0 where there are none.
    pub const fn meta_width(&self) -> usize {
        match (self.format.is_quantised(), self.meta) {
            (false, _) => 0,
            (true, Meta::F16) => 2,
            (true, Meta::U8) => 1,
        }
    }

    /// Bytes of the scales and minima of K.
    pub const fn k_meta_bytes(&self) -> usize {
        TOKENS / self.k_group * self.head_dim * 2 * self.meta_width()
    }

    /// Bytes of the scales and minima of V.
    pub const fn v_meta_bytes(&self) -> usize {
        TOKENS * self.v_groups() * 2 * self.meta_width()
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

    /// Byte offset of the steps of U8 metadata, 16 bytes for K and 16 for V.
    pub const fn steps(&self) -> usize {
        self.v_meta() + self.v_meta_bytes()
    }

    /// Bytes of the whole slab, rounded up to 128; with U8 metadata a multiple of 32.
    pub const fn slab_bytes(&self) -> usize {
        match self.meta {
            Meta::F16 => self.steps().next_multiple_of(128),
            Meta::U8 => self.steps() + steps::BYTES,
        }
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

    /// Byte offset of element `e` of pair `pair` of scales or minima.
    const fn meta_at(&self, pair: usize, e: usize) -> usize {
        match self.meta {
            Meta::F16 => pair * 4 + e * 2,
            Meta::U8 => pair / 2 * 4 + e * 2 + pair % 2,
        }
    }

    /// Byte offset in the slab of K's scale for the group of `token` and `channel`; the minimum lies
    /// [`Self::k_minima`] later.
    pub const fn k_scale_at(&self, token: usize, channel: usize) -> usize {
        let (j, t) = (channel / 8, channel % 8 / 2);
        let group = token / self.k_group * 2 * self.k_minima();
        self.k_meta() + group + self.meta_at((j / 4 * 4 + t) * 4 + j % 4, channel % 2)
    }

    /// Bytes from a scale of K to its minimum.
    pub const fn k_minima(&self) -> usize {
        self.head_dim * self.meta_width()
    }

    /// Byte offset in the slab of V's scale for `token` and the group of `channel`; the minimum lies
    /// `v_meta_bytes / 2` bytes later.
    pub const fn v_scale_at(&self, token: usize, channel: usize) -> usize {
        let (tile, row) = (token / 16, token % 16);
        let unit = (tile * 4 + row % 8 / 2) * self.v_groups() + channel / self.v_group;
        self.v_meta() + self.meta_at(unit * 2 + row / 8, row % 2)
    }
}
