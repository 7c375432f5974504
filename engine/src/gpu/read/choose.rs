//! Tokens that a policy keeps of a prompt, chosen where they lie: a layer's scores, the best of them, and their slots.
//!
//! Where all heads of a layer keep as many tokens by a score of their own, the host knows every length and every slab before
//! there are scores; it writes the slots that stay in any case, the device puts the chosen ones between them. What the host
//! has to see the scores for is in `settle.rs`.

use std::cell::RefCell;
use std::rc::Rc;

use kvwarp::device::Pieces;
use kvwarp::ffi;
use kvwarp::slab::TOKENS;

use super::block::{WORD, Words};
use crate::config::Config;
use crate::gpu::control::Apart;
use crate::gpu::metered::Metered;
use crate::gpu::ops::params;
use crate::gpu::platform::{Buffer, Result};
use crate::gpu::tally::Use;
use crate::policy::{Cut, Onward};
use crate::runner::Held;
use crate::spec::CacheSpec;

/// Least tokens of a partition of LagKV.
const LEAST_LAG: usize = 16;

/// Why tokens are not chosen on a GPU as `spec` asks; `None` where they are, or none is.
pub fn refused(spec: &CacheSpec, piece: usize) -> Option<String> {
    let evict = spec.evict.filter(|_| spec.selects())?;
    let window = usize::from(evict.options.window);
    if window > piece / 2 {
        return Some(format!(
            "evict={}:window={window}: at most {} on a GPU",
            evict.name(),
            piece / 2
        ));
    }
    None
}

/// Room to choose among the tokens of a prompt.
pub struct Choice {
    /// Log-sum-exps of a piece's newest rows, `[rows, q_heads]`; those of fewer rows.
    pub lse: Buffer,
    pub newest: Buffer,
    /// Attention to each token, `[q_heads, tokens]`.
    pub columns: Buffer,
    /// `[kv_heads, tokens]`
    pub scores: Buffer,
    /// The best of each stretch, counted from its first, `[kv_heads, tokens]`; how many; the slots that they are.
    pub indices: Buffer,
    pub counts: Buffer,
    pub picked: Buffer,
    /// What stays, `[kv_heads, tokens]`.
    pub slots: Buffer,
    /// 0, 1, ..
    pub order: Buffer,
    /// [`Numbers`]
    pub numbers: Buffer,
    pub workspace: Buffer,
    /// Most attention to each token of a part that is said again, `[layers, kv_heads, tokens]`.
    pub heard: Buffer,
    /// What the host says of heads, [`Choice::heads`].
    pub told: Buffer,
    /// How many tokens go deeper but for the newest; their residual stream and numbers.
    pub deeper: Buffer,
    pub x: Buffer,
    pub words: Buffer,
    /// What `slots` and `numbers` were written for.
    written: RefCell<Option<Frame>>,
}

/// What a layer's choice depends on beside scores.
#[derive(Clone, PartialEq, Eq)]
pub struct Frame {
    pub cut: Cut,
    pub held: Held,
    /// Slabs in the table afterwards.
    pub packed: usize,
    /// What the host chooses of each stretch, where it does.
    pub best: Option<Vec<u32>>,
}

/// Word offsets of a choice's numbers.
#[derive(Clone, Copy)]
pub struct Numbers {
    /// Tokens there, and slabs in the table, before; the same afterwards.
    pub before: [usize; 2],
    pub after: [usize; 2],
    /// Slab of the first slot written.
    pub base: usize,
    /// `[kv_heads, parts]` each: how many stay of a stretch, and its first slot
    pub k: usize,
    pub firsts: usize,
    total: usize,
}

impl Numbers {
    /// For so many stretches of all heads.
    pub fn of(rows: usize) -> Self {
        let (k, rows) = (5 * WORD, rows.next_multiple_of(WORD));
        let [before, after] = [[0, WORD], [2 * WORD, 3 * WORD]];
        Self { before, after, base: 4 * WORD, k, firsts: k + rows, total: k + 2 * rows }
    }
}

impl Frame {
    /// Slot from which on slots are written: that of the first slab that is not in the table.
    pub fn base(&self) -> usize {
        self.held.packed * TOKENS
    }

    /// Slots of a head that are written.
    pub fn stays(&self) -> usize {
        self.cut.stays() - self.base()
    }

    fn slots(&self) -> Vec<u32> {
        let nobody = vec![0; self.cut.k];
        self.cut.slots(self.base(), |_| self.best.clone().unwrap_or_else(|| nobody.clone()))
    }
}

