//! The record that the table is written to. Cells that it has are not measured again: an interrupted run goes on, and a new
//! row costs what it costs alone. Remove the file to measure everything.

use std::fmt::Write;
use std::path::PathBuf;

/// Columns that name a row: cache, whether with a calibration, tokens before and with those scored, text.
const NAMES: &str = "spec,calibrated,context,text";
/// What is measured; `Record::fill` counts from the first of them.
const CELLS: [&str; 12] = [
    "bits_2k",
    "bits_8k",
    "bits_32k",
    "nats",
    "kl",
    "agreement",
    "keys_5_1k",
    "keys_64_1k",
    "keys_64_2k",
    "keys_64_4k",
    "greedy_tokens",
    "greedy_equal",
];

pub struct Record {
    path: PathBuf,
    /// Names of a row, and its cells.
    rows: Vec<(String, Vec<String>)>,
}

/// Whether a measure is of one text or of the cache, and then the same in all its rows.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Of {
    Text,
    Cache,
}

/// Names of a row.
pub fn row(spec: &str, calibrated: bool, context: usize, text: &str) -> String {
    format!("\"{spec}\",{calibrated},{context},{text}")
}

impl Record {
    pub fn open(path: PathBuf) -> Self {
        let file = std::fs::read_to_string(&path).unwrap_or_default();
        let mut lines = file.lines();
        assert!(lines.next().is_none_or(|head| head == header()), "{}: columns", path.display());
        let rows = lines.map(|line| {
            let mut cells: Vec<String> =
                line.rsplitn(CELLS.len() + 1, ',').map(Into::into).collect();
            cells.reverse();
            (cells.remove(0), cells)
        });
        Self { path, rows: rows.collect() }
    }

    /// Writes what `measure` returns into the cells of `row` from column `first` on, where they are empty.
    pub fn fill<const N: usize>(
        &mut self,
        (row, first, of): (&str, &str, Of),
        measure: impl FnOnce() -> [String; N],
    ) {
        let at = CELLS.iter().position(|name| *name == first).unwrap();
        let is_same = |other: &str| match of {
            Of::Text => other == row,
            Of::Cache => caches(other) == caches(row),
        };
        let mut known = self.rows.iter().filter(|(names, _)| is_same(names));
        let known = known.find(|(_, cells)| !cells[at].is_empty());
        let measured =
            known.map_or_else(|| measure().to_vec(), |(_, cells)| cells[at..at + N].to_vec());
        let index = self.rows.iter().position(|(names, _)| names == row).unwrap_or_else(|| {
            self.rows.push((row.to_owned(), vec![String::new(); CELLS.len()]));
            self.rows.len() - 1
        });
        self.rows[index].1[at..at + N].clone_from_slice(&measured);
        self.save();
    }

    fn save(&self) {
        let mut file = header();
        file.push('\n');
        for (names, cells) in &self.rows {
            writeln!(file, "{names},{}", cells.join(",")).unwrap();
        }
        std::fs::write(&self.path, file).unwrap();
    }
}

fn header() -> String {
    format!("{NAMES},{}", CELLS.join(","))
}

/// What of a row's names is its cache: all but context and text.
fn caches(row: &str) -> Option<&str> {
    row.rsplitn(3, ',').nth(2)
}
