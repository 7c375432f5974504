//! `kvwarp batch`.

mod answers;
mod input;

use std::path::PathBuf;
use std::time::Instant;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::args::{AnswerArgs, CacheArgs, ModelArgs, SamplingArgs, bytes, tokens};
use super::output::{self, Progress};
use super::place::{Lengths, Place, Room};
use super::{Outcome, open};
use crate::batch::{Batch, Done, Event, Key};
use crate::calibration::fingerprint;
use crate::lookup::Drafts;
use crate::source::Source;
use crate::spec::CacheSpec;
use crate::tokenizer::Tokenizer;
use crate::watch::Watch;
use answers::{Answers, Run, hash};
use input::{Defaults, Line, Reader};

/// Arguments of `kvwarp batch`.
///
/// The file has a JSON object a line: `prompt`, continued as it stands, or `messages`, a list of objects with `role` and
/// `content`; and where a line differs from the flags `id`, `max_tokens`, `temperature`, `top_k`, `top_p`, `min_p`,
/// `repeat_penalty`, `seed`. Answers have `id` (the line's number by default), `text`, `tokens`, `end`, `prompt_tokens`,
/// `shared_tokens` (of a prompt that begins like an earlier one), `preemptions`, `drafted` and `drafts_taken` tokens, or
/// `error`; they come in the order in which they are done. Interrupted, the same command goes on where it stopped.
#[derive(clap::Args)]
#[command(after_help = CacheSpec::help())]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// File of prompts, `-` for stdin
    #[arg(long, value_name = "FILE")]
    prompts: PathBuf,
    /// File of answers
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Requests that are answered at the same time
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=64))]
    parallel: u16,
    /// Memory for keys and values, such as 512M or 2G [default: what the requests answered at the same time can need]
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    pool_size: Option<usize>,
    /// Tokens of a prompt that are read between steps, rounded up to a multiple of 64; equal beginnings are shared in
    /// multiples of it
    #[arg(long, value_name = "N", default_value = "2k", value_parser = tokens)]
    block: usize,
    #[command(flatten)]
    cache: CacheArgs,
    #[command(flatten)]
    answer: AnswerArgs,
    /// Print a JSON object with the summary instead of a line on stderr
    #[arg(long)]
    json: bool,
}

/// Sums over the requests of this run.
#[derive(Default)]
struct Sums {
    answered: usize,
    errors: usize,
    prompt_tokens: usize,
    shared_tokens: usize,
    tokens: usize,
    preemptions: usize,
    drafts: Drafts,
}

pub fn run(args: &Args) -> anyhow::Result<Outcome> {
    let AnswerArgs { n_predict, sampling, .. } = &args.answer;
    let (spec, choice) = (args.cache.spec()?, sampling.choice()?);
    let text = super::generate::read(&args.prompts)?;
    let source = open::source(&args.model)?;
    let spec = spec.unwrap_or_else(|| CacheSpec::of(&source.config));
    let (tokenizer, config) = (source.tokenizer()?, &source.config);
    let chat = source.chat(&tokenizer)?;
    let defaults = Defaults { max_tokens: *n_predict, choice, drafts: usize::from(sampling.draft) };
    let reader = Reader { tokenizer: &tokenizer, chat: chat.as_ref(), defaults };
    let lines = reader.lines(&args.prompts.display().to_string(), &text)?;
    let model_hash = args.model_hash(&source)?;
    let run = Run([
        ("model", model_hash.clone()),
        ("settings", args.settings(&spec)),
        ("prompts", hash(&text)),
    ]);
    let mut answers = Answers::open(&args.out, &run)?;
    let place = Place::new(&args.model, &source)?;
    place.note_uncalibrated(&spec);
    let longest = lines.iter().map(|line| line.request.held()).max().unwrap_or(0);
    let context = args.answer.context(config).unwrap_or(longest.min(config.context));
    let (rows, pool) = (usize::from(args.parallel), args.pool_size);
    let longest = longest.min(context);
    let lengths = Lengths { context, block: args.block.max(1) };
    let mut runner = place.runner(&spec, Room { rows, lengths, least: 1, longest, pool })?;
    let root: Key = Sha256::digest(format!("{model_hash} {spec}")).into();
    let mut batch = Batch::new(&mut *runner, args.block, root);
    let work = Work { lines: &lines, tokenizer: &tokenizer, answers: &mut answers };
    let start = Instant::now();
    let (sums, outcome) = work.run(&mut batch)?;
    args.report(&sums, lines.len(), start.elapsed().as_secs_f64())?;
    Ok(outcome)
}

