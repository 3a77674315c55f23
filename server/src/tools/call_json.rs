//! One call written as a JSON object, read character by character: its name, and its arguments as they come.

/// What a character of a call has shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CallEvent {
    /// The call has a name; arguments follow.
    Name(String),
    /// The next piece of the arguments' JSON text.
    Arguments(String),
    /// The object is closed.
    End,
    /// This is not a call. After a `Name`, the call is over as it is.
    NotACall,
}

/// Nesting deeper than this is no call.
const DEPTH_MAX: usize = 128;
/// A key or a name longer than this is none.
const WORD_BYTES_MAX: usize = 1024;
/// Arguments that come before the name, or as JSON in a string, are kept up to this many bytes.
const KEPT_BYTES_MAX: usize = 1 << 20;

/// Reads an object of `name`, `arguments` (or `parameters`), and the likes of `id` and `type`, which do not matter.
#[derive(Debug, Default)]
pub struct CallReader {
    place: Place,
    /// The text of a string being read, quotes left out, escapes as they are.
    word: String,
    escaped: bool,
    value: ValuePlace,
    kind: ValueKind,
    named: bool,
    /// Arguments whose name is not known yet, or that come as a string of JSON.
    kept: String,
    had_arguments: bool,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Place {
    #[default]
    BeforeObject,
    BeforeKey,
    InKey,
    BeforeColon,
    BeforeValue,
    InValue,
    AfterValue,
    Over,
}

/// Where in a value.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct ValuePlace {
    depth: usize,
    in_string: bool,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum ValueKind {
    #[default]
    Other,
    Name,
    Arguments,
    /// Arguments written as a string of JSON.
    ArgumentString,
}

impl CallReader {
    /// Takes the next character; what it shows is appended to `events`.
    pub fn push(&mut self, c: char, events: &mut Vec<CallEvent>) {
        if !self.step(c, events) {
            self.place = Place::Over;
            events.push(CallEvent::NotACall);
        }
    }

    pub fn is_over(&self) -> bool {
        self.place == Place::Over
    }

    /// A value has ended and the object goes on or closes.
    pub fn is_between_fields(&self) -> bool {
        self.place == Place::AfterValue
    }

    fn step(&mut self, c: char, events: &mut Vec<CallEvent>) -> bool {
        let space = matches!(c, ' ' | '\n' | '\r' | '\t');
        match self.place {
            Place::Over => return true,
            Place::BeforeObject => match c {
                '{' => self.place = Place::BeforeKey,
                _ if space => {}
                _ => return false,
            },
            Place::BeforeKey => match c {
                '"' => {
                    self.word.clear();
                    self.place = Place::InKey;
                }
                '}' => return self.close(events),
                _ if space => {}
                _ => return false,
            },
            Place::InKey => {
                if c == '"' && !self.escaped {
                    self.place = Place::BeforeColon;
                    return true;
                }
                self.escaped = c == '\\' && !self.escaped;
                self.word.push(c);
                return self.word.len() <= WORD_BYTES_MAX;
            }
            Place::BeforeColon => match c {
                ':' => {
                    self.kind = match self.word.as_str() {
                        "name" if !self.named => ValueKind::Name,
                        "arguments" | "parameters" | "args" if !self.had_arguments => ValueKind::Arguments,
                        "id" | "type" | "tool_call_id" => ValueKind::Other,
                        _ => return false,
                    };
                    self.place = Place::BeforeValue;
                }
                _ if space => {}
                _ => return false,
            },
            Place::BeforeValue => {
                if !space {
                    return self.begin_value(c, events);
                }
            }
            Place::InValue => return self.in_value(c, events),
            Place::AfterValue => match c {
                ',' => self.place = Place::BeforeKey,
                '}' => return self.close(events),
                _ if space => {}
                _ => return false,
            },
        }
        true
    }

    fn begin_value(&mut self, c: char, events: &mut Vec<CallEvent>) -> bool {
        self.word.clear();
        self.escaped = false;
        self.place = Place::InValue;
        self.value = ValuePlace { depth: usize::from(matches!(c, '{' | '[')), in_string: c == '"' };
        match self.kind {
            ValueKind::Name => c == '"',
            ValueKind::Arguments if c == '"' => {
                self.kind = ValueKind::ArgumentString;
                self.kept.clear();
                self.had_arguments = true;
                true
            }
            // Null is no arguments.
            ValueKind::Arguments if c == 'n' => {
                self.kind = ValueKind::Other;
                true
            }
            ValueKind::Arguments => {
                self.had_arguments = true;
                c == '{' && self.argument(c, events)
            }
            _ => c == '"' || c == '{' || c == '[' || c == '-' || c.is_ascii_alphanumeric(),
        }
    }

