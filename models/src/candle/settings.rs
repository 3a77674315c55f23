//! config.json as candle's own configurations have it: older names, defaults candle does not know, and refusals of what
//! it would pass over in silence.

use crate::config::read_json;
use candle_core::{Error, Result, bail};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use std::path::Path;

/// The configuration in `dir`, for the candle model of `architecture`.
pub(super) fn settings<C: DeserializeOwned>(dir: &Path, architecture: &str) -> Result<C> {
    let mut value = read_json(&dir.join("config.json")).map_err(|error| Error::Msg(error.to_string()))?;
    let Some(fields) = value.as_object_mut() else { bail!("config.json must be a JSON object") };
    fields.retain(|_, value| !value.is_null());
    refuse(fields, architecture)?;
    ropes(fields, architecture)?;
    complete(fields, architecture)?;
    serde_json::from_value(value).map_err(|error| Error::Msg(format!("config.json does not suit it: {error}")))
}

/// Whether a file that leaves a field out means the value candle computes with.
#[derive(Clone, Copy, PartialEq)]
enum LeftOut {
    Fine,
    Refused,
}

/// Fields candle does not read, and the values of them it computes with all the same.
fn taken_for_granted(architecture: &str) -> Vec<(&'static str, Vec<Value>, LeftOut)> {
    let fine = |field: &'static str, value: Value| (field, vec![value], LeftOut::Fine);
    let silu = || fine("hidden_act", json!("silu"));
    match architecture {
        "LlamaForCausalLM" | "Lfm2ForCausalLM" => vec![silu()],
        "FalconForCausalLM" => vec![fine("activation", json!("gelu"))],
        "StableLmForCausalLM" => {
            vec![fine("use_parallel_residual", json!(false)), fine("qk_layernorm", json!(false))]
        }
        "Qwen2MoeForCausalLM" | "Qwen3MoeForCausalLM" => vec![fine("mlp_only_layers", json!([]))],
        // It picks groups by their numbers, and scales either by the sum or by the factor.
        "DeepseekV2ForCausalLM" => vec![
            fine("topk_method", json!("greedy")),
            fine("norm_topk_prob", json!(false)),
            fine("moe_layer_freq", json!(1)),
        ],
        "GPTBigCodeForCausalLM" => vec![
            ("activation_function", vec![json!("gelu_pytorch_tanh"), json!("gelu_new")], LeftOut::Fine),
            fine("multi_query", json!(true)),
            fine("scale_attn_weights", json!(true)),
        ],
        "MambaForCausalLM" => vec![
            silu(),
            fine("layer_norm_epsilon", json!(1e-5)),
            fine("conv_kernel", json!(4)),
            fine("expand", json!(2)),
            fine("state_size", json!(16)),
        ],
        "Mamba2ForCausalLM" => vec![
            silu(),
            fine("layer_norm_epsilon", json!(1e-5)),
            fine("conv_kernel", json!(4)),
            // Files say infinity, which is read as null.
            fine("time_step_limit", json!([0, null])),
        ],
        "RecurrentGemmaForCausalLM" => vec![fine("embeddings_scale_by_sqrt_dim", json!(true))],
        "GraniteMoeHybridForCausalLM" => vec![
            silu(),
            ("num_local_experts", vec![json!(0)], LeftOut::Refused),
            ("position_embedding_type", vec![json!("rope")], LeftOut::Refused),
        ],
        _ => Vec::new(),
    }
}

/// The same, but for how numbers are written.
fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => a.as_f64() == b.as_f64(),
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b)),
        _ => a == b,
    }
}

fn refuse(fields: &Map<String, Value>, architecture: &str) -> Result<()> {
    for (field, values, left_out) in taken_for_granted(architecture) {
        match fields.get(field) {
            None if left_out == LeftOut::Fine => {}
            Some(value) if values.iter().any(|wanted| same(wanted, value)) => {}
            value => {
                let value = value.map_or("left out".to_owned(), Value::to_string);
                bail!("{field} is not followed for {architecture}: it is {value}, and candle takes {}", values[0]);
            }
        }
    }
    // Scores are scaled by the heads' width.
    let scalar = fields.get("query_pre_attn_scalar").filter(|_| architecture.starts_with("Gemma"));
    if scalar.is_some_and(|scalar| fields.get("head_dim").is_none_or(|width| !same(scalar, width))) {
        bail!("query_pre_attn_scalar is not followed for {architecture}, unless it is head_dim");
    }
    Ok(())
}

/// Newer files keep all of a rotation in `rope_parameters`, candle knows `rope_theta` and `rope_scaling`.
fn ropes(fields: &mut Map<String, Value>, architecture: &str) -> Result<()> {
    let newer = fields.remove("rope_parameters").unwrap_or_default();
    let older = fields.remove("rope_scaling").unwrap_or_default();
    let (full, sliding) = (&newer["full_attention"], &newer["sliding_attention"]);
    for rope in [&older, &newer, full, sliding] {
        let kind = rope["rope_type"].as_str().or(rope["type"].as_str()).unwrap_or("default");
        match (architecture, kind) {
            (_, "default") => {}
            ("LlamaForCausalLM", "llama3") | ("DeepseekV2ForCausalLM", "yarn") => {
                let mut scaling = rope.clone();
                scaling["type"] = kind.into();
                scaling["rope_type"] = kind.into();
                fields.insert("rope_scaling".to_owned(), scaling);
            }
            _ => bail!("rope scaling {kind:?} is not followed for {architecture}"),
        }
    }
    for (field, values) in [
        ("rope_theta", [&newer["rope_theta"], &full["rope_theta"]]),
        ("rope_local_base_freq", [&sliding["rope_theta"], &Value::Null]),
        ("partial_rotary_factor", [&newer["partial_rotary_factor"], &Value::Null]),
    ] {
        if let Some(&value) = values.iter().find(|value| !value.is_null()) {
            fields.entry(field).or_insert(value.clone());
        }
    }
    Ok(())
}

