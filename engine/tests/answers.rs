//! `kvwarp batch` as a user runs it, on a tiny model with a vocabulary of bytes.

mod support;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use support::program::{command, failure, kvwarp, text};

/// A folder with the model, and files of prompts and answers.
struct Stage {
    folder: tempfile::TempDir,
}

impl Stage {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        support::bytes::model(folder.path());
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn put(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    fn arguments(&self, prompts: &str, out: &str, more: &[&str]) -> Vec<String> {
        let path = |name| self.path(name).display().to_string();
        let model = self.folder.path().display().to_string();
        let given = ["batch".into(), "-m".into(), model, "--prompts".into(), path(prompts)];
        let rest = ["--out".into(), path(out)].into_iter().chain(more.iter().map(|&s| s.into()));
        given.into_iter().chain(rest).collect()
    }

    /// Runs to the end: its exit code and what it says on stderr.
    fn run(&self, prompts: &str, out: &str, more: &[&str]) -> (i32, String) {
        let arguments = self.arguments(prompts, out, more);
        let output = kvwarp(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
        (output.status.code().unwrap(), text(&output.stderr))
    }

    fn refusal(&self, prompts: &str, out: &str, more: &[&str]) -> (i32, String) {
        let arguments = self.arguments(prompts, out, more);
        failure(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// Answers by id; whole lines only, each id once.
    fn answers(&self, out: &str) -> BTreeMap<String, Value> {
        let text = std::fs::read_to_string(self.path(out)).unwrap();
        assert!(text.ends_with('\n') || text.is_empty());
        let lines = text.lines().map(|line| {
            let value: Value = serde_json::from_str(line).unwrap();
            (value["id"].to_string(), value)
        });
        let lines: Vec<_> = lines.collect();
        let answers: BTreeMap<_, _> = lines.iter().cloned().collect();
        assert_eq!(answers.len(), lines.len(), "an id has two answers");
        answers
    }
}

/// `n` prompts, two kinds of beginnings.
fn prompts(n: usize) -> String {
    let line = |i: usize| {
        let beginning = if i.is_multiple_of(2) { "one and the same " } else { "another one " };
        json!({ "id": format!("p{i}"), "prompt": format!("{}{i}", beginning.repeat(6)) })
            .to_string()
    };
    (0..n).map(|i| line(i) + "\n").collect()
}

fn tokens(answers: &BTreeMap<String, Value>) -> Vec<(&String, &Value)> {
    answers.iter().map(|(id, answer)| (id, &answer["tokens"])).collect()
}

#[test]
fn every_line_gets_an_answer_and_fields_override_flags() {
    let stage = Stage::new();
    let lines = [
        json!({ "prompt": "as it stands" }),
        json!({ "id": "chat", "messages": [{ "role": "user", "content": "hello" }] }),
        json!({ "id": 7, "prompt": "short", "max_tokens": 2, "temperature": 0 }),
        json!({ "id": "again", "prompt": "as it stands", "seed": 4, "top_k": 3, "min_p": 0.1 }),
        json!({ "id": "once more", "prompt": "as it stands", "seed": 4, "top_k": 3, "min_p": 0.1 }),
    ];
    stage.put("in", &lines.map(|line| line.to_string()).join("\n\n"));
    let (code, log) = stage.run("in", "out", &["-n", "9", "--seed", "1"]);
    assert_eq!(code, 0, "{log}");
    assert!(log.contains("5 of 5 requests answered") && log.contains("tok/s"), "{log}");
    let answers = stage.answers("out");
    let ids: Vec<_> = answers.keys().map(String::as_str).collect();
    assert_eq!(ids, ["\"again\"", "\"chat\"", "\"once more\"", "1", "7"]);
    assert_eq!(answers["1"]["prompt_tokens"], "as it stands".len());
    assert_eq!(answers["\"chat\""]["prompt_tokens"], "[user]hello".len());
    assert_eq!(answers["7"]["tokens"].as_array().unwrap().len(), 2);
    assert_eq!(answers["7"]["end"], "length");
    assert!(answers["1"]["text"].is_string());
    assert_eq!(answers["\"again\""]["tokens"], answers["\"once more\""]["tokens"]);
    let more = ["-n", "9", "--seed", "1", "--json"];
    let arguments = stage.arguments("in", "other", &more);
    let output = kvwarp(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    let summary: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&summary["requests"], &summary["errors"]), (&json!(5), &json!(0)));
    assert_eq!(tokens(&stage.answers("other")), tokens(&answers));
}

#[test]
fn company_and_preemption_change_nothing() {
    let stage = Stage::new();
    stage.put("in", &prompts(24));
    let base =
        ["--seed", "3", "--temp", "1", "--block", "64", "-n", "120", "--cache", "q4,window=0"];
    let run = |out: &str, more: &[&str]| {
        let (code, log) = stage.run("in", out, &[&base[..], more].concat());
        assert_eq!(code, 0, "{log}");
        stage.answers(out)
    };
    let single = run("1", &["--parallel", "1"]);
    let many = run("8", &["--parallel", "8"]);
    let squeezed = run("small", &["--parallel", "8", "--pool-size", "400K"]);
    assert_eq!(tokens(&many), tokens(&single));
    assert_eq!(tokens(&squeezed), tokens(&single));
    let sum = |answers: &BTreeMap<String, Value>, field: &str| {
        answers.values().map(|answer| answer[field].as_u64().unwrap()).sum::<u64>()
    };
    assert_eq!((sum(&single, "preemptions"), sum(&many, "preemptions")), (0, 0));
    assert!(sum(&squeezed, "preemptions") > 0);
    assert!(sum(&many, "shared_tokens") >= 20 * 64);
}

#[test]
fn bad_lines_are_named_by_number_and_field() {
    let stage = Stage::new();
    for (line, parts) in [
        ("{", &["not a JSON object"][..]),
        ("[1]", &["not a JSON object"]),
        ("{}", &["`prompt` or `messages` is missing"]),
        (r#"{"prompt": 3}"#, &["`prompt`", "string"]),
        (r#"{"prompt": "x", "max_tokens": -1}"#, &["`max_tokens`", "-1"]),
        (r#"{"prompt": "x", "temprature": 1}"#, &["`temprature`", "temperature"]),
        (r#"{"prompt": "x", "top_p": 2}"#, &["top_p", "2"]),
        (r#"{"prompt": "x", "seed": "a"}"#, &["`seed`"]),
        (r#"{"prompt": "x", "id": []}"#, &["`id`"]),
        (r#"{"prompt": "x", "id": "first"}"#, &["`id`", "that of line 1"]),
        (r#"{"prompt": "x", "messages": []}"#, &["exclude each other"]),
        (r#"{"messages": [{"role": "user"}]}"#, &["`messages`", "`role` and `content`"]),
    ] {
        stage.put("in", &format!("{{\"id\": \"first\", \"prompt\": \"x\"}}\n\n{line}\n"));
        let (code, error) = stage.refusal("in", "out", &[]);
        assert_eq!(code, 2, "{line}: {error}");
        assert!(error.contains("in, line 3: "), "{line}: {error}");
        assert!(parts.iter().all(|part| error.contains(part)), "{line}: {error}");
        assert!(!stage.path("out").exists(), "{line}");
    }
    std::fs::remove_file(stage.path("chat_template.jinja")).unwrap();
    stage.put("in", r#"{"messages": [{"role": "user", "content": "x"}]}"#);
    assert!(stage.refusal("in", "out", &[]).1.contains("no chat template"));
    for (more, part) in
        [(["--parallel", "0"], "1..=64"), (["--pool-size", "2X"], "512M, 2G or 80GB")]
    {
        let (code, error) = stage.refusal("in", "out", &more);
        assert!(code == 2 && error.contains(part), "{error}");
    }
}

#[test]
fn what_does_not_fit_is_refused_and_others_are_answered() {
    let stage = Stage::new();
    let long = "long ".repeat(40);
    let lines = [
        json!({ "id": "a", "prompt": "short" }),
        json!({ "id": "b", "prompt": long }),
        json!({ "id": "c", "prompt": "" }),
    ];
    stage.put("in", &lines.map(|line| line.to_string()).join("\n"));
    let (code, log) = stage.run("in", "out", &["-n", "8", "-c", "64"]);
    assert!(code == 0 && log.contains("2 with an error"), "{log}");
    let answers = stage.answers("out");
    assert_eq!(answers["\"a\""]["tokens"].as_array().unwrap().len(), 8);
    let error = answers["\"b\""]["error"].as_str().unwrap();
    assert!(error.contains("prompt (200)") && error.contains("a prompt of 64 tokens"), "{error}");
    assert_eq!(answers["\"c\""]["error"], "the prompt is empty");
    let pool = ["-n", "8", "--pool-size", "100K", "--parallel", "1"];
    stage.run("in", "pool", &pool);
    let answers = stage.answers("pool");
    let error = answers["\"b\""]["error"].as_str().unwrap();
    assert!(error.contains("the pool has") && error.contains("would fit"), "{error}");
    assert!(answers["\"a\""]["tokens"].is_array());
}

#[test]
fn answers_of_another_run_are_refused() {
    let stage = Stage::new();
    stage.put("in", &prompts(2));
    stage.put("in2", &prompts(3));
    assert_eq!(stage.run("in", "out", &["-n", "2"]).0, 0);
    for (prompts, more, part) in [
        ("in2", &["-n", "2"][..], "other prompts"),
        ("in", &["-n", "3"], "other settings"),
        ("in2", &["-n", "2", "--cache", "q4"], "other settings and prompts"),
    ] {
        let (code, error) = stage.refusal(prompts, "out", more);
        assert!(code == 2 && error.contains(part) && error.contains("out is of"), "{error}");
    }
    stage.put("notes", "my notes\n");
    let (code, error) = stage.refusal("in", "notes", &["-n", "2"]);
    assert!(code == 1 && error.contains("notes, line 1"), "{error}");
    assert_eq!(std::fs::read_to_string(stage.path("notes")).unwrap(), "my notes\n");
}

#[cfg(unix)]
#[test]
fn a_killed_run_goes_on_where_it_stopped() {
    let stage = Stage::new();
    stage.put("in", &prompts(120));
    let more = ["-n", "300", "--seed", "5", "--parallel", "4"];
    assert_eq!(stage.run("in", "whole", &more).0, 0);
    let arguments = stage.arguments("in", "out", &more);
    let lines = || {
        let bytes = std::fs::read(stage.path("out")).unwrap_or_default();
        bytes.iter().filter(|&&byte| byte == b'\n').count()
    };
    for (signal, code) in [("-KILL", None), ("-INT", Some(130))] {
        let before = lines();
        let mut child = command(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
        let mut child = child.stderr(Stdio::null()).spawn().unwrap();
        while lines() < before + 5 {
            assert!(child.try_wait().unwrap().is_none(), "it ended before it was stopped");
            std::thread::sleep(Duration::from_millis(5));
        }
        let pid = child.id().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
        assert_eq!(child.wait().unwrap().code(), code, "{signal}");
        assert!(lines() < 120, "{signal} came too late to show anything");
        let mut torn = std::fs::read(stage.path("out")).unwrap();
        torn.extend(b"{\"id\": \"p1\", \"te");
        std::fs::write(stage.path("out"), torn).unwrap();
    }
    let before = lines();
    let (code, log) = stage.run("in", "out", &more);
    assert_eq!(code, 0, "{log}");
    assert!(log.contains(&format!("{} of 120 requests", 120 - before)), "{log}");
    assert_eq!(tokens(&stage.answers("out")), tokens(&stage.answers("whole")));
    let (_, log) = stage.run("in", "out", &more);
    assert!(log.contains("0 of 120 requests"), "{log}");
}
