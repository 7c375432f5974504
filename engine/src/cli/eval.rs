//! `kvwarp eval`.

mod args;
mod measure;
mod print;

use std::path::PathBuf;

use args::{Common, Depths, Documents, Facts, Keys, Plan, Windows};
use clap::Subcommand;

use super::Outcome;
use crate::eval::Task;
use crate::spec::CacheSpec;

/// Arguments of `kvwarp eval`.
///
/// Each task gives every cache the same samples. A text is read and compressed before what follows is known; shares come
/// with Wilson's interval and means with Student's, both of 95 %.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Log-perplexity over that of an f16 cache, on windows of a text
    Perplexity(WindowsArgs),
    /// Divergence from the predictions of an f16 cache, and share of equal top tokens, on windows of a text
    Agreement(WindowsArgs),
    /// A number hidden in a document, by length and depth
    Passkey(PasskeyArgs),
    /// A sentence hidden in a document, by length and depth
    Needle(NeedleArgs),
    /// Several numbers in a document that is compressed once
    MultiQuery(MultiQueryArgs),
    /// Tasks by caches, kept in a folder, and a report
    Sweep(SweepArgs),
}

#[derive(clap::Args)]
#[command(after_help = CacheSpec::help())]
struct WindowsArgs {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    windows: Windows,
}

#[derive(clap::Args)]
#[command(after_help = CacheSpec::help())]
struct PasskeyArgs {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    documents: Documents,
    #[command(flatten)]
    depths: Depths,
    #[command(flatten)]
    keys: Keys,
}

#[derive(clap::Args)]
#[command(after_help = CacheSpec::help())]
struct NeedleArgs {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    documents: Documents,
    #[command(flatten)]
    depths: Depths,
}

#[derive(clap::Args)]
#[command(after_help = CacheSpec::help())]
struct MultiQueryArgs {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    documents: Documents,
    #[command(flatten)]
    facts: Facts,
}

/// Interrupted, or killed, it goes on where it stopped.
#[derive(clap::Args)]
#[command(after_help = CacheSpec::help())]
struct SweepArgs {
    #[command(flatten)]
    common: Common,
    /// What to measure
    #[arg(
        long,
        value_enum,
        value_name = "TASK,..",
        value_delimiter = ',',
        default_value = "text,speed,passkey,needle,multi-query"
    )]
    tasks: Vec<Task>,
    #[command(flatten)]
    windows: Windows,
    #[command(flatten)]
    documents: Documents,
    #[command(flatten)]
    depths: Depths,
    #[command(flatten)]
    keys: Keys,
    #[command(flatten)]
    facts: Facts,
    /// Tokens generated to measure speed
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..))]
    steps: u16,
    /// Folder for what is measured, and report.html
    #[arg(short, long, value_name = "DIR")]
    out: PathBuf,
}

pub fn run(args: &Args) -> anyhow::Result<Outcome> {
    let plan = match &args.what {
        What::Perplexity(args) | What::Agreement(args) => {
            Plan::new(&args.common).text(&args.windows)
        }
        What::Passkey(args) => {
            Plan::new(&args.common).passkey(&args.documents, &args.depths, &args.keys)
        }
        What::Needle(args) => Plan::new(&args.common).needle(&args.documents, &args.depths),
        What::MultiQuery(args) => Plan::new(&args.common).queries(&args.documents, &args.facts),
        What::Sweep(args) => args.plan(),
    };
    let done = measure::run(&plan)?;
    match &args.what {
        _ if plan.common.json => print::json(&done)?,
        What::Perplexity(_) => print::perplexity(&done)?,
        What::Agreement(_) => print::agreement(&done)?,
        What::Passkey(_) | What::Needle(_) | What::MultiQuery(_) => print::recall(&done)?,
        What::Sweep(_) => print::sweep(&done)?,
    }
    Ok(if done.interrupted { Outcome::Interrupted } else { Outcome::Done })
}

impl SweepArgs {
    fn plan(&self) -> Plan<'_> {
        let mut plan = Plan::new(&self.common);
        plan.out = Some(&self.out);
        for task in &self.tasks {
            plan = match task {
                Task::Text => plan.text(&self.windows),
                Task::Passkey => plan.passkey(&self.documents, &self.depths, &self.keys),
                Task::Needle => plan.needle(&self.documents, &self.depths),
                Task::MultiQuery => plan.queries(&self.documents, &self.facts),
                Task::Speed => plan.speed(&self.documents, usize::from(self.steps)),
            };
        }
        plan
    }
}
