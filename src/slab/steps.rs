//! Two-level metadata: scales and minima as bytes, in steps that a slab has for K and for V.
//!
//! Steps are powers of two. The grid of minima is the finest, from 2^-24 on, on which all of them, rounded down,
//! lie within 255 steps of one below 1024 in size; nothing on it lies below the smallest f16. A group's scale is the
//! smallest multiple of the step that reaches from the rounded minimum to the maximum, so that nothing is clipped
//! (but next to -65504, where the grid may end above the minimum), and the step the finest, from 2^-24 on, of
//! which no group needs more than 255. Scales and minima are f16 numbers, and so is all that [`super::quantise`]'s
//! rule does with them.

use super::Layout;

/// Bytes of the steps of K and V.
pub(super) const BYTES: usize = 32;

/// Extremes of a group as the steps are chosen for: zeros where all is NaN.
pub(super) fn finite((min, max): (f32, f32)) -> (f32, f32) {
    let finite = |x: f32| x.clamp(-65504.0, 65504.0);
    if min <= max { (finite(min), finite(max)) } else { (0.0, 0.0) }
}

/// What bytes of scales and minima stand for, of K or of V.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Steps {
    /// Scale 1 as a byte.
    pub scale: f32,
    /// How much a byte more adds to a minimum.
    pub minimum: f32,
    /// Minimum of byte 0.
    pub base: f32,
}

impl Steps {
    /// The steps for groups of these extremes and codes up to `max_code`. Minima may lie up to `headroom` of a group's
    /// range above its smallest.
    pub(super) fn over(groups: &[(f32, f32)], headroom: f32, max_code: u32) -> Self {
        let low = groups.iter().map(|g| g.0).fold(f32::INFINITY, f32::min);
        let raised = |&(min, max): &(f32, f32)| (max - min).mul_add(headroom, min);
        let high = groups.iter().map(raised).fold(f32::NEG_INFINITY, f32::max);
        let mut minimum = f32::exp2(-24.0);
        while {
            let (first, last) = (in_steps(low, minimum), in_steps(high, minimum));
            last - first > 255.0 || first.abs() > 1023.0
        } {
            minimum *= 2.0;
        }
        // Adding 0 turns -0 into 0.
        let base = in_steps(low, minimum) * minimum + 0.0;
        let mut steps = Self { scale: f32::exp2(-24.0), minimum, base };
        let span = groups.iter().map(|g| steps.span(*g)).fold(0.0, f64::max);
        while span > f64::from(255 * max_code) * f64::from(steps.scale) {
            steps.scale *= 2.0;
        }
        steps
    }

    /// Of K and of V, of a slab with U8 metadata.
    pub fn of(layout: &Layout, slab: &[u8]) -> [Self; 2] {
        [0, BYTES / 2].map(|at| Self::from_bytes(&slab[layout.steps() + at..][..BYTES / 2]))
    }

    /// From a group's rounded minimum to its maximum, exact.
    fn span(&self, (min, max): (f32, f32)) -> f64 {
        f64::from(max) - f64::from(self.minimum(self.minimum_byte(min)))
    }

    /// The minimum of a group, on the grid.
    fn minimum_byte(&self, min: f32) -> u8 {
        ((in_steps(min, self.minimum) * self.minimum - self.base) / self.minimum) as u8
    }

    /// Bytes of a group's scale and minimum; the ends of the grid and of bytes for a group that goes beyond.
    pub(super) fn bytes(&self, group: (f32, f32), max_code: u32) -> (u8, u8) {
        let scale =
            (self.span(group).max(0.0) / (f64::from(max_code) * f64::from(self.scale))).ceil();
        (scale as u8, self.minimum_byte(group.0))
    }

    /// The scale of a byte, an f16 number.
    pub fn scale(&self, byte: u8) -> f32 {
        f32::from(byte) * self.scale
    }

    /// The minimum of a byte, an f16 number.
    pub fn minimum(&self, byte: u8) -> f32 {
        f32::from(byte) * self.minimum + self.base
    }

    /// As a slab has them.
    pub(super) fn to_bytes(self) -> [u8; BYTES / 2] {
        bytemuck::cast([self.scale, self.minimum, self.base, 0.0].map(f32::to_le_bytes))
    }

    /// As a slab has them.
    fn from_bytes(bytes: &[u8]) -> Self {
        let at = |i: usize| f32::from_le_bytes([0, 1, 2, 3].map(|n| bytes[4 * i + n]));
        Self { scale: at(0), minimum: at(1), base: at(2) }
    }
}

/// `x` on the grid of `step`, rounded down, in steps.
fn in_steps(x: f32, step: f32) -> f32 {
    (x / step).floor().max((-65504.0 / step).ceil())
}
