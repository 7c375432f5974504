//! Models of a known shape with random weights: speed and memory without a download.

use half::f16;
use rand::{Rng, SeedableRng, rngs::ChaCha8Rng};

use crate::config::{Arch, Config, Pairing, Rope, Scaling};
use crate::error::{Error, Result};
use crate::weights::{Weights, expected};

/// Most bytes of random numbers: larger models use them again and again, with other offsets for other tensors.
const MOST: usize = 2 << 30;

/// Shape of a model.
struct Shape {
    name: &'static str,
    layers: usize,
    width: usize,
    heads: usize,
    kv_heads: usize,
    ffn: usize,
    vocab: usize,
    context: usize,
    theta: f32,
    tied: bool,
}

const fn shape(
    name: &'static str,
    [layers, width, heads, kv_heads, ffn, vocab]: [usize; 6],
    context: usize,
    theta: f32,
) -> Shape {
    Shape { name, layers, width, heads, kv_heads, ffn, vocab, context, theta, tied: false }
}

/// The models' own config.json; the context is room for 128k tokens and an answer, whatever they were trained for.
const SHAPES: [Shape; 4] = [
    shape("llama-3-8b", [32, 4096, 32, 8, 14_336, 128_256], 132 << 10, 500_000.0),
    shape("mistral-7b", [32, 4096, 32, 8, 14_336, 32_768], 132 << 10, 1_000_000.0),
    shape("llama-2-7b", [32, 4096, 32, 32, 11_008, 32_000], 132 << 10, 10_000.0),
    Shape {
        tied: true,
        ..shape("smollm2-135m", [30, 576, 9, 3, 1536, 49_152], 132 << 10, 100_000.0)
    },
];

/// Names of the shapes.
pub fn names() -> [&'static str; SHAPES.len()] {
    SHAPES.each_ref().map(|shape| shape.name)
}

/// Config and f16 weights of the shape of this name: matrices uniform with variance `1 / cols`, zeros where they are not
/// to be `filled`; norms 1.
///
/// # Errors
/// [`Error::Config`] with the names that exist; [`Error::Io`] when there is no memory.
pub(super) fn model(name: &str, filled: bool) -> Result<(Config, Weights)> {
    let Some(shape) = SHAPES.iter().find(|shape| shape.name == name) else {
        let known = names().join(", ");
        return Err(Error::Config(format!("no shape `{name}`; there are {known}")));
    };
    let config = shape.config();
    let largest = expected(&config).map(|e| e.rows * e.cols * 2).max().unwrap_or(0);
    let all: usize = expected(&config).map(|e| e.rows * e.cols * 2).sum();
    let bytes = all.min(MOST.max(2 * largest));
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let bound = (3.0 / shape.width as f32).sqrt();
    let weights = Weights::filled(&config, bytes, |data| {
        let mut random = [0u8; 4096];
        for data in data.chunks_mut(random.len()).filter(|_| filled) {
            rng.fill_bytes(&mut random);
            for (to, from) in data.as_chunks_mut().0.iter_mut().zip(random.as_chunks().0) {
                let uniform = f32::from(i16::from_le_bytes(*from)) / 32_768.0;
                *to = f16::from_f32(bound * uniform).to_le_bytes();
            }
        }
    })?;
    Ok((config, weights))
}

impl Shape {
    fn config(&self) -> Config {
        let Self { layers, width, heads, kv_heads, ffn, vocab, context, theta, tied, .. } = *self;
        Config {
            arch: Arch::Llama,
            name: self.name.to_owned(),
            layers,
            width,
            heads,
            kv_heads,
            head_dim: width / heads,
            ffn,
            vocab,
            context,
            rms_eps: 1e-5,
            rope: Rope {
                theta,
                pairing: Pairing::HalfSplit,
                scaling: Scaling::None,
                factors: None,
            },
            sliding_window: None,
            tied_embeddings: tied,
            qkv_bias: false,
            elite: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_have_the_published_number_of_parameters() {
        let parameters = SHAPES
            .each_ref()
            .map(|shape| expected(&shape.config()).map(|e| e.rows * e.cols).sum::<usize>());
        assert_eq!(parameters, [8_030_261_248, 7_248_023_552, 6_738_415_616, 134_515_008]);
    }

    #[test]
    fn weights_have_variance_one_over_the_width() {
        let (config, weights) = model("smollm2-135m", true).unwrap();
        weights.check(&config).unwrap();
        assert_eq!(weights.vector("output_norm", 576).unwrap(), [1.0; 576]);
        for name in ["blk.0.attn_q", "blk.29.ffn_down"] {
            let values = weights.get(name).unwrap().bytes.as_chunks().0.iter();
            let values: Vec<_> = values.map(|&b| f16::from_le_bytes(b).to_f64()).collect();
            let variance = values.iter().map(|x| x * x).sum::<f64>() / values.len() as f64;
            assert!((variance * 576.0 - 1.0).abs() < 0.02, "{name}: {variance}");
        }
    }

    #[test]
    fn an_unknown_shape_names_those_that_exist() {
        let Err(error) = model("llama-4", true) else { panic!("opened") };
        assert!(error.to_string().contains("llama-3-8b, mistral-7b"), "{error}");
    }
}
