//! The command line of the benches: ours, and what is passed on to criterion.

use crate::record::Record;
use std::path::PathBuf;

/// What was asked for.
#[derive(Debug, Default)]
pub struct Args {
    /// Parts of names; a case runs if its name contains each. Criterion gets them too.
    pub filters: Vec<String>,
    /// `--once`: launch once after one warm-up, for a profiler.
    pub once: bool,
    /// `--record PATH`: where the record goes, without its extension.
    pub path: Option<PathBuf>,
    /// `--seconds N`: stop measuring then, and write what there is.
    pub seconds: Option<u64>,
    /// `--plot FILE.csv`: draw a record beside it.
    pub plot: Option<PathBuf>,
    /// `--report FILE.csv ...`: print records as one table.
    pub report: Option<Vec<PathBuf>>,
    /// No `--bench`: cargo only wants to see that benches start.
    pub test: bool,
    /// Some argument is not criterion's.
    pub ours: bool,
}

/// Arguments of criterion that take a value.
const WITH_VALUE: [&str; 14] = [
    "--baseline",
    "--baseline-lenient",
    "--color",
    "--confidence-level",
    "--load-baseline",
    "--measurement-time",
    "--noise-threshold",
    "--nresamples",
    "--output-format",
    "--profile-time",
    "--sample-size",
    "--save-baseline",
    "--significance-level",
    "--warm-up-time",
];

impl Args {
    /// Reads the arguments after the program's name.
    pub fn parse(arguments: impl Iterator<Item = String>) -> Result<Args, String> {
        let mut args = Args { test: true, ..Args::default() };
        let mut rest = arguments.peekable();
        while let Some(argument) = rest.next() {
            let mut value = || rest.next().ok_or(format!("{argument} needs a value"));
            match argument.as_str() {
                "--once" => {
                    args.once = true;
                    args.filters.push(value()?);
                }
                "--record" => args.path = Some(value()?.into()),
                "--seconds" => {
                    let text = value()?;
                    args.seconds = Some(text.parse().map_err(|_| format!("--seconds: {text}"))?);
                }
                "--plot" => args.plot = Some(value()?.into()),
                "--report" => args.report = Some(rest.by_ref().map(PathBuf::from).collect()),
                "--bench" => args.test = false,
                flag if WITH_VALUE.contains(&flag) => drop(value()?),
                flag if flag.starts_with('-') => {}
                filter => args.filters.push(filter.to_owned()),
            }
            args.ours |= ["--record", "--seconds"].contains(&argument.as_str());
        }
        Ok(args)
    }

    /// Whether a case of this name is to run.
    pub fn wants(&self, name: &str) -> bool {
        self.filters.iter().all(|f| name.contains(f.trim_end_matches('/')))
    }

    /// Where a record goes, without extension: `benches/record/<gpu>-<date>`, or as the command line says.
    pub fn record(&self, record: &Record) -> PathBuf {
        let gpu =
            record.fact("gpu").to_lowercase().replace(|c: char| !c.is_ascii_alphanumeric(), "-");
        let name = format!("{gpu}-{}", record.fact("date"));
        let default =
            || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/benches/record")).join(name);
        self.path.clone().unwrap_or_else(default)
    }
}
