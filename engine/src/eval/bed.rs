//! Where samples are measured: a model, its tokenizer and texts.

use std::time::Instant;

use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use sha2::{Digest, Sha256};

use super::hidden::{Answer, Secret, WARNING, WARNINGS, digits};
use super::{Context, Document, EvalError, Found, Held, Measured, Sample, Texts};
use crate::model::{Model, ModelError};
use crate::perplexity::compare_each;
use crate::spec::CacheSpec;
use crate::tokenizer::Tokenizer;
use crate::watch::Watch;

/// Digits of each of several pass keys.
const KEY_DIGITS: usize = 5;
/// Tokens of an answer beyond those of a right one.
const SLACK: usize = 2;

/// A model with all that samples are made of.
pub struct Bed<'m> {
    /// The model.
    pub model: &'m Model<'m>,
    /// Its vocabulary.
    pub tokenizer: &'m Tokenizer,
    /// Texts that samples name.
    pub texts: Texts,
    /// Fixes every random choice.
    pub seed: u64,
}

/// A document with what is hidden in it.
struct Puzzle {
    head: &'static str,
    /// With the percent of the document before each, ascending.
    secrets: Vec<(usize, Secret)>,
    /// Whether the first question is read with the document.
    aware: bool,
}

/// Takes what a sample gave with a cache.
pub type Take<'a> = dyn FnMut(&CacheSpec, Measured) -> Result<(), EvalError> + 'a;

