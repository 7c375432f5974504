//! `kvwarp generate`.

use std::io::Read;
use std::path::PathBuf;

use anyhow::Context;
use serde_json::json;

use super::args::{AnswerArgs, CacheArgs, ModelArgs};
use super::output::{self, Progress};
use super::place::{Place, Room};
use super::{Outcome, Usage, open};
use crate::chat::Message;
use crate::config::Config;
use crate::generate::{End, Request, Stats, generate};
use crate::lookup::Drafts;
use crate::runner::Runner;
use crate::source::Source;
use crate::spec::CacheSpec;
use crate::tokenizer::Tokenizer;
use crate::watch::Watch;

/// Arguments of `kvwarp generate`.
#[derive(clap::Args)]
#[command(after_help = CacheSpec::help())]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Text to continue, or question to answer
    #[arg(short, long, value_name = "TEXT", required_unless_present = "file")]
    prompt: Option<String>,
    /// File with the prompt, `-` for stdin
    #[arg(short, long, value_name = "FILE", conflicts_with = "prompt")]
    file: Option<PathBuf>,
    /// Put the prompt into the model's chat template [default: when the model has one]
    #[arg(long, conflicts_with = "no_chat")]
    chat: bool,
    /// Continue the prompt as it stands
    #[arg(long)]
    no_chat: bool,
    #[command(flatten)]
    cache: CacheArgs,
    #[command(flatten)]
    answer: AnswerArgs,
    /// Print one JSON object at the end instead of the text
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> anyhow::Result<Outcome> {
    let AnswerArgs { n_predict, sampling, .. } = &args.answer;
    let (cache, choice) = (args.cache.spec()?, sampling.choice()?);
    let prompt = args.prompt()?;
    let source = open::source(&args.model)?;
    let cache = cache.unwrap_or_else(|| CacheSpec::of(&source.config));
    let tokenizer = source.tokenizer()?;
    let request = Request {
        prompt: tokenizer.prompt(&args.chatted(prompt, &source, &tokenizer)?)?,
        row: None,
        max_tokens: *n_predict,
        drafts: usize::from(sampling.draft),
        context: args.answer.context(&source.config),
        choice,
    };
    let place = Place::new(&args.model, &source)?;
    place.note_uncalibrated(&cache);
    let context = request.context_for(&source.config);
    let mut runner = place.runner(&cache, Room::one(context))?;
    let (text, stats) = answer(&mut *runner, &tokenizer, &request, args.json)?;
    if args.json {
        output::put_json(&report(&cache, &request, &text, &stats))?;
    }
    Ok(if stats.end == End::Interrupted { Outcome::Interrupted } else { Outcome::Done })
}

impl Args {
    fn prompt(&self) -> anyhow::Result<String> {
        match (&self.prompt, &self.file) {
            (Some(prompt), _) => Ok(prompt.clone()),
            (None, Some(path)) => read(path),
            (None, None) => Err(Usage("give a prompt with -p or -f".into()).into()),
        }
    }

    /// The prompt as the model reads it.
    fn chatted(
        &self,
        prompt: String,
        source: &Source,
        tokenizer: &Tokenizer,
    ) -> anyhow::Result<String> {
        if self.no_chat {
            return Ok(prompt);
        }
        match source.chat(tokenizer)? {
            Some(template) => Ok(template.render(&[Message::new("user", &prompt)])?),
            None if self.chat => {
                Err(Usage("--chat: this model has no chat template".into()).into())
            }
            None => Ok(prompt),
        }
    }
}

/// The text of a file, `-` being stdin.
pub fn read(path: &PathBuf) -> anyhow::Result<String> {
    if path.as_os_str() == "-" {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).context("stdin")?;
        return Ok(text);
    }
    std::fs::read_to_string(path).with_context(|| path.display().to_string())
}

