//! What a model is told so that it says a text again (KVzip, arXiv:2505.23416).

use std::ops::Range;

use crate::chat::Message;
use crate::source::Source;

/// Asks for the beginning of a text, and for what follows some tokens of it.
const FIRST: &str = "\n\nRepeat the previous context exactly.";
const NEXT: &str = "\n\nRepeat the part of the previous context exactly, starting with ";
/// Tokens that a later part is said to start with.
const LEAD: usize = 8;

/// The words, as tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repeat {
    first: Vec<u32>,
    next: Vec<u32>,
    /// From the end of the request to the beginning of an answer.
    turn: Vec<u32>,
}

impl Repeat {
    /// In the tokens of a model; where it has a chat template, that begins the answer.
    ///
    /// # Errors
    /// Those of its tokenizer and its template.
    pub fn new(source: &Source) -> crate::error::Result<Self> {
        let tokenizer = source.tokenizer()?;
        let turn = match source.chat(&tokenizer)? {
            Some(chat) => {
                let text = chat.render(&[Message::new("user", FIRST.trim())])?;
                text.rsplit_once(FIRST.trim()).map(|(_, turn)| turn.to_owned()).unwrap_or_default()
            }
            None => String::new(),
        };
        let tokens = |text| tokenizer.encode(text, false);
        Ok(Self {
            first: tokens(FIRST)?,
            next: tokens(NEXT)?,
            turn: tokenizer.encode(&turn, true)?,
        })
    }

    /// What is read to say tokens `part` of `text` again.
    pub fn tokens(&self, text: &[u32], part: Range<usize>) -> Vec<u32> {
        let lead = &text[part.start.saturating_sub(LEAD)..part.start];
        let ask = if part.start == 0 { &self.first } else { &self.next };
        [&ask[..], lead, &self.turn, &text[part]].concat()
    }

    /// Most tokens of [`Repeat::tokens`] for parts of `chunk`.
    pub fn most(&self, chunk: usize) -> usize {
        self.first.len().max(self.next.len() + LEAD) + self.turn.len() + chunk
    }
}
