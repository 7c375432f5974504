//! Small vocabularies of every supported kind against independent implementations.

mod support;

use kvwarp_engine::{gguf, tokenizer::Tokenizer};
use serde_json::{Value, json};
use support::Meta;

fn fixture(name: &str) -> Value {
    let path = format!("{}/tests/fixtures/vocab/{name}", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn numbers(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as u32).collect()
}

fn texts(value: &Value) -> Vec<String> {
    value.as_array().unwrap().iter().map(|s| s.as_str().unwrap().to_owned()).collect()
}

fn from_metadata(list: Vec<(&str, Meta)>) -> kvwarp_engine::error::Result<Tokenizer> {
    let list: Vec<_> =
        list.into_iter().map(|(key, value)| (format!("tokenizer.ggml.{key}"), value)).collect();
    Tokenizer::from_gguf(&gguf::parse(&support::gguf(&list, &[])).unwrap())
}

fn sentence_piece(fixture: &Value) -> Vec<(&'static str, Meta)> {
    let scores = fixture["scores"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32);
    let kinds =
        fixture["token_type"].as_array().unwrap().iter().map(|n| n.as_i64().unwrap() as i32);
    vec![
        ("model", Meta::Text("llama".into())),
        ("tokens", Meta::Texts(texts(&fixture["tokens"]))),
        ("scores", Meta::F32s(scores.collect())),
        ("token_type", Meta::I32s(kinds.collect())),
        ("bos_token_id", Meta::U32(1)),
        ("eos_token_id", Meta::U32(2)),
    ]
}

#[test]
fn sentence_piece_matches() {
    let fixture = fixture("spm.json");
    let tokenizer = from_metadata(sentence_piece(&fixture)).unwrap();
    for case in fixture["answers"].as_array().unwrap() {
        let (text, expected) = (case["text"].as_str().unwrap(), numbers(&case["ids"]));
        assert_eq!(tokenizer.encode(text, false).unwrap(), expected, "{text:?}");
        assert_eq!(tokenizer.decode(&expected, false), text);
    }
    assert!(tokenizer.add_bos(), "the default of this kind");
    assert_eq!(tokenizer.prompt("x").unwrap()[0], 1);
    assert_eq!(tokenizer.prompt("<s>x").unwrap()[..2], tokenizer.prompt("x").unwrap()[..2]);
    assert!(tokenizer.is_end(2));
}

/// The GGUF metadata that says the same as a byte-level `tokenizer.json`.
fn byte_level(tokenizer: &Value, pre: &str) -> Vec<(&'static str, Meta)> {
    let added = tokenizer["added_tokens"].as_array().unwrap();
    let count = tokenizer["model"]["vocab"].as_object().unwrap().len();
    let size =
        added.iter().map(|t| t["id"].as_u64().unwrap() as usize + 1).max().unwrap().max(count);
    let (mut tokens, mut kinds) = (vec![String::new(); size], vec![1; size]);
    for (text, id) in tokenizer["model"]["vocab"].as_object().unwrap() {
        tokens[id.as_u64().unwrap() as usize] = text.clone();
    }
    for token in added {
        let id = token["id"].as_u64().unwrap() as usize;
        tokens[id] = token["content"].as_str().unwrap().to_owned();
        kinds[id] = if token["special"] == json!(true) { 3 } else { 4 };
    }
    let merges = tokenizer["model"]["merges"].as_array().unwrap();
    let merges = merges.iter().map(|pair| texts(pair).join(" ")).collect();
    vec![
        ("model", Meta::Text("gpt2".into())),
        ("pre", Meta::Text(pre.into())),
        ("tokens", Meta::Texts(tokens)),
        ("token_type", Meta::I32s(kinds)),
        ("merges", Meta::Texts(merges)),
    ]
}

#[test]
fn tokenizer_json_and_gguf_match() {
    for (name, pre) in [("llama3.json", "llama-bpe"), ("qwen2.json", "qwen2")] {
        let fixture = fixture(name);
        let text = fixture["tokenizer"].to_string();
        let settings =
            json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": true});
        let json = Tokenizer::from_json(&text, &[&settings.to_string()]).unwrap();
        let gguf = from_metadata(byte_level(&fixture["tokenizer"], pre)).unwrap();
        for case in fixture["answers"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let (special, plain) = (numbers(&case["ids"]), numbers(&case["plain"]));
            assert_eq!(json.encode(text, true).unwrap(), special, "{name} {text:?}");
            assert_eq!(json.encode(text, false).unwrap(), plain, "{name} {text:?}");
            if !text.contains("<mask>") {
                // GGUF has no way to say that `<mask>` swallows the space before it.
                assert_eq!(gguf.encode(text, true).unwrap(), special, "{name} {text:?}");
                assert_eq!(gguf.encode(text, false).unwrap(), plain, "{name} {text:?}");
            }
            let shown = json.decode(&plain, false);
            assert!(
                shown == text || text.contains("e\u{301}") || text.contains("<mask>"),
                "{name} {shown:?}"
            );
        }
        let (bos, eos) = (json.special_id("<s>"), json.special_id("</s>"));
        assert_eq!((json.bos(), json.eos(), json.add_bos()), (bos, eos, true));
        assert!(json.is_end(json.special_id("<|end|>").unwrap()) && json.is_end(eos.unwrap()));
        assert_eq!(json.prompt("a").unwrap()[0], bos.unwrap());
    }
}

#[test]
fn sentence_piece_in_tokenizer_json_matches() {
    for name in ["prepend.json", "metaspace.json"] {
        let fixture = fixture(name);
        let tokenizer = Tokenizer::from_json(&fixture["tokenizer"].to_string(), &[]).unwrap();
        for case in fixture["answers"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let (special, plain) = (numbers(&case["ids"]), numbers(&case["plain"]));
            assert_eq!(tokenizer.encode(text, true).unwrap(), special, "{name} {text:?}");
            assert_eq!(tokenizer.encode(text, false).unwrap(), plain, "{name} {text:?}");
        }
        let text = "Sir Walter Elliot, né 1760";
        assert_eq!(tokenizer.decode(&tokenizer.encode(text, false).unwrap(), false), text);
    }
}

#[test]
fn the_template_of_the_post_processor_asks_for_bos() {
    let mut fixture = fixture("llama3.json")["tokenizer"].take();
    let bos = json!([{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]);
    let template =
        json!({"type": "TemplateProcessing", "single": bos, "pair": [], "special_tokens": {}});
    fixture["post_processor"] = json!({"type": "Sequence", "processors": [template]});
    let settings = json!({"bos_token": "<s>"}).to_string();
    assert!(Tokenizer::from_json(&fixture.to_string(), &[&settings]).unwrap().add_bos());
    let refused = json!({"bos_token": "<s>", "add_bos_token": false}).to_string();
    assert!(!Tokenizer::from_json(&fixture.to_string(), &[&refused]).unwrap().add_bos());
}

#[test]
fn broken_vocabularies_are_explained() {
    let spm = fixture("spm.json");
    let refusal = |key: &str, value: Option<Meta>| {
        let mut list = sentence_piece(&spm);
        list.retain(|(k, _)| *k != key);
        let key = ["model", "scores", "token_type", "eos_token_id", "pre", "merges", "tokens"]
            .into_iter()
            .find(|k| *k == key);
        list.extend(value.map(|value| (key.unwrap(), value)));
        from_metadata(list).err().unwrap().to_string()
    };
    let text = |text: &str| Some(Meta::Text(text.into()));
    assert!(
        refusal("model", text("bert"))
            .contains("tokenizer.ggml.model `bert` is not supported (gpt2 and llama are)")
    );
    assert!(refusal("model", text("gpt2")).contains("no `tokenizer.ggml.merges`"));
    assert!(refusal("tokens", None).contains("no `tokenizer.ggml.tokens`"));
    assert!(
        refusal("scores", Some(Meta::F32s(vec![1.0])))
            .contains("scores has 1 elements for 700 tokens")
    );
    assert!(
        refusal("token_type", Some(Meta::I32s(vec![1])))
            .contains("token_type has 1 elements for 700 tokens")
    );
    assert!(
        refusal("eos_token_id", Some(Meta::U32(700)))
            .contains("token 700 marks a beginning or an end")
    );

    let json = fixture("qwen2.json")["tokenizer"].clone();
    let mut list = byte_level(&json, "falcon");
    assert!(
        from_metadata(list.clone())
            .err()
            .unwrap()
            .to_string()
            .contains("tokenizer.ggml.pre `falcon`")
    );
    list[1].1 = Meta::Text("qwen2".into());
    list[4].1 = Meta::Texts(vec!["a zz".into()]);
    assert!(
        from_metadata(list)
            .err()
            .unwrap()
            .to_string()
            .contains("merge 0 uses `zz`, which is no token")
    );

    let refusal = |field: &str, value: Value| {
        let mut json = json.clone();
        *json.pointer_mut(field).unwrap() = value;
        Tokenizer::from_json(&json.to_string(), &[]).err().unwrap().to_string()
    };
    assert!(
        refusal("/model/type", json!("Unigram"))
            .contains("model type `Unigram` is not supported (BPE is)")
    );
    assert!(
        refusal("/added_tokens/0/id", json!(4_000_000_000u32))
            .contains("token number 4000000000 with only")
    );
    assert!(refusal("/decoder", json!({"type": "WordPiece"})).contains("`decoder` is neither"));
    assert!(refusal("/model/merges", json!([["a", "zz"]])).contains("merge 0 uses `zz`"));
}
