//! What runs a model over many sequences: the seam between scheduling and devices.
//!
//! A [`Runner`] holds up to [`Runner::rows`] sequences, each a list of tokens whose K and V it keeps as its
//! [`CacheSpec`] says, in pools of slabs that all sequences share. It decides nothing: who joins, who leaves and who waits
//! is up to
//! its caller, be it one with a single sequence ([`crate::generate`]).
//!
//! What a sequence holds is a function of its tokens, of how they were cut into [`Runner::read`]s, of the spec and of the
//! calibration; what a step gives for one sequence does not depend on the others in it, to the last bit.

mod cpu;

use kvwarp::pages::Entry;
use kvwarp::sample::{MAX_RECENT, Sampling};
use kvwarp::slab::Format;

pub use cpu::CpuRunner;

use crate::cache::{CacheError, CacheStats};
use crate::config::Config;
use crate::model::ModelError;
use crate::profile::Profile;
use crate::spec::CacheSpec;
use crate::watch::{Interrupted, Watch};

/// A sequence that a runner holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Row(pub usize);

/// Slabs of each format, by tag; 64 tokens of latents, in all layers, count as one of f16.
pub type Slabs = [usize; Format::ALL.len()];

/// Most tokens of a turn.
pub const TURN: usize = 16;
/// Tokens of a prompt that are read together unless a caller says otherwise; a multiple of 64.
pub const BLOCK: usize = 2048;

/// How the tokens of a sequence are chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// From which distribution.
    pub sampling: Sampling,
    /// Fixes every random draw.
    pub seed: u64,
    /// Newest tokens that a repetition penalty looks at, at most 256.
    pub last: usize,
}

impl Choice {
    /// Always the most probable token.
    pub const GREEDY: Self = Self { sampling: Sampling::GREEDY, seed: 0, last: 0 };
}

/// One sequence's part in a step.
#[derive(Debug, Clone, Copy)]
pub struct Turn<'a> {
    /// The sequence.
    pub row: Row,
    /// 1 to [`TURN`] newest tokens whose K and V are not in the cache: the last one known, then at most
    /// [`Runner::drafts`] drafts.
    pub tokens: &'a [u32],
    /// How the tokens that follow are chosen.
    pub choice: &'a Choice,
    /// Number of the random draw that follows `tokens[0]`; `tokens[i]` has `draw + i`.
    pub draw: i32,
    /// What a repetition penalty looks at, `tokens[0]` included, oldest first.
    pub recent: &'a [u32],
}

impl Turn<'_> {
    /// What the penalty on what follows `tokens[i]` looks at, oldest first.
    pub fn seen(&self, i: usize) -> Vec<u32> {
        let last = self.choice.last.min(MAX_RECENT);
        let drafts = &self.tokens[(i + 1).saturating_sub(last).max(1)..=i];
        let before = self.recent.len().saturating_sub(last - drafts.len());
        [&self.recent[before..], drafts].concat()
    }
}

/// A sequence as it was at one moment, to continue from; its slabs stay taken until [`Runner::melt`].
#[derive(Debug, PartialEq, Eq)]
pub struct Frozen {
    /// Tokens given.
    pub len: usize,
    /// What each head holds; of latents, all of them together.
    pub heads: Vec<Held>,
    /// Of each head, `[layers * kv_heads]`, `ceil(tokens / 64)`: packed slabs as the sequence has them, then f16 copies of its
    /// ring.
    pub entries: Vec<Entry>,
}

/// What one kv head of a sequence holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// Tokens.
    pub len: usize,
    /// Slabs that have left the ring.
    pub packed: usize,
    /// Tokens at the start that a policy has chosen and does not choose among again.
    pub chosen: usize,
}

/// Why a runner refused.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A pool has too few slabs; nothing changed.
    #[error("{need} {format:?} slabs are needed and {free} are free")]
    Exhausted {
        /// Format of the slabs.
        format: Format,
        /// Slabs needed.
        need: usize,
        /// Slabs free.
        free: usize,
    },
    /// As many sequences are open as there may be; nothing changed.
    #[error("all {rows} sequences are in use")]
    Rows {
        /// [`Runner::rows`].
        rows: usize,
    },
    /// A turn has no tokens or more than it may; nothing changed.
    #[error("a turn of {tokens} tokens; it may have 1 to {most}")]
    Turn {
        /// Tokens of the turn.
        tokens: usize,
        /// Most tokens that it may have now.
        most: usize,
    },
    /// Sequences of this spec cannot be shared.
    #[error("a cache of `{spec}` cannot be shared: some of its slabs are quantised in part")]
    Shared {
        /// The spec.
        spec: Box<CacheSpec>,
    },
    /// The model refused; the sequences concerned must be closed.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A kernel or the device refused; the sequences concerned must be closed.
    #[error(transparent)]
    Kernel(#[from] kvwarp::Error),
    /// The GPU has too little memory; the sequences concerned must be closed.
    #[error(transparent)]
    Gpu(Box<crate::gpu::platform::GpuError>),
}

impl From<CacheError> for RunError {
    fn from(error: CacheError) -> Self {
        Self::Model(error.into())
    }
}

