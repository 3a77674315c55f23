//! API keys: which requests get in, and who sent them. The keys' file is read again when it changes.

pub mod account;
mod bucket;
pub mod caller;
pub mod key_file;
pub mod layer;
mod watch;

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Instant;

use axum::http::{HeaderMap, header};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};

use self::account::Account;
pub use self::caller::{Caller, Charge};
use self::key_file::{KeyEntry, KeyHash, KeyLimits};

/// The keys requests may bear; with none, nobody is asked for one.
#[derive(Clone, Default)]
pub struct ApiKeys(Arc<Inner>);

/// A key, and whose it is.
type Known = (KeyHash, Arc<Account>);

#[derive(Default)]
struct Inner {
    /// From the command line.
    fixed: Vec<Known>,
    file: Option<PathBuf>,
    from_file: RwLock<Arc<Vec<Known>>>,
    refused: AtomicU64,
}

impl ApiKeys {
    /// `keys` in clear, named `api-key-1` and so on, and those of a file, which may come to hold others.
    pub fn open(keys: &[String], file: Option<&Path>) -> Result<ApiKeys, String> {
        let now = Instant::now();
        let named = (1..).zip(keys).map(|(number, key)| {
            let account = Account::new(&format!("api-key-{number}"), KeyLimits::default(), now);
            (key_file::hash(key.as_bytes()), Arc::new(account))
        });
        let inner = Inner { fixed: named.collect(), file: file.map(Path::to_owned), ..Inner::default() };
        let keys = ApiKeys(Arc::new(inner));
        if let Some(file) = file {
            keys.replace(key_file::read(file)?)?;
        }
        Ok(keys)
    }

    /// Must requests bear a key? A file without one lets nobody in.
    pub fn required(&self) -> bool {
        !self.0.fixed.is_empty() || self.0.file.is_some()
    }

    /// Who sent a request with these headers; `None` must not get in. Hashes are compared, each of them in full, so that the
    /// time taken tells nothing about any key.
    pub fn identify(&self, headers: &HeaderMap) -> Option<Caller> {
        if !self.required() {
            return Some(Caller::default());
        }
        let account = given(headers).and_then(|key| self.account_of(&key_file::hash(&key)));
        if account.is_none() {
            self.0.refused.fetch_add(1, Ordering::Relaxed);
        }
        account.map(Caller::new)
    }

    fn account_of(&self, given: &KeyHash) -> Option<Arc<Account>> {
        let from_file = self.of_file();
        let (mut found, mut position) = (Choice::from(0), 0u64);
        for (index, (hash, _)) in (0..).zip(self.0.fixed.iter().chain(from_file.iter())) {
            let same = hash.ct_eq(given);
            position.conditional_assign(&index, same);
            found |= same;
        }
        let position = usize::try_from(position).ok()?;
        let (_, account) = self.0.fixed.iter().chain(from_file.iter()).nth(position)?;
        bool::from(found).then(|| account.clone())
    }

    /// Every name that requests may come under now.
    pub fn accounts(&self) -> Vec<Arc<Account>> {
        self.0.fixed.iter().chain(self.of_file().iter()).map(|(_, account)| account.clone()).collect()
    }

    /// Requests that bore no key or a wrong one.
    pub fn refused(&self) -> u64 {
        self.0.refused.load(Ordering::Relaxed)
    }

    /// Lets in the keys of `entries` instead of those that came from the file before. Names that stay keep what they have
    /// used.
    fn replace(&self, entries: Vec<KeyEntry>) -> Result<(), String> {
        let now = Instant::now();
        for (hash, account) in &self.0.fixed {
            if let Some(entry) = entries.iter().find(|entry| entry.name == **account.name()) {
                return Err(format!("the name {} is taken by a key of --api-key", entry.name));
            }
            if let Some(entry) = entries.iter().find(|entry| entry.hash == *hash) {
                return Err(format!("the key of {} is one of --api-key", entry.name));
            }
        }
        let before = self.of_file();
        let before: HashMap<&str, &Arc<Account>> =
            before.iter().map(|(_, account)| (&**account.name(), account)).collect();
        let accounts = entries.iter().map(|entry| {
            let account = match before.get(entry.name.as_str()) {
                Some(&account) => {
                    account.set_limits(entry.limits, now);
                    account.clone()
                }
                None => Arc::new(Account::new(&entry.name, entry.limits, now)),
            };
            (entry.hash, account)
        });
        let accounts = Arc::new(accounts.collect());
        // Nothing that holds the lock can leave it half changed.
        *self.0.from_file.write().unwrap_or_else(PoisonError::into_inner) = accounts;
        Ok(())
    }

