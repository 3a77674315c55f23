//! The file of API keys: one JSON object a line, `#` before a comment. Keys are kept as SHA-256 hashes:
//!
//! ```text
//! # who         what requests bear        optional: limits, and a priority (smaller runs earlier)
//! {"name":"anna","sha256":"9f86d081…","requests_per_minute":60,"tokens_per_minute":100000,"concurrency":4,"priority":1}
//! ```
//!
//! A plain hash is enough: keys made here have 256 random bits, so that none can be guessed from it.

use std::collections::HashMap;
use std::io::Read;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Each key is a handful of metric series.
const KEYS_MAX: usize = 4096;
const FILE_BYTES_MAX: u64 = 4 << 20;
const NAME_BYTES_MAX: usize = 64;
/// Far above any traffic, far below where arithmetic on it is inexact.
const LIMIT_MAX: u64 = 1 << 40;

/// What a key is kept as.
pub type KeyHash = [u8; 32];

pub fn hash(key: &[u8]) -> KeyHash {
    Sha256::digest(key).into()
}

/// What one key may use; `None` is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KeyLimits {
    pub requests_per_minute: Option<u64>,
    /// Prompt and completion together.
    pub tokens_per_minute: Option<u64>,
    /// Requests answered at once.
    pub concurrency: Option<u64>,
    /// Of the key's requests, which may ask for a later one. `None`: as they ask.
    pub priority: Option<i32>,
}

/// One line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyEntry {
    pub name: String,
    pub hash: KeyHash,
    pub limits: KeyLimits,
}

/// A line as written; flat, since serde cannot refuse unknown fields beside a flattened struct.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    name: String,
    sha256: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    requests_per_minute: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tokens_per_minute: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    concurrency: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    priority: Option<i32>,
}

impl KeyEntry {
    /// The line for the file, without its end.
    pub fn to_line(&self) -> String {
        let KeyLimits { requests_per_minute, tokens_per_minute, concurrency, priority } = self.limits;
        let sha256 = self.hash.iter().map(|byte| format!("{byte:02x}")).collect();
        let name = self.name.clone();
        let line = Line { name, sha256, requests_per_minute, tokens_per_minute, concurrency, priority };
        serde_json::to_string(&line).unwrap_or_default()
    }

    fn of_line(text: &str) -> Result<KeyEntry, String> {
        let line: Line = serde_json::from_str(text).map_err(|error| error.to_string())?;
        check_name(&line.name)?;
        let hash = of_hex(&line.sha256).ok_or_else(|| "sha256 must be 64 hexadecimal digits".to_owned())?;
        let limits = KeyLimits {
            requests_per_minute: line.requests_per_minute,
            tokens_per_minute: line.tokens_per_minute,
            concurrency: line.concurrency,
            priority: line.priority,
        };
        limits.check()?;
        Ok(KeyEntry { name: line.name, hash, limits })
    }
}

impl KeyLimits {
    pub fn check(&self) -> Result<(), String> {
        for (field, value) in [
            ("requests_per_minute", self.requests_per_minute),
            ("tokens_per_minute", self.tokens_per_minute),
            ("concurrency", self.concurrency),
        ] {
            if let Some(value) = value.filter(|value| !(1..=LIMIT_MAX).contains(value)) {
                return Err(format!("{field} must be between 1 and {LIMIT_MAX}, not {value}"));
            }
        }
        Ok(())
    }
}

/// Names are seen in logs and metrics.
pub fn check_name(name: &str) -> Result<(), String> {
    let fine = |c: char| c.is_ascii_alphanumeric() || "._@-".contains(c);
    if (1..=NAME_BYTES_MAX).contains(&name.len()) && name.chars().all(fine) {
        return Ok(());
    }
    Err(format!("name must be 1 to {NAME_BYTES_MAX} letters, digits and . _ @ -, not {name:?}"))
}

