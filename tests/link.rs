//! The plain C tree that `csrc/link/build` writes, and the programs of its documents.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

fn run(command: &mut Command) -> String {
    let out = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success(), "{command:?}\n{text}{}", String::from_utf8_lossy(&out.stderr));
    text
}

/// The tree, built once a process, in a target folder of its own kind so that cargo need not wait for itself.
fn tree() -> &'static Path {
    static TREE: OnceLock<PathBuf> = OnceLock::new();
    TREE.get_or_init(|| {
        let tree = Path::new(env!("CARGO_TARGET_TMPDIR")).join("link");
        run(Command::new("csrc/link/build").arg(&tree));
        tree
    })
}

/// A folder for what a test builds.
fn room(name: &str) -> PathBuf {
    let room = tree().join(name);
    let _ = std::fs::remove_dir_all(&room);
    std::fs::create_dir_all(&room).unwrap();
    room
}

/// Whether there is such a program; a test says that it is skipped without.
fn have(program: &str) -> bool {
    let found = Command::new(program).arg("--version").output().is_ok();
    if !found {
        eprintln!("skipped: no {program} on PATH");
    }
    found
}

/// Fields of the lines that a command prints.
fn words(text: &str, field: usize) -> Vec<&str> {
    let mut words: Vec<_> =
        text.lines().filter_map(|line| line.split_whitespace().nth(field)).collect();
    words.sort_unstable();
    words
}

#[test]
fn the_library_exports_what_the_header_declares_and_nothing_else() {
    let header = std::fs::read_to_string(tree().join("include/kvwarp.h")).unwrap();
    let declared = header.lines().filter(|line| line.starts_with("KVW_API "));
    let names = declared.map(|line| line.split('(').next().unwrap());
    let mut names: Vec<_> = names.map(|line| line.rsplit([' ', '*']).next().unwrap()).collect();
    names.sort_unstable();
    assert!(
        names.contains(&"kvw_paged_attn_cpu") && names.contains(&"kvw_paged_attn"),
        "{names:?}"
    );

    let library = tree().join("lib/libkvwarp.so.1");
    let exported = run(Command::new("nm").args(["-D", "--defined-only"]).arg(&library));
    let exported: Vec<_> =
        words(&exported, 2).into_iter().map(|n| n.split('@').next().unwrap()).collect();
    let (version, exported): (Vec<&str>, Vec<&str>) =
        exported.into_iter().partition(|name| name.starts_with("KVWARP_"));
    assert_eq!((version, exported), (vec!["KVWARP_1"], names.clone()));

    let archive = tree().join("lib/libkvwarp.a");
    let global = run(Command::new("nm").args(["-g", "--defined-only"]).arg(archive));
    let global: Vec<_> = words(&global, 2);
    assert_eq!(global, names, "what else the archive defines is local");

    let needed = run(Command::new("readelf").arg("-d").arg(library));
    let needed = needed.lines().filter(|line| line.contains("NEEDED")).collect::<String>();
    assert!(!needed.contains("cuda") && !needed.contains("nvidia"), "cudart is inside: {needed}");
}

#[test]
fn a_c_program_finds_it_by_pkg_config() {
    if !have("pkg-config") {
        return;
    }
    let (room, tree) = (room("c"), tree());
    let pkg_config = |what: &str| {
        let path = tree.join("lib/pkgconfig");
        let mut command = Command::new("pkg-config");
        run(command.env("PKG_CONFIG_PATH", path).args([what, "kvwarp"]))
    };
    assert_eq!(pkg_config("--modversion").trim(), env!("CARGO_PKG_VERSION"));
    let program = room.join("decode");
    let mut cc = Command::new("cc");
    cc.args(["-std=c11", "-pedantic", "-Wall", "-Wextra", "-Werror", "csrc/link/c/decode.c", "-o"]);
    cc.arg(&program).args(pkg_config("--cflags").split_whitespace());
    cc.args(pkg_config("--libs").split_whitespace()).args(["-ldl", "-lm"]);
    run(&mut cc);
    let text = run(Command::new(program).env("LD_LIBRARY_PATH", tree.join("lib")));
    assert!(text.contains("200 tokens in 2 bits") && text.contains("refused: q_heads"), "{text}");
}

