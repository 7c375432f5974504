//! What was measured, as tables and as JSON.

use std::io;

use serde_json::json;

use super::measure::Done;
use crate::cli::output;
use crate::eval::report::count;
use crate::eval::stats::{Mean, Share};
use crate::eval::summary::{Memory, Recall, Summary};

/// One object with all summaries and cells.
pub fn json(done: &Done) -> io::Result<()> {
    let cells = done.cells.iter().map(|((spec, sample), measured)| {
        json!({
            "cache": done.specs[*spec].to_string(),
            "sample": done.samples[*sample],
            "measured": measured,
        })
    });
    output::put_json(&json!({
        "about": done.about,
        "interrupted": done.interrupted,
        "report": done.report,
        "caches": done.summaries,
        "cells": cells.collect::<Vec<_>>(),
    }))
}

/// A table with a row for each cache of which `row` makes one.
fn table(
    done: &Done,
    header: &[&str],
    row: impl Fn(&Summary) -> Option<Vec<String>>,
) -> io::Result<()> {
    let header = [&["cache"], header].concat();
    let row = |summary: &Summary| {
        let cells = row(summary)?;
        Some([vec![summary.cache.clone()], cells].concat())
    };
    let rows: Vec<_> = done.summaries.iter().filter_map(row).collect();
    output::put(&output::table(&header, &rows))
}

pub fn perplexity(done: &Done) -> io::Result<()> {
    let header = ["bits", "KV", "log-perplexity", "over f16", "95 %"];
    table(done, &header, |summary| {
        let text = summary.text.as_ref()?;
        let over = signed(&text.nats_over_f16);
        Some([bits(&text.memory), vec![format!("{:.4}", text.nll.mean)], over].concat())
    })
}

pub fn agreement(done: &Done) -> io::Result<()> {
    let header = ["bits", "KV", "KL", "95 %", "same top token", "95 %"];
    table(done, &header, |summary| {
        let text = summary.text.as_ref()?;
        let top = vec![percent(text.same_top.share), interval(&text.same_top)];
        Some([bits(&text.memory), plain(&text.kl), top].concat())
    })
}

pub fn recall(done: &Done) -> io::Result<()> {
    let header = ["bits", "KV", "right", "95 %", "wrong", "prose", "worth"];
    table(done, &header, |summary| {
        let (_, recall) = summary.recalls().next()?;
        let Recall { found, wrong, prose, worth, memory, .. } = recall;
        let right = vec![right(found), interval(found), wrong.to_string(), prose.to_string()];
        Some([bits(memory), right, vec![format!("{worth:.2}")]].concat())
    })?;
    let first = done.summaries.iter().find_map(|summary| Some(summary.recalls().next()?.1));
    match first {
        Some(Recall { first_and_others: Some(_), .. }) => others(done),
        Some(recall) if recall.grid.len() > 1 => places(done, recall),
        _ => Ok(()),
    }
}

/// The first question of several, and the others.
fn others(done: &Done) -> io::Result<()> {
    output::put("\n")?;
    table(done, &["first question", "the others"], |summary| {
        let [first, others] = summary.recalls().next()?.1.first_and_others?;
        Some(vec![right(&first), right(&others)])
    })
}

/// Right answers by length and depth.
fn places(done: &Done, of: &Recall) -> io::Result<()> {
    output::put("\n")?;
    let header: Vec<_> = of
        .grid
        .iter()
        .map(|place| format!("{} at {} %", count(place.tokens), place.depth))
        .collect();
    let header: Vec<_> = header.iter().map(String::as_str).collect();
    table(done, &header, |summary| {
        let (_, recall) = summary.recalls().next()?;
        Some(
            recall
                .grid
                .iter()
                .map(|place| format!("{}/{}", place.found.hits, place.found.n))
                .collect(),
        )
    })
}

pub fn sweep(done: &Done) -> io::Result<()> {
    let header = [
        "bits",
        "KV",
        "first token",
        "tokens/s",
        "over f16",
        "KL",
        "same top",
        "passkey",
        "needle",
        "multi-query",
    ];
    table(done, &header, |summary| {
        let Summary { text, speed, .. } = summary;
        let none = || "-".to_owned();
        let found =
            |recall: &Option<Recall>| recall.as_ref().map_or_else(none, |r| right(&r.found));
        let of_text = |of: fn(&crate::eval::summary::Likelihood) -> String| {
            text.as_ref().map_or_else(none, of)
        };
        let mut row = summary.memory().map_or_else(|| vec![none(), none()], |memory| bits(&memory));
        row.extend([
            speed.as_ref().map_or_else(none, |speed| format!("{:.2} s", speed.first_token)),
            speed.as_ref().map_or_else(none, |speed| format!("{:.1}", speed.tokens_a_second)),
            of_text(|text| format!("{:+.4}", text.nats_over_f16.mean)),
            of_text(|text| format!("{:.4}", text.kl.mean)),
            of_text(|text| percent(text.same_top.share)),
            found(&summary.passkey),
            found(&summary.needle),
            found(&summary.multi_query),
        ]);
        Some(row)
    })?;
    let missing = done.about.missing;
    if missing > 0 {
        output::log(&format!("{missing} measurements are missing; the same command goes on"));
    }
    done.report.iter().for_each(|path| output::log(&format!("report: {}", path.display())));
    Ok(())
}

fn bits(memory: &Memory) -> Vec<String> {
    // Bytes of a machine's memory.
    vec![format!("{:.2}", memory.bits), output::bytes(memory.bytes as usize)]
}

fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

fn right(found: &Share) -> String {
    format!("{} of {}", found.hits, found.n)
}

fn interval(share: &Share) -> String {
    format!("{:.0} to {:.0} %", share.low * 100.0, share.high * 100.0)
}

fn plain(mean: &Mean) -> Vec<String> {
    estimate(mean, |x| format!("{x:.4}"))
}

fn signed(mean: &Mean) -> Vec<String> {
    estimate(mean, |x| format!("{x:+.4}"))
}

fn estimate(mean: &Mean, text: fn(f64) -> String) -> Vec<String> {
    let range = mean.low.zip(mean.high);
    let range = range.map_or_else(|| "-".into(), |(l, h)| format!("{} to {}", text(l), text(h)));
    vec![text(mean.mean), range]
}
