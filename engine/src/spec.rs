//! The cache spec: one string that says how a sequence's keys and values are kept.
//!
//! Grammar: `PRESET[,PART...]`, a part being `name=value` or a bare `name`; no spaces, every part at most once. A preset
//! is a format with a recipe, a row of `PRESETS`; each part is a row of `PARTS`: how it is named, what it accepts, how
//! it is read and how it is written back.

use std::fmt;
use std::str::FromStr;

use kvwarp::pages::packed_slabs;
use kvwarp::sim_evict;
use kvwarp::slab::{Format, Meta};

mod check;
mod parts;
mod presets;

use crate::config::Config;
use crate::policy::{Budget, Evict, METHODS, Method, Refine, Share, Tsp};
use crate::runner::BLOCK;
use parts::PARTS;
pub use presets::PRESETS;

/// How a cache keeps keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheSpec {
    /// Name of the preset that it started from.
    pub preset: &'static str,
    /// Format of slabs that have left the window.
    pub store: Format,
    /// Latents and elite keys of a converted model instead of keys and values ([`crate::config::Elite`]).
    pub latent: bool,
    /// Newest tokens that stay f16; fewer than 64 more may.
    pub window: usize,
    /// Oldest tokens that stay f16, rounded up to whole slabs.
    pub sinks: usize,
    /// Elements that share a scale and a minimum: tokens of a channel for K, channels of a token for V.
    pub group: usize,
    /// How scales and minima of q4 and q2 are kept.
    pub meta: Meta,
    /// Queries, keys and values are turned by Hadamard matrices ([`kvwarp::hadamard`]); K is rounded with the
    /// [`crate::calibration`] where there is one.
    pub hadamard: bool,
    /// Percent of a group's range that 2-bit codes span.
    pub range: u8,
    /// Percent of the kv heads, those that lose most by the calibration, that stay at 4 bits.
    pub keep: u8,
    /// Quantise K and V exactly when KIVI does, with its residual length as `window`.
    pub kivi_exact: bool,
    /// Which of the tokens read stay; `None`: all.
    pub evict: Option<Evict>,
    /// Representatives of those that do not.
    pub refine: Option<Refine>,
    /// How many each head keeps; `None`: as the method has it.
    pub budget: Option<Budget>,
    /// Which tokens go deeper in a prefill; `None`: all.
    pub tsp: Option<Tsp>,
}

impl Default for CacheSpec {
    /// f16.
    fn default() -> Self {
        PRESETS[0]
    }
}

/// A cache spec that cannot be used: the part at fault, its value and what is allowed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cache spec `{spec}`: {problem}")]
pub struct SpecError {
    /// The whole spec.
    pub spec: String,
    /// What is wrong with it.
    pub problem: String,
}

/// More tokens than any context has.
const WHOLE: usize = 1 << 30;

impl CacheSpec {
    /// What a model has where none is named: f16, or latents where it has been converted.
    pub fn of(config: &Config) -> Self {
        if config.elite.is_some() { PRESETS[PRESETS.len() - 1] } else { Self::default() }
    }

    /// What latents that have left the window are packed to, after the step or the block with which they did.
    pub fn packs(&self) -> Option<Format> {
        (self.latent && self.store != Format::F16).then_some(self.store)
    }

    /// Most tokens that a cache is given at once: of latents that are packed a block, which is f16 till then.
    pub fn at_once(&self) -> usize {
        self.packs().map_or(WHOLE, |_| BLOCK)
    }

    /// Whether a head of `len` tokens, of which the first are `chosen`, takes one and `n` more after it, none of which packs a
    /// slab or has others dropped.
    pub fn is_loose(&self, (len, chosen): (usize, usize), n: usize) -> bool {
        let packed = |len| packed_slabs(len, self.window);
        let alike = |len| packed(len) == packed(len + n);
        let room = self.lag().is_none_or(|lag| len + 1 + n < chosen + 2 * lag);
        alike(len + 1) && (self.packs().is_none() || alike(len)) && room
    }

    /// How many of `heads` kv heads stay at 4 bits where a calibration says which.
    pub fn kept(&self, heads: usize) -> usize {
        (heads * usize::from(self.keep) + 50) / 100
    }

    /// How many tokens each head keeps.
    pub fn budget(&self) -> Budget {
        let own = self.evict.map_or(Budget::Uniform, |evict| evict.budget());
        self.budget.unwrap_or(own)
    }

    /// Whether some tokens that are read are dropped, or go no deeper than some layer.
    pub fn selects(&self) -> bool {
        let drops = self.evict.is_some_and(|evict| evict.keep != Share::ALL);
        drops || self.tsp.is_some_and(|tsp| tsp.rate != Share::ALL)
    }

    /// Whether heads of a layer may hold different numbers of tokens.
    pub fn ragged(&self) -> bool {
        let heads = |evict: Evict| evict.method() == Method::RepeatHeads;
        self.selects() && (self.budget() == Budget::Global || self.evict.is_some_and(heads))
    }

    /// Tokens of a prompt that are read together: all, where some of them are chosen.
    pub fn block(&self) -> usize {
        if self.selects() { WHOLE } else { BLOCK }
    }

    /// Most tokens that a head keeps, on average, of a first read of `n`.
    pub fn stays(&self, n: usize) -> usize {
        let Some(evict) = self.evict else { return n };
        if let Some(lag) = self.lag() {
            return sim_evict::kept(n, evict.options.sink.into(), lag, evict.keep.of(lag));
        }
        let k = evict.keep.of(n);
        let (oldest, newest) = evict.protects(n, k);
        k.max(oldest + newest).min(n)
    }

