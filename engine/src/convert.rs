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
mod factorise;
mod kept;
mod learn;
mod recover;
mod refit;
pub mod search;
mod staged;
mod state;
mod weigh;
mod write;

use std::path::Path;

use crate::config::Config;
use crate::model::Model;
use crate::perplexity::{Reading, score};
use crate::source::Source;
use crate::spec::CacheSpec;
use crate::watch::Watch;
pub use budget::Budget;
use distil::Distil;
pub use error::ConvertError;
use factorise::Learnt;
use kept::Kept;
use recover::recover;
use refit::Refit;
use state::{Of, State};
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
    /// Layers share what all latent vectors have together as `chosen_on` shows their errors to cost; else each has as much.
    pub by_layer: bool,
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
    /// To choose the budget on, and ranks of layers; not learnt from.
    pub chosen_on: &'a [u32],
    /// To measure perplexity on; not learnt from.
    pub held: &'a [u32],
}

/// What a stage costs.
#[derive(Debug, Clone, PartialEq)]
pub struct Stage {
    /// `source`, `pairs`, `factors`, `ranks` where layers differ, `refit` or `distil`.
    pub name: &'static str,
    /// Log-perplexity of the held text.
    pub nats: f64,
}

/// A model that has been converted, in memory.
pub struct Converted {
    /// It; [`write()`] makes files of it.
    pub staged: Source,
    /// What was kept, a layer's mean.
    pub budget: Budget,
    /// Elements of the cache against those of the source.
    pub ratio: f64,
    /// What each stage cost.
    pub stages: Vec<Stage>,
    /// Log-perplexity of what budgets are chosen on, with each that was tried.
    pub tried: Vec<(Budget, f64)>,
}

/// Converts the model of `source`; `beside` is the file that an interrupted conversion goes on from, with a folder of layers
/// beside it, and stays until [`finish`]. `stage` is told of each stage that is done.
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
    let budgets = budgets(config, request)?;
    let rounds = budgets.iter().map(|budget| budget.pairs).max().unwrap_or(0);
    let shape = [config.kv_heads, config.head_dim / 2];
    let mut state = State::open(beside, Of::new(source, request, rounds), shape)?;
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
    if request.by_layer {
        learnt.by_layer(&mut staged, budget, request.chosen_on, &mut state, watch)?;
        note("ranks", &model.like(&staged)?, watch)?;
    }
    let streams = || learn::streams(model, request.tokens, request.window);
    let (of, steps) = (state.of(), request.distil);
    if request.refit {
        let (kept, refit) = (Kept::new(beside, "refit", &staged, &of), Refit(source, model));
        recover(&refit, (source, model), &mut staged, &kept, streams()?, watch)?;
        note("refit", &model.like(&staged)?, watch)?;
    }
    if steps > 0 {
        let of = format!("{of} {} {steps}", request.refit);
        let (kept, distil) =
            (Kept::new(beside, "distil", &staged, &of), Distil(source, model, steps));
        recover(&distil, (source, model), &mut staged, &kept, streams()?, watch)?;
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
    let layers = kept::folder(beside);
    for (path, removed) in [
        (layers.as_path(), std::fs::remove_dir_all(&layers)),
        (beside, std::fs::remove_file(beside)),
    ] {
        match removed {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(ConvertError::State { path: path.into(), why: e.to_string() });
            }
            _ => {}
        }
    }
    Ok(())
}

/// Budgets among which the best is to be found.
fn budgets(config: &Config, request: &Request<'_>) -> Result<Vec<Budget>, ConvertError> {
    if config.elite.is_some() {
        return Err(ConvertError::Refused("the model has been converted already".into()));
    }
    match request.target {
        Target::Fixed(budget) => match budget.refusal(config, request.by_layer) {
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
    let budgets = budgets(config, request)?;
    let rounds = budgets.iter().map(|budget| budget.pairs).max().unwrap_or(0);
    let chosen = if budgets.len() > 1 { budgets.len() * request.chosen_on.len() } else { 0 };
    // Source, pairs, factors; then the fit: the source, the converted layer before and after its output is fitted.
    let (stages, passes) = if request.refit { (4, 4) } else { (3, 1) };
    let mut rows = stages * request.held.len() + passes * request.tokens.len() + chosen;
    if request.by_layer {
        let alike = usize::from(budgets.len() == 1);
        rows += request.held.len() + (alike + config.layers) * request.chosen_on.len();
    }
    if request.distil > 0 {
        let texts = request.tokens.len().div_ceil(request.window);
        rows += request.held.len() + distil::work(texts, request.window, request.distil);
    }
    Ok(config.layers * (rows + rounds * request.searched))
}

/// Log-perplexity of a text that is read piece by piece.
fn nats(model: &Model<'_>, tokens: &[u32], watch: &mut Watch<'_>) -> Result<f64, ConvertError> {
    let reading = Reading { cache: CacheSpec::default(), prefix: 0, piece: PIECE };
    Ok(score(model, tokens, &reading, watch)?.mean())
}
