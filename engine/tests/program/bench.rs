//! `kvwarp bench`.

use serde_json::Value;

use crate::support::program::{fixture, kvwarp, text};

#[test]
fn it_has_llama_benchs_rows_and_fields() {
    let model = fixture("qwen2");
    let sweep = [
        "-m", &model, "-p", "16", "-n", "4", "-d", "0,100", "-r", "3", "-ctk", "f16,q2", "-t", "1",
    ];
    let json = kvwarp(&[&["bench", "-o", "json"][..], &sweep].concat());
    let rows: Vec<Value> = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(rows.len(), 8);
    for row in &rows {
        assert_eq!(row["samples_ts"].as_array().unwrap().len(), 3);
        assert!(row["avg_ts"].as_f64().unwrap() > 0.0 && row["kv_bytes"].as_u64().unwrap() > 0);
    }
    assert_eq!((&rows[3]["n_gen"], &rows[3]["n_depth"]), (&4.into(), &100.into()));
    let table = text(&kvwarp(&[&["bench"][..], &sweep].concat()).stdout);
    for name in ["pp16", "tg4", "pp16 @ d100", "tg4 @ d100", "q2", "±"] {
        assert!(table.contains(name), "{name} in\n{table}");
    }
    let csv = text(&kvwarp(&[&["bench", "-o", "csv"][..], &sweep].concat()).stdout);
    assert_eq!(csv.lines().count(), 9);
}

/// Lines of a profile by name of the op.
fn lines<'a>(row: &'a Value, op: &str) -> Vec<&'a Value> {
    let lines = row["profile"].as_array().unwrap().iter();
    lines.filter(|line| line["op"] == op).collect()
}

#[test]
fn it_tells_what_a_step_is_made_of() {
    let model = fixture("llama3");
    let sweep =
        ["-m", &model, "-p", "200", "-n", "20", "-r", "1", "--profile", "--cache", "q4,window=0"];
    let json = kvwarp(&[&["bench", "-o", "json"][..], &sweep].concat());
    let rows: Vec<Value> = serde_json::from_slice(&json.stdout).unwrap();
    // A prompt's last token is a step.
    for (row, attention, products) in [
        (&rows[0], &["prefill_attn", "paged_attn"][..], [199, 1]),
        (&rows[1], &["paged_attn"], [1, 0]),
    ] {
        let plain = ["embed", "rms_norm", "rope_select", "hadamard", "kv_pack", "swiglu", "sample"];
        for op in plain.iter().chain(attention) {
            let lines = lines(row, op);
            assert!(!lines.is_empty() && lines[0]["us"].as_f64().unwrap() > 0.0, "{op} in {row}");
        }
        // Queries, keys and values, then gate and up, of both layers: 320 rows of 96 in bf16; rows and sums are f32.
        let linear = lines(row, "linear");
        let wide = linear.iter().find(|line| line["rows"] == 320).unwrap();
        let counted = products.iter().filter(|rows| **rows > 0);
        let bytes: u32 = counted.map(|rows| 4 * (2 * 320 * 96 + 4 * rows * (96 + 320))).sum();
        assert_eq!((&wide["cols"], wide["bytes"].as_f64()), (&96.into(), Some(bytes.into())));
        assert!(wide["gb_s"].as_f64().unwrap() > 0.0);
        let all = row["profile"].as_array().unwrap().iter();
        let percent: f64 = all.map(|line| line["percent"].as_f64().unwrap()).sum();
        assert!((percent - 100.0).abs() < 1e-6, "{percent}");
    }
    let table = text(&kvwarp(&[&["bench"][..], &sweep].concat()).stdout);
    for name in [
        "\npp200, q4,window=0: ",
        "a step of tg20, q4",
        " launches, ",
        "by the clock",
        "linear 320 x 96",
        "GB/s",
    ] {
        assert!(table.contains(name), "{name} in\n{table}");
    }
    let plain = kvwarp(&["bench", "-o", "json", "-m", &model, "-p", "8", "-n", "0", "-r", "1"]);
    assert!(!text(&plain.stdout).contains("profile"));
}

