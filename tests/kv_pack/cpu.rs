//! The CPU paths: tokens in the ring, packed slabs bit for bit, KIVI's schedule.

use super::ops::hard_rows;
use crate::cases::Noise;
use crate::slab::layouts_of;
use half::f16;
use kvwarp::kv_pack::{Rows, advance, append, boundaries, fill, pack, step};
use kvwarp::pages::{packed_slabs, ring_slabs};
use kvwarp::slab::{Format, Layout, TOKENS, decode, encode, k_value, v_value};

const D: [usize; 4] = [64, 96, 128, 256];

fn f16_layout(d: usize) -> Layout {
    Layout::new(Format::F16, d, 32).unwrap()
}

#[test]
fn the_ring_is_a_ring_of_f16_slabs() {
    let mut noise = Noise(5);
    for d in D {
        let layout = f16_layout(d);
        let (k, v) = (noise.values(TOKENS * d), noise.values(TOKENS * d));
        let round = |x: &[f32]| x.iter().map(|&x| f16::from_f32(x)).collect::<Vec<_>>();
        let mut want = vec![0; layout.slab_bytes()];
        encode(&layout, &round(&k), &round(&v), &mut want);
        let mut ring = vec![0xFF; 3 * layout.slab_bytes()];
        let rows = |data| Rows { data, stride: d };
        fill(&mut ring, &layout, 5 * TOKENS, rows(&k), rows(&v), TOKENS);
        assert!(ring[2 * layout.slab_bytes()..] == want, "slab 5 lies in slot 5 % 3");
        assert!(ring[..2 * layout.slab_bytes()].iter().all(|&b| b == 0xFF));
    }
}

#[test]
fn values_beyond_f16_saturate_and_nan_stays() {
    let layout = f16_layout(64);
    let mut ring = vec![0; layout.slab_bytes()];
    let mut k = vec![1e9; 64];
    (k[1], k[2]) = (f32::NEG_INFINITY, f32::NAN);
    append(&mut ring, &layout, 3, &k, &k);
    for value in [k_value, v_value] {
        assert_eq!(value(&layout, &ring, 3, 0), 65504.0);
        assert_eq!(value(&layout, &ring, 3, 1), -65504.0);
        assert!(value(&layout, &ring, 3, 2).is_nan());
        assert_eq!(value(&layout, &ring, 2, 0), 0.0);
    }
}

#[test]
fn streamed_steps_pack_what_one_fill_packs() {
    let mut noise = Noise(6);
    for (d, format, group) in [
        (64, Format::Q2, 32),
        (96, Format::Q4, 64),
        (128, Format::Q2, 128),
        (256, Format::Q8, 64),
        (256, Format::F16, 32),
    ] {
        let (from, to) = (f16_layout(d), Layout::new(format, d, group).unwrap());
        let n = 330;
        let (k, v) = (noise.values(n * d), noise.values(n * d));
        let mut whole = vec![0; n.div_ceil(TOKENS) * from.slab_bytes()];
        let rows = |data| Rows { data, stride: d };
        fill(&mut whole, &from, 0, rows(&k), rows(&v), n);
        for window in [0, 1, 32, 65, 128] {
            let mut ring = vec![0; ring_slabs(window).max(1) * from.slab_bytes()];
            for len in 1..=n {
                let (packed, before) = (packed_slabs(len, window), packed_slabs(len - 1, window));
                let token = (len - 1) * d..len * d;
                let kv = (&k[token.clone()], &v[token]);
                let mut got = vec![0; to.slab_bytes()];
                let leaving = (packed > before).then_some((&to, &mut got[..]));
                step(&mut ring, &from, window, len, kv, leaving);
                if packed > before {
                    let mut want = vec![0xFF; to.slab_bytes()];
                    pack(&whole[before * from.slab_bytes()..], &mut want, &to);
                    assert!(got == want, "{to:?} window {window} slab {before}");
                }
            }
        }
    }
}

#[test]
fn kivi_boundaries() {
    assert_eq!(boundaries(31, 32), (0, 0));
    assert_eq!(boundaries(32, 32), (32, 0));
    assert_eq!(boundaries(33, 32), (32, 1));
    assert_eq!(boundaries(300, 128), (256, 172));
}

/// A head under KIVI's schedule: every slab's f16 copy, and its table slab.
struct Kivi {
    window: usize,
    from: Layout,
    to: Layout,
    ring: Vec<Vec<u8>>,
    table: Vec<Vec<u8>>,
}

impl Kivi {
    fn new(window: usize, to: Layout, n: usize) -> Self {
        let from = Layout { format: Format::F16, ..to };
        let slabs = |bytes, fill| vec![vec![fill; bytes]; n.div_ceil(TOKENS)];
        let (ring, table) = (slabs(from.slab_bytes(), 0), slabs(to.slab_bytes(), 0));
        Self { window, from, to, ring, table }
    }

    fn write(&mut self, slot: usize, k: &[f32], v: &[f32]) {
        append(&mut self.ring[slot / TOKENS], &self.from, slot % TOKENS, k, v);
    }

