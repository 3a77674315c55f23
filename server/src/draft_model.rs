//! `--draft-model`: a smaller model that proposes tokens, loaded beside the one that is served.

use rill_models::{LoadOptions, LoadedModel, ModelError, ModelFiles, Tokenizer};

/// Loads the draft model `spec`, whose files these are, for a model with this tokenizer and width of logits.
///
/// # Errors
/// What loading any model can fail with, and a vocabulary that is not the same.
pub fn load(
    spec: &str,
    files: &ModelFiles,
    options: &LoadOptions,
    (tokenizer, vocab_size): (&Tokenizer, usize),
) -> Result<LoadedModel, ModelError> {
    let draft = rill_models::load(files, options)?;
    let size = draft.model.shape().vocab_size;
    if size != vocab_size {
        return Err(ModelError::Unsupported(format!(
            "--draft-model {spec} has a vocabulary of {size} tokens and the model served one of {vocab_size}; \
             they must have the same"
        )));
    }
    let differs = (0..vocab_size as u32).find(|&id| tokenizer.token_bytes(id) != draft.tokenizer.token_bytes(id));
    if let Some(id) = differs {
        return Err(ModelError::Unsupported(format!(
            "--draft-model {spec} means something else by token {id} than the model served; they must have the same vocabulary"
        )));
    }
    Ok(draft)
}
