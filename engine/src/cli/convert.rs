//! `kvwarp convert`.

use std::path::PathBuf;
use std::time::Instant;

use serde_json::json;

use super::args::{ModelArgs, tokens};
use super::output::{self, Progress};
use super::{Outcome, Usage, open};
use crate::convert::{self, Budget, ConvertError, Converted, Elements, Request, Stage, Target};
use crate::data;
use crate::model::{Model, ModelError};
use crate::watch::Watch;

/// Arguments of `kvwarp convert`.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// Make a model whose keys and values come from a short latent vector and a few rotated pairs
    Elitekv(EliteArgs),
}

/// Arguments of `kvwarp convert elitekv`.
///
/// Every command then reads the folder like any other model. Pairs that matter are searched on a text, the
/// rest of the keys and the values are factorised as the text's activations have it, and what was lost is fitted again
/// layer by layer. Interrupted, it goes on after the last layer that was searched, fitted or trained.
#[derive(clap::Args)]
struct EliteArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Text to learn from, `-` for stdin
    #[arg(long, value_name = "FILE")]
    calib: PathBuf,
    /// Folder to write
    #[arg(short, long, value_name = "FOLDER")]
    output: PathBuf,
    /// Share of the cache's elements that may stay
    #[arg(long, value_name = "X", default_value_t = 0.25, conflicts_with_all = ["pairs", "rank"])]
    ratio: f64,
    /// Pairs of a kv head that keep their rotation [default: the best for --ratio]
    #[arg(long, value_name = "R", requires = "rank")]
    pairs: Option<usize>,
    /// Elements of the latent vector of a token and layer [default: the best for --ratio]
    #[arg(long, value_name = "C", requires = "pairs")]
    rank: Option<usize>,
    /// Let layers share what all latent vectors have together as each needs it, in multiples of 16
    #[arg(long)]
    by_layer: bool,
    /// Factorise the weights alone, whatever their inputs are
    #[arg(long)]
    plain: bool,
    /// Leave factors and output projections as the factorisation has them
    #[arg(long)]
    no_refit: bool,
    /// Then train the attention of each layer for so many steps: minutes a hundred steps for a small model
    #[arg(long, value_name = "STEPS", default_value_t = 0)]
    distil: usize,
    /// Tokens of the text to learn from; the next -c choose pairs and rank
    #[arg(short = 'n', long, value_name = "N", default_value = "16k", value_parser = tokens)]
    tokens: usize,
    /// Of these, tokens on which pairs are searched
    #[arg(long, value_name = "N", default_value = "4k", value_parser = tokens)]
    search: usize,
    /// Tokens that are read together
    #[arg(short, long, value_name = "N", default_value = "1k", value_parser = tokens)]
    ctx_size: usize,
    /// Elements of the matrices that are written
    #[arg(long, value_enum, default_value_t = Type::F16)]
    dtype: Type,
    /// Text to measure perplexity on before and after each stage [default: a text that comes with the program]
    #[arg(long, value_name = "FILE")]
    held: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Type {
    /// 32-bit floats
    F32,
    /// 16-bit floats
    F16,
    /// 16-bit floats of less precision and more range
    Bf16,
}

/// Most tokens that perplexity is measured on.
const HELD: usize = 4096;

pub fn run(args: &Args) -> anyhow::Result<Outcome> {
    let (What::Elitekv(args), start) = (&args.what, Instant::now());
    args.check()?;
    let source = open::source(&args.model)?;
    let limit = source.config.context;
    if args.ctx_size == 0 || args.ctx_size > limit {
        let asked = args.ctx_size;
        return Err(Usage(format!("-c is {asked}; the model reads 1 to {limit} at once")).into());
    }
    let tokenizer = source.tokenizer()?;
    let encoded = |text: &str| tokenizer.encode(text, false);
    let ids = encoded(&super::generate::read(&args.calib)?)?;
    let held = match &args.held {
        Some(path) => encoded(&super::generate::read(path)?)?,
        None => encoded(data::HELD)?,
    };
    let held = &held[..held.len().min(HELD).min(limit)];
    let (learn, choose) = args.cut(&ids)?;
    if held.len() < 2 {
        return Err(Usage("perplexity is measured on at least 2 tokens".into()).into());
    }
    let request = Request {
        target: args.target(),
        by_layer: args.by_layer,
        whiten: !args.plain,
        refit: !args.no_refit,
        distil: args.distil,
        tokens: learn,
        searched: args.search.min(learn.len()),
        window: args.ctx_size,
        chosen_on: choose,
        held,
    };
    let model = Model::new(&source, args.model.threads(), args.model.activations())?;
    let stop = open::stop_on_ctrl_c()?;
    let mut progress = Progress::new("converting", convert::work(&source.config, &request)?);
    let mut step = |rows| progress.step(rows);
    let mut watch = Watch::new(stop, &mut step);
    let beside = args.output.with_added_extension("state.json");
    let mut note = |stage: &Stage| output::log(&line(stage));
    let done = convert::convert((&source, &model), &request, &beside, &mut watch, &mut note);
    progress.clear();
    let done = match done {
        Err(ConvertError::Model(ModelError::Interrupted(_))) => return Ok(Outcome::Interrupted),
        done => done?,
    };
    convert::write(&source, &done.staged, args.dtype.elements(), &args.output)?;
    convert::finish(&beside)?;
    let seconds = start.elapsed().as_secs_f64();
    args.print(&done, seconds)?;
    Ok(Outcome::Done)
}

