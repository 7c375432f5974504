//! e4m3: four bits of exponent with bias 7, three of mantissa, no infinities.

/// The e4m3 nearest to `x`, ties to even, beyond +-448 that; 0 for NaN.
pub fn fp8(x: f32) -> u8 {
    if x.is_nan() {
        return 0;
    }
    let y = x.abs().min(448.0);
    let bits = y.to_bits();
    let code = if y < 0.015_625 {
        (y * 512.0).round_ties_even() as u32
    } else {
        ((bits + 0x7_FFFF + (bits >> 20 & 1)) >> 20) - (120 << 3)
    };
    code as u8 | ((x.to_bits() >> 31) as u8) << 7
}

/// What a byte stands for. None is NaN: 0x7F and 0xFF, which [`fp8`] never gives, are +-480.
pub fn fp8_value(byte: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
    let size = match exponent {
        0 => mantissa * f32::exp2(-9.0),
        _ => (8.0 + mantissa) * ((exponent - 10) as f32).exp2(),
    };
    if byte >> 7 == 0 { size } else { -size }
}