impl Args {
    /// Of the weights and the calibration.
    fn model_hash(&self, source: &Source) -> anyhow::Result<String> {
        let calibration = open::calibration(&self.model, source).map(std::fs::read).transpose()?;
        Ok(hash(fingerprint(source) + &calibration.map(hash).unwrap_or_default()))
    }

    /// Of the flags that change answers; a seed that was not given is none of them.
    fn settings(&self, spec: &CacheSpec) -> String {
        let Self { model, block, answer: AnswerArgs { n_predict, sampling, .. }, .. } = self;
        let SamplingArgs { temp, top_k, top_p, min_p, repeat_penalty, repeat_last_n, seed, .. } =
            sampling;
        let activations = model.activations;
        hash(format!(
            "{spec} {block} {n_predict} {temp} {top_k} {top_p} {min_p} {repeat_penalty} {repeat_last_n} {seed:?} {activations:?}"
        ))
    }

    fn report(&self, sums: &Sums, lines: usize, seconds: f64) -> std::io::Result<()> {
        let Sums { answered, errors, prompt_tokens, shared_tokens, tokens, preemptions, drafts } =
            *sums;
        let speed = tokens as f64 / seconds.max(1e-9);
        if self.json {
            return output::put_json(&json!({
                "requests": lines,
                "answered": answered,
                "errors": errors,
                "prompt_tokens": prompt_tokens,
                "shared_tokens": shared_tokens,
                "tokens": tokens,
                "preemptions": preemptions,
                "drafted": drafts.made,
                "drafts_taken": drafts.taken,
                "seconds": seconds,
                "tokens_a_second": speed,
            }));
        }
        output::log(&format!(
            "{answered} of {lines} requests answered in {seconds:.2} s, {errors} with an error; prompts {prompt_tokens} tokens, {shared_tokens} of them shared; answers {tokens} tokens ({speed:.1} tok/s); {preemptions} preemptions"
        ));
        Ok(())
    }
}

/// The lines to answer, and where answers go.
struct Work<'a> {
    lines: &'a [Line],
    tokenizer: &'a Tokenizer,
    answers: &'a mut Answers,
}

impl Work<'_> {
    /// Answers every line that has no answer yet.
    fn run(self, batch: &mut Batch<'_>) -> anyhow::Result<(Sums, Outcome)> {
        let Self { lines, tokenizer, answers } = self;
        let stop = open::stop_on_ctrl_c()?;
        let (mut sums, mut outcome) = (Sums::default(), Outcome::Done);
        let todo: Vec<_> = lines.iter().filter(|line| !answers.has(&line.id)).collect();
        let mut progress = Progress::new("answering", todo.len());
        for line in todo {
            if let Err(refusal) = batch.submit(line.request.clone()) {
                sums.count_error();
                answers.put(&line.id, json!({ "error": refusal.to_string() }))?;
                progress.step(1);
            }
        }
        let (start, mut fresh) = (Instant::now(), 0);
        while !batch.is_idle() {
            let mut written = Ok(());
            let mut take = |event| {
                let (place, answer) = match event {
                    Event::Token { .. } => return fresh += 1,
                    Event::Done { id, done } => (id, sums.count(&done, tokenizer)),
                    Event::Failed { id, error } => {
                        sums.count_error();
                        (id, json!({ "error": error.to_string() }))
                    }
                };
                let put = answers.put(&lines[place as usize].id, answer);
                written = std::mem::replace(&mut written, Ok(())).and(put);
                progress.step(1);
            };
            let mut step = |_| {};
            let round = batch.round(&mut Watch::new(stop, &mut step), &mut take);
            written?;
            progress.say(format!("{:.1} tok/s", fresh as f64 / start.elapsed().as_secs_f64()));
            if round.is_err() {
                outcome = Outcome::Interrupted;
                break;
            }
        }
        progress.clear();
        Ok((sums, outcome))
    }
}

impl Sums {
    fn count_error(&mut self) {
        self.answered += 1;
        self.errors += 1;
    }

    /// Counts an answer and gives its line.
    fn count(&mut self, done: &Done, tokenizer: &Tokenizer) -> Value {
        self.answered += 1;
        self.prompt_tokens += done.prompt_tokens;
        self.shared_tokens += done.shared_tokens;
        self.tokens += done.tokens.len();
        self.preemptions += done.preemptions;
        self.drafts += done.drafts;
        json!({
            "text": tokenizer.decode(&done.tokens, false),
            "tokens": done.tokens,
            "end": done.end.name(),
            "prompt_tokens": done.prompt_tokens,
            "shared_tokens": done.shared_tokens,
            "preemptions": done.preemptions,
            "drafted": done.drafts.made,
            "drafts_taken": done.drafts.taken,
        })
    }
}