impl From<Interrupted> for RunError {
    fn from(interrupted: Interrupted) -> Self {
        Self::Model(interrupted.into())
    }
}

impl RunError {
    /// Whether it only says that someone asked to stop.
    pub fn is_interrupted(&self) -> bool {
        matches!(self, Self::Model(ModelError::Interrupted(_)))
    }
}

/// Slabs of both.
pub fn plus(a: Slabs, b: Slabs) -> Slabs {
    std::array::from_fn(|i| a[i] + b[i])
}

/// Slabs that a turn takes of `runner`.
///
/// # Errors
/// [`RunError::Turn`] where it has no tokens or more than it may.
pub(crate) fn need_of(runner: &dyn Runner, turn: &Turn<'_>) -> Result<Slabs, RunError> {
    let (tokens, most) = (turn.tokens.len(), 1 + runner.drafts(turn.row));
    if tokens == 0 || tokens > most {
        return Err(RunError::Turn { tokens, most });
    }
    Ok(runner.need(runner.len(turn.row), tokens))
}

/// Whether `free` slabs are as many as `need`.
///
/// # Errors
/// [`RunError::Exhausted`] with the first format of which there are too few.
pub fn check(need: &Slabs, free: &Slabs) -> Result<(), RunError> {
    let short = Format::ALL.into_iter().zip(need.iter().zip(free)).find(|(_, (n, f))| n > f);
    let Some((format, (&need, &free))) = short else { return Ok(()) };
    Err(RunError::Exhausted { format, need, free })
}

/// A model on a device, with the sequences that it holds.
///
/// A [`Row`] is valid from [`Runner::open`] or [`Runner::thaw`] to [`Runner::close`]; giving any other is an error of the
/// caller, which may panic.
pub trait Runner {
    /// Shape and constants of the model.
    fn config(&self) -> &Config;

    /// How keys and values are kept.
    fn spec(&self) -> &CacheSpec;

    /// Most sequences open at once.
    fn rows(&self) -> usize;

    /// Most tokens that a sequence may hold.
    fn context(&self) -> usize;

    /// An empty sequence.
    ///
    /// # Errors
    /// [`RunError::Rows`] when all are in use.
    fn open(&mut self) -> Result<Row, RunError>;

    /// Ends a sequence and gives its slabs back.
    fn close(&mut self, row: Row);

    /// Tokens that a sequence holds.
    fn len(&self, row: Row) -> usize;

    /// Slabs at hand.
    fn free(&self) -> Slabs;

    /// Slabs that a sequence of `len` tokens takes for `n` more.
    fn need(&self, len: usize, n: usize) -> Slabs;

    /// Reads tokens of a prompt after what `row` holds, layer by layer. There are no logits: the last token of a prompt
    /// goes through [`Runner::step`].
    ///
    /// # Errors
    /// [`RunError`]; of [`RunError::Model`] and [`RunError::Kernel`] `row` must be closed.
    fn read(&mut self, row: Row, tokens: &[u32], watch: &mut Watch<'_>) -> Result<(), RunError>;

    /// Appends each turn's tokens and chooses what follows each of them: `out[i].len() == turns[i].tokens.len()`. At most
    /// one turn a row.
    ///
    /// # Errors
    /// [`RunError`]; of [`RunError::Model`] and [`RunError::Kernel`] the rows of all turns must be closed.
    fn step(&mut self, turns: &[Turn<'_>], out: &mut Vec<Vec<u32>>) -> Result<(), RunError>;

    /// Forgets the newest `n` tokens: drafts that were not taken.
    ///
    /// # Errors
    /// [`RunError::Model`] when some of them are packed; nothing changes then.
    fn rollback(&mut self, row: Row, n: usize) -> Result<(), RunError>;

    /// Most drafts that the next turn of `row` may carry, at most [`TURN`] - 1: none pushes a slab out of the window.
    fn drafts(&self, row: Row) -> usize;

    /// What `row` holds, shared: packed slabs by reference, the ring's slabs copied into f16 slabs.
    ///
    /// # Errors
    /// [`RunError::Exhausted`]; [`RunError::Shared`] with `kivi_exact`.
    fn freeze(&mut self, row: Row) -> Result<Frozen, RunError>;

    /// A new sequence that continues from what was frozen.
    ///
    /// # Errors
    /// [`RunError::Rows`]; [`RunError::Kernel`].
    fn thaw(&mut self, frozen: &Frozen) -> Result<Row, RunError>;

    /// Gives back what a frozen sequence keeps.
    fn melt(&mut self, frozen: Frozen);

    /// What a sequence costs; slabs that it shares count in full.
    fn stats(&self, row: Row) -> CacheStats;

    /// Bytes taken when they were the most, by what they are for; empty where they are not counted.
    fn memory(&self) -> Vec<(&'static str, usize)> {
        Vec::new()
    }

    /// Times every launch from here on; a step is then not a recording, but each launch by itself.
    fn start_profile(&mut self) {}

    /// What was launched since [`Runner::start_profile`]; nothing where there are no kernels. Time is not taken any more.
    ///
    /// # Errors
    /// [`RunError::Kernel`].
    fn end_profile(&mut self) -> Result<Profile, RunError> {
        Ok(Profile::default())
    }
}
