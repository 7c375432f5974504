//! What a converted model has instead of keys and values: EliteKV (arXiv:2503.01586).
//!
//! Of each kv head some pairs keep their rotation, the elite; the other channels of its keys, and its values, come from a
//! latent vector that all heads of the layer share. `config.json` says so in `elitekv`:
//!
//! | field | what |
//! |---|---|
//! | `version` | 1 |
//! | `pairs` | elite pairs of a kv head, `r`, 1 to `head_dim / 2` |
//! | `ranks` | elements of the latent vector of each layer, `c` |
//! | `elite_pairs` | `[layers][kv heads][r]`, ascending: pair `j` is channels `j` and `j + head_dim / 2` |
//! | `source` | fingerprint of the model that was converted |
//! | `rope_factors` | divisors of the frequencies, where the source has them as a tensor of its own |

use kvwarp::lowrank_kv::Shape;
use kvwarp::rope_select::Pairing;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::{Config, MAX_EXTENT};
use crate::error::{Error, Result};

/// Version of the fields and of the tensors beside them.
const VERSION: u64 = 1;

/// Which pairs rotate, and how long latent vectors are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Elite {
    version: u64,
    /// Elite pairs of a kv head.
    pub pairs: usize,
    /// Elements of a latent vector, by layer.
    pub ranks: Vec<usize>,
    /// `[layers][kv_heads][pairs]`, ascending.
    pub elite_pairs: Vec<Vec<Vec<u8>>>,
    /// Fingerprint of the model that was converted.
    pub source: String,
    /// Divisors of the frequencies.
    #[serde(rename = "rope_factors", skip_serializing_if = "Option::is_none")]
    pub factors: Option<Vec<f32>>,
}

impl Elite {
    /// Of a model with the fingerprint `source`.
    pub fn new(ranks: Vec<usize>, elite_pairs: Vec<Vec<Vec<u8>>>, source: String) -> Self {
        let pairs = elite_pairs.first().and_then(|layer| layer.first()).map_or(0, Vec::len);
        Self { version: VERSION, pairs, ranks, elite_pairs, source, factors: None }
    }

    /// The `elitekv` of a `config.json`, where there is one.
    pub(super) fn from_json(config: &Map<String, Value>, layers: usize) -> Result<Option<Self>> {
        let Some(block) = config.get("elitekv").filter(|block| !block.is_null()) else {
            return Ok(None);
        };
        let version = block.get("version").cloned().unwrap_or_default();
        if version != VERSION {
            let message = format!("`elitekv.version` is {version}, expected {VERSION}");
            return Err(Error::Config(message));
        }
        let read: Self = serde_json::from_value(block.clone())
            .map_err(|e| Error::Config(format!("`elitekv`: {e}")))?;
        match [read.ranks.len(), read.elite_pairs.len()].into_iter().find(|&n| n != layers) {
            Some(n) => {
                Err(Error::Config(format!("`elitekv` is of {n} layers; the model has {layers}")))
            }
            None => Ok(Some(read)),
        }
    }

    /// Refuses what no model of this shape can have.
    pub(super) fn check(&self, config: &Config) -> Result<()> {
        let Config { kv_heads, head_dim, .. } = *config;
        let half = head_dim / 2;
        let fault = |message: String| Err(Error::Config(format!("`elitekv`: {message}")));
        if !(1..=half).contains(&self.pairs) {
            return fault(format!("`pairs` is {}, expected 1 to {half}", self.pairs));
        }
        if let Some(rank) = self.ranks.iter().find(|&&c| c == 0 || c as u64 > MAX_EXTENT) {
            return fault(format!("a rank of {rank}, expected 1 to {MAX_EXTENT}"));
        }
        for (layer, heads) in self.elite_pairs.iter().enumerate() {
            if heads.len() != kv_heads {
                let n = heads.len();
                return fault(format!("layer {layer} has {n} kv heads, expected {kv_heads}"));
            }
            for (head, pairs) in heads.iter().enumerate() {
                let at = format!("`elite_pairs` of layer {layer}, head {head}");
                if pairs.len() != self.pairs {
                    return fault(format!("{at}: {} pairs, expected {}", pairs.len(), self.pairs));
                }
                if let Some(pair) = pairs.iter().find(|&&pair| usize::from(pair) >= half) {
                    return fault(format!("{at}: pair {pair}, expected 0 to {}", half - 1));
                }
                if !pairs.is_sorted_by(|a, b| a < b) {
                    return fault(format!("{at}: {pairs:?} is not ascending without repetition"));
                }
            }
        }
        Ok(())
    }

    /// Channels of the keys of layer `n`, of whole keys, in the order of its tensors: of each kv head those of its elite
    /// pairs, first halves then second halves; then of each kv head those of the other pairs.
    pub fn channels(&self, n: usize, head_dim: usize, pairing: Pairing) -> [Vec<usize>; 2] {
        let (mut elite, mut rest) = (Vec::new(), Vec::new());
        for (head, chosen) in self.elite_pairs[n].iter().enumerate() {
            for second in [false, true] {
                for pair in 0..head_dim / 2 {
                    let (a, b) = pairing.channels(pair, head_dim);
                    let to = if chosen.contains(&(pair as u8)) { &mut elite } else { &mut rest };
                    to.push(head * head_dim + if second { b } else { a });
                }
            }
        }
        [elite, rest]
    }

    /// Channels of the heads of keys of layer `n`, `[kv_heads][head_dim]`, its elite pairs first: what is together in a tensor.
    pub fn order(&self, n: usize, head_dim: usize, pairing: Pairing) -> Vec<Vec<usize>> {
        let (all, heads) = (self.channels(n, head_dim, pairing), self.elite_pairs[n].len());
        let of = |h: usize| {
            let parts = all.iter().flat_map(|part| {
                let each = part.len() / heads;
                &part[h * each..][..each]
            });
            parts.map(|channel| channel - h * head_dim).collect()
        };
        (0..heads).map(of).collect()
    }

    /// What a cache of latents holds of a token in each layer.
    ///
    /// # Errors
    /// Which field has no such cache, and what to do.
    pub fn latents(&self, config: &Config) -> Result<Vec<Shape>, String> {
        let (kv_heads, pairs) = (config.kv_heads, self.pairs);
        let shape = |&rank: &usize| match Shape::new(kv_heads, pairs, rank) {
            Ok(shape) => Ok(shape),
            Err(kvwarp::Error::Unsupported { field, got, supported, .. }) => Err(format!(
                "`elitekv.{field}` is {got}, with {kv_heads} kv heads; latents take {supported}: convert again with such \
                 --pairs and --rank, or have keys and values expanded with --cache f16, q4 or q2"
            )),
            Err(error) => Err(error.to_string()),
        };
        self.ranks.iter().map(shape).collect()
    }

    /// Elements of the cache of a token of all layers, against the `2 kv_heads head_dim` of the source.
    pub fn ratio(&self, config: &Config) -> f64 {
        let Config { kv_heads, head_dim, layers, .. } = *config;
        let elements = 2 * self.pairs * kv_heads * layers + self.ranks.iter().sum::<usize>();
        elements as f64 / (2 * kv_heads * head_dim * layers) as f64
    }

    /// A hash of all of it, in hexadecimal.
    pub fn fingerprint(&self) -> String {
        // Numbers and strings only.
        let text = serde_json::to_string(self).unwrap_or_default();
        format!("{:x}", Sha256::digest(text))
    }
}
