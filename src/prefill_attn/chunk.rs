//! Some queries of one kv head with all its query heads, as rows: queries, heads within.

use super::rows::Rows;
use crate::error::{Error, Result};
use crate::paged_attn::{MAX_GROUP, check_head};
use crate::pages::HeadView;
use std::ops::Range;

/// Query rows that are worked on together: enough to pay for decoding the slabs, few enough to stay in the
/// second-level cache.
const ROWS: usize = 384;

/// What the arguments of an op over query rows come to.
pub(crate) struct Shape {
    pub head_dim: usize,
    /// Query heads a kv head, G, and in all, H * G.
    pub group: usize,
    pub q_heads: usize,
    /// Of `q . k`, base 2.
    pub scale: f32,
    /// Queries.
    pub n: usize,
}

pub(crate) fn unsupported<T>(
    op: &'static str,
    field: &'static str,
    got: usize,
    supported: &'static str,
) -> Result<T> {
    Err(Error::Unsupported { op, field, got: got.to_string(), supported })
}

pub(crate) fn check_len(
    op: &'static str,
    buffer: &'static str,
    need: usize,
    got: usize,
) -> Result<()> {
    if got == need { Ok(()) } else { Err(Error::Len { op, buffer, need, got }) }
}

impl Shape {
    /// `q` `[n, H * G, D]`, a view a kv head that holds at least `n` tokens, `scale` 0 for `1 / sqrt(D)`.
    pub fn of(
        op: &'static str,
        q: &[f32],
        n: usize,
        heads: &[HeadView<'_>],
        scale: f32,
    ) -> Result<Self> {
        let Some(head_dim) = heads.first().map(HeadView::head_dim) else {
            return unsupported(op, "heads", 0, "at least 1");
        };
        let q_heads = q.len() / (n.max(1) * head_dim);
        let group = q_heads / heads.len();
        let whole = q.len() == n * heads.len() * group * head_dim;
        if !whole || n > 0 && (group == 0 || group > MAX_GROUP) {
            return unsupported(op, "q", q.len(), "n times 1 to 16 rows of D for each kv head");
        }
        for head in heads {
            if head.head_dim() != head_dim {
                return unsupported(op, "head_dim", head.head_dim(), "the same for every head");
            }
            if head.len < n {
                return unsupported(op, "len", head.len, "at least n");
            }
            check_head(op, head)?;
        }
        let scale = if scale == 0.0 { (head_dim as f32).powf(-0.5) } else { scale };
        Ok(Self { head_dim, group, q_heads, scale: scale * std::f32::consts::LOG2_E, n })
    }

    /// Queries of a chunk, at least two chunks for each of `workers`.
    pub fn chunk(&self, heads: usize, workers: usize) -> usize {
        self.most_queries().min((self.n * heads).div_ceil(2 * workers).max(16))
    }

    /// Most queries that are worked on together.
    pub fn most_queries(&self) -> usize {
        ROWS / self.group
    }
}

/// Queries `range` of kv head `h`.
pub(crate) struct Chunk<'a> {
    pub shape: &'a Shape,
    /// `[n, H * G, D]`.
    pub q: &'a [f32],
    pub head: &'a HeadView<'a>,
    pub h: usize,
    pub range: Range<usize>,
}

impl Chunk<'_> {
    pub fn rows(&self) -> usize {
        self.range.len() * self.shape.group
    }

    /// The token after the one that query `i` is.
    pub fn end(&self, i: usize) -> usize {
        self.head.len - self.shape.n + i + 1
    }

    /// [`Self::end`] of the query of row `row`.
    pub fn row_end(&self, row: usize) -> usize {
        self.end(self.range.start + row / self.shape.group)
    }

    /// Index of row `row` among all rows `[n, H * G]`.
    pub fn index(&self, row: usize) -> usize {
        let (query, g) = (self.range.start + row / self.shape.group, row % self.shape.group);
        query * self.shape.q_heads + self.h * self.shape.group + g
    }

    /// Puts row `row` where it belongs in its block of `M`.
    pub fn put<const M: usize>(&self, row: usize, rows: &mut Rows<M>) {
        let d = self.shape.head_dim;
        rows.set(row % M, &self.q[self.index(row) * d..][..d], self.shape.scale);
    }
}
