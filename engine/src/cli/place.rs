//! A model where `--device` has it run.

use std::rc::Rc;

use anyhow::{Context, anyhow, bail};
use kvwarp::device::Device;

use super::args::{self, ModelArgs};
use super::output::Progress;
use super::{Usage, open};
use crate::calibration::Calibration;
use crate::fit::Fit;
use crate::gpu::cuda::CudaPlatform;
use crate::gpu::platform::GpuError;
use crate::gpu::{self, Options};
use crate::model::Model;
use crate::runner::{BLOCK, CpuRunner, Runner};
use crate::source::Source;
use crate::spec::CacheSpec;

/// A model on the processor, or a model that is put on a GPU with each runner.
pub enum Place<'s> {
    /// The processor.
    Cpu(Model<'s>),
    /// A GPU.
    Cuda(OnGpu<'s>),
}

/// What a runner on a GPU is made of.
pub struct OnGpu<'s> {
    source: &'s Source,
    calibration: Option<Calibration>,
    weights: gpu::Stored,
    platform: Rc<CudaPlatform>,
    /// Bytes free before anything was put there.
    free: usize,
}

/// Of sequences.
#[derive(Debug, Clone, Copy)]
pub struct Lengths {
    /// Tokens that a sequence may hold.
    pub context: usize,
    /// Tokens of a prompt that are read together.
    pub block: usize,
}

/// For how many tokens a runner has room.
#[derive(Debug, Clone, Copy)]
pub struct Room {
    /// Sequences at once.
    pub rows: usize,
    pub lengths: Lengths,
    /// Tokens that a sequence must be able to hold; on a GPU.
    pub least: usize,
    /// Tokens that the longest will hold.
    pub longest: usize,
    /// Bytes of the pools; `None` = what `rows` sequences of `longest` tokens take, and their rings to be shared.
    pub pool: Option<usize>,
}

impl<'s> Place<'s> {
    /// The model of `source` where the arguments have it.
    pub fn new(args: &ModelArgs, source: &'s Source) -> anyhow::Result<Self> {
        if args.device == args::Device::Cpu {
            return Ok(Self::Cpu(open::model(args, source)?));
        }
        let cuda = match Device::cuda(0).context("--device cuda")? {
            Device::Cuda(cuda) => cuda,
            Device::Cpu => bail!("--device cuda: no GPU"),
        };
        Ok(Self::Cuda(OnGpu {
            source,
            calibration: open::read_calibration(args, source)?,
            weights: args.weights(),
            free: cuda.memory()?.0,
            platform: Rc::new(CudaPlatform::new(cuda)?),
        }))
    }

    /// How many sequences a GPU could hold at once, were nothing else on it; `None` on the processor.
    pub fn fit(&self, spec: &CacheSpec, lengths: Lengths) -> anyhow::Result<Option<Fit>> {
        let Self::Cuda(gpu) = self else { return Ok(None) };
        let OnGpu { source, calibration, weights, free, .. } = gpu;
        fit_on_gpu(source, calibration.as_ref(), *weights, spec, lengths, *free).map(Some)
    }

    /// Says what would make a cache better, where something would.
    pub fn note_uncalibrated(&self, spec: &CacheSpec) {
        let calibrated = match self {
            Self::Cpu(model) => model.is_calibrated(),
            Self::Cuda(gpu) => gpu.calibration.is_some(),
        };
        open::note_uncalibrated(calibrated, spec);
    }

    /// A runner with room for so much; on a GPU the weights are put there.
    pub fn runner(&self, spec: &CacheSpec, room: Room) -> anyhow::Result<Box<dyn Runner + '_>> {
        let Room { rows, lengths: Lengths { context, block }, least, longest, pool } = room;
        match self {
            Self::Cpu(model) => {
                let runner = CpuRunner::new(model, spec, rows, context)?;
                let slabs = match pool {
                    Some(bytes) => runner.slabs_in(bytes, longest),
                    None => runner.slabs_for(rows, longest),
                };
                Ok(Box::new(runner.with_pools(&slabs)))
            }
            Self::Cuda(gpu) => {
                let OnGpu { source, calibration, weights, platform, .. } = gpu;
                let most = source.config.context;
                if context > most {
                    return Err(Usage(format!(
                        "a context of {context} tokens; the model has {most}"
                    ))
                    .into());
                }
                let new = Options::new(rows, context);
                let options = Options { weights: *weights, budget: pool, least, block, ..new };
                let mut progress = Progress::new("loading weights", 1000);
                let mut shown = 0;
                let mut step = |done: usize, all: usize| {
                    let now = done * 1000 / all.max(1);
                    progress.step(now - shown);
                    shown = now;
                };
                let runner = gpu::open(
                    source,
                    spec,
                    calibration.as_ref(),
                    &options,
                    platform.clone(),
                    &mut step,
                );
                progress.clear();
                match runner {
                    Err(error @ GpuError::Memory { .. }) if pool.is_none() => {
                        Err(gpu.advised(error, spec, &options))
                    }
                    runner => Ok(Box::new(runner?)),
                }
            }
        }
    }
}

impl OnGpu<'_> {
    /// The error with what would fit, where something would.
    fn advised(&self, error: GpuError, spec: &CacheSpec, options: &Options) -> anyhow::Error {
        let Self { source, calibration, free, .. } = self;
        match gpu::instead(source, spec, calibration.as_ref(), options, *free) {
            Ok(instead) if !instead.is_empty() => anyhow!("{error}: {instead}"),
            _ => error.into(),
        }
    }
}

impl Room {
    /// For one sequence.
    pub fn one(context: usize) -> Self {
        let lengths = Lengths { context, block: BLOCK };
        Self { rows: 1, lengths, least: context, longest: context, pool: None }
    }
}

/// How many sequences a GPU with `memory` free bytes could hold at once, there or not.
pub fn fit_on_gpu(
    source: &Source,
    calibration: Option<&Calibration>,
    weights: gpu::Stored,
    spec: &CacheSpec,
    lengths: Lengths,
    memory: usize,
) -> anyhow::Result<Fit> {
    let Lengths { context, block } = lengths;
    let options = Options { weights, block: block.max(1), ..Options::new(1, context) };
    Ok(gpu::fit(source, spec, calibration, &options, memory)?)
}
