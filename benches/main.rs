//! All benchmarks: `cargo bench -- cpu` runs the CPU paths.

mod kv_pack;
mod linear;
mod paged_attn;
mod prefill_attn;

criterion::criterion_main!(
    kv_pack::benches,
    linear::benches,
    paged_attn::benches,
    prefill_attn::benches
);
