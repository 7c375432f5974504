//! The vocabulary shared by both file formats: pair merging, bytes of tokens, special tokens.

use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::{NormalizerWrapper, PreTokenizerWrapper};

use super::specials::{Special, Specials};
use crate::error::{Error, Result};

/// White space of a SentencePiece vocabulary.
pub const SPACE: char = '▁';

/// Where encoding puts a space in front of text that has none of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prefix {
    Never,
    /// In front of the whole text only, unless it starts with white space.
    First,
    /// In front of each stretch between special tokens, unless it starts with white space.
    Each,
    /// In front of each stretch between special tokens, always.
    Always,
}

/// How the texts in a vocabulary spell bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spelling {
    /// One printable character for each byte, as GPT-2 does.
    ByteLevel,
    /// UTF-8 with `▁` for a space, and `<0xNN>` tokens for single bytes.
    SentencePiece,
}

/// Settings of the pair merging.
#[derive(Debug, Default)]
pub struct Merging {
    pub unknown: Option<String>,
    pub byte_fallback: bool,
    pub fuse_unknown: bool,
    /// A word that is a token as a whole is not split even where no merge builds it.
    pub whole_words: bool,
}

/// What a file says about a vocabulary.
pub struct Parts {
    /// Text of every token by number; `None` where numbers are skipped.
    pub texts: Vec<Option<String>>,
    pub merges: Vec<(String, String)>,
    pub merging: Merging,
    pub specials: Vec<Special>,
    pub spelling: Spelling,
    pub prefix: Prefix,
    /// Decoding drops one space in front of the text.
    pub drops_first_space: bool,
    pub normalizer: Option<NormalizerWrapper>,
    pub splitter: Option<PreTokenizerWrapper>,
}

/// A vocabulary ready for use.
pub struct Vocabulary {
    engine: tokenizers::Tokenizer,
    specials: Specials,
    control: Vec<bool>,
    /// Bytes of all tokens one after the other, token `i` at `ends[i - 1]..ends[i]`.
    bytes: Vec<u8>,
    ends: Vec<usize>,
    prefix: Prefix,
    drops_first_space: bool,
}

impl Vocabulary {
    pub fn new(parts: Parts) -> Result<Self> {
        let Parts { texts, merges, merging, specials, spelling, prefix, drops_first_space, .. } =
            parts;
        let specials = Specials::new(specials);
        let mut control = vec![false; texts.len()];
        for id in specials.controls() {
            *control.get_mut(id as usize).ok_or_else(|| outside(id, texts.len()))? = true;
        }
        let (mut bytes, mut ends) = (Vec::new(), Vec::with_capacity(texts.len()));
        for (id, text) in texts.iter().enumerate() {
            match text {
                Some(text) if specials.id(text) == Some(id as u32) => {
                    bytes.extend_from_slice(text.as_bytes())
                }
                Some(text) => spell(text, spelling, &mut bytes),
                None => {}
            }
            ends.push(bytes.len());
        }
        let mut engine = tokenizers::Tokenizer::new(bpe(texts, merges, merging)?);
        engine.with_normalizer(parts.normalizer).map_err(|e| Error::Tokenizer(e.to_string()))?;
        engine.with_pre_tokenizer(parts.splitter);
        Ok(Self { engine, specials, control, bytes, ends, prefix, drops_first_space })
    }

    pub fn len(&self) -> usize {
        self.ends.len()
    }

    pub fn specials(&self) -> &Specials {
        &self.specials
    }

    pub fn is_control(&self, id: u32) -> bool {
        self.control.get(id as usize).copied().unwrap_or(false)
    }

    pub fn drops_first_space(&self) -> bool {
        self.drops_first_space
    }

    pub fn bytes(&self, id: u32) -> &[u8] {
        let Some(&end) = self.ends.get(id as usize) else { return &[] };
        let start = if id == 0 { 0 } else { self.ends[id as usize - 1] };
        &self.bytes[start..end]
    }