/// Generates an answer: on stdout as it comes, and what it took on stderr; or silently.
pub fn answer(
    runner: &mut dyn Runner,
    tokenizer: &Tokenizer,
    request: &Request,
    silent: bool,
) -> anyhow::Result<(String, Stats)> {
    let mut text = String::new();
    let stats = streamed(runner, tokenizer, request, &mut |piece| {
        text.push_str(piece);
        if silent { Ok(()) } else { output::put(piece) }
    })?;
    if !silent {
        output::put("\n")?;
        summary(&stats).iter().for_each(|line| output::log(line));
    }
    Ok((text, stats))
}

/// Generates with a progress bar over the prompt and Ctrl-C as a way to end.
pub fn streamed(
    runner: &mut dyn Runner,
    tokenizer: &Tokenizer,
    request: &Request,
    put: &mut dyn FnMut(&str) -> std::io::Result<()>,
) -> anyhow::Result<Stats> {
    let stop = open::stop_on_ctrl_c()?;
    let held = request.row.map_or(0, |row| runner.len(row));
    let rows = rows(runner.config(), runner.spec(), held, request.prompt.len().saturating_sub(1));
    let mut progress = Progress::new("reading", rows);
    let mut step = |rows| progress.step(rows);
    let mut written = Ok(());
    let stats =
        generate(runner, tokenizer, request, &mut Watch::new(stop, &mut step), &mut |piece| {
            if written.is_ok() {
                written = put(piece);
            }
        })?;
    progress.clear();
    written?;
    Ok(stats)
}

/// Rows that pass through a layer when a prompt of `len` tokens is read of which `held` are: those that a policy chooses
/// among once more where it says them again.
pub fn rows(config: &Config, spec: &CacheSpec, held: usize, len: usize) -> usize {
    let again = held == 0 && spec.selects() && spec.evict.is_some_and(|evict| evict.says_again());
    (len - held) * config.layers * if again { 2 } else { 1 }
}

/// Speeds and memory, in two lines for stderr.
pub fn summary(stats: &Stats) -> [String; 2] {
    let Stats { prompt_tokens, tokens, prefill, decode, cache, .. } = stats;
    let why = match stats.end {
        End::Stop => "the model ended its text",
        End::Length => "-n reached",
        End::Context => "context full",
        End::Interrupted => "interrupted",
    };
    let drafts = match stats.drafts {
        Drafts { made: 0, .. } => String::new(),
        Drafts { made, taken } => format!(", {taken} of {made} drafts taken"),
    };
    [
        format!(
            "prompt {prompt_tokens} tokens in {:.2} s ({:.1} tok/s); answer {} tokens in {:.2} s ({:.1} tok/s){drafts}; {why}",
            prefill.as_secs_f64(),
            stats.prefill_speed(),
            tokens.len(),
            decode.as_secs_f64(),
            stats.decode_speed(),
        ),
        format!(
            "KV cache: {} tokens in {} ({:.2} bits an element), peak {}",
            cache.tokens,
            output::bytes(cache.used_bytes),
            cache.effective_bits,
            output::bytes(cache.peak_bytes),
        ),
    ]
}

/// An answer and what it took, as JSON.
pub fn report(spec: &CacheSpec, request: &Request, text: &str, stats: &Stats) -> serde_json::Value {
    let cache = &stats.cache;
    json!({
        "text": text,
        "tokens": stats.tokens,
        "end": stats.end.name(),
        "seed": request.choice.seed,
        "cache": spec.to_string(),
        "prompt_tokens": stats.prompt_tokens,
        "prefill_seconds": stats.prefill.as_secs_f64(),
        "prefill_tokens_a_second": stats.prefill_speed(),
        "decode_seconds": stats.decode.as_secs_f64(),
        "decode_tokens_a_second": stats.decode_speed(),
        "drafted": stats.drafts.made,
        "drafts_taken": stats.drafts.taken,
        "kv_tokens": cache.tokens,
        "kv_bytes": cache.used_bytes,
        "kv_bytes_peak": cache.peak_bytes,
        "kv_bytes_capacity": cache.capacity_bytes,
        "kv_effective_bits": cache.effective_bits,
    })
}
