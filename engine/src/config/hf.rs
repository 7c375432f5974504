//! Hugging Face `config.json` to [`Config`].

use serde_json::{Map, Value};

use super::{Arch, Config, Elite, Pairing, Rope, Scaling, extent};
use crate::error::{Error, Result};

/// A JSON object, with the path to it for messages.
struct Fields<'a> {
    map: &'a Map<String, Value>,
    path: &'a str,
}

pub fn config(text: &str) -> Result<Config> {
    let json: Value =
        serde_json::from_str(text).map_err(|e| Error::Config(format!("config.json: {e}")))?;
    let map =
        json.as_object().ok_or_else(|| Error::Config("config.json is no JSON object".into()))?;
    let fields = Fields { map, path: "" };
    let arch = arch(&fields)?;
    fields.refuse_unsupported()?;
    let (heads, width) = (fields.extent("num_attention_heads")?, fields.extent("hidden_size")?);
    let layers = fields.extent("num_hidden_layers")?;
    let context = fields.extent("max_position_embeddings")?;
    let elite = Elite::from_json(map, layers)?;
    let mut rope = rope(&fields, context)?;
    rope.factors = elite.as_ref().and_then(|elite| elite.factors.clone());
    Ok(Config {
        arch,
        name: fields.text("_name_or_path")?.unwrap_or_default().to_owned(),
        layers,
        width,
        heads,
        kv_heads: fields.optional_extent("num_key_value_heads")?.unwrap_or(heads),
        head_dim: head_dim(&fields, width, heads)?,
        ffn: fields.extent("intermediate_size")?,
        vocab: fields.extent("vocab_size")?,
        context,
        rms_eps: fields.number("rms_norm_eps")?.unwrap_or(1e-6) as f32,
        rope,
        sliding_window: sliding_window(&fields, arch, layers)?,
        tied_embeddings: fields.flag("tie_word_embeddings")?.unwrap_or(false),
        qkv_bias: arch == Arch::Qwen2,
        elite,
    })
}

fn arch(fields: &Fields) -> Result<Arch> {
    let name = match fields.map.get("architectures").and_then(|list| list.get(0)) {
        Some(name) => name.as_str().unwrap_or_default(),
        None => return Err(missing("architectures")),
    };
    match name {
        "LlamaForCausalLM" => Ok(Arch::Llama),
        "MistralForCausalLM" => Ok(Arch::Mistral),
        "Qwen2ForCausalLM" => Ok(Arch::Qwen2),
        other => {
            let supported = "LlamaForCausalLM, MistralForCausalLM and Qwen2ForCausalLM are";
            Err(Error::Config(format!(
                "`architectures` is `{}`, not supported ({supported})",
                cut(other)
            )))
        }
    }
}

fn missing(field: &str) -> Error {
    Error::Config(format!("config.json has no `{field}`"))
}

/// The beginning of a string from the file, short enough for a message.
fn cut(text: &str) -> String {
    text.chars().take(64).collect()
}

fn head_dim(fields: &Fields, width: usize, heads: usize) -> Result<usize> {
    match fields.optional_extent("head_dim")? {
        Some(given) => Ok(given),
        None if width.is_multiple_of(heads) => Ok(width / heads),
        None => {
            Err(Error::Config(format!("`hidden_size` {width} is no multiple of {heads} heads")))
        }
    }
}

/// `rope_theta` and `rope_scaling`, or both inside `rope_parameters` in newer files.
fn rope(fields: &Fields, context: usize) -> Result<Rope> {
    let newer = fields.object("rope_parameters")?;
    let scaling = match &newer {
        Some(object) => object.scaling(context)?,
        None => fields
            .object("rope_scaling")?
            .map_or(Ok(Scaling::None), |object| object.scaling(context))?,
    };
    let theta = match newer.map(|object| object.number("rope_theta")).transpose()?.flatten() {
        Some(theta) => theta,
        None => fields.number("rope_theta")?.unwrap_or(1e4),
    };
    Ok(Rope { theta: theta as f32, pairing: Pairing::HalfSplit, scaling, factors: None })
}

