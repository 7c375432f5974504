//! Packing on the CPU: every level gives the bits of the codec.

use crate::cases::Noise;
use crate::slab::layouts_of;
use half::f16;
use kvwarp::kv_pack::pack_at;
use kvwarp::simd::Level;
use kvwarp::slab::{Format, Layout, Rounding, TOKENS, encode, encode_rounded};

/// Keys or values `[64, d]` of one kind.
fn tokens(kind: usize, d: usize, noise: &mut Noise) -> Vec<f16> {
    let mut value = || match kind {
        0 => noise.value(),
        1 => [0.0, 1.0, -1.0, 65504.0, -65504.0, 6e-8, 1e-5][noise.below(7)],
        2 => 3.25,
        3 => [f32::NAN, 2.0, -5.0][noise.below(3)],
        _ => 1e-6 * noise.unit(),
    };
    (0..TOKENS * d).map(|_| f16::from_f32(value())).collect()
}

/// Weights of about what a head's queries give: smaller the further apart.
pub fn weights(d: usize, noise: &mut Noise) -> Vec<f16> {
    let mut weight = |apart: usize| f16::from_f32(noise.unit() / (1.0 + apart as f32));
    (0..d * d).map(|i| weight((i / d).abs_diff(i % d))).collect()
}

#[test]
fn every_level_packs_what_the_codec_encodes() {
    let mut noise = Noise(31);
    for d in [64, 96, 128, 256] {
        let half = Layout::new(Format::F16, d, 32).unwrap();
        let weights = weights(d, &mut noise);
        let roundings =
            [(1.0, None), (0.85, None), (1.0, Some(&weights[..])), (0.9, Some(&weights))]
                .map(|(range, feedback)| Rounding { range, feedback });
        for kind in 0..5 {
            let (k, v) = (tokens(kind, d, &mut noise), tokens(kind, d, &mut noise));
            let mut from = vec![0; half.slab_bytes()];
            encode(&half, &k, &v, &mut from);
            for (layout, rounding) in
                layouts_of(d).into_iter().flat_map(|l| roundings.map(|rounding| (l, rounding)))
            {
                let mut want = vec![0; layout.slab_bytes()];
                encode_rounded(&layout, &rounding, &k, &v, &mut want);
                for level in Level::available() {
                    let mut got = vec![0xAB; layout.slab_bytes()];
                    pack_at(level, &from, &mut got, &layout, &rounding);
                    let first = got.iter().zip(&want).position(|(a, b)| a != b);
                    let (range, feedback) = (rounding.range, rounding.feedback.is_some());
                    let what = format!("{layout:?} {range} {feedback} kind {kind} {level:?}");
                    assert_eq!(first, None, "{what}: first byte that differs");
                }
            }
        }
    }
}
