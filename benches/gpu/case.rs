//! A case: what it is called, how its memory is set up, and how it is measured.

use super::card::{Card, Launch};
use crate::record::Row;
use anyhow::{Result, ensure};
use half::f16;

/// Layers of a replayed graph; a few where a layer takes as long as many launches.
const LAYERS: usize = 32;
const LARGE_LAYERS: usize = 4;
const LARGE_BYTES: usize = 1 << 30;

/// A case with its memory set up: one launch a copy of what it reads.
pub struct Ready {
    pub launches: Vec<Launch>,
    /// `kvw_<op>_bytes`.
    pub bytes: usize,
    pub operations: f64,
    /// f16 outputs that must be finite and not all zero once a launch has run.
    pub output: Option<(u64, usize)>,
}

/// Sets a case up.
pub type Prepare = Box<dyn Fn(&Card) -> Result<Ready>>;
/// Microseconds of this many launches, or layers.
pub type Times<'a> = Box<dyn FnMut(usize) -> Result<Vec<f64>> + 'a>;

/// What a case is, in the words of a [`Row`], and how to set it up.
pub struct Case {
    pub row: Row,
    pub prepare: Prepare,
    /// Modes worth measuring: a prefill is no shorter in a graph.
    pub graph: bool,
}

impl Case {
    pub fn new(family: &str, format: &str, shape: &str, prepare: Prepare) -> Case {
        let row = Row {
            family: family.into(),
            format: format.into(),
            shape: shape.into(),
            context: 0,
            batch: 1,
            queries: 1,
            variant: String::new(),
            mode: String::new(),
            us: [f64::NAN; 3],
            bytes: 0.0,
            operations: 0.0,
            copy: f64::NAN,
            samples: 0,
        };
        Case { row, prepare, graph: true }
    }

    pub fn at(mut self, context: usize, batch: usize, queries: usize) -> Case {
        (self.row.context, self.row.batch, self.row.queries) = (context, batch, queries);
        self
    }

    pub fn variant(mut self, variant: String) -> Case {
        self.row.variant = variant;
        self
    }

    pub fn alone(mut self) -> Case {
        self.graph = false;
        self
    }

    /// The name without a mode.
    pub fn name(&self) -> String {
        self.row.name().trim_end_matches('/').to_owned()
    }

    pub fn modes(&self) -> &'static [&'static str] {
        if self.graph { &["graph", "alone"] } else { &["alone"] }
    }
}

/// Copies of `bytes` to go round so that L2 is cold: 250 MB and three times L2 at least, as far as memory goes.
/// What a layer reads in less than half a megabyte stays in L2, as it does in a model.
pub fn copies(card: &Card, bytes: usize) -> usize {
    let cold = (250 << 20).max(3 * card.l2);
    let wanted = cold.div_ceil(bytes.max(1)).clamp(1, 512);
    wanted.min(card.left() * 9 / 10 / bytes.max(1)).max(1)
}

impl Ready {
    pub fn layers(&self) -> usize {
        if self.bytes > LARGE_BYTES { LARGE_LAYERS } else { LAYERS }
    }

    /// One launch, and a look at what it wrote.
    pub fn warm_up(&self, card: &Card) -> Result<()> {
        card.launch(&self.launches[0])?;
        card.synchronize()?;
        let Some((at, n)) = self.output else { return Ok(()) };
        let out: Vec<f16> = card.download(at, n)?;
        ensure!(out.iter().all(|x| x.is_finite()), "the output is not finite");
        ensure!(out.iter().any(|x| *x != f16::ZERO), "the output is zero");
        Ok(())
    }

    /// Measures single launches (`alone`) or layers of replayed graphs (`graph`), going round the copies.
    pub fn measure<'a>(&'a self, card: &'a Card, mode: &str) -> Result<Times<'a>> {
        let n = self.launches.len();
        let mut turn = 0;
        if mode == "alone" {
            return Ok(Box::new(move |count| {
                let first = turn;
                turn += count;
                card.times(count, |i| card.launch(&self.launches[(first + i) % n]))
            }));
        }
        let layers = self.layers();
        let graphs = (0..n.div_ceil(layers))
            .map(|g| card.graph((0..layers).map(|l| &self.launches[(g * layers + l) % n])))
            .collect::<Result<Vec<_>>>()?;
        Ok(Box::new(move |count| {
            let first = turn;
            turn += count;
            let times = card.times(count, |i| Ok(graphs[(first + i) % graphs.len()].launch()?))?;
            Ok(times.into_iter().map(|us| us / layers as f64).collect())
        }))
    }
}
