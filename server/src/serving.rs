//! A loaded model and all that requests need of it, and what they may call it.

use std::sync::Arc;

use rill_engine::{EngineHandle, LoadedAdapter};
use rill_models::{FillInTheMiddle, Pooling, Tokenizer};

use crate::adapters::Adapters;
use crate::chat_template::ChatTemplate;
use crate::grammars::Grammars;
use crate::prompt::PromptEncoder;
use crate::protocol::ApiError;
use crate::reasoning::ReasoningFormat;
use crate::sampling_defaults::SamplingDefaults;
use crate::tools::ToolFormat;
use crate::validate::ModelLimits;

/// What a request asked for by name.
#[derive(Debug, Clone)]
pub struct Target {
    /// To answer with.
    pub name: String,
    pub adapter: Option<Arc<LoadedAdapter>>,
}

/// A loaded model and all that requests need of it.
pub struct Serving {
    pub engine: EngineHandle,
    /// What requests may call the model; the first is what responses do.
    pub names: Vec<String>,
    pub adapters: Adapters,
    pub prompts: PromptEncoder,
    /// `None`: the model has no chat template.
    pub template: Option<ChatTemplate>,
    pub eos_token_ids: Vec<u32>,
    /// Of requests that leave parameters out.
    pub sampling: SamplingDefaults,
    /// How embeddings are made.
    pub pooling: Pooling,
    /// The tokens that let the model fill in what is between two texts, if it has them.
    pub fill_in_the_middle: Option<FillInTheMiddle>,
    /// How the model writes calls.
    pub tool_format: ToolFormat,
    /// How it marks thoughts, if it has any.
    pub reasoning: Option<ReasoningFormat>,
    pub grammars: Arc<Grammars>,
    /// Unix seconds.
    pub created_s: u64,
    /// Changes when the same seed may give other tokens: another version or model.
    pub fingerprint: String,
}

impl Serving {
    pub fn tokenizer(&self) -> &Tokenizer {
        self.prompts.tokenizer()
    }

    pub fn context_len(&self) -> usize {
        self.engine.config().context_len
    }

    pub fn limits(&self) -> ModelLimits<'_> {
        ModelLimits {
            vocab_size: self.engine.vocab_size(),
            context_len: self.context_len(),
            eos_token_ids: &self.eos_token_ids,
            sampling: &self.sampling,
        }
    }

    /// What a request for `asked` runs: the model or one of its adapters; nothing and `default` mean the model.
    pub fn target(&self, asked: Option<&str>) -> Result<Target, ApiError> {
        let asked = asked.filter(|name| *name != "default").unwrap_or(&self.names[0]);
        let adapter = self.adapters.get(asked);
        if adapter.is_none() && !self.names.iter().any(|name| name == asked) {
            let adapters = self.adapters.list().into_iter().map(|adapter| adapter.name);
            let served: Vec<String> = self.names.iter().cloned().chain(adapters).collect();
            return Err(ApiError::model_not_found(asked, &served));
        }
        Ok(Target { name: asked.to_owned(), adapter })
    }
}
