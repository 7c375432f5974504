//! The real model's chat template.

mod support;

use kvwarp_engine::chat::Message;
use kvwarp_engine::source::Source;
use serde_json::Value;

#[test]
fn user_message_becomes_the_golden_prompt() {
    let Some(path) = support::real_model() else { return };
    let source = Source::open(&path).unwrap();
    let tokenizer = source.tokenizer().unwrap();
    let chat = source.chat(&tokenizer).unwrap().unwrap();
    let golden: Value = serde_json::from_str(include_str!("golden/prompts.json")).unwrap();
    let question = "Explain in three sentences why the sky is blue.";
    let prompt = chat.render(&[Message::new("user", question)]).unwrap();
    assert_eq!(prompt, golden["chat_sky"]["text"].as_str().unwrap());

    let talk =
        [Message::new("system", "S"), Message::new("user", "U"), Message::new("assistant", "A")];
    let expected = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n\
                    <|im_start|>assistant\nA<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(chat.render(&talk).unwrap(), expected);
}
