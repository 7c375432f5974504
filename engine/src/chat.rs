//! Chat templates: a conversation to the text of a prompt.

mod clock;

use std::path::Path;

use minijinja::{Environment, ErrorKind, context};
use serde::Serialize;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::gguf::Gguf;
use crate::tokenizer::Tokenizer;

/// Instructions a template may execute; those in use need some hundred a message.
const FUEL: u64 = 10_000_000;
/// Stands where a turn goes on; a word, so that templates leave it as it is.
const MARK: &str = "KvwarpGoesOnHere";

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

impl Message {
    /// A message of `role`.
    pub fn new(role: &str, content: &str) -> Self {
        Self { role: role.to_owned(), content: content.to_owned() }
    }
}

/// A compiled template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

impl ChatTemplate {
    /// Compiles a Jinja template as model files carry it; `bos` and `eos` are the texts of those
    /// tokens.
    ///
    /// # Errors
    /// [`Error::Template`] with the line at fault.
    pub fn new(template: &str, bos: &str, eos: &str) -> Result<Self> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_fuel(Some(FUEL));
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function(
            "raise_exception",
            |message: String| -> Result<String, minijinja::Error> {
                Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
            },
        );
        environment
            .add_function("strftime_now", |format: String| clock::format(&format, clock::now()));
        environment.add_template_owned("chat", template.to_owned()).map_err(|e| fault(&e))?;
        Ok(Self { environment, bos: bos.to_owned(), eos: eos.to_owned() })
    }

    /// The template in a GGUF file's metadata, when there is one.
    ///
    /// # Errors
    /// As [`ChatTemplate::new`].
    pub fn from_gguf(file: &Gguf, tokenizer: &Tokenizer) -> Result<Option<Self>> {
        file.text("tokenizer.chat_template")?
            .map(|text| Self::for_tokenizer(text, tokenizer))
            .transpose()
    }

    /// The template of a model folder, when there is one: `chat_template.jinja`, or `chat_template`
    /// in `tokenizer_config.json`.
    ///
    /// # Errors
    /// As [`ChatTemplate::new`], or [`Error::Io`].
    pub fn from_folder(folder: &Path, tokenizer: &Tokenizer) -> Result<Option<Self>> {
        if let Some(text) = read(&folder.join("chat_template.jinja"))? {
            return Self::for_tokenizer(&text, tokenizer).map(Some);
        }
        let path = folder.join("tokenizer_config.json");
        let Some(text) = read(&path)? else { return Ok(None) };
        let settings: Value =
            serde_json::from_str(&text).map_err(|e| Error::Template(e.to_string()).at(&path))?;
        let template = match settings.get("chat_template") {
            Some(Value::Array(named)) => {
                let default =
                    named.iter().find(|t| t.get("name").and_then(Value::as_str) == Some("default"));
                default.and_then(|t| t.get("template")?.as_str())
            }
            Some(template) => template.as_str(),
            None => None,
        };
        template.map(|text| Self::for_tokenizer(text, tokenizer)).transpose()
    }

    fn for_tokenizer(template: &str, tokenizer: &Tokenizer) -> Result<Self> {
        let text = |id: Option<u32>| id.map(|id| tokenizer.token_text(id)).unwrap_or_default();
        Self::new(template, &text(tokenizer.bos()), &text(tokenizer.eos()))
    }

    /// The prompt for a conversation, ending where the assistant is to answer.
    ///
    /// # Errors
    /// [`Error::Template`] with the template's own message when it refuses the conversation.
    pub fn render(&self, messages: &[Message]) -> Result<String> {
        let template = self.environment.get_template("chat").map_err(|e| fault(&e))?;
        let context = context! {
            messages => messages,
            add_generation_prompt => true,
            bos_token => self.bos,
            eos_token => self.eos,
        };
        template.render(context).map_err(|e| fault(&e))
    }

    /// The prompt for a user's turn that begins with `text`, as far as the end of `text`.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`]; [`Error::Template`] where what a user says is not in the prompt.
    pub fn opening(&self, text: &str) -> Result<String> {
        let prompt = self.render(&[Message::new("user", &format!("{text}{MARK}"))])?;
        prompt.rsplit_once(MARK).map(|(opening, _)| opening.to_owned()).ok_or_else(lost)
    }

    /// What follows [`ChatTemplate::opening`] when the turn goes on with `text` and ends.
    ///
    /// # Errors
    /// As [`ChatTemplate::opening`].
    pub fn rest(&self, text: &str) -> Result<String> {
        let prompt = self.render(&[Message::new("user", &format!("{MARK}{text}"))])?;
        prompt.split_once(MARK).map(|(_, rest)| rest.to_owned()).ok_or_else(lost)
    }
}

fn lost() -> Error {
    Error::Template("what a user says is not in the prompt".into())
}

fn read(path: &Path) -> Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io(path, e)),
    }
}

fn fault(error: &minijinja::Error) -> Error {
    let line = error.line().map(|line| format!("line {line}: ")).unwrap_or_default();
    let detail = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    Error::Template(format!("{line}{detail}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(template: &str, messages: &[Message]) -> Result<String> {
        ChatTemplate::new(template, "<s>", "</s>")?.render(messages)
    }

    #[test]
    fn python_methods_and_the_templates_own_refusal() {
        let template = "{{ bos_token }}{% for m in messages %}\n  {%- if m.role not in ['user', 'assistant'] %}\
                        {{ raise_exception('no ' + m.role) }}{% endif %}\n[{{ m['content'].strip().upper() }}]\
                        {% endfor %}{{ eos_token }}";
        assert_eq!(render(template, &[Message::new("user", " hi ")]).unwrap(), "<s>[HI]</s>");
        let refused = render(template, &[Message::new("tool", "x")]).unwrap_err().to_string();
        assert_eq!(refused, "chat template: line 2: no tool");
    }

    #[test]
    fn broken_and_endless_templates_are_errors() {
        let broken = render("a\n{% if %}", &[]).unwrap_err().to_string();
        assert!(broken.starts_with("chat template: line 2: "), "{broken}");
        let nested =
            "{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}";
        assert!(render(nested, &[]).is_err());
    }

    #[test]
    fn a_turn_can_be_cut_anywhere() {
        let chat = ChatTemplate::new(
            "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{{ eos_token }}{% endfor %}[assistant]",
            "<s>",
            "</s>",
        )
        .unwrap();
        let text = format!("one {MARK}");
        let whole =
            chat.render(&[Message::new("user", &format!("{text}\n\ntwo {MARK} "))]).unwrap();
        let parts = (chat.opening(&text).unwrap(), chat.rest(&format!("\n\ntwo {MARK} ")).unwrap());
        assert_eq!(parts.0 + &parts.1, whole);
        let mute = ChatTemplate::new("[user]", "", "").unwrap().opening("x").unwrap_err();
        assert_eq!(mute.to_string(), "chat template: what a user says is not in the prompt");
    }

    #[test]
    fn loops_may_be_left() {
        let template = "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}";
        assert_eq!(
            render(template, &[Message::new("user", "a"), Message::new("user", "b")]).unwrap(),
            "a"
        );
    }
}
