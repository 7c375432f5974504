//! Rows of `kvwarp bench` as Markdown, CSV or JSON, with llama-bench's names.

use std::io;

use serde_json::{Value, json};

use super::{Output, host, profile};
use crate::bench::{Samples, Test, mean_and_deviation};
use crate::cli::args::Device;
use crate::cli::output;
use crate::fit::Fit;
use crate::source::Source;
use crate::spec::CacheSpec;

/// Columns of the Markdown table and the width of each.
const COLUMNS: [(&str, usize); 11] = [
    ("model", 24),
    ("size", 10),
    ("params", 10),
    ("backend", 7),
    ("threads", 7),
    ("cache", 16),
    ("test", 15),
    ("t/s", 18),
    ("KV", 10),
    ("memory", 10),
    ("fit", 5),
];

/// Whether a column is aligned to the left.
fn left(name: &str) -> bool {
    ["model", "backend", "cache"].contains(&name)
}

/// What a test ran on.
pub struct Setup<'a> {
    pub backend: Device,
    pub threads: usize,
    pub spec: &'a CacheSpec,
    /// Tokens in the cache before the test.
    pub depth: usize,
    /// Sequences that decode together.
    pub rows: usize,
    /// How many there may be, where that is known.
    pub fit: Option<Fit>,
}

/// Writes rows as they come, or all at the end for JSON.
pub struct Writer {
    format: Output,
    file: String,
    model: String,
    /// Bytes of all tensors.
    size: usize,
    params: usize,
    rows: Vec<Value>,
    /// Tables of launches, which come after the rows.
    profiles: String,
}

impl Writer {
    /// A writer of results for one model.
    pub fn new(format: Output, source: &Source) -> Self {
        let size = source.weights.iter().map(|tensor| tensor.bytes.len()).sum();
        let params = parameters(source);
        let model = model_name(source);
        let file = source.path().display().to_string();
        Self { format, file, model, size, params, rows: Vec::new(), profiles: String::new() }
    }

    fn header(&self) -> io::Result<()> {
        let rule = |(name, width): (&str, usize)| match left(name) {
            true => "-".repeat(width),
            false => "-".repeat(width - 1) + ":",
        };
        self.line(&COLUMNS.map(|(name, _)| name.to_owned()))?;
        self.line(&COLUMNS.map(rule))
    }

    /// One test's result.
    pub fn row(&mut self, setup: &Setup<'_>, test: Test, samples: &Samples) -> io::Result<()> {
        let peak = peak(setup, samples);
        let mut value = self.value(setup, test, samples);
        memory(&mut value, peak, samples);
        if let Some(profiled) = &samples.profiled {
            value["profile"] = profile::json(profiled);
        }
        let Setup { backend, threads, spec, .. } = *setup;
        match self.format {
            Output::Json => {}
            Output::Md => {
                if self.rows.is_empty() {
                    self.header()?;
                }
                let (mean, deviation) = mean_and_deviation(&samples.speeds());
                self.line(&[
                    self.model.clone(),
                    output::bytes(self.size),
                    format!("{:.2} M", self.params as f64 / 1e6),
                    backend.name().into(),
                    threads.to_string(),
                    spec.to_string(),
                    name(test, setup),
                    format!("{mean:.2} ± {deviation:.2}"),
                    output::bytes(samples.cache.used_bytes),
                    peak.map_or(String::new(), output::bytes),
                    setup.fit.map_or(String::new(), |fit| fit.sequences.to_string()),
                ])?;
                if let Some(profiled) = &samples.profiled {
                    let of = if let Test::Decode(_) = test { "a step of " } else { "" };
                    let (name, time) = (name(test, setup), samples.step_time(test));
                    self.profiles +=
                        &profile::table(&format!("{of}{name}, {spec}"), profiled, time);
                }
            }
            Output::Csv => csv(&value, self.rows.is_empty())?,
        }
        self.rows.push(value);
        Ok(())
    }

    /// Writes what could not be written row by row.
    pub fn end(self) -> io::Result<()> {
        if self.format == Output::Json {
            output::put_json(&Value::Array(self.rows))
        } else {
            output::put(&self.profiles)
        }
    }

    fn line(&self, cells: &[String]) -> io::Result<()> {
        let cell = |(cell, (name, width)): (&String, (&str, usize))| match left(name) {
            true => format!(" {cell:<width$} |"),
            false => format!(" {cell:>width$} |"),
        };
        output::put(&format!("|{}\n", cells.iter().zip(COLUMNS).map(cell).collect::<String>()))
    }

