//! The one error type of the engine's file side.

use std::path::{Path, PathBuf};

/// What went wrong with a model file; each message names the field, its value and what would be
/// accepted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused a file operation.
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    /// An error in the contents of one file.
    #[error("{}: {error}", path.display())]
    In { path: PathBuf, error: Box<Error> },
    /// The GGUF container is malformed.
    #[error("gguf: {0}")]
    Gguf(String),
    /// The safetensors container or its index is malformed.
    #[error("safetensors: {0}")]
    Safetensors(String),
    /// The model's configuration is missing, malformed or not supported.
    #[error("config: {0}")]
    Config(String),
    /// A tensor is missing, has the wrong shape, or a type no kernel reads.
    #[error("weights: {0}")]
    Weights(String),
    /// The vocabulary is missing, malformed or not supported.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// The chat template does not compile, or refused the conversation.
    #[error("chat template: {0}")]
    Template(String),
    /// The default model could not be obtained.
    #[error("{0}")]
    Fetch(String),
}

/// Result of the engine's file side.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Wraps an operating-system error with the path it concerns.
    pub fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io { path: path.to_path_buf(), source }
    }

    /// Adds the path of the file whose contents are at fault.
    #[must_use]
    pub fn at(self, path: &Path) -> Self {
        match self {
            Self::Io { .. } | Self::In { .. } => self,
            other => Self::In { path: path.to_path_buf(), error: Box::new(other) },
        }
    }
}
