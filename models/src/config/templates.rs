//! Chat templates: where each format keeps them, and which one wins.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use super::ChatTemplates;
use crate::ModelError;
use crate::gguf::Metadata;

impl ChatTemplates {
    fn or_none(self) -> Option<ChatTemplates> {
        let empty = self.default.is_none() && self.named.is_empty();
        (!empty).then_some(self)
    }

    /// `tokenizer.chat_template`, and `tokenizer.chat_template.NAME` for each of `tokenizer.chat_templates`.
    pub(super) fn from_gguf(metadata: &Metadata) -> Result<Option<ChatTemplates>, ModelError> {
        let default = metadata.str("tokenizer.chat_template")?.map(str::to_owned);
        let mut named = BTreeMap::new();
        for name in metadata.strings("tokenizer.chat_templates")?.unwrap_or_default() {
            let key = format!("tokenizer.chat_template.{name}");
            named.insert(name.clone(), metadata.require_str(&key)?.to_owned());
        }
        Ok(ChatTemplates { default, named }.or_none())
    }

    /// From a model directory: `chat_template.jinja` wins over tokenizer_config.json's `chat_template`, which is a
    /// string or a list of `{name, template}`; `additional_chat_templates/NAME.jinja` add named ones.
    pub(super) fn from_dir(
        dir: &Path,
        tokenizer_config: Option<&Value>,
    ) -> Result<Option<ChatTemplates>, ModelError> {
        let mut templates = ChatTemplates::default();
        let config_path = dir.join("tokenizer_config.json");
        let format = |reason: &str| ModelError::Format {
            path: config_path.display().to_string(),
            reason: reason.to_owned(),
        };
        match tokenizer_config.and_then(|config| config.get("chat_template")) {
            None | Some(Value::Null) => {}
            Some(Value::String(source)) => templates.default = Some(source.clone()),
            Some(Value::Array(list)) => {
                for entry in list {
                    let (Some(name), Some(source)) = (entry["name"].as_str(), entry["template"].as_str()) else {
                        return Err(format("each entry of chat_template must have a name and a template"));
                    };
                    templates.add(name, source.to_owned());
                }
            }
            Some(_) => return Err(format("chat_template must be a string or a list")),
        }
        let jinja = dir.join("chat_template.jinja");
        if jinja.is_file() {
            templates.default = Some(read(&jinja)?);
        }
        for path in additional(&dir.join("additional_chat_templates"))? {
            if let Some(name) = path.file_stem().and_then(|stem| stem.to_str()) {
                templates.add(name, read(&path)?);
            }
        }
        Ok(templates.or_none())
    }

    fn add(&mut self, name: &str, source: String) {
        if name == "default" {
            self.default = Some(source);
        } else {
            self.named.insert(name.to_owned(), source);
        }
    }
}

fn read(path: &Path) -> Result<String, ModelError> {
    std::fs::read_to_string(path)
        .map_err(|e| ModelError::Format { path: path.display().to_string(), reason: e.to_string() })
}

/// The `.jinja` files of a directory, sorted; none if there is no such directory.
fn additional(dir: &Path) -> Result<Vec<std::path::PathBuf>, ModelError> {
    if !dir.is_dir() {
        return Ok(Vec::new());
    }
    let failed = |e: std::io::Error| ModelError::Source(format!("{}: {e}", dir.display()));
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.extension().is_some_and(|extension| extension == "jinja") {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}
