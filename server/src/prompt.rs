//! Text and messages → token ids, so that only the template and the operator can write control tokens in a chat.

use std::sync::Arc;

use aho_corasick::{AhoCorasick, MatchKind};
use rill_models::Tokenizer;
use serde_json::Value;

use crate::chat_template::{ChatTemplate, RenderInput, TemplateError, TemplateMessage};

/// Why a prompt could not be made.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum PromptError {
    #[error(transparent)]
    Template(#[from] TemplateError),
    #[error("the prompt cannot be tokenised: {0}")]
    Tokenizer(String),
    /// Found before tokenising: more bytes than the context's tokens could hold.
    #[error("the prompt is {bytes} bytes, more than {context_len} tokens can be")]
    TooLong { bytes: usize, context_len: usize },
}

/// Turns what clients send into token ids.
pub struct PromptEncoder {
    tokenizer: Arc<Tokenizer>,
    /// Spellings of all control tokens; `None` for a vocabulary without any.
    control_tokens: Option<AhoCorasick>,
    context_len: usize,
    /// No text longer than this can be within the context.
    text_bytes_max: usize,
}

impl PromptEncoder {
    pub fn new(tokenizer: Arc<Tokenizer>, context_len: usize) -> Self {
        let ids = 0..u32::try_from(tokenizer.vocab_size()).unwrap_or(u32::MAX);
        let token_bytes_max = ids.clone().map(|id| tokenizer.token_bytes(id).len()).max().unwrap_or(0).max(1);
        let spellings: Vec<&[u8]> = ids
            .filter(|&id| tokenizer.is_special(id))
            .map(|id| tokenizer.token_bytes(id))
            .filter(|bytes| !bytes.is_empty())
            .collect();
        // Leftmost-longest, as `tokenizers` finds added tokens.
        let control_tokens = if spellings.is_empty() {
            None
        } else {
            AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(spellings).ok()
        };
        // Four times: normalisers may shorten a text a little before it is cut into tokens.
        let text_bytes_max = context_len.saturating_mul(token_bytes_max).saturating_mul(4);
        PromptEncoder { tokenizer, control_tokens, context_len, text_bytes_max }
    }

    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// A plain text, whose control tokens count as such: the prompt of a completion is the operator's own.
    pub fn encode_text(&self, text: &str, add_special: bool) -> Result<Vec<u32>, PromptError> {
        self.check_length(text)?;
        self.encode(text, add_special, true)
    }

    /// A chat, in which control tokens spelled out inside a message's content or name stay text.
    pub fn encode_chat(
        &self,
        template: &ChatTemplate,
        input: &RenderInput,
        add_special: bool,
    ) -> Result<Vec<u32>, PromptError> {
        let text = template.render(input)?;
        self.check_length(&text)?;
        let Some(forged) = self.forged_ranges(template, input, &text)? else {
            return self.encode(&text, add_special, true);
        };
        let mut ids = Vec::new();
        for segment in self.segments(&text, &forged) {
            let first = segment.start == 0;
            ids.extend(self.encode(&text[segment.start..segment.end], add_special && first, !segment.forged)?);
        }
        Ok(ids)
    }