impl Bed<'_> {
    /// Measures a sample with each of `specs`.
    ///
    /// # Errors
    /// [`EvalError`]; what was measured before it has been given to `take`.
    pub fn measure(
        &self,
        sample: &Sample,
        specs: &[CacheSpec],
        watch: &mut Watch<'_>,
        take: &mut Take<'_>,
    ) -> Result<(), EvalError> {
        let mut rng = self.rng(sample);
        let secret = |depth: u8, secret| vec![(usize::from(depth), secret)];
        let (document, puzzle) = match sample {
            Sample::Text { .. } => return self.likelihood(sample, specs, watch, take),
            Sample::Speed { document, steps } => {
                let tokens = self.document(document, ("", &[]), *steps, &mut rng)?;
                return self.speed((&tokens, *steps), specs, watch, take);
            }
            Sample::Passkey { document, depth, digits: n } => {
                let secrets = secret(*depth, Secret::key(&digits(*n, &mut rng)));
                (document, Puzzle { head: WARNING, secrets, aware: false })
            }
            Sample::Needle { document, depth } => {
                let secrets = secret(*depth, Secret::sentence(&mut rng));
                (document, Puzzle { head: "", secrets, aware: false })
            }
            Sample::MultiQuery { document, facts, aware } => {
                let keys = Secret::keys(*facts, KEY_DIGITS, &mut rng);
                let depths = (0..keys.len()).map(|i| (2 * i + 1) * 50 / facts);
                let secrets = depths.zip(keys).collect();
                (document, Puzzle { head: WARNINGS, secrets, aware: *aware })
            }
        };
        self.ask(document, &puzzle, &mut rng, specs, watch, take)
    }

    /// Depends on the seed and the sample alone; a document is the same whether the first question is read with it.
    fn rng(&self, sample: &Sample) -> ChaCha8Rng {
        let mut sample = sample.clone();
        if let Sample::MultiQuery { aware, .. } = &mut sample {
            *aware = false;
        }
        let text = format!("{} {sample:?}", self.seed);
        ChaCha8Rng::from_seed(Sha256::digest(text).into())
    }

    /// Tokens of `text`, after the one that begins a text where `first` and the model wants one.
    fn encode(&self, text: &str, first: bool) -> Result<Vec<u32>, EvalError> {
        let opening = self.opening().filter(|_| first);
        Ok(opening.into_iter().chain(self.tokenizer.encode(text, false)?).collect())
    }

    fn opening(&self) -> Option<u32> {
        self.tokenizer.bos().filter(|_| self.tokenizer.add_bos())
    }

    fn likelihood(
        &self,
        sample: &Sample,
        specs: &[CacheSpec],
        watch: &mut Watch<'_>,
        take: &mut Take<'_>,
    ) -> Result<(), EvalError> {
        let Sample::Text { text, first, prefix, scored } = sample else { return Ok(()) };
        let tokens = self.texts.tokens(text)?.get(*first..first + prefix + scored);
        let tokens = tokens.ok_or_else(|| EvalError::Unknown(format!("{text} to its end")))?;
        let opening = self.opening();
        let prefix = prefix + opening.iter().len();
        let tokens: Vec<u32> = opening.into_iter().chain(tokens.iter().copied()).collect();
        let shape = self.model.shape(prefix);
        let all = compare_each(self.model, &tokens, specs, (prefix, *scored), watch)?;
        for (spec, (scores, far)) in specs.iter().zip(all) {
            let (n, held) = (scores.nll.len(), Held::new(&scores.prefix, prefix, shape));
            // The share is of whole tokens.
            let same_top = (far.agreement * n as f64).round() as usize;
            let (nll, f16, kl) = (scores.mean(), far.f16, far.kl);
            take(
                spec,
                Measured { held, found: Found::Likelihood { nll, f16, kl, tokens: n, same_top } },
            )?;
        }
        Ok(())
    }

    /// Reads and compresses a document, and asks each question of a copy.
    fn ask(
        &self,
        document: &Document,
        puzzle: &Puzzle,
        rng: &mut ChaCha8Rng,
        specs: &[CacheSpec],
        watch: &mut Watch<'_>,
        take: &mut Take<'_>,
    ) -> Result<(), EvalError> {
        let Puzzle { head, secrets, aware } = puzzle;
        let between = if *aware { "\n" } else { "" };
        let (mut questions, mut longest, mut context) = (Vec::new(), 0, Vec::new());
        for (_, secret) in secrets {
            let question = self.encode(&format!("{between}{}", secret.question), false)?;
            let steps = self.encode(&secret.answer, false)?.len() + SLACK;
            longest = longest.max(question.len() + steps);
            questions.push((secret, question, steps));
        }
        let asked = match questions.first() {
            Some((secret, ..)) if *aware => self.encode(&secret.question, false)?,
            _ => Vec::new(),
        };
        let facts: Vec<_> = secrets.iter().map(|(at, secret)| (*at, &secret.fact[..])).collect();
        context.extend(self.document(document, (head, &facts), longest + asked.len(), rng)?);
        context.extend(asked);
        for spec in specs {
            let mut read = Context::new(self.model, spec, context.len() + longest)?;
            read.read(&context, watch)?;
            let answer = |(secret, question, steps): &(&Secret, Vec<u32>, usize)| {
                self.answer(read.copy(), secret, (question, *steps), watch)
            };
            let answers = questions.iter().map(answer).collect::<Result<_, _>>()?;
            take(spec, Measured { held: read.held(), found: Found::Answers(answers) })?;
        }
        Ok(())
    }

    fn answer(
        &self,
        mut context: Context<'_>,
        secret: &Secret,
        (question, steps): (&[u32], usize),
        watch: &mut Watch<'_>,
    ) -> Result<Answer, ModelError> {
        context.append(question, watch)?;
        let said = context.say(steps, &|token| self.tokenizer.is_end(token), watch)?;
        Ok(secret.judge(&self.tokenizer.decode(&said, false)))
    }

    fn speed(
        &self,
        (tokens, steps): (&[u32], usize),
        specs: &[CacheSpec],
        watch: &mut Watch<'_>,
        take: &mut Take<'_>,
    ) -> Result<(), EvalError> {
        for spec in specs {
            let mut context = Context::new(self.model, spec, tokens.len() + steps)?;
            let start = Instant::now();
            context.read(tokens, watch)?;
            let (first_token, held) = (start.elapsed().as_secs_f64(), context.held());
            let start = Instant::now();
            let said = context.say(steps, &|_| false, watch)?;
            let tokens_a_second = said.len() as f64 / start.elapsed().as_secs_f64().max(1e-9);
            take(spec, Measured { held, found: Found::Times { first_token, tokens_a_second } })?;
        }
        Ok(())
    }

    /// Tokens of a document: a head, then filler with `facts`, each after its percent of it. `reserve` tokens of those
    /// that it may have are left for what follows.
    fn document(
        &self,
        document: &Document,
        (head, facts): (&str, &[(usize, &str)]),
        reserve: usize,
        rng: &mut ChaCha8Rng,
    ) -> Result<Vec<u32>, EvalError> {
        let Document { filler, tokens, .. } = document;
        let first = rng.random_range(0..1 << 20);
        let bare = assemble(head, facts, &[]);
        let least = self.encode(&bare, true)?.len() + reserve;
        let short =
            || EvalError::Short { what: "a document and its answer", tokens: *tokens, least };
        let mut room = tokens.checked_sub(least).ok_or_else(short)?;
        loop {
            let text = assemble(head, facts, &self.texts.filler(filler, first, room)?);
            let read = self.encode(&text, true)?;
            // Sentences can have more tokens together than one by one.
            let excess = (read.len() + reserve).saturating_sub(*tokens);
            if excess == 0 {
                return Ok(read);
            }
            room = room.checked_sub(excess).ok_or_else(short)?;
        }
    }
}

/// A document that ends a line.
fn assemble(head: &str, facts: &[(usize, &str)], filler: &[(&str, usize)]) -> String {
    let all: usize = filler.iter().map(|(_, n)| n).sum();
    let (mut text, mut before, mut facts) = (head.to_owned(), 0, facts.iter().peekable());
    for (sentence, n) in filler {
        while let Some((_, fact)) = facts.next_if(|(percent, _)| percent * all <= before * 100) {
            text.push_str(fact);
        }
        text.push_str(sentence);
        before += n;
    }
    facts.for_each(|(_, fact)| text.push_str(fact));
    if !text.ends_with('\n') {
        text.push('\n');
    }
    text
}
