//! The program as a user runs it.

#[path = "program/bench.rs"]
mod bench;
mod support;

use std::io::Read;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::Value;
use support::program::{command, failure, fixture, kvwarp, text};

#[test]
fn help_names_every_command_and_flag() {
    let help = text(&kvwarp(&["--help"]).stdout);
    for name in [
        "generate",
        "compress",
        "ask",
        "batch",
        "info",
        "bench",
        "perplexity",
        "calibrate",
        "doctor",
        "--model",
    ] {
        assert!(help.contains(name), "{name} in {help}");
    }
    let help = text(&kvwarp(&["generate", "--help"]).stdout);
    for name in [
        "--cache <SPEC>",
        "window=N",
        "--ctx-size",
        "--n-predict",
        "--temp",
        "--top-k",
        "--min-p",
        "--seed",
    ] {
        assert!(help.contains(name), "{name} in {help}");
    }
}

#[test]
fn wrong_arguments_exit_with_2() {
    let model = fixture("llama3");
    for (arguments, parts) in [
        (
            &["generate", "-m", &model, "-p", "x", "--cache", "q3"][..],
            &["unknown preset `q3`", "f16, q8, fp8, q4, q2"][..],
        ),
        (
            &["generate", "-m", &model, "-p", "x", "--cache", "q2,windw=3"],
            &["did you mean `window`"],
        ),
        (
            &["generate", "-m", &model, "-p", "x", "-ctk", "q2", "-ctv", "q4"],
            &["-ctk q2", "-ctv q4", "same store"],
        ),
        (
            &["generate", "-m", &model, "-p", "x", "--cache", "q2-kivi", "-ctk", "q2"],
            &["--cache q2-kivi", "`q2`", "contradict"],
        ),
        (
            &["perplexity", "-m", &model, "--cache", "q2", "-ctv", "q2,window=0"],
            &["--cache q2", "`q2,window=0`", "contradict"],
        ),
        (&["bench", "-m", &model, "-ctk", "q2,f16", "-ctv", "q2,q4"], &["-ctk f16", "-ctv q4"]),
        (&["generate", "-m", &model], &["--prompt"]),
        (&["generate", "-m", &model, "-p", "x", "--top-p", "1.5"], &["top_p", "1.5"]),
        (&["bench", "-m", &model, "-p", "many"], &["many", "512 or 8k"]),
        (&["bench", "-m", &model, "--profile", "-o", "csv"], &["--profile", "md or json"]),
        (&["bench", "-m", &model, "--memory", "1T"], &["--memory", "-d, -p or -n"]),
        (&["bench", "-m", &model, "--memory", "much", "-d", "1"], &["much", "2G or 80GB"]),
        (&["bench", "-m", &model, "--memory", "1G", "-d", "513"], &["513", "limit is 512"]),
        (&["nonsense"], &["nonsense"]),
    ] {
        let (code, error) = failure(arguments);
        assert_eq!(code, 2, "{arguments:?}: {error}");
        assert!(parts.iter().all(|part| error.contains(part)), "{arguments:?}: {error}");
    }
}

#[test]
fn what_cannot_be_done_exits_with_1_and_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let put = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.display().to_string()
    };
    let (empty, noise) = (put("empty.gguf", b""), put("noise.gguf", &[7; 4000]));
    let truncated =
        put("truncated.gguf", b"GGUF\x03\0\0\0\xff\xff\xff\xff\xff\xff\xff\x7f\0\0\0\0\0\0\0\0");
    let (model, held) = (fixture("llama3"), put("held.txt", b"text"));
    for (arguments, parts) in [
        (&["info", "-m", "/nonexistent.gguf"][..], &["/nonexistent.gguf", "No such file"][..]),
        (&["info", "-m", &empty], &["empty.gguf"]),
        (&["info", "-m", &noise], &["noise.gguf", "GGUF"]),
        (&["info", "-m", &truncated], &["truncated.gguf", "tensor count"]),
        (&["info"], &["--model"]),
        (&["generate", "-m", &model, "-p", "x", "--device", "cuda"], &["--device cuda"]),
        (&["bench", "--synthetic", "llama-3-8b", "--device", "cuda"], &["--device cuda"]),
        (&["perplexity", "-m", &model, "-f", &held, "-c", "1M"], &["1M"]),
        (&["perplexity", "-m", &model, "-f", &held, "-c", "100k"], &["102400", "limit"]),
        (&["bench", "-m", &model, "-p", "8", "-n", "0", "-d", "200k"], &["204808", "limit"]),
        (&["generate", "-m", &model, "-f", "/nonexistent"], &["/nonexistent"]),
    ] {
        let (code, error) = failure(arguments);
        assert!(code == 1 || arguments.contains(&"1M"), "{arguments:?}: {code}");
        assert!(parts.iter().all(|part| error.contains(part)), "{arguments:?}: {error}");
        assert!(code == 2 || error.trim_end().lines().count() == 1, "{arguments:?}: {error}");
    }
}

