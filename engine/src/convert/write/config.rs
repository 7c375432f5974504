//! The small files of a converted model.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::config::{Config, Scaling};
use crate::error::{Error, Result};
use crate::source::Source;
use crate::tokenizer;

/// Files of a folder that say how text becomes tokens and how a conversation is written down.
const CARRIED: [&str; 9] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
];

/// Names and contents.
pub fn files(source: &Source, staged: &Source) -> Result<Vec<(&'static str, Vec<u8>)>> {
    let mut files = match source.gguf_header() {
        Some(header) => tokenizer::files(header)?,
        None => carried(source.path())?,
    };
    let mut config = match source.gguf_header() {
        Some(_) => written(&staged.config),
        None => original(source.path())?,
    };
    // Numbers and strings only.
    config.insert("elitekv".into(), json!(staged.config.elite));
    files.push(("config.json", format!("{:#}\n", Value::Object(config)).into_bytes()));
    Ok(files)
}

fn carried(folder: &Path) -> Result<Vec<(&'static str, Vec<u8>)>> {
    let mut files = Vec::new();
    for name in CARRIED {
        let path = folder.join(name);
        match std::fs::read(&path) {
            Ok(bytes) => files.push((name, bytes)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(Error::io(&path, e)),
        }
    }
    Ok(files)
}

fn original(folder: &Path) -> Result<Map<String, Value>> {
    let path = folder.join("config.json");
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
    serde_json::from_str(&text).map_err(|e| Error::Config(e.to_string()).at(&path))
}

/// The `config.json` of a model that had none. Llama and Qwen2 differ in their biases only; pairs are of the half pairing
/// now, be they so in the source or not.
fn written(config: &Config) -> Map<String, Value> {
    let (architecture, kind) = match config.qkv_bias {
        true => ("Qwen2ForCausalLM", "qwen2"),
        false => ("LlamaForCausalLM", "llama"),
    };
    let scaling = match config.rope.scaling {
        Scaling::None => Value::Null,
        Scaling::Linear { factor } => json!({ "rope_type": "linear", "factor": factor }),
        Scaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": original_context as u64,
        }),
    };
    let fields = json!({
        "architectures": [architecture],
        "model_type": kind,
        "_name_or_path": config.name,
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn,
        "vocab_size": config.vocab,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.rms_eps,
        "rope_theta": config.rope.theta,
        "rope_scaling": scaling,
        "sliding_window": config.sliding_window,
        "use_sliding_window": config.sliding_window.is_some(),
        "max_window_layers": 0,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tied_embeddings,
    });
    match fields {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}
