//! The vocabulary of a GGUF file as the files of a Hugging Face folder.

use serde_json::{Map, Value, json};
use tokenizers::normalizers::prepend::Prepend;
use tokenizers::normalizers::{NormalizerWrapper, Sequence};

use super::build::{Parts, Prefix, SPACE, Spelling};
use super::gguf;
use crate::error::{Error, Result};
use crate::gguf::Gguf;

/// `tokenizer.json`, `tokenizer_config.json` and `generation_config.json`: names and contents.
///
/// # Errors
/// As of [`super::Tokenizer::from_gguf`].
pub fn files(file: &Gguf) -> Result<Vec<(&'static str, Vec<u8>)>> {
    let (parts, marks) = gguf::parts(file)?;
    let text = |id: Option<u32>| Some(parts.texts.get(id? as usize)?.clone());
    let settings = json!({
        "bos_token": text(marks.bos),
        "eos_token": text(marks.ends.first().copied()),
        "add_bos_token": marks.add_bos,
        "chat_template": file.text("tokenizer.chat_template")?,
    });
    let generation = json!({ "bos_token_id": marks.bos, "eos_token_id": marks.ends });
    let all = [
        ("tokenizer_config.json", settings),
        ("generation_config.json", generation),
        ("tokenizer.json", tokenizer(parts)?),
    ];
    Ok(all.map(|(name, value)| (name, format!("{value:#}\n").into_bytes())).into())
}

fn tokenizer(parts: Parts) -> Result<Value> {
    let Parts { texts, merges, merging, specials, spelling, prefix, splitter, .. } = parts;
    let always = (prefix == Prefix::Always)
        .then(|| NormalizerWrapper::from(Prepend::new(SPACE.to_string())))
        .into_iter();
    let steps: Vec<_> = always.chain(parts.normalizer).collect();
    let normalizer = (!steps.is_empty()).then(|| Sequence::new(steps));
    let vocab = texts.into_iter().enumerate().filter_map(|(id, text)| Some((text?, json!(id))));
    let added = specials.into_iter().map(|special| {
        json!({
            "id": special.id,
            "content": special.text,
            "special": special.control,
            "lstrip": special.left,
            "rstrip": special.right,
            "single_word": false,
            "normalized": false,
        })
    });
    let strip = parts
        .drops_first_space
        .then(|| json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    let decoder = match spelling {
        Spelling::ByteLevel => json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true,
        }),
        Spelling::SentencePiece => {
            let steps = [
                json!({ "type": "Replace", "pattern": { "String": SPACE }, "content": " " }),
                json!({ "type": "ByteFallback" }),
                json!({ "type": "Fuse" }),
            ];
            let steps: Vec<_> = steps.into_iter().chain(strip).collect();
            json!({ "type": "Sequence", "decoders": steps })
        }
    };
    let said = |value: Result<Value, serde_json::Error>| {
        value.map_err(|e| Error::Tokenizer(format!("cannot be written as tokenizer.json: {e}")))
    };
    Ok(json!({
        "version": "1.0",
        "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": said(serde_json::to_value(normalizer))?,
        "pre_tokenizer": said(serde_json::to_value(splitter))?,
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "unk_token": merging.unknown,
            "fuse_unk": merging.fuse_unknown,
            "byte_fallback": merging.byte_fallback,
            "ignore_merges": merging.whole_words,
            "vocab": vocab.collect::<Map<_, _>>(),
            "merges": merges,
        },
    }))
}
