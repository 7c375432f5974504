//! Vocabulary of a Hugging Face `tokenizer.json`.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::{NormalizerWrapper, PreTokenizerWrapper};

use super::Marks;
use super::build::{Merging, Parts, Prefix, Spelling, Vocabulary};
use super::specials::Special;
use crate::error::{Error, Result};

/// Highest token number accepted.
const MAX_ID: u32 = 1 << 24;

#[derive(Deserialize)]
struct File {
    model: Model,
    #[serde(default)]
    added_tokens: Vec<Added>,
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: Option<PreTokenizerWrapper>,
    #[serde(default)]
    decoder: Value,
    #[serde(default)]
    post_processor: Value,
}

#[derive(Deserialize)]
struct Model {
    #[serde(rename = "type")]
    kind: Option<String>,
    vocab: BTreeMap<String, u32>,
    merges: Vec<Merge>,
    unk_token: Option<String>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    #[serde(default)]
    fuse_unk: bool,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
}

/// A merge as newer and as older files write it.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Line(String),
}

#[derive(Deserialize)]
struct Added {
    id: u32,
    content: String,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    special: bool,
}

pub fn read(text: &str, settings: &[&str]) -> Result<(Vocabulary, Marks)> {
    let mut file: File =
        serde_json::from_str(text).map_err(|e| Error::Tokenizer(format!("tokenizer.json: {e}")))?;
    let affixes = [&file.model.continuing_subword_prefix, &file.model.end_of_word_suffix];
    if affixes.iter().any(|affix| affix.as_ref().is_some_and(|affix| !affix.is_empty())) {
        return Err(Error::Tokenizer(
            "tokenizer.json: word prefixes and suffixes in `model` are not supported".into(),
        ));
    }
    if let Some(kind) = file.model.kind.as_ref().filter(|kind| *kind != "BPE") {
        let kind: String = kind.chars().take(64).collect();
        return Err(Error::Tokenizer(format!(
            "tokenizer.json: model type `{kind}` is not supported (BPE is)"
        )));
    }
    let mut prefix = Prefix::Never;
    if let Some(splitter) = &mut file.pre_tokenizer {
        take_prefix(splitter, &mut prefix);
    }
    let (texts, marks) = (texts(&file)?, marks(&file, settings)?);
    let special = |t: Added| Special {
        text: t.content,
        id: t.id,
        control: t.special,
        left: t.lstrip,
        right: t.rstrip,
    };
    let vocabulary = Vocabulary::new(Parts {
        texts,
        merges: file.model.merges.into_iter().enumerate().map(pair).collect::<Result<_>>()?,
        merging: Merging {
            unknown: file.model.unk_token,
            byte_fallback: file.model.byte_fallback,
            fuse_unknown: file.model.fuse_unk,
            whole_words: file.model.ignore_merges,
        },
        specials: file.added_tokens.into_iter().map(special).collect(),
        spelling: spelling(&file.decoder)?,
        prefix,
        drops_first_space: drops_first_space(&file.decoder),
        normalizer: file.normalizer,
        splitter: file.pre_tokenizer,
    })?;
    Ok((vocabulary, marks))
}

fn pair((index, merge): (usize, Merge)) -> Result<(String, String)> {
    match merge {
        Merge::Pair(left, right) => Ok((left, right)),
        Merge::Line(line) => match line.split_once(' ') {
            Some((left, right)) => Ok((left.to_owned(), right.to_owned())),
            None => Err(Error::Tokenizer(format!("tokenizer.json: merge {index} is no pair"))),
        },
    }
}

/// Token texts by number, from the model's vocabulary and the added tokens.
fn texts(file: &File) -> Result<Vec<Option<String>>> {
    let listed = file.model.vocab.iter().map(|(text, &id)| (text, id));
    let added = file.added_tokens.iter().map(|token| (&token.content, token.id));
    let all: Vec<_> = listed.chain(added).collect();
    let last = all.iter().map(|(_, id)| *id).max().unwrap_or(0);
    // Numbers are dense in practice; a gap as large as the vocabulary is a broken file, not a
    // reason to allocate.
    if last > MAX_ID || last as usize > 4 * all.len() + 1024 {
        let count = all.len();
        return Err(Error::Tokenizer(format!(
            "tokenizer.json: token number {last} with only {count} tokens"
        )));
    }
    let mut texts = vec![None; last as usize + 1];
    for (text, id) in all {
        texts[id as usize] = Some(text.clone());
    }
    Ok(texts)
}

