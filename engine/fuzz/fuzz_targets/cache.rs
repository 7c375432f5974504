#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| kvwarp_engine_fuzz::cache(data));
