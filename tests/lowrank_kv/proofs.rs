//! What the format promises: attention over latents is attention over what they stand for; a row is its elements and
//! nothing else; and the same over random caches.

use super::case::{Cache, Case, SCALE, attend, case, compare};
use crate::cases::{Noise, f64s, relative_l2};
use crate::exec::{Exec, executors, op};
use half::f16;
use kvwarp::ffi::{self, kvw_head_linear_params as Linear};
use kvwarp::head_linear::{self, Weights};
use kvwarp::lowrank_kv::{Shape, oracle};
use kvwarp::rope_select::{Angles, Elite, inv_freq};
use kvwarp::simd::Level;
use kvwarp::slab::{Format, TOKENS};
use kvwarp::threads::Team;
use proptest::prelude::*;

#[test]
fn a_row_is_its_elements_and_nothing_else() {
    type Bytes = unsafe extern "C" fn(i32, i32, i32, i32) -> usize;
    let bytes: Bytes = crate::simt::Simt::plain().get(b"kvw_latent_slab_bytes");
    // SAFETY: numbers only.
    let of = |f: Format, c: usize, r: usize, h: usize| unsafe {
        bytes(f as i32, c as i32, r as i32, h as i32)
    };
    let of_c = |c, r, h| of(Format::F16, c, r, h);
    for (h, r, c) in [(32, 4, 1792), (32, 12, 2048), (8, 4, 448), (3, 8, 192), (1, 64, 128)] {
        let shape = Shape::new(h, r, c).unwrap();
        assert_eq!(shape.width(), 2 * r * h + c);
        assert_eq!(shape.slab_bytes(), TOKENS * (2 * r * h + c) * 2);
        assert_eq!(of_c(c, r, h), shape.slab_bytes());
        for (format, each) in [(Format::Q4, 36), (Format::Q2, 20)] {
            assert_eq!(shape.bytes(format), each * shape.width());
            assert_eq!(of(format, c, r, h), shape.bytes(format));
        }
        // Rows written one after another are read back, so no two elements share a byte: all bytes are theirs.
        let (mut slab, mut noise) = (vec![0; shape.slab_bytes()], Noise(h as u64));
        let rows: Vec<_> = (0..TOKENS)
            .map(|token| {
                let wide = |x: Vec<f16>| x.iter().map(|x| x.to_f32()).collect::<Vec<_>>();
                let (z, k) = (wide(noise.halves(c)), wide(noise.halves(2 * r * h)));
                shape.write(&mut slab, token, &z, &k).unwrap();
                [z, k].concat()
            })
            .collect();
        for (token, row) in rows.iter().enumerate() {
            assert_eq!(&shape.read((Format::F16, &slab), token), row, "token {token}");
        }
    }
    assert_eq!((of_c(120, 4, 8), of_c(128, 0, 8), of_c(128, 1, 3)), (0, 0, 0));
    // Llama-2-7B at 25 %: a quarter of 2 H D elements.
    assert_eq!(4 * Shape::new(32, 4, 1792).unwrap().width(), 2 * 32 * 128);
}

/// A model's layer: `B_K`, `B_V` of each head, and queries `[H * G, D]` with elite elements first.
struct Layer {
    cache: Cache,
    d: usize,
    /// `[H, c, D]`, zeros where the elite elements are
    b_k: Vec<f16>,
    /// `[H, D, c]`
    b_v: Vec<f16>,
    q: Vec<f32>,
}

impl Layer {
    fn new(d: usize) -> Self {
        let cache = Cache::new(&Case { lens: vec![150], holes: 0, ..case() });
        let (c, heads, elite) = (cache.case.rank, cache.case.kv_heads, 2 * cache.case.pairs);
        let mut noise = Noise(8);
        let unit = (c as f32).powf(-0.5);
        let mut weight = |elite: bool| f16::from_f32(if elite { 0.0 } else { noise.unit() * unit });
        let b_k = (0..heads * c * d).map(|i| weight(i % d < elite)).collect();
        let b_v = (0..heads * d * c).map(|_| weight(false)).collect();
        let mut noise = Noise(9);
        let round = |x: f32| f16::from_f32(x).to_f32();
        let q = (0..heads * cache.case.group * d).map(|_| round(noise.unit())).collect();
        Self { cache, d, b_k, b_v, q }
    }

    fn weights(&self) -> [Weights<'_>; 2] {
        let (h, c) = (self.cache.case.kv_heads, self.cache.case.rank);
        [
            Weights::new(&self.b_k, h, c, self.d).unwrap(),
            Weights::new(&self.b_v, h, self.d, c).unwrap(),
        ]
    }

