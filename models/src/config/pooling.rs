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
    /// The first token's, which a decoder lets see nothing but itself.
    Cls,
    /// Something that is not implemented, such as a classifier's head, or a layer after the pooling.
    Other,
}

impl Pooling {
    /// llama.cpp's numbers; 0 is a model that makes no embeddings.
    pub(super) fn from_gguf(metadata: &Metadata, arch: &str) -> Result<Option<Pooling>, ModelError> {
        Ok(match metadata.u32(&format!("{arch}.pooling_type"))? {
            None | Some(0) => None,
            Some(1) => Some(Pooling::Mean),
            Some(2) => Some(Pooling::Cls),
            Some(3) => Some(Pooling::Last),
            Some(_) => Some(Pooling::Other),
        })
    }

    /// What sentence-transformers keeps beside a model: modules.json lists what a text goes through, and the pooling's
    /// own configuration is in the folder that it names.
    pub(super) fn from_dir(dir: &Path) -> Result<Option<Pooling>, ModelError> {
        let modules = JsonFile::read_list_if_there(&dir.join("modules.json"))?;
        let Some(folder) = folder_of(&modules) else { return Ok(Some(Pooling::Other)) };
        let Some(file) = JsonFile::read_if_there(&dir.join(folder).join("config.json"))? else {
            return Ok(None);
        };
        Ok(Pooling::from_modes(&file.root))
    }

    fn from_modes(root: &Value) -> Option<Pooling> {
        // One word in newer files, a flag for each mode in older ones.
        let modes = root.as_object().into_iter().flatten();
        let flags = modes
            .filter(|(_, value)| value.as_bool() == Some(true))
            .filter_map(|(name, _)| name.strip_prefix("pooling_mode_"));
        let chosen: Vec<&str> = root["pooling_mode"].as_str().into_iter().chain(flags).collect();
        match chosen[..] {
            [] => None,
            ["mean" | "mean_tokens"] => Some(Pooling::Mean),
            ["lasttoken"] => Some(Pooling::Last),
            ["cls" | "cls_token"] => Some(Pooling::Cls),
            _ => Some(Pooling::Other),
        }
    }
}

/// Where the pooling of these modules is configured; `None` if something that is not implemented comes after the model.
fn folder_of(modules: &[Value]) -> Option<&str> {
    let mut folder = "1_Pooling";
    for module in modules {
        let kind = module["type"].as_str().unwrap_or_default();
        match kind.rsplit('.').next().unwrap_or_default() {
            // What comes out is scaled to length 1 in any case.
            "Transformer" | "Normalize" => {}
            "Pooling" => folder = module["path"].as_str().filter(|path| crate::source::spec::is_path(path))?,
            _ => return None,
        }
    }
    Some(folder)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn sentence_transformers_files() {
        for (json, expected) in [
            (r#"{"word_embedding_dimension":4,"pooling_mode_mean_tokens":true}"#, Some(Pooling::Mean)),
            (r#"{"pooling_mode_lasttoken":true,"pooling_mode_mean_tokens":false}"#, Some(Pooling::Last)),
            (r#"{"pooling_mode_cls_token":true}"#, Some(Pooling::Cls)),
            (r#"{"embedding_dimension":4,"pooling_mode":"lasttoken"}"#, Some(Pooling::Last)),
            (r#"{"pooling_mode":"cls"}"#, Some(Pooling::Cls)),
            (r#"{"pooling_mode":"mean"}"#, Some(Pooling::Mean)),
            (r#"{"pooling_mode":"max"}"#, Some(Pooling::Other)),
            (r#"{"pooling_mode_mean_tokens":true,"pooling_mode_max_tokens":true}"#, Some(Pooling::Other)),
            (r#"{"include_prompt":true}"#, None),
        ] {
            assert_eq!(Pooling::from_modes(&serde_json::from_str(json).unwrap()), expected, "{json}");
        }
    }

    #[test]
    fn modules_say_where_and_what_else() {
        let module =
            |kind: &str, path: &str| json!({"type": format!("sentence_transformers.models.{kind}"), "path": path});
        let (model, normal) = (module("Transformer", ""), module("Normalize", "2_Normalize"));
        for (modules, expected) in [
            (vec![], Some("1_Pooling")),
            (vec![model.clone(), module("Pooling", "pool"), normal], Some("pool")),
            (vec![model.clone(), module("Pooling", "1_Pooling"), module("Dense", "2_Dense")], None),
            (vec![model, module("Pooling", "../../etc")], None),
        ] {
            assert_eq!(folder_of(&modules), expected, "{modules:?}");
        }
    }
}
