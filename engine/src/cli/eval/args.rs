//! Arguments of the tasks, and the samples that they amount to.

use std::path::{Path, PathBuf};

use crate::cli::Usage;
use crate::cli::args::{ModelArgs, tokens};
use crate::config::Config;
use crate::eval::report::count;
use crate::eval::{Document, Sample, Texts};
use crate::spec::CacheSpec;
use crate::tokenizer::Tokenizer;

/// Caches that are measured unless others are named.
const CACHES: [&str; 3] = ["f16", "q4", "q2"];

/// Arguments of all tasks.
#[derive(clap::Args)]
pub struct Common {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Cache spec; may be given several times [default: f16, q4 and q2]
    #[arg(long, value_name = "SPEC")]
    cache: Vec<CacheSpec>,
    /// Windows of the text, documents at each length and depth
    #[arg(short = 'n', long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..))]
    samples: u16,
    /// Fixes every random choice
    #[arg(short, long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Windows of a text, spread over it; what is scored in one is scored in no other.
#[derive(clap::Args)]
pub struct Windows {
    /// Text to take windows of, `-` for stdin [default: a text that comes with the program]
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Tokens of a window that are read and compressed
    #[arg(long, value_name = "N", default_value = "2k", value_parser = some)]
    prefix: usize,
    /// Tokens after them that are scored
    #[arg(long, value_name = "N", default_value = "512", value_parser = some)]
    scored: usize,
}

/// Documents.
#[derive(clap::Args)]
pub struct Documents {
    /// Tokens of a document, its question and its answer
    #[arg(long, value_name = "N,..", default_value = "1k", value_delimiter = ',', value_parser = some)]
    lengths: Vec<usize>,
    /// What documents are made of: grass (five sentences over and over), novel, or a file
    #[arg(long, value_name = "TEXT", default_value = "grass")]
    filler: String,
}

/// Depths.
#[derive(clap::Args)]
pub struct Depths {
    /// Percent of a document before what is hidden in it
    #[arg(long, value_name = "P,..", default_value = "10,50,90", value_delimiter = ',', value_parser = clap::value_parser!(u8).range(..=100))]
    depths: Vec<u8>,
}

/// Numbers.
#[derive(clap::Args)]
pub struct Keys {
    /// Digits of a number, such as 5 or 64
    #[arg(long, value_name = "N,..", default_value = "64", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..=1000))]
    digits: Vec<u16>,
}

/// Several numbers in one document.
#[derive(clap::Args)]
pub struct Facts {
    /// Numbers in a document, each asked for
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=12))]
    facts: u8,
    /// Compress the first question with the document: shows what a method that looks at it leaves for the others
    #[arg(long)]
    aware: bool,
}

fn some(text: &str) -> Result<usize, String> {
    tokens(text).and_then(|n| if n == 0 { Err("at least 1 token".into()) } else { Ok(n) })
}

/// What to measure.
pub struct Plan<'a> {
    pub common: &'a Common,
    windows: Option<&'a Windows>,
    filler: Option<&'a str>,
    samples: Vec<Sample>,
    /// Tasks in words.
    pub tasks: Vec<(&'static str, String)>,
    /// Folder where cells are kept.
    pub out: Option<&'a Path>,
}

impl<'a> Plan<'a> {
    pub fn new(common: &'a Common) -> Self {
        let (samples, tasks) = (Vec::new(), Vec::new());
        Self { common, windows: None, filler: None, samples, tasks, out: None }
    }

    /// Caches, each once.
    pub fn specs(&self, config: &Config) -> Vec<CacheSpec> {
        let presets = || CACHES.iter().filter_map(|name| CacheSpec::preset(name));
        let default = || presets().chain([CacheSpec::of(config)]).collect();
        let given =
            if self.common.cache.is_empty() { default() } else { self.common.cache.clone() };
        let mut specs = Vec::new();
        given.into_iter().for_each(|spec| {
            if !specs.contains(&spec) {
                specs.push(spec)
            }
        });
        specs
    }

    pub fn text(mut self, windows: &'a Windows) -> Self {
        let (n, prefix, scored) = (self.common.samples, windows.prefix, windows.scored);
        self.windows = Some(windows);
        self.tasks.push((
            "text",
            format!(
                "{n} windows; {prefix} tokens are read and compressed, the next {scored} scored"
            ),
        ));
        self
    }

