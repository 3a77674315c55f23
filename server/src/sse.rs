//! Engine events → OpenAI's server-sent events, assembled by hand into one buffer: this runs once a token.

use std::io::Write;
use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use rill_engine::{Event, TokenLogprobs};
use serde::Serialize;

use crate::answer::{AnswerFormat, AnswerReader, Piece};
use crate::event_stream::Frames;
use crate::generation::finish_reason;
use crate::logprob_format::{self, CompletionLogprobsBuilder};
use crate::protocol::ApiError;
use crate::protocol::logprobs::CompletionLogprobs;
use crate::protocol::usage::UsageBody;
use crate::serving::Serving;

/// What all chunks of a stream have in common.
pub struct StreamHead<'a> {
    pub id: &'a str,
    pub created_s: u64,
    pub model: &'a str,
    pub fingerprint: &'a str,
}

/// The two kinds of stream and what each needs to know.
pub enum StreamKind {
    Completion {
        /// For each prompt, its text and ids to be shown before the completion; empty without `echo`.
        echoes: Vec<Echo>,
        logprobs: bool,
        skip_special: bool,
    },
    Chat {
        /// Alternatives a token; `None` without log-probabilities.
        top_logprobs: Option<usize>,
        answers: AnswerFormat,
    },
}

/// A prompt shown again in its completions.
pub struct Echo {
    pub text: String,
    pub ids: Vec<u32>,
}

/// Turns events into frames. Frames pile up in the buffer until `take`.
pub struct FrameWriter {
    serving: Arc<Serving>,
    /// `data: {"id":…,"choices":[`, the same for every frame.
    head: String,
    kind: StreamKind,
    n: usize,
    include_usage: bool,
    usage: UsageBody,
    /// For each choice: how far it is.
    choices: Vec<Progress>,
    buffer: BytesMut,
}

#[derive(Default)]
struct Progress {
    begun: bool,
    /// Characters shown.
    chars: usize,
    /// What finds thoughts and calls in the text, if anything is to.
    reader: Option<AnswerReader>,
}

impl FrameWriter {
    /// `n` is the choices of each prompt, `choices` all of them.
    pub fn new(
        serving: Arc<Serving>,
        head: &StreamHead,
        kind: StreamKind,
        n: usize,
        choices: usize,
        include_usage: bool,
    ) -> Self {
        #[derive(Serialize)]
        struct Common<'a> {
            id: &'a str,
            object: &'static str,
            created: u64,
            model: &'a str,
            system_fingerprint: &'a str,
        }
        let common = Common {
            id: head.id,
            object: match kind {
                StreamKind::Completion { .. } => "text_completion",
                StreamKind::Chat { .. } => "chat.completion.chunk",
            },
            created: head.created_s,
            model: head.model,
            system_fingerprint: head.fingerprint,
        };
        let reader = |index| match &kind {
            StreamKind::Chat { answers, .. } if !answers.is_plain() => Some(answers.reader(index)),
            _ => None,
        };
        let choices =
            (0..choices).map(|index| Progress { reader: reader(index), ..Progress::default() }).collect();
        let mut text = serde_json::to_string(&common).unwrap_or_default();
        text.pop();
        FrameWriter {
            serving,
            head: format!("data: {text},\"choices\":["),
            kind,
            n,
            include_usage,
            usage: UsageBody::default(),
            choices,
            buffer: BytesMut::with_capacity(1024),
        }
    }

    /// An error after the status has been sent.
    fn error(&mut self, error: &ApiError) {
        self.raw("data: ");
        self.raw(&error.to_json());
        self.raw("\n\n");
    }

    /// The first frame of a choice: chat's role, or the echoed prompt.
    fn begin(&mut self, index: usize, prompt_logprobs: &[Option<TokenLogprobs>]) {
        if std::mem::replace(&mut self.choices[index].begun, true) {
            return;
        }
        match &self.kind {
            StreamKind::Chat { .. } => {
                self.open(index);
                self.raw("\"delta\":{\"role\":\"assistant\",\"content\":\"\"}");
                self.close(None, |buffer| buffer.put_slice(b"null"));
            }
            StreamKind::Completion { echoes, logprobs, skip_special } => {
                let Some(echo) = echoes.get(index / self.n) else { return };
                let mut shown = CompletionLogprobs::default();
                if *logprobs {
                    let tokenizer = self.serving.tokenizer();
                    let mut builder = CompletionLogprobsBuilder::new(tokenizer, *skip_special, 0);
                    builder.push_prompt(&mut shown, &echo.ids, prompt_logprobs);
                    self.choices[index].chars = builder.chars_before();
                }
                let logprobs = *logprobs;
                let mut text = Vec::new();
                // Writing to a Vec cannot fail, nor can a string's serialisation.
                let _ = serde_json::to_writer(&mut text, &echo.text);
                self.open(index);
                self.raw("\"text\":");
                self.buffer.put_slice(&text);
                self.close(
                    None,
                    |buffer| if logprobs { write_json(buffer, &shown) } else { buffer.put_slice(b"null") },
                );
            }
        }
    }

    fn delta(&mut self, index: usize, text: &str, logprobs: &[TokenLogprobs]) {
        // Text held back (a possible stop string, half a character) comes with a later delta.
        if text.is_empty() && logprobs.is_empty() {
            return;
        }
        if let Some(reader) = &mut self.choices[index].reader {
            let mut logprobs = logprobs;
            for piece in reader.push(text) {
                self.piece(index, &piece, std::mem::take(&mut logprobs));
            }
            // Tokens that show nothing yet still have their probabilities told.
            if !logprobs.is_empty() {
                self.piece(index, &Piece::Content(String::new()), logprobs);
            }
            return;
        }
        self.open(index);
        match self.kind {
            StreamKind::Completion { logprobs: wanted, skip_special, .. } => {
                self.raw("\"text\":");
                write_json(&mut self.buffer, text);
                let shown = wanted.then(|| {
                    let mut shown = CompletionLogprobs::default();
                    let chars = self.choices[index].chars;
                    let mut builder =
                        CompletionLogprobsBuilder::new(self.serving.tokenizer(), skip_special, chars);
                    builder.push_tokens(&mut shown, logprobs);
                    self.choices[index].chars = builder.chars_before();
                    shown
                });
                self.close(None, |buffer| write_json(buffer, &shown));
            }
            StreamKind::Chat { .. } => {
                self.raw("\"delta\":{\"content\":");
                write_json(&mut self.buffer, text);
                self.raw("}");
                self.close_chat(logprobs);
            }
        }
    }

    /// One frame of a chat answer's part.
    fn piece(&mut self, index: usize, piece: &Piece, logprobs: &[TokenLogprobs]) {
        self.open(index);
        self.raw("\"delta\":{");
        match piece {
            Piece::Reasoning(text) => {
                self.raw("\"reasoning_content\":");
                write_json(&mut self.buffer, text);
            }
            Piece::Content(text) => {
                self.raw("\"content\":");
                write_json(&mut self.buffer, text);
            }
            Piece::Call { index, id, name } => {
                let function = serde_json::json!({"name": name, "arguments": ""});
                let call =
                    serde_json::json!([{"index": index, "id": id, "type": "function", "function": function}]);
                self.raw("\"tool_calls\":");
                write_json(&mut self.buffer, &call);
            }
            Piece::Arguments { index, text } => {
                let call = serde_json::json!([{"index": index, "function": {"arguments": text}}]);
                self.raw("\"tool_calls\":");
                write_json(&mut self.buffer, &call);
            }
        }
        self.raw("}");
        self.close_chat(logprobs);
    }

    fn close_chat(&mut self, logprobs: &[TokenLogprobs]) {
        let top = match self.kind {
            StreamKind::Chat { top_logprobs, .. } => top_logprobs,
            StreamKind::Completion { .. } => None,
        };
        let shown = top
            .filter(|_| !logprobs.is_empty())
            .map(|top| logprob_format::chat(self.serving.tokenizer(), logprobs, top));
        self.close(None, |buffer| write_json(buffer, &shown));
    }

    fn open(&mut self, index: usize) {
        self.buffer.put_slice(self.head.as_bytes());
        // Writing to a BytesMut cannot fail.
        let _ = write!((&mut self.buffer).writer(), "{{\"index\":{index},");
    }

    fn close(&mut self, reason: Option<&str>, logprobs: impl FnOnce(&mut BytesMut)) {
        self.raw(",\"logprobs\":");
        logprobs(&mut self.buffer);
        match reason {
            Some(reason) => {
                self.raw(",\"finish_reason\":\"");
                self.raw(reason);
                self.raw("\"}]");
            }
            None => self.raw(",\"finish_reason\":null}]"),
        }
        self.raw(if self.include_usage { ",\"usage\":null}\n\n" } else { "}\n\n" });
    }

    fn raw(&mut self, text: &str) {
        self.buffer.put_slice(text.as_bytes());
    }
}

