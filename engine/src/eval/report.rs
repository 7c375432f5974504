//! A sweep as one page that needs nothing else: no network, no other file.

mod draw;
mod heat;
mod plot;

use minijinja::{Environment, context};
use plotters::style::RGBColor;
use serde::Serialize;

use super::stats::{Mean, Share};
use super::summary::{Recall, Summary};
pub use heat::count;
use heat::heat;
use plot::{Kind, Point, plot};

/// What the page says of a run.
#[derive(Debug, Clone, Serialize)]
pub struct About {
    /// The model's name.
    pub model: String,
    /// [`crate::calibration::fingerprint`].
    pub fingerprint: String,
    /// As in [`super::Origin`].
    pub setup: String,
    /// What fixed random choices.
    pub seed: u64,
    /// Tasks, and what each did.
    pub tasks: Vec<(&'static str, String)>,
    /// Cells that were asked for and are not there.
    pub missing: usize,
}

/// Why there is no page.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// A plot was refused.
    #[error("a plot of the report: {0}")]
    Plot(#[from] draw::Refusal),
    /// The template was refused.
    #[error("the report's template: {0}")]
    Template(#[from] minijinja::Error),
}

/// An estimate and its interval, as the table has them.
#[derive(Serialize)]
struct Number {
    value: String,
    range: String,
}

/// A row of the table.
#[derive(Serialize)]
struct Row {
    cache: String,
    colour: String,
    numbers: Vec<Option<Number>>,
}

/// Columns of the table after the cache's: name, and what it means.
const COLUMNS: [(&str, &str); 11] = [
    ("bits", "KV bytes over the elements of K and V that were read"),
    ("KV", "bytes of the compressed prompt"),
    ("peak", "most bytes while it was read"),
    ("first token", "time to read the prompt and choose a token"),
    ("tokens/s", "tokens a second after the first"),
    ("nats over f16", "log-perplexity, less that of an f16 cache"),
    ("KL", "divergence from the predictions of an f16 cache, in nats"),
    ("same top token", "as with an f16 cache"),
    ("passkey", "numbers said without a slip"),
    ("needle", "sentences of which every word came back"),
    ("multi-query", "numbers said, of several in a document"),
];

/// The page.
///
/// # Errors
/// [`ReportError`].
pub fn html(about: &About, summaries: &[Summary]) -> Result<String, ReportError> {
    let rows: Vec<_> = summaries.iter().enumerate().map(|(i, summary)| row(i, summary)).collect();
    // A column that no cache fills says nothing.
    let shown: Vec<_> =
        (0..COLUMNS.len()).filter(|&i| rows.iter().any(|row| row.numbers[i].is_some())).collect();
    let columns: Vec<_> = shown.iter().map(|&i| COLUMNS[i]).collect();
    let rows = rows.into_iter().map(|Row { cache, colour, mut numbers }| {
        let numbers = shown.iter().map(|&i| numbers[i].take()).collect();
        Row { cache, colour, numbers }
    });
    let mut page = Environment::new();
    page.add_template("report.html", include_str!("report/page.html"))?;
    let context = context! {
        about => about,
        version => env!("CARGO_PKG_VERSION"),
        columns => columns,
        rows => rows.collect::<Vec<_>>(),
        plots => plots(summaries)?,
        heats => heats(summaries)?,
        firsts => firsts(summaries),
    };
    Ok(page.get_template("report.html")?.render(context)?)
}

fn row(i: usize, summary: &Summary) -> Row {
    let only = |value: String| Number { value, range: String::new() };
    let (memory, speed) = (summary.memory(), summary.speed.as_ref());
    let text = summary.text.as_ref();
    let found = |recall: &Option<Recall>| recall.as_ref().map(|recall| share(&recall.found));
    let numbers = vec![
        memory.map(|memory| only(format!("{:.2}", memory.bits))),
        memory.map(|memory| only(mebibytes(memory.bytes))),
        memory.map(|memory| only(mebibytes(memory.peak_bytes))),
        speed.map(|speed| only(format!("{:.2} s", speed.first_token))),
        speed.map(|speed| only(format!("{:.1}", speed.tokens_a_second))),
        text.map(|text| mean(&text.nats_over_f16, true)),
        text.map(|text| mean(&text.kl, false)),
        text.map(|text| share(&text.same_top)),
        found(&summary.passkey),
        found(&summary.needle),
        found(&summary.multi_query),
    ];
    let RGBColor(r, g, b) = draw::COLOURS[i % draw::COLOURS.len()];
    Row { cache: summary.cache.clone(), colour: format!("#{r:02x}{g:02x}{b:02x}"), numbers }
}

fn mebibytes(bytes: f64) -> String {
    match bytes / f64::from(1 << 20) {
        n if n < 10.0 => format!("{n:.2} MiB"),
        n => format!("{n:.1} MiB"),
    }
}

fn share(share: &Share) -> Number {
    let percent = |x: f64| format!("{:.0}", x * 100.0);
    let value = match share.n {
        n if n > 200 => format!("{:.1} %", share.share * 100.0),
        n => format!("{} of {n}", share.hits),
    };
    Number { value, range: format!("{} to {} %", percent(share.low), percent(share.high)) }
}

fn mean(mean: &Mean, signed: bool) -> Number {
    let text = |x: f64| if signed { format!("{x:+.4}") } else { format!("{x:.4}") };
    let range = mean.low.zip(mean.high);
    Number {
        value: text(mean.mean),
        range: range.map_or_else(String::new, |(l, h)| format!("{} to {}", text(l), text(h))),
    }
}

/// Divergence, and each task's score, against bits.
fn plots(summaries: &[Summary]) -> Result<Vec<String>, ReportError> {
    let divergence: Vec<_> = summaries
        .iter()
        .filter_map(|summary| {
            let (text, name) = (summary.text.as_ref()?, summary.cache.clone());
            let (value, range) = (text.kl.mean, text.kl.low.zip(text.kl.high));
            Some(Point { name, bits: text.memory.bits, value, range })
        })
        .collect();
    let tasks = ["passkey", "needle", "multi-query"].map(|task| {
        let point = |summary: &Summary| {
            let (_, recall) = summary.recalls().find(|(name, _)| *name == task)?;
            let Share { share: value, low, high, .. } = recall.found;
            let (bits, name) = (recall.memory.bits, summary.cache.clone());
            Some(Point { name, bits, value, range: Some((low, high)) })
        };
        (task, "right answers", Kind::Share, summaries.iter().filter_map(point).collect())
    });
    let all = std::iter::once(("KL divergence from f16", "nats", Kind::Divergence, divergence));
    let all = all.chain(tasks).filter(|(.., points): &(_, _, _, Vec<Point>)| !points.is_empty());
    let plots = all.map(|(title, unit, kind, points)| plot((title, unit), kind, &points));
    Ok(plots.collect::<Result<_, _>>()?)
}

/// Grids of each task and cache.
fn heats(summaries: &[Summary]) -> Result<Vec<(&'static str, Vec<String>)>, ReportError> {
    let mut heats = Vec::new();
    for task in ["passkey", "needle"] {
        let grids = summaries.iter().filter_map(|summary| {
            let (_, recall) = summary.recalls().find(|(name, _)| *name == task)?;
            Some(heat(&summary.cache, &recall.grid))
        });
        heats.push((task, grids.collect::<Result<Vec<_>, _>>()?));
    }
    heats.retain(|(_, grids)| !grids.is_empty());
    Ok(heats)
}

/// Right answers to the first question of several, and to the others.
fn firsts(summaries: &[Summary]) -> Vec<(String, Number, Number)> {
    let row = |summary: &Summary| {
        let [first, others] = summary.multi_query.as_ref()?.first_and_others?;
        Some((summary.cache.clone(), share(&first), share(&others)))
    };
    summaries.iter().filter_map(row).collect()
}
