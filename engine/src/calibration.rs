//! What a model's queries look like: for each kv head the second moment `E[q q^T]` of its queries after RoPE. An error of
//! a key costs what it adds to scores, so rounding follows it ([`kvwarp::slab::feedback`]).
//!
//! A moment depends on the positions of its queries, but scores only on distances: what is seen at the first positions is
//! moved to others, by RoPE itself, and averaged.
//!
//! And what each head's history loses when it alone has 2 bits: a few lose more than all others together.
//!
//! The file is safetensors: `moments` `[layers, kv_heads, D, D]`, sums in f32, and `losses` `[layers, kv_heads]`, f32, NaN
//! where not measured; metadata says which model and text they come from and how many tokens have been read, so that an
//! interrupted calibration goes on.

mod measure;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use half::f16;
use kvwarp::hadamard;
use kvwarp::rope_select::{Angles, Pairing};
use kvwarp::slab::feedback;
use kvwarp::threads::Team;
pub use measure::{SCORED, measure, read};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use sha2::{Digest, Sha256};

use crate::source::Source;

/// Version of the file's format.
const VERSION: &str = "1";
/// Positions to which moments are moved, evenly over the context.
const SHIFTS: usize = 16;
/// Bytes of each layer's query weights that the fingerprint is made of.
const FINGERPRINT_BYTES: usize = 4096;

/// Why a calibration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CalibrationError {
    /// The file cannot be read or written.
    #[error("{path}: {why}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system or the format says.
        why: String,
    },
    /// It is of something else.
    #[error("{path}: `{field}` is {got}, expected {expected}; make one with `kvwarp calibrate kv`")]
    Mismatch {
        /// The file.
        path: PathBuf,
        /// Metadata or tensor.
        field: &'static str,
        /// What the file says.
        got: String,
        /// What was needed.
        expected: String,
    },
}

/// Sums over tokens of the outer products of queries.
#[derive(Debug, Clone, PartialEq)]
pub struct Calibration {
    /// Hash of the model's shape and of some of its weights.
    model: String,
    /// Hash of the text.
    text: String,
    /// Layers, kv heads, D.
    shape: [usize; 3],
    /// Tokens read.
    pub tokens: usize,
    /// `[layers, kv_heads, D, D]`
    sums: Vec<f32>,
    /// What 2 bits of this head alone cost, in nats of divergence, `[layers, kv_heads]`; NaN where it is not known.
    losses: Vec<f32>,
}

impl Calibration {
    /// An empty one for a model and a text.
    pub fn new(source: &Source, text: &str) -> Self {
        let config = &source.config;
        let shape = [config.layers, config.kv_heads, config.head_dim];
        let heads = shape[0] * shape[1];
        let sums = vec![0.0; heads * shape[2] * shape[2]];
        let losses = vec![f32::NAN; heads];
        let text = format!("{:x}", Sha256::digest(text));
        Self { model: fingerprint(source), text, shape, tokens: 0, sums, losses }
    }

