//! The CPU path of paged_attn against the f64 oracle.

use crate::cases::Noise;
use half::f16;
use kvwarp::paged_attn::{self, Mask, Scores};
use kvwarp::pages::{Entry, HeadView, Pools};
use kvwarp::simd::Level;
use kvwarp::slab::{Format, Meta, TOKENS, encode};
use kvwarp::threads::Team;

pub const D: [usize; 4] = [64, 96, 128, 256];
const GROUPS: [usize; 3] = [32, 64, 128];

/// What a head's keys and values look like.
#[derive(Clone, Copy, PartialEq)]
pub enum Data {
    /// About normal, one channel thirty times larger.
    Outlier,
    /// The same with keys and values at the ends of f16.
    Extreme,
}

/// One kv head: tables and ring own what a [`HeadView`] borrows.
struct Head {
    table: Vec<Entry>,
    ring: Vec<[u8; 64]>,
    len: usize,
}

/// A sequence of ragged heads. Tokens past the last one hold NaN in f16 slabs, in K and V.
pub struct Cache {
    pools: Pools,
    heads: Vec<Head>,
}

impl Cache {
    pub fn new(d: usize, group: usize) -> Self {
        Self { pools: Pools::new(d, group).unwrap(), heads: Vec::new() }
    }

    /// With two-level metadata.
    pub fn two_level(d: usize, group: usize) -> Self {
        Self { pools: Pools::with_meta(d, group, Meta::U8).unwrap(), heads: Vec::new() }
    }

    /// A head of `len` tokens, slab `i` in format `format(i)` (`None`: a hole), the last `ring` slabs in the ring.
    pub fn push(
        &mut self,
        len: usize,
        ring: usize,
        data: Data,
        noise: &mut Noise,
        format: impl Fn(usize) -> Option<Format>,
    ) {
        let slabs = len.div_ceil(TOKENS);
        let packed = slabs.saturating_sub(ring);
        let f16_layout = *self.pools.layout(Format::F16);
        let d = f16_layout.head_dim;
        let mut head = Head { table: Vec::new(), ring: Vec::new(), len };
        let slots = (slabs - packed).max(1);
        head.ring.resize(slots * f16_layout.slab_bytes() / 64, [0; 64]);
        for i in 0..slabs {
            let format = if i < packed { format(i) } else { Some(Format::F16) };
            let held = (len - i * TOKENS).min(TOKENS);
            let (k, v) = tokens(d, held, i, data, format == Some(Format::F16), noise);
            let Some(format) = format else {
                head.table.push(Entry::HOLE);
                continue;
            };
            if i < packed {
                let layout = *self.pools.layout(format);
                let index = self.pools.pool_mut(format).take().unwrap();
                let bytes = self.pools.pool_mut(format).slab_mut(index as usize);
                encode(&layout, &k, &v, bytes);
                head.table.push(Entry::new(format, index));
            } else {
                let bytes = f16_layout.slab_bytes();
                let ring: &mut [u8] = head.ring.as_flattened_mut();
                encode(&f16_layout, &k, &v, &mut ring[i % slots * bytes..][..bytes]);
            }
        }
        self.heads.push(head);
    }

    pub fn views(&self) -> Vec<HeadView<'_>> {
        let views = self.heads.iter().map(|head| HeadView {
            pools: &self.pools,
            table: &head.table,
            ring: head.ring.as_flattened(),
            len: head.len,
            packed: head.table.len(),
        });
        views.collect()
    }
}

/// `[64, D]` keys and values of slab `i`; tokens from `held` on are NaN where the slab is f16.
fn tokens(
    d: usize,
    held: usize,
    i: usize,
    data: Data,
    garbage: bool,
    noise: &mut Noise,
) -> (Vec<f16>, Vec<f16>) {
    let mut make = |outlier: usize| {
        let mut x: Vec<f32> = (0..TOKENS * d).map(|_| noise.unit() * 1.7).collect();
        (0..TOKENS).for_each(|t| x[t * d + outlier] *= 30.0);
        x
    };
    let (mut k, mut v) = (make(5), make(d - 7));
    if data == Data::Extreme && i == 0 {
        (k[3 * d + 9], k[5 * d + 40], v[7 * d + 11]) = (65504.0, -65504.0, 65504.0);
    }
    if garbage {
        k[held * d..].fill(f32::NAN);
        v[held * d..].fill(f32::NAN);
    }
    let round = |x: Vec<f32>| x.into_iter().map(f16::from_f32).collect();
    (round(k), round(v))
}

pub fn query(n: usize, noise: &mut Noise) -> Vec<f32> {
    (0..n).map(|_| noise.unit() * 1.7).collect()
}

/// Relative L2 distance over everything.
pub fn distance(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let (mut off, mut all) = (0.0, 0.0);
    for (&g, &w) in got.iter().zip(want) {
        off += (f64::from(g) - w).powi(2);
        all += w * w;
    }
    if off == 0.0 { 0.0 } else { (off / all).sqrt() }
}

/// Decode at every level and with one to three threads: near the oracle, and the same for every team.
#[track_caller]
fn check_decode(what: &str, cache: &Cache, group: usize, mask: Mask, noise: &mut Noise) {
    let heads = cache.views();
    let d = heads[0].head_dim();
    let q = query(heads.len() * group * d, noise);
    let (want, _) = paged_attn::oracle(&q, 1, &heads, &Scores { mask, ..Scores::default() });
    for level in Level::available() {
        let mut scratch = paged_attn::Scratch::at(level);
        let mut first = None;
        for workers in 1..=3 {
            let mut out = vec![f32::NAN; q.len()];
            let team = Team::new(workers);
            paged_attn::cpu(&team, &q, &heads, 0.0, mask, &mut out, &mut scratch).unwrap();
            let off = distance(&out, &want);
            assert!(off <= 1e-3, "{what} {level:?}: relative L2 {off:.2e}");
            let bits: Vec<u32> = out.iter().map(|x| x.to_bits()).collect();
            assert!(
                *first.get_or_insert_with(|| bits.clone()) == bits,
                "{what}: {workers} threads"
            );
        }
    }
}

