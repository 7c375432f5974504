//! The benches of a GPU: every case in three interleaved rounds, cold L2, times from CUDA events.
//!
//! Criterion samples (`iter_custom` over event times); each single time is kept as well, for the percentiles
//! that a record holds. Names are `gpu/<family>/<format>/<shape>/<context>x<batch>[/<variant>]/<mode>`.

mod attn;
mod cache;
mod card;
mod case;
mod evict;
mod latent;
mod layers;
mod pack;
mod score;

use crate::args::Args;
use crate::record::{Record, Row, line, percentiles};
use anyhow::{Context, Result};
use card::Card;
use case::Case;
use criterion::Criterion;
use indicatif::{ProgressBar, ProgressStyle};
use std::process::Command;
use std::time::{Duration, Instant};

/// Rounds over all cases.
const ROUNDS: usize = 3;
/// Time measured a mode of a case in a round.
const A_SAMPLE_SET: Duration = Duration::from_millis(30);

/// A case in one mode, with every time so far.
struct Tried {
    case: usize,
    mode: &'static str,
    times: Vec<f64>,
    bytes: f64,
    operations: f64,
    failed: Option<String>,
}

/// The cases that a filter names, what the figures need first.
fn cases(args: &Args) -> Vec<Case> {
    let all = [
        attn::cases(),
        latent::cases(),
        pack::cases(),
        evict::cases(),
        score::cases(),
        layers::cases(),
    ];
    let mut wanted: Vec<Case> = all.into_iter().flatten().collect();
    wanted.retain(|c| args.wants(&format!("gpu/{}", c.name())));
    wanted
}

/// Each matching case's kernel twice, the second time for a profiler (`--launch-skip 1`).
pub fn once(args: &Args) -> Result<()> {
    let card = Card::open()?;
    let mark = card.mark();
    let mut ran = 0;
    for case in cases(args) {
        let ready = (case.prepare)(&card).with_context(|| case.name())?;
        ready.warm_up(&card).with_context(|| case.name())?;
        card.launch(&ready.launches[ready.launches.len() - 1])?;
        card.synchronize()?;
        card.release(mark);
        ran += 1;
        println!("once: gpu/{}: {} bytes", case.name(), ready.bytes);
    }
    anyhow::ensure!(ran > 0, "no case matches");
    Ok(())
}

/// Runs every wanted case, prints its line, and writes the record. Fails if a case did.
pub fn run(args: &Args, criterion: &mut Criterion) -> Result<()> {
    let cases = cases(args);
    if cases.is_empty() {
        return Ok(());
    }
    let card = Card::open()?;
    let stop = args.seconds.map(|s| Instant::now() + Duration::from_secs(s));
    let mut tried: Vec<Tried> = Vec::new();
    for (i, case) in cases.iter().enumerate() {
        let new = |&mode| Tried {
            case: i,
            mode,
            times: Vec::new(),
            bytes: 0.0,
            operations: 0.0,
            failed: None,
        };
        tried.extend(case.modes().iter().map(new));
    }
    let bar = ProgressBar::new((tried.len() * ROUNDS) as u64);
    bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed}<{eta} {msg}")?);
    let mut copy = Vec::new();
    'rounds: for round in 0..ROUNDS {
        copy.push(card.copy_bandwidth()?);
        for of_a_case in tried.chunk_by_mut(|a, b| a.case == b.case) {
            if stop.is_some_and(|stop| Instant::now() > stop) {
                eprintln!("out of time in round {}", round + 1);
                break 'rounds;
            }
            let case = &cases[of_a_case[0].case];
            bar.set_message(case.name());
            let done = bar.suspend(|| measure(&card, case, of_a_case, round, criterion));
            if let Err(e) = done {
                of_a_case.iter_mut().for_each(|t| t.failed = Some(format!("{e:#}")));
            }
            bar.inc(of_a_case.len() as u64);
        }
    }
    bar.finish_and_clear();
    finish(args, &card, &cases, &tried, percentiles(&copy)[0])
}

