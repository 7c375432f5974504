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
