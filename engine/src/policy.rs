//! Which tokens a cache keeps: a score for each token, representatives of the others, a budget for each head, and which
//! tokens go deeper in a prefill.
//!
//! A policy acts on the tokens of a sequence's first read, each layer after its own attention, so nothing that is computed
//! in a layer misses a token that is dropped there; what is read later stays, but for what LagKV drops. Tokens that are
//! kept stay rotated by their own positions, and positions never shrink. A method of a paper does what the paper and its code
//! do; where kvpress does otherwise, that is a method of its own. [`Share`] of the tokens read says how many stay, those
//! that a method protects among them.

mod budget;
mod choose;
mod cut;
mod lag;
mod method;
mod observe;
pub(crate) mod parse;
mod repeat;
mod run;
mod scores;
mod settle;
#[cfg(test)]
mod tests;

pub(crate) use cut::{Cut, Onward};
pub use method::{Evict, METHODS, Method, Options};
pub use observe::Observer;
pub use repeat::Repeat;
pub use run::Policy;

pub(crate) use choose::Scored;
pub(crate) use lag::choose as choose_lag;
pub(crate) use run::Keep;
pub(crate) use scores::{all_unseen, best_unseen, rank};

use std::fmt;

use kvwarp::lowrank_kv::Shape;
use kvwarp::sim_evict::Anchor;

use crate::config::Config;
use crate::model::ModelError;
use crate::spec::CacheSpec;

/// A share in ten-thousandths: exact, so that specs can be compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share(u16);

impl Share {
    /// Everything.
    pub const ALL: Self = Self(10_000);

    /// `0` to `1` with at most four decimals.
    pub fn parse(text: &str) -> Option<Self> {
        let (whole, decimals) = text.split_once('.').unwrap_or((text, ""));
        let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
        if whole.len() != 1 || decimals.len() > 4 || !digits(whole) || !digits(decimals) {
            return None;
        }
        let share: u16 = format!("{whole}{decimals:0<4}").parse().ok()?;
        (share <= Self::ALL.0).then_some(Self(share))
    }

    /// That share of `n`, rounded down.
    pub fn of(self, n: usize) -> usize {
        n * usize::from(self.0) / usize::from(Self::ALL.0)
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", f64::from(self.0) / f64::from(Self::ALL.0))
    }
}

/// Representatives of tokens that a score would drop, in place of the lowest-scored of those that it would keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refine {
    /// Share of what a head keeps beyond its protected tokens.
    pub share: Share,
    /// What tokens are compared with.
    pub anchor: Anchor,
}

/// How many tokens each layer and head keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Budget {
    /// The same everywhere.
    Uniform,
    /// Fewer the deeper the layer, linearly (PyramidKV, arXiv:2406.02069).
    Pyramid,
    /// To each layer by its share of the best of all scores, settled anew every four layers (DynamicKV, arXiv:2412.14838).
    DynamicKv,
    /// The same share of each layer's whole score (PrefixKV, arXiv:2412.03409).
    PrefixKv,
    /// The best of all layers and heads.
    Global,
}

impl Budget {
    /// By name.
    pub const ALL: [(&'static str, Self); 5] = [
        ("uniform", Self::Uniform),
        ("pyramid", Self::Pyramid),
        ("dynamickv", Self::DynamicKv),
        ("prefixkv", Self::PrefixKv),
        ("global", Self::Global),
    ];

    /// Whether it asks for the scores of several layers, so that none of them can be packed before.
    pub fn waits(self) -> bool {
        matches!(self, Self::DynamicKv | Self::PrefixKv | Self::Global)
    }
}

/// Token-selective propagation (FastKV, arXiv:2502.01068): later layers read only the tokens that matter most in one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tsp {
    /// The last layer that reads all tokens; `None`: the last of the first half.
    pub layer: Option<u16>,
    /// Share of the tokens that go on.
    pub rate: Share,
}

impl Tsp {
    /// The last layer of `layers` that reads all tokens.
    pub fn layer(self, layers: usize) -> usize {
        self.layer.map_or((layers / 2).saturating_sub(1), usize::from)
    }
}

/// Whether a model of `config` can keep what `spec` has kept, in a context of so many tokens.
///
/// # Errors
/// [`ModelError::Policy`].
pub fn check(spec: &CacheSpec, config: &Config, context: usize) -> Result<(), ModelError> {
    let refuse = |problem: String| Err(ModelError::Policy { spec: Box::new(*spec), problem });
    if spec.latent {
        return latents(config, context).map(drop).or_else(refuse);
    }
    if !spec.selects() {
        return Ok(());
    }
    if let Some(window) = config.sliding_window.filter(|&window| window < context) {
        return refuse(format!(
            "the model sees its newest {window} tokens only, counted by position, and a cache that drops tokens counts \
             slots; give a context of at most {window} with -c/--ctx-size"
        ));
    }
    if let Some(tsp) = spec.tsp.filter(|tsp| tsp.layer(config.layers) >= config.layers) {
        let (layer, layers) = (tsp.layer(config.layers), config.layers);
        return refuse(format!(
            "`tsp` is at layer {layer}; the model has layers 0 to {}",
            layers - 1
        ));
    }
    match spec.refine {
        Some(_) if config.kv_heads > 32 => refuse(format!(
            "`refine` takes up to 32 kv heads a layer, the model has {}",
            config.kv_heads
        )),
        _ => Ok(()),
    }
}

/// What a cache of latents of such a model, for so many tokens, holds of a token in each layer.
///
/// # Errors
/// Why there can be none.
fn latents(config: &Config, context: usize) -> Result<Vec<Shape>, String> {
    let Some(elite) = &config.elite else {
        return Err("the model has keys and values and no latents; `kvwarp convert elitekv` makes one that has".into());
    };
    match config.sliding_window.filter(|&window| window < context) {
        Some(window) => Err(format!(
            "the model sees its newest {window} tokens only, and latents are attended to all at once; give a context of at \
             most {window} with -c/--ctx-size, or have keys and values expanded with --cache f16, q4 or q2"
        )),
        None => elite.latents(config),
    }
}