/// One round of one case, in each of its modes.
fn measure(
    card: &Card,
    case: &Case,
    modes: &mut [Tried],
    round: usize,
    criterion: &mut Criterion,
) -> Result<()> {
    if modes.iter().any(|t| t.failed.is_some()) {
        return Ok(());
    }
    let mark = card.mark();
    let ready = (case.prepare)(card).and_then(|ready| ready.warm_up(card).map(|()| ready));
    let measured = ready.and_then(|ready| {
        for t in modes.iter_mut() {
            (t.bytes, t.operations) = (ready.bytes as f64, ready.operations);
            let mut times = ready.measure(card, t.mode)?;
            let mut failed = None;
            // A replay takes as long as its layers, a sample is one of them.
            let layers = if t.mode == "graph" { ready.layers() } else { 1 };
            let mut group = criterion.benchmark_group(format!("gpu/{}", case.name()));
            group.sample_size(10).nresamples(2000).warm_up_time(Duration::from_millis(1));
            group.measurement_time(A_SAMPLE_SET / layers as u32);
            group.bench_function(format!("{}/round{}", t.mode, round + 1), |b| {
                b.iter_custom(|iters| match times(iters as usize) {
                    Ok(us) => {
                        t.times.extend(&us);
                        Duration::from_secs_f64(us.iter().sum::<f64>() * 1e-6)
                    }
                    Err(e) => {
                        failed = Some(e);
                        Duration::from_secs(1)
                    }
                });
            });
            group.finish();
            failed.map_or(Ok(()), Err)?;
        }
        Ok(())
    });
    card.synchronize()?;
    card.release(mark);
    measured
}

fn finish(args: &Args, card: &Card, cases: &[Case], tried: &[Tried], copy: f64) -> Result<()> {
    let rows: Vec<Row> = tried
        .iter()
        .filter(|t| t.failed.is_none() && !t.times.is_empty())
        .map(|t| Row {
            mode: t.mode.into(),
            us: percentiles(&t.times),
            bytes: t.bytes,
            operations: t.operations,
            copy,
            samples: t.times.len(),
            ..cases[t.case].row.clone()
        })
        .collect();
    rows.iter().for_each(|row| println!("{}", line(row, &rows)));
    println!("device-to-device copy: {copy:.0} GB/s");
    let record = Record { facts: facts(&card.name()?), rows };
    let path = args.record(&record);
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    for (extension, text) in [("csv", record.to_csv()), ("json", record.to_json())] {
        let file = path.with_extension(extension);
        std::fs::write(&file, text).with_context(|| file.display().to_string())?;
        println!("wrote {}", file.display());
    }
    let failed: Vec<_> = tried.iter().filter_map(|t| Some((t, t.failed.as_ref()?))).collect();
    let mut broken = 0;
    for (t, why) in failed {
        // A smaller card holds fewer cases; anything else is a fault.
        let room = why.contains("of GPU memory");
        broken += usize::from(!room);
        println!(
            "gpu/{}/{}: {}: {why}",
            cases[t.case].name(),
            t.mode,
            if room { "skipped" } else { "FAILED" }
        );
    }
    anyhow::ensure!(broken == 0, "{broken} cases failed");
    Ok(())
}

/// Card, driver, date and commit. `KVW_COMMIT` and `KVW_DRIVER` stand in where there is no git or nvidia-smi.
fn facts(gpu: &str) -> Vec<(String, String)> {
    let said = |command: &mut Command| -> Option<String> {
        let out = command.output().ok().filter(|o| o.status.success())?;
        Some(String::from_utf8_lossy(&out.stdout).lines().next()?.trim().to_owned())
    };
    let fact = |variable: &str, command: &mut Command| {
        std::env::var(variable).ok().or_else(|| said(command)).unwrap_or("unknown".into())
    };
    let driver = ["--query-gpu=driver_version", "--format=csv,noheader"];
    let facts = [
        ("gpu", gpu.to_owned()),
        ("driver", fact("KVW_DRIVER", Command::new("nvidia-smi").args(driver))),
        ("date", fact("KVW_DATE", Command::new("date").args(["-u", "+%Y-%m-%d"]))),
        (
            "commit",
            fact("KVW_COMMIT", Command::new("git").args(["rev-parse", "--short=12", "HEAD"])),
        ),
        ("kernels", kvwarp::device::BUILT_ARCHS.to_owned()),
    ];
    facts.map(|(k, v)| (k.to_owned(), v)).into()
}
