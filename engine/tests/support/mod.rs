//! What the tests of the file side share: a GGUF writer and the way to the real model.
#![allow(dead_code)]

pub mod bytes;
pub mod converted;
pub mod fake;
pub mod models;
pub mod program;
pub mod schedule;

use std::path::PathBuf;

use kvwarp_engine::fetch;

/// The default model on this machine: `KVW_TEST_MODEL`, or the cache folder.
pub fn real_model() -> Option<PathBuf> {
    let given = std::env::var_os("KVW_TEST_MODEL").map(PathBuf::from);
    let cached = fetch::cache_folder().ok().map(|folder| folder.join(fetch::SMOLLM2.file));
    let found = given.or(cached).filter(|path| path.is_file());
    if found.is_none() {
        assert!(
            std::env::var("KVW_REQUIRE_MODEL").is_err(),
            "no model at KVW_TEST_MODEL or in the cache folder"
        );
        eprintln!("skipped: no model at KVW_TEST_MODEL or in the cache folder");
    }
    found
}

/// Metadata values that tests write.
#[derive(Debug, Clone)]
pub enum Meta {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
    /// An array of arrays of u8.
    Nested(Vec<Vec<u8>>),
}

/// A tensor that tests write: name, extents fastest first, type number, data.
#[derive(Debug, Clone)]
pub struct Tensor {
    pub name: String,
    pub shape: Vec<u64>,
    pub kind: u32,
    pub data: Vec<u8>,
}

/// Bytes of a GGUF file, version 3, alignment 32 unless the metadata says otherwise.
pub fn gguf(metadata: &[(String, Meta)], tensors: &[Tensor]) -> Vec<u8> {
    let mut out = b"GGUF".to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    let mut alignment = 32;
    for (key, value) in metadata {
        text(&mut out, key);
        meta(&mut out, value);
        if let ("general.alignment", Meta::U32(n)) = (key.as_str(), value) {
            alignment = *n as usize;
        }
    }
    let mut offset = 0;
    for tensor in tensors {
        text(&mut out, &tensor.name);
        out.extend((tensor.shape.len() as u32).to_le_bytes());
        tensor.shape.iter().for_each(|n| out.extend(n.to_le_bytes()));
        out.extend(tensor.kind.to_le_bytes());
        out.extend((offset as u64).to_le_bytes());
        offset = (offset + tensor.data.len()).next_multiple_of(alignment);
    }
    out.resize(out.len().next_multiple_of(alignment), 0);
    let start = out.len();
    for tensor in tensors {
        out.resize(start + (out.len() - start).next_multiple_of(alignment), 0);
        out.extend(&tensor.data);
    }
    out
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn array(out: &mut Vec<u8>, kind: u32, count: usize) {
    out.extend(kind.to_le_bytes());
    out.extend((count as u64).to_le_bytes());
}

fn meta(out: &mut Vec<u8>, value: &Meta) {
    let id: u32 = match value {
        Meta::U32(_) => 4,
        Meta::F32(_) => 6,
        Meta::Bool(_) => 7,
        Meta::Text(_) => 8,
        _ => 9,
    };
    out.extend(id.to_le_bytes());
    match value {
        Meta::U32(n) => out.extend(n.to_le_bytes()),
        Meta::F32(x) => out.extend(x.to_le_bytes()),
        Meta::Bool(b) => out.push(u8::from(*b)),
        Meta::Text(s) => text(out, s),
        Meta::Texts(list) => {
            array(out, 8, list.len());
            list.iter().for_each(|s| text(out, s));
        }
        Meta::I32s(list) => {
            array(out, 5, list.len());
            list.iter().for_each(|n| out.extend(n.to_le_bytes()));
        }
        Meta::F32s(list) => {
            array(out, 6, list.len());
            list.iter().for_each(|x| out.extend(x.to_le_bytes()));
        }
        Meta::Nested(list) => {
            array(out, 9, list.len());
            for bytes in list {
                array(out, 0, bytes.len());
                out.extend(bytes);
            }
        }
    }
}

/// Metadata of a small model of architecture `arch`: 1 layer, 2 heads of 64.
pub fn model_metadata(arch: &str) -> Vec<(String, Meta)> {
    let mut list = vec![("general.architecture".to_owned(), Meta::Text(arch.into()))];
    let mut number = |key: &str, n: u32| list.push((format!("{arch}.{key}"), Meta::U32(n)));
    number("block_count", 1);
    number("context_length", 256);
    number("embedding_length", 128);
    number("feed_forward_length", 64);
    number("attention.head_count", 2);
    number("attention.head_count_kv", 1);
    list.push((format!("{arch}.attention.layer_norm_rms_epsilon"), Meta::F32(1e-5)));
    list.push((format!("{arch}.rope.freq_base"), Meta::F32(5e4)));
    list
}

/// An all-zero F32 tensor.
pub fn zeros(name: &str, shape: &[u64]) -> Tensor {
    let bytes = 4 * shape.iter().product::<u64>() as usize;
    Tensor { name: name.into(), shape: shape.to_vec(), kind: 0, data: vec![0; bytes] }
}