    /// Keys and values written out, `[elite | B_K^T z]` and `B_V z`, then plain attention: `[H * G, D]`.
    fn expanded(&self) -> Vec<f64> {
        let (view, case, d) = (self.cache.view(0), &self.cache.case, self.d);
        let (c, elite) = (case.rank, 2 * case.pairs);
        let rows: Vec<_> = (0..view.len)
            .map(|t| view.shape.read(view.slab(t / TOKENS).unwrap(), t % TOKENS))
            .collect();
        let mut out = vec![0.0; self.q.len()];
        for (h, (q, out)) in self.q.chunks_exact(d).zip(out.chunks_exact_mut(d)).enumerate() {
            let kv = h / case.group;
            let (b_k, b_v) = (&self.b_k[kv * c * d..][..c * d], &self.b_v[kv * d * c..][..d * c]);
            let score = |row: &Vec<f32>| -> f64 {
                let key = |i: usize| match i < elite {
                    true => f64::from(row[c + kv * elite + i]),
                    false => (0..c).map(|j| b_k[j * d + i].to_f64() * f64::from(row[j])).sum(),
                };
                f64::from(SCALE) * (0..d).map(|i| f64::from(q[i]) * key(i)).sum::<f64>()
            };
            let weights: Vec<f64> = rows.iter().map(|row| score(row).exp()).collect();
            let sum: f64 = weights.iter().sum();
            for (w, row) in weights.iter().zip(&rows) {
                for (i, o) in out.iter_mut().enumerate() {
                    let v: f64 = (0..c).map(|j| b_v[i * c + j].to_f64() * f64::from(row[j])).sum();
                    *o += w / sum * v;
                }
            }
        }
        out
    }

    fn elite(&self) -> Vec<f32> {
        self.q.chunks_exact(self.d).flat_map(|q| &q[..2 * self.cache.case.pairs]).copied().collect()
    }
}

#[test]
fn absorbed_is_expanded() {
    let layer = Layer::new(48);
    let ([b_k, b_v], want) = (layer.weights(), layer.expanded());
    let (heads, c) = (layer.q.len() / layer.d, layer.cache.case.rank);
    let narrow = |x: &[f64]| x.iter().map(|&x| x as f32).collect::<Vec<_>>();
    let mut q = vec![0.0; heads * c];
    head_linear::oracle(&b_k, &layer.q, &mut q).unwrap();
    let (sums, _) = oracle(&narrow(&q), &layer.elite(), &layer.cache.view(0), f64::from(SCALE));
    let mut out = vec![0.0; want.len()];
    head_linear::oracle(&b_v, &narrow(&sums), &mut out).unwrap();
    let error = relative_l2(&narrow(&out), &want);
    assert!(error <= 1e-6, "in f64: relative L2 {error:.2e}");

    let (team, mut q, mut sums) = (Team::new(2), vec![0.0; heads * c], vec![0.0; heads * c]);
    head_linear::cpu(&team, &b_k, &layer.q, &mut q).unwrap();
    let (view, mut scratch) = (layer.cache.view(0), kvwarp::lowrank_kv::Scratch::default());
    let elite = layer.elite();
    kvwarp::lowrank_kv::cpu(&team, &q, &elite, &view, SCALE, &mut sums, &mut scratch).unwrap();
    let mut out = vec![0.0; want.len()];
    head_linear::cpu(&team, &b_v, &sums, &mut out).unwrap();
    let error = relative_l2(&out, &want);
    assert!(error <= 1e-5, "on the CPU: relative L2 {error:.2e}");
}

#[test]
fn kernels_absorb_attend_and_expand() {
    let layer = Layer::new(48);
    let (case, want) = (&layer.cache.case, layer.expanded());
    let (heads, c, d) = (layer.q.len() / layer.d, case.rank, layer.d);
    for exec in executors(1) {
        let run = exec.start();
        let multiply = |weight: &[f16], rows: usize, cols: usize, x: &[f32]| {
            let halves: Vec<f16> = x.iter().map(|&x| f16::from_f32(x)).collect();
            let (w, x) = (run.upload("weight", weight), run.upload("x", &halves));
            let y = run.alloc::<f16>("y", heads * rows);
            let params = Linear {
                struct_size: size_of::<Linear>() as u32,
                tokens: 1,
                weight: w.ptr().cast(),
                x: x.ptr().cast(),
                y: y.ptr().cast(),
                bias: std::ptr::null(),
                x_stride: (heads * cols) as i64,
                x_head_stride: cols as i32,
                kv_heads: case.kv_heads as i32,
                q_heads: heads as i32,
                rows: rows as i32,
                cols: cols as i32,
                reserved: 0,
            };
            run.call(&op!(kvw_head_linear), &params).unwrap();
            y.download().iter().map(|x| x.to_f32()).collect::<Vec<_>>()
        };
        let q = multiply(&layer.b_k, c, d, &layer.q);
        let cache = Cache { q: vec![q], q_elite: vec![layer.elite()], ..Cache::new(case) };
        let (sums, _) = attend(&run, &cache).unwrap();
        let error = relative_l2(&multiply(&layer.b_v, d, c, &sums), &want);
        assert!(error <= 2e-3, "{exec:?}: relative L2 {error:.2e}");
    }
}

