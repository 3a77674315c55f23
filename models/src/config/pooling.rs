//! How a model's files say that a text's hidden states become one embedding.

use super::from_json::JsonFile;
use crate::ModelError;
use crate::gguf::Metadata;
use serde_json::Value;
use std::path::Path;

/// What an embedding is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// The mean of all tokens' hidden states.
    Mean,
    /// The last token's, which alone has seen all the others.
    Last,
    /// Something that is not implemented, such as a classifier's head.
    Other,
}

impl Pooling {
    /// llama.cpp's numbers; 0 is a model that makes no embeddings.
    pub(super) fn from_gguf(metadata: &Metadata, arch: &str) -> Result<Option<Pooling>, ModelError> {
        Ok(match metadata.u32(&format!("{arch}.pooling_type"))? {
            None | Some(0) => None,
            Some(1) => Some(Pooling::Mean),
            Some(3) => Some(Pooling::Last),
            Some(_) => Some(Pooling::Other),
        })
    }

    /// What sentence-transformers keeps beside a model.
    pub(super) fn from_dir(dir: &Path) -> Result<Option<Pooling>, ModelError> {
        let Some(file) = JsonFile::read_if_there(&dir.join("1_Pooling").join("config.json"))? else {
            return Ok(None);
        };
        Ok(Pooling::from_modes(&file.root))
    }

    fn from_modes(root: &Value) -> Option<Pooling> {
        let modes = root.as_object().into_iter().flatten();
        let chosen: Vec<&str> = modes
            .filter(|(_, value)| value.as_bool() == Some(true))
            .filter_map(|(name, _)| name.strip_prefix("pooling_mode_"))
            .collect();
        match chosen[..] {
            [] => None,
            ["mean_tokens"] => Some(Pooling::Mean),
            ["lasttoken"] => Some(Pooling::Last),
            _ => Some(Pooling::Other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentence_transformers_files() {
        for (json, expected) in [
            (r#"{"word_embedding_dimension":4,"pooling_mode_mean_tokens":true}"#, Some(Pooling::Mean)),
            (r#"{"pooling_mode_lasttoken":true,"pooling_mode_mean_tokens":false}"#, Some(Pooling::Last)),
            (r#"{"pooling_mode_cls_token":true}"#, Some(Pooling::Other)),
            (r#"{"pooling_mode_mean_tokens":true,"pooling_mode_max_tokens":true}"#, Some(Pooling::Other)),
            (r#"{"include_prompt":true}"#, None),
        ] {
            assert_eq!(Pooling::from_modes(&serde_json::from_str(json).unwrap()), expected, "{json}");
        }
    }
}
