//! Vocabulary of a GGUF file: `tokenizer.ggml.*`.

use std::collections::HashMap;

use tokenizers::normalizers::NFC;
use tokenizers::normalizers::replace::Replace;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior};

use super::Marks;
use super::build::{Merging, Parts, Prefix, SPACE, Spelling, Vocabulary};
use super::specials::Special;
use crate::error::{Error, Result};
use crate::gguf::Gguf;

/// Token types of the format.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER: i32 = 4;

/// Bytes of the longest piece for which merges are derived; no vocabulary in use comes near.
const MAX_PIECE: usize = 128;

/// How a pre-tokenizer named in a file splits and merges.
struct Style {
    splitter: PreTokenizerWrapper,
    normalizer: Option<NormalizerWrapper>,
    whole_words: bool,
    add_bos: bool,
}

pub fn read(file: &Gguf) -> Result<(Vocabulary, Marks)> {
    let (parts, marks) = parts(file)?;
    Ok((Vocabulary::new(parts)?, marks))
}

/// What the file says.
pub fn parts(file: &Gguf) -> Result<(Parts, Marks)> {
    let texts =
        file.texts("tokenizer.ggml.tokens")?.ok_or_else(|| missing("tokenizer.ggml.tokens"))?;
    let kinds = file.ints("tokenizer.ggml.token_type")?;
    if let Some(kinds) = kinds.filter(|kinds| kinds.len() != texts.len()) {
        let (found, need) = (kinds.len(), texts.len());
        return Err(Error::Tokenizer(format!(
            "tokenizer.ggml.token_type has {found} elements for {need} tokens"
        )));
    }
    let kind = |id: usize| kinds.map_or(NORMAL, |kinds| kinds[id]);
    let model =
        file.text("tokenizer.ggml.model")?.ok_or_else(|| missing("tokenizer.ggml.model"))?;
    let (mut parts, add_bos) = match model {
        "gpt2" => byte_level(file)?,
        "llama" => sentence_piece(file, texts, kind)?,
        other => {
            let name: String = other.chars().take(64).collect();
            return Err(Error::Tokenizer(format!(
                "tokenizer.ggml.model `{name}` is not supported (gpt2 and llama are)"
            )));
        }
    };
    parts.texts = texts.iter().cloned().map(Some).collect();
    parts.specials = specials(texts, kind);
    let marks = marks(file, add_bos)?;
    Ok((parts, marks))
}

fn missing(key: &str) -> Error {
    Error::Tokenizer(format!("the GGUF metadata has no `{key}`"))
}

fn specials(texts: &[String], kind: impl Fn(usize) -> i32) -> Vec<Special> {
    let special = |(id, text): (usize, &String)| {
        let kind = kind(id);
        matches!(kind, UNKNOWN | CONTROL | USER).then(|| Special {
            text: text.clone(),
            id: id as u32,
            control: kind != USER,
            left: false,
            right: false,
        })
    };
    texts.iter().enumerate().filter_map(special).collect()
}

fn marks(file: &Gguf, add_bos: bool) -> Result<Marks> {
    let id = |name: &str| -> Result<Option<u32>> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        let narrow = |id: u64| {
            id.try_into().map_err(|_| Error::Tokenizer(format!("`{key}` is {id}, beyond 32 bits")))
        };
        file.uint(&key)?.map(narrow).transpose()
    };
    let ends = [id("eos")?, id("eot")?, id("eom")?];
    Ok(Marks {
        bos: id("bos")?,
        ends: ends.into_iter().flatten().collect(),
        add_bos: file.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(add_bos),
    })
}

/// A byte-level vocabulary with listed merges.
fn byte_level(file: &Gguf) -> Result<(Parts, bool)> {
    let style = style(file.text("tokenizer.ggml.pre")?.unwrap_or("gpt-2"))?;
    let listed =
        file.texts("tokenizer.ggml.merges")?.ok_or_else(|| missing("tokenizer.ggml.merges"))?;
    let merges = listed.iter().enumerate().map(|(index, merge)| {
        let (left, right) =
            merge.split_once(' ').filter(|(left, _)| !left.is_empty()).ok_or_else(|| {
                let merge: String = merge.chars().take(64).collect();
                Error::Tokenizer(format!(
                    "tokenizer.ggml.merges: entry {index} `{merge}` is no pair"
                ))
            })?;
        Ok((left.to_owned(), right.to_owned()))
    });
    let parts = Parts {
        texts: Vec::new(),
        merges: merges.collect::<Result<_>>()?,
        merging: Merging { whole_words: style.whole_words, ..Merging::default() },
        specials: Vec::new(),
        spelling: Spelling::ByteLevel,
        prefix: Prefix::Never,
        drops_first_space: false,
        normalizer: style.normalizer,
        splitter: Some(style.splitter),
    };
    Ok((parts, style.add_bos))
}

