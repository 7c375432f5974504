//! embed: rows by id on every executor.

use crate::cases::{Noise, f64s, somewhere, widen};
use crate::exec::{Run, assert_caught, executors, op};
use crate::linear::kernel::{BLOCKS, dtype};
use crate::linear::random_weights;
use half::{bf16, f16};
use kvwarp::embed::oracle;
use kvwarp::ffi::{self, kvw_embed_params as Params};
use kvwarp::linear::{WeightType, Weights, dequantize_row, planes};
use rand::SeedableRng;
use rand::rngs::ChaCha8Rng;

#[test]
fn oracle_hand_worked() {
    let table = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
    assert_eq!(oracle(&table, 2, &[2, -1, 0, 3]).unwrap(), [5., 6., 0., 0., 1., 2., 0., 0.]);
    assert!(oracle(&table, 4, &[0]).is_err());
}

#[test]
fn c_checks_need_no_gpu() {
    let valid = Params {
        struct_size: size_of::<Params>() as u32,
        dtype: ffi::KVW_BF16,
        table: somewhere(),
        ids: somewhere(),
        out: somewhere(),
        tokens: 3,
        vocab: 100,
        width: 16,
        out_dtype: ffi::KVW_F32,
    };
    op!(kvw_embed).refuses(
        valid,
        &[
            ("struct_size", |p| p.struct_size -= 1, ffi::KVW_ERR_STRUCT),
            ("dtype", |p| p.dtype = 8, ffi::KVW_ERR_FORMAT),
            ("out_dtype", |p| p.out_dtype = ffi::KVW_BF16, ffi::KVW_ERR_FORMAT),
            ("table", |p| p.table = std::ptr::null(), ffi::KVW_ERR_NULL),
            ("ids unaligned", |p| p.ids = 4 as _, ffi::KVW_ERR_ALIGN),
            ("out", |p| p.out = std::ptr::null_mut(), ffi::KVW_ERR_NULL),
            ("table unaligned", |p| p.table = 8 as _, ffi::KVW_ERR_ALIGN),
            ("out unaligned", |p| p.out = 4 as _, ffi::KVW_ERR_ALIGN),
            ("tokens", |p| p.tokens = 0, ffi::KVW_ERR_SHAPE),
            ("vocab", |p| p.vocab = 0, ffi::KVW_ERR_SHAPE),
            ("width", |p| p.width = 12, ffi::KVW_ERR_SHAPE),
            ("width 0", |p| p.width = 0, ffi::KVW_ERR_SHAPE),
        ],
    );
    let blocks = Params { dtype: ffi::KVW_Q6_K, width: 512, ..valid };
    op!(kvw_embed)
        .refuses(blocks, &[("width splits a block", |p| p.width = 384, ffi::KVW_ERR_SHAPE)]);
    assert_eq!(op!(kvw_embed).bytes(&blocks), 3 * (4 + 420 + 512 * 4));
    let whole = Params { ids: std::ptr::null(), out_dtype: ffi::KVW_F16, ..blocks };
    assert_eq!(op!(kvw_embed).bytes(&whole), 3 * (420 + 512 * 2));
    assert_eq!(op!(kvw_embed).bytes(&valid), 3 * (4 + 16 * 6));
    assert_eq!(op!(kvw_embed).workspace(&valid), 0);
}

/// Rows of `table` by `ids`; without, its first rows. An f16 `out` comes back as floats.
fn case<T: bytemuck::Pod>(
    run: &Run,
    (dtype, out_dtype): (i32, i32),
    table: &[T],
    (vocab, width): (usize, usize),
    ids: Result<&[i32], usize>,
) -> Result<Vec<f32>, String> {
    let tokens = ids.map_or_else(|n| n, <[i32]>::len);
    let t = run.upload("table", table);
    let i = run.upload("ids", ids.unwrap_or(&[0]));
    let (single, half) =
        (run.alloc::<f32>("out", tokens * width), run.alloc::<f16>("out", tokens * width));
    let f16_out = out_dtype == ffi::KVW_F16;
    let params = Params {
        struct_size: size_of::<Params>() as u32,
        dtype,
        table: t.ptr().cast(),
        ids: if ids.is_ok() { i.ptr() } else { std::ptr::null() },
        out: if f16_out { half.ptr().cast() } else { single.ptr().cast() },
        tokens: tokens as i32,
        vocab: vocab as i32,
        width: width as i32,
        out_dtype,
    };
    run.call(&op!(kvw_embed), &params)?;
    Ok(if f16_out { widen(&half.download()) } else { single.download() })
}

