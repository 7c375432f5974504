//! `cpu/linear/<tokens>x<rows>x<cols>/<type>`: GB/s over weight bytes for one token, and products a
//! second (elements, two operations each) for many. Threads: `KVW_THREADS`, else the physical cores.

use criterion::{BenchmarkId, Criterion, Throughput};
use kvwarp::linear::{Cpu, WeightType, Weights, matmul, matmul_many};
use kvwarp::threads::{Team, physical_cores};
use std::hint::black_box;

pub fn run(c: &mut Criterion) {
    one_token(c);
    many_tokens(c);
    whole_token(c);
}

fn team() -> Team {
    let threads = std::env::var("KVW_THREADS").ok().and_then(|n| n.parse().ok());
    Team::new(threads.unwrap_or_else(physical_cores))
}

/// `bytes` of pseudo-random weights (splitmix64), with every scale that `kind` has made small and finite.
fn random_bytes(kind: WeightType, bytes: usize) -> Vec<u8> {
    let mut state = 7u64;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed ^ mixed >> 27
    };
    let mut data: Vec<u8> =
        std::iter::repeat_with(&mut next).flat_map(u64::to_le_bytes).take(bytes).collect();
    for block in data.chunks_exact_mut(kind.block_bytes()) {
        // The upper byte of a half float: 2^-7 and the like; of an f32: about 2^-13.
        let tops: &[usize] = match kind {
            WeightType::F32 => &[3],
            WeightType::F16 | WeightType::BF16 | WeightType::Q8_0 | WeightType::Q4_0 => &[1],
            WeightType::Q4_1 | WeightType::Q4K => &[1, 3],
            WeightType::Q6K => &[209],
        };
        tops.iter().for_each(|&top| block[top] = block[top] & 0x80 | 0x20);
    }
    data
}

fn activations(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i as f32 * 0.7).sin()).collect()
}

/// A token through matrices that together exceed every cache, so that each pass reads memory.
fn one_token(c: &mut Criterion) {
    let team = team();
    for (rows, cols) in [(576, 576), (1536, 576), (576, 1536), (49152, 576), (4096, 4096)] {
        let mut group = c.benchmark_group(format!("cpu/linear/1x{rows}x{cols}"));
        for kind in WeightType::ALL {
            let Some(row) = kind.row_bytes(cols) else { continue };
            let copies = (100 << 20) / (row * rows) + 1;
            let data = random_bytes(kind, row * rows);
            let data: Vec<_> = std::iter::repeat_n(data, copies).collect();
            let view = |data| Weights::new(kind, rows, cols, data).expect("whole rows");
            let mut weights = data.iter().map(|data| view(data)).cycle();
            let (x, mut y) = (activations(cols), vec![0.0; rows]);
            let cpu = Cpu::new(&team);
            group.throughput(Throughput::BytesDecimal((row * rows) as u64));
            group.bench_function(BenchmarkId::from_parameter(format!("{kind:?}")), |b| {
                let mut pass = || matmul(&cpu, &weights.next()?, black_box(&x), 1, &mut y).ok();
                b.iter(|| pass().expect("sizes agree"));
            });
        }
        group.finish();
    }
}

fn many_tokens(c: &mut Criterion) {
    let team = team();
    for (n, rows, cols) in [(8, 1536, 576), (64, 1536, 576), (512, 1536, 576), (512, 576, 1536)] {
        let mut group = c.benchmark_group(format!("cpu/linear/{n}x{rows}x{cols}"));
        for kind in [WeightType::F16, WeightType::Q8_0, WeightType::Q4_0, WeightType::Q4_1] {
            let data = random_bytes(kind, rows * kind.row_bytes(cols).expect("whole blocks"));
            let weights = Weights::new(kind, rows, cols, &data).expect("whole rows");
            let (x, mut y) = (activations(n * cols), vec![0.0; n * rows]);
            let cpu = Cpu::new(&team);
            group.throughput(Throughput::Elements((n * rows * cols) as u64));
            group.bench_function(BenchmarkId::from_parameter(format!("{kind:?}")), |b| {
                b.iter(|| matmul(&cpu, &weights, black_box(&x), n, &mut y).expect("sizes agree"));
            });
        }
        group.finish();
    }
}

/// All 211 products of a decoded token of SmolLM2-135M: 66.4 MB of Q4_1 and 30.1 MB of Q8_0.
fn whole_token(c: &mut Criterion) {
    let team = team();
    let cpu = Cpu::new(&team);
    let matrix = |kind: WeightType, rows: usize, cols: usize| {
        let data = random_bytes(kind, rows * kind.row_bytes(cols).expect("whole blocks"));
        (kind, rows, cols, data)
    };
    let layer = [
        vec![(576, 576), (192, 576), (192, 576)],
        vec![(576, 576)],
        vec![(1536, 576), (1536, 576)],
        vec![(576, 1536)],
    ];
    let groups = (0..30).flat_map(|_| layer.clone());
    let mut groups: Vec<Vec<_>> = groups
        .map(|group| group.iter().map(|&(r, c)| matrix(WeightType::Q4_1, r, c)).collect())
        .collect();
    groups.push(vec![matrix(WeightType::Q8_0, 49152, 576)]);
    let x = activations(1536);
    let mut y = vec![vec![0f32; 49152]; 3];
    let total: usize = groups.iter().flatten().map(|(_, _, _, data)| data.len()).sum();
    let mut group = c.benchmark_group("cpu/linear/token");
    group.throughput(Throughput::BytesDecimal(total as u64));
    group.bench_function("SmolLM2-135M", |b| {
        b.iter(|| {
            for group in &groups {
                let weights: Vec<_> = group
                    .iter()
                    .map(|(kind, rows, cols, data)| {
                        Weights::new(*kind, *rows, *cols, data).expect("whole rows")
                    })
                    .collect();
                let mut products: Vec<_> =
                    weights.iter().zip(&mut y).map(|(w, y)| (w, &mut y[..w.rows()])).collect();
                matmul_many(&cpu, &mut products, &x[..weights[0].cols()], 1).expect("sizes agree");
            }
        });
    });
    group.finish();
}
