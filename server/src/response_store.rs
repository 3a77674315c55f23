//! Responses kept for requests that go on from them: bounded in number and bytes, the oldest goes first.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::Value;

use crate::protocol::chat::{Content, Message};

const KEPT_MAX: usize = 1024;
const BYTES_MAX: usize = 64 << 20;

/// A finished response.
#[derive(Debug, Clone)]
pub struct Kept {
    /// Name of the key that asked for it, if keys are asked for: others do not find it.
    pub owner: Option<Arc<str>>,
    /// Its body.
    pub response: Value,
    /// Everything said so far, the response included; no instructions.
    pub turns: Vec<Message>,
}

/// What is kept.
#[derive(Default)]
pub struct ResponseStore(Mutex<Entries>);

#[derive(Default)]
struct Entries {
    by_id: HashMap<String, (Kept, usize)>,
    /// Ids, oldest first; those deleted may still be among them.
    order: VecDeque<String>,
    bytes: usize,
}

impl Entries {
    fn remove(&mut self, id: &str) -> bool {
        let removed = self.by_id.remove(id);
        self.bytes -= removed.as_ref().map_or(0, |(_, bytes)| *bytes);
        removed.is_some()
    }
}

impl ResponseStore {
    pub fn keep(&self, id: String, kept: Kept) {
        let bytes = kept.response.to_string().len() + kept.turns.iter().map(bytes_of).sum::<usize>();
        if bytes > BYTES_MAX {
            return;
        }
        let mut entries = self.entries();
        entries.bytes += bytes;
        entries.order.push_back(id.clone());
        entries.by_id.insert(id, (kept, bytes));
        while entries.order.len() > KEPT_MAX || entries.bytes > BYTES_MAX {
            let Some(oldest) = entries.order.pop_front() else { break };
            entries.remove(&oldest);
        }
    }

    pub fn get(&self, id: &str, owner: Option<&Arc<str>>) -> Option<Kept> {
        let entries = self.entries();
        let (kept, _) = entries.by_id.get(id)?;
        (kept.owner.as_ref() == owner).then(|| kept.clone())
    }

    /// Whether there was one.
    pub fn delete(&self, id: &str, owner: Option<&Arc<str>>) -> bool {
        let mut entries = self.entries();
        if entries.by_id.get(id).is_none_or(|(kept, _)| kept.owner.as_ref() != owner) {
            return false;
        }
        entries.order.retain(|kept| kept != id);
        entries.remove(id)
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        // A panic half way leaves at worst a count that is off.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn bytes_of(message: &Message) -> usize {
    let content = match &message.content {
        Some(Content::Text(text)) => text.len(),
        Some(Content::Parts(parts)) => parts.iter().map(|part| part.text.as_ref().map_or(0, String::len)).sum(),
        None => 0,
    };
    let calls = message.tool_calls.iter().flatten().map(|call| call.to_string().len()).sum::<usize>();
    content + calls + size_of::<Message>()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(bytes: usize) -> Kept {
        let text = Content::Text("x".repeat(bytes));
        Kept {
            owner: None,
            response: Value::Null,
            turns: vec![Message { content: Some(text), ..Message::default() }],
        }
    }

    #[test]
    fn the_oldest_go_first() {
        let store = ResponseStore::default();
        for number in 0..KEPT_MAX + 2 {
            store.keep(number.to_string(), kept(1));
        }
        assert!(store.get("1", None).is_none() && store.get("2", None).is_some());
        assert!(store.delete("2", None) && !store.delete("2", None) && store.get("2", None).is_none());
        store.keep("large".to_owned(), kept(BYTES_MAX - (1 << 20)));
        store.keep("next".to_owned(), kept(1 << 20));
        assert!(store.get("large", None).is_none() && store.get("next", None).is_some());
        store.keep("too large".to_owned(), kept(BYTES_MAX));
        assert!(store.get("too large", None).is_none() && store.get("next", None).is_some());
    }
}
