//! Tensors of GGUF files and of safetensors folders under our names.

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use kvwarp_engine::gguf::GgmlType;
use kvwarp_engine::source::Source;
use kvwarp_engine::weights::{Weights, expected};
use serde_json::json;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

#[test]
fn every_fixture_opens_complete() {
    for (name, kind) in [
        ("llama3", GgmlType::BF16),
        ("mistral", GgmlType::F16),
        ("qwen2", GgmlType::BF16),
        ("llama_linear", GgmlType::F16),
    ] {
        let source = Source::open(&fixture(name)).unwrap();
        let config = &source.config;
        assert_eq!(source.weights.iter().count(), expected(config).count(), "{name}");
        let q = source.weights.matrix("blk.1.attn_q", config.heads * 64, config.width).unwrap();
        assert_eq!((q.kind, q.bytes.len()), (kind, q.rows * q.cols * 2), "{name}");
        let norm = source.weights.vector("output_norm", config.width).unwrap();
        assert!(norm.iter().all(|x| x.is_finite() && *x != 0.0), "{name}: {norm:?}");
    }
}

#[test]
fn the_real_model_opens_complete() {
    let Some(path) = support::real_model() else { return };
    let source = Source::open(&path).unwrap();
    assert_eq!(source.weights.iter().count(), 272);
    let down = source.weights.matrix("blk.29.ffn_down", 576, 1536).unwrap();
    assert_eq!((down.kind, down.bytes.len()), (GgmlType::Q4_1, 576 * 1536 / 32 * 20));
    assert_eq!(source.weights.get("token_embd").unwrap().kind, GgmlType::Q8_0);
    assert_eq!(source.weights.vector("blk.0.attn_norm", 576).unwrap().len(), 576);
    assert_eq!(source.tokenizer().unwrap().vocab_size(), source.config.vocab);
}

/// A safetensors file of F32 tensors: name, extents, first element.
fn safetensors(tensors: &[(&str, &[usize], f32)]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for (name, shape, first) in tensors {
        let start = data.len();
        data.extend(first.to_le_bytes());
        data.resize(start + 4 * shape.iter().product::<usize>(), 0);
        header.insert(
            (*name).into(),
            json!({"dtype": "F32", "shape": shape, "data_offsets": [start, data.len()]}),
        );
    }
    let header = json!(header).to_string();
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(header.as_bytes());
    out.extend(data);
    out
}

fn folder(files: &BTreeMap<&str, Vec<u8>>) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        std::fs::write(folder.path().join(name), bytes).unwrap();
    }
    folder
}

fn refusal(files: &BTreeMap<&str, Vec<u8>>) -> String {
    let folder = folder(files);
    match Weights::from_folder(folder.path()) {
        Ok(_) => panic!("accepted {:?}", files.keys()),
        Err(e) => e.to_string(),
    }
}

#[test]
fn shards_are_joined() {
    let index = json!({"weight_map": {"model.norm.weight": "a.safetensors", "lm_head.weight": "b.safetensors"}});
    let mut files = BTreeMap::from([
        ("model.safetensors.index.json", index.to_string().into_bytes()),
        ("a.safetensors", safetensors(&[("model.norm.weight", &[3], 1.5)])),
        ("b.safetensors", safetensors(&[("lm_head.weight", &[2, 3], 2.5)])),
    ]);
    let complete = folder(&files);
    let weights = Weights::from_folder(complete.path()).unwrap();
    assert_eq!(weights.vector("output_norm", 3).unwrap(), [1.5, 0.0, 0.0]);
    assert_eq!(weights.matrix("output", 2, 3).unwrap().bytes[..4], 2.5f32.to_le_bytes());

    files.insert("b.safetensors", safetensors(&[("model.norm.weight", &[3], 1.5)]));
    assert!(
        refusal(&files)
            .ends_with("tensor `lm_head.weight` is missing, though the index puts it in this file")
    );
    files.remove("b.safetensors");
    assert!(refusal(&files).contains("b.safetensors: No such file"));
}

#[test]
fn broken_folders_are_explained() {
    let one = |bytes: Vec<u8>| refusal(&BTreeMap::from([("model.safetensors", bytes)]));
    let good = safetensors(&[("model.norm.weight", &[8], 1.0)]);
    assert!(one(good[..good.len() - 1].to_vec()).contains("safetensors: "));
    assert!(one(vec![1, 2, 3]).contains("the file has 3 bytes"));
    let mut huge = good.clone();
    huge[..8].copy_from_slice(&(u64::MAX / 2).to_le_bytes());
    assert!(one(huge).contains("header length 9223372036854775807 at offset 0"));
    let strange = safetensors(&[("model.layers.0.self_attn.q_norm.weight", &[8], 1.0)]);
    assert!(
        one(strange)
            .contains("`model.layers.0.self_attn.q_norm.weight` is no part of a supported model")
    );
    assert!(refusal(&BTreeMap::new()).contains("model.safetensors: No such file"));
}

#[test]
fn wrong_tensors_are_named_as_the_file_names_them() {
    let files =
        BTreeMap::from([("model.safetensors", safetensors(&[("model.norm.weight", &[8], 1.0)]))]);
    let folder = folder(&files);
    let weights = Weights::from_folder(folder.path()).unwrap();
    let missing = weights.matrix("blk.0.attn_q", 1, 1).unwrap_err().to_string();
    assert_eq!(missing, "weights: tensor `model.layers.0.self_attn.q_proj.weight` is missing");
    let shape = weights.vector("output_norm", 9).unwrap_err().to_string();
    assert_eq!(shape, "weights: tensor `model.norm.weight` has 1 rows of 8, expected 1 of 9");
}

#[test]
fn a_gguf_file_without_its_tensors_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let embedding = support::zeros("token_embd.weight", &[128, 300]);
    std::fs::write(&path, support::gguf(&support::model_metadata("llama"), &[embedding])).unwrap();
    let message = Source::open(&path).err().unwrap().to_string();
    assert!(message.ends_with("m.gguf: weights: tensor `blk.0.attn_norm` is missing"), "{message}");
    std::fs::write(&path, b"<!doctype html>").unwrap();
    let message = Source::open(&path).err().unwrap().to_string();
    assert!(message.contains("m.gguf: gguf: the file starts with"), "{message}");
}
