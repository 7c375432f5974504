//! Weight formats as they lie in GGUF files, and a checked view of one matrix.

use crate::error::{Error, Result};

/// How the elements of a weight matrix are stored. Quantised formats keep one or two scales a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightType {
    /// 32-bit floats.
    F32,
    /// IEEE half floats.
    F16,
    /// The upper halves of 32-bit floats.
    BF16,
    /// Blocks of 32: f16 `d`, 32 signed bytes `q`; value `q d`.
    Q8_0,
    /// Blocks of 32: f16 `d`, 16 bytes of nibbles `q`; value `(q - 8) d`.
    Q4_0,
    /// Blocks of 32: f16 `d`, f16 `m`, 16 bytes of nibbles `q`; value `q d + m`.
    Q4_1,
    /// Blocks of 256: f16 `d`, f16 `dmin`, 12 bytes of 6-bit `s` and `m` for 8 groups of 32, 128 bytes
    /// of nibbles `q`; value `q d s - dmin m`.
    Q4K,
    /// Blocks of 256: 128 bytes of low nibbles and 64 of high bit pairs of `q`, 16 signed bytes `s` for
    /// groups of 16, f16 `d`; value `(q - 32) d s`.
    Q6K,
}

/// The integer side of a quantised format: a value is `(code - bias) scale + offset`, with one scale
/// and one offset a group of codes and codes in an unsigned byte.
#[derive(Clone, Copy, Debug)]
pub(super) struct Quant {
    /// Codes that share a scale: 32 or 16.
    pub group: usize,
    /// Subtracted from every code; 0 where the format has offsets.
    pub bias: i32,
}

impl WeightType {
    /// Every format.
    pub const ALL: [Self; 8] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q8_0,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q4K,
        Self::Q6K,
    ];

    /// The format with this type number in a GGUF file, if it is one of these.
    #[must_use]
    pub fn from_ggml(id: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.ggml() == id)
    }

    /// The type number in a GGUF file.
    #[must_use]
    pub const fn ggml(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q8_0 => 8,
            Self::Q4K => 12,
            Self::Q6K => 14,
            Self::BF16 => 30,
        }
    }

    /// Elements of one block: a row is a whole number of blocks.
    #[must_use]
    pub const fn block(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q8_0 | Self::Q4_0 | Self::Q4_1 => 32,
            Self::Q4K | Self::Q6K => 256,
        }
    }

    /// Bytes of one block.
    #[must_use]
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q8_0 => 34,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q4K => 144,
            Self::Q6K => 210,
        }
    }

    /// Bytes of a row of `cols` elements; `None` where `cols` is not a whole number of blocks.
    #[must_use]
    pub const fn row_bytes(self, cols: usize) -> Option<usize> {
        if cols.is_multiple_of(self.block()) {
            (cols / self.block()).checked_mul(self.block_bytes())
        } else {
            None
        }
    }

    /// The integer side; `None` for float formats.
    pub(super) const fn quant(self) -> Option<Quant> {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => None,
            Self::Q8_0 => Some(Quant { group: 32, bias: 128 }),
            Self::Q4_0 => Some(Quant { group: 32, bias: 8 }),
            Self::Q4_1 | Self::Q4K => Some(Quant { group: 32, bias: 0 }),
            Self::Q6K => Some(Quant { group: 16, bias: 32 }),
        }
    }
}

/// A weight matrix `[rows, cols]` in the bytes of a GGUF tensor; lengths are checked once, here.
#[derive(Clone, Copy, Debug)]
pub struct Weights<'a> {
    kind: WeightType,
    rows: usize,
    cols: usize,
    row_bytes: usize,
    data: &'a [u8],
}

impl<'a> Weights<'a> {
    /// A view of `data`, which must be exactly `rows` rows of whole blocks. No alignment is needed.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for `cols` that is 0 or splits a block, [`Error::Len`] for wrong lengths,
    /// [`Error::TooBig`] where the size overflows.
    pub fn new(kind: WeightType, rows: usize, cols: usize, data: &'a [u8]) -> Result<Self> {
        let row_bytes = kind.row_bytes(cols).filter(|_| cols > 0).ok_or(Error::Unsupported {
            op: "linear",
            field: "cols",
            got: cols.to_string(),
            supported: "a positive multiple of the format's block (1, 32 or 256)",
        })?;
        let need = rows.checked_mul(row_bytes).ok_or(Error::TooBig { op: "linear", size: rows })?;
        if data.len() != need {
            return Err(Error::Len { op: "linear", buffer: "weights", need, got: data.len() });
        }
        Ok(Self { kind, rows, cols, row_bytes, data })
    }

    /// The format.
    #[must_use]
    pub const fn kind(&self) -> WeightType {
        self.kind
    }

    /// Outputs of the product.
    #[must_use]
    pub const fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs of the product.
    #[must_use]
    pub const fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes of one row.
    #[must_use]
    pub const fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    /// Bytes of the whole matrix: what one pass over it reads.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.data.len()
    }

    /// The bytes of one row; `row` is below [`Weights::rows`].
    pub(super) fn row(&self, row: usize) -> &'a [u8] {
        &self.data[row * self.row_bytes..][..self.row_bytes]
    }
}
