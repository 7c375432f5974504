//! Conversion of a model to EliteKV (arXiv:2503.01586): of each kv head some pairs keep their rotation, the other channels of
//! its keys and its values come from a latent vector that all heads of a layer share, so that a cache holds `2 r kv_heads + c`
//! elements of a token instead of `2 kv_heads head_dim`.
//!
//! 1. [`search`]: which pairs matter, on queries and keys of a text;
//! 2. [`budget`]: how many of them, and how long the latent vector, for the ratio asked for;
//! 3. factors of the projections, of the weights alone, or as inputs, queries and output projections are;
//! 4. recovery, in closed form and then by gradients;
//! 5. [`write()`]: a folder like Hugging Face's, which every command reads ([`crate::config::Elite`]).

mod algebra;
pub mod budget;
mod distil;
mod error;
mod learn;
mod refit;
pub mod search;
mod staged;
mod state;
mod weigh;
mod write;

use std::path::Path;

use faer::Mat;
use sha2::{Digest, Sha256};

use crate::calibration::fingerprint;
use crate::config::Config;
use crate::model::Model;
use crate::perplexity::{Reading, score};
use crate::source::Source;
use crate::spec::CacheSpec;
use crate::watch::Watch;
use algebra::factors;
pub use budget::Budget;
pub use error::ConvertError;
use staged::{Factors, Projections, channels, put};
use state::{Of, State};
use weigh::Weights;
pub use write::{Elements, write};

/// Tokens of a piece of a text whose perplexity is measured.
const PIECE: usize = 512;

/// How much of the cache is to stay.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Target {
    /// At most this share of its elements; the best budget of the grid for it is searched.
    Ratio(f64),
    /// This.
    Fixed(Budget),
}

/// What to do.
#[derive(Debug, Clone)]
pub struct Request<'a> {
    /// How much is to stay.
    pub target: Target,
    /// Factors follow activations; else weights alone.
    pub whiten: bool,
    /// Closed-form recovery.
    pub refit: bool,
    /// Steps of recovery by gradients, a layer.
    pub distil: usize,
    /// To learn from.
    pub tokens: &'a [u32],
    /// Of these, those that pairs are chosen on.
    pub searched: usize,
    /// Tokens that are read together, each piece from its own beginning.
    pub window: usize,
    /// To choose the budget on; not learnt from.
    pub chosen_on: &'a [u32],
    /// To measure perplexity on; not learnt from.
    pub held: &'a [u32],
}

/// What a stage costs.
#[derive(Debug, Clone, PartialEq)]
pub struct Stage {
    /// `source`, `pairs`, `factors`, `refit` or `distil`.
    pub name: &'static str,
    /// Log-perplexity of the held text.
    pub nats: f64,
}

/// A model that has been converted, in memory.
pub struct Converted {
    /// It; [`write()`] makes files of it.
    pub staged: Source,
    /// What was kept.
    pub budget: Budget,
    /// Elements of the cache against those of the source.
    pub ratio: f64,
    /// What each stage cost.
    pub stages: Vec<Stage>,
    /// Log-perplexity of what budgets are chosen on, with each that was tried.
    pub tried: Vec<(Budget, f64)>,
}

/// Converts the model of `source`; `beside` is the file that an interrupted conversion goes on from, and stays until
/// [`finish`]. `stage` is told of each stage that is done.
///
/// # Errors
/// [`ConvertError`].
pub fn convert(
    (source, model): (&Source, &Model<'_>),
    request: &Request<'_>,
    beside: &Path,
    watch: &mut Watch<'_>,
    stage: &mut dyn FnMut(&Stage),
) -> Result<Converted, ConvertError> {
    let config = &source.config;
    for part in ["blk.0.attn_q_norm", "blk.0.attn_k_norm"] {
        if source.weights.get(part).is_some() {
            let why = "keys or queries that are normalised are not linear in a layer's input";
            return Err(ConvertError::Refused(format!("the model has `{part}`: {why}")));
        }
    }
    let budgets = budgets(config, request.target)?;
    let rounds = budgets.iter().map(|budget| budget.pairs).max().unwrap_or(0);
    let shape = [config.kv_heads, config.head_dim / 2];
    let mut state = State::open(beside, of(source, request, rounds), shape)?;
    let mut stages = Vec::new();
    let mut note = |name, of: &Model<'_>, watch: &mut Watch<'_>| {
        stages.push(Stage { name, nats: nats(of, request.held, watch)? });
        stages.last().into_iter().for_each(&mut *stage);
        Ok::<_, ConvertError>(())
    };
    note("source", model, watch)?;
    let moments = learn::learn((source, model), request, rounds, &mut state, watch)?;
    let learnt = Learnt { source, model, moments: request.whiten.then_some(&moments) };
    let budget = learnt.best(&budgets, request, &mut state, watch)?;
    let full = Budget { rank: Budget::most(budget.pairs, config), ..budget };
    note("pairs", &model.like(&learnt.factorised(&state.orders, full)?)?, watch)?;
    let mut staged = learnt.factorised(&state.orders, budget)?;
    note("factors", &model.like(&staged)?, watch)?;
    if request.refit {
        let streams = learn::streams(model, request.tokens, request.window)?;
        refit::refit((source, model), &mut staged, budget, streams, watch)?;
        note("refit", &model.like(&staged)?, watch)?;
    }
    if request.distil > 0 {
        let streams = learn::streams(model, request.tokens, request.window)?;
        distil::distil((source, model), &mut staged, request.distil, streams, watch)?;
        note("distil", &model.like(&staged)?, watch)?;
    }
    let ratio = budget.elements(config) as f64 / (2 * config.kv_heads * config.head_dim) as f64;
    let budget_of = |&(pairs, rank, nats)| (Budget { pairs, rank }, nats);
    let tried = state.tried.iter().map(budget_of).collect();
    Ok(Converted { staged, budget, ratio, stages, tried })
}

/// Removes what an interrupted conversion would have gone on from.
///
/// # Errors
/// [`ConvertError::State`].
pub fn finish(beside: &Path) -> Result<(), ConvertError> {
    match std::fs::remove_file(beside) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(ConvertError::State { path: beside.into(), why: e.to_string() })
        }
        _ => Ok(()),
    }
}