    /// Reads `path`, which must be of this model.
    ///
    /// # Errors
    /// [`CalibrationError`], with the file and the field at fault.
    pub fn open(path: &Path, source: &Source) -> Result<Self, CalibrationError> {
        let fail = |why: String| CalibrationError::File { path: path.into(), why };
        let bytes = std::fs::read(path).map_err(|e| fail(e.to_string()))?;
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| fail(e.to_string()))?;
        let mut read = Self::new(source, "");
        let metadata = header.metadata().clone().unwrap_or_default();
        let field = |name: &str| metadata.get(name).cloned().unwrap_or_else(|| "missing".into());
        let expect = |name: &'static str, expected: &str| match field(name) {
            got if got == expected => Ok(()),
            got => {
                let (path, expected) = (path.into(), expected.into());
                Err(CalibrationError::Mismatch { path, field: name, got, expected })
            }
        };
        expect("kvwarp.calibration", VERSION)?;
        expect("model", &read.model)?;
        read.text = field("text");
        read.tokens = field("tokens").parse().map_err(|e| fail(format!("`tokens`: {e}")))?;
        let file = SafeTensors::deserialize(&bytes).map_err(|e| fail(e.to_string()))?;
        let [layers, heads, d] = read.shape;
        for (name, shape, to) in [
            ("moments", &[layers, heads, d, d][..], &mut read.sums),
            ("losses", &[layers, heads], &mut read.losses),
        ] {
            let tensor = file.tensor(name).map_err(|e| fail(e.to_string()))?;
            if tensor.shape() != shape || tensor.dtype() != Dtype::F32 {
                return Err(CalibrationError::Mismatch {
                    path: path.into(),
                    field: name,
                    got: format!("{:?} {:?}", tensor.dtype(), tensor.shape()),
                    expected: format!("F32 {shape:?}"),
                });
            }
            let numbers = to.iter_mut().zip(tensor.data().as_chunks().0);
            numbers.for_each(|(x, bytes)| *x = f32::from_le_bytes(*bytes));
        }
        Ok(read)
    }

    /// Writes `path`, all of it or nothing.
    ///
    /// # Errors
    /// [`CalibrationError::File`].
    pub fn save(&self, path: &Path) -> Result<(), CalibrationError> {
        let fail = |why: String| CalibrationError::File { path: path.into(), why };
        let [layers, heads, d] = self.shape;
        let bytes = |x: &[f32]| x.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        let (sums, losses) = (bytes(&self.sums), bytes(&self.losses));
        let view = |shape: &[usize], bytes| {
            TensorView::new(Dtype::F32, shape.to_vec(), bytes).map_err(|e| fail(e.to_string()))
        };
        let tensors = [
            ("moments", view(&[layers, heads, d, d], &sums)?),
            ("losses", view(&[layers, heads], &losses)?),
        ];
        let metadata: HashMap<_, _> = [
            ("kvwarp.calibration", VERSION.to_owned()),
            ("model", self.model.clone()),
            ("text", self.text.clone()),
            ("tokens", self.tokens.to_string()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into();
        let partial = path.with_added_extension("partial");
        safetensors::serialize_to_file(tensors, Some(metadata), &partial)
            .map_err(|e| fail(e.to_string()))?;
        std::fs::rename(&partial, path).map_err(|e| fail(e.to_string()))
    }

    /// A hash of everything that rounding follows, in hexadecimal.
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        self.shape.iter().for_each(|n| hash.update((*n as u64).to_le_bytes()));
        self.sums.iter().chain(&self.losses).for_each(|x| hash.update(x.to_le_bytes()));
        format!("{:x}", hash.finalize())
    }

    /// Whether it is of the same model and text as another.
    pub fn continues(&self, other: &Self) -> bool {
        (&self.model, &self.text) == (&other.model, &other.text)
    }

    /// Adds the queries of `layer` after RoPE, `q` `[rows, kv_heads, G, D]`.
    pub fn add(&mut self, layer: usize, q: &[f32], rows: usize, team: &Team) {
        let [_, heads, d] = self.shape;
        let stride = q.len() / rows;
        let of_layer = &mut self.sums[layer * heads * d * d..][..heads * d * d];
        team.each_chunk(of_layer, d * d, |h, sums| {
            for row in q.chunks_exact(stride) {
                for q in row[h * stride / heads..(h + 1) * stride / heads].chunks_exact(d) {
                    for (sums, x) in sums.chunks_exact_mut(d).zip(q) {
                        sums.iter_mut().zip(q).for_each(|(sum, y)| *sum += x * y);
                    }
                }
            }
        });
    }

    /// Heads of all layers, `layer * kv_heads + head`, those that lose most first; without those not measured.
    pub fn losers(&self) -> Vec<usize> {
        let mut heads: Vec<_> =
            (0..self.losses.len()).filter(|&h| !self.losses[h].is_nan()).collect();
        heads.sort_by(|&a, &b| self.losses[b].total_cmp(&self.losses[a]));
        heads
    }

    /// Weights of rounding errors of keys that are turned by Hadamard matrices, `[layers, kv_heads, D, D]`, for positions
    /// below `context`. Where there is an `order` of a head, `[layers * kv_heads][D]`, that is how its channels lie before they
    /// are turned.
    pub fn feedback(
        &self,
        rope: (&[f32], Pairing),
        order: &[Vec<usize>],
        context: usize,
        team: &Team,
    ) -> Vec<f16> {
        let (d, (inv_freq, pairing)) = (self.shape[2], rope);
        let positions: Vec<i32> = (0..SHIFTS).map(|i| (context * i / SHIFTS) as i32).collect();
        let angles = Angles::new(&positions, inv_freq);
        let mut rows = vec![f16::ZERO; self.sums.len()];
        team.each_chunk(&mut rows, d * d, |i, rows| {
            let seen = &self.sums[i * d * d..][..d * d];
            let mut sum = vec![0.0; d * d];
            for shift in 0..SHIFTS {
                let moved = both_sides(seen, d, |row| {
                    // Whole heads, and a position that there is.
                    let _ = angles.rotate(shift, row, pairing);
                });
                sum.iter_mut().zip(moved).for_each(|(sum, x)| *sum += x);
            }
            let turned = both_sides(&sum, d, |rows| {
                for (row, order) in rows.chunks_exact_mut(d).zip(order.get(i).into_iter().cycle()) {
                    let as_it_was = row.to_vec();
                    row.iter_mut().zip(order).for_each(|(to, &channel)| *to = as_it_was[channel]);
                }
                hadamard::keys(rows, d);
            });
            rows.copy_from_slice(&feedback(&turned.map(f64::from).collect::<Vec<_>>()));
        });
        rows
    }
}

/// `A h A^T` of a symmetric `h` `[d, d]`, where `turn` multiplies each vector of a row by `A`.
fn both_sides(h: &[f32], d: usize, turn: impl Fn(&mut [f32])) -> impl Iterator<Item = f32> {
    let mut rows = h.to_vec();
    turn(&mut rows);
    let mut columns: Vec<f32> = (0..d * d).map(|i| rows[i % d * d + i / d]).collect();
    turn(&mut columns);
    columns.into_iter()
}

/// Where a model's calibration lies when nothing else is said: beside it.
pub fn beside(model: &Path) -> PathBuf {
    model.with_added_extension("kv.safetensors")
}

/// A hash of the model's shape and of the beginning of each layer's query weights, in hexadecimal; of a converted model also
/// of how it was converted and of the weights of its latent vectors.
pub fn fingerprint(source: &Source) -> String {
    let config = &source.config;
    let mut hash = Sha256::new();
    for n in [config.layers, config.width, config.heads, config.kv_heads, config.head_dim] {
        hash.update((n as u64).to_le_bytes());
    }
    let latent = config.elite.as_ref().map(|elite| {
        hash.update(elite.fingerprint());
        "attn_kv_a"
    });
    for layer in 0..config.layers {
        for part in ["attn_q"].into_iter().chain(latent) {
            // Opened models have it.
            if let Some(weights) = source.weights.get(&format!("blk.{layer}.{part}")) {
                hash.update(&weights.bytes[..weights.bytes.len().min(FINGERPRINT_BYTES)]);
            }
        }
    }
    format!("{:x}", hash.finalize())
}
