//! Encoding and decoding against independent token numbers.

mod support;

use kvwarp_engine::{data, gguf, tokenizer::Tokenizer};
use serde_json::Value;
use sha2::{Digest, Sha256};

fn real() -> Option<Tokenizer> {
    let bytes = std::fs::read(support::real_model()?).unwrap();
    Some(Tokenizer::from_gguf(&gguf::parse(&bytes).unwrap()).unwrap())
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

#[test]
fn prompts_match_golden_ids() {
    let Some(tokenizer) = real() else { return };
    let golden: Value = serde_json::from_str(include_str!("golden/prompts.json")).unwrap();
    for (name, case) in golden.as_object().unwrap() {
        let (text, expected) = (case["text"].as_str().unwrap(), ids(&case["ids"]));
        assert_eq!(tokenizer.encode(text, true).unwrap(), expected, "{name}");
        assert_eq!(tokenizer.prompt(text).unwrap(), expected, "{name}");
        assert_eq!(tokenizer.decode(&expected, true), text, "{name}");
    }
    assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.add_bos()), (Some(1), Some(2), false));
    assert_eq!(tokenizer.ends(), [0, 2]);
    assert_eq!(tokenizer.vocab_size(), 49_152);
}

/// SHA-256 of the first 3,674 token numbers of the document, u32 little endian, by an independent
/// tokenizer; the last token of the text differs because the book goes on.
const DOCUMENT_IDS: &str = "31631bdf46447079aef94d8a40b66c2c1bb8e9a6d15add54dc06e6acb28caf0d";

#[test]
fn document_matches_golden_ids() {
    let Some(tokenizer) = real() else { return };
    let ids = tokenizer.encode(data::DOCUMENT, false).unwrap();
    let bytes: Vec<u8> = ids[..3674].iter().flat_map(|id| id.to_le_bytes()).collect();
    assert_eq!(format!("{:x}", Sha256::digest(&bytes)), DOCUMENT_IDS);
    assert_eq!((ids.len(), tokenizer.encode(data::HELD, false).unwrap().len()), (3675, 1149));
    assert_eq!(tokenizer.decode(&ids, false), data::DOCUMENT);
    assert!(data::DOCUMENT.contains(data::ANSWER) && !data::QUESTION.contains(data::ANSWER));
}

#[test]
fn special_tokens_are_text_unless_asked_for() {
    let Some(tokenizer) = real() else { return };
    let text = "a<|im_end|>b";
    assert_eq!(tokenizer.encode(text, true).unwrap()[1], 2);
    let plain = tokenizer.encode(text, false).unwrap();
    assert!(!plain.contains(&2));
    assert_eq!(tokenizer.decode(&plain, false), text);
    assert_eq!(tokenizer.decode(&tokenizer.encode(text, true).unwrap(), false), "ab");
}

#[test]
fn any_text_survives_a_round_trip() {
    let Some(tokenizer) = real() else { return };
    let texts = [
        "",
        " ",
        "\n\n  x\t\r\n",
        "12345 a1b2",
        "naïve café — “quotes”",
        "日本語のテキスト",
        "👩‍👩‍👧‍👦 family",
        "I'll we've  don't\u{a0}x",
    ];
    for text in texts {
        let ids = tokenizer.encode(text, true).unwrap();
        assert_eq!(tokenizer.decode(&ids, true), text);
        let mut stream = tokenizer.stream(true);
        let parts: Vec<String> = ids.iter().filter_map(|&id| stream.push(id)).collect();
        assert!(
            parts.iter().all(|part| !part.is_empty() && !part.contains('\u{fffd}')),
            "{parts:?}"
        );
        assert_eq!(parts.concat() + &stream.finish(), text);
    }
}

#[test]
fn stream_holds_incomplete_characters_back() {
    let Some(tokenizer) = real() else { return };
    let ids = tokenizer.encode("👩", true).unwrap();
    assert!(ids.len() > 1, "the test needs a character of several tokens");
    let mut stream = tokenizer.stream(true);
    for &id in &ids[..ids.len() - 1] {
        assert_eq!(stream.push(id), None);
    }
    assert_eq!(stream.push(ids[ids.len() - 1]).as_deref(), Some("👩"));
    let mut cut = tokenizer.stream(true);
    assert_eq!(cut.push(ids[0]), None);
    assert_eq!(cut.push(tokenizer.encode("A", true).unwrap()[0]).as_deref(), Some("\u{fffd}A"));
}
