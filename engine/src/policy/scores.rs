//! Scores of methods that need one layer alone.

use kvwarp::pages::HeadView;
use kvwarp::sim_evict;
use kvwarp::threads::Team;
use kvwarp::token_select::{self, Pool};

use super::choose::Scored;
use super::{Cut, Evict, Method, Observer};

/// `[heads, n]` of a method that asks for layer `layer` alone.
pub(super) fn scores(
    (evict, layer): (&Evict, usize),
    scored: &Scored,
    heads: &[HeadView<'_>],
    observer: Option<Observer>,
    team: &Team,
) -> kvwarp::Result<Vec<f32>> {
    let (n, (sink, newest)) = (scored.n, scored.protects);
    let mut scores = vec![0.0; heads.len() * n];
    match (evict.method(), observer) {
        (Method::Window, Some(mut observer)) => {
            let open = scored.open();
            let attention = observer.window(team, newest, heads)?;
            let kind = if evict.options.max { Pool::Max } else { Pool::Avg };
            let group = attention.len() / (heads.len() * n);
            for (scores, group_rows) in
                scores.chunks_exact_mut(n).zip(attention.chunks_exact(group * n))
            {
                let rows = group_rows.chunks_exact(n).flat_map(|row| &row[..open]);
                let rows: Vec<f32> = rows.copied().collect();
                token_select::pool(
                    &rows,
                    group,
                    kind,
                    evict.options.pool.into(),
                    &mut scores[..open],
                );
            }
        }
        (Method::Column, Some(observer)) => {
            let attention = observer.into_scores();
            let group = attention.len() / (heads.len() * n);
            for (scores, rows) in scores.chunks_exact_mut(n).zip(attention.chunks_exact(group * n))
            {
                for row in rows.chunks_exact(n) {
                    scores.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
                }
            }
        }
        (Method::LagRanked, _) if newest > 0 => {
            for ((scores, head), &first) in scores.chunks_exact_mut(n).zip(heads).zip(&scored.first)
            {
                ranked(evict, head, first + sink, &mut scores[sink..n - newest])?;
            }
        }
        (Method::KeyNorm, _) => {
            for ((scores, head), &first) in scores.chunks_exact_mut(n).zip(heads).zip(&scored.first)
            {
                sim_evict::key_norms(head, first..first + n, scores)?;
                scores.iter_mut().for_each(|norm| *norm = -*norm);
            }
        }
        // Also LagKV of texts too short for two partitions.
        _ => return Ok(all_unseen(evict, layer, heads.len(), n)),
    }
    Ok(scores)
}

/// `[heads, n]` of a method that looks at no token.
pub(crate) fn all_unseen(evict: &Evict, layer: usize, heads: usize, n: usize) -> Vec<f32> {
    (0..n).map(|i| unseen(evict, layer, i)).collect::<Vec<_>>().repeat(heads)
}

/// kvpress's LagKV: the rank of each token within its partition, as a share.
fn ranked(
    evict: &Evict,
    head: &HeadView<'_>,
    first: usize,
    scores: &mut [f32],
) -> kvwarp::Result<()> {
    let lag = usize::from(evict.options.lag);
    sim_evict::lag(head, first, lag, scores.len() / lag, 1.0, scores)?;
    rank(scores, lag);
    Ok(())
}

/// Makes of scores their ranks within partitions of `lag`, as shares.
pub(crate) fn rank(scores: &mut [f32], lag: usize) {
    for scores in scores.chunks_exact_mut(lag) {
        let mut order: Vec<usize> = (0..lag).collect();
        order.sort_by(|&a, &b| scores[a].total_cmp(&scores[b]));
        for (rank, i) in order.into_iter().enumerate() {
            scores[i] = rank as f32 / lag as f32;
        }
    }
}

/// Score of token `i` by a method that looks at no token: the newer, or chance.
fn unseen(evict: &Evict, layer: usize, i: usize) -> f32 {
    if evict.method() != Method::Random {
        return i as f32;
    }
    let seed = u64::from(evict.options.seed) << 32 | layer as u64;
    (kvwarp::sample::draw(seed, i as i32) >> 40) as f32
}

/// The best of `cut`'s only stretch, where the method looks at no token.
pub(crate) fn best_unseen(evict: &Evict, layer: usize, cut: &Cut) -> Option<Vec<u32>> {
    matches!(evict.method(), Method::Recent | Method::Random).then(|| {
        let score = |i| unseen(evict, layer, cut.first + i);
        token_select::top_k(&(0..cut.width).map(score).collect::<Vec<_>>(), cut.k)
    })
}
