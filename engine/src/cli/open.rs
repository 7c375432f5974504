//! Opening a model for a command, and stopping one.

use std::path::PathBuf;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;

use super::args::{Device, ModelArgs};
use super::{Usage, output};
use crate::calibration::{Calibration, beside};
use crate::fetch;
use crate::model::Model;
use crate::source::Source;
use crate::spec::CacheSpec;

/// Set by Ctrl-C.
static STOP: AtomicBool = AtomicBool::new(false);

/// From the first call on, Ctrl-C sets the flag returned instead of ending the process.
pub fn stop_on_ctrl_c() -> anyhow::Result<&'static AtomicBool> {
    static ONCE: Once = Once::new();
    let mut done = Ok(());
    ONCE.call_once(|| done = ctrlc::set_handler(|| STOP.store(true, Ordering::Relaxed)));
    done.context("cannot handle Ctrl-C")?;
    Ok(&STOP)
}

/// The model that the arguments name, or the default one, which is obtained first when need be.
pub fn source(args: &ModelArgs) -> anyhow::Result<Source> {
    check_device(args.device)?;
    Ok(Source::open(&path(args)?)?)
}

/// Says what stands in the way of a GPU that is asked for, before anything takes its time.
pub fn check_device(device: Device) -> anyhow::Result<()> {
    if device == Device::Cuda {
        kvwarp::device::device_count().context("--device cuda")?;
    }
    Ok(())
}

/// The model of `source` on the processor, calibrated where it can be.
pub fn model<'a>(args: &ModelArgs, source: &'a Source) -> anyhow::Result<Model<'a>> {
    if args.device == Device::Cuda {
        let what = "this command runs on the processor; generate, batch and bench run on a GPU";
        return Err(Usage(format!("--device cuda: {what}")).into());
    }
    let model = Model::new(source, args.threads(), args.activations())?;
    Ok(match read_calibration(args, source)? {
        Some(calibration) => model.with_calibration(&calibration),
        None => model,
    })
}

/// What [`calibration`] names.
pub fn read_calibration(args: &ModelArgs, source: &Source) -> anyhow::Result<Option<Calibration>> {
    let path = calibration(args, source);
    Ok(path.map(|path| Calibration::open(&path, source)).transpose()?)
}

/// The calibration that the arguments name, or the one beside the model where there is one.
pub fn calibration(args: &ModelArgs, source: &Source) -> Option<PathBuf> {
    let beside = beside(source.path());
    args.calibration.clone().or_else(|| beside.exists().then_some(beside))
}

/// Says what would make a cache better, where something would.
pub fn note_uncalibrated(calibrated: bool, spec: &CacheSpec) {
    if spec.hadamard && !calibrated {
        let name = spec.preset;
        output::log(&format!(
            "note: {name} loses less with a calibration, see `kvwarp calibrate kv`"
        ));
    }
}

fn path(args: &ModelArgs) -> anyhow::Result<PathBuf> {
    match &args.model {
        Some(path) => Ok(path.clone()),
        None => Ok(fetch::default_model()?),
    }
}
