//! `kvwarp compress` and `kvwarp ask` as a user runs them.

mod support;

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use kvwarp_engine::data;
use serde_json::Value;
use support::program::{command, failure, kvwarp, text};

/// A folder with files, and a model.
struct Stage {
    folder: tempfile::TempDir,
    model: PathBuf,
}

impl Stage {
    /// With a tiny model that has a chat template.
    fn tiny() -> Self {
        let folder = tempfile::tempdir().unwrap();
        support::bytes::model(folder.path());
        let model = folder.path().to_owned();
        Self { folder, model }
    }

    fn real() -> Option<Self> {
        let model = support::real_model()?;
        Some(Self { folder: tempfile::tempdir().unwrap(), model })
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    fn put(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    /// A command with the model, and files of the folder for names that begin with a colon.
    fn arguments(&self, arguments: &[&str]) -> Vec<String> {
        let model = self.model.display().to_string();
        let path = |&word: &&str| {
            word.strip_prefix(':').map_or_else(|| word.to_owned(), |name| self.path(name))
        };
        let given = arguments.iter().map(path);
        given.chain(["-m".to_owned(), model]).collect()
    }

    /// What a run that succeeds says on stdout and stderr.
    fn run(&self, arguments: &[&str]) -> (String, String) {
        let arguments = self.arguments(arguments);
        let output = kvwarp(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
        let log = text(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {log}");
        (text(&output.stdout), log)
    }

    fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.run(&[arguments, &["--json"]].concat()).0).unwrap()
    }

    fn refusal(&self, arguments: &[&str]) -> (i32, String) {
        let arguments = self.arguments(arguments);
        failure(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
    }
}

/// 300 bytes and more.
fn document() -> String {
    (0..40).map(|i| format!("line {i}\n")).collect()
}

#[test]
fn every_question_is_asked_of_the_same_document() {
    let stage = Stage::tiny();
    stage.put("text", &document());
    for spec in ["f16", "q2", "q4,window=0", "q2-small,evict=streaming:0.5"] {
        let report = stage.json(&["compress", ":text", "-o", ":cache", "--cache", spec]);
        let tokens = "[user]".len() + document().trim_end().len();
        assert_eq!((&report["tokens"], &report["cache"]), (&tokens.into(), &spec.into()));
        assert_eq!(report["f16_bytes"], 2 * 2 * 64 * 2 * tokens);
        let bytes = std::fs::metadata(stage.path("cache")).unwrap().len();
        assert_eq!(report["file_bytes"], bytes);
        let common = ["ask", ":cache", "-n", "20", "--temp", "1", "--seed", "5"];
        let ask =
            |questions: &[&str]| stage.json(&[&common[..], questions].concat())["answers"].take();
        let (both, turned) = (ask(&["one?", "two?"]), ask(&["two?", "one?"]));
        for (i, question) in ["one?", "two?"].into_iter().enumerate() {
            let alone = &ask(&[question])[0];
            assert_eq!(alone["question"], question);
            assert_eq!(alone["prompt_tokens"], "\n\none?".len());
            let tokens = alone["tokens"].as_array().unwrap();
            assert_eq!(tokens.len(), 20);
            assert_eq!(
                (&both[i]["tokens"], &turned[1 - i]["tokens"]),
                (&alone["tokens"], &alone["tokens"])
            );
            assert_eq!(both[i]["kv_bytes"], alone["kv_bytes"]);
        }
        assert_ne!(both[0]["tokens"], both[1]["tokens"], "{spec}");
        // The lines of stdin are questions too.
        let arguments = stage.arguments(&[&common[..], &["--json"]].concat());
        let mut child = command(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
        let mut child = child.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(b"one?\n\ntwo?\n").unwrap();
        let lines: Value =
            serde_json::from_slice(&child.wait_with_output().unwrap().stdout).unwrap();
        let tokens = |answers: &Value| [0, 1].map(|i| answers[i]["tokens"].clone());
        assert_eq!(tokens(&lines["answers"]), tokens(&both));
    }
}

#[test]
fn without_a_template_the_text_goes_on() {
    let stage = Stage::tiny();
    stage.put("text", &document());
    stage.run(&["compress", ":text", "-o", ":cache", "--cache", "f16", "--no-chat"]);
    let asked = stage.json(&["ask", ":cache", "and then?", "-n", "12", "--temp", "0"]);
    assert_eq!(asked["document_tokens"], document().trim_end().len());
    // What the prompt is in one piece, for a cache that keeps everything.
    stage.put("prompt", &format!("{}\n\nand then?", document().trim_end()));
    let whole = stage.json(&["generate", "-f", ":prompt", "--no-chat", "-n", "12", "--temp", "0"]);
    assert_eq!(asked["answers"][0]["tokens"], whole["tokens"]);
    let long = stage.refusal(&["ask", ":cache", "x", "-c", "100"]);
    assert!(long.0 == 1 && long.1.contains("do not fit in a context of 100"), "{}", long.1);
}

#[test]
fn what_cannot_be_asked_is_named_and_leaves_no_file() {
    let stage = Stage::tiny();
    stage.put("text", &document());
    stage.put("empty", " \n");
    stage.put("long", &document().repeat(3));
    let none = stage.path("none/cache");
    for (arguments, code, part) in [
        (&["compress", ":empty", "-o", ":cache"][..], 2, "there is no text"),
        (&["compress", ":nothing", "-o", ":cache"], 1, "nothing: No such file"),
        (&["compress", ":text"], 2, "--output <CACHE>"),
        (&["compress", ":text", "-o", &none, "--cache", "f16"], 1, "none/cache.partial: No such"),
        (&["compress", ":text", "-o", ":cache", "--cache", "q3"], 2, "unknown preset `q3`"),
        (
            &["compress", ":text", "-o", ":cache", "--cache", "q2-kivi,kivi_exact"],
            1,
            "cannot be kept in a file",
        ),
        (
            &["compress", ":long", "-o", ":cache", "--cache", "f16"],
            1,
            "over this model's limit of 512",
        ),
        (&["compress", ":text", "-o", ":cache", "--device", "cuda"], 1, "--device cuda"),
        (&["ask", ":cache", "x"], 1, "cache: No such file"),
        (&["ask", ":text", "x"], 1, "text: header too large (cut off, or no cache"),
        (&["ask", ":model.safetensors", "x"], 1, "`kvwarp.cache` is missing, expected 1"),
        (&["ask", ":cache", "x", "--top-p", "7"], 2, "top_p"),
    ] {
        let (exit, error) = stage.refusal(arguments);
        assert!(exit == code && error.contains(part), "{arguments:?}: {exit} {error}");
    }
    let names = std::fs::read_dir(stage.folder.path()).unwrap();
    let names: Vec<_> = names.map(|entry| entry.unwrap().file_name()).collect();
    assert!(names.iter().all(|name| !name.to_str().unwrap().contains("cache")), "{names:?}");
    let (_, log) = stage.run(&[
        "compress",
        ":text",
        "-o",
        ":cache",
        "--cache",
        "f16,evict=snapkv:0.5:window=8",
    ]);
    assert!(log.contains("note: snapkv keeps what the end of the document attends to"), "{log}");
}

#[test]
fn a_document_that_was_compressed_answers() {
    let Some(stage) = Stage::real() else { return };
    stage.put("text", data::DOCUMENT);
    let mut bytes = Vec::new();
    for spec in ["f16", "q2,evict=kvzip:0.3"] {
        let report = stage.json(&["compress", ":text", "-o", ":cache", "--cache", spec]);
        let asked = stage.json(&["ask", ":cache", data::QUESTION, "-n", "48", "--temp", "0"]);
        let answer = asked["answers"][0]["text"].as_str().unwrap();
        assert!(answer.contains(data::ANSWER), "{spec}: {answer}");
        bytes.push(report["file_bytes"].as_f64().unwrap());
        let (kept, tokens) = (&report["tokens_kept"], &report["tokens"]);
        let share = kept.as_f64().unwrap() / tokens.as_f64().unwrap();
        assert!(share == 1.0 || (0.29..0.31).contains(&share), "{share}");
    }
    assert!(bytes[1] * 8.0 < bytes[0], "{bytes:?}");
}

#[cfg(unix)]
#[test]
fn ctrl_c_leaves_no_file() {
    let Some(stage) = Stage::real() else { return };
    stage.put("text", data::DOCUMENT);
    let arguments = stage.arguments(&["compress", ":text", "-o", ":cache", "--cache", "f16"]);
    let mut child = command(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    let mut child = child.stderr(Stdio::piped()).spawn().unwrap();
    let exists = |name: &str| PathBuf::from(stage.path(name)).exists();
    while !exists("cache.partial") {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it was stopped");
        std::thread::sleep(Duration::from_millis(5));
    }
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(!exists("cache") && !exists("cache.partial"));
}
