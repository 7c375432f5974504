//! LagKV's own choice (arXiv:2504.04704): of each partition of tokens that has a whole one after it, the best.

use kvwarp::pages::HeadView;
use kvwarp::{sim_evict, token_select};

use super::{Cut, Evict};
use crate::runner::Held;

/// What a head that has chosen among its first `chosen` tokens keeps of those after: their slots, ascending, and how many
/// tokens it has then chosen among. `None` while there are fewer than two partitions.
///
/// # Errors
/// Those of [`sim_evict::lag`].
pub fn choose(
    evict: &Evict,
    head: &HeadView<'_>,
    chosen: usize,
) -> kvwarp::Result<Option<(Vec<u32>, usize)>> {
    let Some(cut) = Cut::lag(evict, Held { len: head.len, packed: 0, chosen }) else {
        return Ok(None);
    };
    let mut scores = vec![0.0; cut.parts * cut.width];
    sim_evict::lag(head, cut.first, cut.width, cut.parts, 1.0, &mut scores)?;
    let best = |p: usize| token_select::top_k(&scores[p * cut.width..][..cut.width], cut.k);
    Ok(Some((cut.slots(chosen, best), cut.chosen())))
}
