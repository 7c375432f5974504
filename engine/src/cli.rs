//! The program `kvwarp`: results on stdout, progress and logs on stderr; exit code 0 for success, 1 for what went
//! wrong, 2 for what was asked for wrongly, 130 after Ctrl-C.

mod args;
mod ask;
mod batch;
mod bench;
mod calibrate;
mod compress;
mod convert;
mod demo;
mod doctor;
mod eval;
mod generate;
mod info;
mod open;
mod output;
mod perplexity;
mod place;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Exit code after Ctrl-C: 128 + SIGINT, as shells have it.
const INTERRUPTED: u8 = 130;

/// Language models on compressed KV caches.
///
/// Without a command: answers a question about a document that comes with the program, once with an f16 cache and once
/// with a 2-bit cache, and compares the two.
#[derive(Parser)]
#[command(name = "kvwarp", bin_name = "kvwarp", version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    demo: demo::Args,
}

#[derive(Subcommand)]
enum Command {
    /// Continue a text or answer a question
    Generate(generate::Args),
    /// Read a document once and keep its compressed cache in a file
    Compress(compress::Args),
    /// Answer questions about a document whose cache `compress` has kept
    Ask(ask::Args),
    /// Answer a file of prompts, many at once
    Batch(batch::Args),
    /// Show what a model file holds and what its cache costs
    Info(info::Args),
    /// Measure tokens a second, with llama-bench's flags and row names
    Bench(bench::Args),
    /// Measure how well a text is predicted with a given cache
    Perplexity(perplexity::Args),
    /// Measure what each of several caches costs: predictions, hidden numbers and sentences, time and memory
    Eval(eval::Args),
    /// Learn from a text what a model's cache can do without
    Calibrate(calibrate::Args),
    /// Make another model of a model, one whose cache is smaller
    Convert(convert::Args),
    /// Show what this machine offers, what is missing and how to get it
    Doctor(doctor::Args),
}

/// How a command that did not fail ended.
enum Outcome {
    Done,
    Interrupted,
}

/// Arguments that contradict each other or the model: exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Usage(String);

/// Runs the program with the process's arguments.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse_from(arguments(std::env::args_os())) {
        Ok(cli) => cli,
        Err(error) => {
            // Help goes to stdout; when nobody reads it there is nobody to tell.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    match run(cli) {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::Interrupted) => ExitCode::from(INTERRUPTED),
        Err(error) if output::nobody_reads(&error) => ExitCode::SUCCESS,
        Err(error) => {
            output::log(&format!("error: {error:#}"));
            ExitCode::from(if error.is::<Usage>() { 2 } else { 1 })
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<Outcome> {
    match cli.command {
        None => demo::run(&cli.demo),
        Some(Command::Generate(args)) => generate::run(&args),
        Some(Command::Compress(args)) => compress::run(&args),
        Some(Command::Ask(args)) => ask::run(&args),
        Some(Command::Batch(args)) => batch::run(&args),
        Some(Command::Info(args)) => info::run(&args),
        Some(Command::Bench(args)) => bench::run(&args),
        Some(Command::Perplexity(args)) => perplexity::run(&args),
        Some(Command::Eval(args)) => eval::run(&args),
        Some(Command::Calibrate(args)) => calibrate::run(&args),
        Some(Command::Convert(args)) => convert::run(&args),
        Some(Command::Doctor(args)) => doctor::run(&args),
    }
}

/// llama.cpp has flags of several letters after one dash; they are spelled out for the parser.
fn arguments(given: impl Iterator<Item = OsString>) -> impl Iterator<Item = OsString> {
    given.map(|argument| match argument.to_str() {
        Some("-ctk") => "--cache-type-k".into(),
        Some("-ctv") => "--cache-type-v".into(),
        _ => argument,
    })
}
