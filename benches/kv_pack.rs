//! `cpu/kv_pack/<op>`: one f16 slab packed, also with feedback of K's errors, and one token of one head written. GB/s
//! over the bytes read.

use crate::paged_attn::noise;
use criterion::{Criterion, Throughput};
use half::f16;
use kvwarp::kv_pack::{append, pack, pack_rounded};
use kvwarp::slab::{Format, Layout, Rounding, TOKENS, encode};
use std::hint::black_box;

pub fn run(c: &mut Criterion) {
    packing(c);
    appending(c);
}

fn packing(c: &mut Criterion) {
    for (d, format) in [(64, Format::Q4), (64, Format::Q2), (128, Format::Q2)] {
        let from = Layout::new(Format::F16, d, 32).expect("supported");
        let layout = Layout::new(format, d, 32).expect("supported");
        let halves: Vec<f16> = noise(TOKENS * d).into_iter().map(f16::from_f32).collect();
        let (mut slab, mut to) = (vec![0; from.slab_bytes()], vec![0; layout.slab_bytes()]);
        encode(&from, &halves, &halves, &mut slab);
        let mut group = c.benchmark_group("cpu/kv_pack/pack");
        group.throughput(Throughput::BytesDecimal(slab.len() as u64));
        group.bench_function(format!("{format:?}/d{d}"), |b| {
            b.iter(|| pack(black_box(&slab), &mut to, &layout));
        });
        let weights: Vec<f16> = noise(d * d).into_iter().map(|x| f16::from_f32(0.05 * x)).collect();
        let rounding = Rounding { range: 0.9, feedback: Some(&weights) };
        group.bench_function(format!("{format:?}/d{d}/feedback"), |b| {
            b.iter(|| pack_rounded(black_box(&slab), &mut to, &layout, &rounding));
        });
        group.finish();
    }
}

fn appending(c: &mut Criterion) {
    let layout = Layout::new(Format::F16, 64, 32).expect("supported");
    let (row, mut ring, mut slot) = (noise(64), vec![0; 4 * layout.slab_bytes()], 0);
    let mut group = c.benchmark_group("cpu/kv_pack/append");
    group.throughput(Throughput::BytesDecimal(2 * 4 * 64));
    group.bench_function("d64", |b| {
        b.iter(|| {
            append(&mut ring, &layout, slot, black_box(&row), &row);
            slot += 1;
        });
    });
    group.finish();
}
