//! Slab formats in attention, one at a time: what is special about each.

use crate::cache::Spec;
use crate::exec::{Run, assert_caught};
use crate::paged_attn::{CALL, matches};
use kvwarp::slab::Format;

/// Slabs of `format` only, and the ring.
fn only(format: Format) -> Spec {
    Spec { formats: vec![Some(format)], lens: vec![64 * 5 + 21], ..Spec::default() }
}

#[test]
fn faults_are_caught() {
    let q8 = |run: &Run| matches(run, &only(Format::Q8), CALL);
    assert_caught(115, "8-bit V is weighed as if its fold did not count", q8);
    assert_caught(116, "8-bit codes meet the query words in the order of the minima", q8);
}
