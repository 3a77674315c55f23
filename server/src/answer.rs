//! Generated text → the parts of a chat answer: thoughts, content, and tool calls with their ids.

use std::sync::Arc;

use crate::protocol::ApiError;
use crate::protocol::chat::{ReplyCall, ReplyFunction, ReplyMessage};
use crate::reasoning::{ReasoningDelta, ReasoningFormat, ReasoningSplitter};
use crate::tools::{Tool, ToolChoice, ToolDelta, ToolFormat, ToolParser, Tools};

/// How the answers of one request are read.
#[derive(Debug, Clone)]
pub struct AnswerFormat {
    reasoning: Option<(ReasoningFormat, bool)>,
    tools: Option<ToolReading>,
}

#[derive(Debug, Clone)]
struct ToolReading {
    format: ToolFormat,
    tools: Arc<[Tool]>,
    parallel: bool,
    /// One tool was asked for by name: OpenAI ends that with `stop`.
    named: bool,
    /// What ids are made of.
    id_seed: u64,
}

/// A piece of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    Reasoning(String),
    Content(String),
    /// Call number `index` begins.
    Call {
        index: usize,
        id: String,
        name: String,
    },
    Arguments {
        index: usize,
        text: String,
    },
}

/// Reads one choice's text.
#[derive(Debug)]
pub struct AnswerReader {
    splitter: Option<ReasoningSplitter>,
    parser: Option<ToolParser>,
    tools: Option<ToolReading>,
    choice: usize,
    calls: usize,
}

impl AnswerFormat {
    /// `reasoning`: its format, and whether the prompt has opened it. `tools`: those of the request, if it may be
    /// answered with calls.
    pub fn new(
        reasoning: Option<(ReasoningFormat, bool)>,
        tools: Option<&Tools>,
        format: ToolFormat,
    ) -> Result<AnswerFormat, ApiError> {
        let tools = match tools {
            None => None,
            Some(tools) => Some(ToolReading {
                format,
                tools: tools.tools.as_slice().into(),
                parallel: tools.parallel && !matches!(tools.choice, ToolChoice::Named(_)),
                named: matches!(tools.choice, ToolChoice::Named(_)),
                id_seed: getrandom::u64()
                    .map_err(|error| ApiError::internal(format!("the system gives no random numbers: {error}")))?,
            }),
        };
        Ok(AnswerFormat { reasoning, tools })
    }

    /// Whether text is content as it stands.
    pub fn is_plain(&self) -> bool {
        self.reasoning.is_none() && self.tools.is_none()
    }

    pub fn reader(&self, choice: usize) -> AnswerReader {
        AnswerReader {
            splitter: self.reasoning.map(|(format, opened)| ReasoningSplitter::new(format, opened)),
            parser: self
                .tools
                .as_ref()
                .map(|tools| ToolParser::new(tools.format, tools.tools.clone(), tools.parallel)),
            tools: self.tools.clone(),
            choice,
            calls: 0,
        }
    }

    /// The message a whole text is, and why it ended: `reason`, or that tools are to be called.
    pub fn message(&self, choice: usize, text: &str, reason: &'static str) -> (ReplyMessage, &'static str) {
        let mut reader = self.reader(choice);
        let mut pieces = reader.push(text);
        pieces.extend(reader.finish());
        let (mut thoughts, mut content) = (String::new(), String::new());
        let mut calls: Vec<ReplyCall> = Vec::new();
        for piece in pieces {
            match piece {
                Piece::Reasoning(text) => thoughts.push_str(&text),
                Piece::Content(text) => content.push_str(&text),
                Piece::Call { id, name, .. } => {
                    let function = ReplyFunction { name, arguments: String::new() };
                    calls.push(ReplyCall { id, kind: "function", function });
                }
                Piece::Arguments { text, .. } => {
                    if let Some(call) = calls.last_mut() {
                        call.function.arguments.push_str(&text);
                    }
                }
            }
        }
        let reason = reader.finish_reason(reason);
        let empty = content.is_empty() && (!calls.is_empty() || !thoughts.is_empty());
        let message = ReplyMessage {
            role: "assistant",
            content: (!empty).then_some(content),
            refusal: None,
            reasoning_content: (!thoughts.is_empty()).then_some(thoughts),
            tool_calls: (!calls.is_empty()).then_some(calls),
        };
        (message, reason)
    }
}

impl AnswerReader {
    /// The pieces that `text` completes.
    pub fn push(&mut self, text: &str) -> Vec<Piece> {
        let mut split = Vec::new();
        match &mut self.splitter {
            Some(splitter) => splitter.push(text, &mut split),
            None => split.push(ReasoningDelta::Content(text.to_owned())),
        }
        self.through_tools(split, false)
    }

    /// The end of the text.
    pub fn finish(&mut self) -> Vec<Piece> {
        let mut split = Vec::new();
        if let Some(splitter) = &mut self.splitter {
            splitter.finish(&mut split);
        }
        self.through_tools(split, true)
    }

    /// Whether what comes next is thought.
    pub fn is_thinking(&self) -> bool {
        self.splitter.as_ref().is_some_and(ReasoningSplitter::is_inside)
    }

    /// Calls begun so far.
    pub fn calls(&self) -> usize {
        self.calls
    }

    /// Why the answer ended, calls considered.
    pub fn finish_reason(&self, reason: &'static str) -> &'static str {
        match &self.tools {
            Some(tools) if self.calls > 0 && !tools.named && reason == "stop" => "tool_calls",
            _ => reason,
        }
    }

    fn through_tools(&mut self, split: Vec<ReasoningDelta>, last: bool) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let mut deltas = Vec::new();
        for delta in split {
            match delta {
                ReasoningDelta::Reasoning(text) => pieces.push(Piece::Reasoning(text)),
                ReasoningDelta::Content(text) => match &mut self.parser {
                    Some(parser) => parser.push(&text, &mut deltas),
                    None => pieces.push(Piece::Content(text)),
                },
            }
        }
        if let (Some(parser), true) = (&mut self.parser, last) {
            parser.finish(&mut deltas);
        }
        for delta in deltas {
            match delta {
                ToolDelta::Content(text) => pieces.push(Piece::Content(text)),
                ToolDelta::Call { name } => {
                    let id = self.call_id();
                    pieces.push(Piece::Call { index: self.calls, id, name });
                    self.calls += 1;
                }
                ToolDelta::Arguments(text) => {
                    pieces.push(Piece::Arguments { index: self.calls.saturating_sub(1), text });
                }
            }
        }
        pieces
    }

    /// An id of its own for the next call; nine letters or digits for Mistral, whose templates refuse others.
    fn call_id(&self) -> String {
        let Some(tools) = &self.tools else { return String::new() };
        let number = (self.choice as u64) << 32 | self.calls as u64;
        let mixed = crate::validate::seed_of_choice(tools.id_seed, 1 + number as usize);
        match tools.format {
            ToolFormat::Mistral => {
                const LETTERS: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";
                (0..9).map(|place| char::from(LETTERS[(mixed >> (place * 6)) as usize % 36])).collect()
            }
            _ => format!("call_{mixed:016x}"),
        }
    }
}