fn line(stage: &Stage) -> String {
    format!("{}: log-perplexity {:.4}, perplexity {:.3}", stage.name, stage.nats, stage.nats.exp())
}

impl EliteArgs {
    fn check(&self) -> Result<(), Usage> {
        if !(self.ratio > 0.0 && self.ratio <= 1.0) {
            return Err(Usage(format!(
                "--ratio is {}; a share is above 0 and at most 1",
                self.ratio
            )));
        }
        if self.output.exists() {
            let there = self.output.display();
            return Err(Usage(format!("{there} exists: remove it, or name another -o")));
        }
        Ok(())
    }

    fn target(&self) -> Target {
        match (self.pairs, self.rank) {
            (Some(pairs), Some(rank)) => Target::Fixed(Budget { pairs, rank }),
            _ => Target::Ratio(self.ratio),
        }
    }

    /// Tokens to learn from, and those to choose pairs and rank on.
    fn cut<'a>(&self, ids: &'a [u32]) -> Result<(&'a [u32], &'a [u32]), Usage> {
        let choose = self.ctx_size.min(ids.len() / 4);
        let learn = match self.tokens {
            0 => ids.len() - choose,
            tokens => tokens.min(ids.len() - choose),
        };
        if choose < 2 {
            let (text, got) = (self.calib.display(), ids.len());
            return Err(Usage(format!("{text}: {got} tokens; at least 8 are needed")));
        }
        Ok((&ids[..learn], &ids[learn..learn + choose]))
    }

    fn print(&self, done: &Converted, seconds: f64) -> std::io::Result<()> {
        let Converted { budget, ratio, stages, tried, .. } = done;
        let Budget { pairs, rank } = *budget;
        let out = self.output.display();
        if self.json {
            let stage = |s: &Stage| json!({ "stage": s.name, "log_perplexity": s.nats, "perplexity": s.nats.exp() });
            let tried = tried.iter().map(|(budget, nats)| {
                json!({ "pairs": budget.pairs, "rank": budget.rank, "log_perplexity": nats })
            });
            return output::put_json(&json!({
                "output": self.output,
                "pairs": pairs,
                "rank": rank,
                "ratio": ratio,
                "stages": stages.iter().map(stage).collect::<Vec<_>>(),
                "tried": tried.collect::<Vec<_>>(),
                "seconds": seconds,
            }));
        }
        let first = stages.first().map_or(0.0, |stage| stage.nats);
        let rows = stages.iter().map(|stage| {
            let numbers = [stage.nats, stage.nats - first];
            let numbers = numbers.map(|x| format!("{x:.4}"));
            [vec![stage.name.to_owned()], numbers.into(), vec![format!("{:.3}", stage.nats.exp())]]
                .concat()
        });
        let header = ["stage", "log-perplexity", "more", "perplexity"];
        let table = output::table(&header, &rows.collect::<Vec<_>>());
        output::put(&format!(
            "{table}\n{out}: {pairs} pairs, rank {rank}, {:.1} % of the cache, {seconds:.0} s\n",
            ratio * 100.0
        ))
    }
}

impl Type {
    fn elements(self) -> Elements {
        match self {
            Self::F32 => Elements::F32,
            Self::F16 => Elements::F16,
            Self::Bf16 => Elements::Bf16,
        }
    }
}
