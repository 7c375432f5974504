//! The example on candle says what the program says with the same cache, and its page shows the program that is run.

mod support;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use support::program::{command, text};

const PROMPT: &str = "Sir Walter Elliot, of Kellynch Hall, in Somersetshire, was a man who, for his own amusement, never took \
     up any book but the Baronetage; there he found occupation for an idle hour, and consolation in a distressed one. ";

/// A prompt of more tokens than stay f16, and how it ends.
fn prompt(end: &str) -> String {
    PROMPT.repeat(6) + end
}

fn example() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/candle")
}

/// The program of the example, built as its page says, in a target folder of its own.
fn built() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("candle");
        let mut cargo = Command::new("cargo");
        cargo.args(["build", "--quiet", "--release", "--locked", "--bins", "--manifest-path"]);
        cargo.arg(example().join("Cargo.toml")).env("CARGO_TARGET_DIR", &target);
        // Its tensors are the processor's.
        cargo.env_remove("KVW_NVCC").env_remove("KVW_REQUIRE_CUDA").env("KVW_SKIP_NVCC", "1");
        let out = cargo.output().unwrap();
        assert!(out.status.success(), "{}", text(&out.stderr));
        target.join("release/kvwarp-candle")
    })
}

/// Tokens that the example says, and bytes of its cache.
fn of_example(model: &Path, cache: &str, end: &str, n: usize) -> (Vec<u32>, usize) {
    let mut program = Command::new(built());
    program.arg(model).args([cache, &n.to_string()]).stdin(Stdio::piped());
    let mut program = program.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    program.stdin.take().unwrap().write_all(prompt(end).as_bytes()).unwrap();
    let out = program.wait_with_output().unwrap();
    let said = text(&out.stderr);
    assert!(out.status.success(), "{said}");
    let list = said.lines().find_map(|line| line.strip_prefix("tokens [")).unwrap();
    let tokens = list.trim_end_matches(']').split(", ").map(|token| token.parse().unwrap());
    let bytes = said.split(" bytes of cache").next().unwrap().rsplit(' ').next().unwrap();
    (tokens.collect(), bytes.parse().unwrap())
}

/// Tokens that the program says.
fn of_program(model: &Path, cache: &str, end: &str, n: usize) -> Vec<u32> {
    let (model, n, prompt) = (model.to_str().unwrap(), n.to_string(), prompt(end));
    let arguments = ["generate", "--no-chat", "-t", "2", "--temp", "0", "-n", &n, "--cache", cache];
    let out = command(&arguments).args(["--json", "-m", model, "-p", &prompt]).output().unwrap();
    assert!(out.status.success(), "{}", text(&out.stderr));
    let answer: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let tokens = answer["tokens"].as_array().unwrap();
    tokens.iter().map(|token| token.as_u64().unwrap() as u32).collect()
}

#[test]
fn the_example_says_what_the_program_says() {
    let Some(model) = support::real_model() else { return };
    let (mut sizes, n) = (Vec::new(), 24);
    // Weights and caches are the same numbers, sums are not: beginnings after which no two tokens are nearly alike.
    for (ours, theirs, end) in [
        ("f16", "f16", "In Somersetshire there was once"),
        ("f16", "f16", "Sir Walter Elliot, of Kellynch"),
        ("q2", "q2-kivi", "Sir Walter Elliot, of Kellynch"),
    ] {
        let (got, bytes) = of_example(&model, ours, end, n);
        assert_eq!(got, of_program(&model, theirs, end, n), "{ours}: {end}");
        sizes.push(bytes);
    }
    assert!(5 * sizes[2] < 3 * sizes[1], "bytes in f16 and in 2 bits: {sizes:?}");
}

#[test]
fn what_it_does_not_take_is_named() {
    let Some(model) = support::real_model() else { return };
    for (cache, field) in [("q3", "no store \"q3\""), ("q2,windows=1", "\"windows=1\" is no part")]
    {
        let mut program = Command::new(built());
        let out = program.arg(&model).arg(cache).stdin(Stdio::null()).output().unwrap();
        let said = text(&out.stderr);
        assert!(!out.status.success() && said.contains(field), "{cache}: {said}");
    }
}

#[test]
fn the_page_shows_the_program() {
    let page = include_str!("../../csrc/link/candle.md");
    let shown = page.split("```rust\n").nth(1).unwrap().split("```").next().unwrap();
    assert_eq!(shown, include_str!("../examples/candle/src/main.rs"));
}
