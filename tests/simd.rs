//! Levels: names, order, and that no level beyond the CPU's is used.

use kvwarp::simd::Level;

#[test]
fn levels_are_named_ordered_and_bounded() {
    assert_eq!(Level::from_name("portable"), Some(Level::Portable));
    assert_eq!(Level::from_name("avx2"), Some(Level::Avx2));
    assert_eq!(Level::from_name("avx512"), Some(Level::Avx512));
    assert_eq!(Level::from_name("AVX2"), None);
    assert!(Level::Portable < Level::Avx2 && Level::Avx2 < Level::Avx512);
    let available: Vec<_> = Level::available().collect();
    let best = available[available.len() - 1];
    assert_eq!(available[0], Level::Portable);
    assert_eq!(Level::Avx512.usable(), best);
    assert_eq!(Level::Portable.usable(), Level::Portable);
    let named = std::env::var("KVW_SIMD").ok().and_then(|name| Level::from_name(&name));
    assert_eq!(Level::detect(), named.map_or(best, |level| level.min(best)));
}
