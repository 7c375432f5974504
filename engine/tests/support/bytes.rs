//! A tiny model whose vocabulary is the bytes.

use std::path::Path;

use serde_json::{Map, json};

use super::program::fixture;

/// Puts it into a folder, with a chat template.
pub fn model(folder: &Path) {
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(Path::new(&fixture("llama3")).join(name), folder.join(name)).unwrap();
    }
    // Bytes that are no printable Latin-1 have letters from U+0100 on, in order.
    let (mut vocab, mut next) = (Map::new(), 0x100..);
    for byte in 0..=255u8 {
        let plain = matches!(byte, 33..=126 | 161..=172 | 174..=255);
        let code = if plain { u32::from(byte) } else { next.next().unwrap() };
        vocab.insert(char::from_u32(code).unwrap().to_string(), byte.into());
    }
    let level = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false
    });
    let tokenizer = json!({
        "model": { "type": "BPE", "vocab": vocab, "merges": [] },
        "pre_tokenizer": level,
        "decoder": level,
    });
    let template =
        "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}";
    std::fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(folder.join("chat_template.jinja"), template).unwrap();
}
