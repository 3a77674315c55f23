//! An answer as the items of a response, and what happens to each as the events of its stream.

use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use rill_engine::{Event, FinishReason, Usage};
use serde_json::{Map, Value, json};

use crate::answer::{AnswerReader, Piece};
use crate::app::AppState;
use crate::event_stream::Frames;
use crate::protocol::ApiError;
use crate::protocol::chat::{Content, Message};
use crate::protocol::responses::{InputDetails, OutputDetails, ResponseUsage};
use crate::response_store::Kept;
use crate::responses_request::add_call;
use crate::sse::write_json;

/// A response under construction.
pub struct ResponseWriter {
    state: Arc<AppState>,
    /// The response object: `output` and `usage` come at its end.
    response: Map<String, Value>,
    id: String,
    reader: AnswerReader,
    items: Vec<Value>,
    /// The item being written and the text it has so far.
    open: Option<(Kind, String)>,
    /// What is kept for requests that go on from this one, and for whom; `None`: nothing.
    kept: Option<(Vec<Message>, Option<Arc<str>>)>,
    sequence: u64,
    /// Tokens of thoughts, their tags included.
    reasoning_tokens: u32,
    /// Nobody reads the events.
    silent: bool,
    buffer: BytesMut,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Message,
    Reasoning,
    Call,
}

impl ResponseWriter {
    /// `response` has all fields but those known at the end; `kept` is what precedes the answer, and whose it is.
    pub fn new(
        state: Arc<AppState>,
        response: Map<String, Value>,
        reader: AnswerReader,
        kept: Option<(Vec<Message>, Option<Arc<str>>)>,
        streams: bool,
    ) -> ResponseWriter {
        let id = response.get("id").and_then(Value::as_str).unwrap_or_default().to_owned();
        let mut writer = ResponseWriter {
            state,
            response,
            id,
            reader,
            items: Vec::new(),
            open: None,
            kept,
            sequence: 0,
            reasoning_tokens: 0,
            silent: !streams,
            buffer: BytesMut::with_capacity(1024),
        };
        for event in ["response.created", "response.in_progress"] {
            let response = writer.response.clone();
            writer.emit(event, json!({"response": response}));
        }
        writer
    }

    fn emit(&mut self, event: &str, mut data: Value) {
        if self.silent {
            return;
        }
        data["type"] = json!(event);
        data["sequence_number"] = json!(self.sequence);
        self.sequence += 1;
        self.buffer.put_slice(b"event: ");
        self.buffer.put_slice(event.as_bytes());
        self.buffer.put_slice(b"\ndata: ");
        write_json(&mut self.buffer, &data);
        self.buffer.put_slice(b"\n\n");
    }

    /// An id of its own for the item that begins.
    fn item_id(&self, prefix: &str) -> String {
        let own = self.id.split_once('_').map_or("", |(_, random)| random);
        format!("{prefix}_{own}{:02x}", self.items.len())
    }

    /// Position and id of the item being written.
    fn place(&self) -> (usize, String) {
        let last = self.items.len().saturating_sub(1);
        (last, self.items.last().and_then(|item| item["id"].as_str()).unwrap_or_default().to_owned())
    }

    fn begin(&mut self, kind: Kind, item: Value) {
        self.close("completed");
        self.items.push(item.clone());
        self.open = Some((kind, String::new()));
        let (index, id) = self.place();
        self.emit("response.output_item.added", json!({"output_index": index, "item": item}));
        let part = match kind {
            Kind::Message => json!({"type": "output_text", "text": "", "annotations": [], "logprobs": []}),
            Kind::Reasoning => json!({"type": "reasoning_text", "text": ""}),
            Kind::Call => return,
        };
        let data = json!({"item_id": id, "output_index": index, "content_index": 0, "part": part});
        self.emit("response.content_part.added", data);
    }

    fn close(&mut self, status: &str) {
        let Some((kind, text)) = self.open.take() else { return };
        let (index, id) = self.place();
        let part = match kind {
            Kind::Message => json!({"type": "output_text", "text": text, "annotations": [], "logprobs": []}),
            Kind::Reasoning => json!({"type": "reasoning_text", "text": text}),
            Kind::Call => Value::Null,
        };
        let place = json!({"item_id": id, "output_index": index, "content_index": 0});
        let with = |name: &str, value: Value| {
            let mut data = place.clone();
            data[name] = value;
            data
        };
        match kind {
            Kind::Message => {
                let mut done = with("text", json!(text));
                done["logprobs"] = json!([]);
                self.emit("response.output_text.done", done);
            }
            Kind::Reasoning => self.emit("response.reasoning_text.done", with("text", json!(text))),
            Kind::Call => {
                let name = self.items[index]["name"].clone();
                let data = json!({"item_id": id, "output_index": index, "name": name, "arguments": text});
                self.emit("response.function_call_arguments.done", data);
            }
        }
        if kind != Kind::Call {
            self.emit("response.content_part.done", with("part", part.clone()));
        }
        let item = &mut self.items[index];
        item["status"] = json!(status);
        match kind {
            Kind::Call => item["arguments"] = json!(text),
            Kind::Message | Kind::Reasoning => item["content"] = json!([part]),
        }
        let item = item.clone();
        self.emit("response.output_item.done", json!({"output_index": index, "item": item}));
    }