impl Frames for FrameWriter {
    /// Appends the frames of one event. `false`: it was a failure, and nothing may follow.
    fn event(&mut self, index: usize, event: Event) -> bool {
        match event {
            Event::Prompt { logprobs } => self.begin(index, &logprobs),
            Event::Embedding { .. } => {}
            Event::Delta { text, logprobs, .. } => {
                self.begin(index, &[]);
                self.delta(index, &text, &logprobs);
            }
            Event::Finished { reason, usage } => {
                self.begin(index, &[]);
                self.usage.add(usage, index.is_multiple_of(self.n));
                let mut ended = finish_reason(reason);
                if let Some(mut reader) = self.choices[index].reader.take() {
                    for piece in reader.finish() {
                        self.piece(index, &piece, &[]);
                    }
                    ended = reader.finish_reason(ended);
                }
                let body = match self.kind {
                    StreamKind::Completion { .. } => "\"text\":\"\"",
                    StreamKind::Chat { .. } => "\"delta\":{}",
                };
                self.open(index);
                self.raw(body);
                self.close(Some(ended), |buffer| buffer.put_slice(b"null"));
            }
            Event::Failed { kind, message } => {
                self.error(&ApiError::failed(kind, message));
                return false;
            }
        }
        true
    }

    /// The usage chunk if asked for, and `[DONE]`.
    fn finish(&mut self) {
        if self.include_usage {
            self.buffer.put_slice(self.head.as_bytes());
            self.raw("],\"usage\":");
            write_json(&mut self.buffer, &self.usage);
            self.raw("}\n\n");
        }
        self.raw("data: [DONE]\n\n");
    }

    fn keep_alive(&mut self) {
        self.raw(": ping\n\n");
    }

    /// What has been written since the last `take`.
    fn take(&mut self) -> Bytes {
        self.buffer.split().freeze()
    }

    fn pending_bytes(&self) -> usize {
        self.buffer.len()
    }
}

pub fn write_json<T: Serialize + ?Sized>(buffer: &mut BytesMut, value: &T) {
    // Writing to a BytesMut cannot fail, and our types have no map with keys other than strings.
    let _ = serde_json::to_writer(buffer.writer(), value);
}
