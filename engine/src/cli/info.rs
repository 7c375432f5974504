//! `kvwarp info`.

use std::collections::BTreeMap;

use serde_json::json;

use super::args::ModelArgs;
use super::{Outcome, open, output};
use crate::cache::{Plan, Shape, full_bytes};
use crate::config::{Config, Elite};
use crate::policy;
use crate::source::Source;
use crate::spec::{CacheSpec, PRESETS};

/// Arguments of `kvwarp info`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> anyhow::Result<Outcome> {
    let source = open::source(&args.model)?;
    let own = CacheSpec::of(&source.config);
    let latent = own.latent && policy::check(&own, &source.config, source.config.context).is_ok();
    let specs = PRESETS.into_iter().filter(|preset| latent || !preset.latent);
    let costs = specs.map(|spec| cost(&source.config, spec)).collect::<Result<Vec<_>, _>>()?;
    if args.json {
        output::put_json(&json(&source, &costs))?;
        return Ok(Outcome::Done);
    }
    let lines = lines(&source).into_iter().map(|(name, value)| format!("{name:<14}{value}\n"));
    output::put(&lines.collect::<String>())?;
    let context = source.config.context;
    let Config { layers, kv_heads, head_dim, .. } = source.config;
    let elements = 2 * layers * kv_heads * head_dim * context;
    let rows = costs.iter().map(|(spec, bytes)| {
        let bits = format!("{:.2}", (bytes * 8) as f64 / elements as f64);
        vec![spec.clone(), output::bytes(*bytes), bits]
    });
    let header = format!("KV bytes at {context}");
    let table = output::table(&["cache", &header, "bits an element"], &rows.collect::<Vec<_>>());
    output::put(&format!("\n{table}"))?;
    Ok(Outcome::Done)
}

/// A cache's spec and its bytes when the model's whole context is in it.
fn cost(config: &Config, spec: CacheSpec) -> anyhow::Result<(String, usize)> {
    let Config { layers, kv_heads, head_dim, context, .. } = *config;
    let plan = Plan::default().with_latents(&spec, config);
    let bytes = full_bytes(&spec, Shape { layers, kv_heads, head_dim, context }, &plan)?;
    Ok((spec.to_string(), bytes))
}

fn lines(source: &Source) -> Vec<(&'static str, String)> {
    let config = &source.config;
    let Config { layers, width, heads, kv_heads, head_dim, ffn, .. } = *config;
    let window = config.sliding_window.map_or("none".into(), |n| format!("{n} tokens"));
    let weights = weights(source);
    let kinds = weights.iter().map(|(kind, bytes)| format!("{kind} {}", output::bytes(*bytes)));
    let rope = &config.rope;
    let mut lines = vec![
        ("file", source.path().display().to_string()),
        ("name", config.name.clone()),
        ("architecture", format!("{:?}", config.arch)),
        ("layers", format!("{layers}, width {width}, feed-forward {ffn}")),
        ("heads", format!("{heads} for queries, {kv_heads} for K and V, {head_dim} channels")),
        ("vocabulary", format!("{}, embeddings {}", config.vocab, tied(config))),
        ("context", format!("{} tokens, sliding window {window}", config.context)),
        ("rope", format!("base {}, {:?}, scaling {:?}", rope.theta, rope.pairing, rope.scaling)),
        ("weights", kinds.collect::<Vec<_>>().join(", ")),
    ];
    if let Some(elite) = &config.elite {
        let (pairs, ranks, share) = (elite.pairs, ranks(elite), 100.0 * elite.ratio(config));
        let kept = elite.latents(config).err().map_or(String::new(), |why| format!("; {why}"));
        let latents =
            format!("{pairs} elite pairs a K head, rank {ranks}: {share:.1} % of K and V");
        lines.push(("latents", latents + &kept));
    }
    lines
}

/// Elements of a latent vector, the fewest and the most of a layer.
fn ranks(elite: &Elite) -> String {
    let [least, most] = [elite.ranks.iter().min(), elite.ranks.iter().max()];
    let [least, most] = [least, most].map(|rank| rank.copied().unwrap_or(0));
    if least == most { least.to_string() } else { format!("{least} to {most}") }
}

fn tied(config: &Config) -> &'static str {
    if config.tied_embeddings { "tied" } else { "not tied" }
}

/// Bytes of tensors, by element type.
fn weights(source: &Source) -> BTreeMap<String, usize> {
    let mut kinds = BTreeMap::new();
    for tensor in source.weights.iter() {
        *kinds.entry(format!("{:?}", tensor.kind)).or_default() += tensor.bytes.len();
    }
    kinds
}

fn json(source: &Source, costs: &[(String, usize)]) -> serde_json::Value {
    let config = &source.config;
    json!({
        "path": source.path(),
        "name": config.name,
        "architecture": format!("{:?}", config.arch).to_lowercase(),
        "layers": config.layers,
        "width": config.width,
        "ffn": config.ffn,
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab": config.vocab,
        "tied_embeddings": config.tied_embeddings,
        "context": config.context,
        "sliding_window": config.sliding_window,
        "rope_theta": config.rope.theta,
        "elite_pairs": config.elite.as_ref().map(|elite| elite.pairs),
        "latent_ranks": config.elite.as_ref().map(|elite| &elite.ranks),
        "weight_bytes": weights(source),
        "kv_bytes_at_context": costs.iter().cloned().collect::<BTreeMap<_, _>>(),
    })
}
