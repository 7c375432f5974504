//! What a cache holds after every way of filling it.

use half::f16;
use kvwarp::slab::{self, Format, Layout, TOKENS};
use kvwarp::threads::Team;
use kvwarp_engine::cache::{Cache, CacheError, Plan, Shape, full_bytes};
use kvwarp_engine::runner::Row;

const SHAPE: Shape = Shape { layers: 2, kv_heads: 2, head_dim: 64, context: 1000 };
const ROW: usize = SHAPE.kv_heads * SHAPE.head_dim;

/// K or V of `n` tokens, `[n, kv_heads, head_dim]`: channels differ in size, as keys do.
fn rows(n: usize, seed: u64) -> Vec<f32> {
    let value = |i: usize| {
        let random = kvwarp::sample::draw(seed, i as i32) as f32 / u64::MAX as f32 - 0.5;
        random * (1 + i % SHAPE.head_dim % 7) as f32
    };
    (0..n * ROW).map(value).collect()
}

/// The only sequence of a cache.
const ROW_0: Row = Row(0);

fn cache(spec: &str) -> Cache {
    let mut cache = Cache::new(&spec.parse().unwrap(), SHAPE).unwrap();
    assert_eq!(cache.open(), ROW_0);
    cache
}

/// Reads `n` tokens, those before `split` by prefills of `piece` tokens and the others one by one.
fn filled(spec: &str, n: usize, split: usize, piece: usize) -> Cache {
    let (mut cache, k, v) = (cache(spec), rows(n, 1), rows(n, 2));
    let team = Team::new(2);
    let tokens = |from: usize, to: usize| from * ROW..to * ROW;
    for start in (0..split).step_by(piece) {
        let end = (start + piece).min(split);
        cache.advance(ROW_0, end - start).unwrap();
        for layer in 0..SHAPE.layers {
            cache.stage(ROW_0, layer, end - start);
            cache.fill(ROW_0, layer, &k[tokens(start, end)], &v[tokens(start, end)], end - start);
            cache.compress(ROW_0, layer, &team).unwrap();
        }
        cache.unstage();
    }
    for i in split..n {
        cache.advance(ROW_0, 1).unwrap();
        for layer in 0..SHAPE.layers {
            cache.append(ROW_0, layer, &k[tokens(i, i + 1)], &v[tokens(i, i + 1)]).unwrap();
        }
    }
    cache
}

/// Everything that attention can see: formats and dequantised values of each head, by token.
fn seen(cache: &Cache) -> Vec<(Vec<Format>, Vec<f32>, Vec<f32>)> {
    let mut heads = Vec::new();
    for layer in 0..SHAPE.layers {
        for view in cache.views(ROW_0, layer) {
            let (mut formats, mut k, mut v) = (Vec::new(), Vec::new(), Vec::new());
            for slab in (0..view.slabs()).map(|i| view.slab(i).unwrap()) {
                let (mut slab_k, mut slab_v) = (vec![0.0; TOKENS * 64], vec![0.0; TOKENS * 64]);
                slab::decode(slab.layout, slab.bytes, &mut slab_k, &mut slab_v);
                formats.push(slab.layout.format);
                k.extend(slab_k);
                v.extend(slab_v);
            }
            k.truncate(view.len * 64);
            v.truncate(view.len * 64);
            heads.push((formats, k, v));
        }
    }
    heads
}

/// Column `channel` of one head of `rows`, rounded to f16.
fn column(rows: &[f32], head: usize, channel: usize) -> Vec<f16> {
    rows.chunks_exact(ROW).map(|row| f16::from_f32(row[head * 64 + channel])).collect()
}

/// What quantising and dequantising makes of a group.
fn round_trip(group: &[f16], bits: u32) -> Vec<f32> {
    let mut codes = vec![0; group.len()];
    let (scale, min) = slab::quantise(group, (1 << bits) - 1, &mut codes);
    codes.iter().map(|&code| f32::from(code) * scale.to_f32() + min.to_f32()).collect()
}