    pub fn passkey(mut self, documents: &'a Documents, depths: &Depths, keys: &Keys) -> Self {
        for digits in keys.digits.iter().map(|&digits| usize::from(digits)) {
            self.grid(documents, depths, |document, depth| Sample::Passkey {
                document,
                depth,
                digits,
            });
        }
        let digits: Vec<_> = keys.digits.iter().map(u16::to_string).collect();
        let what = format!("a number of {} digits", digits.join(" or "));
        self.describe("passkey", &what, documents);
        self
    }

    pub fn needle(mut self, documents: &'a Documents, depths: &Depths) -> Self {
        self.grid(documents, depths, |document, depth| Sample::Needle { document, depth });
        self.describe("needle", "a sentence with four words that nothing suggests", documents);
        self
    }

    pub fn queries(mut self, documents: &'a Documents, facts: &Facts) -> Self {
        let (facts, aware) = (usize::from(facts.facts), facts.aware);
        let of = |document| Sample::MultiQuery { document, facts, aware };
        self.samples.extend(self.documents(documents).map(of));
        self.filler = Some(&documents.filler);
        let with = if aware { ", compressed together with the first question" } else { "" };
        self.describe("multi-query", &format!("{facts} numbers of 5 digits{with}"), documents);
        self
    }

    pub fn speed(mut self, documents: &'a Documents, steps: usize) -> Self {
        let of = |document| Sample::Speed { document, steps };
        self.samples.extend(self.documents(documents).map(of));
        self.filler = Some(&documents.filler);
        self.describe("speed", &format!("{steps} tokens generated"), documents);
        self
    }

    fn grid(
        &mut self,
        documents: &'a Documents,
        depths: &Depths,
        of: impl Fn(Document, u8) -> Sample,
    ) {
        let all = self.documents(documents);
        let places = all.flat_map(|document| {
            let of = &of;
            depths.depths.iter().map(move |&depth| of(document.clone(), depth))
        });
        let places: Vec<_> = places.collect();
        self.samples.extend(places);
        self.filler = Some(&documents.filler);
    }

    fn documents(&self, documents: &'a Documents) -> impl Iterator<Item = Document> + use<'a> {
        let n = usize::from(self.common.samples);
        documents.lengths.iter().flat_map(move |&tokens| {
            let filler = documents.filler.clone();
            (0..n).map(move |sample| Document { filler: filler.clone(), tokens, sample })
        })
    }

    fn describe(&mut self, task: &'static str, what: &str, documents: &Documents) {
        let lengths: Vec<_> = documents.lengths.iter().map(|&tokens| count(tokens)).collect();
        let (lengths, filler, n) = (lengths.join(", "), &documents.filler, self.common.samples);
        self.tasks.push((task, format!("{what}; {n} documents of {lengths} tokens of {filler}")));
    }

    /// Samples, with the texts that they name.
    pub fn samples(&self, tokenizer: &Tokenizer) -> anyhow::Result<(Vec<Sample>, Texts)> {
        let (mut samples, mut texts) = (Vec::new(), Texts::new(tokenizer)?);
        if let Some(windows) = self.windows {
            let name = match &windows.file {
                Some(path) => texts.add(&crate::cli::generate::read(path)?, tokenizer)?,
                None => "novel".to_owned(),
            };
            let len = texts.tokens(&name)?.len();
            samples.extend(windows.samples(&name, len, usize::from(self.common.samples))?);
        }
        samples.extend(self.samples.iter().cloned());
        if let Some(filler) = self.filler.filter(|filler| !Texts::NAMES.contains(filler)) {
            let text = crate::cli::generate::read(&PathBuf::from(filler))?;
            let name = texts.add(&text, tokenizer)?;
            let documents = samples.iter_mut().filter_map(Sample::document_mut);
            documents.for_each(|document| document.filler.clone_from(&name));
        }
        Ok((samples, texts))
    }
}

impl Windows {
    fn samples(&self, text: &str, len: usize, n: usize) -> Result<Vec<Sample>, Usage> {
        let Self { prefix, scored, .. } = *self;
        let need = prefix + n * scored;
        if len < need {
            return Err(Usage(format!(
                "the text has {len} tokens; {n} windows of {prefix} + {scored} need {need}: lower -n, --prefix or --scored"
            )));
        }
        let stride = (len - prefix - scored) / (n - 1).max(1);
        let window = |i| Sample::Text { text: text.to_owned(), first: i * stride, prefix, scored };
        Ok((0..n).map(window).collect())
    }
}
