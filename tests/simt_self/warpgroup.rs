//! The matrix products of a warpgroup: against f64, and the bugs that the checker must find.
use super::*;

const BUGS: [(i32, &str); 9] = [
    (60, "without fence.proxy.async after it"),
    (61, "no wgmma.fence"),
    (62, "accumulators of a wgmma in flight"),
    (64, "write-after-read race in shared memory"),
    (65, "registers of A changed under the wgmma"),
    (66, "written after the last wgmma.fence"),
    (68, "a warpgroup meets in different instructions"),
    (69, "wgmma read"),
    (63, ""), // only the numbers tell: 63 and 67
];

fn product(lib: &'static Simt, seed: u64, fault: i32, name: &str, n: usize) -> Result<(), String> {
    let session = lib.seeded(seed);
    session.hopper(true).fault(fault);
    let bf16 = name.contains("bf16");
    let (mask, one) = if bf16 { (0x80ff, 0x3f00) } else { (0x8fff, 0x3000) };
    let bits = near_one(31, (64 + n) * 64, mask, one);
    let value = |b: u32| {
        if bf16 { bf16::from_bits(b as u16).to_f64() } else { f16::from_bits(b as u16).to_f64() }
    };
    let out = launch(lib, name, &bits, &vec![u32::MAX; 64 * n])?;
    for (i, got) in out.into_iter().map(f32::from_bits).enumerate() {
        let (a, b) = (&bits[i / n * 64..], &bits[(64 + i % n) * 64..]);
        let terms = (0..64).map(|k| value(a[k]) * value(b[k]));
        let (want, size) = terms.fold((0.0, 0.0), |(sum, size), x| (sum + x, size + x.abs()));
        if (f64::from(got) - want).abs() > size * 1e-6 || got.is_nan() {
            return Err(format!("row {} column {}: {got} not {want}", i / n, i % n));
        }
    }
    Ok(())
}

#[test]
fn warpgroup_products_match_f64() {
    let shapes = [("wgmma_f16_64", 64), ("wgmma_f16_96", 96), ("wgmma_f16_128", 128)];
    for (name, n) in shapes.into_iter().chain([("wgmma_bf16_64", 64)]) {
        for lib in [Simt::plain(), Simt::checked()] {
            (0..4).for_each(|seed| product(lib, seed, 0, name, n).unwrap());
            assert_eq!(lib.report().wgmma, 4);
        }
    }
}

#[test]
fn warpgroup_bugs_are_found() {
    for seed in 0..3 {
        for (fault, text) in BUGS {
            let found = product(Simt::checked(), seed, fault, "wgmma_f16_64", 64)
                .expect_err(&format!("fault {fault}, seed {seed}"));
            assert!(found.contains(text), "fault {fault}, seed {seed}: {found}");
        }
        for fault in [62, 63, 67] {
            let found = product(Simt::plain(), seed, fault, "wgmma_f16_64", 64);
            assert!(found.is_err(), "fault {fault}, seed {seed}");
        }
    }
}
