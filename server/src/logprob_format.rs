//! Engine log-probabilities → the wire's objects.

use std::collections::BTreeMap;

use rill_engine::TokenLogprobs;
use rill_models::Tokenizer;

use crate::protocol::logprobs::{
    ChatLogprobs, ChatToken, ChatTopToken, CompletionLogprobs, PromptLogprob, TopLogprobs,
};

/// Builds completions' parallel arrays token by token, keeping count of the characters that went before.
pub struct CompletionLogprobsBuilder<'a> {
    tokenizer: &'a Tokenizer,
    skip_special: bool,
    chars_before: usize,
}

impl<'a> CompletionLogprobsBuilder<'a> {
    pub fn new(tokenizer: &'a Tokenizer, skip_special: bool, chars_before: usize) -> Self {
        CompletionLogprobsBuilder { tokenizer, skip_special, chars_before }
    }

    /// Characters of text before the next token.
    pub fn chars_before(&self) -> usize {
        self.chars_before
    }

    /// Prompt tokens; an entry without log-probabilities (the first) gets null.
    pub fn push_prompt(&mut self, out: &mut CompletionLogprobs, ids: &[u32], entries: &[Option<TokenLogprobs>]) {
        for (position, &id) in ids.iter().enumerate() {
            self.push(out, id, entries.get(position).and_then(Option::as_ref));
        }
    }

    pub fn push_tokens(&mut self, out: &mut CompletionLogprobs, entries: &[TokenLogprobs]) {
        for entry in entries {
            self.push(out, entry.token, Some(entry));
        }
    }

    fn push(&mut self, out: &mut CompletionLogprobs, id: u32, entry: Option<&TokenLogprobs>) {
        out.tokens.push(completion_token(self.tokenizer, id));
        out.token_logprobs.push(entry.map(|entry| finite(entry.logprob)));
        out.top_logprobs.push(entry.map(|entry| self.top(entry)));
        out.text_offset.push(self.chars_before);
        if !(self.skip_special && self.tokenizer.is_special(id)) {
            self.chars_before += chars_begun(self.tokenizer.token_bytes(id));
        }
    }

    /// The alternatives, and the token itself with the identical number even where it is not among them.
    fn top(&self, entry: &TokenLogprobs) -> TopLogprobs {
        let own = completion_token(self.tokenizer, entry.token);
        let mut shown: Vec<(String, f32)> = Vec::with_capacity(entry.top.len() + 1);
        for &(id, logprob) in &entry.top {
            let token = completion_token(self.tokenizer, id);
            // Two ids may spell the same text: the likelier counts, and the chosen one above all.
            if token != own && !shown.iter().any(|(earlier, _)| *earlier == token) {
                shown.push((token, finite(logprob)));
            } else if id == entry.token {
                shown.push((token, finite(entry.logprob)));
            }
        }
        if !shown.iter().any(|(token, _)| *token == own) {
            shown.push((own, finite(entry.logprob)));
        }
        TopLogprobs(shown)
    }
}

/// Chat's objects; `top` alternatives each.
pub fn chat(tokenizer: &Tokenizer, entries: &[TokenLogprobs], top: usize) -> ChatLogprobs {
    let content = entries
        .iter()
        .map(|entry| ChatToken {
            token: lossy(tokenizer, entry.token),
            logprob: finite(entry.logprob),
            bytes: tokenizer.token_bytes(entry.token).to_vec(),
            top_logprobs: entry
                .top
                .iter()
                .take(top)
                .map(|&(id, logprob)| ChatTopToken {
                    token: lossy(tokenizer, id),
                    logprob: finite(logprob),
                    bytes: tokenizer.token_bytes(id).to_vec(),
                })
                .collect(),
        })
        .collect();
    ChatLogprobs { content, refusal: None }
}

/// vLLM's `prompt_logprobs`.
pub fn prompt(
    tokenizer: &Tokenizer,
    entries: &[Option<TokenLogprobs>],
) -> Vec<Option<BTreeMap<u32, PromptLogprob>>> {
    entries
        .iter()
        .map(|entry| {
            let entry = entry.as_ref()?;
            let own_rank = entry.top.iter().position(|&(id, _)| id == entry.token).map(|rank| rank + 1);
            let ranked = entry.top.iter().enumerate().map(|(rank, &(id, logprob))| (id, logprob, Some(rank + 1)));
            let own = (entry.token, entry.logprob, own_rank);
            Some(
                ranked
                    .chain([own])
                    .map(|(id, logprob, rank)| {
                        let decoded_token = lossy(tokenizer, id);
                        (id, PromptLogprob { logprob: finite(logprob), rank, decoded_token })
                    })
                    .collect(),
            )
        })
        .collect()
}

/// JSON has no infinities: vLLM's stand-in for a token that cannot be.
fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { -9999.0 }
}

fn lossy(tokenizer: &Tokenizer, id: u32) -> String {
    String::from_utf8_lossy(tokenizer.token_bytes(id)).into_owned()
}

/// A token's text, or for part of a character OpenAI's `bytes:\xNN` spelling, so that different tokens stay
/// different keys.
fn completion_token(tokenizer: &Tokenizer, id: u32) -> String {
    use std::fmt::Write;

    let bytes = tokenizer.token_bytes(id);
    match std::str::from_utf8(bytes) {
        Ok("") => format!("token_id:{id}"),
        Ok(text) => text.to_owned(),
        Err(_) => bytes.iter().fold("bytes:".to_owned(), |mut text, byte| {
            // Writing to a String cannot fail.
            let _ = write!(text, "\\x{byte:02x}");
            text
        }),
    }
}

/// Characters that begin in `bytes`: all bytes but UTF-8's continuation bytes.
fn chars_begun(bytes: &[u8]) -> usize {
    bytes.iter().filter(|&&byte| byte & 0b1100_0000 != 0b1000_0000).count()
}
