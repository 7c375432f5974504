//! What is hidden in documents, how it is asked for, and what an answer is worth.
//!
//! A prompt ends with the words before the payload, so that a model that only continues texts answers, too. A small model
//! sometimes goes on in prose ("a very important piece of information"); that says little about its cache, and is counted
//! apart from wrong digits.

use rand::RngExt;
use rand::rngs::ChaCha8Rng;
use rand::seq::{IndexedRandom, SliceRandom};
use serde::{Deserialize, Serialize};

/// How a document with one number begins.
pub const WARNING: &str = "There is a pass key hidden in this text. Remember it.\n";
/// How one with several begins.
pub const WARNINGS: &str = "There are pass keys hidden in this text. Remember them.\n";
/// Characters of an answer that are kept.
const SAID: usize = 160;

const NAMES: [&str; 12] = [
    "Alice", "Bruno", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Irene", "Jacob",
    "Laura", "Martin",
];
const CITIES: [&str; 12] = [
    "Paris", "Rome", "London", "Cairo", "Tokyo", "Madrid", "Berlin", "Moscow", "Athens", "Vienna",
    "Dublin", "Lisbon",
];
const LOOKS: [&str; 12] = [
    "red", "golden", "wooden", "broken", "tiny", "heavy", "silver", "purple", "ancient", "soft",
    "striped", "hollow",
];
const THINGS: [&str; 16] = [
    "piano", "spoon", "lantern", "umbrella", "compass", "violin", "basket", "mirror", "bottle",
    "anchor", "candle", "helmet", "ladder", "pillow", "whistle", "carpet",
];

/// What an answer must contain.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Payload {
    /// Digits that it must begin with.
    Key(String),
    /// Words, anywhere.
    Words([&'static str; 4]),
}

/// Something hidden.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Secret {
    /// What the document says.
    pub fact: String,
    /// What is asked, up to the payload.
    pub question: String,
    /// The rest of a right answer.
    pub answer: String,
    payload: Payload,
}

/// How an answer compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It is right, without a slip.
    Found,
    /// It is of the right kind, and wrong.
    Wrong,
    /// It has no digits where a number was asked for.
    Prose,
}

/// What was answered, and its worth.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// Right or not.
    pub verdict: Verdict,
    /// Share of the number's digits before the first slip, or of the words that came back.
    pub share: f64,
    /// Its beginning.
    pub said: String,
}

/// A number of `digits` digits.
pub fn digits(digits: usize, rng: &mut ChaCha8Rng) -> String {
    (0..digits).map(|_| char::from(b'0' + rng.random_range(0..10u8))).collect()
}

impl Secret {
    /// A pass key.
    pub fn key(key: &str) -> Self {
        Self::named(key, "")
    }

    /// `n` pass keys of `digits` digits, each of its own name; at most 12.
    pub fn keys(n: usize, digits: usize, rng: &mut ChaCha8Rng) -> Vec<Self> {
        let mut names = NAMES;
        names.shuffle(rng);
        let names = names.into_iter().take(n);
        names.map(|name| Self::named(&self::digits(digits, rng), &format!(" of {name}"))).collect()
    }

    fn named(key: &str, of: &str) -> Self {
        Self {
            fact: format!("The pass key{of} is {key}. Remember it. {key} is the pass key{of}.\n"),
            question: format!("What is the pass key{of}? The pass key{of} is"),
            answer: format!(" {key}"),
            payload: Payload::Key(key.to_owned()),
        }
    }

    /// A sentence with four words that nothing else suggests.
    pub fn sentence(rng: &mut ChaCha8Rng) -> Self {
        let city = CITIES.choose(rng).unwrap_or(&CITIES[0]);
        let (mut looks, mut things) = (LOOKS, THINGS);
        looks.shuffle(rng);
        things.shuffle(rng);
        let words = [looks[0], things[0], looks[1], things[1]];
        let answer = format!(" {} {} and a {} {}", words[0], words[1], words[2], words[3]);
        Self {
            fact: format!("In {city}, the traveller hid a{answer}.\n"),
            question: format!(
                "What did the traveller hide in {city}? In {city}, the traveller hid a"
            ),
            answer,
            payload: Payload::Words(words),
        }
    }

    /// What an answer is worth.
    pub fn judge(&self, said: &str) -> Answer {
        let (verdict, share) = match &self.payload {
            Payload::Key(key) => judge_key(key, said),
            Payload::Words(words) => judge_words(words, said),
        };
        Answer { verdict, share, said: said.chars().take(SAID).collect() }
    }
}

fn judge_key(key: &str, said: &str) -> (Verdict, f64) {
    let said = said.trim_start_matches(|c: char| !c.is_alphanumeric());
    let right = said.bytes().zip(key.bytes()).take_while(|(a, b)| a == b).count();
    let more = said.as_bytes().get(right).is_some_and(u8::is_ascii_digit);
    let verdict = match right == key.len() && !more {
        true => Verdict::Found,
        false if said.starts_with(|c: char| c.is_ascii_digit()) => Verdict::Wrong,
        false => Verdict::Prose,
    };
    (verdict, right as f64 / key.len().max(1) as f64)
}

fn judge_words(words: &[&str], said: &str) -> (Verdict, f64) {
    let said = said.to_lowercase();
    let said: Vec<_> = said.split(|c: char| !c.is_alphanumeric()).collect();
    let back = words.iter().filter(|word| said.contains(word)).count();
    let verdict = if back == words.len() { Verdict::Found } else { Verdict::Wrong };
    (verdict, back as f64 / words.len() as f64)
}
