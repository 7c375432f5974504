//! `kvwarp compress`.

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use serde_json::json;

use super::args::ModelArgs;
use super::output::{self, Progress};
use super::{Outcome, Usage, generate, open};
use crate::cache::{Cache, Shape};
use crate::model::{Model, ModelError, Work};
use crate::runner::Frozen;
use crate::source::Source;
use crate::spec::CacheSpec;
use crate::store::{Document, Reader, StoreError, Writer};
use crate::watch::{Interrupted, Watch};

/// Arguments of `kvwarp compress`.
///
/// The file can be asked any number of questions with `kvwarp ask`, none of which reads the document again. With a model
/// that has a chat template the document begins a user's turn, in which a question goes on.
#[derive(clap::Args)]
#[command(after_help = CacheSpec::help())]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Document, `-` for stdin
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Where to write the cache
    #[arg(short, long, value_name = "CACHE")]
    output: PathBuf,
    /// Cache spec: PRESET[,PART...] (see the end of this help)
    #[arg(long, value_name = "SPEC", default_value = "q2,evict=kvzip:0.3")]
    cache: CacheSpec,
    /// Leave the model's chat template out: questions continue the text as it stands
    #[arg(long)]
    no_chat: bool,
    /// Print a JSON object with what was done instead of a line on stderr
    #[arg(long)]
    json: bool,
}

/// A document as a cache holds it.
struct Held {
    cache: Cache,
    frozen: Frozen,
    /// Bytes that a sequence of it takes.
    kv_bytes: usize,
}

pub fn run(args: &Args) -> anyhow::Result<Outcome> {
    let start = Instant::now();
    let text = generate::read(&args.file)?;
    let source = open::source(&args.model)?;
    let document = args.document(&text, &source)?;
    let model = open::model(&args.model, &source)?;
    open::note_uncalibrated(model.is_calibrated(), &args.cache);
    note_blind(&args.cache);
    let stop = open::stop_on_ctrl_c()?;
    let writer = Writer::create(&args.output, Reader::new(&model, &args.cache))?;
    let held = match hold(&model, &args.cache, &document.tokens, stop) {
        Err(ModelError::Interrupted(_)) => return Ok(Outcome::Interrupted),
        held => held?,
    };
    let (sequence, mut step) = ((&held.cache, &held.frozen), |_| {});
    match writer.write(&document, sequence, &mut Watch::new(stop, &mut step)) {
        Err(StoreError::Interrupted(Interrupted)) => Ok(Outcome::Interrupted),
        bytes => {
            args.report(&held, bytes?, start)?;
            Ok(Outcome::Done)
        }
    }
}

impl Args {
    /// The document in tokens, with what a prompt has before it.
    fn document(&self, text: &str, source: &Source) -> anyhow::Result<Document> {
        // A question follows after an empty line, however the file ends.
        let (text, tokenizer) = (text.trim_end(), source.tokenizer()?);
        if text.is_empty() {
            return Err(Usage(format!("{}: there is no text", self.file.display())).into());
        }
        let template = if self.no_chat { None } else { source.chat(&tokenizer)? };
        let tokens = match &template {
            Some(template) => tokenizer.prompt(&template.opening(text)?)?,
            None => tokenizer.prompt(text)?,
        };
        Ok(Document { tokens, chat: template.is_some() })
    }

    fn report(&self, held: &Held, file_bytes: u64, start: Instant) -> std::io::Result<()> {
        let Held { cache, frozen: Frozen { len: tokens, heads, .. }, kv_bytes } = held;
        let Shape { layers, kv_heads, head_dim, .. } = cache.shape();
        let kept = heads.iter().map(|head| head.len).sum::<usize>() as f64 / heads.len() as f64;
        let f16_bytes = 4 * tokens * layers * kv_heads * head_dim;
        let ratio = f16_bytes as f64 / file_bytes as f64;
        let seconds = start.elapsed().as_secs_f64();
        if self.json {
            return output::put_json(&json!({
                "cache": self.cache.to_string(),
                "tokens": tokens,
                "tokens_kept": kept,
                "file_bytes": file_bytes,
                "kv_bytes": kv_bytes,
                "f16_bytes": f16_bytes,
                "ratio": ratio,
                "seconds": seconds,
            }));
        }
        output::log(&format!(
            "{}: {tokens} tokens, {kept:.0} of them a head; {}, 1/{ratio:.1} of f16's {}; {seconds:.1} s",
            self.output.display(),
            output::bytes(file_bytes as usize),
            output::bytes(f16_bytes),
        ));
        Ok(())
    }
}

/// Says what to expect of a method that looks for what a question attends to, when there is none.
fn note_blind(spec: &CacheSpec) {
    let by_attention = spec.evict.filter(|evict| spec.selects() && evict.follows_attention());
    if let Some(name) = by_attention.map(|evict| evict.name()).or(spec.tsp.map(|_| "tsp")) {
        output::log(&format!(
            "note: {name} keeps what the end of the document attends to, whatever is asked later; kvzip and lagkv are made \
             to be asked anything"
        ));
    }
}

/// Reads tokens into a new cache.
fn hold(
    model: &Model<'_>,
    spec: &CacheSpec,
    tokens: &[u32],
    stop: &AtomicBool,
) -> Result<Held, ModelError> {
    let mut cache = model.cache(spec, tokens.len())?;
    let (row, mut work) = (cache.open(), Work::default());
    let rows = generate::rows(model.config(), spec, 0, tokens.len());
    let mut progress = Progress::new("compressing", rows);
    let mut step = |rows| progress.step(rows);
    let mut watch = Watch::new(stop, &mut step);
    let mut blocks = tokens.chunks(spec.block());
    let read = blocks.try_for_each(|block| {
        model.read(block, (&mut cache, row), &mut work, &mut watch).map(drop)
    });
    progress.clear();
    read?;
    let kv_bytes = cache.stats(row).used_bytes;
    let frozen = cache.freeze(row)?;
    Ok(Held { cache, frozen, kv_bytes })
}
