//! Models on a GPU: every step is made of the project's own kernels, but for products of many rows.
//!
//! A [`Gpu`] is a [`crate::runner::Runner`] on a [`platform::Platform`]: CUDA in the program, in tests the CPU executor of
//! the kernels' sources. A step writes one block of numbers, enqueues the same launches whatever lengths are, recorded once
//! for each shape of a step, and reads the chosen tokens; nothing else waits. Rows of activations are f16, the residual
//! stream and sums f32.
//!
//! How products are summed depends on the rows of a step (one, up to sixteen, more), so what a sequence is given may
//! differ in the last bits of its logits with how many others are in the step.

mod cache;
mod control;
pub mod cuda;
mod fit;
mod metered;
mod model;
mod ops;
mod paper;
pub mod platform;
mod read;
mod run;
mod step;
pub mod tally;
mod weights;

use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use kvwarp::pages::Entry;
use kvwarp::threads::Team;

use crate::cache::{Plan, Shape};
use crate::calibration::Calibration;
use crate::config;
use crate::policy::Repeat;
use crate::runner::{BLOCK, Row, TURN};
use crate::source::Source;
use crate::spec::CacheSpec;
use cache::Cache;
use control::{Apart, Control, Grid};
pub use fit::{fit, instead};
use metered::Metered;
use model::Network;
use platform::{Buffer, GpuError, Platform, Replay, Result};
use read::Prompt;
use tally::{Bytes, Use};
pub use weights::Stored;

/// Of the memory that is free once all else is there, what pools may take.
const POOL_SHARE: f64 = 0.95;

/// How a model is to run.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Most sequences at once.
    pub rows: usize,
    /// Most tokens of a sequence.
    pub context: usize,
    /// How matrices of blocks are kept.
    pub weights: Stored,
    /// Bytes of the pools of slabs; `None`: what `rows` sequences of the whole context take, as far as memory goes.
    pub budget: Option<usize>,
    /// Tokens that a sequence must be able to hold, beside no other; memory is short otherwise.
    pub least: usize,
    /// Tokens of a prompt that are read together, as far as memory for them is set aside: more take it when they come.
    pub block: usize,
    /// Rows of a prompt that pass through a layer together.
    pub piece: usize,
}

impl Options {
    /// For `rows` sequences of `context` tokens.
    pub fn new(rows: usize, context: usize) -> Self {
        Self {
            rows,
            context,
            weights: Stored::Blocks,
            budget: None,
            least: context,
            block: BLOCK,
            piece: BLOCK,
        }
    }
}

/// A model on a device, with its sequences.
pub struct Gpu {
    platform: Rc<Metered>,
    net: Network,
    cache: Cache,
    control: Control,
    /// Room of a block of a prompt.
    prompt: Option<Prompt>,
    /// Scratch of attention.
    scratch: Buffer,
    /// Chosen tokens, `[tokens]` i32.
    chosen: Buffer,
    /// Steps enqueued so far, as recordings where the platform has them.
    recorded: HashMap<Grid, Option<Box<dyn Replay>>>,
    /// Shape of the last step.
    last: Option<Grid>,
    piece: usize,
    /// Words that have a text said again, where the policy listens.
    repeat: Option<Repeat>,
}

