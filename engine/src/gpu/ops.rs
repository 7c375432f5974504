//! Ops of the C ABI on a platform's stream.

use std::fmt::Debug;
use std::rc::Rc;

use kvwarp::device::Gemm;
use kvwarp::ffi::{self, KVW_F16};
use kvwarp::kernels::{Kernels, Op};

use super::metered::Metered;
use super::platform::Result;
use super::weights::{Linear, Matrix};

/// Rows of `x` that the GEMV takes at once.
const GEMV_ROWS: usize = 16;
/// Up to this many rows a matrix that is not f16 goes through the GEMV in pieces: unpacking it would move more bytes.
pub const FEW_ROWS: usize = 4 * GEMV_ROWS;

/// Parameters of an op, its size filled in, what is not named 0.
macro_rules! params {
    ($type:ident { $($field:ident: $value:expr),* $(,)? }) => {
        {
            #[allow(clippy::needless_update)] // some ops have every field named
            let params = kvwarp::ffi::$type {
                struct_size: size_of::<kvwarp::ffi::$type>() as u32,
                $($field: $value,)*
                ..Default::default()
            };
            params
        }
    };
}
pub(super) use params;

/// A device address as the C ABI has it.
pub fn at<T>(address: u64) -> *mut T {
    address as *mut T
}

/// Ops, and products of any number of rows.
pub struct Ops {
    pub platform: Rc<Metered>,
    /// Room for an unpacked matrix, [`Matrix::unpacked_bytes`] of the largest; 0 where none is unpacked.
    pub unpacked: u64,
    /// `[tokens]` i32 zeros: the row of a bias.
    pub zeros: u64,
}

impl Ops {
    /// Enqueues an op. Addresses in `params` must be of live buffers of the platform, as long as the op's header says.
    pub fn run<P: Debug>(&self, op: impl Fn(&Kernels) -> &Op<P>, params: &P) -> Result<()> {
        // SAFETY: the engine takes every address from a `Buffer` that it owns, sized by the same model shape, context and
        // rows as the counts beside it; buffers are released in stream order, after what was enqueued before.
        unsafe { self.platform.run(op(self.platform.kernels()), None, params) }
    }

    /// Rows `ids` of a matrix as `out_dtype`, `[tokens, cols]`; all of it, in order, where `ids` is null.
    pub fn embed(&self, table: &Matrix, ids: u64, out: (u64, i32), tokens: usize) -> Result<()> {
        let params = params!(kvw_embed_params {
            dtype: table.dtype,
            table: at(table.buffer.at()),
            ids: at(ids),
            out: at(out.0),
            out_dtype: out.1,
            tokens: tokens as i32,
            vocab: table.rows as i32,
            width: table.cols as i32,
        });
        self.run(|k| &k.embed, &params)
    }

    /// `x` `[tokens, width]` f32, normalised, as f16.
    pub fn rms_norm(
        &self,
        x: u64,
        weight: u64,
        out: u64,
        shape: [usize; 2],
        eps: f32,
    ) -> Result<()> {
        let params = params!(kvw_rms_norm_params {
            eps: eps,
            x: at(x),
            weight: at(weight),
            out: at(out),
            tokens: shape[0] as i32,
            width: shape[1] as i32,
        });
        self.run(|k| &k.rms_norm, &params)
    }

    /// `x W^T + bias` of `x` `[tokens, cols]` f16 as f16.
    pub fn project(&self, linear: &Linear, x: u64, y: u64, tokens: usize) -> Result<()> {
        let bias = linear.bias.as_ref();
        if self.is_few(&linear.matrix, tokens) {
            let bias = bias.map_or(0, |bias| bias.buffer.at());
            return self.few(&linear.matrix, bias, x, (y, KVW_F16), tokens);
        }
        if let Some(bias) = bias {
            self.embed(bias, self.zeros, (y, KVW_F16), tokens)?;
        }
        self.many(&linear.matrix, x, (y, KVW_F16), bias.is_some(), tokens)
    }

    /// Adds `x W^T` to the residual stream `y`, f32.
    pub fn add(&self, matrix: &Matrix, x: u64, y: u64, tokens: usize) -> Result<()> {
        let y = (y, ffi::KVW_F32);
        match self.is_few(matrix, tokens) {
            true => self.few_added(matrix, 0, x, y, true, tokens),
            false => self.many(matrix, x, y, true, tokens),
        }
    }

    /// `x W^T` as f32; at most [`FEW_ROWS`] rows of a matrix that is not f16.
    pub fn logits(&self, matrix: &Matrix, x: u64, y: u64, tokens: usize) -> Result<()> {
        let y = (y, ffi::KVW_F32);
        match self.is_few(matrix, tokens) {
            true => self.few(matrix, 0, x, y, tokens),
            false => self.many(matrix, x, y, false, tokens),
        }
    }

    fn is_few(&self, matrix: &Matrix, tokens: usize) -> bool {
        tokens <= GEMV_ROWS || (matrix.dtype != KVW_F16 && tokens <= FEW_ROWS)
    }

    fn few(&self, matrix: &Matrix, bias: u64, x: u64, y: (u64, i32), tokens: usize) -> Result<()> {
        self.few_added(matrix, bias, x, y, false, tokens)
    }

    fn few_added(
        &self,
        matrix: &Matrix,
        bias: u64,
        x: u64,
        (y, y_dtype): (u64, i32),
        accumulate: bool,
        tokens: usize,
    ) -> Result<()> {
        let y_bytes = if y_dtype == KVW_F16 { 2 } else { 4 };
        for first in (0..tokens).step_by(GEMV_ROWS) {
            let params = params!(kvw_linear_params {
                dtype: matrix.dtype,
                weight: at(matrix.buffer.at()),
                x: at(x + (first * matrix.cols * 2) as u64),
                bias: at(bias),
                y: at(y + (first * matrix.rows * y_bytes) as u64),
                y_dtype: y_dtype,
                accumulate: i32::from(accumulate),
                tokens: GEMV_ROWS.min(tokens - first) as i32,
                rows: matrix.rows as i32,
                cols: matrix.cols as i32,
            });
            let (op, shape) = (&self.platform.kernels().linear, [matrix.rows, matrix.cols]);
            // SAFETY: as above.
            unsafe { self.platform.run(op, Some(shape), &params) }?;
        }
        Ok(())
    }

    fn many(
        &self,
        matrix: &Matrix,
        x: u64,
        (y, y_dtype): (u64, i32),
        accumulate: bool,
        tokens: usize,
    ) -> Result<()> {
        let weight = match matrix.dtype {
            KVW_F16 => matrix.buffer.at(),
            _ => {
                self.embed(matrix, 0, (self.unpacked, KVW_F16), matrix.rows)?;
                self.unpacked
            }
        };
        let Matrix { rows, cols, .. } = *matrix;
        self.platform.gemm(&Gemm { x, weight, y, y_dtype, accumulate, tokens, rows, cols })
    }
}

impl Matrix {
    /// Bytes of it in f16 where a product of many rows unpacks it first.
    pub fn unpacked_bytes(&self) -> usize {
        if self.dtype == KVW_F16 { 0 } else { 2 * self.rows * self.cols }
    }
}
