//! Tokens to text, one token at a time.

use super::Vocabulary;

/// A decoder that gives out whole characters only: bytes of a character that is not complete wait
/// for the next token.
pub struct Stream<'a> {
    vocabulary: &'a Vocabulary,
    special: bool,
    pending: Vec<u8>,
    /// Nothing was decoded yet, so a space that encoding put in front is dropped.
    first: bool,
}

impl<'a> Stream<'a> {
    pub(super) fn new(vocabulary: &'a Vocabulary, special: bool) -> Self {
        Self { vocabulary, special, pending: Vec::new(), first: true }
    }

    /// The text that `id` completes; `None` when it completes none.
    pub fn push(&mut self, id: u32) -> Option<String> {
        if !self.special && self.vocabulary.is_control(id) {
            return None;
        }
        let mut bytes = self.vocabulary.bytes(id);
        if self.first && !bytes.is_empty() {
            self.first = self.vocabulary.is_control(id);
            if self.vocabulary.drops_first_space() && !self.first {
                bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
            }
        }
        self.pending.extend_from_slice(bytes);
        let text = self.complete();
        (!text.is_empty()).then_some(text)
    }

    /// What is left of an incomplete character, as U+FFFD.
    pub fn finish(self) -> String {
        String::from_utf8_lossy(&self.pending).into_owned()
    }

    /// Takes every whole character; bytes that no continuation can mend become U+FFFD.
    fn complete(&mut self) -> String {
        let mut keep = 0;
        if let Some(chunk) = self.pending.utf8_chunks().last() {
            let tail = chunk.invalid();
            // Incomplete rather than wrong: the standard decoder would ask for more bytes.
            if std::str::from_utf8(tail).is_err_and(|e| e.error_len().is_none()) {
                keep = tail.len();
            }
        }
        let rest = self.pending.split_off(self.pending.len() - keep);
        let whole = std::mem::replace(&mut self.pending, rest);
        String::from_utf8_lossy(&whole).into_owned()
    }
}