    fn value(&self, setup: &Setup<'_>, test: Test, samples: &Samples) -> Value {
        let Setup { backend, threads, spec, depth, rows, fit } = *setup;
        let (n_prompt, n_gen) = match test {
            Test::Prefill(n) => (n, 0),
            Test::Decode(n) => (0, n),
        };
        let times: Vec<_> = samples.times.iter().map(|time| time.as_nanos() as f64).collect();
        let speeds = samples.speeds();
        let ((avg_ns, stddev_ns), (avg_ts, stddev_ts)) =
            (mean_and_deviation(&times), mean_and_deviation(&speeds));
        json!({
            "model_filename": self.file,
            "model_type": self.model,
            "model_size": self.size,
            "model_n_params": self.params,
            "backends": backend.name(),
            "simd": format!("{:?}", kvwarp::simd::Level::detect()),
            "n_threads": threads,
            "type_k": spec.preset,
            "type_v": spec.preset,
            "cache": spec.to_string(),
            "n_prompt": n_prompt,
            "n_gen": n_gen,
            "n_depth": depth,
            "n_parallel": rows,
            "avg_ns": avg_ns.round(),
            "stddev_ns": stddev_ns.round(),
            "avg_ts": avg_ts,
            "stddev_ts": stddev_ts,
            "samples_ns": times,
            "samples_ts": speeds,
            "kv_bytes": samples.cache.used_bytes,
            "kv_effective_bits": samples.cache.effective_bits,
            "fit_memory": fit.map(|fit| fit.memory),
            "fit_sequence_bytes": fit.map(|fit| fit.sequence),
            "fit_shared_bytes": fit.map(|fit| fit.shared),
            "fit_sequences": fit.map(|fit| fit.sequences),
        })
    }
}

/// `pp512`, `tg128 @ d4096`, `tg128 x8` of eight sequences together.
fn name(test: Test, setup: &Setup<'_>) -> String {
    let Setup { depth, rows, .. } = *setup;
    let name = match test {
        Test::Prefill(n) => format!("pp{n}"),
        Test::Decode(n) if rows > 1 => format!("tg{n} x{rows}"),
        Test::Decode(n) => format!("tg{n}"),
    };
    if depth == 0 { name } else { format!("{name} @ d{depth}") }
}

/// Most memory that was taken: on the processor by the whole process, on a GPU by the engine.
fn peak(setup: &Setup<'_>, samples: &Samples) -> Option<usize> {
    match setup.backend {
        Device::Cpu => host::peak(),
        Device::Cuda => Some(samples.memory.iter().map(|(_, bytes)| bytes).sum()),
    }
}

/// Adds what memory was taken for.
fn memory(value: &mut Value, peak: Option<usize>, samples: &Samples) {
    value["memory_peak"] = json!(peak);
    for (of, bytes) in &samples.memory {
        value[format!("memory_{of}")] = json!(bytes);
    }
}

/// A line of a value's fields, their names before it where it is the `first`.
pub fn csv(value: &Value, first: bool) -> io::Result<()> {
    let fields = value.as_object().into_iter().flatten();
    let (names, cells): (Vec<_>, Vec<_>) = fields.map(|(k, v)| (k.clone(), cell(v))).unzip();
    let names = if first { names.join(",") + "\n" } else { String::new() };
    output::put(&format!("{names}{}\n", cells.join(",")))
}

fn parameters(source: &Source) -> usize {
    source.weights.iter().map(|tensor| tensor.rows * tensor.cols).sum()
}

/// Architecture, size and the element type that most of the bytes have.
pub fn model_name(source: &Source) -> String {
    let params = parameters(source);
    let mut kinds = std::collections::BTreeMap::<String, usize>::new();
    for tensor in source.weights.iter() {
        *kinds.entry(format!("{:?}", tensor.kind)).or_default() += tensor.bytes.len();
    }
    let kind =
        kinds.into_iter().max_by_key(|(_, bytes)| *bytes).map_or(String::new(), |(kind, _)| kind);
    let arch = format!("{:?}", source.config.arch).to_lowercase();
    match params as f64 {
        n if n >= 1e9 => format!("{arch} {:.1}B {kind}", n / 1e9),
        n => format!("{arch} {:.0}M {kind}", n / 1e6),
    }
}

/// A value in CSV: text quoted, lists in quotes with spaces.
fn cell(value: &Value) -> String {
    match value {
        Value::Number(n) => n.to_string(),
        Value::String(text) => format!("\"{}\"", text.replace('"', "\"\"")),
        Value::Array(values) => {
            format!("\"{}\"", values.iter().map(cell).collect::<Vec<_>>().join(" "))
        }
        other => other.to_string(),
    }
}
