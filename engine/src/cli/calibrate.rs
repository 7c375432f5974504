//! `kvwarp calibrate`.

use std::path::PathBuf;
use std::time::Instant;

use super::args::{ModelArgs, tokens};
use super::output::{self, Progress};
use super::{Outcome, Usage, open};
use crate::calibration::{Calibration, SCORED, beside, measure, read};
use crate::model::{Model, ModelError};
use crate::watch::Watch;

/// Tokens on which is measured what each head loses: each head reads a fifth of them again.
const SAMPLE: usize = 1280;

/// Arguments of `kvwarp calibrate`.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// Learn from a text which rounding errors of keys matter, for caches with hadamard=on
    Kv(KvArgs),
}

/// Arguments of `kvwarp calibrate kv`.
///
/// Every command then uses what was learnt where it lies beside the model, or is given with --calibration. A few
/// thousand tokens of the kind of text that the model will read are enough. Interrupted, it goes on where it stopped.
#[derive(clap::Args)]
struct KvArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Text to learn from, `-` for stdin
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Where to write [default: MODEL.kv.safetensors]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Tokens of the text to use; 0 is all
    #[arg(short = 'n', long, value_name = "N", default_value = "8k", value_parser = tokens)]
    tokens: usize,
    /// Tokens that are read together
    #[arg(short, long, value_name = "N", default_value = "2k", value_parser = tokens)]
    ctx_size: usize,
}

pub fn run(args: &Args) -> anyhow::Result<Outcome> {
    let (What::Kv(args), start) = (&args.what, Instant::now());
    let source = open::source(&args.model)?;
    let limit = source.config.context;
    if args.ctx_size == 0 || args.ctx_size > limit {
        let asked = args.ctx_size;
        return Err(Usage(format!("-c is {asked}; the model reads 1 to {limit} at once")).into());
    }
    let text = super::generate::read(&args.text)?;
    let mut ids = source.tokenizer()?.encode(&text, false)?;
    ids.truncate(if args.tokens == 0 { ids.len() } else { args.tokens });
    if ids.is_empty() {
        return Err(Usage(format!("{}: there is no text", args.text.display())).into());
    }
    let to = args.output.clone().unwrap_or_else(|| beside(source.path()));
    let mut calibration = Calibration::new(&source, &text);
    if to.exists() {
        let old = Calibration::open(&to, &source)?;
        if !old.continues(&calibration) {
            let to = to.display();
            return Err(
                Usage(format!("{to} is of another text: remove it, or name another -o")).into()
            );
        }
        calibration = old;
    }
    let model = Model::new(&source, args.model.threads(), args.model.activations())?;
    let stop = open::stop_on_ctrl_c()?;
    let left = ids.get(calibration.tokens..).unwrap_or_default();
    let sample = &ids[..ids.len().min(SAMPLE).min(limit)];
    let heads = source.config.layers * source.config.kv_heads;
    let rows = left.len() + sample.len() + (heads + 1) * sample.len() / SCORED;
    let mut progress = Progress::new("calibrating", rows * source.config.layers);
    let mut step = |rows| progress.step(rows);
    let mut watch = Watch::new(stop, &mut step);
    let done =
        read(&model, calibration, left, args.ctx_size, &mut watch, &to).and_then(|mut read| {
            let model = model.with_calibration(&read);
            measure(&model, &mut read, sample, &mut watch, &to).map(|()| read)
        });
    progress.clear();
    match done {
        Err(error) => match error.downcast_ref() {
            Some(ModelError::Interrupted(_)) => Ok(Outcome::Interrupted),
            _ => Err(error),
        },
        Ok(done) => {
            let (to, tokens, seconds) = (to.display(), done.tokens, start.elapsed().as_secs_f64());
            output::log(&format!("{to}: {tokens} tokens, {heads} heads, {seconds:.1} s"));
            Ok(Outcome::Done)
        }
    }
}
