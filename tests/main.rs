//! One test binary: a module a family, and the house rules.

mod abi;
#[path = "../benches/args.rs"]
mod args;
mod bench;
#[cfg(kvw_cuda)]
mod cabi;
mod cache;
mod cases;
mod cpu_attn;
mod cpu_prefill;
mod cpu_score;
mod cpu_select;
mod embed;
mod exec;
mod formats;
#[path = "../benches/goals.rs"]
mod goals;
mod hadamard;
mod head_linear;
mod kv_gather;
mod kv_pack;
mod kv_pack_cpu;
mod layout;
mod linear;
#[cfg(kvw_cuda)]
mod link;
mod lowrank_kv;
mod page_table;
mod paged_attn;
#[path = "../benches/plot.rs"]
mod plot;
mod prefill_attn;
#[path = "../benches/record.rs"]
mod record;
mod rms_norm;
mod rope_select;
mod rounding;
mod sample;
mod sass;
mod sim_evict;
mod simd;
mod simt;
mod simt_self;
mod slab;
mod swiglu;
mod threads;
mod token_score;
mod token_select;
