//! What an interrupted conversion goes on from: a file beside its output.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{Budget, ConvertError, Request};
use crate::calibration::fingerprint;
use crate::source::Source;

/// Version of the file.
const VERSION: u32 = 1;

/// What a conversion is of: one that goes on must be of the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Of {
    /// Version of the file.
    pub version: u32,
    /// Fingerprint of the source.
    pub model: String,
    /// Hash of the tokens that are learnt from.
    pub text: String,
    /// Tokens that are read together.
    pub window: usize,
    /// Tokens that pairs are chosen on.
    pub searched: usize,
    /// Pairs that are chosen.
    pub rounds: usize,
    /// Whether factors follow activations.
    pub whitened: bool,
}

impl Of {
    /// Of the conversion of `source` in so many `rounds` of the search.
    pub fn new(source: &Source, request: &Request<'_>, rounds: usize) -> Self {
        let mut hash = Sha256::new();
        for tokens in [request.tokens, request.chosen_on] {
            hash.update((tokens.len() as u64).to_le_bytes());
            tokens.iter().for_each(|token| hash.update(token.to_le_bytes()));
        }
        Self {
            version: VERSION,
            model: fingerprint(source),
            text: format!("{:x}", hash.finalize()),
            window: request.window,
            searched: request.searched,
            rounds,
            whitened: request.whiten,
        }
    }
}

/// What is known so far.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    of: Of,
    /// Pairs of each layer and kv head, those that matter most first.
    pub orders: Vec<Vec<Vec<u8>>>,
    /// Log-perplexity with each budget that has been tried.
    pub tried: Vec<(usize, usize, f64)>,
    /// What the first layers gain alone, with pairs and rank of the others.
    gains: Vec<(usize, usize, Vec<f64>)>,
    #[serde(skip)]
    path: PathBuf,
}

impl State {
    /// What `path` holds of the same conversion; nothing yet where there is no such file.
    ///
    /// # Errors
    /// [`ConvertError::State`] for a file that is damaged or of another conversion.
    pub fn open(path: &Path, of: Of, shape: [usize; 2]) -> Result<Self, ConvertError> {
        let fail = |why: String| ConvertError::State { path: path.into(), why };
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                let (orders, tried, gains) = (Vec::new(), Vec::new(), Vec::new());
                return Ok(Self { of, orders, tried, gains, path: path.into() });
            }
            Err(e) => return Err(fail(e.to_string())),
        };
        let read: Self = serde_json::from_str(&text).map_err(|e| fail(e.to_string()))?;
        let there = &read.of;
        for (field, same) in [
            ("version", there.version == of.version),
            ("model", there.model == of.model),
            ("text", there.text == of.text),
            ("window", there.window == of.window),
            ("searched", there.searched == of.searched),
            ("rounds", there.rounds == of.rounds),
            ("whitened", there.whitened == of.whitened),
        ] {
            if !same {
                return Err(fail(format!("`{field}` is that of another conversion")));
            }
        }
        let [kv_heads, pairs] = shape;
        let sound = |order: &Vec<u8>| {
            let mut once = order.clone();
            once.sort_unstable();
            once.dedup();
            order.len() == of.rounds
                && once.len() == of.rounds
                && once.iter().all(|&pair| usize::from(pair) < pairs)
        };
        let whole = |layer: &Vec<Vec<u8>>| layer.len() == kv_heads && layer.iter().all(sound);
        match read.orders.iter().position(|layer| !whole(layer)) {
            Some(n) => Err(fail(format!("`orders` of layer {n} are no orders of pairs"))),
            None => Ok(Self { path: path.into(), ..read }),
        }
    }

    /// What the conversion is of, as text.
    pub fn of(&self) -> String {
        format!("{:?}", self.of)
    }

    /// Writes the file, all of it or nothing.
    ///
    /// # Errors
    /// [`ConvertError::State`].
    pub fn save(&self) -> Result<(), ConvertError> {
        let fail = |why: String| ConvertError::State { path: self.path.clone(), why };
        let text = serde_json::to_string(self).map_err(|e| fail(e.to_string()))?;
        let partial = self.path.with_added_extension("partial");
        std::fs::write(&partial, text).map_err(|e| fail(e.to_string()))?;
        std::fs::rename(&partial, &self.path).map_err(|e| fail(e.to_string()))
    }

    /// Log-perplexity with `budget`, where it has been tried.
    pub fn tried(&self, budget: Budget) -> Option<f64> {
        let of = |(pairs, rank, nats): &(usize, usize, f64)| {
            ((*pairs, *rank) == (budget.pairs, budget.rank)).then_some(*nats)
        };
        self.tried.iter().find_map(of)
    }

    /// What the first layers gain alone beside others with `budget`.
    pub fn gains(&mut self, budget: Budget) -> &mut Vec<f64> {
        let of =
            |(pairs, rank, _): &(usize, usize, _)| (*pairs, *rank) == (budget.pairs, budget.rank);
        let at = self.gains.iter().position(of).unwrap_or(self.gains.len());
        if at == self.gains.len() {
            self.gains.push((budget.pairs, budget.rank, Vec::new()));
        }
        &mut self.gains[at].2
    }
}
