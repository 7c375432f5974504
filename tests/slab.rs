//! The slab codec: layout facts, hand-worked codes, round trips.

use half::f16;
use kvwarp::slab::{Format, Layout, Meta, Steps, TOKENS, decode, encode, quantise};
use kvwarp::slab::{fp8, fp8_value, k_value, v_value};
use proptest::prelude::*;

/// Every layout of a head dim.
pub fn layouts_of(d: usize) -> Vec<Layout> {
    let groups = |format| [32, 64, 128].map(|group| Layout::new(format, d, group).unwrap());
    let bytes =
        |format| [32, 64].map(|group| Layout::with_meta(format, d, group, Meta::U8).unwrap());
    let two_level = [Format::Q4, Format::Q2].into_iter().flat_map(bytes);
    Format::ALL.into_iter().flat_map(groups).chain(two_level).collect()
}

fn layouts() -> Vec<Layout> {
    [64, 96, 128, 256].into_iter().flat_map(layouts_of).collect()
}

#[test]
fn sizes_are_those_of_the_format_table() {
    let bytes = |f, d, g| Layout::new(f, d, g).unwrap().slab_bytes();
    assert_eq!(bytes(Format::Q2, 128, 32), 6144);
    assert_eq!(bytes(Format::Q2, 128, 64), 5120);
    assert_eq!(bytes(Format::Q2, 64, 32), 3072);
    assert_eq!(bytes(Format::Q4, 128, 32), 10240);
    assert_eq!(bytes(Format::Q8, 128, 32), 18432);
    assert_eq!(bytes(Format::Q8, 256, 128), 32768 + 1024 + 512);
    assert_eq!(bytes(Format::F16, 128, 32), 32768);
    assert_eq!(Layout::new(Format::Q2, 128, 32).unwrap().effective_bits(), 3.0);
    assert_eq!(Layout::new(Format::Q2, 128, 64).unwrap().effective_bits(), 2.5);
    assert_eq!(bytes(Format::Fp8, 128, 32), 16384);
    let two_level = |f, d, g| Layout::with_meta(f, d, g, Meta::U8).unwrap().slab_bytes();
    assert_eq!(two_level(Format::Q2, 128, 32), 4096 + 2 * 2 * 128 + 2 * 4 * 64 + 32);
    assert_eq!(two_level(Format::Q2, 128, 64), 4096 + 2 * 128 + 2 * 2 * 64 + 32);
    assert_eq!(two_level(Format::Q4, 96, 64), 6144 + 2 * 96 + 2 * 2 * 64 + 32);
    for (format, group) in
        [(Format::Q8, 32), (Format::Fp8, 32), (Format::F16, 32), (Format::Q2, 128)]
    {
        assert!(Layout::with_meta(format, 128, group, Meta::U8).is_err(), "{format:?} {group}");
    }
}

#[test]
fn every_element_has_its_own_bits() {
    for l in layouts() {
        let mut seen = vec![false; l.slab_bytes() * 8];
        let mut claim = |bit: usize, bits: usize| {
            let fresh = seen[bit..bit + bits].iter_mut().all(|b| !std::mem::replace(b, true));
            assert!(fresh, "{l:?}: bit {bit} claimed twice");
        };
        let bits = l.format.bits();
        for token in 0..TOKENS {
            for c in 0..l.head_dim {
                let (k, v) = (l.k_at(token, c), l.v_at(token, c));
                claim(k.0 * 8 + k.1, bits);
                claim((l.v_codes() + v.0) * 8 + v.1, bits);
                let width = l.meta_width() * 8;
                if width > 0 && token % l.k_group == 0 {
                    claim(l.k_scale_at(token, c) * 8, width);
                    claim((l.k_scale_at(token, c) + l.k_minima()) * 8, width);
                }
                if width > 0 && c % l.v_group == 0 {
                    claim(l.v_scale_at(token, c) * 8, width);
                    claim((l.v_scale_at(token, c) + l.v_meta_bytes() / 2) * 8, width);
                }
            }
        }
        let used = seen.iter().filter(|b| **b).count();
        let rest = l.slab_bytes() * 8 - used;
        assert!(if l.meta == Meta::U8 { rest == 256 } else { rest < 1024 }, "{l:?}: {rest} bits");
    }
}

