//! Bodies of the fuzz targets: each takes any bytes and must neither panic nor allocate without
//! bound.

use kvwarp_engine::cache::Plan;
use kvwarp_engine::config::Config;
use kvwarp_engine::spec::CacheSpec;
use kvwarp_engine::tokenizer::Tokenizer;
use kvwarp_engine::{gguf, safetensors, store};

/// A GGUF file: header, then configuration and vocabulary from its metadata, then a round trip.
pub fn gguf(data: &[u8]) {
    let Ok(file) = gguf::parse(data) else { return };
    assert!(file.tensors().values().all(|info| info.range.end <= data.len()));
    let _ = Config::from_gguf(&file, data);
    if let Ok(tokenizer) = Tokenizer::from_gguf(&file) {
        use_tokenizer(&tokenizer);
    }
}

/// A safetensors file.
pub fn safetensors(data: &[u8]) {
    let Ok(tensors) = safetensors::parse(data) else { return };
    for info in tensors.values() {
        assert!(info.range.start <= info.range.end && info.range.end <= data.len());
    }
}

/// The text files of a model folder.
pub fn json(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let _ = Config::from_json(text);
    if let Ok(tokenizer) = Tokenizer::from_json(text, &[text]) {
        use_tokenizer(&tokenizer);
    }
}

/// A cache spec: it is read or refused in a short message, and survives being written.
pub fn spec(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match text.parse::<CacheSpec>() {
        Ok(spec) => assert_eq!(spec.to_string().parse(), Ok(spec)),
        Err(error) => assert!(error.to_string().len() < 1024),
    }
}

/// A cache file: what has been checked names slabs that are there, each once.
pub fn cache(data: &[u8]) {
    let Ok(contents) = store::parse(data) else { return };
    if contents.check(&Plan::default(), 1 << 20).is_err() {
        return;
    }
    let slabs = contents.entries.iter().map(|&entry| contents.slab(data, entry).unwrap());
    let bytes: usize = slabs.map(|(_, bytes)| bytes.len()).sum();
    assert!(bytes <= data.len());
    let held = contents.heads.iter().map(|head| head.len.div_ceil(64)).sum::<usize>();
    assert_eq!(held, contents.entries.len());
}

fn use_tokenizer(tokenizer: &Tokenizer) {
    if let Ok(ids) = tokenizer.prompt("Ab 12\n<s> x\u{e9}\u{1f469}") {
        assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()));
        tokenizer.decode(&ids, true);
    }
}
