//! `kvwarp bench`.

mod fits;
mod format;
mod host;
mod profile;

use anyhow::bail;
use clap::ValueEnum;

use super::args::{ModelArgs, bytes, tokens, unequal};
use super::output::Progress;
use super::place::{Lengths, Place, Room};
use super::{Outcome, Usage, open};
use crate::bench::{Bench, Samples, Test};
use crate::fit::Fit;
use crate::runner::RunError;
use crate::source::{Source, synthetic_names};
use crate::spec::CacheSpec;
use crate::watch::Watch;
use format::{Setup, Writer};

/// Arguments of `kvwarp bench`. Lists separated by commas are swept.
#[derive(clap::Args)]
#[command(after_help = CacheSpec::help())]
pub struct Args {
    /// GGUF file, or folder with safetensors and config.json [default: SmolLM2-135M-Instruct, obtained with pip]
    #[arg(short, long, value_name = "PATH", env = "KVWARP_MODEL")]
    model: Option<std::path::PathBuf>,
    /// Random f16 weights of a known shape instead of a model: llama-3-8b, mistral-7b, llama-2-7b, smollm2-135m
    #[arg(long, value_name = "SHAPE", conflicts_with = "model", value_parser = synthetic_names())]
    synthetic: Option<String>,
    /// Tokens of a prefill; 0 leaves the test out [default: 512]
    #[arg(short = 'p', long, value_name = "N,..", value_delimiter = ',', value_parser = tokens)]
    n_prompt: Option<Vec<usize>>,
    /// Tokens generated; 0 leaves the test out [default: 128]
    #[arg(short, long, value_name = "N,..", value_delimiter = ',', value_parser = tokens)]
    n_gen: Option<Vec<usize>>,
    /// Tokens in the cache before the test
    #[arg(short = 'd', long, value_name = "N,..", default_value = "0", value_delimiter = ',', value_parser = tokens)]
    n_depth: Vec<usize>,
    /// Sequences that decode together
    #[arg(long, value_name = "N,..", default_value = "1", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..=64))]
    parallel: Vec<u16>,
    /// Repetitions
    #[arg(short, long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    repetitions: u32,
    /// Measure nothing: tell how many sequences of -d tokens, and -p or -n more where they are given, fit in so much memory,
    /// such as 80GB; with --device cuda that of a GPU, which need not be there
    #[arg(long, value_name = "SIZE", value_parser = bytes, conflicts_with_all = ["profile", "parallel", "repetitions"])]
    memory: Option<usize>,
    /// Tell launches by op, with their times and bytes: a step of a decode, or all of a prefill
    #[arg(long)]
    profile: bool,
    /// Output format
    #[arg(short, long, value_enum, default_value_t = Output::Md)]
    output: Output,
    /// Threads [default: physical cores]
    #[arg(short, long, value_name = "N,..", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Vec<u16>,
    /// Stores of K: f16, q8, fp8, q4, q2; -ctk for short
    #[arg(long, value_name = "STORE,..", value_delimiter = ',')]
    cache_type_k: Vec<CacheSpec>,
    /// Stores of V, the same as K's; -ctv for short
    #[arg(long, value_name = "STORE,..", value_delimiter = ',')]
    cache_type_v: Vec<CacheSpec>,
    /// Cache spec; may be given several times
    #[arg(long, value_name = "SPEC")]
    cache: Vec<CacheSpec>,
    /// Where to run
    #[arg(long, value_enum, default_value_t = super::args::Device::Cpu)]
    device: super::args::Device,
    /// On a GPU: in which form weights in blocks are kept there
    #[arg(long, value_enum, default_value_t = super::args::Kept::Blocks)]
    weights: super::args::Kept,
    /// On the processor: form in which activations meet quantised weights
    #[arg(long, value_enum, default_value_t = super::args::Form::Q8)]
    activations: super::args::Form,
}

/// Formats of the result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// Markdown table
    Md,
    /// Comma-separated values with a header
    Csv,
    /// JSON array
    Json,
}

pub fn run(args: &Args) -> anyhow::Result<Outcome> {
    if let Some(memory) = args.memory {
        return fits::run(args, memory);
    }
    let (mut specs, available) = (args.specs()?, host::available());
    if args.profile && args.output == Output::Csv {
        return Err(Usage("--profile: a list in a list is no CSV; use md or json".into()).into());
    }
    let base = args.base();
    let source = match &args.synthetic {
        Some(shape) => {
            open::check_device(base.device)?;
            Source::synthetic(shape)?
        }
        None => open::source(&base)?,
    };
    if specs.is_empty() {
        specs.push(CacheSpec::of(&source.config));
    }
    let threads: Vec<_> = match args.threads[..] {
        [] => vec![base.threads()],
        ref given => given.iter().map(|&n| usize::from(n)).collect(),
    };
    let mut writer = Writer::new(args.output, &source);
    for &threads in &threads {
        let base = ModelArgs { threads: u16::try_from(threads).ok(), ..args.base() };
        let place = Place::new(&base, &source)?;
        for spec in &specs {
            for (rows, depth) in args.shapes() {
                let backend = args.device;
                let mut setup = Setup { backend, threads, spec, depth, rows, fit: None };
                setup.fit = fit(args, (&place, &source), &setup, available)?;
                let mut report =
                    |test: Test, samples: &Samples| Ok(writer.row(&setup, test, samples)?);
                match at_depth(args, &place, spec, (rows, depth), &mut report) {
                    Err(error) if interrupted(&error) => {
                        writer.end()?;
                        return Ok(Outcome::Interrupted);
                    }
                    done => done?,
                }
            }
        }
    }
    writer.end()?;
    Ok(Outcome::Done)
}

