//! Queries that become dense and keys that stay in their rows, in one launch.

use super::{CASE, Case, PAIRINGS, Params};
use crate::exec::{Run, everyone, op};
use half::f16;
use kvwarp::rope_select::{Scaling, inv_freq};

impl Case {
    /// Whether heads are turned as without `rest`, its heads in the rows of `x`, the others densely.
    pub fn parted(
        &self,
        run: &Run,
        x: &[f16],
        positions: &[i32],
        rest: usize,
    ) -> Result<(), String> {
        let (row, own) = (self.heads * self.d, (self.heads - rest) * self.d);
        let freq = inv_freq(500000.0, self.d, Scaling::None);
        let turn = |apart: bool| {
            let (dx, dense) = (run.upload("x", x), run.alloc::<f16>("out", positions.len() * own));
            let (dp, df) = (run.upload("positions", positions), run.upload("inv_freq", &freq));
            let keys = dx.ptr().wrapping_add(own).cast();
            let whole = self.params((&dx, &dx), (&dp, &df), positions.len());
            let (out, out_stride) = (dense.ptr().cast(), own as i64);
            let (rest_heads, rest_stride) = (rest as i32, row as i64);
            let parted = Params { out, out_stride, rest: keys, rest_heads, rest_stride, ..whole };
            run.call(&op!(kvw_rope_select), if apart { &parted } else { &whole })?;
            Ok::<_, String>((dx.download(), if apart { dense.download() } else { Vec::new() }))
        };
        let ((whole, _), (left, dense)) = (turn(false)?, turn(true)?);
        for (i, want) in whole.chunks_exact(row).enumerate() {
            let keys = &left[i * row..][..row];
            if dense[i * own..][..own] != want[..own] || keys[own..] != want[own..] {
                return Err(format!("token {i}: not what one launch for all gives"));
            }
            if keys[..own] != x[i * row..][..own] {
                return Err(format!("token {i}: queries were written where they lie"));
            }
        }
        Ok(())
    }
}

#[test]
fn queries_and_keys_part() {
    for exec in everyone(2) {
        let run = exec.start();
        for (d, hadamard) in
            [(64, false), (64, true), (80, false), (96, true), (128, true), (256, true)]
        {
            for pairing in PAIRINGS {
                let case = Case { d, pairing, hadamard, ..CASE };
                case.parted(&run, &case.noise(3), &[5, 0, 131072], 3).unwrap();
            }
        }
    }
}
