//! Lines of a file of prompts.

use std::collections::HashMap;
use std::sync::Arc;

use kvwarp::sample::Sampling;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::batch::Request;
use crate::chat::{ChatTemplate, Message};
use crate::cli::Usage;
use crate::runner::Choice;
use crate::tokenizer::Tokenizer;

/// What a line that does not say otherwise gets.
pub struct Defaults {
    pub max_tokens: usize,
    pub choice: Choice,
    pub drafts: usize,
}

/// Turns lines into requests.
pub struct Reader<'a> {
    pub tokenizer: &'a Tokenizer,
    pub chat: Option<&'a ChatTemplate>,
    pub defaults: Defaults,
}

/// A line: the name that its answer gets, and the request, whose `id` is its place among the lines.
pub struct Line {
    pub id: Value,
    pub request: Request,
}

const FIELDS: [&str; 10] = [
    "id",
    "prompt",
    "messages",
    "max_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repeat_penalty",
    "seed",
];

impl Reader<'_> {
    /// Every line of `text`; empty ones are passed over. Ids are different.
    pub fn lines(&self, name: &str, text: &str) -> Result<Vec<Line>, Usage> {
        let (mut lines, mut seen) = (Vec::new(), HashMap::new());
        let given = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        for (i, line) in given {
            let (number, place) = (i + 1, lines.len() as u64);
            let at = |problem: String| Usage(format!("{name}, line {number}: {problem}"));
            let line = self.line(number, place, line).map_err(at)?;
            if let Some(first) = seen.insert(line.id.to_string(), number) {
                let id = &line.id;
                return Err(at(format!("`id` is {id}, which is that of line {first}")));
            }
            lines.push(line);
        }
        Ok(lines)
    }

    fn line(&self, number: usize, place: u64, line: &str) -> Result<Line, String> {
        let mut fields: Map<String, Value> =
            serde_json::from_str(line).map_err(|e| format!("not a JSON object: {e}"))?;
        if let Some(name) = fields.keys().find(|name| !FIELDS.contains(&name.as_str())) {
            return Err(format!("`{name}` is no field; there are {}", FIELDS.join(", ")));
        }
        let id = match fields.remove("id") {
            None => number.into(),
            Some(id @ (Value::String(_) | Value::Number(_))) => id,
            Some(_) => return Err("`id` is neither a string nor a number".into()),
        };
        let prompt = self.prompt(&mut fields)?;
        let Defaults { max_tokens, ref choice, drafts } = self.defaults;
        let Choice { sampling, seed, last } = *choice;
        let sampling = Sampling {
            temperature: take(&mut fields, "temperature")?.unwrap_or(sampling.temperature),
            top_k: take(&mut fields, "top_k")?.unwrap_or(sampling.top_k),
            top_p: take(&mut fields, "top_p")?.unwrap_or(sampling.top_p),
            min_p: take(&mut fields, "min_p")?.unwrap_or(sampling.min_p),
            repeat_penalty: take(&mut fields, "repeat_penalty")?.unwrap_or(sampling.repeat_penalty),
        };
        sampling.check().map_err(|e| e.to_string())?;
        let seed = take(&mut fields, "seed")?.unwrap_or(seed.wrapping_add(number as u64));
        let request = Request {
            id: place,
            prompt: self.tokenizer.prompt(&prompt).map_err(|e| e.to_string())?,
            max_tokens: take(&mut fields, "max_tokens")?.unwrap_or(max_tokens),
            choice: Choice { sampling, seed, last },
            stop: Arc::from(self.tokenizer.ends()),
            drafts,
        };
        Ok(Line { id, request })
    }

    /// The text of `prompt`, or of `messages` in the model's chat template.
    fn prompt(&self, fields: &mut Map<String, Value>) -> Result<String, String> {
        let messages: Option<Vec<HashMap<String, String>>> = take(fields, "messages")?;
        let Some(messages) = messages else {
            return take(fields, "prompt")?.ok_or("`prompt` or `messages` is missing".into());
        };
        if fields.contains_key("prompt") {
            return Err("`prompt` and `messages` exclude each other".into());
        }
        let message =
            |fields: &HashMap<String, String>| match (fields.get("role"), fields.get("content")) {
                (Some(role), Some(content)) if fields.len() == 2 => Ok(Message::new(role, content)),
                _ => Err("`messages` is a list of objects with `role` and `content`"),
            };
        let messages = messages.iter().map(message).collect::<Result<Vec<_>, _>>()?;
        let chat = self.chat.ok_or("`messages`: this model has no chat template")?;
        chat.render(&messages).map_err(|e| format!("`messages`: {e}"))
    }
}

/// A field's value, if it is there.
fn take<T: DeserializeOwned>(
    fields: &mut Map<String, Value>,
    name: &str,
) -> Result<Option<T>, String> {
    let value = fields.remove(name).map(serde_json::from_value).transpose();
    value.map_err(|e| format!("`{name}`: {e}"))
}