#[test]
fn json_is_json() {
    let model = fixture("mistral");
    for (arguments, keys) in [
        (
            &["info", "--json", "-m", &model][..],
            &["layers", "sliding_window", "kv_bytes_at_context"][..],
        ),
        (&["doctor", "--json"], &[]),
        (
            &["bench", "-o", "json", "-m", &model, "-p", "8", "-n", "4", "-d", "0,70", "-r", "2"],
            &[],
        ),
    ] {
        let output = kvwarp(arguments);
        assert!(output.status.success(), "{}", text(&output.stderr));
        let value: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert!(keys.iter().all(|key| value.get(key).is_some()), "{value}");
    }
}

fn real() -> Option<PathBuf> {
    support::real_model()
}

#[test]
fn generates_the_golden_text() {
    let Some(model) = real() else { return };
    let model = model.display().to_string();
    let prompt = "The history of the Roman Empire begins with";
    let common = [
        "-m",
        &model,
        "--no-chat",
        "--temp",
        "0",
        "--activations",
        "f32",
        "-n",
        "16",
        "-p",
        prompt,
    ];
    let output = kvwarp(&[&["generate"][..], &common].concat());
    assert_eq!(
        text(&output.stdout),
        " the founding of Rome in 753 BCE by Romulus Augustus. Rome\n"
    );
    let log = text(&output.stderr);
    assert!(log.contains("prompt 8 tokens") && log.contains("KV cache: 23 tokens"), "{log}");
    let output =
        kvwarp(&[&["generate", "--json", "--cache", "q4,window=64"][..], &common].concat());
    let value: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(value["tokens"].as_array().unwrap().len(), 16);
    assert_eq!((&value["cache"], &value["end"]), (&"q4,window=64".into(), &"length".into()));
}

#[test]
fn seeds_fix_the_text_and_the_context_bounds_it() {
    let Some(model) = real() else { return };
    let model = model.display().to_string();
    let run = |more: &[&str]| {
        let common = ["generate", "-m", &model, "--no-chat", "-p", "Once upon a time"];
        kvwarp(&[&common[..], more].concat())
    };
    let [a, b, c] =
        ["3", "3", "4"].map(|seed| run(&["-n", "12", "--seed", seed, "--temp", "1"]).stdout);
    assert_eq!(text(&a), text(&b));
    assert_ne!(text(&a), text(&c));
    let full = run(&["-n", "50", "-c", "10", "--temp", "0"]);
    assert!(full.status.success() && text(&full.stderr).contains("context full"));
    let long = run(&["-c", "3"]);
    assert_eq!(long.status.code(), Some(1));
    assert!(text(&long.stderr).contains("a context of 3"), "{}", text(&long.stderr));
    let beyond = run(&["-c", "9k"]);
    assert!(text(&beyond.stderr).contains("limit of 8192"), "{}", text(&beyond.stderr));
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_with_statistics_and_130() {
    let Some(model) = real() else { return };
    let model = model.display().to_string();
    let arguments =
        ["generate", "-m", &model, "--no-chat", "-p", "One, two,", "-n", "8000", "--temp", "0.5"];
    let mut child =
        command(&arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // The first piece of text shows that it generates.
    let mut first = [0; 4];
    child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    let log = text(&output.stderr);
    assert!(log.contains("interrupted") && log.contains("KV cache:"), "{log}");
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let Some(model) = real() else { return };
    let model = model.display().to_string();
    let arguments = ["generate", "-m", &model, "--no-chat", "-p", "One, two,", "-n", "64"];
    let mut child =
        command(&arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), text(&output.stderr).as_str()), (Some(0), ""));
}