    fn piece(&mut self, piece: Piece) {
        let (kind, text) = match piece {
            Piece::Content(text) if text.is_empty() => return,
            Piece::Content(text) => (Kind::Message, text),
            Piece::Reasoning(text) => (Kind::Reasoning, text),
            Piece::Arguments { text, .. } => (Kind::Call, text),
            Piece::Call { id, name, .. } => {
                let item = json!({"type": "function_call", "id": self.item_id("fc"), "call_id": id, "name": name,
                                  "arguments": "", "status": "in_progress"});
                return self.begin(Kind::Call, item);
            }
        };
        if self.open.as_ref().is_none_or(|(open, _)| *open != kind) {
            let item = match kind {
                Kind::Message => json!({"type": "message", "id": self.item_id("msg"), "status": "in_progress",
                                        "role": "assistant", "content": []}),
                Kind::Reasoning => json!({"type": "reasoning", "id": self.item_id("rs"), "summary": [],
                                          "content": [], "status": "in_progress"}),
                Kind::Call => return,
            };
            self.begin(kind, item);
        }
        let (index, id) = self.place();
        if let Some((_, written)) = &mut self.open {
            written.push_str(&text);
        }
        let mut data = json!({"item_id": id, "output_index": index, "delta": text});
        let event = match kind {
            Kind::Call => "response.function_call_arguments.delta",
            Kind::Message => {
                data["content_index"] = json!(0);
                data["logprobs"] = json!([]);
                "response.output_text.delta"
            }
            Kind::Reasoning => {
                data["content_index"] = json!(0);
                "response.reasoning_text.delta"
            }
        };
        self.emit(event, data);
    }

    /// Takes in the text that `tokens` tokens let out.
    fn text(&mut self, text: &str, tokens: usize) {
        let thinking = self.reader.is_thinking();
        for piece in self.reader.push(text) {
            self.piece(piece);
        }
        if thinking || self.reader.is_thinking() {
            self.reasoning_tokens += tokens as u32;
        }
    }

    /// The response as far as it is written.
    pub fn into_response(self) -> Value {
        Value::Object(self.response)
    }

    /// The end: the response is whole, and kept if asked for.
    fn end(&mut self, reason: FinishReason, usage: Usage) {
        for piece in self.reader.finish() {
            self.piece(piece);
        }
        let cut = reason == FinishReason::Length;
        let status = if cut { "incomplete" } else { "completed" };
        if self.items.is_empty() {
            let item = json!({"type": "message", "id": self.item_id("msg"), "status": "in_progress",
                              "role": "assistant", "content": []});
            self.begin(Kind::Message, item);
        }
        self.close(status);
        self.response.insert("status".to_owned(), json!(status));
        if cut {
            self.response.insert("incomplete_details".to_owned(), json!({"reason": "max_output_tokens"}));
        }
        self.response.insert("output".to_owned(), json!(self.items));
        self.response.insert(
            "usage".to_owned(),
            json!(ResponseUsage {
                input_tokens: usage.prompt_tokens,
                input_tokens_details: InputDetails { cached_tokens: usage.cached_tokens },
                output_tokens: usage.completion_tokens,
                output_tokens_details: OutputDetails { reasoning_tokens: self.reasoning_tokens },
                total_tokens: usage.prompt_tokens + usage.completion_tokens,
            }),
        );
        let response = Value::Object(self.response.clone());
        self.emit(&format!("response.{status}"), json!({"response": response}));
        if let Some((mut turns, owner)) = self.kept.take() {
            for item in &self.items {
                remember(item, &mut turns);
            }
            self.state.responses().keep(self.id.clone(), Kept { owner, response, turns });
        }
    }
}

/// Adds an item of an answer to the turns it was part of.
fn remember(item: &Value, turns: &mut Vec<Message>) {
    match item["type"].as_str() {
        Some("message") => turns.push(Message {
            role: "assistant".to_owned(),
            content: Some(Content::Text(item["content"][0]["text"].as_str().unwrap_or_default().to_owned())),
            ..Message::default()
        }),
        Some("function_call") => {
            let function = json!({"name": item["name"], "arguments": item["arguments"]});
            add_call(json!({"id": item["call_id"], "type": "function", "function": function}), turns);
        }
        _ => {}
    }
}

impl Frames for ResponseWriter {
    fn event(&mut self, _: usize, event: Event) -> bool {
        match event {
            Event::Prompt { .. } | Event::Embedding { .. } => {}
            Event::Delta { text, token_ids, .. } => self.text(&text, token_ids.len()),
            Event::Finished { reason, usage } => self.end(reason, usage),
            Event::Failed { kind, message } => {
                let error = ApiError::failed(kind, message);
                let code = if error.status.is_client_error() { "invalid_prompt" } else { "server_error" };
                self.response.insert("status".to_owned(), json!("failed"));
                self.response.insert("error".to_owned(), json!({"code": code, "message": error.message}));
                let response = self.response.clone();
                self.emit("response.failed", json!({"response": response}));
                return false;
            }
        }
        true
    }

    fn finish(&mut self) {}

    fn keep_alive(&mut self) {
        self.buffer.put_slice(b": ping\n\n");
    }

    fn take(&mut self) -> Bytes {
        self.buffer.split().freeze()
    }

    fn pending_bytes(&self) -> usize {
        self.buffer.len()
    }
}
