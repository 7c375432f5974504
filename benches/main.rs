//! All benchmarks: `cargo bench -- cpu` runs the CPU paths.

mod linear;

criterion::criterion_main!(linear::benches);