#[test]
fn the_program_of_the_page_runs() {
    let (room, page) = (room("page"), include_str!("../csrc/link/c.md"));
    let source = page.split("```c\n").nth(1).unwrap().split("```").next().unwrap();
    let (file, program) = (room.join("page.c"), room.join("page"));
    std::fs::write(&file, source).unwrap();
    let mut cc = Command::new("cc");
    cc.args(["-std=c11", "-pedantic", "-Wall", "-Wextra", "-Werror"]).arg(&file).arg("-o");
    cc.arg(&program).arg("-I").arg(tree().join("include")).arg(tree().join("lib/libkvwarp.a"));
    run(cc.args(["-lstdc++", "-lgcc_s", "-ldl", "-lrt", "-lpthread", "-lm"]));
    let text = run(&mut Command::new(program));
    assert!(text.contains("0x3C00") && text.contains("width: out of range"), "{text}");
}

#[test]
fn python_needs_its_standard_library_alone() {
    if have("python3") {
        let mut python = Command::new("python3");
        python.env("KVWARP_TREE", tree()).env("PYTHONPATH", "csrc/link/python");
        python.env("PYTHONDONTWRITEBYTECODE", "1");
        run(python.arg("csrc/link/python/tests/test_abi.py"));
        let wheel = room("wheel");
        let mut build = Command::new("csrc/link/python/wheel");
        let name = run(build.env("KVWARP_TREE", tree()).arg(&wheel));
        let size = std::fs::metadata(wheel.join(name.trim())).unwrap().len();
        assert!(size > 100_000, "the library is in the wheel: {size} bytes");
    }
}

/// Against a driver that serves memory from the heap: cust links one, cudarc looks for one.
#[test]
fn cudarc_and_cust_pass_what_they_have() {
    let driver = room("driver");
    run(Command::new("csrc/link/stub").arg(&driver).arg("tests/driver.c"));
    let mut cargo = Command::new("cargo");
    cargo.args(["test", "--release", "-p", "kvwarp", "--test", "view", "--features", "cust"]);
    // Another build of the crate, of which little is run.
    cargo.args(["--config", "profile.release.package.kvwarp.opt-level=0"]);
    cargo.env("KVW_SKIP_NVCC", "1").env("KVW_STAND_IN", "1").env("CUDA_LIBRARY_PATH", &driver);
    let text = run(cargo.env("LD_LIBRARY_PATH", driver.join("lib64/stubs")));
    assert!(text.contains("4 passed; 0 failed; 0 ignored"), "{text}");
}

/// The package from its wheel, the programs of its pages, and two processes of one model.
#[test]
fn python_works_with_torch_and_transformers() {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    if !target.join("python/ready").exists() && std::env::var_os("KVW_REQUIRE_PYTHON").is_none() {
        eprintln!("skipped: `csrc/link/python/test setup` makes the environment, from 600 MB");
        return;
    }
    let mut test = Command::new("csrc/link/python/test");
    let text = run(test.env("CARGO_TARGET_DIR", target).env("KVWARP_TREE", tree()));
    let summary = text.lines().last().unwrap_or_default();
    assert!(summary.contains(" passed"), "{text}");
    assert!(
        !summary.contains("skipped") || std::env::var_os("KVW_REQUIRE_MODEL").is_none(),
        "{text}"
    );
}

#[test]
fn the_header_is_cpp_too() {
    let mut cpp = Command::new("c++");
    cpp.args(["-std=c++11", "-pedantic", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]);
    run(cpp.args(["-x", "c++"]).arg(tree().join("include/kvwarp.h")));
}

#[test]
fn expected_numbers_are_those_of_the_formulas() {
    if have("python3") {
        let printed = run(Command::new("python3").arg("csrc/link/c/expected.py"));
        assert!(printed == include_str!("../csrc/link/c/expected.h"), "run expected.py again");
    }
}

#[test]
fn a_cmake_project_finds_it() {
    if !have("cmake") {
        return;
    }
    let build = room("cmake");
    let prefix = format!("-DCMAKE_PREFIX_PATH={}", tree().display());
    run(Command::new("cmake").args(["-S", "csrc/link/cmake", "-B"]).arg(&build).arg(prefix));
    run(Command::new("cmake").arg("--build").arg(&build));
    let text = run(Command::new("ctest").arg("--output-on-failure").arg("--test-dir").arg(&build));
    assert!(text.contains("100% tests passed"), "{text}");
}
