//! `kvwarp calibrate` as a user runs it.

mod support;

use support::program::{failure, kvwarp, text};

/// What follows the header of a safetensors file.
fn tensors(file: &[u8]) -> &[u8] {
    let header = u64::from_le_bytes(*file.first_chunk().unwrap()) as usize;
    &file[8 + header..]
}

/// `file` with the first `from` as `to`, of the same length.
fn edited(file: &[u8], from: &str, to: &str) -> Vec<u8> {
    let at = file.windows(from.len()).position(|bytes| bytes == from.as_bytes()).expect(from);
    let mut bytes = file.to_vec();
    bytes[at..at + from.len()].copy_from_slice(to.as_bytes());
    bytes
}

#[test]
fn calibrations_go_on_and_are_of_one_model_and_text() {
    let Some(model) = support::real_model() else { return };
    let (model, folder) = (model.display().to_string(), tempfile::tempdir().unwrap());
    let file = |name: &str| folder.path().join(name).display().to_string();
    let (one, other, to) = (file("one.txt"), file("other.txt"), file("kv"));
    std::fs::write(&one, "one two three ".repeat(40)).unwrap();
    std::fs::write(&other, "something else").unwrap();
    let calibrate = |tokens: &str| {
        let output = kvwarp(&[
            "calibrate",
            "kv",
            "-m",
            &model,
            "--text",
            &one,
            "-o",
            &to,
            "-c",
            "16",
            "-n",
            tokens,
        ]);
        assert!(output.status.success(), "{}", text(&output.stderr));
        (text(&output.stderr), std::fs::read(&to).unwrap())
    };
    let (_, whole) = calibrate("48");
    std::fs::remove_file(&to).unwrap();
    assert!(calibrate("16").0.contains(": 16 tokens, 90 heads"));
    let (log, again) = calibrate("48");
    let (_, seconds) = log.rsplit_once(": 48 tokens, 90 heads, ").expect(&log);
    assert!(seconds.trim_end().strip_suffix(" s").unwrap().parse::<f64>().unwrap() > 0.0, "{log}");
    assert!(
        tensors(&whole) == tensors(&again),
        "an interrupted calibration is not what a whole one is"
    );
    let generate = ["generate", "-m", &model, "-p", "one two", "-n", "4", "--cache", "q2"];
    let output = kvwarp(&[&generate[..], &["--calibration", &to]].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(!text(&output.stderr).contains("kvwarp calibrate kv"));
    assert!(text(&kvwarp(&generate).stderr).contains("kvwarp calibrate kv"));
    // What a field that differs says.
    for (from, to, part) in [
        (
            r#"kvwarp.calibration":"1""#,
            r#"kvwarp.calibration":"2""#,
            "`kvwarp.calibration` is 2, expected 1",
        ),
        (
            r#""kvwarp.calibration""#,
            r#""kvwarp.calibratiom""#,
            "`kvwarp.calibration` is missing, expected 1",
        ),
        (r#""model":""#, r#""modem":""#, "`model` is missing, expected "),
        (r#""tokens":"48""#, r#""tokens":"4.""#, "`tokens`: "),
        (
            r#""F32","shape":[30,3],"#,
            r#""I32","shape":[30,3],"#,
            "`losses` is I32 [30, 3], expected F32 [30, 3]",
        ),
        (
            r#""shape":[30,3,64,64]"#,
            r#""shape":[90,1,64,64]"#,
            "`moments` is F32 [90, 1, 64, 64], expected F32",
        ),
    ] {
        let wrong = edited(&whole, from, to);
        std::fs::write(file("wrong"), wrong).unwrap();
        let (exit, error) =
            failure(&["generate", "-m", &model, "-p", "x", "--calibration", &file("wrong")]);
        assert!(exit == 1 && error.contains("wrong: ") && error.contains(part), "{part}: {error}");
    }
    let (wrong, nothing) = (file("wrong"), file("nothing"));
    let name = br#""model":""#;
    let at = whole.windows(name.len()).position(|bytes| bytes == name).unwrap() + name.len();
    let mut bytes = whole;
    bytes[at] = if bytes[at] == b'0' { b'1' } else { b'0' };
    std::fs::write(&wrong, bytes).unwrap();
    for (arguments, code, parts) in [
        (
            &["calibrate", "kv", "-m", &model, "--text", &other, "-o", &to][..],
            2,
            &["of another text", "-o"][..],
        ),
        (
            &["generate", "-m", &model, "-p", "x", "--calibration", &wrong],
            1,
            &["`model` is", "kvwarp calibrate kv"],
        ),
        (&["generate", "-m", &model, "-p", "x", "--calibration", &nothing], 1, &["nothing"]),
        (&["generate", "-m", &model, "-p", "x", "--calibration", &one], 1, &["one.txt"]),
        (&["calibrate", "kv", "-m", &model, "--text", &one, "-c", "0"], 2, &["-c is 0"]),
    ] {
        let (exit, error) = failure(arguments);
        assert_eq!(exit, code, "{error}");
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    }
}
