//! Cells added up: a summary a cache.

use std::collections::BTreeMap;

use serde::Serialize;

use super::hidden::{Answer, Verdict};
use super::stats::{Mean, Share, median};
use super::{Found, Held, Measured, Sample, Task};

/// What all samples of a run gave with one cache.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// The cache's spec.
    pub cache: String,
    /// Of [`Task::Text`].
    pub text: Option<Likelihood>,
    /// Of [`Task::Passkey`].
    pub passkey: Option<Recall>,
    /// Of [`Task::Needle`].
    pub needle: Option<Recall>,
    /// Of [`Task::MultiQuery`].
    pub multi_query: Option<Recall>,
    /// Of [`Task::Speed`].
    pub speed: Option<Speed>,
}

/// How well texts are predicted.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Likelihood {
    /// Windows.
    pub windows: usize,
    /// Tokens predicted in all.
    pub tokens: usize,
    /// Negative log-probability of a token, in nats, over windows.
    pub nll: Mean,
    /// What of it an f16 cache would save, in pairs.
    pub nats_over_f16: Mean,
    /// Divergence from f16's predictions, in nats.
    pub kl: Mean,
    /// Tokens for which both find the same token most probable; taken as independent.
    pub same_top: Share,
    /// Memory after the prefix.
    pub memory: Memory,
}

/// What was found again.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Recall {
    /// Right answers.
    pub found: Share,
    /// Wrong answers of the right kind.
    pub wrong: usize,
    /// Answers without digits where a number was asked for.
    pub prose: usize,
    /// Mean worth of answers: digits before the first slip, or words that came back.
    pub worth: f64,
    /// Right answers to the first question and to all others, where there are others.
    pub first_and_others: Option<[Share; 2]>,
    /// Right answers at each place, by tokens and then depth.
    pub grid: Vec<Place>,
    /// Memory after the document.
    pub memory: Memory,
}

/// One place of a grid.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Place {
    /// Tokens of the prompt.
    pub tokens: usize,
    /// Percent of the document before what is hidden.
    pub depth: u8,
    /// Right answers.
    pub found: Share,
    /// Mean worth of answers.
    pub worth: f64,
}

/// Time and memory.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Speed {
    /// Repetitions.
    pub n: usize,
    /// Tokens read.
    pub tokens: usize,
    /// Seconds to the first token, the median.
    pub first_token: f64,
    /// Tokens a second after it, the median.
    pub tokens_a_second: f64,
    /// Memory after reading.
    pub memory: Memory,
}

/// Means over samples.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Memory {
    /// Bytes.
    pub bytes: f64,
    /// Most bytes while reading.
    pub peak_bytes: f64,
    /// Bits for each element of K and V that was read.
    pub bits: f64,
}

impl Summary {
    /// Of all samples that were measured with a cache.
    pub fn new(cache: &str, cells: &[(&Sample, &Measured)]) -> Self {
        let of = |task| -> Vec<_> {
            cells.iter().filter(|(sample, _)| sample.task() == task).copied().collect()
        };
        Self {
            cache: cache.to_owned(),
            text: likelihood(&of(Task::Text)),
            passkey: recall(&of(Task::Passkey)),
            needle: recall(&of(Task::Needle)),
            multi_query: recall(&of(Task::MultiQuery)),
            speed: speed(&of(Task::Speed)),
        }
    }

    /// What was found again, by task.
    pub fn recalls(&self) -> impl Iterator<Item = (&'static str, &Recall)> {
        let all = [
            ("passkey", &self.passkey),
            ("needle", &self.needle),
            ("multi-query", &self.multi_query),
        ];
        all.into_iter().filter_map(|(name, recall)| Some((name, recall.as_ref()?)))
    }

