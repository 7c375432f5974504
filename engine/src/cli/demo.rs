//! `kvwarp` without a command: one question about one document, with an f16 cache and with a 2-bit cache.

use super::args::ModelArgs;
use super::output::{self, Progress};
use super::{Outcome, generate, open};
use crate::chat::Message;
use crate::data;
use crate::generate::{End, Request, Stats};
use crate::model::Model;
use crate::perplexity::{Reading, Scores, score};
use crate::runner::{Choice, CpuRunner};
use crate::source::Source;
use crate::tokenizer::Tokenizer;
use crate::watch::Watch;

/// Arguments without a command.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
}

/// The caches compared.
const SPECS: [&str; 2] = ["f16", "q2"];
/// Most tokens of an answer.
const ANSWER_TOKENS: usize = 96;
/// Tokens of a piece when the held text is scored: short, so that most of what a piece sees was quantised.
const PIECE: usize = 128;

/// What was measured with one cache.
struct Column {
    spec: &'static str,
    stats: Stats,
    scores: Scores,
}

pub fn run(args: &Args) -> anyhow::Result<Outcome> {
    let source = open::source(&args.model)?;
    let tokenizer = source.tokenizer()?;
    let model = open::model(&args.model, &source)?;
    let prompt = prompt(&source, &tokenizer)?;
    let held = tokenizer.encode(data::HELD, false)?;
    output::put(&format!("{}\n", data::QUESTION))?;
    let mut columns = Vec::new();
    for spec in SPECS {
        output::put(&format!("\n[{spec} cache] "))?;
        let Some(column) = measure(&model, &tokenizer, &prompt, &held, spec)? else {
            return Ok(Outcome::Interrupted);
        };
        columns.push(column);
    }
    output::put(&format!("\n{}", table(&columns)))?;
    Ok(Outcome::Done)
}

/// The document and the question, as the model is used to be asked.
fn prompt(source: &Source, tokenizer: &Tokenizer) -> anyhow::Result<String> {
    let text = format!("{}\n\n{}", data::DOCUMENT, data::QUESTION);
    match source.chat(tokenizer)? {
        Some(template) => Ok(template.render(&[Message::new("user", &text)])?),
        None => Ok(text),
    }
}

/// Answers and scores with one cache; `None` when interrupted.
fn measure(
    model: &Model<'_>,
    tokenizer: &Tokenizer,
    prompt: &str,
    held: &[u32],
    spec: &'static str,
) -> anyhow::Result<Option<Column>> {
    let cache: crate::spec::CacheSpec = spec.parse()?;
    let request = Request {
        prompt: tokenizer.prompt(prompt)?,
        row: None,
        max_tokens: ANSWER_TOKENS,
        drafts: 0,
        context: None,
        choice: Choice::GREEDY,
    };
    let context = request.context_for(model.config());
    let mut runner = CpuRunner::new(model, &cache, 1, context)?;
    let stats = generate::streamed(&mut runner, tokenizer, &request, &mut output::put)?;
    output::put("\n")?;
    generate::summary(&stats).iter().for_each(|line| output::log(line));
    let stop = open::stop_on_ctrl_c()?;
    let mut progress = Progress::new("scoring", held.len() * model.config().layers);
    let mut step = |rows| progress.step(rows);
    let reading = Reading { cache, prefix: 0, piece: PIECE };
    let scores = match stats.end {
        End::Interrupted => return Ok(None),
        _ => score(model, held, &reading, &mut Watch::new(stop, &mut step)),
    };
    progress.clear();
    match scores {
        Err(crate::model::ModelError::Interrupted(_)) => Ok(None),
        scores => Ok(Some(Column { spec, stats, scores: scores? })),
    }
}

fn table(columns: &[Column]) -> String {
    let row = |column: &Column| {
        let Column { spec, stats, scores } = column;
        vec![
            (*spec).to_owned(),
            format!("{:.1}", stats.prefill_speed()),
            format!("{:.1}", stats.decode_speed()),
            output::bytes(stats.cache.used_bytes),
            format!("{:.2}", stats.cache.effective_bits),
            format!("{:.4}", scores.mean()),
        ]
    };
    let rows: Vec<_> = columns.iter().map(row).collect();
    let header =
        ["cache", "prefill tok/s", "decode tok/s", "KV", "bits an element", "log-perplexity"];
    let (Some(column), Some(prompt)) =
        (columns.first(), columns.first().map(|c| c.stats.prompt_tokens))
    else {
        return String::new();
    };
    let note = format!(
        "Speed and KV of the answer after {prompt} tokens; log-perplexity of {} other tokens, quantised on write.\n",
        column.scores.nll.len()
    );
    output::table(&header, &rows) + &note
}
