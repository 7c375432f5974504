//! Why a cache refuses.

/// Why the cache refused.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// The sequence is longer than the context.
    #[error("{need} tokens do not fit in a context of {context}; raise it with -c/--ctx-size")]
    Full {
        /// Tokens that were to be held.
        need: usize,
        /// Tokens that may be held.
        context: usize,
    },
    /// Tokens to forget have left the ring.
    #[error("cannot forget the newest {n} tokens: only {spare} have not been packed yet")]
    Packed {
        /// Tokens to forget.
        n: usize,
        /// Tokens that could be forgotten.
        spare: usize,
    },
    /// The format or head size has no slab.
    #[error(transparent)]
    Kernel(#[from] kvwarp::Error),
}
