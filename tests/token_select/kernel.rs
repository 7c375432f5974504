//! The CUDA kernels' side: one launch, held to the CPU path and to a sort.

use crate::exec::{Mem, Run, op};
use kvwarp::ffi::{self, kvw_token_select_params as Params};
use kvwarp::token_select::{Pool, above, kth, oracle_top_k, pool};
use std::ptr::{null, null_mut};

fn defaults(op: i32, rows: usize, n: usize) -> Params {
    Params {
        struct_size: size_of::<Params>() as u32,
        op,
        scores: null(),
        lens: null(),
        k: null(),
        indices: null_mut(),
        counts: null_mut(),
        kth: null_mut(),
        x: null(),
        first: null(),
        positions: null(),
        out: null_mut(),
        out_positions: null_mut(),
        workspace: null_mut(),
        rows: rows as i32,
        n: n as i32,
        ..Default::default()
    }
}

/// A call of a selection: rows of `n` scores, of which `lens` are in use.
pub struct Select<'a> {
    pub rows: &'a [Vec<f32>],
    pub n: usize,
    pub segment: usize,
    pub strict: bool,
    /// Of each segment.
    pub k: &'a [i32],
    pub index_stride: usize,
}

impl Select<'_> {
    /// Ascending indices of each row, and the k-th best of each segment.
    fn want(&self) -> (Vec<Vec<u32>>, Vec<f32>) {
        let (mut rows, mut best) = (Vec::new(), Vec::new());
        for (of_segment, &k) in self.rows.chunks(self.segment).zip(self.k) {
            let (all, k) = (of_segment.concat(), k.max(0) as usize);
            let last = kth(&all, k);
            let kept = match last {
                Some(last) if self.strict => above(&all, last),
                _ => oracle_top_k(&all, k),
            };
            best.push(last.unwrap_or(f32::NAN));
            let mut first = 0;
            for row in of_segment {
                let mine = first as u32..(first + row.len()) as u32;
                rows.push(
                    kept.iter().filter(|i| mine.contains(i)).map(|i| i - mine.start).collect(),
                );
                first += row.len();
            }
        }
        (rows, best)
    }

    /// Twice in one workspace: the same indices as the host's, in order, and nothing past them.
    pub fn matches(&self, run: &Run) -> Result<(), String> {
        let mut scores = Vec::new();
        for row in self.rows {
            scores.extend(row);
            scores.resize(scores.len() + self.n - row.len(), f32::INFINITY); // not in use
        }
        let lens: Vec<i32> = self.rows.iter().map(|row| row.len() as i32).collect();
        let (scores, d_lens) = (run.upload("scores", &scores), run.upload("lens", &lens));
        let k = run.upload("k", self.k);
        let op = op!(kvw_token_select);
        let mut params = Params {
            scores: scores.ptr(),
            lens: if lens.iter().all(|&len| len == self.n as i32) { null() } else { d_lens.ptr() },
            k: k.ptr(),
            segment: self.segment as i32,
            index_stride: self.index_stride as i32,
            ..defaults(
                if self.strict { ffi::KVW_SELECT_ABOVE } else { ffi::KVW_SELECT_TOP_K },
                self.rows.len(),
                self.n,
            )
        };
        params.workspace_bytes = op.workspace(&params);
        let workspace = run.upload("workspace", &vec![0u8; params.workspace_bytes.max(16)]);
        params.workspace = workspace.ptr().cast();
        // All but what slices leave: a ticket, eight counters and three histograms a segment.
        let clear = if params.workspace_bytes > 0 { 4 + self.k.len() * (8 + 3 * 2048) } else { 0 };
        let (want, best) = self.want();
        for turn in 0..2 {
            let indices = run.upload("indices", &vec![-7i32; self.rows.len() * self.index_stride]);
            let counts = run.alloc::<i32>("counts", self.rows.len());
            let found = run.alloc::<f32>("kth", self.k.len());
            let call =
                Params { indices: indices.ptr(), counts: counts.ptr(), kth: found.ptr(), ..params };
            run.call(&op, &call)?;
            let (indices, counts) = (indices.download(), counts.download());
            // Checked before the next turn, which would wait for ever for counters that are too high.
            if workspace.download()[..4 * clear].iter().any(|byte| *byte != 0) {
                return Err(format!("turn {turn}: the workspace is not left as it was found"));
            }
            for (r, want) in want.iter().enumerate() {
                let mut row: Vec<i32> = want.iter().map(|&i| i as i32).collect();
                row.resize(row.len().max(self.index_stride), -7);
                row.truncate(self.index_stride);
                if counts[r] as usize != want.len() {
                    return Err(format!(
                        "turn {turn}: row {r} has {}, want {}",
                        counts[r],
                        want.len()
                    ));
                }
                if indices[r * self.index_stride..][..self.index_stride] != row {
                    return Err(format!("turn {turn}: row {r}: indices differ"));
                }
            }
            for (got, want) in found.download().iter().zip(&best) {
                if got != want && !(got.is_nan() && want.is_nan()) {
                    return Err(format!("turn {turn}: k-th best {got}, want {want}"));
                }
            }
        }
        Ok(())
    }
}

