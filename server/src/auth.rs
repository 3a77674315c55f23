//! API keys.

use std::hint::black_box;

use axum::http::{HeaderMap, header};

/// The keys requests may carry; with none, nobody is asked for one.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct ApiKeys(Vec<String>);

impl ApiKeys {
    pub fn new(keys: Vec<String>) -> Self {
        ApiKeys(keys)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Does a request with these headers get in? Every key is compared in full, so that the time taken tells nothing
    /// about any of them but its length.
    pub fn allow(&self, headers: &HeaderMap) -> bool {
        if self.0.is_empty() {
            return true;
        }
        let bearer = headers
            .get(header::AUTHORIZATION)
            .map(|value| value.as_bytes())
            .and_then(|value| value.split_at_checked("Bearer ".len()))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case(b"Bearer "))
            .map(|(_, key)| key.trim_ascii());
        // Anthropic's clients have a header of their own.
        let own = || headers.get("x-api-key").map(|value| value.as_bytes().trim_ascii());
        let Some(given) = bearer.or_else(own) else { return false };
        self.0.iter().fold(false, |found, key| found | same(key.as_bytes(), given))
    }
}

impl std::fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "ApiKeys({} hidden)", self.0.len())
    }
}

fn same(a: &[u8], b: &[u8]) -> bool {
    if a.len() != b.len() {
        return false;
    }
    let difference = a.iter().zip(b).fold(0, |difference, (x, y)| black_box(difference | (x ^ y)));
    difference == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys() {
        let keys = ApiKeys::new(vec!["first".to_owned(), "second".to_owned()]);
        for (value, expected) in [
            (Some("Bearer first"), true),
            (Some("bearer second"), true),
            (Some("Bearer secone"), false),
            (Some("Bearer firs"), false),
            (Some("Bearer "), false),
            (Some("Bearer"), false),
            (Some("Basic first"), false),
            (Some("first"), false),
            (None, false),
        ] {
            let mut headers = HeaderMap::new();
            if let Some(value) = value {
                headers.insert(header::AUTHORIZATION, value.parse().unwrap());
            }
            assert_eq!(keys.allow(&headers), expected, "{value:?}");
            assert!(ApiKeys::default().allow(&headers));
        }
        let mut headers = HeaderMap::new();
        headers.insert("x-api-key", "second".parse().unwrap());
        assert!(keys.allow(&headers));
        headers.insert("x-api-key", "third".parse().unwrap());
        assert!(!keys.allow(&headers));
        assert_eq!(format!("{keys:?}"), "ApiKeys(2 hidden)");
    }
}
