//! LagKV's own choice (arXiv:2504.04704): of each partition of tokens that has a whole one after it, the best.

use std::sync::{Mutex, PoisonError};

use kvwarp::pages::HeadView;
use kvwarp::threads::Team;
use kvwarp::{sim_evict, token_select};

use super::{Cut, Evict};
use crate::runner::Held;

/// What a head that has chosen among its first `chosen` tokens keeps of those after: their slots, ascending, and how many
/// tokens it has then chosen among. `None` while there are fewer than two partitions.
///
/// # Errors
/// Those of [`sim_evict::lag`].
pub fn choose(
    team: &Team,
    evict: &Evict,
    head: &HeadView<'_>,
    chosen: usize,
) -> kvwarp::Result<Option<(Vec<u32>, usize)>> {
    let Some(cut) = Cut::lag(evict, Held { len: head.len, packed: 0, chosen }) else {
        return Ok(None);
    };
    let Cut { first, parts, width, .. } = cut;
    let (mut scores, each) = (vec![0.0; parts * width], parts.div_ceil(team.workers()) * width);
    let outcome = Mutex::new(Ok(()));
    team.each_chunk(&mut scores, each, |i, scores| {
        let scored =
            sim_evict::lag(head, first + i * each, width, scores.len() / width, 1.0, scores);
        if scored.is_err() {
            *outcome.lock().unwrap_or_else(PoisonError::into_inner) = scored;
        }
    });
    outcome.into_inner().unwrap_or_else(PoisonError::into_inner)?;
    let best = |p: usize| token_select::top_k(&scores[p * width..][..width], cut.k);
    Ok(Some((cut.slots(chosen, best), cut.chosen())))
}
