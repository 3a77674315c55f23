//! Architecture names → constructors.

use crate::layers::{HeadNorm, NormKind};
use crate::weights::Weights;
use crate::{Model, ModelConfig, ModelError, candle, cohere, gemma, gpt_neox, gpt2, llama, olmo2};
use rill_kernels::Backend;

/// Every architecture rill runs: the names GGUF files (`general.architecture`) and model directories (config.json
/// `architectures`) give it.
const KNOWN: [(&str, &str); 29] = [
    ("llama", "LlamaForCausalLM"),
    ("llama", "MistralForCausalLM"),
    ("llama", "MixtralForCausalLM"),
    ("smollm3", "SmolLM3ForCausalLM"),
    ("qwen2", "Qwen2ForCausalLM"),
    ("qwen2moe", "Qwen2MoeForCausalLM"),
    ("qwen3", "Qwen3ForCausalLM"),
    ("qwen3moe", "Qwen3MoeForCausalLM"),
    ("phi3", "Phi3ForCausalLM"),
    ("granite", "GraniteForCausalLM"),
    ("granitemoe", "GraniteMoeForCausalLM"),
    ("gemma", "GemmaForCausalLM"),
    ("gemma2", "Gemma2ForCausalLM"),
    ("gemma3", "Gemma3ForCausalLM"),
    ("gemma3", "Gemma3ForConditionalGeneration"),
    ("olmo2", "Olmo2ForCausalLM"),
    ("olmoe", "OlmoeForCausalLM"),
    ("gpt2", "GPT2LMHeadModel"),
    ("starcoder2", "Starcoder2ForCausalLM"),
    ("gptneox", "GPTNeoXForCausalLM"),
    ("olmo", "OlmoForCausalLM"),
    ("olmo2", "Olmo3ForCausalLM"),
    ("command-r", "CohereForCausalLM"),
    ("cohere2", "Cohere2ForCausalLM"),
    ("phi2", "PhiForCausalLM"),
    ("stablelm", "StableLmForCausalLM"),
    ("ernie4_5", "Ernie4_5ForCausalLM"),
    ("deepseek2", "DeepseekV2ForCausalLM"),
    ("deepseek2", "DeepseekV3ForCausalLM"),
];

/// The name published files of `architecture`, which may be a GGUF file's, go by.
pub(crate) fn hub_name(architecture: &str) -> &str {
    KNOWN.iter().find(|(gguf, _)| *gguf == architecture).map_or(architecture, |(_, hub)| hub)
}

/// The GGUF name of an architecture by either of its names.
pub(crate) fn family(architecture: &str) -> Option<&'static str> {
    KNOWN.iter().find(|(gguf, hub)| *gguf == architecture || *hub == architecture).map(|(gguf, _)| *gguf)
}

/// Whether rill has the architecture, by either of its names.
pub(crate) fn knows(asked: &str) -> bool {
    KNOWN.iter().any(|(gguf, hub)| *gguf == asked || *hub == asked)
}

/// Loads the weights of the architecture `config` names onto `backend`.
pub(crate) fn build<B: Backend + 'static>(
    backend: B,
    config: &ModelConfig,
    weights: &Weights,
) -> Result<Box<dyn Model>, ModelError> {
    let asked = config.architecture.as_str();
    let Some((family, _)) = KNOWN.iter().find(|(gguf, hub)| *gguf == asked || *hub == asked) else {
        return Err(ModelError::Unsupported(format!(
            "the architecture {asked} is not supported; supported are {}; and through candle {}",
            KNOWN.map(|(gguf, hub)| format!("{gguf} ({hub})")).join(", "),
            candle::KNOWN.iter().filter(|name| !knows(name)).copied().collect::<Vec<_>>().join(", ")
        )));
    };
    match *family {
        "gemma2" | "gemma3" => gemma::load(backend, config, weights),
        "gpt2" | "starcoder2" => gpt2::load(backend, config, weights),
        "gptneox" => gpt_neox::load(backend, config, weights),
        "olmo2" => olmo2::load(backend, config, weights),
        "command-r" | "cohere2" => cohere::load(backend, config, weights, true),
        "phi2" => cohere::load(backend, config, weights, false),
        "olmoe" => llama::load(backend, config, weights, (NormKind::RootMeanSquare, HeadNorm::Whole)),
        "qwen3" | "qwen3moe" => {
            llama::load(backend, config, weights, (NormKind::RootMeanSquare, HeadNorm::PerHead))
        }
        "stablelm" => llama::load(backend, config, weights, (NormKind::Layer, HeadNorm::None)),
        "olmo" => llama::load(backend, config, weights, (NormKind::Plain, HeadNorm::None)),
        _ => llama::load(backend, config, weights, (NormKind::RootMeanSquare, HeadNorm::None)),
    }
}