/// `[rows, group, n]` pooled: the CPU path's bits.
pub fn pool_matches(
    run: &Run,
    scores: &[f32],
    (rows, group, n): (usize, usize, usize),
    (kind, width): (Pool, usize),
    lens: Option<&[i32]>,
) -> Result<(), String> {
    let (d_scores, d_lens) = (run.upload("scores", scores), lens.map(|l| run.upload("lens", l)));
    let out = run.upload("out", &vec![-7f32; rows * n]);
    let params = Params {
        scores: d_scores.ptr(),
        lens: d_lens.as_ref().map_or(null(), |l: &Mem<i32>| l.ptr()),
        out: out.ptr().cast(),
        group: group as i32,
        width: width as i32,
        pool: if kind == Pool::Avg { ffi::KVW_POOL_AVG } else { ffi::KVW_POOL_MAX },
        ..defaults(ffi::KVW_SELECT_POOL, rows, n)
    };
    run.call(&op!(kvw_token_select), &params)?;
    for (r, got) in out.download().chunks(n).enumerate() {
        let len = lens.map_or(n, |lens| lens[r] as usize);
        let used = scores[r * group * n..][..group * n].chunks(n).map(|row| &row[..len]);
        let mut want = vec![0.0; len];
        pool(&used.collect::<Vec<_>>().concat(), group, kind, width, &mut want);
        want.resize(n, -7.0);
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            if got.to_bits() != want.to_bits() && !(got.is_nan() && want.is_nan()) {
                return Err(format!("{kind:?} {width}: row {r}, column {i} is {got}, want {want}"));
            }
        }
    }
    Ok(())
}

/// Rows of `bytes` and positions gathered by `indices[r]`, from `first[r]` on.
pub fn gather_matches(
    run: &Run,
    indices: &[Vec<i32>],
    first: Option<&[i32]>,
    bytes: usize,
) -> Result<(), String> {
    let stride = indices.iter().map(Vec::len).max().unwrap() + 2;
    let from = |r: usize, i: i32| (first.map_or(0, |first| first[r]) + i) as usize;
    let every =
        indices.iter().enumerate().flat_map(|(r, row)| row.iter().map(move |&i| from(r, i)));
    let rows = every.max().unwrap() + 1;
    let x: Vec<u8> = (0..rows * bytes).map(|i| (i * 7 + i / 251) as u8).collect();
    let positions: Vec<i32> = (0..rows as i32).map(|i| i * 3 + 1).collect();
    let padded = |row: &Vec<i32>| [row.clone(), vec![i32::MAX / 2; stride - row.len()]].concat();
    let counts: Vec<i32> = indices.iter().map(|row| row.len() as i32).collect();
    let d_indices = run.upload("indices", &indices.iter().flat_map(padded).collect::<Vec<_>>());
    let (d_counts, d_x) = (run.upload("counts", &counts), run.upload("x", &x));
    let (d_positions, d_first) =
        (run.upload("positions", &positions), first.map(|first| run.upload("first", first)));
    let out = run.upload("out", &vec![0xA5u8; indices.len() * stride * bytes]);
    let out_positions = run.upload("out_positions", &vec![-7i32; indices.len() * stride]);
    let params = Params {
        indices: d_indices.ptr(),
        counts: d_counts.ptr(),
        x: d_x.ptr().cast(),
        first: d_first.as_ref().map_or(null(), |f| f.ptr()),
        positions: d_positions.ptr(),
        out: out.ptr().cast(),
        out_positions: out_positions.ptr(),
        index_stride: stride as i32,
        row_bytes: bytes as i32,
        ..defaults(ffi::KVW_SELECT_GATHER, indices.len(), 0)
    };
    run.call(&op!(kvw_token_select), &params)?;
    let (out, out_positions) = (out.download(), out_positions.download());
    for (r, row) in indices.iter().enumerate() {
        for i in 0..stride {
            let at = r * stride + i;
            let source = row.get(i).map(|&index| from(r, index));
            let want = source.map_or(vec![0xA5; bytes], |s| x[s * bytes..][..bytes].to_vec());
            if out[at * bytes..][..bytes] != want {
                return Err(format!("list {r}, entry {i}: another row"));
            }
            if out_positions[at] != source.map_or(-7, |s| positions[s]) {
                return Err(format!("list {r}, entry {i}: another position"));
            }
        }
    }
    Ok(())
}