    /// LagKV's partition, where tokens are dropped also while decoding.
    pub fn lag(&self) -> Option<usize> {
        let evict = self.evict.filter(|e| e.method() == Method::Lag && e.keep != Share::ALL);
        evict.map(|evict| usize::from(evict.options.lag))
    }

    /// The preset of this name.
    pub fn preset(name: &str) -> Option<Self> {
        PRESETS.into_iter().find(|preset| preset.preset == name)
    }

    /// The grammar as help text, a line a part.
    pub fn help() -> String {
        let mut text = String::from(
            "PRESET is f16, q8, fp8 (e4m3), q4, q2 (2 bits with little loss; see `kvwarp calibrate`), q2-small (its smallest), \
             q2-kivi (KIVI's recipe), latent (of a model that `kvwarp convert elitekv` has made, and what such a model has \
             where no preset is named), latent-q4 or latent-q2 (latents in 4 or 2 bits behind the window). Parts; those \
             that choose tokens go with every preset but these three, the others neither with f16 nor with latent:\n",
        );
        for part in &PARTS {
            let value = match part.accepts {
                "" => "",
                _ if part.chooses => "=...",
                _ => "=N",
            };
            text.push_str(&format!("  {:<10}  {}\n", format!("{}{value}", part.name), part.help));
        }
        text.push_str("Methods of `evict`, each with the share of tokens that stay:\n");
        for method in &METHODS {
            text.push_str(&format!("  {:<13}  {}\n", method.name, method.help));
        }
        text
    }

    fn read(text: &str) -> Result<Self, String> {
        let mut words = text.split(',');
        let name = words.next().unwrap_or_default();
        let names = || PRESETS.iter().map(|preset| preset.preset);
        let mut spec = Self::preset(name).ok_or_else(|| unknown("preset", name, names()))?;
        let mut seen = Vec::new();
        for word in words {
            let part = spec.read_part(word)?;
            if seen.contains(&part) {
                return Err(format!("`{part}` is given twice"));
            }
            seen.push(part);
        }
        // LagKV looks at two partitions of f16 tokens at a time.
        spec.window = spec.window.max(2 * spec.lag().unwrap_or(0));
        spec.check().map(|()| spec)
    }

    fn read_part(&mut self, word: &str) -> Result<&'static str, String> {
        let (name, value) = word.split_once('=').unwrap_or((word, ""));
        let names = || PARTS.iter().map(|part| part.name);
        let Some(part) = PARTS.iter().find(|part| part.name == name) else {
            return Err(unknown("part", name, names()));
        };
        if self.store == Format::F16 && !part.chooses {
            let preset = self.preset;
            return Err(format!("`{name}` has no effect on {preset}: every token is kept exactly"));
        }
        if self.latent && part.chooses {
            return Err(format!(
                "`{name}` does not go with latent: heads and layers choose tokens for themselves, but share what latent \
                 keeps of a token; it goes with f16, q4 or q2, for which keys and values are expanded"
            ));
        }
        if self.latent && !["window", "sinks", "range"].contains(&name) {
            let preset = self.preset;
            return Err(format!(
                "`{name}` has no effect on {preset}: an element has an f16 scale of 64 tokens"
            ));
        }
        if self.store == Format::Fp8 && !part.chooses && !["window", "sinks"].contains(&name) {
            return Err(format!("`{name}` has no effect on fp8: it has no scales"));
        }
        if self.store != Format::Q2 && ["range", "keep"].contains(&name) {
            return Err(format!(
                "`{name}` has no effect on {}: it is for codes of 2 bits",
                self.preset
            ));
        }
        if (part.read)(self, value) {
            return Ok(part.name);
        }
        Err(match part.accepts {
            "" => format!("`{name}` takes no value, it was given `{}`", short(value)),
            accepts => format!("`{name}` is `{}`; allowed: {accepts}", short(value)),
        })
    }
}

/// The error for a name that is none of `known`, with the nearest one where one is near.
fn unknown(what: &str, name: &str, known: impl Iterator<Item = &'static str>) -> String {
    let known: Vec<_> = known.collect();
    let distance = |candidate: &str| strsim::damerau_levenshtein(&short(name), candidate);
    let nearest = known.iter().filter(|c| distance(c) <= c.len() / 2).min_by_key(|c| distance(c));
    let hint = nearest.map(|c| format!(" (did you mean `{c}`?)")).unwrap_or_default();
    format!("unknown {what} `{}`; allowed: {}{hint}", short(name), known.join(", "))
}

/// The beginning of what a user typed, printable and short enough for a message.
fn short(text: &str) -> String {
    text.chars().take(32).map(|c| if c.is_control() { '\u{FFFD}' } else { c }).collect()
}

impl FromStr for CacheSpec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        let text = text.trim();
        Self::read(text)
            .map_err(|problem| SpecError { spec: text.chars().take(64).collect(), problem })
    }
}

impl fmt::Display for CacheSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.preset)?;
        let mut preset = Self::preset(self.preset).unwrap_or_default();
        preset.window = preset.window.max(2 * self.lag().unwrap_or(0));
        for part in &PARTS {
            let value = (part.write)(self);
            if part.accepts.is_empty() && self.kivi_exact {
                write!(f, ",{}", part.name)?;
            } else if value != (part.write)(&preset) {
                write!(f, ",{}={value}", part.name)?;
            }
        }
        Ok(())
    }
}