fn style(name: &str) -> Result<Style> {
    // The contractions, a word with at most one leading sign, digits, signs, line ends, blanks;
    // only the digits differ.
    let words = |digits: &str| {
        format!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
    };
    let plain = ByteLevel::new(false, true, true);
    Ok(match name {
        "gpt-2" | "default" => {
            Style { splitter: plain.into(), normalizer: None, whole_words: false, add_bos: false }
        }
        "smollm" => {
            let splitter = Sequence::new(vec![Digits::new(true).into(), plain.into()]).into();
            Style { splitter, normalizer: None, whole_words: false, add_bos: false }
        }
        "llama-bpe" | "llama3" | "llama-v3" => {
            let splitter = pattern(words(r"\p{N}{1,3}"))?;
            Style { splitter, normalizer: None, whole_words: true, add_bos: true }
        }
        "qwen2" => {
            let splitter = pattern(words(r"\p{N}"))?;
            Style { splitter, normalizer: Some(NFC.into()), whole_words: false, add_bos: false }
        }
        other => {
            let name: String = other.chars().take(64).collect();
            let supported = "gpt-2, smollm, llama-bpe and qwen2 are";
            return Err(Error::Tokenizer(format!(
                "tokenizer.ggml.pre `{name}` is not supported ({supported})"
            )));
        }
    })
}

/// Splits by a pattern, then spells the pieces in the byte-level alphabet.
fn pattern(pattern: String) -> Result<PreTokenizerWrapper> {
    let split = Split::new(SplitPattern::Regex(pattern), SplitDelimiterBehavior::Isolated, false);
    let split = split.map_err(|e| Error::Tokenizer(e.to_string()))?;
    Ok(Sequence::new(vec![split.into(), ByteLevel::new(false, true, false).into()]).into())
}

/// A SentencePiece vocabulary of the pair-merging kind: scores instead of listed merges.
fn sentence_piece(
    file: &Gguf,
    texts: &[String],
    kind: impl Fn(usize) -> i32,
) -> Result<(Parts, bool)> {
    let scores =
        file.floats("tokenizer.ggml.scores")?.ok_or_else(|| missing("tokenizer.ggml.scores"))?;
    if scores.len() != texts.len() {
        let (found, need) = (scores.len(), texts.len());
        return Err(Error::Tokenizer(format!(
            "tokenizer.ggml.scores has {found} elements for {need} tokens"
        )));
    }
    let unknown = match file.uint("tokenizer.ggml.unknown_token_id")? {
        Some(id) => texts.get(usize::try_from(id).unwrap_or(usize::MAX)).cloned(),
        None => (0..texts.len()).find(|&id| kind(id) == UNKNOWN).map(|id| texts[id].clone()),
    };
    let prefixed = file.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let spaces = Replace::new(" ", SPACE).map_err(|e| Error::Tokenizer(e.to_string()))?;
    let parts = Parts {
        texts: Vec::new(),
        merges: derived_merges(texts, scores, kind),
        merging: Merging { unknown, byte_fallback: true, fuse_unknown: true, whole_words: false },
        specials: Vec::new(),
        spelling: Spelling::SentencePiece,
        prefix: if prefixed { Prefix::Always } else { Prefix::Never },
        drops_first_space: prefixed,
        normalizer: Some(spaces.into()),
        splitter: None,
    };
    Ok((parts, true))
}

/// Every way to build a piece from two others, best piece first: merging by rank then equals
/// merging by score.
fn derived_merges(
    texts: &[String],
    scores: &[f32],
    kind: impl Fn(usize) -> i32,
) -> Vec<(String, String)> {
    let normal = texts.iter().enumerate().filter(|(id, _)| kind(*id) == NORMAL);
    let pieces: HashMap<&str, usize> = normal.map(|(id, text)| (text.as_str(), id)).collect();
    let mut merges = Vec::new();
    for (&piece, &id) in pieces.iter().filter(|(piece, _)| piece.len() <= MAX_PIECE) {
        for (at, _) in piece.char_indices().skip(1) {
            let (left, right) = piece.split_at(at);
            if let (Some(&l), Some(&r)) = (pieces.get(left), pieces.get(right)) {
                merges.push((scores[id], id, l, r));
            }
        }
    }
    merges.sort_unstable_by(|a, b| {
        b.0.total_cmp(&a.0).then_with(|| (a.1, a.2, a.3).cmp(&(b.1, b.2, b.3)))
    });
    merges.into_iter().map(|(_, _, l, r)| (texts[l].clone(), texts[r].clone())).collect()
}