    fn in_value(&mut self, c: char, events: &mut Vec<CallEvent>) -> bool {
        if self.value.in_string {
            let ends = c == '"' && !self.escaped;
            self.escaped = c == '\\' && !self.escaped;
            self.value.in_string = !ends;
            return match self.kind {
                ValueKind::Arguments => self.argument(c, events) && self.end_if_closed(ends),
                ValueKind::Name | ValueKind::ArgumentString if !ends => {
                    self.word.push(c);
                    let bytes_max = if self.kind == ValueKind::Name { WORD_BYTES_MAX } else { KEPT_BYTES_MAX };
                    self.word.len() <= bytes_max
                }
                ValueKind::Name | ValueKind::ArgumentString => self.end_word(events),
                ValueKind::Other => self.end_if_closed(ends),
            };
        }
        match c {
            '"' => self.value.in_string = true,
            '{' | '[' => {
                self.value.depth += 1;
                if self.value.depth > DEPTH_MAX {
                    return false;
                }
            }
            '}' | ']' if self.value.depth > 0 => {
                self.value.depth -= 1;
                let fine = self.kind != ValueKind::Arguments || self.argument(c, events);
                return fine && self.end_if_closed(true);
            }
            // A bare word or number ends where the object goes on.
            ',' | '}' if self.value.depth == 0 => {
                self.place = Place::AfterValue;
                return self.step(c, events);
            }
            _ => {}
        }
        match self.kind {
            ValueKind::Arguments => self.argument(c, events),
            _ => true,
        }
    }

    /// The value is over if nothing of it is open.
    fn end_if_closed(&mut self, closed: bool) -> bool {
        if closed && self.value.depth == 0 && !self.value.in_string {
            self.place = Place::AfterValue;
        }
        true
    }

    /// A name, or arguments in a string, is read.
    fn end_word(&mut self, events: &mut Vec<CallEvent>) -> bool {
        self.place = Place::AfterValue;
        let Ok(text) = serde_json::from_str::<String>(&format!("\"{}\"", self.word)) else { return false };
        if self.kind == ValueKind::ArgumentString {
            return self.arguments(&text, events);
        }
        if text.is_empty() {
            return false;
        }
        self.named = true;
        events.push(CallEvent::Name(text));
        if !self.kept.is_empty() {
            events.push(CallEvent::Arguments(std::mem::take(&mut self.kept)));
        }
        true
    }

    fn argument(&mut self, c: char, events: &mut Vec<CallEvent>) -> bool {
        self.arguments(c.encode_utf8(&mut [0; 4]), events)
    }

    fn arguments(&mut self, text: &str, events: &mut Vec<CallEvent>) -> bool {
        if !self.named {
            self.kept.push_str(text);
            return self.kept.len() <= KEPT_BYTES_MAX;
        }
        match events.last_mut() {
            Some(CallEvent::Arguments(arguments)) => arguments.push_str(text),
            _ => events.push(CallEvent::Arguments(text.to_owned())),
        }
        true
    }

    fn close(&mut self, events: &mut Vec<CallEvent>) -> bool {
        if !self.named {
            return false;
        }
        if !self.had_arguments && !self.arguments("{}", events) {
            return false;
        }
        self.place = Place::Over;
        events.push(CallEvent::End);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> (Option<String>, String, Option<CallEvent>) {
        let mut reader = CallReader::default();
        let (mut name, mut arguments, mut end) = (None, String::new(), None);
        for c in text.chars() {
            let mut events = Vec::new();
            reader.push(c, &mut events);
            for event in events {
                match event {
                    CallEvent::Name(text) => name = Some(text),
                    CallEvent::Arguments(text) => arguments.push_str(&text),
                    other => end = Some(other),
                }
            }
        }
        (name, arguments, end)
    }

    #[test]
    fn calls() {
        for (text, name, arguments) in [
            (r#"{"name": "f", "arguments": {"a": [1, "}"], "b\"": {}}}"#, "f", r#"{"a": [1, "}"], "b\"": {}}"#),
            (r#"  {"name":"f","parameters":{}}"#, "f", "{}"),
            (r#"{"arguments": {"x": "\\"}, "name": "späť"}"#, "späť", r#"{"x": "\\"}"#),
            (r#"{"type": "function", "id": 7, "name": "f", "arguments": {}}"#, "f", "{}"),
            (r#"{"name": "f"}"#, "f", "{}"),
            (r#"{"name": "f", "arguments": "{\"a\": \"b\\n\"}"}"#, "f", r#"{"a": "b\n"}"#),
            (r#"{"arguments": "{}", "name": "f"}"#, "f", "{}"),
            (r#"{"name": "f", "arguments": null}"#, "f", "{}"),
        ] {
            let got = read(text);
            assert_eq!(
                (got.0.as_deref(), got.1.as_str(), got.2),
                (Some(name), arguments, Some(CallEvent::End)),
                "{text}"
            );
        }
        for text in [
            "x",
            "[",
            r#"{"answer": 1}"#,
            r#"{"name": 1}"#,
            "{}",
            r#"{"name": ""}"#,
            r#"{"arguments": {}}"#,
            r#"{"name": "f" x"#,
            r#"{"name": "f", "arguments": [1]}"#,
            r#"{"name": "\q"}"#,
        ] {
            assert_eq!(read(text).2, Some(CallEvent::NotACall), "{text}");
        }
        let deep = format!(r#"{{"name": "f", "arguments": {}"#, "{\"a\":".repeat(200));
        assert_eq!(read(&deep).2, Some(CallEvent::NotACall));
    }
}
