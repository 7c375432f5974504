//! What a layer's queries tell about its tokens while they pass through.

use std::ops::Range;

use kvwarp::pages::HeadView;
use kvwarp::threads::Team;
use kvwarp::token_score::{self, Reduce, Scratch};

/// What is to be found beside the newest rows.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Wants {
    Nothing,
    /// Attention of all rows to each token.
    Sums,
    /// The most that any row gives to each of some tokens, among those of the ranges of slots.
    Most {
        tokens: Range<usize>,
        seen: Vec<Range<usize>>,
    },
}

/// Takes a layer's queries, piece by piece.
pub struct Observer {
    wants: Wants,
    /// Newest rows that are kept, to score by when the layer is done.
    newest: usize,
    /// Query heads of the model.
    q_heads: usize,
    /// Tokens of the read.
    n: usize,
    /// Slot of the first of them, by kv head.
    first: Vec<usize>,
    /// The newest queries so far, `[rows, H * G, D]`, and their log-sum-exps, `[rows, H * G]`.
    queries: Vec<f32>,
    lse: Vec<f32>,
    /// Sums `[H, G, n]` or maxima `[H, tokens]` so far.
    scores: Vec<f32>,
    scratch: Scratch,
}

impl Observer {
    /// For a layer that reads `n` tokens, into these slots.
    pub(super) fn new(
        (newest, wants): (usize, Wants),
        q_heads: usize,
        n: usize,
        first: Vec<usize>,
    ) -> Self {
        let scores = match &wants {
            Wants::Nothing => Vec::new(),
            Wants::Sums => vec![0.0; q_heads * n],
            Wants::Most { tokens, .. } => vec![0.0; first.len() * tokens.len()],
        };
        let (queries, lse, scratch) = (Vec::new(), Vec::new(), Scratch::default());
        Self { wants, newest, q_heads, n, first, queries, lse, scores, scratch }
    }

    /// Newest rows of a piece of `rows` whose log-sum-exps [`Observer::see`] asks for.
    pub fn rows(&self, rows: usize) -> usize {
        match &self.wants {
            Wants::Sums => rows,
            Wants::Nothing | Wants::Most { .. } => rows.min(self.newest),
        }
    }

    /// Takes the queries `q` `[rows, H * G, D]` of a piece, whose tokens are the newest of `heads`, and the log-sum-exps of
    /// the newest [`Observer::rows`] of them.
    ///
    /// # Errors
    /// Those of [`token_score::cpu`].
    pub fn see(
        &mut self,
        team: &Team,
        (q, rows): (&[f32], usize),
        lse: &[f32],
        heads: &[HeadView<'_>],
    ) -> kvwarp::Result<()> {
        self.remember((q, rows), lse);
        let Self { wants, q_heads, n, first, scores, scratch, .. } = self;
        match wants {
            Wants::Nothing => Ok(()),
            Wants::Sums => {
                // The tokens after this piece are not there yet.
                let count = heads[0].len - first[0];
                let mut sums = vec![0.0; *q_heads * count];
                let how = Reduce::Sum;
                token_score::cpu(
                    team, q, rows, lse, heads, 0.0, first, count, how, &mut sums, scratch,
                )?;
                for (all, sums) in scores.chunks_exact_mut(*n).zip(sums.chunks_exact(count)) {
                    all.iter_mut().zip(sums).for_each(|(all, sum)| *all += sum);
                }
                Ok(())
            }
            Wants::Most { tokens, seen } => {
                let mut lse = vec![0.0; rows * *q_heads];
                token_score::lse(team, q, rows, heads, 0.0, seen, &mut lse, scratch)?;
                let from: Vec<_> = first.iter().map(|first| first + tokens.start).collect();
                let (count, how) = (tokens.len(), Reduce::Max);
                token_score::cpu(
                    team, q, rows, &lse, heads, 0.0, &from, count, how, scores, scratch,
                )
            }
        }
    }

    fn remember(&mut self, (q, rows): (&[f32], usize), lse: &[f32]) {
        let (width, wanted) = (q.len() / rows, rows.min(self.newest));
        self.queries.extend_from_slice(&q[(rows - wanted) * width..]);
        self.lse.extend_from_slice(&lse[lse.len() - wanted * self.q_heads..]);
        let spare = (self.lse.len() / self.q_heads).saturating_sub(self.newest);
        self.queries.drain(..spare * width);
        self.lse.drain(..spare * self.q_heads);
    }

    /// Attention of the newest `rows` rows to each token of the read, `[H, G, n]`; `heads` hold all of them.
    ///
    /// # Errors
    /// As [`Observer::see`].
    pub(super) fn window(
        &mut self,
        team: &Team,
        rows: usize,
        heads: &[HeadView<'_>],
    ) -> kvwarp::Result<Vec<f32>> {
        let Self { q_heads, n, first, queries, lse, scratch, .. } = self;
        let rows = rows.min(lse.len() / *q_heads);
        let q = &queries[queries.len() - rows * *q_heads * heads[0].head_dim()..];
        let lse = &lse[lse.len() - rows * *q_heads..];
        let mut scores = vec![0.0; *q_heads * *n];
        let (count, how) = (*n, Reduce::Sum);
        token_score::cpu(team, q, rows, lse, heads, 0.0, first, count, how, &mut scores, scratch)?;
        Ok(scores)
    }

    /// Sums `[H, G, n]` or maxima `[H, tokens]`.
    pub fn into_scores(self) -> Vec<f32> {
        self.scores
    }
}