    fn of_file(&self) -> Arc<Vec<Known>> {
        self.0.from_file.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The key in a request's headers.
fn given(headers: &HeaderMap) -> Option<Cow<'_, [u8]>> {
    let authorization = headers.get(header::AUTHORIZATION).map_or(&[][..], |value| value.as_bytes());
    let after = |scheme: &str| {
        let (found, rest) = authorization.split_at_checked(scheme.len())?;
        found.eq_ignore_ascii_case(scheme.as_bytes()).then(|| rest.trim_ascii())
    };
    if let Some(key) = after("Bearer ") {
        return Some(key.into());
    }
    if let Some(password) = after("Basic ").filter(|_| is_own_page(headers)).and_then(password) {
        return Some(password.into());
    }
    // Anthropic's clients have a header of their own.
    headers.get("x-api-key").map(|value| value.as_bytes().trim_ascii().into())
}

/// What a browser was told when it asked for a password; the user's name does not matter.
fn password(encoded: &[u8]) -> Option<Vec<u8>> {
    let mut pair = STANDARD.decode(encoded).ok()?;
    let colon = pair.iter().position(|&byte| byte == b':')?;
    Some(pair.split_off(colon + 1))
}

/// Whether no page of another server sent this: browsers send a password they know to whoever asked for it, whatever page
/// makes them.
fn is_own_page(headers: &HeaderMap) -> bool {
    let Some(origin) = headers.get(header::ORIGIN) else { return true };
    let host = headers.get(header::HOST).map(|value| value.as_bytes());
    let origin = origin.as_bytes();
    let authority = origin.strip_prefix(b"http://").or_else(|| origin.strip_prefix(b"https://"));
    authority.is_some() && authority == host
}

impl std::fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "ApiKeys({} hidden)", self.0.fixed.len() + self.of_file().len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bearer(value: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(header::AUTHORIZATION, value.parse().unwrap());
        headers
    }

    fn name(keys: &ApiKeys, headers: &HeaderMap) -> Option<String> {
        keys.identify(headers).map(|caller| caller.name().map(|name| name.to_string()).unwrap_or_default())
    }

    #[test]
    fn keys_from_the_command_line() {
        let keys = ApiKeys::open(&["first".to_owned(), "second".to_owned()], None).unwrap();
        for (value, expected) in [
            ("Bearer first", Some("api-key-1")),
            ("bearer second", Some("api-key-2")),
            ("Bearer secone", None),
            ("Bearer firs", None),
            ("Bearer ", None),
            ("Bearer", None),
            ("Basic first", None),
            ("first", None),
        ] {
            assert_eq!(name(&keys, &bearer(value)).as_deref(), expected, "{value:?}");
            assert_eq!(name(&ApiKeys::default(), &bearer(value)).as_deref(), Some(""));
        }
        assert!(keys.identify(&HeaderMap::new()).is_none());
        assert_eq!(keys.refused(), 7);
        let mut headers = HeaderMap::new();
        headers.insert("x-api-key", "second".parse().unwrap());
        assert!(keys.identify(&headers).is_some());
        headers.insert("x-api-key", "third".parse().unwrap());
        assert!(keys.identify(&headers).is_none());
        assert_eq!(format!("{keys:?}"), "ApiKeys(2 hidden)");
    }

    #[test]
    fn browsers_give_a_key_as_a_password_for_our_own_pages_alone() {
        let keys = ApiKeys::open(&["se:same".to_owned()], None).unwrap();
        let basic = |pair: &str| format!("Basic {}", STANDARD.encode(pair));
        for (authorization, origin, let_in) in [
            (basic(":se:same"), None, true),
            (basic("anna:se:same"), None, true),
            (basic("anna:se:same").replace("Basic", "basic"), None, true),
            (basic("anna:se:same"), Some("http://rill.example:8000"), true),
            (basic("anna:se:same"), Some("https://rill.example:8000"), true),
            (basic("anna:se:same"), Some("http://evil.example"), false),
            (basic("anna:se:same"), Some("http://rill.example"), false),
            (basic("anna:se:same"), Some("null"), false),
            (basic("se:same"), None, false),
            (basic("se"), None, false),
            ("Basic !".to_owned(), None, false),
            // Whoever spells the key out knows it.
            ("Bearer se:same".to_owned(), Some("http://evil.example"), true),
        ] {
            let mut headers = bearer(&authorization);
            headers.insert(header::HOST, "rill.example:8000".parse().unwrap());
            origin.map(|origin| headers.insert(header::ORIGIN, origin.parse().unwrap()));
            assert_eq!(keys.identify(&headers).is_some(), let_in, "{authorization} {origin:?}");
        }
    }

    fn entry(name: &str, key: &str) -> KeyEntry {
        KeyEntry { name: name.to_owned(), hash: key_file::hash(key.as_bytes()), limits: KeyLimits::default() }
    }

    #[test]
    fn a_file_may_come_to_hold_other_keys_and_an_empty_one_lets_nobody_in() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys");
        std::fs::write(&path, "").unwrap();
        let keys = ApiKeys::open(&[], Some(&path)).unwrap();
        assert!(keys.required() && keys.identify(&bearer("Bearer a")).is_none());
        keys.replace(vec![entry("anna", "a"), entry("bert", "b")]).unwrap();
        let anna = keys.accounts()[0].clone();
        assert_eq!(name(&keys, &bearer("Bearer b")).as_deref(), Some("bert"));
        // Another key of the same name, and one gone.
        keys.replace(vec![entry("anna", "a2")]).unwrap();
        assert!(keys.identify(&bearer("Bearer a")).is_none() && keys.identify(&bearer("Bearer b")).is_none());
        assert_eq!(name(&keys, &bearer("Bearer a2")).as_deref(), Some("anna"));
        assert!(Arc::ptr_eq(&anna, &keys.accounts()[0]));
    }

    #[test]
    fn names_and_keys_of_the_command_line_are_taken() {
        let keys = ApiKeys::open(&["first".to_owned()], None).unwrap();
        assert!(keys.replace(vec![entry("api-key-1", "a")]).unwrap_err().contains("api-key-1 is taken"));
        assert!(keys.replace(vec![entry("anna", "first")]).unwrap_err().contains("the key of anna"));
    }
}
