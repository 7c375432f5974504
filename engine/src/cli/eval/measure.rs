//! Measures what a plan has, each cell once.

use std::collections::BTreeMap;

use anyhow::Context;
use sha2::{Digest, Sha256};

use super::args::Plan;
use crate::calibration::fingerprint;
use crate::cli::args::Form;
use crate::cli::output::{self, Progress};
use crate::cli::{Usage, open};
use crate::eval::report::{About, html};
use crate::eval::summary::Summary;
use crate::eval::{Bed, EvalError, Measured, Origin, Sample, Store};
use crate::source::Source;
use crate::spec::CacheSpec;
use crate::watch::Watch;

/// Name of the report in the folder of a sweep.
const REPORT: &str = "report.html";

/// What was measured.
pub struct Done {
    pub about: About,
    pub specs: Vec<CacheSpec>,
    pub samples: Vec<Sample>,
    /// By cache and sample, in their order.
    pub cells: BTreeMap<(usize, usize), Measured>,
    pub summaries: Vec<Summary>,
    /// Someone asked to stop.
    pub interrupted: bool,
    /// Where the report is.
    pub report: Option<std::path::PathBuf>,
}

pub fn run(plan: &Plan<'_>) -> anyhow::Result<Done> {
    let common = plan.common;
    let source = open::source(&common.model)?;
    let specs = plan.specs(&source.config);
    let tokenizer = source.tokenizer()?;
    let (samples, texts) = plan.samples(&tokenizer)?;
    check_lengths(&samples, &source)?;
    let setup = setup(plan, &source)?;
    let (version, model) = (crate::eval::VERSION, fingerprint(&source));
    let origin = Origin { version, model: model.clone(), setup: setup.clone() };
    let mut store = plan.out.map(|out| Store::open(out, origin)).transpose()?;
    store.iter().for_each(tell_lost);
    let model_of_bed = open::model(&common.model, &source)?;
    let calibrated = model_of_bed.is_calibrated();
    specs.iter().for_each(|spec| open::note_uncalibrated(calibrated, spec));
    let bed = Bed { model: &model_of_bed, tokenizer: &tokenizer, texts, seed: common.seed };
    let mut cells = Cells { specs: &specs, samples: &samples, known: BTreeMap::new() };
    let interrupted = cells.fill(&bed, store.as_mut())?;
    let Cells { known: cells, .. } = cells;
    let about = About {
        model: source.path().file_name().unwrap_or_default().display().to_string(),
        fingerprint: model,
        setup,
        seed: common.seed,
        tasks: plan.tasks.clone(),
        missing: specs.len() * samples.len() - cells.len(),
    };
    let summaries = summaries(&specs, &samples, &cells);
    let mut done = Done { about, specs, samples, cells, summaries, interrupted, report: None };
    if let Some(out) = plan.out {
        let (path, page) = (out.join(REPORT), html(&done.about, &done.summaries)?);
        let partial = path.with_added_extension("partial");
        std::fs::write(&partial, page).with_context(|| partial.display().to_string())?;
        std::fs::rename(&partial, &path).with_context(|| path.display().to_string())?;
        done.report = Some(path);
    }
    Ok(done)
}

/// What besides the model decides what is measured.
fn setup(plan: &Plan<'_>, source: &Source) -> anyhow::Result<String> {
    let args = &plan.common.model;
    let form = if args.activations == Form::Q8 { "q8" } else { "f32" };
    let calibration = match open::calibration(args, source) {
        None => "no calibration".to_owned(),
        Some(path) => {
            let bytes = std::fs::read(&path).with_context(|| path.display().to_string())?;
            format!("calibration {}", &format!("{:x}", Sha256::digest(bytes))[..16])
        }
    };
    Ok(format!("activations {form}, {calibration}"))
}