/// Budgets among which the best is to be found.
fn budgets(config: &Config, target: Target) -> Result<Vec<Budget>, ConvertError> {
    if config.elite.is_some() {
        return Err(ConvertError::Refused("the model has been converted already".into()));
    }
    match target {
        Target::Fixed(budget) => match budget.refusal(config) {
            Some(why) => Err(ConvertError::Refused(why)),
            None => Ok(vec![budget]),
        },
        Target::Ratio(ratio) => {
            let grid = budget::grid(config, ratio);
            if grid.is_empty() {
                let (step, heads) = (budget::step(config), config.kv_heads);
                return Err(ConvertError::Refused(format!(
                    "a ratio of {ratio}: no rank that is a multiple of {step} and pair of {heads} kv heads fits"
                )));
            }
            Ok(grid)
        }
    }
}

/// Rows that pass through a layer, or are searched, in a conversion: what its `watch` is given in all.
///
/// # Errors
/// [`ConvertError::Refused`].
pub fn work(config: &Config, request: &Request<'_>) -> Result<usize, ConvertError> {
    let budgets = budgets(config, request.target)?;
    let rounds = budgets.iter().map(|budget| budget.pairs).max().unwrap_or(0);
    let chosen = if budgets.len() > 1 { budgets.len() * request.chosen_on.len() } else { 0 };
    // Source, pairs, factors; then the fit: the source, the converted layer before and after its output is fitted.
    let (stages, passes) = if request.refit { (4, 4) } else { (3, 1) };
    let mut rows = stages * request.held.len() + passes * request.tokens.len() + chosen;
    if request.distil > 0 {
        let texts = request.tokens.len().div_ceil(request.window);
        rows += request.held.len() + distil::work(texts, request.window, request.distil);
    }
    Ok(config.layers * (rows + rounds * request.searched))
}

/// What a conversion is of.
fn of(source: &Source, request: &Request<'_>, rounds: usize) -> Of {
    let mut hash = Sha256::new();
    for tokens in [request.tokens, request.chosen_on] {
        hash.update((tokens.len() as u64).to_le_bytes());
        tokens.iter().for_each(|token| hash.update(token.to_le_bytes()));
    }
    Of {
        version: Of::VERSION,
        model: fingerprint(source),
        text: format!("{:x}", hash.finalize()),
        window: request.window,
        searched: request.searched,
        rounds,
        whitened: request.whiten,
    }
}

/// Log-perplexity of a text that is read piece by piece.
fn nats(model: &Model<'_>, tokens: &[u32], watch: &mut Watch<'_>) -> Result<f64, ConvertError> {
    let reading = Reading { cache: CacheSpec::default(), prefix: 0, piece: PIECE };
    Ok(score(model, tokens, &reading, watch)?.mean())
}

/// What factors are made of.
struct Learnt<'a> {
    source: &'a Source,
    model: &'a Model<'a>,
    /// Second moments of the inputs of attention, where factors follow them.
    moments: Option<&'a Vec<Mat<f64>>>,
}

impl Learnt<'_> {
    /// Of several budgets the one with which a text is predicted best.
    fn best(
        &self,
        budgets: &[Budget],
        request: &Request<'_>,
        state: &mut State,
        watch: &mut Watch<'_>,
    ) -> Result<Budget, ConvertError> {
        let mut best = (f64::INFINITY, budgets[0]);
        for &budget in budgets.iter().filter(|_| budgets.len() > 1) {
            let nats = match state.tried(budget) {
                Some(nats) => nats,
                None => {
                    let staged = self.factorised(&state.orders, budget)?;
                    let nats = nats(&self.model.like(&staged)?, request.chosen_on, watch)?;
                    state.tried.push((budget.pairs, budget.rank, nats));
                    state.save()?;
                    nats
                }
            };
            if nats < best.0 {
                best = (nats, budget);
            }
        }
        Ok(best.1)
    }

    /// The model with every layer converted, without recovery.
    fn factorised(&self, orders: &[Vec<Vec<u8>>], budget: Budget) -> Result<Source, ConvertError> {
        let mut staged = staged::open(self.source, orders, budget)?;
        let mut layers: Vec<Option<_>> = orders.iter().map(|_| None).collect();
        self.model.team().each_chunk(&mut layers, 1, |n, to| {
            to[0] = Some(self.layer(&staged, n, budget.rank));
        });
        for (n, layer) in layers.into_iter().flatten().enumerate() {
            let (projections, factors) = layer?;
            put(&mut staged, n, &projections, &factors)?;
        }
        Ok(staged)
    }

    fn layer(
        &self,
        staged: &Source,
        n: usize,
        rank: usize,
    ) -> Result<(Projections, Factors), ConvertError> {
        let projections = Projections::of(self.source, n)?;
        let [elite, rest] = projections.split(&channels(staged, n));
        let [a, b] = match self.moments.map(|moments| &moments[n]) {
            Some(moment) => {
                let of = &channels(staged, n)[1];
                let weights = Weights::new(self.source, n, &projections, moment, of)?;
                weights.factors(&rest, rank)?
            }
            None => factors(&rest, None, rank)?,
        };
        Ok((projections, Factors { elite, a, b }))
    }
}
