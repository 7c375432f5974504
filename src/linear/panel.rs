//! A panel: 16 rows of weights, decoded and interleaved so that a vector holds one column of all.

use super::blocks;
use super::kind::Weights;
use crate::simd::Level;
use std::cell::RefCell;
use std::ops::Range;

/// Rows of a panel.
pub(super) const ROWS: usize = 16;

/// One value of each row.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Lanes<T>(pub [T; ROWS]);

/// Codes of 16 rows: four consecutive codes of a row are one word.
#[derive(Default)]
pub(super) struct Codes {
    /// `[cols / 4]`.
    pub words: Vec<Lanes<u32>>,
    /// `[cols / group]`.
    pub scale: Vec<Lanes<f32>>,
    /// `[cols / group]`.
    pub offset: Vec<Lanes<f32>>,
}

/// A worker's buffers, kept between calls.
#[derive(Default)]
pub(super) struct Scratch {
    pub codes: Codes,
    /// Decoded floats of 16 rows, `[cols]`.
    pub floats: Vec<Lanes<f32>>,
    /// One decoded row.
    pub row: Vec<f32>,
    pub row_codes: Vec<u8>,
    pub row_scale: Vec<f32>,
    pub row_offset: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Runs `body` with this thread's buffers.
pub(super) fn with_scratch(body: impl FnOnce(&mut Scratch)) {
    SCRATCH.with(|cell| {
        let mut scratch = cell.take();
        body(&mut scratch);
        cell.replace(scratch);
    });
}

impl Scratch {
    /// Decodes one row to floats.
    pub fn decode_row(&mut self, level: Level, weights: &Weights<'_>, row: usize) {
        self.row.resize(weights.cols(), 0.0);
        blocks::dequantize(level, weights.kind(), weights.row(row), &mut self.row);
    }

    /// Decodes one row to codes, scales and offsets.
    pub fn unpack_row(&mut self, level: Level, weights: &Weights<'_>, row: usize, group: usize) {
        let (cols, groups) = (weights.cols(), weights.cols() / group);
        self.row_codes.resize(cols, 0);
        self.row_scale.resize(groups, 0.0);
        self.row_offset.resize(groups, 0.0);
        let (codes, scale, offset) =
            (&mut self.row_codes, &mut self.row_scale, &mut self.row_offset);
        blocks::unpack(level, weights.kind(), weights.row(row), codes, scale, offset);
    }

    /// Decodes up to 16 rows to interleaved codes; missing rows are zero.
    pub fn unpack_panel(
        &mut self,
        level: Level,
        weights: &Weights<'_>,
        rows: Range<usize>,
        group: usize,
    ) {
        let (words, groups) = (weights.cols() / 4, weights.cols() / group);
        if rows.len() < ROWS {
            self.codes = Codes::default();
        }
        self.codes.words.resize(words, Lanes([0; ROWS]));
        self.codes.scale.resize(groups, Lanes([0.0; ROWS]));
        self.codes.offset.resize(groups, Lanes([0.0; ROWS]));
        for (lane, row) in rows.enumerate() {
            self.unpack_row(level, weights, row, group);
            let codes = self.row_codes.as_chunks().0.iter().map(|&word| u32::from_le_bytes(word));
            interleave(lane, codes, &mut self.codes.words);
            interleave(lane, self.row_scale.iter().copied(), &mut self.codes.scale);
            interleave(lane, self.row_offset.iter().copied(), &mut self.codes.offset);
        }
    }

    /// Decodes up to 16 rows to interleaved floats; missing rows are zero.
    pub fn decode_panel(&mut self, level: Level, weights: &Weights<'_>, rows: Range<usize>) {
        if rows.len() < ROWS {
            self.floats.clear();
        }
        self.floats.resize(weights.cols(), Lanes([0.0; ROWS]));
        for (lane, row) in rows.enumerate() {
            self.decode_row(level, weights, row);
            interleave(lane, self.row.iter().copied(), &mut self.floats);
        }
    }
}

fn interleave<T>(lane: usize, values: impl Iterator<Item = T>, out: &mut [Lanes<T>]) {
    for (out, value) in out.iter_mut().zip(values) {
        out.0[lane] = value;
    }
}