#[test]
fn decode_of_each_shape_and_format() {
    let mut noise = Noise(11);
    for d in D {
        for quant in GROUPS {
            for format in Format::ALL {
                for group in [1, 3, 4] {
                    let mut cache = Cache::new(d, quant);
                    cache.push(1000, 1, Data::Outlier, &mut noise, |_| Some(format));
                    let what = format!("d {d} group {quant} {format:?} G {group}");
                    check_decode(&what, &cache, group, Mask::default(), &mut noise);
                }
            }
        }
    }
}

#[test]
fn decode_of_two_level_metadata() {
    let mut noise = Noise(17);
    let mixed = |i: usize| [Some(Format::Q2), Some(Format::Q4), None, Some(Format::F16)][i % 5 % 4];
    for d in D {
        for quant in [32, 64] {
            for data in [Data::Outlier, Data::Extreme] {
                let mut cache = Cache::two_level(d, quant);
                cache.push(1000, 1, data, &mut noise, mixed);
                cache.push(700, 0, data, &mut noise, |_| Some(Format::Q2));
                let what = format!("d {d} group {quant}");
                check_decode(&what, &cache, 3, Mask::default(), &mut noise);
            }
        }
    }
}

#[test]
fn decode_of_each_number_of_query_heads() {
    let mut noise = Noise(12);
    for format in Format::ALL {
        for group in [1, 2, 3, 4, 5, 7, 8, 12, 16] {
            let mut cache = Cache::new(64, 32);
            cache.push(700, 2, Data::Outlier, &mut noise, |_| Some(format));
            cache.push(333, 2, Data::Outlier, &mut noise, |_| Some(format));
            let what = format!("{format:?} G {group}");
            check_decode(&what, &cache, group, Mask::default(), &mut noise);
        }
    }
}

#[test]
fn decode_of_each_length() {
    let mut noise = Noise(13);
    for format in Format::ALL {
        for len in [0, 1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 511, 512, 513, 1000, 4097] {
            for ring in [0, 2] {
                let mut cache = Cache::new(64, 32);
                cache.push(len, ring, Data::Outlier, &mut noise, |_| Some(format));
                let what = format!("{format:?} {len} tokens, {ring} ring slabs");
                check_decode(&what, &cache, 3, Mask::default(), &mut noise);
            }
        }
    }
}

#[test]
fn decode_of_ragged_mixed_heads_with_holes_and_windows() {
    let mut noise = Noise(14);
    let mixed = |i: usize| match i % 8 {
        0 => Some(Format::F16),
        1 | 2 | 5 => Some(Format::Q2),
        3 => Some(Format::Q4),
        4 => None,
        6 => Some(Format::Fp8),
        _ => Some(Format::Q8),
    };
    for d in [64, 96, 128] {
        for data in [Data::Outlier, Data::Extreme] {
            let mut cache = Cache::new(d, 32);
            for len in [900, 0, 64, 2000, 1] {
                cache.push(len, 3, data, &mut noise, mixed);
            }
            cache.push(256, 0, data, &mut noise, |_| None);
            for window in [None, Some(1), Some(63), Some(64), Some(65), Some(700), Some(5000)] {
                let mask = Mask { sliding_window: window };
                check_decode(&format!("d {d} window {window:?}"), &cache, 3, mask, &mut noise);
            }
        }
    }
}

#[test]
fn decode_of_extreme_keys_and_values() {
    for d in D {
        for format in Format::ALL {
            let mut noise = Noise(15 + d as u64);
            let mut cache = Cache::new(d, 32);
            cache.push(300, 1, Data::Extreme, &mut noise, |_| Some(format));
            check_decode(&format!("d {d} {format:?}"), &cache, 3, Mask::default(), &mut noise);
        }
    }
}

#[test]
fn decode_refuses_what_does_not_fit() {
    let mut noise = Noise(16);
    let mut cache = Cache::new(64, 32);
    cache.push(200, 1, Data::Outlier, &mut noise, |_| Some(Format::Q2));
    let (team, mut scratch) = (Team::new(1), paged_attn::Scratch::default());
    let mut run = |heads: &[HeadView<'_>], q: usize, out: usize| {
        let (q, mut out) = (vec![0.0; q], vec![0.0; out]);
        paged_attn::cpu(&team, &q, heads, 0.0, Mask::default(), &mut out, &mut scratch)
            .map_err(|e| e.to_string())
    };
    let good = cache.views();
    assert_eq!(run(&good, 192, 192), Ok(()));
    let told = |result: Result<(), String>, what: &str| {
        let text = result.unwrap_err();
        assert!(text.contains(what), "{text}");
    };
    told(run(&[], 192, 192), "heads");
    told(run(&good, 191, 191), "`q`");
    told(run(&good, 17 * 64, 17 * 64), "`q`");
    told(run(&good, 192, 64), "`out` holds 64 elements, needs 192");
    told(run(&[HeadView { table: &[], ..good[0] }], 192, 192), "`table` holds 0");
    told(run(&[HeadView { ring: &[], ..good[0] }], 192, 192), "`ring` holds 0");
}