#[test]
fn streamed_tokens_give_the_slabs_of_one_shot() {
    for spec in [
        "f16",
        "q8",
        "fp8,sinks=64",
        "q2-kivi,meta=u8",
        "q4,group=64,meta=u8",
        "q4",
        "q2",
        "q2-small",
        "q2-kivi",
        "q2-kivi,window=0",
        "q2-kivi,window=37,group=64",
        "q4,sinks=70,group=128",
    ] {
        let whole = seen(&filled(spec, 517, 517, 517));
        for (split, piece) in [(0, 1), (1, 1), (63, 63), (64, 64), (200, 70), (517, 100), (517, 64)]
        {
            assert!(seen(&filled(spec, 517, split, piece)) == whole, "{spec}, {split} by {piece}");
        }
    }
}

#[test]
fn slabs_leave_the_window_and_sinks_stay() {
    let formats = |spec: &str, n: usize| seen(&filled(spec, n, n, n)).swap_remove(3).0;
    assert_eq!(formats("q2-kivi,window=64", 191), [Format::Q2, Format::F16, Format::F16]);
    assert_eq!(formats("q2-kivi,window=64", 192), [Format::Q2, Format::Q2, Format::F16]);
    assert_eq!(formats("q4,window=0", 129), [Format::Q4, Format::Q4, Format::F16]);
    assert_eq!(formats("q4,window=0,sinks=1", 129), [Format::F16, Format::Q4, Format::F16]);
    assert_eq!(formats("f16", 129), [Format::F16; 3]);
}

#[test]
fn values_are_those_of_the_quantiser() {
    let (n, head) = (256, 1);
    let (k, v) = (rows(n, 1), rows(n, 2));
    let (_, got_k, got_v) = seen(&filled("q2-kivi,window=64", n, n, n)).swap_remove(head);
    for channel in 0..64 {
        let exact = column(&k, head, channel);
        let mut expected: Vec<f32> =
            exact[..192].chunks(32).flat_map(|g| round_trip(g, 2)).collect();
        expected.extend(exact[192..].iter().map(|x| x.to_f32()));
        let got: Vec<f32> = got_k.chunks_exact(64).map(|row| row[channel]).collect();
        assert_eq!(got, expected, "K, channel {channel}");
    }
    for (token, row) in v.chunks_exact(ROW).enumerate() {
        let exact: Vec<f16> = row[head * 64..][..64].iter().map(|&x| f16::from_f32(x)).collect();
        let expected: Vec<f32> = match token {
            0..192 => exact.chunks(32).flat_map(|group| round_trip(group, 2)).collect(),
            _ => exact.iter().map(|x| x.to_f32()).collect(),
        };
        assert_eq!(got_v[token * 64..][..64], expected, "V, token {token}");
    }
}

/// The zones of KIVI after `n` tokens: K quantised in whole residuals, V but for the newest residual.
fn check_kivi(n: usize, split: usize, r: usize) {
    let cache = filled(&format!("q2-kivi,window={r},kivi_exact"), n, split, split.max(1));
    // The step that reads a token sees the state before that token.
    let settled = if split == n { n } else { n - 1 };
    let (k_end, v_end) = (settled - settled % r, settled.saturating_sub(r));
    let (k, v) = (rows(n, 1), rows(n, 2));
    let (_, got_k, got_v) = seen(&cache).swap_remove(0);
    for channel in [0, 13, 63] {
        let exact = column(&k, 0, channel);
        let mut expected: Vec<f32> =
            exact[..k_end].chunks(32).flat_map(|g| round_trip(g, 2)).collect();
        expected.extend(exact[k_end..].iter().map(|x| x.to_f32()));
        for (token, (row, x)) in got_k.chunks_exact(64).zip(&expected).enumerate() {
            assert!(
                (row[channel] - x).abs() <= x.abs() / 1024.0,
                "K {token} of {n}, split {split}, r {r}"
            );
        }
    }
    for (token, row) in v.chunks_exact(ROW).enumerate() {
        let exact: Vec<f16> = row[..64].iter().map(|&x| f16::from_f32(x)).collect();
        let quantised = exact.chunks(32).flat_map(|group| round_trip(group, 2));
        let exact = exact.iter().map(|x| x.to_f32());
        let expected: Vec<f32> = if token < v_end { quantised.collect() } else { exact.collect() };
        for (got, x) in got_v[token * 64..][..64].iter().zip(&expected) {
            assert!((got - x).abs() <= x.abs() / 1024.0, "V {token} of {n}, split {split}, r {r}");
        }
    }
}

