//! What can go wrong in a conversion.

use std::path::PathBuf;

use super::algebra::Singular;
use crate::model::ModelError;
use crate::watch::Interrupted;

/// Why a model was not converted.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// It cannot be.
    #[error("{0}")]
    Refused(String),
    /// The file that an interrupted conversion goes on from.
    #[error("{path}: {why}; remove it to begin again")]
    State {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A matrix could not be factorised.
    #[error(transparent)]
    Algebra(#[from] Singular),
    /// A file of the source or of what becomes of it.
    #[error(transparent)]
    File(#[from] crate::error::Error),
    /// A forward pass.
    #[error(transparent)]
    Model(#[from] ModelError),
}

impl From<Interrupted> for ConvertError {
    fn from(stopped: Interrupted) -> Self {
        Self::Model(stopped.into())
    }
}

impl From<kvwarp::Error> for ConvertError {
    fn from(error: kvwarp::Error) -> Self {
        Self::Model(error.into())
    }
}