#[test]
fn quantiser_hand_worked() {
    let group: Vec<f16> = [0.0, 1.0, 2.0, 3.0, 0.5, 1.5, 2.5, 0.25].map(f16::from_f32).to_vec();
    let mut codes = [9u8; 8];
    let (scale, min) = quantise(&group, 3, &mut codes);
    assert_eq!((scale.to_f32(), min.to_f32()), (1.0, 0.0));
    assert_eq!(codes, [0, 1, 2, 3, 0, 2, 2, 0], "ties go to even");

    let constant = [f16::from_f32(-7.25); 8];
    assert_eq!(quantise(&constant, 3, &mut codes), (f16::ZERO, f16::from_f32(-7.25)));
    assert_eq!(codes, [0; 8]);

    let wide = [f16::MAX, f16::MIN, f16::ZERO, f16::MAX, f16::MIN, f16::ZERO, f16::ONE, f16::ONE];
    let (scale, min) = quantise(&wide, 3, &mut codes);
    assert_eq!((scale.to_f32(), min), (43680.0, f16::MIN));
    assert_eq!(codes[..3], [3, 0, 1], "65504 / 43680 = 1.4996");

    // 8 bits: 2 / 255 in f16 is 8224 * 2^-20; 1.25 / that is 159.38, 0.625 / that 79.69.
    let group = [-1.0, 1.0, 0.25, -0.375, -1.0, -1.0, -1.0, 0.0].map(f16::from_f32);
    let (scale, min) = quantise(&group, 255, &mut codes);
    assert_eq!((scale.to_f32(), min.to_f32()), (8224.0 / 1048576.0, -1.0));
    assert_eq!(codes, [0, 255, 159, 80, 0, 0, 0, 128]);
}

#[test]
fn f16_slabs_keep_every_bit_and_quantised_ones_stay_within_half_a_step() {
    for l in layouts() {
        let value = |i: usize, salt: usize| {
            let noise = ((i * 2654435761 + salt) >> 7) % 2003;
            f16::from_f32(noise as f32 / 500.0 - 2.0)
        };
        let n = TOKENS * l.head_dim;
        let k: Vec<f16> = (0..n).map(|i| value(i, 1)).collect();
        let v: Vec<f16> = (0..n).map(|i| value(i, 77)).collect();
        let mut slab = vec![0xAA; l.slab_bytes()];
        encode(&l, &k, &v, &mut slab);
        let (mut k2, mut v2) = (vec![f32::NAN; n], vec![f32::NAN; n]);
        decode(&l, &slab, &mut k2, &mut v2);
        // Two-level metadata widens a group to its grids, fp8 keeps three bits after the first.
        let steps = ((1 << l.format.bits().min(8)) - 1) as f32;
        let half = match (l.format, l.meta) {
            (Format::F16, _) => 0.0,
            (Format::Fp8, _) => 0.0626,
            (_, Meta::F16) => 2.045 / steps,
            (_, Meta::U8) => 2.045 * 1.02 / steps,
        };
        for i in 0..n {
            assert!((k2[i] - k[i].to_f32()).abs() <= half, "{l:?} k[{i}]");
            assert!((v2[i] - v[i].to_f32()).abs() <= half, "{l:?} v[{i}]");
        }
    }
}

#[test]
fn two_level_metadata_hand_worked() {
    let layout = Layout::with_meta(Format::Q2, 64, 32, Meta::U8).unwrap();
    // Channel 0 of K: -1.25, 0.75 in turn, channel 1: 0, 600, the others 0. V: a token's channels are its number.
    let (mut k, mut v) = (vec![f16::ZERO; 64 * 64], vec![f16::ZERO; 64 * 64]);
    for t in 0..64 {
        k[t * 64] = f16::from_f32(if t % 2 == 0 { -1.25 } else { 0.75 });
        k[t * 64 + 1] = f16::from_f32(if t % 2 == 0 { 0.0 } else { 600.0 });
        v[t * 64..][..64].fill(f16::from_f32(t as f32));
    }
    let mut slab = vec![0; layout.slab_bytes()];
    encode(&layout, &k, &v, &mut slab);
    let [of_k, of_v] = Steps::of(&layout, &slab);
    // K: minima -1.25 and 0 are 160 steps of 2^-7 apart (2^-8 would be 320). The span 600 is 200 a step of
    // three codes: 200 steps of 1 (of 0.5, 400). Channel 0 spans 2: 2 / 3 becomes 1.
    assert_eq!(of_k, Steps { scale: 1.0, minimum: 1.0 / 128.0, base: -1.25 });
    let at = layout.k_scale_at(0, 0);
    assert_eq!((slab[at], slab[at + 64]), (1, 0));
    assert_eq!((slab[at + 2], slab[at + 66]), (200, 160));
    for (t, want) in [(0, [-1.25, 0.0]), (1, [0.75, 600.0]), (63, [0.75, 600.0])] {
        assert_eq!([k_value(&layout, &slab, t, 0), k_value(&layout, &slab, t, 1)], want);
    }
    // V: minima 0 to 63 in steps of 0.25 (of 0.125, 504); constant groups, so the finest scale, 0 of it.
    assert_eq!(of_v, Steps { scale: f32::exp2(-24.0), minimum: 0.25, base: 0.0 });
    let at = layout.v_scale_at(63, 32);
    assert_eq!((slab[at], slab[at + layout.v_meta_bytes() / 2]), (0, 252));
    assert_eq!(v_value(&layout, &slab, 63, 40), 63.0);
    assert_eq!(slab[layout.steps() + 4..][..8], [0, 0, 0, 0x3C, 0, 0, 0xA0, 0xBF], "2^-7, -1.25");
}

