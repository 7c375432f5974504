//! Activations of one piece of a forward pass.

use kvwarp::{paged_attn, prefill_attn};

use super::absorb;
use super::keys::Spare;
use super::read::ROWS;
use crate::calibration::Calibration;
use crate::config::Config;
use crate::policy::Observer;
use crate::profile::Clock;

/// Buffers that live as long as a generation; a row is a token.
#[derive(Default)]
pub struct Work {
    /// Normalised residual stream, `[rows, width]`.
    pub(super) h: Vec<f32>,
    /// `[rows, heads, head_dim]`
    pub(super) q: Vec<f32>,
    /// `[rows, kv_heads, head_dim]`
    pub(super) k: Vec<f32>,
    /// `[rows, kv_heads, head_dim]`
    pub(super) v: Vec<f32>,
    /// What attention gives, `[rows, heads, head_dim]`.
    pub(super) mix: Vec<f32>,
    /// `[rows, ffn]`
    pub(super) gate: Vec<f32>,
    /// `[rows, ffn]`
    pub(super) up: Vec<f32>,
    /// What a block adds to the residual stream, `[rows, width]`.
    pub(super) add: Vec<f32>,
    /// `[rows, vocab]` of the last rows asked for.
    pub(super) logits: Vec<f32>,
    pub(super) decode: paged_attn::Scratch,
    pub(super) prefill: prefill_attn::Scratch,
    /// Takes the queries of a prompt's layer, for a policy.
    pub(super) observer: Option<Observer>,
    /// Log-sum-exps that it asks for, `[rows, heads]`.
    pub(super) lse: Vec<f32>,
    /// Times what is done with these buffers, while it is on.
    pub(crate) clock: Clock,
    /// Takes every query.
    pub(crate) calibration: Option<Calibration>,
    /// Takes what attention is made of.
    pub(crate) seen: Option<Seen>,
    pub(super) spare: Spare,
    pub(super) absorbed: absorb::Scratch,
}

/// What went through the attention of a layer, a row a token.
#[derive(Default)]
pub(crate) struct Seen {
    /// Its input, `[rows, width]`.
    pub h: Vec<f32>,
    /// Before RoPE, `[rows, heads, head_dim]`.
    pub q: Vec<f32>,
    /// Before RoPE, `[rows, kv_heads, head_dim]`.
    pub k: Vec<f32>,
    /// `[rows, kv_heads, head_dim]`
    pub v: Vec<f32>,
    /// `[rows, heads, head_dim]`
    pub mix: Vec<f32>,
}

impl Seen {
    pub(super) fn add(&mut self, rows: [&[f32]; 4]) {
        let Self { h, q, k, v, .. } = self;
        [h, q, k, v].into_iter().zip(rows).for_each(|(to, rows)| to.extend_from_slice(rows));
    }
}

impl Work {
    /// Buffers that add every query to `calibration`.
    pub fn collecting(calibration: Calibration) -> Self {
        Self { calibration: Some(calibration), ..Self::default() }
    }

    /// Buffers that take what goes through attention.
    pub(crate) fn seeing() -> Self {
        Self { seen: Some(Seen::default()), ..Self::default() }
    }

    /// Logits of the newest token read, `[vocab]`, or of each token of a step, `[tokens, vocab]`.
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// The same, and what times those that read them.
    pub(crate) fn timed_logits(&mut self) -> (&[f32], &mut Clock) {
        (&self.logits, &mut self.clock)
    }

    /// Bytes that reading `tokens` tokens of a prompt takes beside the cache: the residual stream of all, the rest of a
    /// piece.
    pub fn bytes(config: &Config, tokens: usize) -> usize {
        let row: usize = Self::lens(config).iter().sum();
        4 * (tokens * config.width + tokens.min(ROWS) * row + config.vocab)
    }

    /// Elements of a row of each buffer but the last.
    fn lens(config: &Config) -> [usize; 8] {
        let Config { width, ffn, heads, kv_heads, head_dim, .. } = *config;
        let (q, kv) = (heads * head_dim, kv_heads * head_dim);
        [width, q, kv, kv, q, ffn, ffn, width]
    }

    pub(super) fn resize(&mut self, config: &Config, rows: usize) {
        let Self { h, q, k, v, mix, gate, up, add, .. } = self;
        for (buffer, len) in [h, q, k, v, mix, gate, up, add].into_iter().zip(Self::lens(config)) {
            buffer.resize(rows * len, 0.0);
        }
    }
}
