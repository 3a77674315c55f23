//! Fields that OpenAI or vLLM know and this server does not do: named here so that they are refused, not ignored.

use std::fmt;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::Value;

/// A field, and whether a value of it asks for nothing (so that clients that always send it still work).
type Field = (&'static str, fn(&Value) -> bool);

const FIELDS: &[Field] = &[
    ("allowed_token_ids", empty),
    ("audio", never),
    ("bad_words", empty),
    ("early_stopping", is_false),
    ("function_call", none_word),
    ("functions", empty),
    ("kv_transfer_params", never),
    ("length_penalty", is_one),
    ("logits_processors", empty),
    ("mm_processor_kwargs", empty),
    ("modalities", text_only),
    ("moderation", never),
    ("prediction", never),
    ("prompt_embeds", never),
    ("reasoning_effort", never),
    ("return_token_ids", is_false),
    ("return_tokens_as_token_ids", is_false),
    ("service_tier", usual_tier),
    ("store", is_false),
    ("truncate_prompt_tokens", never),
    ("use_beam_search", is_false),
    ("verbosity", never),
    ("web_search_options", never),
];

fn never(_: &Value) -> bool {
    false
}

fn is_false(value: &Value) -> bool {
    *value == Value::Bool(false)
}

fn is_one(value: &Value) -> bool {
    value.as_f64() == Some(1.0)
}

fn usual_tier(value: &Value) -> bool {
    value == "auto" || value == "default"
}

fn none_word(value: &Value) -> bool {
    value == "none"
}

fn empty(value: &Value) -> bool {
    match value {
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(entries) => entries.is_empty(),
        _ => false,
    }
}

fn text_only(value: &Value) -> bool {
    value.as_array().is_some_and(|items| items.iter().all(|item| item == "text"))
}

/// The first unsupported field of a request body that asks for something; null always asks for nothing.
#[derive(Debug, Default, PartialEq)]
pub struct UnsupportedField(pub Option<&'static str>);

impl<'de> Deserialize<'de> for UnsupportedField {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct FieldsVisitor;

        impl<'de> Visitor<'de> for FieldsVisitor {
            type Value = UnsupportedField;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<UnsupportedField, A::Error> {
                let mut found = None;
                while let Some(key) = entries.next_key::<std::borrow::Cow<str>>()? {
                    match FIELDS.iter().find(|(name, _)| *name == key) {
                        Some((name, asks_nothing)) => {
                            let value: Value = entries.next_value()?;
                            if found.is_none() && !value.is_null() && !asks_nothing(&value) {
                                found = Some(*name);
                            }
                        }
                        None => {
                            entries.next_value::<IgnoredAny>()?;
                        }
                    }
                }
                Ok(UnsupportedField(found))
            }
        }

        deserializer.deserialize_map(FieldsVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(json: &str, expected: Option<&str>) {
        let found: UnsupportedField = serde_json::from_str(json).unwrap();
        assert_eq!(found.0, expected, "{json}");
    }

    #[test]
    fn asking_is_told_from_defaults() {
        for (json, expected) in [
            (r#"{"prompt":"x","unknown":[1,{}]}"#, None),
            (r#"{"audio":null}"#, None),
            (r#"{"functions":[]}"#, None),
            (r#"{"service_tier":"auto"}"#, None),
            (r#"{"service_tier":"flex"}"#, Some("service_tier")),
            (r#"{"use_beam_search":false}"#, None),
            (r#"{"use_beam_search":true}"#, Some("use_beam_search")),
            (r#"{"functions":[{"name":"f"}]}"#, Some("functions")),
            (r#"{"modalities":["text"]}"#, None),
            (r#"{"modalities":["text","audio"]}"#, Some("modalities")),
            (r#"{"prediction":{"type":"content","content":""}}"#, Some("prediction")),
            (r#"{"length_penalty":1}"#, None),
            (r#"{"length_penalty":0.5}"#, Some("length_penalty")),
            (r#"{"audio":{"voice":"x"},"functions":[1]}"#, Some("audio")),
        ] {
            check(json, expected);
        }
    }

    #[test]
    fn fields_are_in_order() {
        assert!(FIELDS.windows(2).all(|pair| pair[0].0 < pair[1].0));
    }
}