#[test]
fn kivi_exact_has_kivis_boundaries() {
    for r in [32, 128] {
        let edges = [1, 2, r - 1, r, r + 1, 2 * r - 1, 2 * r, 2 * r + 1, 3 * r + 7, 600];
        for n in edges {
            [0, n / 2, n].into_iter().for_each(|split| check_kivi(n, split, r));
        }
    }
}

#[test]
fn rollback_forgets_what_is_still_in_the_ring() {
    let mut cache = filled("q2-kivi,window=64", 200, 200, 200);
    assert_eq!(cache.position(ROW_0), 200);
    assert!(matches!(cache.rollback(ROW_0, 73), Err(CacheError::Packed { n: 73, spare: 72 })));
    cache.rollback(ROW_0, 70).unwrap();
    assert_eq!((cache.position(ROW_0), cache.stats(ROW_0).tokens), (130, 130));
    let whole = filled("q2-kivi,window=64", 200, 200, 200);
    let (k, v) = (rows(200, 1), rows(200, 2));
    for i in 130..200 {
        cache.advance(ROW_0, 1).unwrap();
        for layer in 0..SHAPE.layers {
            cache.append(ROW_0, layer, &k[i * ROW..][..ROW], &v[i * ROW..][..ROW]).unwrap();
        }
    }
    assert!(seen(&cache) == seen(&whole));
}

#[test]
fn a_full_cache_refuses() {
    let mut cache = cache("f16");
    cache.advance(ROW_0, 999).unwrap();
    let error = cache.advance(ROW_0, 2).unwrap_err().to_string();
    assert!(error.contains("1001 tokens") && error.contains("1000"), "{error}");
    assert_eq!(cache.position(ROW_0), 999);
}

#[test]
fn bytes_come_from_the_allocator() {
    let heads = SHAPE.layers * SHAPE.kv_heads;
    let layout = |format| Layout::new(format, 64, 32).unwrap().slab_bytes();
    let stats = filled("q2-kivi,window=64", 512, 512, 512).stats(ROW_0);
    // (512 - 64) / 64 slabs of q2 and their entries, (64 + 126) / 64 ring slabs.
    let expected = heads * (7 * (layout(Format::Q2) + 4) + 2 * layout(Format::F16));
    assert_eq!(stats.used_bytes, expected);
    assert_eq!(stats.effective_bits, (expected * 8) as f64 / (heads * 512 * 64 * 2) as f64);
    assert!(stats.peak_bytes >= expected && stats.capacity_bytes >= expected);
    // Full to its context, a cache takes what was announced.
    for spec in [
        "f16",
        "q4,sinks=64",
        "fp8",
        "q2",
        "q2,hadamard=off,range=90",
        "q2-kivi,window=37",
        "q2-kivi,window=32,kivi_exact",
    ] {
        let full = filled(spec, 1000, 1000, 1000).stats(ROW_0).used_bytes;
        assert_eq!(
            full,
            full_bytes(&spec.parse().unwrap(), SHAPE, &Plan::default()).unwrap(),
            "{spec}"
        );
    }
}
