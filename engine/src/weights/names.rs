//! Names of tensors in Hugging Face folders.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use crate::error::{Error, Result};

/// Our name and theirs, outside and inside a block.
const MODEL: [(&str, &str); 3] =
    [("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];
const BLOCK: [(&str, &str); 12] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_kv_a", "self_attn.kv_a_proj"),
    ("attn_k_b", "self_attn.k_b_proj"),
    ("attn_v_b", "self_attn.v_b_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];
/// Biases that the supported models have.
const BIASES: [&str; 5] = ["attn_q", "attn_k", "attn_v", "attn_k_b", "attn_v_b"];

/// Our name of a tensor; `None` for one that holds nothing of its own.
///
/// # Errors
/// For a tensor that no supported model has: leaving it out would change the model.
pub fn ours(theirs: &str) -> Result<Option<String>> {
    if theirs.ends_with(".rotary_emb.inv_freq") {
        return Ok(None);
    }
    let name = known(theirs).ok_or_else(|| {
        let shown: String = theirs.chars().take(128).collect();
        let normalised = [".q_norm.", ".k_norm."].iter().any(|part| theirs.contains(part));
        let why = if normalised { "; it normalises queries or keys" } else { "" };
        Error::Weights(format!(
            "tensor `{shown}` is no part of a supported model (Llama, Mistral, Qwen2){why}"
        ))
    })?;
    Ok(Some(name))
}

fn known(theirs: &str) -> Option<String> {
    let (stem, bias) = match theirs.strip_suffix(".weight") {
        Some(stem) => (stem, false),
        None => (theirs.strip_suffix(".bias")?, true),
    };
    if let Some((ours, _)) = MODEL.iter().find(|(_, theirs)| *theirs == stem) {
        return (!bias).then(|| (*ours).to_owned());
    }
    let (block, part) = stem.strip_prefix("model.layers.")?.split_once('.')?;
    let block: u32 = block.parse().ok()?;
    let (ours, _) = BLOCK.iter().find(|(_, theirs)| *theirs == part)?;
    match bias {
        false => Some(format!("blk.{block}.{ours}")),
        true => BIASES.contains(ours).then(|| format!("blk.{block}.{ours}.bias")),
    }
}

/// The name that our `name` has in a folder.
pub fn theirs(name: &str) -> String {
    let (stem, suffix) = name.strip_suffix(".bias").map_or((name, "weight"), |stem| (stem, "bias"));
    if let Some((_, theirs)) = MODEL.iter().find(|(ours, _)| *ours == stem) {
        return format!("{theirs}.{suffix}");
    }
    let part = |stem: &str| {
        let (block, part) = stem.strip_prefix("blk.")?.split_once('.')?;
        let (_, theirs) = BLOCK.iter().find(|(ours, _)| *ours == part)?;
        Some(format!("model.layers.{block}.{theirs}.{suffix}"))
    };
    part(stem).unwrap_or_else(|| name.to_owned())
}

/// File names in an index, each with the tensors it must hold.
pub fn shards(text: &str) -> Result<BTreeMap<String, BTreeSet<String>>> {
    let json: Value =
        serde_json::from_str(text).map_err(|e| Error::Safetensors(format!("index: {e}")))?;
    let map = json.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| Error::Safetensors("the index has no `weight_map`".into()))?;
    let mut shards: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (tensor, file) in map {
        // A bare file name: an index must not lead out of its folder.
        let file = file
            .as_str()
            .filter(|file| file.ends_with(".safetensors") && !file.contains(['/', '\\']));
        let file = file.ok_or_else(|| {
            let tensor: String = tensor.chars().take(128).collect();
            Error::Safetensors(format!(
                "`weight_map` of `{tensor}` is no plain name of a .safetensors file"
            ))
        })?;
        shards.entry(file.to_owned()).or_default().insert(tensor.clone());
    }
    Ok(shards)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_map_both_ways() {
        for (ours_name, theirs_name) in [
            ("token_embd", "model.embed_tokens.weight"),
            ("output", "lm_head.weight"),
            ("blk.11.ffn_down", "model.layers.11.mlp.down_proj.weight"),
            ("blk.0.attn_v.bias", "model.layers.0.self_attn.v_proj.bias"),
        ] {
            assert_eq!(ours(theirs_name).unwrap().as_deref(), Some(ours_name));
            assert_eq!(theirs(ours_name), theirs_name);
        }
        assert_eq!(ours("model.layers.3.self_attn.rotary_emb.inv_freq").unwrap(), None);
        for strange in [
            "model.layers.0.self_attn.q_norm.weight",
            "model.layers.0.self_attn.o_proj.bias",
            "lm_head.bias",
        ] {
            assert!(ours(strange).unwrap_err().to_string().contains(strange));
        }
        let normed = ours("model.layers.0.self_attn.k_norm.weight").unwrap_err().to_string();
        assert!(normed.ends_with("it normalises queries or keys"), "{normed}");
    }

    #[test]
    fn an_index_cannot_leave_its_folder() {
        let index =
            |file: &str| shards(&format!(r#"{{"weight_map": {{"a": "{file}", "b": "{file}"}}}}"#));
        assert_eq!(index("x.safetensors").unwrap()["x.safetensors"].len(), 2);
        for file in ["../x.safetensors", "/etc/passwd", "x.bin"] {
            assert!(index(file).unwrap_err().to_string().contains("`weight_map` of `a`"));
        }
    }
}