    /// Appends the tokens of text without special tokens; `first` when nothing stands before it.
    pub fn encode_plain(&self, text: &str, first: bool, ids: &mut Vec<u32>) -> Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        let spaced = text.starts_with([' ', SPACE]);
        let prefixed = match self.prefix {
            Prefix::Never => false,
            Prefix::First => first && !spaced,
            Prefix::Each => !spaced,
            Prefix::Always => true,
        };
        let encoded = if prefixed {
            self.engine.encode_fast(format!(" {text}"), false)
        } else {
            self.engine.encode_fast(text, false)
        };
        let encoded =
            encoded.map_err(|e| Error::Tokenizer(format!("cannot encode the text: {e}")))?;
        ids.extend_from_slice(encoded.get_ids());
        Ok(())
    }
}

fn outside(id: u32, size: usize) -> Error {
    Error::Tokenizer(format!("special token {id} lies outside the vocabulary of {size}"))
}

/// The pair merger. The merges are checked first: the crate relies on both parts and their union
/// being tokens.
fn bpe(texts: Vec<Option<String>>, merges: Vec<(String, String)>, merging: Merging) -> Result<BPE> {
    let size = texts.len();
    let pairs = texts.into_iter().enumerate().filter_map(|(id, text)| Some((text?, id as u32)));
    let vocab: Vocab = pairs.collect();
    if vocab.is_empty() {
        return Err(Error::Tokenizer(format!("none of {size} tokens has a text")));
    }
    let mut whole = String::new();
    for (index, (left, right)) in merges.iter().enumerate() {
        whole.clear();
        whole.extend([left.as_str(), right.as_str()]);
        if let Some(part) =
            [left, right, &whole].into_iter().find(|part| !vocab.contains_key(*part))
        {
            let part: String = part.chars().take(64).collect();
            return Err(Error::Tokenizer(format!(
                "merge {index} uses `{part}`, which is no token"
            )));
        }
    }
    let mut builder = BPE::builder()
        .vocab_and_merges(vocab, merges)
        .byte_fallback(merging.byte_fallback)
        .fuse_unk(merging.fuse_unknown)
        .ignore_merges(merging.whole_words);
    if let Some(unknown) = merging.unknown {
        builder = builder.unk_token(unknown);
    }
    builder.build().map_err(|e| Error::Tokenizer(e.to_string()))
}

/// Appends the bytes that the text of a token stands for.
fn spell(text: &str, spelling: Spelling, bytes: &mut Vec<u8>) {
    match spelling {
        Spelling::ByteLevel => {
            for c in text.chars() {
                match byte_of(c) {
                    Some(byte) => bytes.push(byte),
                    None => bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
                }
            }
        }
        Spelling::SentencePiece => match fallback_byte(text) {
            Some(byte) => bytes.push(byte),
            None => bytes.extend_from_slice(text.replace(SPACE, " ").as_bytes()),
        },
    }
}

/// The byte that a `<0xNN>` token stands for.
fn fallback_byte(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// The byte behind a character of the byte-level alphabet: printable Latin-1 stands for itself, the
/// other 68 bytes for U+0100 and up, in ascending order.
fn byte_of(c: char) -> Option<u8> {
    let printable = |code: u32| matches!(code, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    match u32::from(c) {
        code if printable(code) => Some(code as u8),
        code @ 0x100..=0x143 => {
            (0..=255).filter(|&b| !printable(u32::from(b))).nth(code as usize - 0x100)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_level_alphabet_covers_every_byte_once() {
        let mut seen: Vec<u8> = (0u32..0x200).filter_map(|c| byte_of(char::from_u32(c)?)).collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..=255).collect::<Vec<u8>>());
        assert_eq!(byte_of('Ġ'), Some(b' '));
        assert_eq!(byte_of('Ċ'), Some(b'\n'));
        assert_eq!(byte_of('ł'), Some(0xa0));
        assert_eq!(byte_of('Ń'), Some(0xad));
    }
}
