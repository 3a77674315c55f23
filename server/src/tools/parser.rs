//! Generated text → content and calls, character by character: however the text is cut, the pieces add up to the same.

use std::sync::Arc;

use super::call_json::{CallEvent, CallReader};
use super::pythonic;
use super::tagged_call::{FUNCTION, TaggedCallReader};
use super::{Tool, ToolFormat};

/// White space kept back because a call may follow it.
const HELD_BYTES_MAX: usize = 4096;
/// A call in Python's spelling is read as a whole.
const PYTHONIC_BYTES_MAX: usize = 1 << 20;

/// A piece of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToolDelta {
    Content(String),
    /// The next call begins.
    Call {
        name: String,
    },
    /// More of the latest call's arguments.
    Arguments(String),
}

/// Reads one answer.
#[derive(Debug)]
pub struct ToolParser {
    format: ToolFormat,
    /// Their names make a bare JSON object or Python expression a call, and their schemas say what tagged text means.
    tools: Arc<[Tool]>,
    parallel: bool,
    state: State,
    /// What may turn out to be the start of a call: white space and part of a marker, or the unnamed part of a call.
    held: String,
    calls: usize,
}

#[derive(Debug)]
enum State {
    /// Nothing but white space so far; a bare call may begin.
    Start,
    /// Text in which a marker may come.
    Text,
    /// After Mistral's marker: a list, an object or a name.
    AfterMarker,
    /// A name until `[ARGS]` or `{`.
    PlainName(String),
    Call {
        reader: Reader,
        in_list: bool,
        plain: bool,
    },
    /// After a call: what separates it from the next, or ends the last.
    Between {
        in_list: bool,
    },
    /// A call in Python's spelling, being gathered in `held`.
    Python {
        depth: usize,
        quote: Option<char>,
        escaped: bool,
    },
    /// Text alone from now on.
    Rest,
    /// Nothing more is wanted.
    Mute,
}

#[derive(Debug)]
enum Reader {
    Json(CallReader),
    Tagged(TaggedCallReader),
}

impl Reader {
    fn push(&mut self, c: char, events: &mut Vec<CallEvent>) {
        match self {
            Reader::Json(reader) => reader.push(c, events),
            Reader::Tagged(reader) => reader.push(c, events),
        }
    }
}

impl ToolParser {
    pub fn new(format: ToolFormat, tools: Arc<[Tool]>, parallel: bool) -> ToolParser {
        let state = match format {
            ToolFormat::Hermes | ToolFormat::Qwen3Coder | ToolFormat::Mistral => State::Text,
            ToolFormat::Llama3 | ToolFormat::Pythonic | ToolFormat::Json => State::Start,
        };
        ToolParser { format, tools, parallel, state, held: String::new(), calls: 0 }
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        self.tools.iter().map(|tool| tool.name.as_str())
    }

    /// Calls begun so far.
    pub fn calls(&self) -> usize {
        self.calls
    }

    pub fn push(&mut self, text: &str, out: &mut Vec<ToolDelta>) {
        for c in text.chars() {
            self.step(c, out);
        }
    }

    /// The end of the text.
    pub fn finish(&mut self, out: &mut Vec<ToolDelta>) {
        if matches!(self.state, State::Python { .. }) && self.emit_python(out) {
            return;
        }
        let held = std::mem::take(&mut self.held);
        if self.calls == 0 || !held.trim().is_empty() {
            content(&held, out);
        }
        self.state = State::Mute;
    }

    fn step(&mut self, c: char, out: &mut Vec<ToolDelta>) {
        match &mut self.state {
            State::Mute => {}
            State::Rest => content(c.encode_utf8(&mut [0; 4]), out),
            State::Start => self.start(c, out),
            State::Text => self.text(c, out),
            State::AfterMarker => self.after_marker(c, out),
            State::PlainName(name) => {
                self.held.push(c);
                name.push(c);
                if c == '{' {
                    let spelled = name.strip_suffix('{').unwrap_or_default();
                    let spelled = spelled.split('[').next().unwrap_or_default().trim().to_owned();
                    let mut reader = CallReader::default();
                    let mut events = Vec::new();
                    let prefix = format!("{{\"name\": {}, \"arguments\": {{", serde_json::Value::from(spelled));
                    for c in prefix.chars() {
                        reader.push(c, &mut events);
                    }
                    self.state = State::Call { reader: Reader::Json(reader), in_list: false, plain: true };
                    self.call_events(events, out);
                } else if name.len() > 256 || c == '\n' {
                    self.give_up(out);
                }
            }
            State::Call { reader, plain, .. } => {
                let mut events = Vec::new();
                reader.push(c, &mut events);
                if let (true, Reader::Json(reader)) = (*plain, reader)
                    && reader.is_between_fields()
                {
                    reader.push('}', &mut events);
                }
                if !self.named() {
                    self.held.push(c);
                }
                self.call_events(events, out);
            }
            State::Between { in_list } => {
                let in_list = *in_list;
                self.between(c, in_list, out);
            }
            State::Python { .. } => self.python(c, out),
        }
    }

