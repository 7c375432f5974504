//! `cpu/kv_gather/<what>/d<D>/<kept>of<tokens>`: rows of one head gathered into another ring, and to the front of their
//! own. GB/s over the bytes of the rows that are kept.

use criterion::{BenchmarkId, Criterion, Throughput};
use kvwarp::kv_gather::{compact, cpu};
use kvwarp::slab::{Format, Layout, TOKENS};

pub fn run(c: &mut Criterion) {
    for d in [64, 128] {
        gathering(c, d);
    }
}

fn gathering(c: &mut Criterion, d: usize) {
    const TOKENS_HELD: usize = 8192;
    let layout = Layout::new(Format::F16, d, 32).expect("supported");
    let from: Vec<u8> = (0..TOKENS_HELD / TOKENS * layout.slab_bytes()).map(|i| i as u8).collect();
    for keep in [2, 4] {
        // One of each `keep` tokens, at uneven distances.
        let slots: Vec<u32> =
            (0..TOKENS_HELD / keep).map(|i| (i * keep + i * 7 % keep) as u32).collect();
        let name = format!("{}of{TOKENS_HELD}", slots.len());
        let mut to = vec![0; slots.len() / TOKENS * layout.slab_bytes()];
        let mut ring = from.clone();
        let bytes = (slots.len() * d * 4) as u64;
        let mut group = c.benchmark_group(format!("cpu/kv_gather/gather/d{d}"));
        group.throughput(Throughput::BytesDecimal(bytes));
        group.bench_function(BenchmarkId::from_parameter(&name), |b| {
            b.iter(|| cpu(&from, &layout, &slots, &mut to).expect("sizes agree"));
        });
        group.finish();
        let mut group = c.benchmark_group(format!("cpu/kv_gather/compact/d{d}"));
        group.throughput(Throughput::BytesDecimal(bytes));
        group.bench_function(BenchmarkId::from_parameter(&name), |b| {
            b.iter(|| compact(&mut ring, &layout, 0, &slots).expect("sizes agree"));
        });
        group.finish();
    }
}