/// Moves the choice of where to put a leading space out of the splitter: it only sees stretches
/// between specials.
fn take_prefix(splitter: &mut PreTokenizerWrapper, prefix: &mut Prefix) {
    match splitter {
        PreTokenizerWrapper::Metaspace(metaspace) => {
            *prefix = match metaspace.get_prepend_scheme() {
                PrependScheme::First => Prefix::First,
                PrependScheme::Never => Prefix::Never,
                PrependScheme::Always => Prefix::Each,
            };
            *metaspace = Metaspace::new(
                metaspace.get_replacement(),
                PrependScheme::Never,
                metaspace.get_split(),
            );
        }
        PreTokenizerWrapper::Sequence(sequence) => {
            sequence.as_mut().iter_mut().for_each(|part| take_prefix(part, prefix));
        }
        _ => {}
    }
}

/// The steps of a decoder, or of any component that may be a sequence.
fn steps<'a>(component: &'a Value, list: &str) -> Vec<&'a Value> {
    match component.get(list).and_then(Value::as_array) {
        Some(steps) => steps.iter().collect(),
        None => vec![component],
    }
}

fn kind(step: &Value) -> &str {
    step.get("type").and_then(Value::as_str).unwrap_or_default()
}

fn spelling(decoder: &Value) -> Result<Spelling> {
    let steps = steps(decoder, "decoders");
    let has = |name: &str| steps.iter().any(|step| kind(step) == name);
    if has("ByteLevel") {
        Ok(Spelling::ByteLevel)
    } else if has("ByteFallback") || has("Metaspace") || has("Replace") {
        Ok(Spelling::SentencePiece)
    } else {
        Err(Error::Tokenizer(
            "tokenizer.json: `decoder` is neither ByteLevel nor of the SentencePiece kind".into(),
        ))
    }
}

fn drops_first_space(decoder: &Value) -> bool {
    steps(decoder, "decoders").iter().any(|step| match kind(step) {
        "Strip" => {
            step.get("content").and_then(Value::as_str) == Some(" ")
                && step.get("start") != Some(&0.into())
        }
        "Metaspace" => step.get("prepend_scheme").and_then(Value::as_str) != Some("never"),
        _ => false,
    })
}

/// Beginning and ending tokens: named or numbered in the settings beside the file, else in its
/// post-processor.
fn marks(file: &File, settings: &[&str]) -> Result<Marks> {
    let parse = |text: &&str| {
        serde_json::from_str(text).map_err(|e| Error::Tokenizer(format!("settings: {e}")))
    };
    let settings = settings.iter().map(parse).collect::<Result<Vec<Value>>>()?;
    let all = |key: &'static str| {
        settings.iter().filter_map(move |s| s.get(key)).filter(|v| !v.is_null())
    };
    let id = |text: &str| {
        let added =
            file.added_tokens.iter().find(|token| token.content == text).map(|token| token.id);
        added.or_else(|| file.model.vocab.get(text).copied())
    };
    let named =
        |value: &Value| value.as_str().or_else(|| value.get("content")?.as_str()).and_then(id);
    let numbered = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    let mut ends: Vec<u32> = all("eos_token").filter_map(named).collect();
    for value in all("eos_token_id") {
        ends.extend(
            value
                .as_array()
                .map_or_else(|| vec![value], |list| list.iter().collect())
                .iter()
                .copied()
                .filter_map(numbered),
        );
    }
    let bos = all("bos_token").find_map(named).or_else(|| all("bos_token_id").find_map(numbered));
    let declared = all("add_bos_token").find_map(Value::as_bool);
    Ok(Marks {
        bos,
        ends,
        add_bos: declared.unwrap_or_else(|| starts_with_special(&file.post_processor)),
    })
}

/// Whether the post-processor's template puts a special token in front of a single text.
fn starts_with_special(post_processor: &Value) -> bool {
    let template = |step: &&Value| kind(step) == "TemplateProcessing";
    let first = steps(post_processor, "processors")
        .into_iter()
        .find(template)
        .and_then(|step| step.get("single")?.get(0));
    first.is_some_and(|first| first.get("SpecialToken").is_some())
}
