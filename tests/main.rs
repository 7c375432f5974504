//! One test binary: a module a family, and the house rules.

mod abi;
mod simt;
mod simt_self;
mod slab;
mod threads;
