//! `cpu/token_score/<what>/<format>/d64g3/<rows>of<tokens>`: scores that some rows of one layer give to all tokens, 9 query
//! and 3 kv heads of 64 channels. Elements are multiplications, half of those of `cpu/prefill_attn` for the same rows.

use crate::paged_attn::{noise, team};
use crate::prefill_attn::{D, GROUP, HEADS, tokens, view};
use criterion::{BenchmarkId, Criterion, Throughput};
use kvwarp::slab::Format;
use kvwarp::token_score::{Reduce, Scratch, cpu, lse};

pub fn run(c: &mut Criterion) {
    for format in [Format::F16, Format::Q2] {
        columns(c, "sum", format, Reduce::Sum);
        columns(c, "max", format, Reduce::Max);
    }
    subset(c);
}

/// A window of 64 rows, as SnapKV and FastKV score, and a piece of all of them, as H2O does.
fn columns(c: &mut Criterion, name: &str, format: Format, reduce: Reduce) {
    let team = team();
    let mut group = c.benchmark_group(format!("cpu/token_score/{name}/{format:?}/d64g3"));
    for (n, len) in [(64, 2048), (64, 8192), (512, 512), (512, 2048), (512, 8000)] {
        let held = tokens(format, n, len);
        let (q, sums) = (noise(n * HEADS * GROUP * D), vec![9.0; n * HEADS * GROUP]);
        let rows = if reduce == Reduce::Sum { GROUP } else { 1 };
        let len = view(&held).len;
        let (mut scores, mut scratch) = (vec![0.0; HEADS * rows * len], Scratch::default());
        let seen = n * (len - n) + n * (n + 1) / 2;
        group.throughput(Throughput::Elements((seen * HEADS * GROUP * D) as u64));
        group.bench_function(BenchmarkId::from_parameter(format!("{n}of{len}")), |b| {
            b.iter(|| {
                let (heads, first) = ([view(&held); HEADS], [0; HEADS]);
                cpu(
                    &team,
                    &q,
                    n,
                    &sums,
                    &heads,
                    0.0,
                    &first,
                    len,
                    reduce,
                    &mut scores,
                    &mut scratch,
                )
                .expect("sizes agree");
            });
        });
    }
    group.finish();
}

/// KVzip's: 512 rows over sinks, a chunk of 2,048 and themselves.
fn subset(c: &mut Criterion) {
    let (team, n, len) = (team(), 512, 8000);
    let mut group = c.benchmark_group("cpu/token_score/lse/F16/d64g3");
    let (held, q) = (tokens(Format::F16, n, len), noise(n * HEADS * GROUP * D));
    let len = view(&held).len;
    let (mut out, mut scratch) = (vec![0.0; n * HEADS * GROUP], Scratch::default());
    let seen = [0..4, 2048..4096, len - n..len];
    let pairs = n * (4 + 2048) + n * (n + 1) / 2;
    group.throughput(Throughput::Elements((pairs * HEADS * GROUP * D) as u64));
    group.bench_function(BenchmarkId::from_parameter(format!("{n}of{len}")), |b| {
        b.iter(|| {
            let heads = [view(&held); HEADS];
            lse(&team, &q, n, &heads, 0.0, &seen, &mut out, &mut scratch).expect("sizes agree");
        });
    });
    group.finish();
}
