//! `rill keys new`: a key and the line that lets it in.

use std::io::{Read, Write};

use crate::auth::key_file::{KeyEntry, KeyLimits, check_name, hash};
use crate::cli::keys::{KeysCommand, NewKeyFlags};

/// Random bytes in a key.
const KEY_BYTES: usize = 32;
/// Shorter ones could be guessed from their hashes.
const OWN_KEY_BYTES_MIN: usize = 16;
const OWN_KEY_BYTES_MAX: u64 = 4096;

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    #[error("{0}")]
    Flags(String),
    #[error(
        "the key on standard input must be {OWN_KEY_BYTES_MIN} to {OWN_KEY_BYTES_MAX} characters long, not {0}"
    )]
    Length(usize),
    #[error("the key on standard input must be of visible ASCII characters, as headers carry them")]
    Characters,
    #[error(transparent)]
    Io(#[from] std::io::Error),
    #[error("the system gives no random numbers: {0}")]
    Random(getrandom::Error),
}

pub fn run(command: KeysCommand) -> Result<(), KeysError> {
    let KeysCommand::New(flags) = command;
    let key = if flags.stdin { Some(read_key(std::io::stdin().lock())?) } else { None };
    let made = key.is_none();
    let key = key.map_or_else(random_key, Ok)?;
    let line = entry(&flags, &key)?.to_line();
    writeln!(std::io::stdout(), "{line}")?;
    if made {
        writeln!(std::io::stderr(), "The key of {}, which is kept nowhere: {key}", flags.name)?;
    }
    Ok(())
}

fn entry(flags: &NewKeyFlags, key: &str) -> Result<KeyEntry, KeysError> {
    let limits = KeyLimits {
        requests_per_minute: flags.requests_per_minute,
        tokens_per_minute: flags.tokens_per_minute,
        concurrency: flags.concurrency,
        priority: flags.priority,
    };
    check_name(&flags.name).and_then(|()| limits.check()).map_err(KeysError::Flags)?;
    Ok(KeyEntry { name: flags.name.clone(), hash: hash(key.as_bytes()), limits })
}

fn random_key() -> Result<String, KeysError> {
    let mut bytes = [0; KEY_BYTES];
    getrandom::fill(&mut bytes).map_err(KeysError::Random)?;
    Ok(bytes.iter().fold("rill-".to_owned(), |key, byte| format!("{key}{byte:02x}")))
}

fn read_key(input: impl Read) -> Result<String, KeysError> {
    let mut text = String::new();
    input.take(OWN_KEY_BYTES_MAX + 2).read_to_string(&mut text)?;
    let key = text.trim();
    if !(OWN_KEY_BYTES_MIN..=OWN_KEY_BYTES_MAX as usize).contains(&key.len()) {
        return Err(KeysError::Length(key.len()));
    }
    if !key.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(KeysError::Characters);
    }
    Ok(key.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_long_and_never_the_same() {
        let (a, b) = (random_key().unwrap(), random_key().unwrap());
        assert!(a.len() == 69 && a.starts_with("rill-") && a != b);
    }

    #[test]
    fn keys_of_ones_own() {
        assert_eq!(read_key(&b"  0123456789abcdef\n"[..]).unwrap(), "0123456789abcdef");
        assert!(matches!(read_key(&b"short\n"[..]), Err(KeysError::Length(5))));
        assert!(matches!(read_key(&[b'a'; 10_000][..]), Err(KeysError::Length(4098))));
        assert!(matches!(read_key("0123456789abcdéf".as_bytes()), Err(KeysError::Characters)));
        assert!(matches!(read_key(&b"0123456789 abcdef"[..]), Err(KeysError::Characters)));
    }
}
