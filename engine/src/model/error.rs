//! What can go wrong in a forward pass.

use crate::cache::CacheError;
use crate::spec::CacheSpec;
use crate::watch::Interrupted;

/// Why a forward pass stopped.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A token is not in the vocabulary.
    #[error("token {token} is outside the vocabulary of {vocab}")]
    Token {
        /// The token.
        token: u32,
        /// Rows of the embedding.
        vocab: usize,
    },
    /// The context asked for is longer than the model's.
    #[error("a context of {asked} tokens is over this model's limit of {limit}")]
    Context {
        /// Tokens asked for.
        asked: usize,
        /// Positions that the model was trained for.
        limit: usize,
    },
    /// The model cannot do what a part of the cache spec asks for.
    #[error("cache spec `{spec}`: {problem}")]
    Policy {
        /// The whole spec.
        spec: Box<CacheSpec>,
        /// What is wrong with it for this model.
        problem: String,
    },
    /// The text could not be turned into tokens.
    #[error(transparent)]
    Text(#[from] crate::error::Error),
    /// There was nothing to read.
    #[error("the prompt is empty")]
    Empty,
    /// The cache refused.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// A kernel refused.
    #[error(transparent)]
    Kernel(#[from] kvwarp::Error),
    /// Someone asked to stop; the cache is not usable after an interrupted prefill.
    #[error("interrupted")]
    Interrupted(#[from] Interrupted),
}

impl ModelError {
    /// That there are tokens, all of a vocabulary of `vocab`.
    ///
    /// # Errors
    /// [`ModelError::Empty`], [`ModelError::Token`].
    pub(crate) fn check_tokens(tokens: &[u32], vocab: usize) -> Result<(), Self> {
        if tokens.is_empty() {
            return Err(Self::Empty);
        }
        match tokens.iter().find(|&&token| token as usize >= vocab) {
            Some(&token) => Err(Self::Token { token, vocab }),
            None => Ok(()),
        }
    }
}
