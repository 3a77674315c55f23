//! Mixtures of experts and latent attention in config.json.

use super::Fields;
use crate::ModelError;
use crate::config::{ExpertsConfig, LatentConfig, Routing};

pub(super) fn experts(fields: &Fields<'_>, family: &str) -> Result<Option<ExpertsConfig>, ModelError> {
    let count = fields.usize(&["num_local_experts", "num_experts", "n_routed_experts"])?;
    let Some(count) = count.filter(|&count| count > 0) else {
        return Ok(None);
    };
    let width = match fields.usize(&["moe_intermediate_size"])? {
        None => fields.require_usize(&["intermediate_size"])?,
        Some(width) => width,
    };
    // These always normalise; the others' own default is not to.
    let always = family.starts_with("mixtral") || family.starts_with("granitemoe");
    let shared_size = match fields.usize(&["n_shared_experts"])? {
        Some(shared) => Some(shared * width),
        None => fields.usize(&["shared_expert_intermediate_size"])?,
    };
    let third = family.starts_with("deepseekv3");
    let method = fields.str(&["topk_method"])?.unwrap_or(if third { "noaux_tc" } else { "greedy" });
    let groups = match (fields.usize(&["n_group"])?, fields.usize(&["topk_group"])?) {
        (Some(groups), Some(kept)) if groups > 1 && method != "greedy" => Some((groups, kept)),
        _ => None,
    };
    let routing = match fields.str(&["scoring_func"])?.unwrap_or(if third { "sigmoid" } else { "softmax" }) {
        "softmax" => Routing::Softmax,
        "sigmoid" => Routing::Sigmoid,
        other => {
            return Err(ModelError::Unsupported(format!(
                "{}: scoring_func {other:?} is not supported (softmax, sigmoid are)",
                fields.file.path
            )));
        }
    };
    Ok(Some(ExpertsConfig {
        normalise: always || fields.bool(&["norm_topk_prob"])?.unwrap_or(third),
        shared_size: shared_size.filter(|&size| size > 0),
        routing,
        groups,
        scale: fields.f32(&["routed_scaling_factor"])?.unwrap_or(1.0),
        ..ExpertsConfig::softmax(count, fields.require_usize(&["num_experts_per_tok"])?, width)
    }))
}

/// Latent attention, where the file speaks of it.
pub(super) fn latent(fields: &Fields<'_>) -> Result<Option<LatentConfig>, ModelError> {
    let Some(kv_rank) = fields.usize(&["kv_lora_rank"])? else { return Ok(None) };
    Ok(Some(LatentConfig {
        query_rank: fields.usize(&["q_lora_rank"])?.filter(|&rank| rank > 0),
        kv_rank,
        value_dim: fields.require_usize(&["v_head_dim"])?,
    }))
}

/// Factor on `q · k` of latent attention: long contexts sharpen it.
pub(super) fn latent_scale(fields: &Fields<'_>, head_dim: usize) -> Result<f32, ModelError> {
    let scaling = fields.object("rope_parameters").or(fields.object("rope_scaling"));
    let mut sharper = 1.0;
    if let Some(scaling) = scaling
        && scaling.str(&["rope_type", "type"])?.is_some_and(|name| name != "default")
        && let Some(all) = scaling.f32(&["mscale_all_dim"])?.filter(|&all| all != 0.0)
    {
        sharper = 0.1 * all * scaling.require_f32("factor")?.max(1.0).ln() + 1.0;
    }
    Ok(sharper * sharper / (head_dim as f32).sqrt())
}
