//! LoRA adapters by name: loaded from files, offered to requests, taken away again; bounded in number and rank.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use rill_engine::LoadedAdapter;
use rill_models::{AdapterSites, ModelError};

use crate::app::unix_seconds;

/// Names are shown in lists and metrics.
const NAME_BYTES_MAX: usize = 256;

/// How many adapters there may be, and of what rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AdapterLimits {
    /// Adapters in memory, those that were unloaded and are still used by requests included.
    pub count_max: usize,
    pub rank_max: usize,
    /// Whether requests may load and unload them.
    pub at_run_time: bool,
}

/// Why an adapter could not be loaded or unloaded.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    #[error(
        "lora_name must be 1 to {NAME_BYTES_MAX} bytes long, without control characters, commas or double quotes"
    )]
    Name,
    #[error("`{0}` is a name of the model itself")]
    Taken(String),
    #[error(
        "the lora adapter `{0}` has already been loaded; set load_inplace to true to put another in its place"
    )]
    Loaded(String),
    #[error("the lora adapter `{0}` is being loaded by another request")]
    Loading(String),
    #[error("the lora adapter `{0}` cannot be found")]
    Unknown(String),
    #[error(
        "{held} lora adapters are in memory, {retired} of them unloaded but still used by requests, and the limit is {limit} (--max-loras)"
    )]
    Full { held: usize, retired: usize, limit: usize },
    #[error("this model runs through candle, which takes no lora adapters")]
    Model,
    #[error("lora_path: {0}")]
    Files(#[from] ModelError),
}

/// An adapter that requests may name.
#[derive(Debug, Clone)]
pub struct NamedAdapter {
    pub name: String,
    pub path: PathBuf,
    pub adapter: Arc<LoadedAdapter>,
    /// Unix seconds.
    pub loaded_s: u64,
}

/// All adapters of a server.
pub struct Adapters {
    /// `None`: the model takes none.
    sites: Option<AdapterSites>,
    limits: AdapterLimits,
    /// Of the model itself.
    model_names: Vec<String>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    named: BTreeMap<String, NamedAdapter>,
    loading: BTreeSet<String>,
    /// No longer offered, perhaps still used.
    retired: Vec<(String, Weak<LoadedAdapter>)>,
}

impl Adapters {
    pub fn new(sites: Option<AdapterSites>, limits: AdapterLimits, model_names: &[String]) -> Adapters {
        Adapters { sites, limits, model_names: model_names.to_vec(), state: Mutex::default() }
    }

    pub fn limits(&self) -> AdapterLimits {
        self.limits
    }

    /// Adapters there can be: without loading at run time, those there are.
    pub fn count_max(&self) -> usize {
        if self.limits.at_run_time { self.limits.count_max } else { self.state().named.len() }
    }

    /// Most memory that adapters loaded at run time may take beside those there are.
    pub fn bytes_to_come(&self) -> usize {
        let each = self.sites.as_ref().map_or(0, |sites| sites.bytes_max(self.limits.rank_max));
        let held = self.state().named.len();
        self.count_max().saturating_sub(held).saturating_mul(each)
    }

    /// Reads the files at `path` and offers them as `name`; `in_place`: instead of what has that name already. Takes as long
    /// as the files do.
    pub fn load(&self, name: &str, path: &Path, in_place: bool) -> Result<(), AdapterError> {
        let sites = self.sites.as_ref().ok_or(AdapterError::Model)?;
        let shown = |c: char| !c.is_control() && c != ',' && c != '"';
        if !(1..=NAME_BYTES_MAX).contains(&name.len()) || !name.chars().all(shown) {
            return Err(AdapterError::Name);
        }
        if name == "default" || self.model_names.iter().any(|taken| taken == name) {
            return Err(AdapterError::Taken(name.to_owned()));
        }
        self.reserve(name, in_place)?;
        let loaded = sites.load(path, self.limits.rank_max);
        let mut state = self.state();
        state.loading.remove(name);
        let weights = loaded?;
        tracing::info!(name, rank = weights.rank(), bytes = weights.bytes(), "loaded a LoRA adapter");
        let adapter = Arc::new(LoadedAdapter::new(weights));
        let named =
            NamedAdapter { name: name.to_owned(), path: path.to_owned(), adapter, loaded_s: unix_seconds() };
        if let Some(before) = state.named.insert(name.to_owned(), named) {
            state.retire(before);
        }
        Ok(())
    }

    /// Makes sure that there is room for one more, and that nobody else takes it.
    fn reserve(&self, name: &str, in_place: bool) -> Result<(), AdapterError> {
        let mut state = self.state();
        if state.loading.contains(name) {
            return Err(AdapterError::Loading(name.to_owned()));
        }
        if state.named.contains_key(name) && !in_place {
            return Err(AdapterError::Loaded(name.to_owned()));
        }
        state.retired.retain(|(_, adapter)| adapter.strong_count() > 0);
        let retired = state.retired.len();
        let held = state.named.len() + state.loading.len() + retired;
        // The one it takes the place of goes, unless requests still use it.
        let replaced = state.named.get(name).is_some_and(|named| Arc::strong_count(&named.adapter) == 1);
        if held - usize::from(replaced) >= self.limits.count_max {
            return Err(AdapterError::Full { held, retired, limit: self.limits.count_max });
        }
        state.loading.insert(name.to_owned());
        Ok(())
    }

    /// Offers `name` no longer. Requests that use it go on; its memory is freed when the last of them ends.
    pub fn unload(&self, name: &str) -> Result<(), AdapterError> {
        let mut state = self.state();
        let named = state.named.remove(name).ok_or_else(|| AdapterError::Unknown(name.to_owned()))?;
        state.retire(named);
        Ok(())
    }

    pub fn get(&self, name: &str) -> Option<Arc<LoadedAdapter>> {
        self.state().named.get(name).map(|named| named.adapter.clone())
    }

    /// Those that are offered, by name.
    pub fn list(&self) -> Vec<NamedAdapter> {
        self.state().named.values().cloned().collect()
    }

    /// Names of adapters with sequences that run, and with sequences that wait.
    pub fn in_use(&self) -> [Vec<String>; 2] {
        let state = self.state();
        let retired = state.retired.iter().filter_map(|(name, adapter)| Some((name, adapter.upgrade()?)));
        let named = state.named.values().map(|named| (&named.name, named.adapter.clone()));
        let all: Vec<(&String, Arc<LoadedAdapter>)> = named.chain(retired).collect();
        let names = |count: &dyn Fn(&LoadedAdapter) -> usize| {
            let used = all.iter().filter(|(_, adapter)| count(adapter) > 0).map(|(name, _)| (*name).clone());
            used.collect::<BTreeSet<String>>().into_iter().collect()
        };
        [names(&LoadedAdapter::running), names(&LoadedAdapter::waiting)]
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing that holds the lock can leave the state half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn retire(&mut self, named: NamedAdapter) {
        self.retired.retain(|(_, adapter)| adapter.strong_count() > 0);
        self.retired.push((named.name, Arc::downgrade(&named.adapter)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_none_can_run_they_are_refused_and_nothing_is_kept_for_them() {
        let limits = AdapterLimits { count_max: 8, rank_max: 64, at_run_time: true };
        let adapters = Adapters::new(None, limits, &[]);
        let error = adapters.load("a", Path::new("."), false).unwrap_err();
        assert!(error.to_string().contains("candle"), "{error}");
        assert_eq!(adapters.bytes_to_come(), 0);
    }
}
