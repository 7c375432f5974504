//! Planes: worked out by hand, and every code and scale at its place.

use super::kernel::BLOCKS;
use super::random_weights;
use kvwarp::linear::{WeightType, Weights, planes};
use rand::SeedableRng;
use rand::rngs::ChaCha8Rng;

fn of(kind: WeightType, cols: usize, data: &[u8]) -> Vec<u8> {
    planes(&Weights::new(kind, data.len() / kind.row_bytes(cols).unwrap(), cols, data).unwrap())
}

/// Column 9 is lane 1's second: bit 16 of its word.
#[test]
fn nibbles_hand_worked() {
    let mut block = [0u8; 18];
    (block[0], block[1], block[2 + 9]) = (0xd1, 0xd2, 0x05);
    let mut want = [0u8; 18];
    (want[16], want[17], want[4 + 2]) = (0xd1, 0xd2, 0x05);
    assert_eq!(of(WeightType::Q4_0, 32, &block), want);
}

/// Column 42 is in the second 32, lane 1's third.
#[test]
fn bytes_hand_worked() {
    let mut blocks = [0u8; 68];
    (blocks[34], blocks[36 + 10]) = (0xd1, 0x85);
    let mut want = [0u8; 68];
    (want[64 + 2], want[(2 + 1) * 8 + 1]) = (0xd1, 0x85);
    assert_eq!(of(WeightType::Q8_0, 64, &blocks), want);
}

/// Column 37 with code 0x2b: its low bits are bit 16 of word (1, 1), its high ones bit 24 of word (1, 0).
#[test]
fn six_bits_hand_worked() {
    let mut block = [0u8; 210];
    (block[37], block[128 + 5]) = (0x0b, 0x02 << 2);
    (block[192 + 7], block[208]) = (0x71, 0xd1);
    let mut want = [0u8; 210];
    (want[4 * 5 + 2], want[128 + 4 * 4 + 3]) = (0x0b, 0x02);
    (want[192 + 7], want[208]) = (0x71, 0xd1);
    assert_eq!(of(WeightType::Q6K, 256, &block), want);
}

/// The heads of Q4_K blocks and the pairs of Q4_1 follow the codes of all rows.
#[test]
fn scales_follow_all_codes() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    for (kind, head) in [(WeightType::Q4K, 16), (WeightType::Q4_1, 4), (WeightType::Q8_0, 2)] {
        let data = random_weights(&mut rng, kind, 3, 512);
        let blocks = data.chunks_exact(kind.block_bytes());
        let heads: Vec<u8> = blocks.flat_map(|block| &block[..head]).copied().collect();
        assert!(of(kind, 512, &data).ends_with(&heads), "{kind:?}");
    }
}

/// No bit is lost or made: as many ones as before. Float formats stay.
#[test]
fn planes_hold_the_same_bits() {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let ones = |bytes: &[u8]| bytes.iter().map(|b| b.count_ones()).sum::<u32>();
    for kind in BLOCKS {
        let data = random_weights(&mut rng, kind, 5, 768);
        let planes = of(kind, 768, &data);
        assert_eq!((planes.len(), ones(&planes)), (data.len(), ones(&data)), "{kind:?}");
        assert_ne!(planes, data);
    }
    let data = random_weights(&mut rng, WeightType::BF16, 5, 24);
    assert_eq!(of(WeightType::BF16, 24, &data), data);
}
