//! Text to tokens and back, from a GGUF file's own vocabulary or from a `tokenizer.json`.
//!
//! The `tokenizers` crate splits text and merges pairs. Special tokens are cut out of the text
//! before that, so they can be recognised or not call by call and never merge with their
//! neighbours; decoding works on the bytes of each token.

mod build;
mod files;
mod gguf;
mod hf;
mod specials;
mod stream;

use std::path::Path;

use crate::error::{Error, Result};
use build::Vocabulary;
pub(crate) use files::files;
pub use stream::Stream;

/// Texts of tokens that end a turn or a document in the chat formats in use.
const END_TEXTS: [&str; 9] = [
    "<|endoftext|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "<|eot|>",
    "<end_of_turn>",
    "</s>",
];

/// A vocabulary with everything needed to encode and decode.
pub struct Tokenizer {
    vocabulary: Vocabulary,
    bos: Option<u32>,
    eos: Option<u32>,
    ends: Vec<u32>,
    add_bos: bool,
}

/// The tokens that a file names for the beginning and the end of a text.
struct Marks {
    bos: Option<u32>,
    /// Ending tokens; the first is the main one.
    ends: Vec<u32>,
    add_bos: bool,
}

impl Tokenizer {
    /// From the metadata of a GGUF file.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] naming the key and what is supported; [`Error::Gguf`] when a key has
    /// the wrong type.
    pub fn from_gguf(file: &crate::gguf::Gguf) -> Result<Self> {
        let (vocabulary, marks) = gguf::read(file)?;
        Self::new(vocabulary, marks)
    }

    /// From the text of a `tokenizer.json`, and of the settings beside it (`tokenizer_config.json`,
    /// `generation_config.json`, `config.json`; the first that has a key wins).
    ///
    /// # Errors
    /// [`Error::Tokenizer`] naming the field and what is supported.
    pub fn from_json(text: &str, settings: &[&str]) -> Result<Self> {
        let (vocabulary, marks) = hf::read(text, settings)?;
        Self::new(vocabulary, marks)
    }

    /// From a model folder with a `tokenizer.json`.
    ///
    /// # Errors
    /// [`Error::Io`] when a file cannot be read, else as [`Tokenizer::from_json`].
    pub fn from_folder(folder: &Path) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
        let mut settings = Vec::new();
        for name in ["tokenizer_config.json", "generation_config.json", "config.json"] {
            let path = folder.join(name);
            match std::fs::read_to_string(&path) {
                Ok(text) => settings.push(text),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                Err(e) => return Err(Error::io(&path, e)),
            }
        }
        let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
        Self::from_json(&text, &settings).map_err(|e| e.at(&path))
    }

    fn new(vocabulary: Vocabulary, marks: Marks) -> Result<Self> {
        let size = vocabulary.len() as u32;
        let known = |text: &&str| vocabulary.specials().id(text);
        let eos = marks.ends.first().copied();
        let mut ends = marks.ends;
        ends.extend(END_TEXTS.iter().filter_map(known));
        ends.sort_unstable();
        ends.dedup();
        if let Some(id) = ends.iter().chain(&marks.bos).find(|id| **id >= size) {
            return Err(Error::Tokenizer(format!(
                "token {id} marks a beginning or an end; the vocabulary has {size}"
            )));
        }
        Ok(Self {
            vocabulary,
            bos: marks.bos,
            eos,
            ends,
            add_bos: marks.add_bos && marks.bos.is_some(),
        })
    }

    /// Tokens of `text`. With `special`, the texts of special tokens become those tokens; without
    /// it they are plain text. Nothing is put before or after: see [`Tokenizer::add_bos`].
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the splitting pattern gives up on the text.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        self.cut(text, special, true)
    }

    /// Tokens of `text` that goes on from other text, special tokens recognised: no space is put before it where one is
    /// put before a first word.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn continued(&self, text: &str) -> Result<Vec<u32>> {
        self.cut(text, true, false)
    }

    /// Tokens of `text`, which begins a text or not.
    fn cut(&self, text: &str, special: bool, begins: bool) -> Result<Vec<u32>> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        let mut from = 0;
        while let Some(found) = self.vocabulary.specials().find(text, from, special) {
            self.vocabulary.encode_plain(
                &text[from..found.start],
                begins && from == 0,
                &mut ids,
            )?;
            ids.push(found.id);
            from = found.end;
        }
        self.vocabulary.encode_plain(&text[from..], begins && from == 0, &mut ids)?;
        Ok(ids)
    }

    /// Text of `ids`; special tokens are shown when `special` and left out otherwise. Bytes that
    /// are no UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32], special: bool) -> String {
        let mut stream = self.stream(special);
        let mut text: String = ids.iter().filter_map(|&id| stream.push(id)).collect();
        text.push_str(&stream.finish());
        text
    }

    /// A decoder that takes one token at a time.
    pub fn stream(&self, special: bool) -> Stream<'_> {
        Stream::new(&self.vocabulary, special)
    }

    /// Bytes that a token stands for; empty for a number outside the vocabulary.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.vocabulary.bytes(id)
    }

    /// A token's bytes as text, those that are no UTF-8 replaced by U+FFFD.
    pub fn token_text(&self, id: u32) -> String {
        String::from_utf8_lossy(self.token_bytes(id)).into_owned()
    }

    /// The special token with exactly this text.
    pub fn special_id(&self, text: &str) -> Option<u32> {
        self.vocabulary.specials().id(text)
    }

    /// Tokens in the vocabulary.
    pub fn vocab_size(&self) -> usize {
        self.vocabulary.len()
    }

    /// The token that begins a text.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The token that the file names as the end of a text.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Every token that ends generation, ascending: end of text, of turn, of message.
    pub fn ends(&self) -> &[u32] {
        &self.ends
    }

    /// Whether `id` ends generation.
    pub fn is_end(&self, id: u32) -> bool {
        self.ends.binary_search(&id).is_ok()
    }

    /// Whether a prompt that does not bring it must start with [`Tokenizer::bos`].
    pub fn add_bos(&self) -> bool {
        self.add_bos
    }

    /// Tokens of a whole prompt: special tokens recognised, and the beginning token put first where
    /// the model wants it and the text does not already have it.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn prompt(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.encode(text, true)?;
        match self.bos {
            Some(bos) if self.add_bos && ids.first() != Some(&bos) => ids.insert(0, bos),
            _ => {}
        }
        Ok(ids)
    }
}
