//! The forward pass of Llama, Mistral and Qwen2: one kernel family a line, activations in f32.
//!
//! A prefill is layer-major: the whole prompt goes through one layer, a few hundred rows at a time, and then that
//! layer's cache is compressed, so memory holds the prompt's residual stream, one piece's activations and one layer of
//! uncompressed K and V. A decode step is the same layer with a few rows, each of its own sequence or the newest of one:
//! weights are read once for all, and what a row gets does not depend on the others.

mod absorb;
mod alone;
mod error;
mod keys;
mod latent;
mod layers;
mod read;
mod rows;
mod step;
mod work;

use std::sync::{Arc, OnceLock};

use half::f16;
use kvwarp::linear::{Activations, Cpu, matmul};
use kvwarp::paged_attn::Mask;
use kvwarp::rope_select::{Angles, Pairing};
use kvwarp::threads::Team;
use kvwarp::{linear, rms_norm};

use crate::cache::{Cache, Plan, Shape};
use crate::calibration::{self, Calibration};
use crate::config::Config;
use crate::policy::{self, Repeat};
use crate::profile::Launch;
use crate::runner::Row;
use crate::source::Source;
use crate::spec::CacheSpec;
pub use error::ModelError;
pub(crate) use keys::pairing;
pub(crate) use layers::{Layer, matrix};
use step::{Of, Piece};
pub(crate) use work::Seen;
pub use work::Work;

/// A model whose weights stay in the mapped file.
pub struct Model<'a> {
    source: &'a Source,
    config: &'a Config,
    embedding: linear::Weights<'a>,
    layers: Vec<Layer<'a>>,
    output_norm: Vec<f32>,
    output: linear::Weights<'a>,
    /// Radians a position for each pair, scaling applied.
    inv_freq: Vec<f32>,
    pairing: Pairing,
    mask: Mask,
    team: Team,
    activations: Activations,
    /// Weights of K's rounding errors ([`Calibration::feedback`]).
    feedback: Option<Arc<[f16]>>,
    /// Heads of all layers, those that lose most first ([`Calibration::losers`]).
    losers: Vec<usize>,
    /// Of the calibration.
    calibration: Option<String>,
    /// How it is asked to say a text again; made when it is first needed.
    repeat: OnceLock<Box<Repeat>>,
}

impl<'a> Model<'a> {
    /// Views of the weights of `source`; `threads` share every product.
    ///
    /// # Errors
    /// [`crate::error::Error::Weights`] for a tensor type that no kernel multiplies.
    pub fn new(
        source: &'a Source,
        threads: usize,
        activations: Activations,
    ) -> crate::error::Result<Self> {
        let config = &source.config;
        let embedding = layers::matrix(&source.weights, "token_embd", config.vocab, config.width)?;
        let output = match config.tied_embeddings {
            true => embedding,
            false => layers::matrix(&source.weights, "output", config.vocab, config.width)?,
        };
        let layer = |n| Layer::new(&source.weights, config, n);
        Ok(Self {
            source,
            config,
            embedding,
            layers: (0..config.layers).map(layer).collect::<Result<_, _>>()?,
            output_norm: source.weights.vector("output_norm", config.width)?,
            output,
            inv_freq: config.rope.frequencies(config.head_dim),
            pairing: keys::pairing(config),
            mask: Mask { sliding_window: config.sliding_window },
            team: Team::new(threads),
            activations,
            feedback: None,
            losers: Vec::new(),
            calibration: None,
            repeat: OnceLock::new(),
        })
    }