    /// Whether the call being read has been told of: `held` is empty from then on.
    fn named(&self) -> bool {
        matches!(self.state, State::Call { .. }) && self.held.is_empty()
    }

    fn call_events(&mut self, events: Vec<CallEvent>, out: &mut Vec<ToolDelta>) {
        for event in events {
            match event {
                CallEvent::Name(name) => {
                    let bare = matches!(self.format, ToolFormat::Llama3 | ToolFormat::Json | ToolFormat::Pythonic);
                    if bare && !self.names().any(|known| known == name) {
                        return self.give_up(out);
                    }
                    self.held.clear();
                    self.calls += 1;
                    out.push(ToolDelta::Call { name });
                }
                CallEvent::Arguments(text) => match out.last_mut() {
                    Some(ToolDelta::Arguments(arguments)) => arguments.push_str(&text),
                    _ => out.push(ToolDelta::Arguments(text)),
                },
                CallEvent::End => {
                    let in_list = matches!(self.state, State::Call { in_list: true, .. });
                    self.state = if self.parallel { State::Between { in_list } } else { State::Mute };
                }
                CallEvent::NotACall if self.held.is_empty() => self.state = State::Mute,
                CallEvent::NotACall => self.give_up(out),
            }
        }
    }

    /// What looked like a call is text.
    fn give_up(&mut self, out: &mut Vec<ToolDelta>) {
        content(&std::mem::take(&mut self.held), out);
        self.state = match self.format {
            ToolFormat::Hermes | ToolFormat::Qwen3Coder | ToolFormat::Mistral => State::Text,
            ToolFormat::Llama3 | ToolFormat::Json | ToolFormat::Pythonic => State::Rest,
        };
    }

    fn begin_call(&mut self, c: char, in_list: bool, out: &mut Vec<ToolDelta>) {
        self.held.push(c);
        self.begin(Reader::Json(CallReader::default()), &c.to_string(), in_list, out);
    }

    /// A call of which `text` has been read and held.
    fn begin(&mut self, mut reader: Reader, text: &str, in_list: bool, out: &mut Vec<ToolDelta>) {
        let mut events = Vec::new();
        text.chars().for_each(|c| reader.push(c, &mut events));
        self.state = State::Call { reader, in_list, plain: false };
        self.call_events(events, out);
    }

    fn begin_tagged(&mut self, text: &str, out: &mut Vec<ToolDelta>) {
        let reader = Reader::Tagged(TaggedCallReader::new(self.tools.clone()));
        self.begin(reader, text, false, out);
    }

    /// Before anything: a bare call, perhaps fenced or tagged, or text.
    fn start(&mut self, c: char, out: &mut Vec<ToolDelta>) {
        const OPENINGS: [&str; 7] = [
            "<|python_tag|>",
            "```json\n",
            "```tool_code\n",
            "```tool_call\n",
            "```python\n",
            "```\n",
            "<|python_start|>",
        ];
        self.held.push(c);
        let seen = self.held.trim_start();
        let after = OPENINGS.iter().find_map(|opening| seen.strip_prefix(opening)).map(str::trim_start);
        let deciding = after.unwrap_or(seen);
        if deciding.is_empty() {
            if self.held.len() > HELD_BYTES_MAX {
                self.give_up(out);
            }
            return;
        }
        if let Some(inner) = deciding.strip_prefix('[') {
            let inner = inner.trim_start();
            if inner.starts_with('{') {
                self.held.pop();
                return self.begin_call('{', true, out);
            }
            if inner.is_empty() && self.held.len() <= HELD_BYTES_MAX {
                return;
            }
        }
        if deciding == "{" {
            self.held.pop();
            return self.begin_call('{', false, out);
        }
        let expression = deciding.strip_prefix('[').unwrap_or(deciding).trim_start();
        if self.format == ToolFormat::Pythonic || self.format == ToolFormat::Llama3 {
            if self.names().any(|name| expression.strip_prefix(name).is_some_and(|rest| rest.starts_with('('))) {
                let depth = 1 + usize::from(deciding.starts_with('['));
                self.state = State::Python { depth, quote: None, escaped: false };
                return;
            }
            if self.names().any(|name| name.starts_with(expression)) {
                return;
            }
        }
        if after.is_none() && OPENINGS.iter().any(|opening| opening.starts_with(deciding)) {
            return;
        }
        if self.format == ToolFormat::Llama3 {
            // Text first; a tagged call may still come.
            let held = std::mem::take(&mut self.held);
            self.state = State::Text;
            return self.push(&held, out);
        }
        self.give_up(out);
    }

