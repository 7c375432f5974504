//! Texts that come with the program, for trying a cache without a document at hand.

/// A document: chapter 1 of Jane Austen's *Persuasion*, 3,675 tokens of SmolLM2.
pub const DOCUMENT: &str = include_str!("../data/persuasion_1.txt");

/// A question about [`DOCUMENT`].
pub const QUESTION: &str = "Answer in one sentence: What is the name of Sir Walter Elliot's house?";

/// The word that a right answer to [`QUESTION`] contains.
pub const ANSWER: &str = "Kellynch";

/// A text to measure log-perplexity on: the beginning of chapter 2, 1,149 tokens of SmolLM2.
pub const HELD: &str = include_str!("../data/persuasion_2.txt");