    /// Another model, run as this one is.
    ///
    /// # Errors
    /// As [`Model::new`].
    pub(crate) fn like<'b>(&self, source: &'b Source) -> crate::error::Result<Model<'b>> {
        Model::new(source, self.threads(), self.activations)
    }

    /// The same, rounding keys that are kept turned by Hadamard matrices as `calibration` says.
    pub fn with_calibration(mut self, calibration: &Calibration) -> Self {
        let rope = (&self.inv_freq[..], self.pairing);
        self.feedback =
            Some(calibration.feedback(rope, &[], self.config.context, &self.team).into());
        self.losers = calibration.losers();
        self.calibration = Some(calibration.fingerprint());
        self
    }

    /// Whether it has a calibration.
    pub fn is_calibrated(&self) -> bool {
        self.feedback.is_some()
    }

    /// A hash of its shape and of some of its weights, in hexadecimal.
    pub fn fingerprint(&self) -> String {
        calibration::fingerprint(self.source)
    }

    /// The fingerprint of its calibration where `spec` has one followed.
    pub fn followed(&self, spec: &CacheSpec) -> Option<&str> {
        let heads = self.config.layers * self.config.kv_heads;
        let follows = spec.hadamard || spec.kept(heads) > 0;
        self.calibration.as_deref().filter(|_| follows)
    }

    /// Shape and constants.
    pub fn config(&self) -> &'a Config {
        self.config
    }

    /// The threads that share every product.
    pub fn team(&self) -> &Team {
        &self.team
    }

    /// Threads at work.
    pub fn threads(&self) -> usize {
        self.team.workers()
    }

    /// Bytes of weights that a decoded token reads.
    pub fn bytes_a_token(&self) -> usize {
        self.layers.iter().map(Layer::bytes).sum::<usize>() + self.output.bytes()
    }

    /// An empty cache for this model that holds `context` tokens.
    ///
    /// # Errors
    /// [`ModelError::Context`] over the model's limit; [`ModelError::Cache`] for a head size that no slab has.
    pub fn cache(&self, spec: &CacheSpec, context: usize) -> Result<Cache, ModelError> {
        self.check(spec, context)?;
        Ok(Cache::planned(spec, self.shape(context), self.plan(spec))?)
    }

    /// Whether it can have such a cache that holds `context` tokens.
    ///
    /// # Errors
    /// [`ModelError::Context`] over the model's limit; [`ModelError::Policy`].
    pub fn check(&self, spec: &CacheSpec, context: usize) -> Result<(), ModelError> {
        let limit = self.config.context;
        if context > limit {
            return Err(ModelError::Context { asked: context, limit });
        }
        policy::check(spec, self.config, context)
    }

    /// Of a cache for `context` tokens.
    pub fn shape(&self, context: usize) -> Shape {
        let Config { layers, kv_heads, head_dim, .. } = *self.config;
        Shape { layers, kv_heads, head_dim, context }
    }

    /// What the model, and its calibration where there is one, add to `spec`.
    pub fn plan(&self, spec: &CacheSpec) -> Plan {
        let heads = self.config.layers * self.config.kv_heads;
        let plan = Plan::new(spec, heads, &self.losers, self.feedback.clone());
        plan.with_latents(spec, self.config)
    }

    /// Reads the few tokens of each of `turns` after what its row holds, those of a row in order; the logits of all of
    /// them are then in `work`, `[tokens of all turns, vocab]`. No token but the first of a turn may push a slab out of
    /// the window.
    ///
    /// # Errors
    /// [`ModelError`]; after one the rows of all turns must be closed.
    pub fn step(
        &self,
        turns: &[(Row, &[u32])],
        cache: &mut Cache,
        work: &mut Work,
    ) -> Result<(), ModelError> {
        let tokens: Vec<u32> = turns.iter().flat_map(|(_, tokens)| *tokens).copied().collect();
        let mut x = work.clock.time(|| Launch::of("embed"), || self.embed(&tokens))?;
        let (mut positions, mut counts) = (Vec::with_capacity(tokens.len()), Vec::new());
        for &(row, tokens) in turns {
            let first = cache.advance(row, tokens.len())?;
            positions.extend(first..first + tokens.len());
            counts.push((row, tokens.len()));
        }
        let (angles, rows) = (self.angles(positions), tokens.len());
        for (index, layer) in self.layers.iter().enumerate() {
            let of = Of::Turns(&counts);
            let piece = Piece { x: &mut x, angles: &angles, first: 0, rows, of };
            self.layer(index, layer, piece, cache, work)?;
        }
        self.pack_latents(counts.iter().map(|&(row, _)| row), cache, work)?;
        self.logits(&x, true, work)
    }

    /// Rows of the embedding, `[tokens, width]`.
    pub(crate) fn embed(&self, tokens: &[u32]) -> Result<Vec<f32>, ModelError> {
        let Config { width, vocab, .. } = *self.config;
        ModelError::check_tokens(tokens, vocab)?;
        let mut x = vec![0.0; tokens.len() * width];
        for (x, &token) in x.chunks_exact_mut(width).zip(tokens) {
            linear::dequantize_row(&self.embedding, token as usize, x)?;
        }
        Ok(x)
    }

    /// Logits `[rows, vocab]` of the residual stream `x` `[rows, width]`, into `work.logits`.
    fn logits(&self, x: &[f32], alone: bool, work: &mut Work) -> Result<(), ModelError> {
        let Config { width, vocab, rms_eps, .. } = *self.config;
        let rows = x.len() / width;
        work.h.resize(x.len(), 0.0);
        work.logits.resize(rows * vocab, 0.0);
        let Work { h, logits, clock, .. } = work;
        clock
            .time(|| Launch::of("rms_norm"), || rms_norm::cpu(x, &self.output_norm, rms_eps, h))?;
        let multiply = || matmul(&self.cpu(alone), &self.output, h, rows, logits);
        Ok(clock.time(|| product([&self.output], rows), multiply)?)
    }

    fn angles(&self, positions: impl IntoIterator<Item = usize>) -> Angles {
        // The context is at most 2^24 positions.
        let positions: Vec<i32> = positions.into_iter().map(|p| p as i32).collect();
        Angles::new(&positions, &self.inv_freq)
    }

    /// How to multiply; `alone`: a row's product does not depend on how many there are.
    fn cpu(&self, alone: bool) -> Cpu<'_> {
        Cpu { activations: self.activations, alone, ..Cpu::new(&self.team) }
    }
}

/// Products of `rows` rows with matrices that have the same input; rows and sums are f32.
fn product<const N: usize>(matrices: [&linear::Weights<'_>; N], rows: usize) -> Launch {
    let (outputs, cols) = (matrices.iter().map(|m| m.rows()).sum(), matrices[0].cols());
    let weights: usize = matrices.iter().map(|m| m.bytes()).sum();
    let bytes = weights + 4 * rows * (cols + outputs);
    Launch { op: "linear", shape: Some([outputs, cols]), bytes }
}
