//! embed: rows by id on every executor.

use crate::cases::{Noise, f64s, somewhere, widen};
use crate::exec::{Run, assert_caught, executors, op};
use half::{bf16, f16};
use kvwarp::embed::oracle;
use kvwarp::ffi::{self, kvw_embed_params as Params};

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
        reserved: 0,
    };
    op!(kvw_embed).refuses(
        valid,
        &[
            ("struct_size", |p| p.struct_size -= 1, ffi::KVW_ERR_STRUCT),
            ("dtype", |p| p.dtype = 3, ffi::KVW_ERR_FORMAT),
            ("table", |p| p.table = std::ptr::null(), ffi::KVW_ERR_NULL),
            ("ids", |p| p.ids = std::ptr::null(), ffi::KVW_ERR_NULL),
            ("out", |p| p.out = std::ptr::null_mut(), ffi::KVW_ERR_NULL),
            ("table unaligned", |p| p.table = 8 as _, ffi::KVW_ERR_ALIGN),
            ("out unaligned", |p| p.out = 4 as _, ffi::KVW_ERR_ALIGN),
            ("tokens", |p| p.tokens = 0, ffi::KVW_ERR_SHAPE),
            ("vocab", |p| p.vocab = 0, ffi::KVW_ERR_SHAPE),
            ("width", |p| p.width = 12, ffi::KVW_ERR_SHAPE),
            ("width 0", |p| p.width = 0, ffi::KVW_ERR_SHAPE),
            ("reserved", |p| p.reserved = 1, ffi::KVW_ERR_SHAPE),
        ],
    );
    assert_eq!(op!(kvw_embed).bytes(&valid), 3 * (4 + 16 * 6));
    assert_eq!(op!(kvw_embed).workspace(&valid), 0);
}

fn case<T: bytemuck::Pod>(
    run: &Run,
    dtype: i32,
    table: &[T],
    width: usize,
    ids: &[i32],
) -> Result<Vec<f32>, String> {
    let (t, i) = (run.upload("table", table), run.upload("ids", ids));
    let out = run.alloc::<f32>("out", ids.len() * width);
    let params = Params {
        struct_size: size_of::<Params>() as u32,
        dtype,
        table: t.ptr().cast(),
        ids: i.ptr(),
        out: out.ptr(),
        tokens: ids.len() as i32,
        vocab: (table.len() / width) as i32,
        width: width as i32,
        reserved: 0,
    };
    run.call(&op!(kvw_embed), &params)?;
    Ok(out.download())
}

fn all_types(run: &Run, width: usize, ids: &[i32]) -> Result<(), String> {
    let mut noise = Noise(8);
    let wide = noise.values(width * 10);
    let half: Vec<f16> = wide.iter().map(|&x| f16::from_f32(x)).collect();
    let brain: Vec<bf16> = wide.iter().map(|&x| bf16::from_f32(x)).collect();
    let brain_wide: Vec<f32> = brain.iter().map(|x| x.to_f32()).collect();
    for (got, table) in [
        (case(run, ffi::KVW_F32, &wide, width, ids)?, wide),
        (case(run, ffi::KVW_F16, &half, width, ids)?, widen(&half)),
        (case(run, ffi::KVW_BF16, &brain, width, ids)?, brain_wide),
    ] {
        let want = f64s(&oracle(&table, width, ids).unwrap());
        crate::cases::close("embed", &got, &want, 0.0, 0.0)?;
    }
    Ok(())
}

#[test]
fn executors_match_oracle() {
    for exec in executors(2) {
        for width in [8, 576, 2056] {
            all_types(&exec.start(), width, &[3, 0, 9, -1, 10, i32::MIN, 3]).unwrap();
        }
    }
}

#[test]
fn faults_are_caught() {
    assert_caught(351, "an id past the vocabulary is followed", |run| all_types(run, 64, &[1, 10]));
}
