//! What a cache costs: tasks that show it, on the same samples for every cache.
//!
//! A *sample* is one place in a task's grid: a window of a text, or a document of some length with something hidden at some
//! depth. What is random in it is drawn from the run's seed and from the sample alone, so caches are compared in pairs. A
//! *cell* is what one sample gave with one cache; a sweep keeps a line for each and goes on from there.
//!
//! A cache never knows what it will be asked: a document is read and compressed, the question is appended to that, and
//! each of several questions to a copy of it.

mod bed;
mod context;
pub mod hidden;
pub mod report;
pub mod stats;
mod store;
pub mod summary;
mod text;

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::cache::{CacheStats, Shape};
use crate::model::ModelError;
pub use bed::Bed;
pub use context::Context;
pub use store::{Cell, Origin, Store, StoreError, VERSION};
pub use text::{GRASS, Texts};

/// A part of a sweep.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Task {
    /// Log-perplexity, and how far predictions are from those with an f16 cache.
    Text,
    /// A number hidden in a document.
    Passkey,
    /// A sentence hidden in a document.
    Needle,
    /// Several numbers in a document, asked for one after the other.
    MultiQuery,
    /// Time and memory.
    Speed,
}

/// One place in a task's grid.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "task", rename_all = "kebab-case")]
pub enum Sample {
    /// Tokens of a text: `prefix` are read and compressed, the next `scored` are predicted.
    Text {
        /// Name in [`Texts`].
        text: String,
        /// First token.
        first: usize,
        /// Tokens read.
        prefix: usize,
        /// Tokens predicted.
        scored: usize,
    },
    /// A document with a number.
    Passkey {
        /// The document.
        document: Document,
        /// Percent of the document before the number.
        depth: u8,
        /// Digits of the number.
        digits: usize,
    },
    /// A document with a sentence.
    Needle {
        /// The document.
        document: Document,
        /// Percent of the document before the sentence.
        depth: u8,
    },
    /// A document with several numbers, each of its own name.
    MultiQuery {
        /// The document.
        document: Document,
        /// How many.
        facts: usize,
        /// Whether the first question is compressed with the document, as by a method that may look at it.
        aware: bool,
    },
    /// A document that is read and continued.
    Speed {
        /// The document.
        document: Document,
        /// Tokens generated.
        steps: usize,
    },
}

/// A document to hide something in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Document {
    /// What it is made of: a name in [`Texts`].
    pub filler: String,
    /// Most tokens of document, question and answer.
    pub tokens: usize,
    /// Number of the sample among those that have all else in common.
    pub sample: usize,
}

impl Sample {
    /// The task that it is of.
    pub fn task(&self) -> Task {
        match self {
            Self::Text { .. } => Task::Text,
            Self::Passkey { .. } => Task::Passkey,
            Self::Needle { .. } => Task::Needle,
            Self::MultiQuery { .. } => Task::MultiQuery,
            Self::Speed { .. } => Task::Speed,
        }
    }

    /// Its document, where it has one.
    pub fn document(&self) -> Option<&Document> {
        match self {
            Self::Text { .. } => None,
            Self::Passkey { document, .. }
            | Self::Needle { document, .. }
            | Self::MultiQuery { document, .. }
            | Self::Speed { document, .. } => Some(document),
        }
    }

    /// The same, to be changed.
    pub fn document_mut(&mut self) -> Option<&mut Document> {
        match self {
            Self::Text { .. } => None,
            Self::Passkey { document, .. }
            | Self::Needle { document, .. }
            | Self::MultiQuery { document, .. }
            | Self::Speed { document, .. } => Some(document),
        }
    }

    /// Tokens that pass through the model's layers to measure it with so many caches: an estimate.
    pub fn rows(&self, caches: usize) -> usize {
        // A window is read once more, with an f16 cache.
        let more = usize::from(self.task() == Task::Text && caches > 0);
        (caches + more) * self.tokens()
    }

    /// Its place in a grid of lengths and depths, where it has one.
    pub fn place(&self) -> Option<(usize, u8)> {
        match self {
            Self::Passkey { document, depth, .. } | Self::Needle { document, depth } => {
                Some((document.tokens, *depth))
            }
            _ => None,
        }
    }

    /// Tokens that the model must be able to hold.
    pub fn tokens(&self) -> usize {
        match self {
            Self::Text { prefix, scored, .. } => prefix + scored,
            _ => self.document().map_or(0, |document| document.tokens),
        }
    }
}

impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text { first, .. } => write!(f, "text from {first}"),
            Self::Passkey { document, depth, .. } => {
                write!(f, "passkey, {} tokens, {depth} %", document.tokens)
            }
            Self::Needle { document, depth } => {
                write!(f, "needle, {} tokens, {depth} %", document.tokens)
            }
            Self::MultiQuery { document, .. } => {
                write!(f, "multi-query, {} tokens", document.tokens)
            }
            Self::Speed { document, .. } => write!(f, "speed, {} tokens", document.tokens),
        }
    }
}

/// What a sample gave with one cache.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// What the cache took when the text was compressed, before anything was asked.
    pub held: Held,
    /// What came of it.
    pub found: Found,
}

/// What came of a sample.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Found {
    /// Of [`Sample::Text`].
    Likelihood {
        /// Mean negative log-probability of a token, in nats.
        nll: f64,
        /// The same with an f16 cache.
        f16: f64,
        /// Mean divergence from f16's predictions, in nats.
        kl: f64,
        /// Tokens predicted.
        tokens: usize,
        /// Those for which both find the same token most probable.
        same_top: usize,
    },
    /// One answer a question.
    Answers(Vec<hidden::Answer>),
    /// Of [`Sample::Speed`].
    Times {
        /// Seconds from the beginning to the first token.
        first_token: f64,
        /// Tokens generated a second after it.
        tokens_a_second: f64,
    },
}

/// Memory of a compressed text, bytes from the allocator.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Held {
    /// Tokens read.
    pub tokens: usize,
    /// Bytes now.
    pub bytes: usize,
    /// Most bytes on the way.
    pub peak_bytes: usize,
    /// Bits of `bytes` for each element of K and V that was read, evicted or not.
    pub bits: f64,
}

impl Held {
    /// Of `tokens` tokens that a model of this shape has read.
    pub fn new(stats: &CacheStats, tokens: usize, shape: Shape) -> Self {
        let elements = 2 * tokens * shape.layers * shape.kv_heads * shape.head_dim;
        let bits = (stats.used_bytes * 8) as f64 / elements.max(1) as f64;
        Self { tokens, bytes: stats.used_bytes, peak_bytes: stats.peak_bytes, bits }
    }
}

/// Why a sample cannot be measured.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    /// The model refused, or someone asked to stop.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The tokenizer refused.
    #[error(transparent)]
    Text(#[from] crate::error::Error),
    /// The document has no room for what it must hold.
    #[error("{what} in {tokens} tokens: at least {least} are needed; raise --lengths")]
    Short {
        /// What it must hold.
        what: &'static str,
        /// Tokens asked for.
        tokens: usize,
        /// Tokens needed.
        least: usize,
    },
    /// No text of this name.
    #[error("there is no text `{0}`")]
    Unknown(String),
    /// What was measured could not be kept.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl EvalError {
    /// Whether it only says that someone asked to stop.
    pub fn is_interrupted(&self) -> bool {
        matches!(self, Self::Model(ModelError::Interrupted(_)))
    }
}
