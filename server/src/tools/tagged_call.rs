//! One call written with tags, read character by character: `<function=name>`, `<parameter=key>` and a value on lines of
//! its own for each argument, `</parameter>`, `</function>`. Values are text; what they mean, the tool's schema says.

use std::sync::Arc;

use serde::de::IgnoredAny;
use serde_json::{Map, Value};

use super::Tool;
use super::call_json::CallEvent;
use super::pythonic;

/// What a call begins with.
pub const FUNCTION: &str = "<function=";
const FUNCTION_END: &str = "</function>";
const PARAMETER: &str = "<parameter=";
const PARAMETER_END: &str = "</parameter>";

/// A name longer than this is none.
const WORD_BYTES_MAX: usize = 1024;
/// Values that are not text are gathered up to this many bytes.
const VALUE_BYTES_MAX: usize = 1 << 20;
/// Keywords that leave a string's text as free as it is without them.
const ANNOTATIONS: [&str; 8] =
    ["type", "description", "title", "default", "examples", "deprecated", "$comment", "enum"];

/// How an argument is written, going by its schema.
#[derive(Debug, Clone, PartialEq)]
pub enum Spelling {
    /// As it stands: any text.
    Text,
    /// As it stands: one of these.
    OneOf(Vec<String>),
    /// As JSON. A model may still write a string as it stands.
    Json,
}

impl Spelling {
    pub fn of(schema: Option<&Value>) -> Spelling {
        // What no schema tells of is text.
        let Some(Value::Object(schema)) = schema else { return Spelling::Text };
        let plain = schema.keys().all(|key| ANNOTATIONS.contains(&key.as_str()));
        let is_string = schema.get("type").is_some_and(|kind| kind == "string");
        match schema.get("enum").map(|values| (values, words(values))) {
            Some((_, Some(words))) if plain => Spelling::OneOf(words),
            None if plain && is_string => Spelling::Text,
            _ => Spelling::Json,
        }
    }
}

/// The texts of an `enum`, if it has no other values and all fit between tags.
fn words(values: &Value) -> Option<Vec<String>> {
    let values = values.as_array().filter(|values| !values.is_empty())?;
    let word = |value: &Value| value.as_str().filter(|text| !text.contains(PARAMETER_END)).map(str::to_owned);
    values.iter().map(word).collect()
}

/// Reads a call from `<function=` on.
#[derive(Debug)]
pub struct TaggedCallReader {
    tools: Arc<[Tool]>,
    /// Schemas of the arguments.
    properties: Map<String, Value>,
    place: Place,
    /// What may be the start of a tag; a name or a value being gathered.
    held: String,
    parameters: usize,
}

#[derive(Debug, Clone, PartialEq)]
enum Place {
    BeforeFunction,
    InName,
    Between,
    InKey,
    /// The line break after the tag belongs to it.
    BeforeText,
    InText,
    InValue {
        schema: Option<Value>,
    },
    Over,
}

impl TaggedCallReader {
    pub fn new(tools: Arc<[Tool]>) -> TaggedCallReader {
        let (place, held) = (Place::BeforeFunction, String::new());
        TaggedCallReader { tools, properties: Map::new(), place, held, parameters: 0 }
    }

    /// Takes the next character; what it shows is appended to `events`.
    pub fn push(&mut self, c: char, events: &mut Vec<CallEvent>) {
        self.held.push(c);
        match &self.place {
            Place::Over => self.held.clear(),
            Place::BeforeFunction => {
                if self.held == FUNCTION {
                    self.held.clear();
                    self.place = Place::InName;
                } else if !FUNCTION.starts_with(self.held.as_str()) {
                    self.give_up(events);
                }
            }
            Place::InName => match self.word() {
                Some(Some(name)) => {
                    let tool = self.tools.iter().find(|tool| tool.name == name);
                    let properties = tool.and_then(|tool| tool.parameters.get("properties")?.as_object());
                    self.properties = properties.cloned().unwrap_or_default();
                    self.place = Place::Between;
                    events.push(CallEvent::Name(name));
                }
                Some(None) => {}
                None => self.give_up(events),
            },
            Place::Between => self.between(events),
            Place::InKey => match self.word() {
                Some(Some(key)) => self.begin_parameter(&key, events),
                Some(None) => {}
                None => self.give_up(events),
            },
            Place::BeforeText => {
                if self.held == "\n" {
                    self.held.clear();
                }
                self.place = Place::InText;
                self.in_text(events);
            }
            Place::InText => self.in_text(events),
            Place::InValue { .. } => self.in_value(events),
        }
    }

    fn give_up(&mut self, events: &mut Vec<CallEvent>) {
        self.place = Place::Over;
        events.push(CallEvent::NotACall);
    }

    /// The name that `held` ends with `>`; `Some(None)` while it goes on, `None` if it is none.
    fn word(&mut self) -> Option<Option<String>> {
        match self.held.strip_suffix('>') {
            Some("") => None,
            Some(word) => {
                let word = word.trim().to_owned();
                self.held.clear();
                Some(Some(word))
            }
            None if self.held.len() > WORD_BYTES_MAX || self.held.contains(['\n', '<']) => None,
            None => Some(None),
        }
    }