    fn text(&mut self, c: char, out: &mut Vec<ToolDelta>) {
        let Some(marker) = self.format.marker() else {
            return content(c.encode_utf8(&mut [0; 4]), out);
        };
        // Some models leave the first tag out.
        let bare = if self.format == ToolFormat::Qwen3Coder { FUNCTION } else { marker };
        self.held.push(c);
        loop {
            let partial = self.held.trim_start();
            if partial.is_empty() {
                if self.held.len() > HELD_BYTES_MAX {
                    content(&std::mem::take(&mut self.held), out);
                }
                return;
            }
            if partial == marker {
                self.state = State::AfterMarker;
                return;
            }
            if partial == bare {
                return self.begin_tagged(FUNCTION, out);
            }
            if marker.starts_with(partial) || bare.starts_with(partial) {
                return;
            }
            let first = self.held.len() - partial.len();
            let shown = first + partial.chars().next().map_or(0, char::len_utf8);
            let rest = self.held.split_off(shown);
            content(&std::mem::replace(&mut self.held, rest), out);
            if self.held.is_empty() {
                return;
            }
        }
    }

    fn after_marker(&mut self, c: char, out: &mut Vec<ToolDelta>) {
        match c {
            _ if c.is_whitespace() => self.held.push(c),
            '<' if self.format == ToolFormat::Qwen3Coder => {
                self.held.push(c);
                self.begin_tagged("<", out);
            }
            '{' if self.format != ToolFormat::Qwen3Coder => {
                let in_list = self.held.trim_end().ends_with('[');
                self.begin_call(c, in_list, out);
            }
            '[' if self.format == ToolFormat::Mistral => self.held.push(c),
            _ if self.format == ToolFormat::Mistral && (c.is_alphanumeric() || c == '_') => {
                self.held.push(c);
                self.state = State::PlainName(c.to_string());
            }
            _ => {
                self.held.push(c);
                self.give_up(out);
            }
        }
    }

    fn between(&mut self, c: char, in_list: bool, out: &mut Vec<ToolDelta>) {
        if matches!(self.format, ToolFormat::Hermes | ToolFormat::Qwen3Coder) {
            self.held.push(c);
            let seen = self.held.trim_start();
            if seen == "</tool_call>" {
                self.held.clear();
                self.state = State::Text;
            } else if !"</tool_call>".starts_with(seen) {
                // Something else where the tag should close: it was left out.
                let held = std::mem::take(&mut self.held);
                self.state = State::Text;
                self.push(&held, out);
            }
            return;
        }
        match c {
            _ if c.is_whitespace() => {}
            ',' | ';' => {}
            '{' => self.begin_call(c, in_list, out),
            ']' if in_list => self.state = State::Between { in_list: false },
            // The fence that closes.
            '`' => {}
            '[' | '<' => {
                self.state = State::Text;
                self.text(c, out);
            }
            _ => {
                self.state = State::Rest;
                self.step(c, out);
            }
        }
    }

    fn python(&mut self, c: char, out: &mut Vec<ToolDelta>) {
        self.held.push(c);
        let State::Python { depth, quote, escaped } = &mut self.state else { return };
        match (c, *quote) {
            _ if *escaped => *escaped = false,
            ('\\', Some(_)) => *escaped = true,
            (c, Some(open)) if c == open => *quote = None,
            (_, Some(_)) => {}
            ('"' | '\'', None) => *quote = Some(c),
            ('(' | '[' | '{', None) => *depth += 1,
            (')' | ']' | '}', None) => *depth = depth.saturating_sub(1),
            _ => {}
        }
        if *depth == 0 && quote.is_none() {
            if !self.emit_python(out) {
                self.give_up(out);
            }
        } else if self.held.len() > PYTHONIC_BYTES_MAX {
            self.give_up(out);
        }
    }

    /// Tells of the calls gathered in `held`; false if it holds none.
    fn emit_python(&mut self, out: &mut Vec<ToolDelta>) -> bool {
        let text = self.held.trim_start();
        let text = match text.strip_prefix("```") {
            Some(fenced) => fenced.split_once('\n').map_or("", |(_, inside)| inside),
            None => text
                .strip_prefix("<|python_tag|>")
                .or_else(|| text.strip_prefix("<|python_start|>"))
                .unwrap_or(text),
        };
        let Some(calls) = pythonic::parse(text) else { return false };
        if !calls.iter().all(|(name, _)| self.names().any(|known| known == name)) {
            return false;
        }
        self.held.clear();
        let wanted = if self.parallel { calls.len() } else { 1 };
        for (name, arguments) in calls.into_iter().take(wanted) {
            self.calls += 1;
            out.push(ToolDelta::Call { name });
            out.push(ToolDelta::Arguments(serde_json::Value::Object(arguments).to_string()));
        }
        self.state = if self.parallel { State::Between { in_list: false } } else { State::Mute };
        true
    }
}

fn content(text: &str, out: &mut Vec<ToolDelta>) {
    if text.is_empty() {
        return;
    }
    match out.last_mut() {
        Some(ToolDelta::Content(content)) => content.push_str(text),
        _ => out.push(ToolDelta::Content(text.to_owned())),
    }
}

#[cfg(test)]
#[path = "parser_tests.rs"]
mod tests;
