//! One test binary: a module a family, and the house rules.

mod abi;
mod cache;
mod cases;
mod cpu_attn;
mod cpu_prefill;
mod embed;
mod exec;
mod formats;
mod kv_pack;
mod kv_pack_cpu;
mod layout;
mod linear;
mod paged_attn;
mod prefill_attn;
mod rms_norm;
mod rope_select;
mod sample;
mod sass;
mod simd;
mod simt;
mod simt_self;
mod slab;
mod swiglu;
mod threads;
