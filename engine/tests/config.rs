//! Model configurations from both kinds of file.

mod support;

use kvwarp_engine::config::{Arch, Config, Pairing, Scaling};
use kvwarp_engine::{error::Result, gguf};
use serde_json::{Value, json};
use support::Meta;

fn fixture(name: &str) -> Value {
    let path = format!("{}/tests/fixtures/{name}/config.json", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn parse(value: &Value) -> Result<Config> {
    Config::from_json(&value.to_string())
}

#[test]
fn hugging_face_families() {
    let llama = parse(&fixture("llama3")).unwrap();
    assert_eq!((llama.arch, llama.layers, llama.width, llama.ffn), (Arch::Llama, 2, 96, 160));
    assert_eq!((llama.heads, llama.kv_heads, llama.head_dim, llama.group()), (3, 1, 64, 3));
    assert_eq!((llama.vocab, llama.context, llama.rms_eps), (256, 512, 1e-5));
    assert_eq!(llama.rope.pairing, Pairing::HalfSplit);
    assert_eq!(
        llama.rope.scaling,
        Scaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 64.0
        }
    );
    assert!(!llama.tied_embeddings && !llama.qkv_bias && llama.sliding_window.is_none());

    let mistral = parse(&fixture("mistral")).unwrap();
    assert_eq!((mistral.arch, mistral.sliding_window), (Arch::Mistral, Some(24)));
    assert_eq!(mistral.rope.theta, 1000.0);

    let qwen = parse(&fixture("qwen2")).unwrap();
    assert_eq!((qwen.arch, qwen.sliding_window, qwen.rope.theta), (Arch::Qwen2, None, 1e6));
    assert!(qwen.tied_embeddings && qwen.qkv_bias);

    let linear = parse(&fixture("llama_linear")).unwrap();
    assert_eq!(linear.rope.scaling, Scaling::Linear { factor: 4.0 });
    assert_eq!((linear.head_dim, linear.kv_heads), (64, 2));
}

#[test]
fn qwen2_window_depends_on_the_layer() {
    let mut config = fixture("qwen2");
    config["use_sliding_window"] = json!(true);
    for (first, expected) in [(0, Some(24)), (2, None)] {
        config["max_window_layers"] = json!(first);
        assert_eq!(parse(&config).unwrap().sliding_window, expected);
    }
    config["max_window_layers"] = json!(1);
    let message = parse(&config).unwrap_err().to_string();
    assert_eq!(
        message,
        "config: `max_window_layers` is 1 of 2: a window on some layers only is not supported"
    );
}

/// Each change to a good configuration, and what its error must say.
#[test]
fn unsupported_fields_are_named() {
    for (field, value, expected) in [
        (
            "architectures",
            json!(["MixtralForCausalLM"]),
            "`architectures` is `MixtralForCausalLM`, not supported",
        ),
        ("architectures", json!(null), "config.json has no `architectures`"),
        ("head_dim", json!(80), "head size 80 is not supported (64, 96, 128 and 256 are)"),
        ("num_key_value_heads", json!(2), "3 query heads are no multiple of 2"),
        ("num_hidden_layers", json!(0), "`num_hidden_layers` is 0, expected 1 to"),
        ("hidden_size", json!(-1), "`hidden_size` is -1, expected a whole number"),
        ("hidden_size", json!(null), "config.json has no `hidden_size`"),
        ("hidden_act", json!("gelu"), "`hidden_act` is `gelu`, only silu is supported"),
        ("attention_bias", json!(true), "`attention_bias` is true"),
        ("partial_rotary_factor", json!(0.5), "`partial_rotary_factor` is 0.5"),
        ("num_local_experts", json!(8), "`num_local_experts` is 8"),
        ("rms_norm_eps", json!(0.0), "RMS norm epsilon 0 lies outside"),
        ("rope_theta", json!(-1.0), "rope base -1 is not above 1"),
        (
            "rope_scaling",
            json!({"rope_type": "yarn", "factor": 4.0}),
            "`rope_scaling.rope_type` is `yarn`",
        ),
        ("rope_scaling", json!({"type": "linear"}), "config.json has no `rope_scaling.factor`"),
        ("rope_scaling", json!({"type": "linear", "factor": 0}), "rope scaling `factor` is 0"),
    ] {
        let mut config = fixture("llama3");
        config[field] = value;
        let message = parse(&config).unwrap_err().to_string();
        assert!(message.contains(expected), "{field}: {message}");
    }
}

/// Reads a small GGUF model, its metadata changed by `edit`, with `tensors` beside the embedding.
fn from_gguf(
    arch: &str,
    edit: impl FnOnce(&mut Vec<(String, Meta)>),
    tensors: &[support::Tensor],
) -> Result<Config> {
    let mut metadata = support::model_metadata(arch);
    edit(&mut metadata);
    let mut all = vec![support::zeros("token_embd.weight", &[128, 300])];
    all.extend_from_slice(tensors);
    let bytes = support::gguf(&metadata, &all);
    Config::from_gguf(&gguf::parse(&bytes).unwrap(), &bytes)
}

#[test]
fn gguf_families() {
    let llama = from_gguf("llama", |_| {}, &[]).unwrap();
    assert_eq!((llama.arch, llama.rope.pairing), (Arch::Llama, Pairing::Interleaved));
    assert_eq!(
        (llama.layers, llama.width, llama.heads, llama.kv_heads, llama.head_dim),
        (1, 128, 2, 1, 64)
    );
    assert_eq!((llama.ffn, llama.vocab, llama.context), (64, 300, 256));
    assert_eq!((llama.rope.theta, llama.rms_eps), (5e4, 1e-5));
    assert!(llama.tied_embeddings && !llama.qkv_bias);

    let tensors =
        [support::zeros("output.weight", &[128, 300]), support::zeros("blk.0.attn_q.bias", &[128])];
    let qwen = from_gguf("qwen2", |_| {}, &tensors).unwrap();
    assert_eq!((qwen.arch, qwen.rope.pairing), (Arch::Qwen2, Pairing::HalfSplit));
    assert!(!qwen.tied_embeddings && qwen.qkv_bias);

    let data = (1..=32).flat_map(|n| (n as f32).to_le_bytes()).collect();
    let factors = support::Tensor { data, ..support::zeros("rope_freqs.weight", &[32]) };
    let stretched = from_gguf("llama", |_| {}, &[factors]).unwrap();
    assert_eq!(stretched.rope.factors.unwrap()[31], 32.0);
}

#[test]
fn unsupported_metadata_is_named() {
    let message = |key: &str, value: Meta| {
        let set = |list: &mut Vec<(String, Meta)>| {
            list.retain(|(k, _)| k != key);
            list.push((key.to_owned(), value));
        };
        from_gguf("llama", set, &[]).unwrap_err().to_string()
    };
    for (key, value, expected) in [
        (
            "general.architecture",
            Meta::Text("gemma".into()),
            "architecture `gemma` is not supported",
        ),
        (
            "llama.rope.scaling.type",
            Meta::Text("yarn".into()),
            "`llama.rope.scaling.type` is `yarn`",
        ),
        ("llama.expert_count", Meta::U32(8), "`llama.expert_count` is 8"),
        ("llama.attention.key_length", Meta::U32(32), "head size 32 is not supported"),
        ("llama.rope.dimension_count", Meta::U32(32), "`llama.rope.dimension_count` is 32"),
        ("llama.block_count", Meta::U32(0), "`llama.block_count` is 0, expected 1 to"),
        ("llama.block_count", Meta::Text("x".into()), "`llama.block_count` is a string of 1 bytes"),
        ("llama.attention.head_count_kv", Meta::I32s(vec![1, 2]), "differs from layer to layer"),
    ] {
        let message = message(key, value);
        assert!(message.contains(expected), "{key}: {message}");
    }
    let norm = support::zeros("blk.0.attn_q_norm.weight", &[64]);
    let refused = from_gguf("llama", |_| {}, &[norm]).unwrap_err().to_string();
    assert_eq!(
        refused,
        "config: tensor `blk.0.attn_q_norm.weight`: query and key norms are not supported"
    );
}

#[test]
fn the_real_model() {
    let Some(path) = support::real_model() else { return };
    let bytes = std::fs::read(path).unwrap();
    let config = Config::from_gguf(&gguf::parse(&bytes).unwrap(), &bytes).unwrap();
    assert_eq!((config.layers, config.width, config.ffn, config.vocab), (30, 576, 1536, 49_152));
    assert_eq!((config.heads, config.kv_heads, config.head_dim, config.context), (9, 3, 64, 8192));
    assert_eq!((config.rope.theta, config.rms_eps, config.tied_embeddings), (1e5, 1e-5, true));
}
