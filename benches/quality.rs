//! What fewer bits cost, as an SVG: divergence from the f16 cache against bits an element.
//!
//! The record is what `cargo test -p kvwarp-engine --test quality -- --ignored` writes; other caches on the same texts lie
//! beside it, in `quality-peers.csv`.

use plotters::prelude::*;
use std::collections::BTreeMap;
use std::path::Path;

/// How such a record begins.
pub const FIRST_COLUMNS: &str = "spec,calibrated,";
const SIZE: (u32, u32) = (860, 520);
const OURS: RGBColor = RGBColor(42, 157, 143);
const PEERS: RGBColor = RGBColor(155, 34, 38);

/// Bits and divergence of each cache, the mean over texts.
type Points = BTreeMap<String, (f64, f64)>;

/// Points of a record whose columns `name`, `bits` and `kl` are so called; rows that `keep` refuses are left out.
fn points(
    path: &Path,
    (name, bits): (&str, &str),
    keep: impl Fn(&dyn Fn(&str) -> String) -> bool,
) -> Result<Points, String> {
    let failed = |e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
    let mut file =
        csv::ReaderBuilder::new().comment(Some(b'#')).from_path(path).map_err(|e| failed(&e))?;
    let columns = file.headers().map_err(|e| failed(&e))?.clone();
    let mut sums: BTreeMap<String, (f64, f64, f64)> = BTreeMap::new();
    for row in file.records() {
        let row = row.map_err(|e| failed(&e))?;
        let cell = |column: &str| {
            let at = columns.iter().position(|c| c == column);
            at.and_then(|i| row.get(i)).unwrap_or_default().to_owned()
        };
        let number = |column: &str| {
            cell(column).parse::<f64>().map_err(|e| failed(&format!("`{column}`: {e}")))
        };
        if keep(&cell) {
            let sum = sums.entry(cell(name)).or_default();
            *sum = (sum.0 + number(bits)?, sum.1 + number("kl")?, sum.2 + 1.0);
        }
    }
    Ok(sums.into_iter().map(|(name, (bits, kl, n))| (name, (bits / n, kl / n))).collect())
}

/// Writes `quality.svg` beside the record `path`.
pub fn draw(path: &Path) -> Result<(), String> {
    // Caches that are measured in every way, not only to show what a part gives; as calibrated, where a recipe can be.
    let best = |cell: &dyn Fn(&str) -> String| {
        let whole = !cell("greedy_tokens").is_empty();
        whole
            && (cell("calibrated") == "true"
                || !["q2", "q4", "f16"].contains(&cell("spec").as_str()))
    };
    let ours = points(path, ("spec", "bits_8k"), best)?;
    let peers = points(&path.with_file_name("quality-peers.csv"), ("cache", "bits"), |_| true)?;
    let file = path.with_extension("svg");
    let failed = |e: &dyn std::fmt::Display| format!("{}: {e}", file.display());
    let area = SVGBackend::new(&file, SIZE).into_drawing_area();
    area.fill(&WHITE).map_err(|e| failed(&e))?;
    let mut chart = ChartBuilder::on(&area)
        .caption("SmolLM2-135M: what fewer bits cost", ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d(2.0..10.0, (1e-3..2.0).log_scale())
        .map_err(|e| failed(&e))?;
    chart
        .configure_mesh()
        .x_desc("bits an element at 8,192 tokens (peers: codes and metadata alone)")
        .y_desc("KL divergence from the f16 cache, nats")
        .light_line_style(WHITE)
        .draw()
        .map_err(|e| failed(&e))?;
    for (points, colour, name) in [(&ours, OURS, "kvwarp"), (&peers, PEERS, "others")] {
        let dot = |(name, at): (&String, &(f64, f64))| {
            let at = (at.0, at.1.max(1e-3));
            EmptyElement::at(at)
                + Circle::new((0, 0), 4, colour.filled())
                + Text::new(name.clone(), (7, -6), ("sans-serif", 11))
        };
        chart
            .draw_series(points.iter().map(dot))
            .map_err(|e| failed(&e))?
            .label(name)
            .legend(move |(x, y)| Circle::new((x + 9, y), 4, colour.filled()));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .draw()
        .map_err(|e| failed(&e))?;
    area.present().map_err(|e| failed(&e))
}
