//! Slabs that the kernels do not read as they are: fp8 becomes f16, metadata of bytes becomes f16.

use super::slabs::Slab;
use crate::lanes::{Lanes, Line, Row};
use crate::slab::{Format, Layout, Meta, Steps, TOKENS};

/// Where slabs are rewritten.
#[derive(Clone, Default)]
pub(crate) struct Room(Vec<Line>);

impl Room {
    /// The lines of `slabs` slabs of `layout`, for each the same number, 0 where they are read as they are.
    pub fn lines(&mut self, layout: &Layout, slabs: usize) -> (&mut [Line], usize) {
        let bytes = match (layout.format, layout.meta) {
            (Format::Fp8, _) => 4 * TOKENS * layout.head_dim,
            (_, Meta::U8) => 2 * (layout.k_meta_bytes() + layout.v_meta_bytes()),
            _ => 0,
        };
        if self.0.len() < slabs * bytes / 64 {
            self.0.resize(slabs * bytes / 64, [0; 64]);
        }
        (&mut self.0[..slabs * bytes / 64], bytes / 64)
    }
}

impl<'a> Slab<'a> {
    /// Reads from `room`, [`Room::lines`] of it, what `plain` cannot stand for where it is.
    #[inline(always)]
    pub fn make_plain<L: Lanes>(&mut self, l: L, plain: &'a Layout, room: &'a mut [Line]) {
        match (self.layout.format, self.layout.meta) {
            (Format::Fp8, _) => {
                let (k, v) = room.split_at_mut(room.len() / 2);
                widen(l, self.k, k);
                widen(l, self.v, v);
                (self.k, self.v, self.soon, self.unit) = (k, v, [&[] as &[Line]; 2], 256.0);
            }
            (_, Meta::U8) => {
                let bytes: &mut [u8] = room.as_flattened_mut();
                let (k, v) = bytes.split_at_mut(2 * self.layout.k_meta_bytes());
                let group = 2 * self.layout.k_minima();
                for (from, to) in self.k_meta.chunks_exact(group).zip(k.chunks_exact_mut(2 * group))
                {
                    to_halves(l, self.steps[0], from, to);
                }
                to_halves(l, self.steps[1], self.v_meta, v);
                (self.k_meta, self.v_meta) = (k, v);
            }
            _ => {}
        }
        self.layout = plain;
    }
}

/// Bytes of e4m3 as f16 of 2^-8 of their value: exponent and mantissa move to their places, the exponent's bias is 8
/// more. Slots 0 and 1 of the words of a unit are the pairs of two units of f16.
#[inline(always)]
fn widen<L: Lanes>(l: L, from: &[Line], to: &mut [Line]) {
    const KEEP: [Row<i32>; 2] = [
        Row([-1, -1, 0, 0, -1, -1, 0, 0, -1, -1, 0, 0, -1, -1, 0, 0]),
        Row([0, 0, -1, -1, 0, 0, -1, -1, 0, 0, -1, -1, 0, 0, -1, -1]),
    ];
    let (digits, sign) = (l.int(0x3F80_3F80), l.int(0x8000_8000_u32 as i32));
    let (low, high) = (l.get_int(&KEEP[0]), l.get_int(&KEEP[1]));
    for (from, to) in from.as_chunks::<8>().0.iter().zip(to.as_chunks_mut::<16>().0) {
        for (r, line) in from.iter().enumerate() {
            let word = l.line(line);
            let slot0 = l.or(l.and(l.shl(word, 7), digits), l.and(l.shl(word, 8), sign));
            let slot1 = l.or(l.and(l.shr(word, 1), digits), l.and(word, sign));
            for (w, (a, b)) in l.double(slot0).into_iter().zip(l.double(slot1)).enumerate() {
                let mut row = Row::default();
                l.put_int(&mut row, l.or(l.and(a, low), l.and(b, high)));
                to[8 * w + r] = bytemuck::cast(row.0.map(i32::to_le_bytes));
            }
        }
    }
}

/// Scales, then minima, as f16.
#[inline(always)]
fn to_halves<L: Lanes>(l: L, steps: Steps, from: &[u8], to: &mut [u8]) {
    let (scales, minima) = from.split_at(from.len() / 2);
    let (to_scales, to_minima) = to.split_at_mut(from.len());
    let sections =
        [(scales, to_scales, steps.scale, 0.0), (minima, to_minima, steps.minimum, steps.base)];
    for (from, to, step, base) in sections {
        for (from, to) in from.as_chunks::<16>().0.iter().zip(to.as_chunks_mut::<32>().0) {
            let mut x = [0.0; 16];
            for (i, x) in x.iter_mut().enumerate() {
                *x = f32::from(from[i / 4 * 4 + i % 2 * 2 + i / 2 % 2]);
            }
            let x = l.add(l.mul(l.get(&x), l.splat(step)), l.splat(base));
            *to = bytemuck::cast(l.to_half(x).map(u16::to_le_bytes));
        }
    }
}