/// Every test of so many sequences at one depth.
fn at_depth(
    args: &Args,
    place: &Place<'_>,
    spec: &CacheSpec,
    (rows, depth): (usize, usize),
    report: &mut dyn FnMut(Test, &Samples) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let tests = args.tests(rows);
    if tests.is_empty() {
        return Ok(());
    }
    let lengths = lengths(&tests, depth);
    let room = Room { rows, lengths, least: lengths.context, longest: lengths.context, pool: None };
    host::forget_peak();
    let mut runner = place.runner(spec, room)?;
    let stop = open::stop_on_ctrl_c()?;
    let mut fill = Progress::new("filling the cache", rows * depth * runner.config().layers);
    let mut step = |n| fill.step(n);
    let mut bench = Bench::new(&mut *runner, depth, &mut Watch::new(stop, &mut step))?;
    for test in tests {
        let mut step = |_| {};
        let mut watch = Watch::new(stop, &mut step);
        let mut samples = bench.run(test, args.repetitions as usize, &mut watch)?;
        if args.profile {
            samples.profiled = Some(bench.profile(test, &mut watch)?);
        }
        report(test, &samples)?;
    }
    Ok(())
}

/// What the sequences of these tests hold.
fn lengths(tests: &[Test], depth: usize) -> Lengths {
    let tokens = |test: &Test| match *test {
        Test::Prefill(n) | Test::Decode(n) => n,
    };
    let read = |test: &Test| if let Test::Prefill(n) = test { *n } else { 1 };
    Lengths {
        context: depth + tests.iter().map(tokens).max().unwrap_or(0),
        block: tests.iter().map(read).max().unwrap_or(1).max(depth),
    }
}

/// How many sequences fit where the tests run; `None` where nobody says how much memory there is.
///
/// # Errors
/// [`Usage`] when a GPU is too small for those that are asked for.
fn fit(
    args: &Args,
    (place, source): (&Place<'_>, &Source),
    setup: &Setup<'_>,
    available: Option<usize>,
) -> anyhow::Result<Option<Fit>> {
    let Setup { spec, depth, rows, .. } = *setup;
    let lengths = lengths(&args.tests(rows), depth);
    let Lengths { context, block } = lengths;
    if context == 0 || context > source.config.context {
        return Ok(None);
    }
    if let Place::Cpu(model) = place {
        let on_host = |memory| crate::fit::on_host((model, source), spec, (context, block), memory);
        return Ok(available.map(on_host).transpose()?);
    }
    let fit = place.fit(spec, lengths)?;
    match fit {
        Some(Fit { sequences, memory, .. }) if sequences < rows => {
            let memory = super::output::bytes(memory);
            bail!(
                "{rows} sequences of {context} tokens do not fit in {memory} of GPU memory with `{spec}`, {sequences} do; \
                 less is needed with a smaller depth (-d), fewer sequences (--parallel), or fewer bits (--cache q2)"
            )
        }
        fit => Ok(fit),
    }
}

fn interrupted(error: &anyhow::Error) -> bool {
    error.downcast_ref().is_some_and(RunError::is_interrupted)
}

impl Args {
    /// The arguments that other commands have as well.
    fn base(&self) -> ModelArgs {
        let (model, threads) = (self.model.clone(), None);
        ModelArgs {
            model,
            calibration: None,
            threads,
            device: self.device,
            weights: self.weights,
            activations: self.activations,
        }
    }

    /// Numbers of sequences.
    fn rows(&self) -> Vec<usize> {
        self.parallel.iter().map(|&rows| usize::from(rows)).collect()
    }

    /// Numbers of sequences, each with every depth.
    fn shapes(&self) -> impl Iterator<Item = (usize, usize)> {
        let depths = |rows| self.n_depth.iter().map(move |&depth| (rows, depth));
        self.rows().into_iter().flat_map(depths)
    }

    /// Of so many sequences. A prefill is of one, however many there are to decode.
    fn tests(&self, rows: usize) -> Vec<Test> {
        let some = |given: &Option<Vec<usize>>, default| given.clone().unwrap_or(vec![default]);
        let mut prefills = some(&self.n_prompt, 512);
        if Some(&rows) != self.rows().first() {
            prefills.clear();
        }
        let prefills = prefills.into_iter().map(|n| (n, Test::Prefill(n)));
        let decodes = some(&self.n_gen, 128).into_iter().map(|n| (n, Test::Decode(n)));
        prefills.chain(decodes).filter(|(n, _)| *n > 0).map(|(_, test)| test).collect()
    }

    /// Those given; none: what the model has of its own.
    fn specs(&self) -> Result<Vec<CacheSpec>, Usage> {
        let (k, v) = (&self.cache_type_k, &self.cache_type_v);
        if let Some((k, v)) = k.iter().zip(v).find(|(k, v)| k != v) {
            return Err(unequal(k, v));
        }
        let types = if k.len() >= v.len() { k } else { v };
        Ok(self.cache.iter().chain(types).copied().collect())
    }
}
