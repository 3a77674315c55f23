//! Where to look for models and how long to wait: the one place of this crate that reads the environment.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Settings of [`crate::resolve`].
#[derive(Debug, Clone)]
pub struct SourceOptions {
    /// rill's own cache, for what does not come from a hub.
    pub cache_dir: PathBuf,
    /// The cache that all Hugging Face programs share.
    pub hub_cache_dir: PathBuf,
    /// Where the hub is, without a slash at the end; `None`: the hf-hub library's own default.
    pub hub_endpoint: Option<String>,
    /// For private repositories.
    pub hub_token: Option<String>,
    /// Never ask the hub; its cache is still used.
    pub hub_offline: bool,
    /// Of the hub repository, where its name does not say one.
    pub revision: Option<String>,
    /// Ways to run pip, best first: program and arguments.
    pub pip_commands: Vec<Vec<String>>,
    /// The longest that finding and reaching a host may take.
    pub connect_timeout: Duration,
    /// The longest silence of a host that was reached.
    pub read_timeout: Duration,
    /// The longest that pip may take.
    pub pip_timeout: Duration,
    /// Times a download that brings nothing is tried again.
    pub retries: u32,
    /// The proxy to reach the hub through.
    pub proxy: Option<ureq::Proxy>,
}

impl SourceOptions {
    /// Everything at its default, and nothing taken from the environment but a place below `dir` for both caches.
    pub fn in_dir(dir: &Path) -> SourceOptions {
        SourceOptions {
            cache_dir: dir.join("rill"),
            hub_cache_dir: dir.join("hub"),
            hub_endpoint: None,
            hub_token: None,
            hub_offline: false,
            revision: None,
            pip_commands: ["python3 -m pip", "pip3", "pip"]
                .map(|command| command.split(' ').map(str::to_owned).collect())
                .to_vec(),
            connect_timeout: Duration::from_secs(3),
            read_timeout: Duration::from_secs(30),
            pip_timeout: Duration::from_secs(30 * 60),
            retries: 4,
            proxy: None,
        }
    }

    /// As the environment says: `HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME`, `HF_HUB_CACHE`, `HF_HUB_OFFLINE`, `HF_TOKEN_PATH`
    /// as in every Hugging Face program, `RILL_CACHE`, the usual proxy variables, `XDG_CACHE_HOME` and `HOME`.
    pub fn from_env() -> SourceOptions {
        SourceOptions { proxy: ureq::Proxy::try_from_env(), ..Self::from_vars(|name| std::env::var_os(name)) }
    }

    fn from_vars(get: impl Fn(&str) -> Option<OsString>) -> SourceOptions {
        let set = |name: &str| get(name).filter(|value| !value.is_empty());
        let text = |name: &str| Some(set(name)?.to_str()?.trim().to_owned()).filter(|t| !t.is_empty());
        let dir = |name: &str| set(name).map(PathBuf::from);
        let caches = dir("XDG_CACHE_HOME")
            .or_else(|| Some(dir("HOME")?.join(".cache")))
            // A service without a home: better a cache that a reboot empties than none.
            .unwrap_or_else(std::env::temp_dir);
        let hub_home = dir("HF_HOME").unwrap_or_else(|| caches.join("huggingface"));
        let token_path = dir("HF_TOKEN_PATH").unwrap_or_else(|| hub_home.join("token"));
        let saved_token = || {
            let token = std::fs::read_to_string(token_path).ok()?;
            Some(token.trim().to_owned()).filter(|token| !token.is_empty())
        };
        let offline = text("HF_HUB_OFFLINE").unwrap_or_default().to_ascii_uppercase();
        SourceOptions {
            cache_dir: dir("RILL_CACHE").unwrap_or_else(|| caches.join("rill")),
            hub_cache_dir: dir("HF_HUB_CACHE").unwrap_or_else(|| hub_home.join("hub")),
            hub_endpoint: text("HF_ENDPOINT").map(|url| url.trim_end_matches('/').to_owned()),
            hub_token: text("HF_TOKEN").or_else(saved_token),
            hub_offline: ["1", "ON", "YES", "TRUE"].contains(&offline.as_str()),
            ..Self::in_dir(&caches)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(vars: &[(&str, &str)]) -> SourceOptions {
        SourceOptions::from_vars(|name| {
            let found = vars.iter().find(|(var, _)| *var == name);
            found.map(|(_, value)| value.into())
        })
    }

    #[test]
    fn home_alone_is_enough() {
        let options = from(&[("HOME", "/h")]);
        assert_eq!(options.cache_dir, Path::new("/h/.cache/rill"));
        assert_eq!(options.hub_cache_dir, Path::new("/h/.cache/huggingface/hub"));
        assert_eq!((options.hub_endpoint, options.hub_token), (None, None));
        assert!(!options.hub_offline);
    }

    #[test]
    fn each_variable_is_honoured() {
        let options = from(&[
            ("HOME", "/h"),
            ("XDG_CACHE_HOME", "/x"),
            ("HF_HOME", "/hf"),
            ("HF_ENDPOINT", "http://mirror.example/hub/"),
            ("HF_TOKEN", " secret\n"),
            ("HF_HUB_OFFLINE", "true"),
        ]);
        assert_eq!(options.cache_dir, Path::new("/x/rill"));
        assert_eq!(options.hub_cache_dir, Path::new("/hf/hub"));
        assert_eq!(options.hub_endpoint.as_deref(), Some("http://mirror.example/hub"));
        assert_eq!(options.hub_token.as_deref(), Some("secret"));
        assert!(options.hub_offline);
        let options =
            from(&[("HF_HUB_CACHE", "/c"), ("RILL_CACHE", "/r"), ("HF_HUB_OFFLINE", "0"), ("HF_TOKEN", "")]);
        assert_eq!((options.cache_dir, options.hub_cache_dir), ("/r".into(), "/c".into()));
        assert!(!options.hub_offline && options.hub_token.is_none());
    }

    #[test]
    fn a_token_saved_by_the_login_command_is_found() {
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("token"), "saved\n").unwrap();
        let options = from(&[("HF_HOME", home.path().to_str().unwrap())]);
        assert_eq!(options.hub_token.as_deref(), Some("saved"));
    }
}
