//! A record as two SVGs beside it: time against context, and percent of copy bandwidth against payload.

use crate::record::{Record, Row};
use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::prelude::*;
use std::collections::BTreeMap;
use std::path::Path;

const SIZE: (u32, u32) = (860, 480);
const COLOURS: [RGBColor; 8] = [
    RGBColor(38, 70, 83),
    RGBColor(42, 157, 143),
    RGBColor(231, 111, 81),
    RGBColor(233, 176, 58),
    RGBColor(109, 89, 122),
    RGBColor(0, 119, 182),
    RGBColor(155, 34, 38),
    RGBColor(120, 120, 120),
];

/// How a number on an axis is written.
type Label = fn(&f64) -> String;
/// Points of each format, by the first coordinate.
type Lines = BTreeMap<String, Vec<(f64, f64)>>;

/// Decode attention of Llama-3-8B's shape in a graph, as chosen by default.
fn decode(row: &&Row) -> bool {
    let default = row.variant.is_empty() && row.mode == "graph" && row.queries == 1;
    row.family == "paged_attn" && row.shape == "32x8d128" && default
}

fn lines<'a>(rows: impl Iterator<Item = &'a Row>, point: impl Fn(&Row) -> (f64, f64)) -> Lines {
    let mut lines = Lines::new();
    rows.for_each(|row| lines.entry(row.format.clone()).or_default().push(point(row)));
    lines.values_mut().for_each(|points| points.sort_by(|a, b| a.0.total_cmp(&b.0)));
    lines
}

/// The least and the largest of the coordinates, with some room.
fn around(values: impl Iterator<Item = f64>, room: f64) -> std::ops::Range<f64> {
    let (low, high) = values.fold((f64::MAX, f64::MIN), |(l, h), x| (l.min(x), h.max(x)));
    low / room..high * room
}

fn tokens(x: &f64) -> String {
    format!("{:.0}k", x / 1024.0)
}

fn axes(lines: &Lines) -> [Vec<f64>; 2] {
    let points = || lines.values().flatten();
    [points().map(|p| p.0).collect(), points().map(|p| p.1).collect()]
}

/// One chart: a line with dots for each format.
fn chart<X, Y>(
    file: &Path,
    title: &str,
    names: (&str, &str),
    format: (Label, Label),
    ranges: (X, Y),
    lines: &Lines,
) -> Result<(), String>
where
    X: AsRangedCoord<Value = f64>,
    Y: AsRangedCoord<Value = f64>,
    X::CoordDescType: ValueFormatter<f64>,
    Y::CoordDescType: ValueFormatter<f64>,
{
    let failed = |e: &dyn std::fmt::Display| format!("{}: {e}", file.display());
    let area = SVGBackend::new(file, SIZE).into_drawing_area();
    area.fill(&WHITE).map_err(|e| failed(&e))?;
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d(ranges.0, ranges.1)
        .map_err(|e| failed(&e))?;
    let (x_format, y_format) = format;
    chart
        .configure_mesh()
        .x_desc(names.0)
        .y_desc(names.1)
        .x_label_formatter(&x_format)
        .y_label_formatter(&y_format)
        .light_line_style(WHITE)
        .draw()
        .map_err(|e| failed(&e))?;
    for ((name, points), colour) in lines.iter().zip(COLOURS.iter().cycle()) {
        let line = LineSeries::new(points.iter().copied(), colour.stroke_width(2)).point_size(3);
        chart
            .draw_series(line)
            .map_err(|e| failed(&e))?
            .label(name)
            .legend(|(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .draw()
        .map_err(|e| failed(&e))?;
    area.present().map_err(|e| failed(&e))
}

/// Writes `<record>-context.svg` and `<record>-bandwidth.svg`.
pub fn draw(record: &Record, beside: &Path) -> Result<(), String> {
    let decode: Vec<&Row> = record.rows.iter().filter(decode).collect();
    let batch = [16, 64, 1].into_iter().find(|&b| decode.iter().any(|r| r.batch == b));
    let batch = batch.ok_or("the record holds no decode attention in a graph")?;
    let named = |what: &str| {
        let stem = beside.file_stem().unwrap_or_default().to_string_lossy();
        beside.with_file_name(format!("{stem}-{what}.svg"))
    };
    let of_batch = decode.iter().copied().filter(|r| r.batch == batch);
    let by_context = lines(of_batch, |r| (r.context as f64, r.us[0]));
    let [x, y] = axes(&by_context);
    let (x, y) = (around(x.into_iter(), 1.1), around(y.into_iter(), 1.3));
    let title = format!("{}: one layer of decode attention, batch {batch}", record.fact("gpu"));
    chart(
        &named("context"),
        &title,
        ("tokens of context", "microseconds"),
        (tokens, |y| format!("{y:.0}")),
        (x.log_scale().base(2.0), y.log_scale()),
        &by_context,
    )?;
    let by_payload = lines(decode.into_iter(), |r| (r.bytes * 1e-6, r.copy_percent()));
    let [x, y] = axes(&by_payload);
    let top = y.into_iter().fold(100.0, f64::max);
    chart(
        &named("bandwidth"),
        &format!("{}: share of the bandwidth of a copy", record.fact("gpu")),
        ("megabytes read", "% of copy bandwidth"),
        (|x| format!("{x:.0}"), |y| format!("{y:.0}")),
        (around(x.into_iter(), 1.2).log_scale(), 0.0..top),
        &by_payload,
    )
}
