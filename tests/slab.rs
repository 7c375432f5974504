//! The slab codec: layout facts, hand-worked codes, round trips.

use half::f16;
use kvwarp::slab::{Format, Layout, TOKENS, decode, encode, quantise};

fn layouts() -> Vec<Layout> {
    let mut all = Vec::new();
    for format in Format::ALL {
        for d in [64, 96, 128, 256] {
            for group in [32, 64, 128] {
                all.push(Layout::new(format, d, group).unwrap());
            }
        }
    }
    all
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
                if l.format != Format::F16 && token % l.k_group == 0 {
                    claim(l.k_scale_at(token, c) * 8, 16);
                    claim((l.k_scale_at(token, c) + 2 * l.head_dim) * 8, 16);
                }
                if l.format != Format::F16 && c % l.v_group == 0 {
                    claim(l.v_scale_at(token, c) * 8, 16);
                    claim((l.v_scale_at(token, c) + l.v_meta_bytes() / 2) * 8, 16);
                }
            }
        }
        let used = seen.iter().filter(|b| **b).count();
        assert_eq!(used.div_ceil(1024) * 1024, l.slab_bytes() * 8, "{l:?}");
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
        let step =
            if l.format == Format::F16 { 0.0 } else { 4.01 / ((1 << l.format.bits()) - 1) as f32 };
        for i in 0..n {
            assert!((k2[i] - k[i].to_f32()).abs() <= step * 0.51, "{l:?} k[{i}]");
            assert!((v2[i] - v[i].to_f32()).abs() <= step * 0.51, "{l:?} v[{i}]");
        }
    }
}
