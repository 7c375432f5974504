//! The cache spec: one string that says how a sequence's keys and values are kept.
//!
//! Grammar: `PRESET[,PART...]`, a part being `name=value` or a bare `name`; no spaces, every part at most once. A preset
//! is a format with a recipe, a row of `PRESETS`; each part is a row of `PARTS`: how it is named, what it accepts, how
//! it is read and how it is written back.

use std::fmt;
use std::str::FromStr;

use kvwarp::slab::{Format, Meta};

mod parts;

use parts::PARTS;

/// How a cache keeps keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheSpec {
    /// Name of the preset that it started from.
    pub preset: &'static str,
    /// Format of slabs that have left the window.
    pub store: Format,
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

/// KIVI's residual length and group, the default of the quantised stores.
const KIVI_WINDOW: usize = 128;
const KIVI_GROUP: usize = 32;

/// KIVI's recipe (arXiv:2402.02750).
const fn kivi(preset: &'static str, store: Format, window: usize) -> CacheSpec {
    CacheSpec {
        preset,
        store,
        window,
        sinks: 0,
        group: KIVI_GROUP,
        meta: Meta::F16,
        hadamard: false,
        range: 100,
        keep: 0,
        kivi_exact: false,
    }
}

/// Two bits with little loss; the README's table says how little.
const fn low_error(preset: &'static str, window: usize) -> CacheSpec {
    CacheSpec {
        sinks: 64,
        group: 64,
        meta: Meta::U8,
        hadamard: true,
        range: 88,
        keep: 2,
        ..kivi(preset, Format::Q2, window)
    }
}

/// Every preset. The first is f16.
pub const PRESETS: [CacheSpec; 7] = [
    kivi("f16", Format::F16, 0),
    kivi("q8", Format::Q8, KIVI_WINDOW),
    kivi("fp8", Format::Fp8, KIVI_WINDOW),
    CacheSpec { hadamard: true, ..kivi("q4", Format::Q4, KIVI_WINDOW) },
    low_error("q2", 64),
    low_error("q2-small", 0),
    kivi("q2-kivi", Format::Q2, KIVI_WINDOW),
];

impl CacheSpec {
    /// How many of `heads` kv heads stay at 4 bits where a calibration says which.
    pub fn kept(&self, heads: usize) -> usize {
        (heads * usize::from(self.keep) + 50) / 100
    }

    /// The preset of this name.
    pub fn preset(name: &str) -> Option<Self> {
        PRESETS.into_iter().find(|preset| preset.preset == name)
    }

    /// The grammar as help text, a line a part.
    pub fn help() -> String {
        let mut text = String::from(
            "PRESET is f16, q8, fp8 (e4m3), q4, q2 (2 bits with little loss; see `kvwarp calibrate`), q2-small (its smallest) \
             or q2-kivi (KIVI's recipe). Parts, for all but f16:\n",
        );
        for part in &PARTS {
            let value = if part.accepts.is_empty() { "" } else { "=N" };
            text.push_str(&format!("  {:<10}  {}\n", format!("{}{value}", part.name), part.help));
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
        spec.check().map(|()| spec)
    }

    fn read_part(&mut self, word: &str) -> Result<&'static str, String> {
        let (name, value) = word.split_once('=').unwrap_or((word, ""));
        let names = || PARTS.iter().map(|part| part.name);
        let Some(part) = PARTS.iter().find(|part| part.name == name) else {
            return Err(unknown("part", name, names()));
        };
        if self.store == Format::F16 {
            return Err(format!("`{name}` has no effect on f16: every token is kept exactly"));
        }
        if self.store == Format::Fp8 && !["window", "sinks"].contains(&name) {
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

    fn check_meta(&self) -> Result<(), String> {
        let only = |what: String| Err(format!("`meta` is `u8`; it is for {what}"));
        match *self {
            Self { meta: Meta::F16, .. } => Ok(()),
            Self { store: Format::Q8, .. } => only("q4 and q2, not q8".into()),
            Self { group: 128, .. } => only("a `group` of 32 or 64, not 128".into()),
            Self { kivi_exact: true, .. } => only("whole slabs, not for `kivi_exact`".into()),
            _ => Ok(()),
        }
    }

    /// What the parts demand of each other.
    fn check(&self) -> Result<(), String> {
        let Self { window, group, sinks, hadamard, range, .. } = *self;
        if self.kivi_exact && (hadamard || range < 100 || self.keep > 0) {
            return Err(
                "`kivi_exact` rounds as KIVI does; start from q2-kivi, or with hadamard=off".into(),
            );
        }
        self.check_meta()?;
        if !self.kivi_exact {
            return Ok(());
        }
        if window == 0 || !window.is_multiple_of(group) {
            return Err(format!(
                "`window` is {window}; with `kivi_exact` a multiple of the group, {group}"
            ));
        }
        if sinks > 0 {
            return Err(format!(
                "`sinks` is {sinks}; KIVI has none, so `kivi_exact` allows only 0"
            ));
        }
        Ok(())
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
        let preset = Self::preset(self.preset).unwrap_or_default();
        for part in &PARTS {
            let value = (part.write)(self);
            if value.is_empty() && self.kivi_exact {
                write!(f, ",{}", part.name)?;
            } else if value != (part.write)(&preset) {
                write!(f, ",{}={value}", part.name)?;
            }
        }
        Ok(())
    }
}