/// Turning elite elements before they are cached scores tokens by how far apart they are, and by no more.
#[test]
fn scores_of_elite_pairs_depend_on_distance_alone() {
    let (freq, d) = (inv_freq(10000.0, 64, Default::default()), 64);
    let lists: [i8; 8] = [3, 0, 17, 9, 31, 30, 2, 1];
    let elite = Elite::new(&lists, 4, freq.len()).unwrap();
    let mut noise = Noise(2);
    let (q, k) = (noise.values(2 * d), noise.values(2 * 8));
    let score = |a: i32, b: i32| -> Vec<f64> {
        let (mut q, mut k) = (f64s(&q), f64s(&k));
        elite.oracle(&mut q, d, a, &freq).unwrap();
        elite.oracle(&mut k, 8, b, &freq).unwrap();
        let dot = |h: usize| (0..8).map(|i| q[h * d + i] * k[h * 8 + i]).sum();
        (0..2).map(dot).collect()
    };
    for (near, far) in [((7, 2), (1007, 1002)), ((0, 0), (4095, 4095))] {
        for (a, b) in score(near.0, near.1).iter().zip(score(far.0, far.1)) {
            assert!((a - b).abs() <= 1e-3 * (1.0 + a.abs()), "{a} {b}");
        }
    }
    let mut turned = q.clone();
    elite.rotate(&Angles::new(&[7], &freq), 0, &mut turned, d).unwrap();
    let mut want = f64s(&q);
    elite.oracle(&mut want, d, 7, &freq).unwrap();
    crate::cases::assert_close("elite", &turned, &want, 1e-5, 1e-6);
}

fn any_case() -> impl Strategy<Value = Case> {
    let heads = (1usize..6, 1usize..6, 1usize..9, 1usize..24);
    let lens = prop::collection::vec(0usize..330, 1..4);
    let store = prop::sample::select(vec![Format::F16, Format::Q4, Format::Q2]);
    let rest = (lens, 0usize..4, 1i32..9, any::<bool>(), 1usize..5, store);
    (heads, rest).prop_map(|((kv_heads, group, pairs, blocks), rest)| {
        let (lens, holes, ctas, hopper, rows, store) = rest;
        let pairs = if kv_heads % 4 == 0 { pairs } else { pairs.div_ceil(4) * 4 };
        let rank = 16 * blocks;
        Case { kv_heads, group, pairs, rank, lens, holes, ctas, least: 1, hopper, rows, store }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn random_caches_match_oracle(case in any_case()) {
        let cache = Cache::new(&case);
        compare(&cache, &attend(&Exec::SimtPlain.start(), &cache).unwrap()).unwrap();
        let mut scratch = kvwarp::lowrank_kv::Scratch::at(Level::detect());
        let (team, (want, _)) = (Team::new(2), cache.want());
        let mut all = Vec::new();
        for (q, q_elite, view) in cache.queries() {
            let mut out = vec![f32::NAN; q.len()];
            kvwarp::lowrank_kv::cpu(&team, q, q_elite, &view, SCALE, &mut out, &mut scratch)
                .unwrap();
            all.extend(out);
        }
        prop_assert!(relative_l2(&all, &want) <= 2e-5);
    }
}

#[test]
fn an_op_that_moves_bytes_says_how_many() {
    // A layer of Llama-2-7B at 25 %, one sequence of 32768 tokens: 134 MB.
    let mut params = super::valid_params();
    params.cache =
        ffi::kvw_latent { seqs: 1, kv_heads: 32, pairs: 4, rank: 1792, ..super::valid_cache() };
    (params.q_heads, params.head_stride, params.q_elite_stride) = (32, 128, 4096);
    params.max_slabs = 512;
    let bytes = op!(kvw_lowrank_kv).bytes(&params);
    assert_eq!(bytes, 32768 * 4096 + 32 * 2 * (1792 + 8 + 1792));
}
