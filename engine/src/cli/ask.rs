//! `kvwarp ask`.

use std::io::{self, BufRead, IsTerminal};
use std::path::PathBuf;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use serde_json::{Value, json};

use super::args::{AnswerArgs, ModelArgs};
use super::{Outcome, generate, open, output};
use crate::chat::ChatTemplate;
use crate::generate::{End, Request};
use crate::runner::{Choice, CpuRunner, Frozen, Runner};
use crate::store::{Document, Stored};
use crate::tokenizer::Tokenizer;

/// Tokens that a question may have when it is not known yet and no context is given.
const QUESTION_TOKENS: usize = 1024;
/// How often is looked whether someone asked to stop while no question comes.
const PAUSE: Duration = Duration::from_millis(100);

/// Arguments of `kvwarp ask`.
///
/// Each question follows the document and nothing else, so the order of questions has no part in their answers. The
/// model, and its calibration where there is one, are those of `kvwarp compress`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// What `kvwarp compress` wrote
    #[arg(value_name = "CACHE")]
    cache: PathBuf,
    /// Questions [default: the lines of stdin]
    #[arg(value_name = "QUESTION")]
    questions: Vec<String>,
    #[command(flatten)]
    answer: AnswerArgs,
    /// Print one JSON object at the end instead of the answers
    #[arg(long)]
    json: bool,
}

/// A document that can be asked.
struct Asked<'a> {
    args: &'a Args,
    document: &'a Document,
    tokenizer: &'a Tokenizer,
    template: Option<&'a ChatTemplate>,
    choice: Choice,
    runner: CpuRunner<'a>,
    frozen: Frozen,
    answers: Vec<Value>,
}

pub fn run(args: &Args) -> anyhow::Result<Outcome> {
    let choice = args.answer.sampling.choice()?;
    let source = open::source(&args.model)?;
    let tokenizer = source.tokenizer()?;
    let model = open::model(&args.model, &source)?;
    let stored = Stored::open(&args.cache, &model)?;
    let document = stored.document();
    let template = if document.chat { source.chat(&tokenizer)? } else { None };
    let template = template.as_ref();
    let questions: Vec<_> = args
        .questions
        .iter()
        .map(|question| tokens(question, template, &tokenizer))
        .collect::<crate::error::Result<_>>()?;
    let (held, limit) = (document.tokens.len(), source.config.context);
    let prompt = match questions.iter().map(Vec::len).max() {
        Some(longest) => held + longest,
        None => (held + QUESTION_TOKENS).min(limit),
    };
    let needed = (prompt + args.answer.n_predict).min(limit).max(prompt);
    let context = args.answer.context(&source.config).unwrap_or(needed);
    let mut runner = CpuRunner::new(&model, stored.spec(), 1, context)?;
    let frozen = stored.load(runner.cache_mut())?;
    let tokenizer = &tokenizer;
    let mut asked =
        Asked { args, document, tokenizer, template, choice, runner, frozen, answers: Vec::new() };
    let outcome = if questions.is_empty() { asked.lines()? } else { asked.all(&questions)? };
    if args.json {
        let (file, tokens) = (args.cache.display().to_string(), document.tokens.len());
        let answers = asked.answers;
        output::put_json(&json!({ "file": file, "document_tokens": tokens, "answers": answers }))?;
    }
    Ok(outcome)
}

/// What follows a document when it is asked something.
fn tokens(
    question: &str,
    template: Option<&ChatTemplate>,
    tokenizer: &Tokenizer,
) -> crate::error::Result<Vec<u32>> {
    let text = format!("\n\n{question}");
    match template {
        Some(template) => tokenizer.continued(&template.rest(&text)?),
        None => tokenizer.continued(&text),
    }
}

impl Asked<'_> {
    fn all(&mut self, questions: &[Vec<u32>]) -> anyhow::Result<Outcome> {
        for (question, tokens) in self.args.questions.iter().zip(questions) {
            if questions.len() > 1 && !self.args.json {
                output::put(&format!("> {question}\n"))?;
            }
            if let Outcome::Interrupted = self.ask(question, tokens)? {
                return Ok(Outcome::Interrupted);
            }
        }
        Ok(Outcome::Done)
    }

    /// Answers each line of stdin when it comes.
    fn lines(&mut self) -> anyhow::Result<Outcome> {
        let stop = open::stop_on_ctrl_c()?;
        let (to, lines) = mpsc::channel();
        // Waits for lines until there are none; it ends with the process when that is stopped before.
        std::thread::spawn(move || io::stdin().lock().lines().try_for_each(|line| to.send(line)));
        loop {
            if io::stdin().is_terminal() {
                output::log("Question:");
            }
            let line = loop {
                match lines.recv_timeout(PAUSE) {
                    Err(RecvTimeoutError::Timeout) if !stop.load(Relaxed) => {}
                    line => break line,
                }
            };
            let question = match line {
                Ok(line) => line?,
                Err(RecvTimeoutError::Timeout) => return Ok(Outcome::Interrupted),
                Err(RecvTimeoutError::Disconnected) => return Ok(Outcome::Done),
            };
            if question.trim().is_empty() {
                continue;
            }
            let tokens = tokens(&question, self.template, self.tokenizer)?;
            if let Outcome::Interrupted = self.ask(&question, &tokens)? {
                return Ok(Outcome::Interrupted);
            }
        }
    }

    /// Answers one question after the document.
    fn ask(&mut self, question: &str, tokens: &[u32]) -> anyhow::Result<Outcome> {
        let (args, AnswerArgs { n_predict, sampling, .. }) = (self.args, &self.args.answer);
        let request = Request {
            prompt: [&self.document.tokens, tokens].concat(),
            row: Some(self.runner.thaw(&self.frozen)?),
            max_tokens: *n_predict,
            context: None,
            choice: self.choice.clone(),
            drafts: usize::from(sampling.draft),
        };
        let spec = *self.runner.spec();
        let (text, stats) =
            generate::answer(&mut self.runner, self.tokenizer, &request, args.json)?;
        if args.json {
            let mut answer = generate::report(&spec, &request, &text, &stats);
            answer["question"] = question.into();
            self.answers.push(answer);
        }
        Ok(if stats.end == End::Interrupted { Outcome::Interrupted } else { Outcome::Done })
    }
}