    fn advance(&mut self, done: (usize, usize), len: usize) {
        let goal = boundaries(len, self.window);
        for (i, (ring, table)) in self.ring.iter_mut().zip(&mut self.table).enumerate() {
            advance(i, done, goal, ring, table, &self.to);
        }
    }

    /// Whether the table holds exactly `f(x)` of the first `n.0` K and `n.1` V, and the ring what it stands for.
    fn assert_state(&self, n: (usize, usize), len: usize, k: &[f32], v: &[f32]) {
        let d = self.to.head_dim;
        for t in 0..len {
            let (ring, table) = (&self.ring[t / TOKENS], &self.table[t / TOKENS]);
            for c in 0..d {
                let exact = |x: &[f32]| f16::from_f32(x[t * d + c]).to_f32();
                let stored = |x: f32| f16::from_f32(x).to_f32();
                let want_k = k_value(&self.to, table, t % TOKENS, c);
                let want_v = v_value(&self.to, table, t % TOKENS, c);
                let want_k = if t < n.0 { stored(want_k) } else { exact(k) };
                let want_v = if t < n.1 { stored(want_v) } else { exact(v) };
                assert_eq!(k_value(&self.from, ring, t % TOKENS, c), want_k, "K {t} {c} of {len}");
                assert_eq!(v_value(&self.from, ring, t % TOKENS, c), want_v, "V {t} {c} of {len}");
            }
        }
    }
}

#[test]
fn kivi_streamed_equals_one_shot() {
    let n = 600;
    let mut noise = Noise(7);
    for (window, format, d) in [
        (32, Format::Q2, 64),
        (32, Format::Q4, 96),
        (64, Format::Q2, 96),
        (64, Format::Q4, 64),
        (128, Format::Q2, 64),
        (128, Format::Q4, 64),
        (96, Format::Q2, 96),
        (64, Format::Q8, 96),
    ] {
        let to = Layout::new(format, d, 32).unwrap();
        let (k, v) = (noise.values(n * d), noise.values(n * d));
        let mut streamed = Kivi::new(window, to, n);
        for len in 1..=n {
            let token = (len - 1) * d..len * d;
            streamed.write(len - 1, &k[token.clone()], &v[token]);
            streamed.advance(boundaries(len - 1, window), len);
            let (nk, nv) = (window * (len / window), len.saturating_sub(window));
            assert_eq!(boundaries(len, window), (nk, nv));
            if len % 61 == 0 || len % window < 2 || len == n {
                streamed.assert_state((nk, nv), len, &k, &v);
                let mut once = Kivi::new(window, to, n);
                for t in 0..len {
                    once.write(t, &k[t * d..(t + 1) * d], &v[t * d..(t + 1) * d]);
                }
                once.advance((0, 0), len);
                assert!(once.table == streamed.table && once.ring == streamed.ring, "{to:?} {len}");
            }
        }
        let complete = packed_slabs(n, window);
        for i in 0..complete {
            let mut want = vec![0; to.slab_bytes()];
            let exact = |x: &[f32]| -> Vec<f16> {
                x[i * TOKENS * d..][..TOKENS * d].iter().map(|&x| f16::from_f32(x)).collect()
            };
            encode(&to, &exact(&k), &exact(&v), &mut want);
            assert!(streamed.table[i] == want, "a complete slab is what encode gives");
        }
    }
}

#[test]
fn extremes_survive_the_round_trip() {
    let (d, n) = (64, TOKENS * 64);
    for format in [Format::Q2, Format::Q4, Format::Q8] {
        let to = Layout::new(format, d, 32).unwrap();
        let k: Vec<f32> = (0..n).map(|i| if i % 3 == 0 { 65504.0 } else { -65504.0 }).collect();
        let v = vec![-7.25; n];
        let mut kivi = Kivi::new(64, to, TOKENS + 64);
        for t in 0..TOKENS {
            kivi.write(t, &k[t * d..(t + 1) * d], &v[t * d..(t + 1) * d]);
        }
        advance(0, (0, 0), (64, 64), &mut kivi.ring[0], &mut kivi.table[0], &to);
        let (mut k2, mut v2) = (vec![0.0; n], vec![0.0; n]);
        decode(&kivi.from, &kivi.ring[0], &mut k2, &mut v2);
        assert!(k2.iter().zip(&k).all(|(a, b)| (a - b).abs() <= 32.0), "saturated, not infinite");
        assert_eq!(v2, v);
    }
}

#[test]
fn packed_slabs_are_the_codecs_also_where_they_are_hard() {
    let mut noise = Noise(17);
    for d in D {
        let (k, v) = (hard_rows(&mut noise, TOKENS, d), hard_rows(&mut noise, TOKENS, d));
        let mut from = vec![0; f16_layout(d).slab_bytes()];
        encode(&f16_layout(d), &k, &v, &mut from);
        for to in layouts_of(d) {
            let (mut got, mut want) = (vec![0xFF; to.slab_bytes()], vec![0; to.slab_bytes()]);
            pack(&from, &mut got, &to);
            encode(&to, &k, &v, &mut want);
            assert!(got == want, "{to:?}");
        }
    }
}