impl Choice {
    /// For prompts of up to `tokens` tokens of which `piece` pass through a layer together.
    pub fn new(
        platform: &Rc<Metered>,
        spec: &CacheSpec,
        config: &Config,
        (tokens, piece): (usize, usize),
    ) -> Result<Self> {
        let Config { heads, kv_heads, width, layers, .. } = *config;
        let buffer = |n: usize| {
            Buffer::new(platform, (Use::Activations, "choosing tokens"), 4 * n.max(WORD))
        };
        let rows = kv_heads * (tokens / LEAST_LAG + 1);
        let follows = spec.evict.is_some_and(|evict| evict.follows_attention());
        let again = spec.evict.filter(|evict| evict.says_again());
        let observes = follows || again.is_some() || spec.tsp.is_some();
        let onward = (0..layers).find_map(|l| Onward::new(spec, tokens, (l, layers), tokens));
        let onward = onward.map_or(0, |onward| onward.kept);
        let selection = |rows: usize| {
            params!(kvw_token_select_params {
                op: ffi::KVW_SELECT_TOP_K,
                rows: rows as i32,
                n: tokens as i32,
                segment: 1,
            })
        };
        let workspace = platform.kernels().token_select_workspace(&selection(kv_heads));
        let order: Vec<u32> = (0..tokens as u32).collect();
        Ok(Self {
            lse: buffer(if observes { piece * heads } else { 0 })?,
            newest: buffer(if observes { piece * heads } else { 0 })?,
            columns: buffer(if observes { heads * tokens } else { 0 })?,
            scores: buffer(kv_heads * tokens)?,
            indices: buffer(kv_heads * tokens)?,
            counts: buffer(rows)?,
            picked: buffer(kv_heads * tokens)?,
            slots: buffer(kv_heads * tokens)?,
            order: Buffer::of(
                platform,
                (Use::Activations, "choosing tokens"),
                bytemuck::cast_slice(&order),
            )?,
            numbers: buffer(Numbers::of(rows).total)?,
            workspace: Buffer::zeroed(
                platform,
                (Use::Scratch, "choosing tokens"),
                workspace.max(1),
            )?,
            heard: buffer(again.map_or(0, |evict| {
                layers * super::again::heard(kv_heads, tokens.min(evict.options.chunk.into()))
            }))?,
            told: buffer(2 * WORD + 3 * kv_heads.next_multiple_of(WORD))?,
            deeper: buffer(WORD)?,
            x: buffer(onward * width)?,
            words: buffer(
                Words::of(Apart::of(spec, config), onward.div_ceil(piece), onward).total(onward),
            )?,
            written: RefCell::default(),
        })
    }

    /// Address of the log-sum-exps of the newest `rows` of `watched` rows.
    pub fn newest(
        &self,
        platform: &Metered,
        q_heads: usize,
        (watched, rows): (usize, usize),
    ) -> Result<u64> {
        if watched == rows {
            return Ok(self.lse.at());
        }
        let (line, width) = (4 * q_heads, 4 * q_heads * rows);
        platform.copy(&Pieces {
            to: self.newest.at(),
            from: self.lse.at() + (line * (watched - rows)) as u64,
            to_pitch: width,
            from_pitch: width,
            width,
            rows: 1,
        })?;
        Ok(self.newest.at())
    }

    /// Address of `n`, how many tokens go deeper but for the newest.
    pub fn onward_number(&self, platform: &Metered, n: usize) -> Result<u64> {
        platform.write(self.deeper.at(), bytemuck::bytes_of(&(n as u32)))?;
        Ok(self.deeper.at())
    }

    /// Tells the device of three numbers of each of so many heads, and of `rest`; gives their addresses.
    pub fn heads(
        &self,
        platform: &Metered,
        lists: [&[usize]; 3],
        rest: &[usize],
    ) -> Result<[u64; 4]> {
        let mut words: Vec<u32> = Vec::new();
        let place = |list: &[usize]| {
            let at = self.told.at() + 4 * words.len() as u64;
            words.extend(list.iter().map(|&number| number as u32));
            words.resize(words.len().next_multiple_of(WORD), 0);
            at
        };
        let [a, b, c] = lists;
        let places = [a, b, c, rest].map(place);
        platform.write(self.told.at(), bytemuck::cast_slice(&words))?;
        Ok(places)
    }

    /// Address of a number.
    pub fn number(&self, word: usize) -> u64 {
        self.numbers.at() + 4 * word as u64
    }

    /// Writes what `frame` says for `kv_heads` heads.
    pub fn write(&self, platform: &Metered, kv_heads: usize, frame: &Frame) -> Result<()> {
        if self.written.borrow().as_ref() == Some(frame) {
            return Ok(());
        }
        let Frame { cut, held, packed, .. } = frame;
        let places = Numbers::of(kv_heads * cut.parts);
        let mut numbers = vec![0u32; places.total];
        for (places, values) in
            [(places.before, [cut.len, held.packed]), (places.after, [cut.stays(), *packed])]
        {
            places.into_iter().zip(values).for_each(|(place, value)| numbers[place] = value as u32);
        }
        numbers[places.base] = held.packed as u32;
        for row in 0..kv_heads * cut.parts {
            numbers[places.k + row] = cut.k as u32;
            numbers[places.firsts + row] = (cut.first + row % cut.parts * cut.width) as u32;
        }
        platform.write(self.numbers.at(), bytemuck::cast_slice(&numbers))?;
        let slots = frame.slots().repeat(kv_heads);
        platform.write(self.slots.at(), bytemuck::cast_slice(&slots))?;
        self.written.replace(Some(frame.clone()));
        Ok(())
    }

    /// Puts the best of each stretch, found by `picked`, between the slots that stay.
    pub fn place(&self, platform: &Metered, kv_heads: usize, frame: &Frame) -> Result<()> {
        let width = 4 * frame.cut.parts * frame.cut.k;
        platform.copy(&Pieces {
            to: self.slots.at() + 4 * (frame.cut.first - frame.base()) as u64,
            from: self.picked.at(),
            to_pitch: 4 * frame.stays(),
            from_pitch: width,
            width,
            rows: kv_heads,
        })
    }
}
