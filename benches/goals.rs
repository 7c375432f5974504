//! The figures that decode attention is built to reach, looked up in a record.

use crate::record::{Row, line, peer};

/// A figure: what, the goal as text, what was measured, and whether that meets the goal.
pub struct Figure {
    pub what: &'static str,
    pub goal: &'static str,
    pub measured: Option<(f64, bool)>,
}

fn llama(row: &&Row) -> bool {
    row.shape == "32x8d128" && row.queries == 1 && row.variant.is_empty() && row.mode == "graph"
}

/// The worst share of the copy bandwidth of a format over payloads between two sizes in bytes.
fn worst_percent(rows: &[Row], format: &str, from: f64, to: f64) -> Option<f64> {
    let of = |r: &&Row| r.family == "paged_attn" && r.format == format && llama(r);
    let sized = |r: &&Row| (from..to).contains(&r.bytes);
    rows.iter().filter(of).filter(sized).map(Row::copy_percent).min_by(f64::total_cmp)
}

fn case<'a>(rows: &'a [Row], family: &str, format: &str, at: (usize, usize)) -> Option<&'a Row> {
    let of = |r: &&Row| r.family == family && r.format == format && (r.context, r.batch) == at;
    let mode = if family == "prefill_attn" { "alone" } else { "graph" };
    rows.iter().filter(of).find(|r| r.mode == mode && r.variant.is_empty())
}

fn over(rows: &[Row], format: &str, bits: usize) -> Option<f64> {
    let row = case(rows, "paged_attn", format, (32768, 16)).filter(llama)?;
    row.speed_over(rows, |r| peer(r, bits))
}

/// Every figure but those that need a profiler.
pub fn figures(rows: &[Row]) -> Vec<Figure> {
    let least = |x: Option<f64>, goal: f64| x.map(|x| (x, x >= goal));
    let most = |x: Option<f64>, goal: f64| x.map(|x| (x, x <= goal));
    let time = |family: &str, format: &str, at| case(rows, family, format, at).map(|r| r.us[0]);
    let prefill = case(rows, "prefill_attn", "f16", (8192, 1))
        .and_then(|row| row.speed_over(rows, |r| peer(r, 16)));
    let figure = |what, goal, measured| Figure { what, goal, measured };
    vec![
        figure(
            "q2 group 32, payload of 200 MB or more, % of copy",
            ">= 85",
            least(worst_percent(rows, "q2g32", 2e8, f64::MAX), 85.0),
        ),
        figure(
            "q2 group 32, payload of 30 to 80 MB, % of copy",
            ">= 70",
            least(worst_percent(rows, "q2g32", 3e7, 8e7), 70.0),
        ),
        figure(
            "q2 group 32 over the best 16-bit peer, 32k x 16",
            ">= 4.3",
            least(over(rows, "q2g32", 16), 4.3),
        ),
        figure(
            "q2 group 128 over the best 16-bit peer, 32k x 16",
            ">= 5.5",
            least(over(rows, "q2g128", 16), 5.5),
        ),
        figure(
            "q2 group 32 over the best fp8 peer, 32k x 16",
            ">= 2.1",
            least(over(rows, "q2g32", 8), 2.1),
        ),
        figure(
            "q2 group 32, 4k x 1, a layer of the graph, us",
            "<= 6.5",
            most(time("paged_attn", "q2g32", (4096, 1)), 6.5),
        ),
        figure(
            "own f16, payload of 200 MB or more, % of copy",
            ">= 85",
            least(worst_percent(rows, "f16", 2e8, f64::MAX), 85.0),
        ),
        figure(
            "append of one token, batch 1, us",
            "< 3",
            most(time("kv_pack", "append_q2g32", (4096, 1)), 3.0),
        ),
        figure("prefill of 8k over the fastest PyTorch attention", ">= 0.85", least(prefill, 0.85)),
    ]
}

/// Every row of a record with its ratios, then the figures.
pub fn report(rows: &[Row]) -> String {
    let mut out: String = rows.iter().map(|row| line(row, rows) + "\n").collect();
    out += "\n";
    for f in figures(rows) {
        let measured = match f.measured {
            Some((x, true)) => format!("{x:.2}  reached"),
            Some((x, false)) => format!("{x:.2}  MISSED"),
            None => "not measured".into(),
        };
        out += &format!("{:<54} {:>7}   {measured}\n", f.what, f.goal);
    }
    out
}
