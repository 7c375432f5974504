//! Policies as cache specs write them.

use std::fmt;

use kvwarp::sim_evict::Anchor;

use super::{Budget, Evict, METHODS, Options, Refine, Share, Tsp};

const ANCHORS: [(&str, Anchor); 5] = [
    ("mean", Anchor::Mean),
    ("random", Anchor::Random(0)),
    ("alternate", Anchor::Alternate),
    ("zeros", Anchor::Zeros),
    ("ones", Anchor::Ones),
];

/// `METHOD:SHARE[:OPTION...]`
pub fn evict(text: &str) -> Option<Evict> {
    let mut words = text.split(':');
    let name = words.next()?;
    let row = METHODS.iter().position(|method| method.name == name)?;
    let keep = Share::parse(words.next()?)?;
    let mut evict = Evict { row: row as u8, keep, options: METHODS[row].options };
    let mut seen = Vec::new();
    for word in words {
        let (name, value) = word.split_once('=').unwrap_or((word, ""));
        if !METHODS[row].takes.contains(&name) || seen.contains(&name) {
            return None;
        }
        option(&mut evict.options, name, value)?;
        seen.push(name);
    }
    Some(evict)
}

/// Sets an option, within what kernels and memory allow.
fn option(options: &mut Options, name: &str, value: &str) -> Option<()> {
    let number = |low, high| value.parse().ok().filter(|n: &u16| (low..=high).contains(n));
    match name {
        "lag" => options.lag = number(16, 1024).filter(|lag| lag % 16 == 0)?,
        "sink" => options.sink = number(0, 4096)?,
        "window" => options.window = number(1, 1024)?,
        "pool" => options.pool = number(1, 63).filter(|width| width % 2 == 1)?,
        "chunk" => options.chunk = number(64, 16384)?,
        "seed" => options.seed = number(0, u16::MAX)?,
        "max" => options.max = matches!(value, "1" | "on"),
        _ => return None,
    }
    Some(())
}

fn written(options: &Options, name: &str) -> u16 {
    match name {
        "lag" => options.lag,
        "sink" => options.sink,
        "window" => options.window,
        "pool" => options.pool,
        "chunk" => options.chunk,
        "seed" => options.seed,
        _ => u16::from(options.max),
    }
}

impl fmt::Display for Evict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let row = &METHODS[usize::from(self.row)];
        write!(f, "{}:{}", row.name, self.keep)?;
        for name in row.takes {
            let value = written(&self.options, name);
            if value != written(&row.options, name) {
                write!(f, ":{name}={value}")?;
            }
        }
        Ok(())
    }
}

/// `kvcrush:SHARE[:ANCHOR]`
pub fn refine(text: &str) -> Option<Refine> {
    let mut words = text.strip_prefix("kvcrush:")?.split(':');
    let share = Share::parse(words.next()?)?;
    let anchor = match words.next() {
        Some(word) => ANCHORS.into_iter().find(|(name, _)| *name == word)?.1,
        None => Anchor::Mean,
    };
    words.next().is_none().then_some(Refine { share, anchor })
}

impl fmt::Display for Refine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "kvcrush:{}", self.share)?;
        match ANCHORS.iter().find(|(_, anchor)| *anchor == self.anchor) {
            Some((name, anchor)) if *anchor != Anchor::Mean => write!(f, ":{name}"),
            _ => Ok(()),
        }
    }
}

/// By name.
pub fn budget(text: &str) -> Option<Budget> {
    Budget::ALL.into_iter().find(|(name, _)| *name == text).map(|(_, budget)| budget)
}

/// Its name.
pub fn budget_name(budget: Budget) -> &'static str {
    Budget::ALL.into_iter().find(|(_, other)| *other == budget).map_or("", |(name, _)| name)
}

/// `[LAYER:]RATE`
pub fn tsp(text: &str) -> Option<Tsp> {
    let (layer, rate) = match text.split_once(':') {
        Some((layer, rate)) => (Some(layer.parse().ok()?), rate),
        None => (None, text),
    };
    Some(Tsp { layer, rate: Share::parse(rate)? })
}

impl fmt::Display for Tsp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.layer.map_or(Ok(()), |layer| write!(f, "{layer}:"))?;
        self.rate.fmt(f)
    }
}