/// Puts the model of `source` on a device, its cache as `spec` and `calibration` have it. `progress` is given bytes of
/// weights that are done and those in all.
///
/// # Errors
/// [`GpuError::Memory`] where something does not fit; [`GpuError::Unsupported`].
pub fn open(
    source: &Source,
    spec: &CacheSpec,
    calibration: Option<&Calibration>,
    options: &Options,
    platform: Rc<dyn Platform>,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Gpu> {
    let plan = plan(source, spec, calibration);
    open_planned(source, spec, &plan, options, Metered::new(platform), progress)
}

/// The same with what the calibration adds.
fn open_planned(
    source: &Source,
    spec: &CacheSpec,
    plan: &Plan,
    options: &Options,
    platform: Rc<Metered>,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Gpu> {
    let (config, Options { rows, context, block, piece, .. }) = (&source.config, *options);
    if rows == 0 || block == 0 || piece == 0 || context == 0 || context > config.context {
        let (limit, what) = (config.context, "rows, blocks, pieces and a context of 1 to");
        return Err(GpuError::Unsupported(format!("{what} {limit} are needed, not {context}")));
    }
    if config.group() > 16 {
        let group = config.group();
        return Err(GpuError::Unsupported(format!("{group} query heads a kv head; at most 16")));
    }
    crate::policy::check(spec, config, context)
        .map_err(|e| GpuError::Unsupported(e.to_string()))?;
    if let Some(what) = read::refused(spec, piece) {
        return Err(GpuError::Unsupported(what));
    }
    let config::Config { layers, kv_heads, head_dim, .. } = *config;
    let shape = Shape { layers, kv_heads, head_dim, context };
    let cache = Cache::new(&platform, spec, shape, plan, rows)?;
    let weights = weights::Weights::new(&platform, source, options.weights, spec, progress)?;
    let most = Grid { rows: rows.next_power_of_two(), each: TURN };
    let width = [piece.max(most.tokens()), most.tokens()];
    let net = Network::new(&platform, config, weights, spec.hadamard, width)?;
    let apart = Apart::of(spec, config);
    let control = Control::new(&platform, most, cache.edits(most.rows), apart)?;
    let again = spec.selects() && spec.evict.is_some_and(|evict| evict.says_again());
    let repeat = again.then(|| Repeat::new(source)).transpose()?;
    let chosen = Buffer::new(&platform, (Use::Scratch, "chosen tokens"), 4 * most.tokens())?;
    let scratch = Buffer::new(&platform, (Use::Scratch, "attention"), 1)?;
    let mut gpu = Gpu {
        platform,
        net,
        cache,
        control,
        prompt: None,
        scratch,
        chosen,
        recorded: HashMap::new(),
        last: None,
        piece,
        repeat,
    };
    // Where tokens are chosen, a prompt is one block.
    gpu.prompt = Some(gpu.prompt_of(if spec.selects() { context } else { block.min(context) })?);
    gpu.fund(most, options.budget, options.least)?;
    Ok(gpu)
}

impl Gpu {
    /// Makes the scratch of attention for steps up to `most`, then the pools.
    fn fund(&mut self, most: Grid, budget: Option<usize>, least: usize) -> Result<()> {
        let bytes = (1..=TURN).map(|each| self.workspace(Grid { each, ..most })).max();
        let bytes = bytes.unwrap_or(0).max(1);
        // Its tickets are zero before the first call, and every call leaves them so.
        self.scratch = Buffer::zeroed(&self.platform, (Use::Scratch, "attention"), bytes)?;
        let (free, _) = self.platform.memory()?;
        self.cache.fund(budget, least, (free as f64 * POOL_SHARE) as usize)
    }

    /// Logits that chose what follows token `token` of the turn of `row` in the last step, `[vocab]`; `None` where there
    /// was no such turn, or more than 64 tokens were in the step.
    ///
    /// # Errors
    /// [`GpuError::Kernel`].
    pub fn logits(&self, row: Row, token: usize) -> Result<Option<Vec<f32>>> {
        let vocab = self.net.config.vocab;
        let held = self.net.work.logits.bytes() / (4 * vocab);
        let there = |grid: &Grid| row.0 < grid.rows && token < grid.each && grid.tokens() <= held;
        let Some(grid) = self.last.filter(there) else { return Ok(None) };
        let mut logits = vec![0.0; vocab];
        let at = self.net.work.logits.at() + (4 * vocab * (row.0 * grid.each + token)) as u64;
        self.platform.read(at, bytemuck::cast_slice_mut(&mut logits))?;
        Ok(Some(logits))
    }

    /// Bytes of a slab, such as those of a [`crate::runner::Frozen`], of latents those of each layer after those of the one
    /// before it; none for a hole.
    ///
    /// # Errors
    /// [`GpuError::Kernel`].
    pub fn slab(&self, entry: Entry) -> Result<Vec<u8>> {
        let mut all = Vec::new();
        for (at, len) in self.cache.slab(entry) {
            let first = all.len();
            all.resize(first + len, 0);
            self.platform.read(at, &mut all[first..])?;
        }
        Ok(all)
    }

    /// Whether as many sequences as there are rows may all have their whole context at once, and be frozen.
    pub fn holds_all(&self) -> bool {
        self.cache.holds_all()
    }

    /// Bytes of the device by use, when all of them were the most; what the driver and libraries take for themselves is
    /// not among them.
    pub fn taken(&self) -> Bytes {
        self.platform.most()
    }

    /// Slabs in use, by format.
    pub fn used(&self) -> crate::runner::Slabs {
        self.cache.used()
    }
}

/// What a calibration adds to `spec`.
fn plan(source: &Source, spec: &CacheSpec, calibration: Option<&Calibration>) -> Plan {
    let config = &source.config;
    let losers = calibration.map(Calibration::losers).unwrap_or_default();
    let feedback = calibration.filter(|_| spec.hadamard).map(|calibration| {
        let pairing = crate::model::pairing(config);
        let inv_freq = config.rope.frequencies(config.head_dim);
        let team = Team::new(kvwarp::threads::physical_cores());
        let layers =
            config.elite.iter().flat_map(|elite| (0..config.layers).map(move |n| (elite, n)));
        let order = layers.flat_map(|(elite, n)| elite.order(n, config.head_dim, pairing));
        let order: Vec<_> = order.collect();
        Arc::from(calibration.feedback((&inv_freq, pairing), &order, config.context, &team))
    });
    let plan = Plan::new(spec, config.layers * config.kv_heads, &losers, feedback);
    plan.with_latents(spec, config)
}
