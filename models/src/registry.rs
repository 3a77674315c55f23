//! Architecture names → constructors.

use crate::llama::Llama;
use crate::weights::Weights;
use crate::{Model, ModelConfig, ModelError};
use rill_kernels::Backend;

/// Every architecture rill runs, by both its names.
const KNOWN: [(&str, &str); 1] = [("llama", "LlamaForCausalLM")];

/// Loads the weights of the architecture `config` names onto `backend`.
pub(crate) fn build<B: Backend + 'static>(
    backend: B,
    config: &ModelConfig,
    weights: &Weights,
) -> Result<Box<dyn Model>, ModelError> {
    match config.architecture.as_str() {
        "llama" | "LlamaForCausalLM" => Ok(Box::new(Llama::load(backend, config, weights)?)),
        other => Err(ModelError::Unsupported(format!(
            "the architecture {other} is not supported; supported are {}",
            KNOWN.map(|(gguf, hub)| format!("{gguf} ({hub})")).join(", ")
        ))),
    }
}