#[test]
fn fp8_hand_worked() {
    for (x, byte) in [
        (0.0, 0),
        (1.0, 0x38),
        (-1.5, 0xBC),
        (448.0, 0x7E),
        (465.0, 0x7E),
        (f32::NEG_INFINITY, 0xFE),
        (f32::NAN, 0),
        (17.0, 0x58),                 // a tie of 16 and 18: to even
        (19.0, 0x5A),                 // of 18 and 20
        (f32::exp2(-6.0), 0x08),      // the smallest normal
        (f32::exp2(-9.0), 0x01),      // the smallest
        (f32::exp2(-10.0), 0),        // a tie of it and 0
        (3.0 * f32::exp2(-10.0), 2),  // of 1 and 2
        (15.0 * f32::exp2(-10.0), 8), // of the largest subnormal and the smallest normal
        (-f32::exp2(-10.0) * 1.01, 0x81),
    ] {
        assert_eq!(fp8(x), byte, "{x}");
    }
    for byte in (0..=255).filter(|b| b & 0x7F != 0x7F) {
        assert_eq!(fp8(fp8_value(byte)), byte);
    }
    assert_eq!(fp8_value(0xFF), -480.0);
}

/// f16 values of any size, few different ones, or one size with outliers.
fn values() -> impl Strategy<Value = Vec<f16>> {
    let any = any::<u16>().prop_map(f16::from_bits).prop_filter("finite", |x| x.is_finite());
    let near = (-1000i32..1000, 0i32..40).prop_map(|(x, outlier)| {
        f16::from_f32(x as f32 / 300.0 * if outlier == 0 { 30.0 } else { 1.0 })
    });
    let n = TOKENS * 64;
    prop_oneof![
        prop::collection::vec(any.clone(), n),
        prop::collection::vec(near, n),
        prop::collection::vec(prop::sample::select(vec![f16::ZERO, f16::MAX, f16::MIN]), n),
        any.prop_map(move |x| vec![x; n]),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    /// Within half a scale of the value, or, next to the ends of f16, within the grid of minima; scales and
    /// minima are f16 numbers.
    #[test]
    fn two_level_round_trips(k in values(), v in values()) {
        for (format, group) in [(Format::Q2, 32), (Format::Q2, 64), (Format::Q4, 32)] {
            let layout = Layout::with_meta(format, 64, group, Meta::U8).unwrap();
            let mut slab = vec![0; layout.slab_bytes()];
            encode(&layout, &k, &v, &mut slab);
            let (mut k2, mut v2) = (vec![0.0; k.len()], vec![0.0; k.len()]);
            decode(&layout, &slab, &mut k2, &mut v2);
            let [of_k, of_v] = Steps::of(&layout, &slab);
            for i in 0..k.len() {
                let (t, c) = (i / 64, i % 64);
                let (at_k, at_v) = (layout.k_scale_at(t, c), layout.v_scale_at(t, c));
                let half = layout.v_meta_bytes() / 2;
                for (steps, at, min, x, got) in [
                    (of_k, at_k, at_k + layout.k_minima(), k[i], k2[i]),
                    (of_v, at_v, at_v + half, v[i], v2[i]),
                ] {
                    let (scale, min) = (steps.scale(slab[at]), steps.minimum(slab[min]));
                    prop_assert_eq!(f16::from_f32(scale).to_f32(), scale);
                    prop_assert_eq!(f16::from_f32(min).to_f32(), min);
                    let (x, off) = (x.to_f32(), (got - x.to_f32()).abs());
                    let clipped = if x < min { min - x } else { 0.0 };
                    prop_assert!(clipped == 0.0 || min < -65504.0 + steps.minimum, "{} {}", x, min);
                    prop_assert!(off <= 0.5001 * scale + clipped, "{} {} {}", x, got, scale);
                }
            }
        }
    }
}
