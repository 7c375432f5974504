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
