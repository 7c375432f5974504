//! LagKV's own choice (arXiv:2504.04704): of each partition of tokens that has a whole one after it, the best.

use kvwarp::pages::HeadView;
use kvwarp::{sim_evict, token_select};

use super::Evict;

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
    let lag = usize::from(evict.options.lag);
    let first = chosen.max(usize::from(evict.options.sink));
    let partitions = (head.len.saturating_sub(first) / lag).saturating_sub(1);
    if partitions == 0 {
        return Ok(None);
    }
    let (mut scores, keep) = (vec![0.0; partitions * lag], evict.keep.of(lag));
    sim_evict::lag(head, first, lag, partitions, 1.0, &mut scores)?;
    let mut slots: Vec<u32> = (chosen as u32..first as u32).collect();
    for (p, scores) in scores.chunks_exact(lag).enumerate() {
        let base = (first + p * lag) as u32;
        slots.extend(token_select::top_k(scores, keep).into_iter().map(|i| base + i));
    }
    let then = chosen + slots.len();
    slots.extend((first + partitions * lag) as u32..head.len as u32);
    Ok(Some((slots, then)))
}