/// As floats, and rounded once to f16 and then widened.
fn meant(out_dtype: i32, x: &[f32]) -> Vec<f64> {
    let round = |&x: &f32| f16::from_f32(x.clamp(-65504.0, 65504.0)).to_f64();
    if out_dtype == ffi::KVW_F16 { x.iter().map(round).collect() } else { f64s(x) }
}

fn all_types(run: &Run, width: usize, ids: &[i32]) -> Result<(), String> {
    let mut noise = Noise(8);
    let mut wide = noise.values(width * 10);
    wide[3] = -1e5;
    let half: Vec<f16> = wide.iter().map(|&x| f16::from_f32(x.clamp(-65504.0, 65504.0))).collect();
    let brain: Vec<bf16> = wide.iter().map(|&x| bf16::from_f32(x)).collect();
    let brain_wide: Vec<f32> = brain.iter().map(|x| x.to_f32()).collect();
    let (f32s, shape) = (ffi::KVW_F32, (10, width));
    for (got, table) in [
        (case(run, (ffi::KVW_F32, f32s), &wide, shape, Ok(ids))?, wide.clone()),
        (case(run, (ffi::KVW_F16, f32s), &half, shape, Ok(ids))?, widen(&half)),
        (case(run, (ffi::KVW_BF16, f32s), &brain, shape, Ok(ids))?, brain_wide),
    ] {
        let want = f64s(&oracle(&table, width, ids).unwrap());
        crate::cases::close("embed", &got, &want, 0.0, 0.0)?;
    }
    let got = case(run, (ffi::KVW_F32, ffi::KVW_F16), &wide, shape, Err(10))?;
    crate::cases::close("whole table", &got, &meant(ffi::KVW_F16, &wide), 0.0, 0.0)
}

/// A table in blocks: the very floats of [`dequantize_row`].
fn blocks(run: &Run, kind: WeightType, width: usize, ids: &[i32]) -> Result<(), String> {
    let mut rng = ChaCha8Rng::seed_from_u64(width as u64);
    let data = random_weights(&mut rng, kind, 10, width);
    let weights = Weights::new(kind, 10, width, &data).unwrap();
    let mut table = vec![0.0; 10 * width];
    for (row, out) in table.chunks_exact_mut(width).enumerate() {
        dequantize_row(&weights, row, out).unwrap();
    }
    let planes = planes(&weights);
    for out in [ffi::KVW_F32, ffi::KVW_F16] {
        let got = case(run, (dtype(kind), out), &planes, (10, width), Ok(ids))?;
        let want = meant(out, &oracle(&table, width, ids).unwrap());
        crate::cases::close(&format!("{kind:?}"), &got, &want, 0.0, 0.0)?;
        let got = case(run, (dtype(kind), out), &planes, (10, width), Err(10))?;
        crate::cases::close(&format!("{kind:?}, whole"), &got, &meant(out, &table), 0.0, 0.0)?;
    }
    Ok(())
}

const IDS: [i32; 7] = [3, 0, 9, -1, 10, i32::MIN, 3];

#[test]
fn executors_match_oracle() {
    for exec in executors(2) {
        let run = exec.start();
        for width in [8, 576, 2056] {
            all_types(&run, width, &IDS).unwrap();
        }
        for kind in BLOCKS {
            for width in
                [32, 64, 96, 128, 576, 256, 768].into_iter().filter(|w| w % kind.block() == 0)
            {
                blocks(&run, kind, width, &IDS).unwrap();
            }
        }
    }
}

#[test]
fn faults_are_caught() {
    assert_caught(351, "an id past the vocabulary is followed", |run| all_types(run, 64, &[1, 10]));
    assert_caught(352, "ids are not looked at", |run| blocks(run, WeightType::Q4_0, 32, &IDS));
    let of = |kind, width| move |run: &Run| blocks(run, kind, width, &IDS);
    assert_caught(336, "a run that is not whole is read as one", of(WeightType::Q4_0, 192));
    assert_caught(337, "minima are left out", of(WeightType::Q4_1, 64));
    assert_caught(338, "groups 4 to 7 have the scales of 0 to 3", of(WeightType::Q4K, 256));
    assert_caught(339, "high bits of the 32 before", of(WeightType::Q6K, 256));
}
