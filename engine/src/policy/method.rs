//! Methods that score tokens.

use super::{Budget, Share};

/// What a token is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// How far a token lies from those that come a lag later (LagKV, arXiv:2504.04704): the best of each partition.
    Lag,
    /// The same, ranked within each partition, and the best of all (kvpress).
    LagRanked,
    /// Attention of the newest tokens, pooled.
    Window,
    /// Attention of all tokens; half of those kept are the newest (H2O, arXiv:2306.14048).
    Column,
    /// Most attention while the text is said again (KVzip, arXiv:2505.23416).
    Repeat,
    /// The same, whole heads at a time.
    RepeatHeads,
    /// Small keys, which attract attention.
    KeyNorm,
    /// The oldest and the newest (StreamingLLM, arXiv:2309.17453).
    Recent,
    /// None: a choice to compare with.
    Random,
}

/// Numbers of a method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Tokens of a partition.
    pub lag: u16,
    /// Oldest tokens that always stay.
    pub sink: u16,
    /// Newest tokens whose attention counts, and which always stay.
    pub window: u16,
    /// Neighbours that a score is pooled over, odd.
    pub pool: u16,
    /// Their maximum, not their mean.
    pub max: bool,
    /// Tokens that are said again at a time.
    pub chunk: u16,
    /// Of the random choice.
    pub seed: u16,
}

/// A method and how much it keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Evict {
    /// Row of [`METHODS`].
    pub row: u8,
    /// Share of the tokens that stay.
    pub keep: Share,
    /// Its numbers.
    pub options: Options,
}

/// How a method is named.
pub struct Row {
    /// In a spec.
    pub name: &'static str,
    /// What it computes.
    pub method: Method,
    /// Which of [`Options`] may be given.
    pub takes: &'static [&'static str],
    /// Where they are not.
    pub options: Options,
    /// For help.
    pub help: &'static str,
}

const NONE: Options =
    Options { lag: 128, sink: 0, window: 0, pool: 1, max: false, chunk: 2048, seed: 0 };

/// Every method.
pub const METHODS: [Row; 10] = [
    Row {
        name: "lagkv",
        method: Method::Lag,
        takes: &["lag", "sink"],
        options: Options { sink: 16, ..NONE },
        help: "LagKV: the best of each `lag` tokens (128), also while decoding; first `sink` (16)",
    },
    Row {
        name: "lagkv-kvpress",
        method: Method::LagRanked,
        takes: &["lag", "sink"],
        options: Options { sink: 4, ..NONE },
        help: "LagKV as kvpress has it: ranks within each `lag` tokens (128); first `sink` (4)",
    },
    Row {
        name: "snapkv",
        method: Method::Window,
        takes: &["window", "pool", "max"],
        options: Options { window: 64, pool: 5, ..NONE },
        help: "SnapKV: attention of the newest `window` (64), mean over `pool` neighbours (5); `max`",
    },
    Row {
        name: "fastkv",
        method: Method::Window,
        takes: &["window", "pool", "max"],
        options: Options { window: 8, pool: 7, max: true, ..NONE },
        help: "FastKV: the same with `window` 8, maximum over `pool` 7",
    },
    Row {
        name: "h2o",
        method: Method::Column,
        takes: &[],
        options: NONE,
        help: "H2O: attention of all tokens; half of those kept are the newest",
    },
    Row {
        name: "kvzip",
        method: Method::Repeat,
        takes: &["sink", "chunk"],
        options: Options { sink: 4, ..NONE },
        help: "KVzip: attention while the text is said again, `chunk` tokens at a time (2048); first `sink` (4)",
    },
    Row {
        name: "kvzip-head",
        method: Method::RepeatHeads,
        takes: &["sink", "chunk"],
        options: Options { sink: 4, ..NONE },
        help: "KVzip, whole heads at a time",
    },
    Row { name: "keynorm", method: Method::KeyNorm, takes: &[], options: NONE, help: "small keys" },
    Row {
        name: "streaming",
        method: Method::Recent,
        takes: &["sink"],
        options: Options { sink: 4, ..NONE },
        help: "StreamingLLM: first `sink` (4) and the newest",
    },
    Row {
        name: "random",
        method: Method::Random,
        takes: &["seed"],
        options: NONE,
        help: "a random choice of `seed` (0)",
    },
];

impl Evict {
    /// What it computes.
    pub fn method(&self) -> Method {
        METHODS[usize::from(self.row)].method
    }

    /// Whether it has a text said again.
    pub fn says_again(&self) -> bool {
        matches!(self.method(), Method::Repeat | Method::RepeatHeads)
    }

    /// Whether it keeps what the newest tokens attend to: of a prompt that ends in a question, what that asks for.
    pub fn follows_attention(&self) -> bool {
        matches!(self.method(), Method::Window | Method::Column)
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        METHODS[usize::from(self.row)].name
    }

    /// The budget where a spec gives none.
    pub fn budget(&self) -> Budget {
        match self.method() {
            Method::Repeat => Budget::Global,
            _ => Budget::Uniform,
        }
    }

    /// Oldest and newest of `n` tokens that always stay, of which `k` are to be kept.
    pub fn protects(&self, n: usize, k: usize) -> (usize, usize) {
        let Options { sink, window, lag, .. } = self.options;
        let newest = match self.method() {
            Method::Window => usize::from(window),
            Method::Column => k / 2,
            Method::LagRanked => {
                let (rest, lag) = (n.saturating_sub(sink.into()), usize::from(lag));
                if rest < 2 * lag { 0 } else { lag + rest % lag }
            }
            _ => 0,
        };
        (n.min(usize::from(sink)), newest.min(n))
    }
}
