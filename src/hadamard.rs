//! Orthonormal Hadamard rotations of a head's channels: outliers are spread over all of them, so that a few levels
//! serve each alike (QuaRot, arXiv:2404.00456).
//!
//! Queries and keys turn together after RoPE ([`keys`]), which leaves scores as they are. Values turn in blocks of
//! 32 channels ([`values`]), and outputs are turned back by the same; where weights are at hand it goes into those of
//! the value and output projections. Both are their own inverse.

/// Channels of a block of [`values`].
pub const BLOCK: usize = 32;

/// Turns each head of `d` channels of `x`, `d` of 64, 96, 128, 256: by the Hadamard matrix of `d`; of 32 channels three
/// times, mixed by the reflection `1 - 2/3`, where `d` is 96.
///
/// # Panics
/// If `x` is not whole heads of such a size.
pub fn keys(x: &mut [f32], d: usize) {
    assert!([64, 96, 128, 256].contains(&d) && x.len().is_multiple_of(d), "heads of {d} channels");
    for head in x.chunks_exact_mut(d) {
        match d {
            96 => {
                head.chunks_exact_mut(BLOCK).for_each(sums_and_differences);
                reflect(head);
                scale(head, BLOCK);
            }
            _ => {
                sums_and_differences(head);
                scale(head, d);
            }
        }
    }
}

/// Turns each 32 channels of `x`.
///
/// # Panics
/// If `x` is not whole blocks.
pub fn values(x: &mut [f32]) {
    assert!(x.len().is_multiple_of(BLOCK), "blocks of {BLOCK} channels");
    for block in x.chunks_exact_mut(BLOCK) {
        sums_and_differences(block);
        scale(block, BLOCK);
    }
}

/// Neighbours first: kernels add in the same order.
fn sums_and_differences(x: &mut [f32]) {
    let mut apart = 1;
    while apart < x.len() {
        for pair in x.chunks_exact_mut(2 * apart) {
            let (a, b) = pair.split_at_mut(apart);
            a.iter_mut().zip(b).for_each(|(a, b)| (*a, *b) = (*a + *b, *a - *b));
        }
        apart *= 2;
    }
}

/// Less two thirds of the sum over the three blocks.
fn reflect(x: &mut [f32]) {
    for i in 0..BLOCK {
        let sum = x[i] + x[BLOCK + i] + x[2 * BLOCK + i];
        for block in 0..3 {
            let x = &mut x[block * BLOCK + i];
            *x = sum.mul_add(-2.0 / 3.0, *x);
        }
    }
}

fn scale(x: &mut [f32], order: usize) {
    let factor = (order as f64).sqrt().recip() as f32;
    x.iter_mut().for_each(|x| *x *= factor);
}