fn check_lengths(samples: &[Sample], source: &Source) -> Result<(), Usage> {
    let limit = source.config.context;
    // One for the token that begins a text.
    let longest = samples.iter().map(|sample| sample.tokens() + 1).max().unwrap_or(0);
    match longest {
        n if n > limit + 1 => {
            Err(Usage(format!("{} tokens are over this model's limit of {limit}", n - 1)))
        }
        _ => Ok(()),
    }
}

fn tell_lost(store: &Store) {
    for line in store.lost() {
        let path = store.path().display();
        output::log(&format!("{path}: line {line} is cut off; it is measured again"));
    }
}

struct Cells<'a> {
    specs: &'a [CacheSpec],
    samples: &'a [Sample],
    known: BTreeMap<(usize, usize), Measured>,
}

impl Cells<'_> {
    /// Measures what is not known; whether someone asked to stop.
    fn fill(&mut self, bed: &Bed<'_>, mut store: Option<&mut Store>) -> anyhow::Result<bool> {
        if let Some(store) = &store {
            self.recall(bed.seed, store);
        }
        let stop = open::stop_on_ctrl_c()?;
        let layers = bed.model.config().layers;
        let work = |sample: usize| self.samples[sample].rows(self.missing(sample).len()) * layers;
        let steps: Vec<_> = (0..self.samples.len()).map(work).collect();
        let mut progress = Progress::new("evaluating", steps.iter().sum());
        for (i, steps) in steps.into_iter().enumerate() {
            let missing = self.missing(i);
            if missing.is_empty() {
                continue;
            }
            progress.say(self.samples[i].to_string());
            let mut left = steps;
            let mut step = |rows: usize| {
                let rows = rows.min(left);
                left -= rows;
                progress.step(rows);
            };
            let mut watch = Watch::new(stop, &mut step);
            match self.measure(bed, i, &missing, store.as_deref_mut(), &mut watch) {
                Err(error) if error.is_interrupted() => {
                    progress.clear();
                    return Ok(true);
                }
                measured => measured?,
            }
            progress.step(left);
        }
        progress.clear();
        Ok(false)
    }

    fn measure(
        &mut self,
        bed: &Bed<'_>,
        sample: usize,
        missing: &[usize],
        mut store: Option<&mut Store>,
        watch: &mut Watch<'_>,
    ) -> Result<(), EvalError> {
        let specs: Vec<_> = missing.iter().map(|&spec| self.specs[spec]).collect();
        let (mut order, known) = (missing.iter(), &mut self.known);
        bed.measure(&self.samples[sample], &specs, watch, &mut |spec, measured| {
            if let Some(store) = store.as_deref_mut() {
                store.put(bed.seed, spec, &self.samples[sample], measured.clone())?;
            }
            known.extend(order.next().map(|&spec| ((spec, sample), measured)));
            Ok(())
        })
    }

    /// Takes what an earlier run has measured.
    fn recall(&mut self, seed: u64, store: &Store) {
        for (s, spec) in self.specs.iter().enumerate() {
            for (i, sample) in self.samples.iter().enumerate() {
                let measured = store.get(seed, spec, sample).cloned();
                self.known.extend(measured.map(|measured| ((s, i), measured)));
            }
        }
    }

    /// Caches that a sample has not been measured with.
    fn missing(&self, sample: usize) -> Vec<usize> {
        let known = |spec: &usize| self.known.contains_key(&(*spec, sample));
        (0..self.specs.len()).filter(|spec| !known(spec)).collect()
    }
}

fn summaries(
    specs: &[CacheSpec],
    samples: &[Sample],
    cells: &BTreeMap<(usize, usize), Measured>,
) -> Vec<Summary> {
    let of = |(s, spec): (usize, &CacheSpec)| {
        let cells = cells.range((s, 0)..(s + 1, 0));
        let cells: Vec<_> = cells.map(|((_, i), measured)| (&samples[*i], measured)).collect();
        Summary::new(&spec.to_string(), &cells)
    };
    specs.iter().enumerate().map(of).collect()
}
