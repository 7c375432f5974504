//! `kvwarp perplexity`.

use std::path::PathBuf;

use serde_json::json;

use super::args::{CacheArgs, ModelArgs, tokens};
use super::output::{self, Progress};
use super::{Outcome, Usage, open};
use crate::data;
use crate::model::ModelError;
use crate::perplexity::{Distance, Reading, Scores, compare, score};
use crate::spec::CacheSpec;
use crate::watch::Watch;

/// Arguments of `kvwarp perplexity`.
///
/// A quantised cache can be measured in two ways, and they disagree. By default it is quantised on write: each piece of
/// -b tokens attends to the history as the cache stores it, so errors add up. With --prefix N the first N tokens are
/// read exactly, then quantised, and only the tokens after them are scored.
#[derive(clap::Args)]
#[command(after_help = CacheSpec::help())]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Text to score, `-` for stdin [default: a text that comes with the program]
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    #[command(flatten)]
    cache: CacheArgs,
    /// Tokens of the text to use; 0 is the model's limit
    #[arg(short, long, value_name = "N", default_value = "0", value_parser = tokens)]
    ctx_size: usize,
    /// Tokens of a piece
    #[arg(short, long, value_name = "N", default_value = "512", value_parser = tokens)]
    batch_size: usize,
    /// Read the first N tokens exactly and score only what follows
    #[arg(long, value_name = "N", default_value = "0", value_parser = tokens)]
    prefix: usize,
    /// Also read the text with an f16 cache, and measure how far predictions are from it
    #[arg(long)]
    kl: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> anyhow::Result<Outcome> {
    let cache = args.cache()?;
    let text = match &args.file {
        Some(path) => super::generate::read(path)?,
        None => data::HELD.to_owned(),
    };
    let source = open::source(&args.model)?;
    let cache = cache.unwrap_or_else(|| CacheSpec::of(&source.config));
    let reading = Reading { cache, prefix: args.prefix, piece: args.batch_size };
    let limit = source.config.context;
    if args.ctx_size > limit {
        return Err(ModelError::Context { asked: args.ctx_size, limit }.into());
    }
    let mut ids = source.tokenizer()?.encode(&text, false)?;
    ids.truncate(if args.ctx_size == 0 { limit } else { args.ctx_size });
    if ids.len() < reading.prefix + 2 {
        let (got, need) = (ids.len(), reading.prefix + 2);
        return Err(Usage(format!("the text has {got} tokens; at least {need} are needed")).into());
    }
    let model = open::model(&args.model, &source)?;
    open::note_uncalibrated(model.is_calibrated(), &reading.cache);
    let stop = open::stop_on_ctrl_c()?;
    let readings = if args.kl { 2 } else { 1 };
    let mut progress = Progress::new("scoring", readings * ids.len() * source.config.layers);
    let mut step = |rows| progress.step(rows);
    let mut watch = Watch::new(stop, &mut step);
    let scores = match args.kl {
        true => {
            compare(&model, &ids, &reading, &mut watch).map(|(scores, far)| (scores, Some(far)))
        }
        false => score(&model, &ids, &reading, &mut watch).map(|scores| (scores, None)),
    };
    progress.clear();
    match scores {
        Err(ModelError::Interrupted(_)) => return Ok(Outcome::Interrupted),
        Err(error) => return Err(error.into()),
        Ok((scores, distance)) => print(args.json, &reading, &scores, distance.as_ref())?,
    }
    Ok(Outcome::Done)
}

impl Args {
    fn cache(&self) -> Result<Option<CacheSpec>, Usage> {
        if self.batch_size == 0 {
            return Err(Usage("-b is 0; a piece has at least 1 token".into()));
        }
        self.cache.spec()
    }
}

fn print(
    as_json: bool,
    reading: &Reading,
    scores: &Scores,
    distance: Option<&Distance>,
) -> std::io::Result<()> {
    let (mean, error, cache) = (scores.mean(), scores.standard_error(), &scores.cache);
    let how = if reading.prefix == 0 { "on write" } else { "after the prefix" };
    if as_json {
        return output::put_json(&json!({
            "cache": reading.cache.to_string(),
            "quantised": how,
            "prefix": reading.prefix,
            "piece": reading.piece,
            "tokens_scored": scores.nll.len(),
            "log_perplexity": mean,
            "standard_error": error,
            "perplexity": mean.exp(),
            "kv_tokens": cache.tokens,
            "kv_bytes": cache.used_bytes,
            "kv_effective_bits": cache.effective_bits,
            "f16_log_perplexity": distance.map(|far| far.f16),
            "kl": distance.map(|far| far.kl),
            "top1_agreement": distance.map(|far| far.agreement),
        }));
    }
    let far = distance.map_or_else(String::new, |far| {
        let (more, percent) = (mean - far.f16, far.agreement * 100.0);
        format!("against f16: {more:+.4} nats, KL {:.4}, same top token {percent:.1} %\n", far.kl)
    });
    output::put(&format!(
        "cache {}, quantised {how}, pieces of {}\n{} tokens scored: log-perplexity {mean:.4} +- {error:.4}, perplexity {:.3}\nKV {} ({:.2} bits an element)\n{far}",
        reading.cache,
        reading.piece,
        scores.nll.len(),
        mean.exp(),
        output::bytes(cache.used_bytes),
        cache.effective_bits,
    ))
}
