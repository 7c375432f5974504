//! The selftest kernels are device code too: nvcc takes them, without spills, where there is an nvcc.
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

fn nvcc() -> Option<PathBuf> {
    let wheels = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("cuda/lib");
    let installed = fs::read_dir(wheels).into_iter().flatten().flatten();
    let installed = installed.map(|p| p.path().join("site-packages/nvidia/cu13/bin/nvcc"));
    let named = env::var_os("KVW_NVCC").map(PathBuf::from);
    named.into_iter().chain(installed).find(|p| p.is_file())
}

#[test]
fn nvcc_compiles_every_primitive() {
    let Some(nvcc) = nvcc() else {
        return eprintln!("skipped: no nvcc (KVW_NVCC, target/cuda)");
    };
    let csrc = Path::new(env!("CARGO_MANIFEST_DIR")).join("csrc");
    // The oldest architecture that knows the instructions; build.rs compiles users for all.
    for (name, arch) in [
        ("selftest", "80"),
        ("selftest_bugs", "80"),
        ("selftest_async", "90a"),
        ("selftest_wgmma", "90a"),
    ] {
        let mut c = Command::new(&nvcc);
        c.args([
            "-c",
            "-std=c++17",
            "-O3",
            "-Werror=all-warnings",
            "-Xptxas=-v,-warn-spills",
            "-I",
        ]);
        c.arg(&csrc).arg(format!("-gencode=arch=compute_{arch},code=sm_{arch}"));
        c.arg("-o")
            .arg(Path::new(env!("CARGO_TARGET_TMPDIR")).join(name).with_extension("device.o"));
        let out = c.arg(csrc.join("simt").join(name).with_extension("cu")).output().unwrap();
        let log = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "{log}");
        let reports = log.lines().filter(|l| l.contains("bytes spill stores"));
        assert!(reports.clone().count() > 0, "no ptxas report: {log}");
        reports.for_each(|l| assert!(l.contains(" 0 bytes spill stores"), "{l}"));
    }
}
