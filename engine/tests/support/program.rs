//! Runs the program.

use std::path::Path;
use std::process::{Command, Output, Stdio};

/// Its output.
pub fn kvwarp(arguments: &[&str]) -> Output {
    command(arguments).output().unwrap()
}

/// The program, kept from obtaining a model.
pub fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(assert_cmd::cargo::cargo_bin!("kvwarp"));
    command.args(arguments).env_remove("KVWARP_MODEL").env("PATH", "/nonexistent");
    command.env("KVWARP_CACHE", "/nonexistent/cache").stdin(Stdio::null());
    command
}

pub fn fixture(name: &str) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
    folder.display().to_string()
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Runs a failing command: its exit code, and its one line on stderr.
pub fn failure(arguments: &[&str]) -> (i32, String) {
    let output = kvwarp(arguments);
    let error = text(&output.stderr);
    assert_eq!(text(&output.stdout), "", "{arguments:?}");
    assert!(!error.contains("panicked") && !error.contains("backtrace"), "{error}");
    assert!(error.starts_with("error: "), "{arguments:?}: {error}");
    (output.status.code().unwrap(), error)
}
