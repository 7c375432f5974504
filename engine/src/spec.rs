//! The cache spec: one string that says how a sequence's keys and values are kept.
//!
//! Grammar: `STORE[,PART...]`, a part being `name=value` or a bare `name`; no spaces, every part at most once. Each
//! part is one row of the table `PARTS`: how it is named, what it accepts, how it is read and how it is written back.

use std::fmt;
use std::str::FromStr;

use kvwarp::slab::{Format, Meta};

/// How a cache keeps keys and values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheSpec {
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
    /// Quantise K and V exactly when KIVI does, with its residual length as `window`.
    pub kivi_exact: bool,
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
/// Bound on `window` and `sinks`: both are f16 memory for every layer and head.
const MAX_TOKENS: usize = 1 << 20;

const STORES: [(&str, Format); 5] = [
    ("f16", Format::F16),
    ("q8", Format::Q8),
    ("fp8", Format::Fp8),
    ("q4", Format::Q4),
    ("q2", Format::Q2),
];

/// One part of the grammar.
struct Part {
    name: &'static str,
    /// What its value may be, as help and errors say it; empty for a bare name.
    accepts: &'static str,
    help: &'static str,
    /// Takes the value; `false` when it is not acceptable.
    read: fn(&mut CacheSpec, &str) -> bool,
    /// The value to write, `None` where it is the store's default.
    write: fn(&CacheSpec) -> Option<String>,
}

const PARTS: [Part; 5] = [
    Part {
        name: "window",
        accepts: "0 to 1048576 tokens",
        help: "newest tokens that stay f16 (default 128)",
        read: |spec, value| tokens(value).is_some_and(|n| set(&mut spec.window, n)),
        write: |spec| (spec.window != KIVI_WINDOW).then(|| spec.window.to_string()),
    },
    Part {
        name: "sinks",
        accepts: "0 to 1048576 tokens",
        help: "oldest tokens that stay f16, in slabs of 64 (default 0)",
        read: |spec, value| tokens(value).is_some_and(|n| set(&mut spec.sinks, n)),
        write: |spec| (spec.sinks != 0).then(|| spec.sinks.to_string()),
    },
    Part {
        name: "group",
        accepts: "32, 64 or 128",
        help: "elements that share a scale and a minimum (default 32)",
        read: |spec, value| {
            let group = [32, 64, 128].into_iter().find(|n| n.to_string() == value);
            group.is_some_and(|n| set(&mut spec.group, n))
        },
        write: |spec| (spec.group != KIVI_GROUP).then(|| spec.group.to_string()),
    },
    Part {
        name: "meta",
        accepts: "f16 or u8",
        help: "kind of scales and minima of q4 and q2, u8 with group 32 or 64 (default f16)",
        read: |spec, value| {
            let kinds = [("f16", Meta::F16), ("u8", Meta::U8)];
            let kind = kinds.into_iter().find(|(name, _)| *name == value);
            kind.is_some_and(|(_, meta)| set(&mut spec.meta, meta))
        },
        write: |spec| (spec.meta == Meta::U8).then(|| "u8".to_owned()),
    },
    Part {
        name: "kivi_exact",
        accepts: "",
        help: "KIVI's own K and V boundaries; window is its residual length",
        read: |spec, value| value.is_empty() && set(&mut spec.kivi_exact, true),
        write: |spec| spec.kivi_exact.then(String::new),
    },
];

fn set<T>(field: &mut T, value: T) -> bool {
    *field = value;
    true
}

fn tokens(value: &str) -> Option<usize> {
    let digits = !value.is_empty() && value.bytes().all(|b| b.is_ascii_digit());
    value.parse().ok().filter(|n| digits && *n <= MAX_TOKENS)
}

impl CacheSpec {
    /// A store with its defaults.
    pub fn new(store: Format) -> Self {
        let window = if store == Format::F16 { 0 } else { KIVI_WINDOW };
        Self { store, window, sinks: 0, group: KIVI_GROUP, meta: Meta::F16, kivi_exact: false }
    }

    /// The grammar as help text, a line a part.
    pub fn help() -> String {
        let mut text = String::from(
            "STORE is f16, q8, q4, q2 (codes of so many bits) or fp8 (e4m3). Parts, for all but f16:\n",
        );
        for part in &PARTS {
            let value = if part.accepts.is_empty() { "" } else { "=N" };
            text.push_str(&format!("  {:<10}  {}\n", format!("{}{value}", part.name), part.help));
        }
        text
    }

    /// Name of the store alone.
    pub fn store_name(&self) -> &'static str {
        STORES.iter().find(|(_, store)| *store == self.store).map_or("", |(name, _)| name)
    }

    fn read(text: &str) -> Result<Self, String> {
        let mut words = text.split(',');
        let mut spec = Self::new(store(words.next().unwrap_or_default())?);
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
        let Self { window, group, sinks, .. } = *self;
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

fn store(name: &str) -> Result<Format, String> {
    let found = STORES.iter().find(|(known, _)| *known == name);
    found
        .map(|(_, store)| *store)
        .ok_or_else(|| unknown("store", name, STORES.iter().map(|(known, _)| *known)))
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
        f.write_str(self.store_name())?;
        if self.store == Format::F16 {
            return Ok(());
        }
        for part in &PARTS {
            match (part.write)(self) {
                Some(value) if value.is_empty() => write!(f, ",{}", part.name)?,
                Some(value) => write!(f, ",{}={value}", part.name)?,
                None => {}
            }
        }
        Ok(())
    }
}
