//! The one order of scores and logits: larger first, ties to the lower index, NaN last.

/// Greater is better; NaN is below minus infinity, and the zeros are equal. `csrc/common/rank.cuh` has the same keys.
#[inline(always)]
pub(crate) fn key(x: f32) -> u32 {
    let bits = (x + 0.0).to_bits();
    match (x.is_nan(), x.is_sign_negative() && x != 0.0) {
        (true, _) => 0,
        (false, true) => !bits,
        (false, false) => bits | 1 << 31,
    }
}

/// What has this [`key`].
pub(crate) fn value(key: u32) -> f32 {
    match key {
        0 => f32::NAN,
        k if k >> 31 == 1 => f32::from_bits(k & !(1 << 31)),
        k => f32::from_bits(!k),
    }
}