    fn encode(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<u32>, PromptError> {
        self.tokenizer
            .encode(text, add_special, parse_special)
            .map_err(|error| PromptError::Tokenizer(error.to_string()))
    }

    fn check_length(&self, text: &str) -> Result<(), PromptError> {
        if text.len() > self.text_bytes_max {
            return Err(PromptError::TooLong { bytes: text.len(), context_len: self.context_len });
        }
        Ok(())
    }

    /// Byte ranges of the rendered `text` that spell control tokens but came from the client. `None` if there are
    /// none, or if the template transforms contents so that they cannot be told.
    ///
    /// They are found by rendering once more with a placeholder for each: only spellings are replaced, so that
    /// templates may trim and cut contents, and the second render must equal the first but for the placeholders.
    fn forged_ranges(
        &self,
        template: &ChatTemplate,
        input: &RenderInput,
        text: &str,
    ) -> Result<Option<Vec<(usize, usize)>>, PromptError> {
        let Some(finder) = &self.control_tokens else { return Ok(None) };
        let mut found = false;
        let mut look = |content: &str| found |= finder.is_match(content);
        for message in input.messages {
            let fields = [&message.name, &message.tool_call_id, &message.reasoning_content];
            fields.into_iter().flatten().for_each(|text| look(text));
            look(&message.content);
            message.tool_calls.iter().flatten().for_each(|call| each_string(call, &mut look));
        }
        input.tools.unwrap_or_default().iter().for_each(|tool| each_string(tool, &mut look));
        if !found {
            return Ok(None);
        }
        let marker = unused_marker(text);
        let mut spellings = Vec::new();
        let mut mark = |content: &str| {
            let mut marked = String::with_capacity(content.len());
            let mut copied = 0;
            for found in finder.find_iter(content) {
                marked.push_str(&content[copied..found.start()]);
                marked.push_str(&format!("{marker}{};", spellings.len()));
                spellings.push(content[found.range()].to_owned());
                copied = found.end();
            }
            marked.push_str(&content[copied..]);
            marked
        };
        let messages: Vec<TemplateMessage> = input
            .messages
            .iter()
            .map(|message| TemplateMessage {
                role: message.role.clone(),
                content: mark(&message.content),
                name: message.name.as_deref().map(&mut mark),
                tool_calls: message
                    .tool_calls
                    .as_ref()
                    .map(|calls| calls.iter().map(|call| with_strings(call, &mut mark)).collect()),
                tool_call_id: message.tool_call_id.as_deref().map(&mut mark),
                reasoning_content: message.reasoning_content.as_deref().map(&mut mark),
            })
            .collect();
        let tools: Option<Vec<Value>> =
            input.tools.map(|tools| tools.iter().map(|tool| with_strings(tool, &mut mark)).collect());
        let Ok(marked) = template.render(&RenderInput { messages: &messages, tools: tools.as_deref(), ..*input })
        else {
            return Ok(None);
        };

        let mut ranges = Vec::new();
        let mut restored = String::with_capacity(text.len());
        let mut pieces = marked.split(marker.as_str());
        restored.push_str(pieces.next().unwrap_or_default());
        for piece in pieces {
            let Some((number, rest)) = piece.split_once(';') else { return Ok(None) };
            let Some(spelling) = number.parse().ok().and_then(|number: usize| spellings.get(number)) else {
                return Ok(None);
            };
            ranges.push((restored.len(), restored.len() + spelling.len()));
            restored.push_str(spelling);
            restored.push_str(rest);
        }
        Ok((restored == text).then_some(ranges))
    }

    /// Cuts `text` at genuine control tokens so that stretches with a forged one stand alone. Genuine tokens are
    /// hard boundaries for the tokenizer anyway, so that cutting there changes no id.
    fn segments(&self, text: &str, forged: &[(usize, usize)]) -> Vec<Segment> {
        let Some(finder) = &self.control_tokens else {
            return vec![Segment { start: 0, end: text.len(), forged: false }];
        };
        let mut segments: Vec<Segment> = Vec::new();
        let mut push = |start: usize, end: usize, forged: bool| match segments.last_mut() {
            _ if start == end => {}
            Some(last) if last.forged == forged => last.end = end,
            _ => segments.push(Segment { start, end, forged }),
        };
        let mut forged = forged.iter().copied().peekable();
        let mut stretch_start = 0;
        let mut stretch_forged = false;
        for found in finder.find_iter(text) {
            while forged.next_if(|range| range.1 <= found.start()).is_some() {}
            if forged.peek().is_some_and(|range| range.0 < found.end()) {
                stretch_forged = true;
                continue;
            }
            push(stretch_start, found.start(), stretch_forged);
            push(found.start(), found.end(), false);
            stretch_start = found.end();
            stretch_forged = false;
        }
        push(stretch_start, text.len(), stretch_forged);
        segments
    }
}

/// Calls `look` with every string in `value`, keys included.
fn each_string(value: &Value, look: &mut impl FnMut(&str)) {
    match value {
        Value::String(text) => look(text),
        Value::Array(items) => items.iter().for_each(|item| each_string(item, look)),
        Value::Object(fields) => fields.iter().for_each(|(key, value)| {
            look(key);
            each_string(value, look);
        }),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// `value` with every string in it, keys included, replaced.
fn with_strings(value: &Value, replace: &mut impl FnMut(&str) -> String) -> Value {
    match value {
        Value::String(text) => Value::String(replace(text)),
        Value::Array(items) => items.iter().map(|item| with_strings(item, replace)).collect(),
        Value::Object(fields) => {
            fields.iter().map(|(key, value)| (replace(key), with_strings(value, replace))).collect()
        }
        other => other.clone(),
    }
}

#[derive(Debug, PartialEq)]
struct Segment {
    start: usize,
    end: usize,
    forged: bool,
}

/// A string that does not occur in `text`, made of private-use characters that no template trims or cuts at.
fn unused_marker(text: &str) -> String {
    (0u32..)
        .map(|number| format!("\u{F8FF}{number}\u{F8FE}"))
        .find(|marker| !text.contains(marker.as_str()))
        .unwrap_or_default()
}