    /// Memory of the longest prompts that were measured.
    pub fn memory(&self) -> Option<Memory> {
        let speed = self.speed.as_ref().map(|speed| speed.memory);
        let text = || self.text.as_ref().map(|text| text.memory);
        let recall = || self.recalls().next().map(|(_, recall)| recall.memory);
        speed.or_else(text).or_else(recall)
    }
}

type Cells<'a> = [(&'a Sample, &'a Measured)];

fn memory(cells: &Cells<'_>) -> Memory {
    let mean = |of: fn(&Held) -> f64| {
        Mean::of(&cells.iter().map(|(_, measured)| of(&measured.held)).collect::<Vec<_>>()).mean
    };
    Memory {
        bytes: mean(|held| held.bytes as f64),
        peak_bytes: mean(|held| held.peak_bytes as f64),
        bits: mean(|held| held.bits),
    }
}

fn likelihood(cells: &Cells<'_>) -> Option<Likelihood> {
    let (mut nlls, mut more, mut kls, mut same, mut all) = (vec![], vec![], vec![], 0, 0);
    for (_, measured) in cells {
        if let Found::Likelihood { nll, f16, kl, tokens, same_top } = measured.found {
            nlls.push(nll);
            more.push(nll - f16);
            kls.push(kl);
            same += same_top;
            all += tokens;
        }
    }
    (!nlls.is_empty()).then(|| Likelihood {
        windows: nlls.len(),
        tokens: all,
        nll: Mean::of(&nlls),
        nats_over_f16: Mean::of(&more),
        kl: Mean::of(&kls),
        same_top: Share::new(same, all),
        memory: memory(cells),
    })
}

fn answers(measured: &Measured) -> &[Answer] {
    if let Found::Answers(answers) = &measured.found { answers } else { &[] }
}

fn found<'a>(answers: impl Iterator<Item = &'a Answer>) -> Share {
    Share::of(answers.map(|answer| answer.verdict == Verdict::Found))
}

fn worth<'a>(answers: impl Iterator<Item = &'a Answer>) -> f64 {
    Mean::of(&answers.map(|answer| answer.share).collect::<Vec<_>>()).mean
}

fn recall(cells: &Cells<'_>) -> Option<Recall> {
    let all = || cells.iter().flat_map(|(_, measured)| answers(measured));
    all().next()?;
    let mut places = BTreeMap::<_, Vec<&Answer>>::new();
    for (sample, measured) in cells {
        let at = sample.place().map(|place| places.entry(place).or_default());
        at.into_iter().for_each(|place| place.extend(answers(measured)));
    }
    let place = |((tokens, depth), answers): ((usize, u8), Vec<&Answer>)| {
        let (found, worth) = (found(answers.iter().copied()), worth(answers.iter().copied()));
        Place { tokens, depth, found, worth }
    };
    let firsts = cells.iter().filter_map(|(_, measured)| answers(measured).first());
    let others = cells.iter().flat_map(|(_, measured)| answers(measured).iter().skip(1));
    let first_and_others = [found(firsts), found(others)];
    let count = |verdict| all().filter(|answer| answer.verdict == verdict).count();
    Some(Recall {
        found: found(all()),
        wrong: count(Verdict::Wrong),
        prose: count(Verdict::Prose),
        worth: worth(all()),
        first_and_others: (first_and_others[1].n > 0).then_some(first_and_others),
        grid: places.into_iter().map(place).collect(),
        memory: memory(cells),
    })
}

fn speed(cells: &Cells<'_>) -> Option<Speed> {
    let times = || {
        cells.iter().filter_map(|(_, measured)| match measured.found {
            Found::Times { first_token, tokens_a_second } => Some((first_token, tokens_a_second)),
            _ => None,
        })
    };
    let tokens = cells.iter().map(|(_, measured)| measured.held.tokens).max()?;
    Some(Speed {
        n: times().count(),
        tokens,
        first_token: median(times().map(|time| time.0)),
        tokens_a_second: median(times().map(|time| time.1)),
        memory: memory(cells),
    })
}
