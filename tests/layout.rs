//! The house rules: one family is one name everywhere, headers say what they must, files stay small.

use std::fs;
use std::path::{Path, PathBuf};

fn read(path: impl AsRef<Path>) -> String {
    let path = path.as_ref();
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Every header of csrc/ that is a family's.
fn families() -> Vec<String> {
    let stem = |p: PathBuf| p.file_stem().unwrap().to_str().unwrap().to_owned();
    let headers = fs::read_dir("csrc").unwrap().map(|e| e.unwrap().path());
    let headers = headers.filter(|p| p.extension().is_some_and(|x| x == "h"));
    let other = ["cpu", "kvwarp", "slab", "types"];
    let mut names: Vec<_> = headers.map(stem).filter(|n| !other.contains(&n.as_str())).collect();
    names.sort();
    names
}

#[test]
fn a_family_has_its_files_and_its_line_in_each_index() {
    let families = families();
    assert!(families.len() >= 9, "{families:?}");
    for f in families {
        for (file, line) in [
            ("csrc/kvwarp.h", format!("#include \"{f}.h\"")),
            ("src/lib.rs", format!("pub mod {f};")),
            ("tests/main.rs", format!("mod {f};")),
        ] {
            assert!(read(file).contains(&line), "{file} lacks `{line}`");
        }
        for suffix in ["_check", "_workspace", "_bytes", ""] {
            let function = format!("kvw_{f}{suffix}(");
            assert!(read(format!("csrc/{f}.h")).contains(&function), "{f}.h lacks {function}");
            assert!(read(format!("csrc/{f}.cu")).contains(&function), "{f}.cu lacks {function}");
        }
        for key in ["Math", "Shapes", "Bytes", "Launch", "Workspace", "Order", "Oracle"] {
            let found = read(format!("csrc/{f}.cu")).contains(&format!("\n// {key} "));
            assert!(found, "{f}.cu: header comment lacks `{key}`");
        }
        let tests = read(format!("tests/{f}.rs"));
        for name in ["oracle_hand_worked", "c_checks_need_no_gpu", "executors_match_oracle"] {
            assert!(tests.contains(&format!("fn {name}(")), "tests/{f}.rs lacks {name}");
        }
    }
}

/// What `status.cu` has words for is what the `_check`s refuse.
#[test]
fn every_refused_field_has_its_words() {
    let (mut pending, mut refused) = (vec![PathBuf::from("csrc")], vec!["params", "struct_size"]);
    let mut sources = Vec::new();
    while let Some(dir) = pending.pop() {
        for path in fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()) {
            match path.extension().and_then(|x| x.to_str()) {
                _ if path.is_dir() => pending.push(path),
                Some("cu" | "cuh") if !path.ends_with("fields.cuh") => sources.push(read(path)),
                _ => {}
            }
        }
    }
    for source in &sources {
        for statement in
            source.split(';').filter(|s| s.contains("KVW_REQUIRE") || s.contains("KVW_OPTIONAL("))
        {
            let field = statement.trim_end_matches(')').rsplit(',').next().unwrap().trim_start();
            refused.extend((field.len() < 32).then_some(field));
        }
    }
    let status = sources.iter().find(|s| s.contains("define KVW_FIELDS(X)")).unwrap();
    let list =
        status.split("KVW_FIELDS(X)").nth(1).unwrap().split("// clang-format").next().unwrap();
    let mut known: Vec<_> =
        list.split("X(").skip(1).map(|name| name.split(')').next().unwrap()).collect();
    [&mut known, &mut refused].into_iter().for_each(|names| names.sort_unstable());
    refused.dedup();
    assert_eq!(known, refused);
}

#[test]
fn files_stay_small() {
    let limits = [("csrc", 400), ("src", 300), ("tests", 300), ("benches", 300), ("engine", 300)];
    let mut pending: Vec<(PathBuf, usize)> = limits.map(|(d, n)| (d.into(), n)).to_vec();
    let mut seen = 0;
    while let Some((dir, limit)) = pending.pop() {
        for path in fs::read_dir(&dir).unwrap().map(|e| e.unwrap().path()) {
            let source = path.extension().is_some_and(|x| {
                ["rs", "cu", "cuh", "h", "cpp", "py"].contains(&x.to_str().unwrap())
            });
            if path.is_dir() && !path.ends_with("target") {
                pending.push((path, limit));
            } else if source && !path.ends_with("ffi.rs") {
                let lines = read(&path).lines().count();
                assert!(lines <= limit, "{}: {lines} lines, at most {limit}", path.display());
                seen += 1;
            }
        }
    }
    assert!(seen > 60, "only {seen} sources found");
}
