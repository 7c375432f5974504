//! Records of the benches: kept without loss, compared with peers, drawn. The rows here are made up.

use crate::args::Args;
use crate::record::{Record, Row, line, peer, percentiles};
use crate::{goals, plot};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

/// Decode attention at 1,000 GB/s, half of what a copy reaches.
fn row(format: &str, context: usize, batch: usize, bytes: f64) -> Row {
    Row {
        family: "paged_attn".into(),
        format: format.into(),
        shape: "32x8d128".into(),
        context,
        batch,
        queries: 1,
        variant: String::new(),
        mode: "graph".into(),
        us: [bytes * 1e-6, bytes * 0.9e-6, bytes * 1.1e-6],
        bytes,
        operations: 0.0,
        copy: 2000.0,
        samples: 30,
    }
}

fn made_up() -> Record {
    let bits = [
        ("f16", 16.0),
        ("q2g32", 3.0),
        ("q2g128", 2.25),
        ("sdpa_flash_f16", 32.0),
        ("xqa_fp8", 9.0),
    ];
    let bytes = |bits: f64, n: usize, b: usize| bits / 8.0 * (2 * 8 * 128 * n * b) as f64;
    let of = |(n, b)| bits.map(|(format, bits)| row(format, n, b, bytes(bits, n, b)));
    let sizes = [(4096, 1), (4096, 16), (32768, 16), (131072, 16)];
    let facts = [("gpu", "A card"), ("date", "2000-01-01")].map(|(k, v)| (k.into(), v.into()));
    Record { facts: facts.into(), rows: sizes.into_iter().flat_map(of).collect() }
}

#[test]
fn percentiles_are_hand_worked() {
    let times: Vec<f64> = (0..=10).rev().map(f64::from).collect();
    assert_eq!(percentiles(&times), [5.0, 1.0, 9.0]);
    assert_eq!(percentiles(&[7.0]), [7.0; 3]);
    assert!(percentiles(&[])[0].is_nan());
}

#[test]
fn a_row_knows_its_rates() {
    // 32 Ki tokens x 16 x 8 heads x 128 channels x K and V at 3 bits: 402,653,184 bytes.
    let row = row("q2g32", 32768, 16, 402_653_184.0);
    assert!((row.gbps() - 1000.0).abs() < 1e-9 && (row.copy_percent() - 50.0).abs() < 1e-9);
    assert!((row.bits() - 3.0).abs() < 1e-12, "{}", row.bits());
    assert_eq!(row.name(), "paged_attn/q2g32/32x8d128/32768x16/graph");
    let other = Row { family: "rms_norm".into(), ..row.clone() };
    assert!(other.bits().is_nan());
    let of_flops = Row { operations: 402_653_184e3, ..row };
    assert!((of_flops.tflops() - 1000.0).abs() < 1e-9, "{}", of_flops.tflops());
}

#[test]
fn a_record_survives_its_csv() {
    let record = made_up();
    let back = Record::from_csv(&record.to_csv()).unwrap();
    assert_eq!(back.facts, record.facts);
    assert_eq!(back.rows.len(), record.rows.len());
    for (a, b) in back.rows.iter().zip(&record.rows) {
        assert_eq!(a.name(), b.name());
        assert!((a.us[0] / b.us[0] - 1.0).abs() < 1e-3 && (a.bytes - b.bytes).abs() < 1.0);
    }
    let broken = record.to_csv() + "paged_attn,q2g32,oops\n";
    assert!(Record::from_csv(&broken).unwrap_err().starts_with("line 24: not a row"));
    let json = record.to_json();
    assert!(json.starts_with("{\n  \"gpu\": \"A card\",\n"), "{json}");
    assert!(
        json.contains("\"format\": \"q2g128\", \"shape\": \"32x8d128\", \"context\": 4096"),
        "{json}"
    );
    assert_eq!(json.matches('{').count(), record.rows.len() + 1);
}

#[test]
fn peers_are_told_apart_and_compared() {
    let rows = made_up().rows;
    assert_eq!(rows.iter().filter(|r| peer(r, 16)).count(), 4);
    assert_eq!(rows.iter().filter(|r| peer(r, 8)).count(), 4);
    let q2 = rows.iter().find(|r| r.format == "q2g32" && r.context == 32768).unwrap();
    let text = line(q2, &rows);
    for part in
        ["5.33x own f16", "10.67x 16-bit peer", "3.00x fp8 peer", "50.0 % of copy", "3.000 bits"]
    {
        assert!(text.contains(part), "{text}");
    }
    // Another mode is other work.
    let alone = Row { mode: "alone".into(), ..q2.clone() };
    assert!(!line(&alone, &rows).contains("peer"));
}

#[test]
fn figures_say_what_is_reached_missed_and_unmeasured() {
    let rows = made_up().rows;
    let report = goals::report(&rows);
    let verdict = |what: &str| {
        let line =
            report.lines().find(|l| l.starts_with(what)).unwrap_or_else(|| panic!("{report}"));
        line.split_whitespace().last().unwrap().to_owned()
    };
    assert_eq!(verdict("q2 group 32, payload of 200 MB"), "MISSED"); // 50 % of copy
    assert_eq!(verdict("q2 group 32 over the best 16-bit peer"), "reached");
    assert_eq!(verdict("q2 group 128 over the best 16-bit peer"), "reached");
    assert_eq!(verdict("q2 group 32 over the best fp8 peer"), "reached");
    assert_eq!(verdict("append of one token"), "measured");
    assert_eq!(goals::figures(&[]).iter().filter(|f| f.measured.is_some()).count(), 0);
}