/// The window when every layer has it. Qwen2 gives it to layers from `max_window_layers` on, and
/// only when told to.
fn sliding_window(fields: &Fields, arch: Arch, layers: usize) -> Result<Option<usize>> {
    let window = fields.optional_extent("sliding_window")?;
    if arch != Arch::Qwen2 {
        return Ok(window);
    }
    if !fields.flag("use_sliding_window")?.unwrap_or(false) {
        return Ok(None);
    }
    match fields.uint("max_window_layers")?.unwrap_or(28) {
        0 => Ok(window),
        first if first >= layers as u64 => Ok(None),
        first => Err(Error::Config(format!(
            "`max_window_layers` is {first} of {layers}: a window on some layers only is not supported"
        ))),
    }
}

impl<'a> Fields<'a> {
    /// A field that is present and not null, read through `pick`.
    fn typed<T>(
        &self,
        field: &str,
        expected: &str,
        pick: fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.map.get(field).filter(|v| !v.is_null()) else { return Ok(None) };
        pick(value).map(Some).ok_or_else(|| {
            let found = cut(&value.to_string());
            Error::Config(format!("`{}{field}` is {found}, expected {expected}", self.path))
        })
    }

    fn uint(&self, field: &str) -> Result<Option<u64>> {
        self.typed(field, "a whole number that is not negative", Value::as_u64)
    }

    fn number(&self, field: &str) -> Result<Option<f64>> {
        self.typed(field, "a number", Value::as_f64)
    }

    fn flag(&self, field: &str) -> Result<Option<bool>> {
        self.typed(field, "true or false", Value::as_bool)
    }

    fn text(&self, field: &str) -> Result<Option<&'a str>> {
        self.typed(field, "a string", Value::as_str)
    }

    fn object<'p>(&self, field: &'p str) -> Result<Option<Fields<'p>>>
    where
        'a: 'p,
    {
        let map = self.typed(field, "an object", Value::as_object)?;
        Ok(map.map(|map| Fields {
            map,
            path: if field == "rope_scaling" { "rope_scaling." } else { "rope_parameters." },
        }))
    }

    fn optional_extent(&self, field: &str) -> Result<Option<usize>> {
        self.uint(field)?.map(|value| extent(field, value)).transpose()
    }

    fn extent(&self, field: &str) -> Result<usize> {
        self.optional_extent(field)?.ok_or_else(|| missing(field))
    }

    /// Rope scaling of a `rope_scaling` or `rope_parameters` object.
    fn scaling(&self, context: usize) -> Result<Scaling> {
        let kind = match self.text("rope_type")? {
            Some(kind) => kind,
            None => self.text("type")?.unwrap_or("default"),
        };
        let need = |field: &str| {
            let value =
                self.number(field)?.ok_or_else(|| missing(&format!("{}{field}", self.path)))?;
            Ok::<f64, Error>(value)
        };
        match kind {
            "default" => Ok(Scaling::None),
            "linear" => Ok(Scaling::Linear { factor: need("factor")? }),
            "llama3" => Ok(Scaling::Llama3 {
                factor: need("factor")?,
                low_freq_factor: need("low_freq_factor")?,
                high_freq_factor: need("high_freq_factor")?,
                original_context: self
                    .optional_extent("original_max_position_embeddings")?
                    .unwrap_or(context) as f64,
            }),
            other => {
                let found = format!("`{}rope_type` is `{}`", self.path, cut(other));
                Err(Error::Config(format!(
                    "{found}, not supported (default, linear and llama3 are)"
                )))
            }
        }
    }

    /// Parts of a model that no kernel here computes.
    fn refuse_unsupported(&self) -> Result<()> {
        for field in ["attention_bias", "mlp_bias"] {
            if self.flag(field)? == Some(true) {
                return Err(Error::Config(format!("`{field}` is true, only false is supported")));
            }
        }
        if let Some(experts @ 2..) = self.uint("num_local_experts")? {
            return Err(Error::Config(format!(
                "`num_local_experts` is {experts}: mixtures of experts are not supported"
            )));
        }
        if let Some(part) = self.number("partial_rotary_factor")?.filter(|part| *part != 1.0) {
            let message = format!("`partial_rotary_factor` is {part}, only 1 is supported");
            return Err(Error::Config(message));
        }
        match self.text("hidden_act")? {
            None | Some("silu") => Ok(()),
            Some(other) => Err(Error::Config(format!(
                "`hidden_act` is `{}`, only silu is supported",
                cut(other)
            ))),
        }
    }
}
