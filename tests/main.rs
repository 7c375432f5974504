//! One test binary: a module a family, and the house rules.

mod abi;
mod slab;
mod threads;