#[test]
fn a_record_is_drawn() {
    let folder = std::env::temp_dir().join(format!("kvwarp-plot-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let file = folder.join("card.csv");
    plot::draw(&made_up(), &file).unwrap();
    for (name, axis, points) in [
        ("card-context.svg", "tokens of context", 5 * 3),
        ("card-bandwidth.svg", "megabytes read", 5 * 4),
    ] {
        let svg = std::fs::read_to_string(folder.join(name)).unwrap();
        for part in ["A card", axis, "q2g128", "sdpa_flash_f16", "</svg>"] {
            assert!(svg.contains(part), "{name} lacks {part}");
        }
        assert_eq!(svg.matches("<circle").count(), points, "{name}: a dot for each case");
    }
    std::fs::remove_dir_all(&folder).unwrap();
    let none = plot::draw(&Record::default(), &file).unwrap_err();
    assert!(none.contains("no decode attention"), "{none}");
}

#[test]
fn arguments_are_told_from_criterions() {
    let parse = |line: &str| Args::parse(line.split_whitespace().map(str::to_owned));
    let args =
        parse("--bench gpu/paged_attn --sample-size 20 --seconds 90 --record out/bench").unwrap();
    assert!(!args.test && args.ours && args.seconds == Some(90), "{args:?}");
    assert_eq!(args.filters, ["gpu/paged_attn"]);
    assert!(args.wants("gpu/paged_attn/q2g32") && !args.wants("gpu/kv_pack/append"));
    assert_eq!(args.record(&made_up()).to_str(), Some("out/bench"));
    let args = parse("--save-baseline old cpu").unwrap();
    assert!(args.test && !args.ours && args.filters == ["cpu"], "{args:?}");
    assert!(args.record(&made_up()).ends_with("benches/record/a-card-2000-01-01"));
    let args = parse("--bench --report a.csv b.csv").unwrap();
    assert_eq!(args.report.unwrap().len(), 2);
    assert!(parse("--bench --once q2g32").unwrap().once);
    assert_eq!(parse("--bench --plot a.csv").unwrap().plot.unwrap().to_str(), Some("a.csv"));
    assert!(parse("--seconds soon").unwrap_err().contains("soon"));
    assert!(parse("--plot").unwrap_err().contains("needs a value"));
}

fn said(command: &mut Command) -> (Option<i32>, String) {
    let out = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    (out.status.code(), String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned())
}

#[test]
fn drivers_of_peers_pass_their_own_tests() {
    let mut python = Command::new("python3");
    python.args(["-B", "-m", "unittest", "test_peers"]).current_dir("benches/peers");
    let (status, text) = said(&mut python);
    assert!(status == Some(0) && text.contains("\nOK"), "{text}");
}

/// A bundle of programs that say what they were asked.
fn bundle(name: &str, probe: &str) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("kvwarp-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::copy("benches/run", folder.join("run")).unwrap();
    let tests = "[ \"$1\" = --list ] && echo x::executors_match_oracle: test && exit
        echo 'on the GPU: x::executors_match_oracle'; echo 'test result: ok. 3 passed'";
    let bench =
        "[ \"$1\" = --report ] && echo the table && exit; echo asked: $*; touch \"$4.csv\"; exit 3";
    for (file, body) in [("probe", probe), ("tests", tests), ("benches", bench)] {
        let path = folder.join(file);
        std::fs::write(&path, format!("#!/bin/bash\n{body}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    std::fs::write(folder.join("build.txt"), "commit=0123abc\n").unwrap();
    folder
}

#[test]
fn a_bundle_tells_what_passed_failed_and_was_missing() {
    let folder = bundle("node", "[ $1 = --device ] && echo gpu=A card || sleep 60");
    let mut run = Command::new(folder.join("run"));
    run.arg(folder.join("out"))
        .args(["tests", "probe", "bench", "paged_attn"])
        .env("KVW_SECONDS", "12");
    let (status, text) = said(&mut run);
    let log = std::fs::read_to_string(folder.join("out/log.txt")).unwrap();
    assert_eq!(status, Some(1), "{text}");
    let has = |parts: &[&str]| text.lines().any(|l| parts.iter().all(|p| l.contains(p)));
    assert!(has(&["A card", "build 0123abc"]), "{text}");
    assert!(has(&["probe", "TIME OUT"]), "{text}");
    assert!(has(&["tests", "passed"]) && has(&["1 tests ran kernels on the GPU"]), "{text}");
    assert!(has(&["bench", "FAILED", "status 3"]), "{text}");
    assert!(text.ends_with("run: FAILED\n") && !text.contains("sanitizer"), "{text}");
    assert!(log.contains("asked: --bench gpu/paged_attn --record "), "{log}");
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn a_bundle_without_a_gpu_says_so_and_fails() {
    let folder = bundle("bare", "echo 'probe: no usable GPU: no driver' >&2; exit 3");
    let (status, text) = said(Command::new(folder.join("run")).arg(folder.join("out")));
    assert_eq!(status, Some(1));
    assert!(
        text.contains("no usable GPU: no driver") && text.contains("nothing was checked"),
        "{text}"
    );
    let (status, text) = said(Command::new(folder.join("run")).arg(folder.join("out")).arg("prob"));
    assert!(status == Some(2) && text.contains("no part is called prob"), "{text}");
    std::fs::remove_dir_all(&folder).unwrap();
}