/// Answers of `kvwarp bench --memory`.
fn fits(arguments: &[&str]) -> Vec<Value> {
    let output = kvwarp(&[&["bench", "-o", "json"][..], arguments].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn it_tells_how_many_sequences_fit_in_a_card_that_is_not_there() {
    let devices: &[&str] = if kvwarp::device::HAS_KERNELS { &["cpu", "cuda"] } else { &["cpu"] };
    for device in devices {
        let card = ["--synthetic", "llama-3-8b", "--device", device, "--memory", "80GB"];
        let of = |more: &[&str]| fits(&[&card[..], more].concat());
        let rows = of(&["-d", "32k", "--cache", "f16", "--cache", "q4", "--cache", "q2"]);
        let [f16, q4, q2] = &rows[..] else { panic!("{rows:?}") };
        let number = |row: &Value, field: &str| row[field].as_u64().unwrap();
        let sequences = |row| number(row, "sequences");
        assert!(sequences(q4) >= 3 * sequences(f16) && sequences(q2) >= 4 * sequences(f16));
        // By hand: 32 layers of 8 heads of 128 channels, K and V of 2 bytes, at least; 16 GB of weights.
        let exact = 32_768 * 32 * 8 * 128 * 2 * 2;
        assert!((exact..exact + exact / 100).contains(&number(f16, "sequence_bytes")), "{f16}");
        assert!(number(f16, "shared_bytes") > 2 * 8_030_261_248);
        assert_eq!(number(f16, "memory_bytes"), 80_000_000_000);
        let left = 80_000_000_000 - number(f16, "shared_bytes");
        let most = left / number(f16, "sequence_bytes");
        assert!((most - 1..=most).contains(&sequences(f16)), "{f16}: {most}");
        // A prompt of 128k tokens, and one of 64k after as many.
        let rows = of(&["-p", "128k", "--cache", "q2"]);
        assert!(sequences(&rows[0]) >= 1 && rows[0]["n_tokens"] == 131_072, "{rows:?}");
        let rows = of(&["-d", "64k", "-p", "64k,1", "-n", "2,3", "--cache", "q2"]);
        let tokens: Vec<_> = rows.iter().map(|row| number(row, "n_tokens") - 65_536).collect();
        assert_eq!(tokens, [65_536, 1, 2, 3]);
        let none = fits(&[
            "--synthetic",
            "llama-3-8b",
            "--device",
            device,
            "--memory",
            "16G",
            "-d",
            "32k",
        ]);
        assert_eq!(none[0]["sequences"], 0);
    }
    let model = fixture("llama3");
    let table = text(&kvwarp(&["bench", "-m", &model, "--memory", "1MiB", "-d", "64"]).stdout);
    assert!(
        table.starts_with("llama 0M BF16 in 1.00 MiB (CPU)") && table.contains("f16"),
        "{table}"
    );
    let csv = text(
        &kvwarp(&["bench", "-m", &model, "--memory", "1M", "-d", "64,128", "-o", "csv"]).stdout,
    );
    assert_eq!(csv.lines().count(), 3, "{csv}");
}

#[test]
fn it_tells_the_memory_that_was_taken() {
    let model = fixture("qwen2");
    let sweep = ["-m", &model, "-p", "256", "-n", "4", "-r", "1", "--parallel", "2"];
    let rows = fits(&sweep);
    for row in &rows {
        let number = |field: &str| row[field].as_u64().unwrap_or_else(|| panic!("{field}: {row}"));
        // A prompt's layer is exact; two sequences have rings; the process has more than the cache.
        let parts = ["memory_pools", "memory_rings", "memory_staging"].map(number);
        assert!(parts.iter().all(|bytes| *bytes > 0), "{row}");
        assert!(number("memory_peak") > parts.iter().sum(), "{row}");
        assert!(number("fit_sequences") > 0 && number("fit_memory") > number("fit_shared_bytes"));
    }
}