    /// Between arguments nothing matters but what tag comes next.
    fn between(&mut self, events: &mut Vec<CallEvent>) {
        while ![PARAMETER, FUNCTION_END].iter().any(|tag| tag.starts_with(self.held.as_str())) {
            self.held.remove(0);
        }
        if self.held == PARAMETER {
            self.held.clear();
            self.place = Place::InKey;
        } else if self.held == FUNCTION_END {
            self.place = Place::Over;
            arguments(if self.parameters == 0 { "{}" } else { "}" }, events);
            events.push(CallEvent::End);
        }
    }

    fn begin_parameter(&mut self, key: &str, events: &mut Vec<CallEvent>) {
        let opening = if self.parameters == 0 { "{" } else { ", " };
        self.parameters += 1;
        arguments(&format!("{opening}{}: ", Value::from(key)), events);
        let schema = self.properties.get(key);
        self.place = match Spelling::of(schema) {
            Spelling::Text | Spelling::OneOf(_) => {
                arguments("\"", events);
                Place::BeforeText
            }
            Spelling::Json => Place::InValue { schema: schema.cloned() },
        };
    }

    /// Shows all of the text that cannot be the tag after it, nor the line break before that.
    fn in_text(&mut self, events: &mut Vec<CallEvent>) {
        while !self.held.is_empty() {
            let tag = self.held.strip_prefix('\n').unwrap_or(&self.held);
            if tag == PARAMETER_END {
                self.held.clear();
                self.place = Place::Between;
                return arguments("\"", events);
            }
            if PARAMETER_END.starts_with(tag) {
                return;
            }
            arguments(&escaped(self.held.remove(0)), events);
        }
    }

    fn in_value(&mut self, events: &mut Vec<CallEvent>) {
        let value = self.held.strip_suffix(PARAMETER_END).filter(|text| !is_inside_json(text));
        if let Some(text) = value {
            let Place::InValue { schema } = &self.place else { return };
            arguments(&meaning(text.trim(), schema.as_ref()), events);
            self.held.clear();
            self.place = Place::Between;
        } else if self.held.len() > VALUE_BYTES_MAX {
            self.give_up(events);
        }
    }
}

fn arguments(text: &str, events: &mut Vec<CallEvent>) {
    match events.last_mut() {
        Some(CallEvent::Arguments(before)) => before.push_str(text),
        _ => events.push(CallEvent::Arguments(text.to_owned())),
    }
}

/// A character as it stands in a JSON string.
fn escaped(c: char) -> String {
    let quoted = Value::from(c.to_string()).to_string();
    quoted[1..quoted.len() - 1].to_owned()
}

/// Whether a tag after this stands in the middle of a JSON document: in one of its strings, which hold no line breaks.
fn is_inside_json(text: &str) -> bool {
    let begun = text.trim_start().starts_with(['"', '[', '{']) && !text.ends_with('\n');
    begun && serde_json::from_str::<IgnoredAny>(text.trim()).is_err()
}

/// What a text means, as JSON: itself if it is JSON, else a literal of Python's, else a string.
fn meaning(text: &str, schema: Option<&Value>) -> String {
    let only_text = schema.is_some_and(|schema| schema["type"] == "string");
    let fits = |value: &Value| !only_text || value.is_string();
    if serde_json::from_str(text).is_ok_and(|value| fits(&value)) {
        return text.to_owned();
    }
    let value = pythonic::literal(text).filter(fits);
    value.unwrap_or_else(|| Value::from(text)).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn schemas_tell_the_spelling() {
        for (schema, expected) in [
            (json!({"type": "string", "description": "d"}), Spelling::Text),
            (json!({"type": "string", "enum": ["a", "b"]}), Spelling::OneOf(vec!["a".into(), "b".into()])),
            (json!({"enum": ["a"]}), Spelling::OneOf(vec!["a".into()])),
            (json!({"enum": ["a", 1]}), Spelling::Json),
            (json!({"enum": []}), Spelling::Json),
            (json!({"enum": ["</parameter>"]}), Spelling::Json),
            (json!({"type": "string", "pattern": "^a"}), Spelling::Json),
            (json!({"type": ["string", "null"]}), Spelling::Json),
            (json!({"type": "integer"}), Spelling::Json),
            (json!({}), Spelling::Json),
            (json!(true), Spelling::Text),
        ] {
            assert_eq!(Spelling::of(Some(&schema)), expected, "{schema}");
        }
        assert_eq!(Spelling::of(None), Spelling::Text);
    }

    #[test]
    fn texts_become_values() {
        for (text, schema, expected) in [
            ("5", json!({"type": "integer"}), json!(5)),
            ("[1,{\"a\":null}]", json!({"type": "array"}), json!([1, {"a": null}])),
            ("True", json!({"type": "boolean"}), json!(true)),
            ("{'a': None}", json!({"type": "object"}), json!({"a": null})),
            ("five", json!({"type": "integer"}), json!("five")),
            ("2024-01-01", json!({"type": "string", "format": "date"}), json!("2024-01-01")),
            ("\"2024-01-01\"", json!({"type": "string", "format": "date"}), json!("2024-01-01")),
            ("12", json!({"type": "string", "pattern": "1"}), json!("12")),
            ("null", json!({"type": ["string", "null"]}), json!(null)),
        ] {
            assert_eq!(meaning(text, Some(&schema)), expected.to_string(), "{text} {schema}");
        }
        let long = "123456789012345678901234567890.50";
        assert_eq!(meaning(long, Some(&json!({"type": "number"}))), long);
    }
}
