//! Where words go: results to stdout, everything else to stderr.

use std::io::{self, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A line on stderr. When stderr is closed there is nobody to tell.
pub fn log(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Text on stdout, at once.
pub fn put(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// A value as indented JSON on stdout.
pub fn put_json(value: &serde_json::Value) -> io::Result<()> {
    put(&format!("{value:#}\n"))
}

/// Whether an error only says that the reader of stdout has gone, as in `kvwarp ... | head`.
pub fn nobody_reads(error: &anyhow::Error) -> bool {
    let io = error.chain().find_map(|cause| cause.downcast_ref::<io::Error>());
    io.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// Work that lasts longer than this shows a bar.
const PATIENCE: Duration = Duration::from_secs(1);

/// A bar on stderr for work that turns out to be long; nothing where stderr is no terminal.
pub struct Progress {
    bar: ProgressBar,
    start: Instant,
    shown: bool,
}

impl Progress {
    /// `total` steps of what `name` says.
    pub fn new(name: &'static str, total: usize) -> Self {
        let bar = ProgressBar::with_draw_target(Some(total as u64), ProgressDrawTarget::hidden());
        let style = ProgressStyle::with_template("{msg} [{bar:32}] {percent}% {eta}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.set_message(name);
        Self { bar, start: Instant::now(), shown: false }
    }

    /// `steps` more are done.
    pub fn step(&mut self, steps: usize) {
        if !self.shown && self.start.elapsed() > PATIENCE {
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
            self.shown = true;
        }
        self.bar.inc(steps as u64);
        if self.bar.length().is_some_and(|length| self.bar.position() >= length) {
            self.clear();
        }
    }

    /// Changes what the bar says.
    pub fn say(&self, message: String) {
        self.bar.set_message(message);
    }

    /// Takes the bar away.
    pub fn clear(&self) {
        self.bar.finish_and_clear();
    }
}

/// Bytes in the unit that keeps three digits.
pub fn bytes(n: usize) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let unit = (0..units.len() - 1).find(|&u| n < 1000 << (10 * u)).unwrap_or(units.len() - 1);
    let value = n as f64 / (1u64 << (10 * unit)) as f64;
    match unit {
        0 => format!("{n} B"),
        _ if value < 10.0 => format!("{value:.2} {}", units[unit]),
        _ => format!("{value:.1} {}", units[unit]),
    }
}

/// Rows under a header, columns aligned: text to the left, the rest to the right.
pub fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain([header[column].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let line = |cells: &[String]| {
        let cell = |(i, cell): (usize, &String)| match i {
            0 => format!("{cell:<0$}", widths[0]),
            _ => format!("{cell:>0$}", widths[i]),
        };
        cells.iter().enumerate().map(cell).collect::<Vec<_>>().join("  ") + "\n"
    };
    let header: Vec<String> = header.iter().map(|&name| name.to_owned()).collect();
    let rule: Vec<String> = widths.iter().map(|&width| "-".repeat(width)).collect();
    [&header, &rule].into_iter().chain(rows).map(|row| line(row)).collect()
}
