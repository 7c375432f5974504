//! `kvwarp calibrate` as a user runs it.

mod support;

use support::program::{failure, kvwarp, text};

/// What follows the header of a safetensors file.
fn tensors(file: &[u8]) -> &[u8] {
    let header = u64::from_le_bytes(*file.first_chunk().unwrap()) as usize;
    &file[8 + header..]
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
    assert!(log.contains(": 48 tokens, 90 heads"), "{log}");
    assert!(
        tensors(&whole) == tensors(&again),
        "an interrupted calibration is not what a whole one is"
    );
    let generate = ["generate", "-m", &model, "-p", "one two", "-n", "4", "--cache", "q2"];
    let output = kvwarp(&[&generate[..], &["--calibration", &to]].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(!text(&output.stderr).contains("kvwarp calibrate kv"));
    assert!(text(&kvwarp(&generate).stderr).contains("kvwarp calibrate kv"));
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
