//! `kvwarp bench --memory`: how many sequences fit, measured by nobody.

use serde_json::{Value, json};

use super::{Args, Output, format};
use crate::cli::args::{Device, ModelArgs};
use crate::cli::place::{Lengths, fit_on_gpu};
use crate::cli::{Outcome, Usage, open, output};
use crate::fit::{Fit, on_host};
use crate::source::Source;
use crate::spec::CacheSpec;

/// Tells of every cache and length that the arguments name.
pub fn run(args: &Args, memory: usize) -> anyhow::Result<Outcome> {
    let (mut specs, base) = (args.specs()?, args.base());
    let source = match &args.synthetic {
        Some(shape) => Source::outline(shape)?,
        None => open::source(&ModelArgs { device: Device::Cpu, ..args.base() })?,
    };
    if specs.is_empty() {
        specs.push(CacheSpec::of(&source.config));
    }
    let mut rows = Vec::new();
    for spec in &specs {
        for lengths in lengths(args, &source)? {
            let fit = match base.device {
                Device::Cpu => {
                    let model = open::model(&base, &source)?;
                    model.check(spec, lengths.context)?;
                    on_host((&model, &source), spec, (lengths.context, lengths.block), memory)?
                }
                Device::Cuda => {
                    let calibration = open::read_calibration(&base, &source)?;
                    fit_on_gpu(
                        &source,
                        calibration.as_ref(),
                        base.weights(),
                        spec,
                        lengths,
                        memory,
                    )?
                }
            };
            rows.push((spec.to_string(), lengths.context, fit));
        }
    }
    write(args, &source, &rows)?;
    Ok(Outcome::Done)
}

/// Tokens of a sequence: each depth with what each test that was asked for adds.
fn lengths(args: &Args, source: &Source) -> Result<Vec<Lengths>, Usage> {
    let prompts = args.n_prompt.iter().flatten().map(|&n| (n, n));
    let tests = prompts.chain(args.n_gen.iter().flatten().map(|&n| (n, 0)));
    let mut tests: Vec<_> = tests.filter(|(n, _)| *n > 0).collect();
    if tests.is_empty() {
        tests.push((0, 0));
    }
    let all = args.n_depth.iter().flat_map(|&depth| {
        tests.iter().map(move |(n, read)| Lengths { context: depth + n, block: depth.max(*read) })
    });
    let (all, most): (Vec<_>, _) = (all.collect(), source.config.context);
    match all.iter().find(|lengths| lengths.context == 0 || lengths.context > most) {
        None => Ok(all),
        Some(Lengths { context: 0, .. }) => {
            Err(Usage("--memory: say with -d, -p or -n how many tokens a sequence has".into()))
        }
        Some(Lengths { context, .. }) => {
            Err(Usage(format!("a context of {context} tokens; the model's limit is {most}")))
        }
    }
}

fn write(args: &Args, source: &Source, rows: &[(String, usize, Fit)]) -> std::io::Result<()> {
    let model = format::model_name(source);
    let value = |(spec, tokens, fit): &(String, usize, Fit)| {
        json!({
            "model_filename": source.path(),
            "model_type": model,
            "backends": args.device.name(),
            "cache": spec,
            "n_tokens": tokens,
            "memory_bytes": fit.memory,
            "sequence_bytes": fit.sequence,
            "shared_bytes": fit.shared,
            "sequences": fit.sequences,
        })
    };
    let values: Vec<Value> = rows.iter().map(value).collect();
    match args.output {
        Output::Json => output::put_json(&Value::Array(values)),
        Output::Csv => {
            values.iter().enumerate().try_for_each(|(i, value)| format::csv(value, i == 0))
        }
        Output::Md => {
            let row = |(spec, tokens, fit): &(String, usize, Fit)| {
                let [sequence, shared] = [fit.sequence, fit.shared].map(output::bytes);
                vec![spec.clone(), tokens.to_string(), sequence, shared, fit.sequences.to_string()]
            };
            let header = ["cache", "tokens", "a sequence", "all others", "sequences"];
            let memory = rows.first().map_or(0, |(.., fit)| fit.memory);
            let (place, memory) = (args.device.name(), output::bytes(memory));
            let table = output::table(&header, &rows.iter().map(row).collect::<Vec<_>>());
            output::put(&format!("{model} in {memory} ({place})\n\n{table}"))
        }
    }
}
