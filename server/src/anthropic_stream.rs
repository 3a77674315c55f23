//! Engine events → Anthropic's server-sent events: a message of blocks, each started, added to and stopped.

use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use rill_engine::{Event, Usage};
use serde_json::{Value, json};

use crate::answer::{AnswerReader, Piece};
use crate::event_stream::Frames;
use crate::protocol::ApiError;
use crate::protocol::anthropic::MessagesUsage;
use crate::routes::messages::{MessagesError, StopWords, usage_of};
use crate::sse::write_json;

/// Writes one message.
pub struct MessageFrames {
    reader: AnswerReader,
    stop: Arc<StopWords>,
    /// The block being written: its index and kind.
    open: Option<(usize, &'static str)>,
    blocks: usize,
    buffer: BytesMut,
}

impl MessageFrames {
    /// `prompt_tokens` is told at the start, when what the cache held of them is not known yet.
    pub fn new(id: &str, model: &str, prompt_tokens: usize, reader: AnswerReader, stop: Arc<StopWords>) -> Self {
        let usage = MessagesUsage { input_tokens: prompt_tokens as u64, ..MessagesUsage::default() };
        let message = json!({
            "id": id, "type": "message", "role": "assistant", "model": model, "content": [],
            "stop_reason": null, "stop_sequence": null, "usage": usage,
        });
        let mut frames =
            MessageFrames { reader, stop, open: None, blocks: 0, buffer: BytesMut::with_capacity(1024) };
        frames.frame("message_start", &json!({"type": "message_start", "message": message}));
        frames
    }

    fn frame(&mut self, event: &str, data: &Value) {
        self.buffer.put_slice(b"event: ");
        self.buffer.put_slice(event.as_bytes());
        self.buffer.put_slice(b"\ndata: ");
        write_json(&mut self.buffer, data);
        self.buffer.put_slice(b"\n\n");
    }

    /// Makes a block of `kind` the open one, a new one if `block` says what it starts with.
    fn block(&mut self, kind: &'static str, block: Value, always_new: bool) -> usize {
        match self.open {
            Some((index, open)) if open == kind && !always_new => index,
            _ => {
                self.stop_block();
                let index = self.blocks;
                self.blocks += 1;
                self.open = Some((index, kind));
                let data = json!({"type": "content_block_start", "index": index, "content_block": block});
                self.frame("content_block_start", &data);
                index
            }
        }
    }

    fn stop_block(&mut self) {
        if let Some((index, _)) = self.open.take() {
            self.frame("content_block_stop", &json!({"type": "content_block_stop", "index": index}));
        }
    }

    fn piece(&mut self, piece: Piece) {
        let (index, delta) = match piece {
            Piece::Content(text) => {
                let index = self.block("text", json!({"type": "text", "text": ""}), false);
                (index, json!({"type": "text_delta", "text": text}))
            }
            Piece::Reasoning(text) => {
                let block = json!({"type": "thinking", "thinking": "", "signature": ""});
                let index = self.block("thinking", block, false);
                (index, json!({"type": "thinking_delta", "thinking": text}))
            }
            Piece::Call { id, name, .. } => {
                self.block("tool_use", json!({"type": "tool_use", "id": id, "name": name, "input": {}}), true);
                return;
            }
            Piece::Arguments { text, .. } => match self.open {
                Some((index, _)) => (index, json!({"type": "input_json_delta", "partial_json": text})),
                None => return,
            },
        };
        self.frame("content_block_delta", &json!({"type": "content_block_delta", "index": index, "delta": delta}));
    }

    fn end(&mut self, reason: rill_engine::FinishReason, usage: Usage) {
        for piece in self.reader.finish() {
            self.piece(piece);
        }
        if self.blocks == 0 {
            self.block("text", json!({"type": "text", "text": ""}), true);
        }
        self.stop_block();
        let (stop_reason, stop_sequence) = self.stop.of(reason, self.reader.calls() > 0);
        let delta = json!({"stop_reason": stop_reason, "stop_sequence": stop_sequence});
        self.frame("message_delta", &json!({"type": "message_delta", "delta": delta, "usage": usage_of(usage)}));
        self.frame("message_stop", &json!({"type": "message_stop"}));
    }
}

impl Frames for MessageFrames {
    fn event(&mut self, _: usize, event: Event) -> bool {
        match event {
            Event::Prompt { .. } | Event::Embedding { .. } => {}
            Event::Delta { text, .. } => {
                for piece in self.reader.push(&text) {
                    if piece != Piece::Content(String::new()) {
                        self.piece(piece);
                    }
                }
            }
            Event::Finished { reason, usage } => self.end(reason, usage),
            Event::Failed { kind, message } => {
                let error = MessagesError(ApiError::failed(kind, message));
                self.frame("error", &json!(error.body()));
                return false;
            }
        }
        true
    }

    fn finish(&mut self) {}

    fn keep_alive(&mut self) {
        self.frame("ping", &json!({"type": "ping"}));
    }

    fn take(&mut self) -> Bytes {
        self.buffer.split().freeze()
    }

    fn pending_bytes(&self) -> usize {
        self.buffer.len()
    }
}