/// What candle asks for and files leave out, or call otherwise.
fn complete(fields: &mut Map<String, Value>, architecture: &str) -> Result<()> {
    let copy = |fields: &Map<String, Value>, name: &str| fields.get(name).cloned().unwrap_or_default();
    let mut defaults = vec![
        ("tie_word_embeddings", json!(false)),
        ("use_cache", json!(true)),
        ("attention_bias", json!(false)),
        ("use_sliding_window", json!(false)),
        ("use_flash_attn", json!(false)),
        ("max_window_layers", copy(fields, "num_hidden_layers")),
    ];
    match architecture {
        "SmolLM3ForCausalLM" => defaults.push(("no_rope_layer_interval", json!(4))),
        "DeepseekV2ForCausalLM" => defaults.extend([("n_group", json!(1)), ("topk_group", json!(1))]),
        "MambaForCausalLM" => defaults.extend([
            ("d_model", copy(fields, "hidden_size")),
            ("n_layer", copy(fields, "num_hidden_layers")),
            ("pad_vocab_size_multiple", json!(1)),
        ]),
        "Mamba2ForCausalLM" => defaults.extend([
            ("state_size", json!(128)),
            ("n_groups", json!(8)),
            ("head_dim", json!(64)),
            ("expand", json!(2)),
            ("pad_vocab_size_multiple", json!(1)),
        ]),
        "RecurrentGemmaForCausalLM" => defaults.extend([
            ("num_key_value_heads", copy(fields, "num_attention_heads")),
            ("partial_rotary_factor", json!(0.5)),
        ]),
        "Lfm2ForCausalLM" => {
            let tied = fields.remove("tie_word_embeddings").unwrap_or(json!(true));
            defaults.extend([("tie_embedding", tied), ("layer_types", attending_at(fields))]);
        }
        "GraniteMoeHybridForCausalLM" => {
            // Without the field the layers are Mamba's.
            let kinds = fields.remove("layer_types").or_else(|| fields.remove("layers_block_type"));
            let attends = |kind: &Value| *kind == "attention" || *kind == "full_attention";
            if !kinds.as_ref().and_then(Value::as_array).is_some_and(|kinds| kinds.iter().all(attends)) {
                bail!("layer_types is not followed for {architecture}, unless all layers are attention");
            }
        }
        "Gemma3ForCausalLM" => {
            defaults.push(("rope_local_base_freq", json!(10_000.0)));
            if let Some(kinds) = fields.remove("layer_types") {
                fields.insert("sliding_window_pattern".to_owned(), period(&kinds)?.into());
            }
        }
        _ => {}
    }
    for (field, value) in defaults {
        fields.entry(field).or_insert(value);
    }
    // Nothing candle computes depends on where a text ends, but it wants one id.
    if let Some(Value::Array(ids)) = fields.get("eos_token_id") {
        let first = ids.first().cloned().unwrap_or_default();
        fields.insert("eos_token_id".to_owned(), first);
    }
    // A window that is switched off is one that nothing reaches.
    let off = architecture.starts_with("Qwen") && fields["use_sliding_window"] == false;
    if off || architecture == "MixtralForCausalLM" && !fields.contains_key("sliding_window") {
        fields.insert("sliding_window".to_owned(), copy(fields, "max_position_embeddings"));
    }
    fields.retain(|_, value| !value.is_null());
    Ok(())
}

/// Kinds of LFM2's layers by the numbers of those that attend; all do where there are none.
fn attending_at(fields: &Map<String, Value>) -> Value {
    let layers = fields.get("num_hidden_layers").and_then(Value::as_u64).unwrap_or_default();
    let attending = fields.get("full_attn_idxs").and_then(Value::as_array);
    let attends = |layer: u64| attending.is_none_or(|layers| layers.contains(&layer.into()));
    (0..layers).map(|layer| if attends(layer) { "full_attention" } else { "conv" }).collect()
}

/// Every how many layers one sees everything.
fn period(kinds: &Value) -> Result<usize> {
    let slides = |kind: &Value| *kind == "sliding_attention";
    let kinds = kinds.as_array().map(Vec::as_slice).unwrap_or_default();
    let period = kinds.iter().position(|kind| !slides(kind)).map_or(kinds.len(), |first| first) + 1;
    if kinds.iter().zip(1_usize..).any(|(kind, number)| slides(kind) == number.is_multiple_of(period)) {
        bail!("layer_types is not followed, unless every so many layers one sees everything");
    }
    Ok(period)
}
