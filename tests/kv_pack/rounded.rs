//! Codes chosen otherwise than KIVI's: a share of the range, feedback of K's errors.

use super::device::{FP8, Host, MIXED, TWO_LEVEL};
use super::ops::{fill_and_flush, stream};
use crate::exec::everyone;
use kvwarp::slab::Format;

/// Every format that has groups, f16 metadata.
pub const GROUPS: Host = Host { formats: &[Format::Q2, Format::Q4, Format::Q8], ..MIXED };

#[test]
fn slabs_are_the_codecs_of_every_rounding() {
    for exec in everyone(1) {
        for d in [64, 96, 128, 256] {
            for (group, host) in
                [(32, GROUPS), (64, GROUPS), (128, GROUPS), (32, TWO_LEVEL), (64, TWO_LEVEL)]
            {
                for (range, feedback) in [(0.1, false), (1.0, true), (0.9, true)] {
                    let host = Host { d, group, heads: 2, slabs: 4, range, feedback, ..host };
                    fill_and_flush(&exec.start(), &host, &[256])
                        .unwrap_or_else(|e| panic!("{exec:?} {range} {feedback}: {e}"));
                }
            }
        }
        let host = Host { range: 0.9, feedback: true, ..FP8 };
        fill_and_flush(&exec.start(), &host, &[192]).unwrap();
    }
}

#[test]
fn a_slab_that_leaves_is_the_codecs_of_every_rounding() {
    for exec in everyone(2) {
        let run = exec.start();
        for (host, group, window) in [(GROUPS, 32, 65), (TWO_LEVEL, 64, 0)] {
            let host = Host { d: 96, group, window, heads: 2, range: 0.9, feedback: true, ..host };
            stream(&run, &Host { slabs: 4, ..host }, 195).unwrap();
        }
    }
}
