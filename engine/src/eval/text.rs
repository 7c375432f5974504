//! Texts: what windows are taken from, and what documents are made of.

use std::collections::BTreeMap;

use sha2::{Digest, Sha256};

use super::EvalError;
use crate::data;
use crate::error::Error;
use crate::tokenizer::Tokenizer;

/// Sentences that say nothing, as in the first pass key tests (Mohtashami and Jaggi, arXiv:2305.16300).
pub const GRASS: &str =
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. ";

/// Texts by name, in tokens and in sentences.
pub struct Texts(BTreeMap<String, Text>);

struct Text {
    tokens: Vec<u32>,
    /// Each with its tokens; together they are the text.
    sentences: Vec<(String, usize)>,
}

impl Texts {
    /// Names of those that come with the program.
    pub const NAMES: [&'static str; 2] = ["grass", "novel"];

    /// Those that come with the program.
    ///
    /// # Errors
    /// [`Error::Tokenizer`].
    pub fn new(tokenizer: &Tokenizer) -> Result<Self, Error> {
        let mut texts = Self(BTreeMap::new());
        texts.put("grass", GRASS, tokenizer)?;
        texts.put("novel", &format!("{}\n\n{}", data::DOCUMENT, data::HELD), tokenizer)?;
        Ok(texts)
    }

    /// Adds a text of someone's own; returns its name, a hash of what it says.
    ///
    /// # Errors
    /// [`Error::Tokenizer`].
    pub fn add(&mut self, text: &str, tokenizer: &Tokenizer) -> Result<String, Error> {
        let hash = format!("{:x}", Sha256::digest(text));
        let name = format!("sha256-{}", &hash[..16]);
        self.put(&name, text, tokenizer)?;
        Ok(name)
    }

    fn put(&mut self, name: &str, text: &str, tokenizer: &Tokenizer) -> Result<(), Error> {
        let count =
            |sentence: String| Ok((sentence.clone(), tokenizer.encode(&sentence, false)?.len()));
        let tokens = tokenizer.encode(text, false)?;
        let sentences = sentences(text).map(count).collect::<Result<_, Error>>()?;
        self.0.insert(name.to_owned(), Text { tokens, sentences });
        Ok(())
    }

    /// Tokens of a text.
    ///
    /// # Errors
    /// [`EvalError::Unknown`].
    pub fn tokens(&self, name: &str) -> Result<&[u32], EvalError> {
        Ok(&self.get(name)?.tokens)
    }

    fn get(&self, name: &str) -> Result<&Text, EvalError> {
        self.0.get(name).ok_or_else(|| EvalError::Unknown(name.to_owned()))
    }

    /// As many sentences of a text as have at most `tokens` tokens, from sentence `first` on and from the beginning again
    /// after the last; each with its tokens.
    ///
    /// # Errors
    /// [`EvalError::Unknown`].
    pub fn filler(
        &self,
        name: &str,
        first: usize,
        tokens: usize,
    ) -> Result<Vec<(&str, usize)>, EvalError> {
        let sentences = &self.get(name)?.sentences;
        let (mut taken, mut sum) = (Vec::new(), 0);
        let endless = sentences.iter().cycle().skip(first % sentences.len().max(1));
        for (sentence, n) in endless {
            sum += n.max(&1);
            if sum > tokens {
                break;
            }
            taken.push((sentence.as_str(), *n));
        }
        Ok(taken)
    }
}

/// A text cut where sentences end, white space included.
fn sentences(text: &str) -> impl Iterator<Item = String> {
    let (mut parts, mut current, mut ended) = (Vec::new(), String::new(), false);
    for c in text.chars() {
        if ended && !c.is_whitespace() && current.ends_with(char::is_whitespace) {
            parts.push(std::mem::take(&mut current));
            ended = false;
        }
        ended = matches!(c, '.' | '!' | '?') || ended && !c.is_alphanumeric();
        current.push(c);
    }
    parts.push(current);
    parts.into_iter().filter(|part| !part.is_empty())
}
