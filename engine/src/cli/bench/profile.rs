//! The launches of a step as a table or as JSON.

use std::time::Duration;

use serde_json::{Value, json};

use crate::bench::Profiled;
use crate::cli::output;
use crate::profile::Line;

/// A line of one step, on average.
struct Share<'a> {
    line: &'a Line,
    launches: f64,
    microseconds: f64,
    /// Of all lines.
    percent: f64,
    bytes: f64,
}

fn shares(profiled: &Profiled) -> Vec<Share<'_>> {
    let (steps, all) = (profiled.steps as f64, profiled.profile.time().as_secs_f64());
    let share = |line| {
        let &Line { launches, time, bytes, .. } = line;
        let seconds = time.as_secs_f64();
        Share {
            line,
            launches: launches as f64 / steps,
            microseconds: seconds * 1e6 / steps,
            percent: 100.0 * seconds / all.max(f64::MIN_POSITIVE),
            bytes: bytes as f64 / steps,
        }
    };
    let lines = profiled.profile.lines().iter();
    let mut shares: Vec<Share<'_>> = lines.map(share).collect();
    shares.sort_by(|a, b| b.microseconds.total_cmp(&a.microseconds));
    shares
}

/// Of what has this name, which takes `clock` when nobody looks at launches.
pub fn table(name: &str, profiled: &Profiled, clock: Duration) -> String {
    let row = |share: &Share<'_>| {
        let Share { line, launches, microseconds, percent, bytes } = share;
        let shape = line.shape.map_or(String::new(), |[rows, cols]| format!(" {rows} x {cols}"));
        let counted = |text: String| if line.bytes > 0 { text } else { String::new() };
        vec![
            format!("{}{shape}", line.op),
            format!("{launches:.0}"),
            format!("{microseconds:.1}"),
            format!("{percent:.1}"),
            counted(output::bytes(bytes.round() as usize)),
            line.gigabytes_a_second().map_or(String::new(), |speed| format!("{speed:.1}")),
        ]
    };
    let shares = shares(profiled);
    let rows: Vec<_> = shares.iter().map(row).collect();
    let launches: f64 = shares.iter().map(|share| share.launches).sum();
    let microseconds: f64 = shares.iter().map(|share| share.microseconds).sum();
    let header = ["op", "launches", "us", "%", "bytes", "GB/s"];
    format!(
        "\n{name}: {launches:.0} launches, {microseconds:.1} us; by the clock {:.1} us\n{}",
        clock.as_secs_f64() * 1e6,
        output::table(&header, &rows)
    )
}

/// A list of lines, the longest first.
pub fn json(profiled: &Profiled) -> Value {
    let line = |share: &Share<'_>| {
        json!({
            "op": share.line.op,
            "rows": share.line.shape.map(|[rows, _]| rows),
            "cols": share.line.shape.map(|[_, cols]| cols),
            "launches": share.launches,
            "us": share.microseconds,
            "percent": share.percent,
            "bytes": share.bytes,
            "gb_s": share.line.gigabytes_a_second(),
        })
    };
    shares(profiled).iter().map(line).collect()
}
