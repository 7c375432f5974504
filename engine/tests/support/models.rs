//! Small random models, and texts.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use kvwarp::linear::Activations;
use kvwarp_engine::model::Model;
use kvwarp_engine::source::Source;
use serde::Deserialize;

fn here() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests")
}

/// A model of `fixtures`.
pub fn fixture(name: &str) -> Source {
    Source::open(&here().join("fixtures").join(name)).unwrap()
}

/// Of a fixture, exact in its activations.
pub fn model(source: &Source) -> Model<'_> {
    Model::new(source, 2, Activations::F32).unwrap()
}

/// Tokens of a text for fixtures.
pub fn text(n: usize) -> Vec<u32> {
    (0..n as u32).map(|i| (i * i * 7 + i * 13) % 251).collect()
}

/// A file of `golden`.
pub fn golden(name: &str) -> String {
    std::fs::read_to_string(here().join("golden").join(name)).unwrap()
}

#[derive(Deserialize)]
struct Text {
    tokens: Vec<u32>,
}

/// Tokens of two texts, of three windows of 2,560 each.
pub fn texts() -> BTreeMap<String, Vec<u32>> {
    let texts: BTreeMap<String, Text> = serde_json::from_str(&golden("texts.json")).unwrap();
    texts.into_iter().map(|(name, text)| (name, text.tokens)).collect()
}
