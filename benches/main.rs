//! All benchmarks: `cargo bench -- cpu` runs the CPU paths.

mod linear;
mod paged_attn;

criterion::criterion_main!(linear::benches, paged_attn::benches);
