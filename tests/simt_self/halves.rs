//! f16 and bf16 over all 65,536 patterns, against the `half` crate and against exact integers.
use super::*;

/// The f32 halfway between a pattern and the next one up in magnitude, or the pattern itself where there is none.
fn tie_above(bits: u16, value: fn(u16) -> f64) -> f32 {
    let next = value(bits.wrapping_add(1));
    let v = value(bits);
    let tie = if next.is_finite() && next.is_sign_positive() == v.is_sign_positive() {
        (v + next) / 2.0
    } else {
        v
    };
    tie as f32 // one more mantissa bit than the pattern: exact
}

#[test]
fn conversions_agree_with_half_on_every_pattern() {
    let patterns = 0..=u16::MAX;
    type Value = fn(u16) -> f64;
    let formats: [Value; 2] = [|b| f16::from_bits(b).to_f64(), |b| bf16::from_bits(b).to_f64()];
    for (format, value) in formats.into_iter().enumerate() {
        for nudge in [-1i32, 0, 1] {
            let ties: Vec<f32> =
                patterns.clone().map(|b| nudged(tie_above(b, value), nudge)).collect();
            let x: Vec<u32> = ties.iter().map(|t| t.to_bits()).collect();
            let y = launch(Simt::plain(), "halves", &x, &[0; 4 * 65536]).unwrap();
            for (i, tie) in ties.into_iter().enumerate() {
                let out = &y[i * 4..][..4];
                let h = f16::from_bits(i as u16);
                let b = bf16::from_bits(i as u16);
                let nan = tie.is_nan();
                assert!(same(f32::from_bits(out[0]), h.to_f32()), "f16 {i:#x}");
                assert!(same(f32::from_bits(out[1]), b.to_f32()), "bf16 {i:#x}");
                let f16_bits = if nan { 0x7fff } else { u32::from(f16::from_f32(tie).to_bits()) };
                let bf16_bits = if nan { 0x7fff } else { u32::from(bf16::from_f32(tie).to_bits()) };
                let what = format!("format {format}: {tie:e} above {i:#x}");
                assert_eq!(
                    (out[2] & 0xffff, out[2] >> 16, out[3]),
                    (f16_bits, f16_bits, bf16_bits),
                    "{what}"
                );
            }
        }
    }
}

fn nudged(f: f32, by: i32) -> f32 {
    if f.is_finite() && f != 0.0 { f32::from_bits(f.to_bits().wrapping_add_signed(by)) } else { f }
}

fn same(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
}

/// A finite f16 as an integer number of 2^-24, exact.
fn fixed(h: f16) -> i128 {
    (h.to_f64() * 16_777_216.0) as i128
}

/// The f16 nearest to v * 2^-48, ties to even, by search among all of them.
fn nearest(v: i128) -> f16 {
    let magnitude = v.unsigned_abs() as i128;
    let at = |bits: u16| fixed(f16::from_bits(bits)) << 24;
    let (mut low, mut high) = (0u16, 0x7c00u16); // at(low) <= magnitude < at(high), 0x7c00 standing for 65536
    let bound = |bits: u16| if bits == 0x7c00 { 65536i128 << 48 } else { at(bits) };
    while high - low > 1 {
        let mid = low + (high - low) / 2;
        if bound(mid) <= magnitude { low = mid } else { high = mid }
    }
    let (below, above) = (magnitude - bound(low), bound(high) - magnitude);
    let up = above < below || (above == below && low & 1 == 1);
    f16::from_bits(if up { high } else { low } | if v < 0 { 0x8000 } else { 0 })
}

#[test]
fn arithmetic_rounds_once() {
    // Exponents that keep a * b + c finite, and small enough for subnormal results.
    let bits: Vec<u32> = random_words(6, 64 * 64 * 3)
        .into_iter()
        .map(|w| w & 0x83ff | (((w >> 16) % 18) << 10))
        .collect();
    let y = launch(Simt::plain(), "half_arithmetic", &bits, &vec![0; 64 * 64 * 5]).unwrap();
    for (i, abc) in bits.chunks(3).enumerate() {
        let [a, b, c] = [0, 1, 2].map(|k| f16::from_bits(abc[k] as u16));
        let (fa, fb, fc) = (fixed(a), fixed(b), fixed(c));
        let exact = [nearest(fa * fb + (fc << 24)), nearest((fa + fc) << 24), nearest(fb * fc)];
        let larger = if fa > fc { a } else { c };
        let smaller = if fa < fc { a } else { c };
        let out: Vec<f16> = y[i * 5..][..5].iter().map(|&b| f16::from_bits(b as u16)).collect();
        for (got, want) in out.iter().zip(exact.into_iter().chain([larger, smaller])) {
            assert_eq!(got.to_f32(), want.to_f32(), "{a:e} {b:e} {c:e}");
        }
    }
}
