//! The C ABI: bindings are current, headers are plain C11, names follow the rule.

use std::process::Command;

#[cfg(feature = "bindgen")]
#[test]
fn bindings_are_current() {
    let generated = include_str!(concat!(env!("OUT_DIR"), "/ffi.rs"));
    let committed = include_str!("../src/ffi.rs");
    assert!(generated == committed, "run: KVW_BLESS=1 cargo build --features bindgen");
}

#[test]
fn headers_are_plain_c11_each_on_its_own() {
    for header in std::fs::read_dir("csrc").unwrap().map(|e| e.unwrap().path()) {
        if header.extension().is_some_and(|x| x == "h") {
            let out = Command::new("cc")
                .args(["-std=c11", "-pedantic", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"])
                .args(["-x", "c", "-include"])
                .arg(&header)
                .arg("/dev/null")
                .output()
                .unwrap();
            assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        }
    }
}

/// The way of every other engine: headers, the static library, the static CUDA runtime.
#[cfg(kvw_cuda)]
#[test]
fn a_c_program_links_and_runs_without_a_driver() {
    let program = std::env::temp_dir().join(format!("kvwarp-link-{}", std::process::id()));
    let built = Command::new("cc")
        .args(["-std=c11", "-pedantic", "-Wall", "-Wextra", "-Werror", "-Icsrc", "tests/link.c"])
        .args([env!("KVW_KERNELS"), concat!("-L", env!("KVW_CUDART")), "-lcudart_static"])
        .args(["-lstdc++", "-ldl", "-lrt", "-lpthread", "-lm", "-o"])
        .arg(&program)
        .output()
        .unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    let ran = Command::new(&program).output().unwrap();
    std::fs::remove_file(&program).unwrap();
    let text = String::from_utf8_lossy(&ran.stdout);
    assert!(ran.status.success(), "{text}");
    assert!(text.starts_with("abi 1\nslab 6144\nrefused -1 struct_size: "), "{text}");
}