fn of_hex(text: &str) -> Option<KeyHash> {
    let mut hash = KeyHash::default();
    if text.len() != 2 * hash.len() || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    for (byte, digits) in hash.iter_mut().zip(text.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(hash)
}

/// All keys of the file.
pub fn read(path: &Path) -> Result<Vec<KeyEntry>, String> {
    let mut text = String::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text))
        .map_err(|error| format!("{}: {error}", path.display()))?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(format!("{}: larger than the limit of {FILE_BYTES_MAX} bytes", path.display()));
    }
    parse(&text).map_err(|error| format!("{}: {error}", path.display()))
}

fn parse(text: &str) -> Result<Vec<KeyEntry>, String> {
    let mut entries: Vec<KeyEntry> = Vec::new();
    let mut names: HashMap<String, usize> = HashMap::new();
    let mut hashes: HashMap<KeyHash, usize> = HashMap::new();
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let entry = KeyEntry::of_line(line).map_err(|error| format!("line {number}: {error}"))?;
        if let Some(earlier) = names.insert(entry.name.clone(), number) {
            return Err(format!("line {number}: the name {} is that of line {earlier}", entry.name));
        }
        if let Some(earlier) = hashes.insert(entry.hash, number) {
            return Err(format!("line {number}: the key of {} is that of line {earlier}", entry.name));
        }
        if entries.len() == KEYS_MAX {
            return Err(format!("line {number}: more than {KEYS_MAX} keys"));
        }
        entries.push(entry);
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HASH: &str = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08";

    #[test]
    fn lines_are_read_as_they_are_written() {
        let limits = KeyLimits { requests_per_minute: Some(60), priority: Some(-2), ..KeyLimits::default() };
        let entry = KeyEntry { name: "anna@x.example".to_owned(), hash: hash(b"test"), limits };
        let line = entry.to_line();
        let expected =
            format!(r#"{{"name":"anna@x.example","sha256":"{HASH}","requests_per_minute":60,"priority":-2}}"#);
        assert_eq!(line, expected);
        let other = KeyEntry { name: "bert".to_owned(), hash: hash(b"other"), limits: KeyLimits::default() };
        let text = format!("# keys\n\n{line}\r\n  {}\n", other.to_line());
        assert_eq!(parse(&text), Ok(vec![entry, other]));
        assert_eq!(parse(""), Ok(Vec::new()));
    }

    #[test]
    fn mistakes_are_named_with_their_line() {
        let anna = format!(r#"{{"name":"anna","sha256":"{HASH}"}}"#);
        for (text, part) in [
            ("anna".to_owned(), "line 1: expected value"),
            ("\n{}".to_owned(), "line 2: missing field `name`"),
            (format!(r#"{{"name":"a b","sha256":"{HASH}"}}"#), "name must be 1 to 64 letters"),
            (format!(r#"{{"name":"","sha256":"{HASH}"}}"#), "name must be"),
            (r#"{"name":"a","sha256":"+f"}"#.to_owned(), "sha256 must be 64 hexadecimal digits"),
            (format!(r#"{{"name":"a","sha256":"+{}"}}"#, &HASH[1..]), "sha256 must be"),
            (format!(r#"{{"name":"a","sha256":"{HASH}","rpm":1}}"#), "unknown field `rpm`"),
            (format!(r#"{{"name":"a","sha256":"{HASH}","concurrency":0}}"#), "concurrency must be between 1 and"),
            (format!(r#"{{"name":"a","sha256":"{HASH}","tokens_per_minute":-1}}"#), "invalid value"),
            (format!("{anna}\n{anna}"), "line 2: the name anna is that of line 1"),
            (format!("{anna}\n{}", anna.replace("anna", "bert")), "line 2: the key of bert is that of line 1"),
        ] {
            let error = parse(&text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
        let many: String = (0..=KEYS_MAX)
            .map(|i| {
                let name = format!("key{i}");
                KeyEntry { hash: hash(name.as_bytes()), name, limits: KeyLimits::default() }.to_line() + "\n"
            })
            .collect();
        assert_eq!(parse(&many), Err("line 4097: more than 4096 keys".to_owned()));
        assert!(read(Path::new("/nowhere/keys")).unwrap_err().starts_with("/nowhere/keys: "));
    }
}
