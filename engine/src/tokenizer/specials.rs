//! Special tokens in text: leftmost match, longest first.

use std::collections::HashMap;

/// A token that is matched as a whole before any splitting.
#[derive(Debug, Clone)]
pub struct Special {
    pub text: String,
    pub id: u32,
    /// Recognised only when the caller asks for special tokens.
    pub control: bool,
    /// Swallows white space before it.
    pub left: bool,
    /// Swallows white space after it.
    pub right: bool,
}

/// Where a special token stands, swallowed white space included.
pub struct Found {
    pub start: usize,
    pub end: usize,
    pub id: u32,
}

/// The special tokens of a vocabulary.
pub struct Specials {
    tokens: Vec<Special>,
    ids: HashMap<String, u32>,
    /// For each first byte, the tokens that start with it, longest first.
    by_byte: Vec<Vec<u32>>,
}

impl Specials {
    /// `tokens` with empty texts are dropped: they would match everywhere.
    pub fn new(mut tokens: Vec<Special>) -> Self {
        tokens.retain(|token| !token.text.is_empty());
        tokens.sort_by_key(|token| std::cmp::Reverse(token.text.len()));
        let mut by_byte = vec![Vec::new(); 256];
        for (index, token) in tokens.iter().enumerate() {
            by_byte[usize::from(token.text.as_bytes()[0])].push(index as u32);
        }
        let ids = tokens.iter().map(|token| (token.text.clone(), token.id)).collect();
        Self { tokens, ids, by_byte }
    }

    /// The token with exactly this text.
    pub fn id(&self, text: &str) -> Option<u32> {
        self.ids.get(text).copied()
    }

    /// Whether a token is hidden from decoded text unless asked for.
    pub fn controls(&self) -> impl Iterator<Item = u32> + '_ {
        self.tokens.iter().filter(|token| token.control).map(|token| token.id)
    }

    /// The first special token in `text` at or after byte `from`.
    pub fn find(&self, text: &str, from: usize, control: bool) -> Option<Found> {
        let bytes = text.as_bytes();
        for start in from..bytes.len() {
            let candidates =
                self.by_byte[usize::from(bytes[start])].iter().map(|&i| &self.tokens[i as usize]);
            let matches = |t: &&Special| {
                (control || !t.control) && bytes[start..].starts_with(t.text.as_bytes())
            };
            if let Some(token) = candidates.into_iter().find(matches) {
                return Some(token.widened(text, from, start));
            }
        }
        None
    }
}

impl Special {
    fn widened(&self, text: &str, from: usize, start: usize) -> Found {
        let end = start + self.text.len();
        let before = if self.left { text[from..start].trim_end().len() + from } else { start };
        let after = if self.right { text.len() - text[end..].trim_start().len() } else { end };
        Found { start: before, end: after, id: self.id }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn special(text: &str, id: u32, control: bool, left: bool, right: bool) -> Special {
        Special { text: text.into(), id, control, left, right }
    }

    #[test]
    fn longest_leftmost_and_only_when_asked() {
        let specials = Specials::new(vec![
            special("<a>", 1, true, false, false),
            special("<a><b>", 2, true, false, false),
            special("<user>", 3, false, false, false),
            special("<mask>", 4, false, true, true),
            special("", 5, false, false, false),
        ]);
        let find = |text, from, control| {
            specials.find(text, from, control).map(|f| (f.start, f.end, f.id))
        };
        assert_eq!(find("x<a><b>", 0, true), Some((1, 7, 2)));
        assert_eq!(find("x<a><b>", 0, false), None);
        assert_eq!(find("x<a> <user>", 0, false), Some((5, 11, 3)));
        assert_eq!(find("x<a> <user>", 2, true), Some((5, 11, 3)));
        assert_eq!(find("x  <mask> \ny", 0, false), Some((1, 11, 4)));
        assert_eq!(find("é<a>", 0, true), Some((2, 5, 1)));
    }
}
