//! All benchmarks: `cargo bench` runs the GPU's where there is one, then the CPU paths.
//!
//!   cargo bench -- gpu/paged_attn       cases whose name contains this
//!   cargo bench -- --once q2g32         one launch of each after one warm-up, for ncu
//!   cargo bench -- --plot FILE.csv      a record as SVG, beside it
//!   cargo bench -- --report FILE.csv PEERS.csv    records as one table

#[cfg_attr(not(kvw_cuda), allow(dead_code, reason = "only a GPU is filtered and recorded"))]
mod args;
mod goals;
#[cfg(kvw_cuda)]
mod gpu;
mod kv_gather;
mod kv_pack;
mod linear;
mod lowrank_kv;
mod paged_attn;
mod plot;
mod prefill_attn;
mod quality;
#[cfg_attr(not(kvw_cuda), allow(dead_code, reason = "only a GPU is recorded"))]
mod record;
mod sim_evict;
mod token_score;
mod token_select;

use anyhow::{Context, Result, anyhow};
use args::Args;
use criterion::Criterion;
use std::path::Path;

/// Criterion as the command line wants it; of one that holds arguments of ours it is told the filter.
fn criterion(args: &Args) -> Criterion {
    match args.filters.first() {
        _ if !args.ours => Criterion::default().configure_from_args(),
        Some(filter) => Criterion::default().with_filter(filter),
        None => Criterion::default(),
    }
}

/// Whether there is a GPU to run on; the error says why not.
fn usable_gpu() -> kvwarp::Result<()> {
    let none = || kvwarp::Error::Cuda { op: "device", code: 100, what: "no CUDA device".into() };
    if kvwarp::device::device_count()? == 0 { Err(none()) } else { Ok(()) }
}

fn read(path: &Path) -> Result<record::Record> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    record::Record::from_csv(&text).map_err(|e| anyhow!("{}: {e}", path.display()))
}

fn main() -> Result<()> {
    let args = Args::parse(std::env::args().skip(1)).map_err(|e| anyhow!(e))?;
    if let Some(path) = &args.plot {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        return match text.starts_with(quality::FIRST_COLUMNS) {
            true => quality::draw(path).map_err(|e| anyhow!(e)),
            false => plot::draw(&read(path)?, path).map_err(|e| anyhow!(e)),
        };
    }
    if let Some(paths) = &args.report {
        let rows = paths.iter().map(|p| Ok(read(p)?.rows)).collect::<Result<Vec<_>>>()?.concat();
        print!("{}", goals::report(&rows));
        return Ok(());
    }
    match usable_gpu() {
        _ if args.test => {}
        Ok(()) => {
            #[cfg(kvw_cuda)]
            if args.once {
                return gpu::once(&args);
            }
            #[cfg(kvw_cuda)]
            gpu::run(&args, &mut criterion(&args))?;
        }
        Err(why) if args.once || std::env::var_os("KVW_REQUIRE_GPU").is_some() => {
            anyhow::bail!("no GPU to measure: {why}")
        }
        Err(why) => eprintln!("gpu benches skipped: {why}"),
    }
    if args.filters.iter().any(|f| f.starts_with("gpu")) {
        return Ok(());
    }
    let mut cpu = criterion(&args);
    kv_gather::run(&mut cpu);
    kv_pack::run(&mut cpu);
    linear::run(&mut cpu);
    lowrank_kv::run(&mut cpu);
    paged_attn::run(&mut cpu);
    prefill_attn::run(&mut cpu);
    sim_evict::run(&mut cpu);
    token_score::run(&mut cpu);
    token_select::run(&mut cpu);
    cpu.final_summary();
    Ok(())
}
