//! The ways to name a model.

use std::path::{Path, PathBuf};

use crate::ModelError;

#[derive(Debug, PartialEq, Eq)]
pub(super) enum ModelSpec {
    Default,
    Local(PathBuf),
    Hub(HubRepo),
}

/// `org/repo@revision:pick`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct HubRepo {
    pub id: String,
    pub revision: Option<String>,
    /// A file of the repository, or a quantisation such as `Q4_K_M`.
    pub pick: Option<String>,
}

/// Longer names exist nowhere, and paths made of them would fail obscurely.
const NAME_LEN_MAX: usize = 256;

impl ModelSpec {
    pub fn parse(spec: &str) -> Result<ModelSpec, ModelError> {
        if spec == super::DEFAULT_MODEL {
            return Ok(ModelSpec::Default);
        }
        let path = Path::new(spec);
        if !spec.is_empty() && path.exists() {
            return Ok(ModelSpec::Local(path.to_owned()));
        }
        // What looks like a path was meant as one, even with just one slash.
        let like_path = spec.starts_with(['/', '.', '~', '\\'])
            || spec.matches('/').count() > 1 && !spec.contains(':')
            || (spec.ends_with(".gguf") && !spec.contains(':'));
        if like_path {
            return Err(ModelError::Source(format!("{spec}: no such file or directory")));
        }
        HubRepo::parse(spec).map(ModelSpec::Hub).ok_or_else(|| {
            ModelError::Source(format!(
                "{spec:?} is not a model: give the path of a .gguf file or of a directory with config.json, or a hub repository as org/repo, org/repo:Q4_K_M or org/repo:file.gguf, with @revision after the repository if need be"
            ))
        })
    }
}

impl HubRepo {
    /// The repository at a revision that was named apart from it.
    pub fn at(self, revision: &str) -> Result<HubRepo, ModelError> {
        match &self.revision {
            Some(own) if own != revision => {
                Err(ModelError::Source(format!("{}: two revisions are asked for, {own} and {revision}", self.id)))
            }
            _ if !is_path(revision) => {
                Err(ModelError::Source(format!("{}: {revision:?} is no name of a revision", self.id)))
            }
            _ => Ok(HubRepo { revision: Some(revision.to_owned()), ..self }),
        }
    }

    fn parse(spec: &str) -> Option<HubRepo> {
        let (repo, pick) = match spec.split_once(':') {
            Some((repo, pick)) => (repo, Some(pick)),
            None => (spec, None),
        };
        let (id, revision) = match repo.split_once('@') {
            Some((id, revision)) => (id, Some(revision)),
            None => (repo, None),
        };
        let (org, name) = id.split_once('/')?;
        let sound = is_name(org) && is_name(name) && revision.is_none_or(is_path) && pick.is_none_or(is_path);
        sound.then(|| HubRepo {
            id: id.to_owned(),
            revision: revision.map(str::to_owned),
            pick: pick.map(str::to_owned),
        })
    }
}

/// One part of a name: it becomes part of a URL and of a path in the cache.
fn is_name(text: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    (1..=NAME_LEN_MAX).contains(&text.len()) && text.chars().all(allowed) && !text.starts_with(['.', '-'])
}

/// Names joined by slashes, with which nobody can leave a directory.
pub(crate) fn is_path(text: &str) -> bool {
    text.len() <= NAME_LEN_MAX
        && text.split('/').all(|part| {
            !part.is_empty()
                && !part.starts_with('.')
                && !part.contains(|c: char| c.is_control() || "\\?#%:*\"<>|".contains(c))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub(id: &str, revision: Option<&str>, pick: Option<&str>) -> ModelSpec {
        ModelSpec::Hub(HubRepo {
            id: id.to_owned(),
            revision: revision.map(str::to_owned),
            pick: pick.map(str::to_owned),
        })
    }

    #[test]
    fn every_form_is_understood() {
        let parse = |spec| ModelSpec::parse(spec).unwrap();
        assert_eq!(parse(super::super::DEFAULT_MODEL), ModelSpec::Default);
        assert_eq!(parse("Cargo.toml"), ModelSpec::Local("Cargo.toml".into()));
        assert_eq!(parse("/"), ModelSpec::Local("/".into()));
        assert_eq!(parse("org/repo"), hub("org/repo", None, None));
        assert_eq!(parse("org/repo:Q4_K_M"), hub("org/repo", None, Some("Q4_K_M")));
        assert_eq!(parse("org/re.po-1:sub/file.gguf"), hub("org/re.po-1", None, Some("sub/file.gguf")));
        assert_eq!(parse("org/repo@refs/pr/1:q8_0"), hub("org/repo", Some("refs/pr/1"), Some("q8_0")));
    }

    #[test]
    fn what_is_no_model_is_refused_with_the_forms_that_are() {
        for spec in [
            "",
            "word",
            "a/b:",
            "a/b@",
            "../x",
            "a/..",
            "a/b:../../etc/passwd",
            "a/b@../x",
            "-a/b",
            "a b/c",
            "a/b:c\\d",
            "a/b:x?y",
            "é/b",
        ] {
            let error = ModelSpec::parse(spec).unwrap_err().to_string();
            assert!(error.contains("org/repo") || error.contains("no such file"), "{spec:?}: {error}");
        }
        let error = ModelSpec::parse("models/missing.gguf").unwrap_err().to_string();
        assert!(error.contains("no such file"), "{error}");
    }
}
