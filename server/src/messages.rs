//! Chat messages as sent → messages as templates see them, or why not.

use serde_json::{Value, json};

use crate::chat_template::TemplateMessage;
use crate::protocol::ApiError;
use crate::protocol::chat::{Content, Message};
use crate::protocol::error::shorten;

pub const MESSAGES_MAX: usize = 4096;
pub const NAME_BYTES_MAX: usize = 64;

/// Checks roles and contents and joins content parts, one a line as vLLM and llama.cpp do.
pub fn for_template(messages: &[Message]) -> Result<Vec<TemplateMessage>, ApiError> {
    if !(1..=MESSAGES_MAX).contains(&messages.len()) {
        return Err(ApiError::invalid(
            "messages",
            format!("messages must hold 1 to {MESSAGES_MAX} messages, not {}", messages.len()),
        ));
    }
    messages.iter().enumerate().map(|(position, message)| one(position, message)).collect()
}

fn one(position: usize, message: &Message) -> Result<TemplateMessage, ApiError> {
    let role = match message.role.as_str() {
        // OpenAI's newer name for the same thing; templates know only the older.
        "system" | "developer" => "system",
        "user" => "user",
        "assistant" => "assistant",
        "tool" => "tool",
        "function" => {
            let field = format!("messages[{position}].role");
            return Err(ApiError::unsupported_value(&field, &format!("{field} `{}`", message.role)));
        }
        other => {
            return Err(ApiError::invalid(
                &format!("messages[{position}].role"),
                format!(
                    "messages[{position}].role must be system, developer, user, assistant or tool, not `{}`",
                    shorten(other)
                ),
            ));
        }
    };
    let tool_calls = match message.tool_calls.as_deref() {
        None | Some([]) => None,
        Some(_) if role != "assistant" => {
            let field = format!("messages[{position}].tool_calls");
            return Err(ApiError::invalid(&field, format!("{field}: only an assistant calls tools")));
        }
        Some(calls) => Some(
            calls
                .iter()
                .enumerate()
                .map(|(index, call)| call_of(&format!("messages[{position}].tool_calls[{index}]"), call))
                .collect::<Result<_, _>>()?,
        ),
    };
    if message.function_call.is_some() {
        return Err(ApiError::unsupported(&format!("messages[{position}].function_call")));
    }
    if let Some(name) = &message.name
        && !(1..=NAME_BYTES_MAX).contains(&name.len())
    {
        let field = format!("messages[{position}].name");
        return Err(ApiError::invalid(
            &field,
            format!("{field} must be 1 to {NAME_BYTES_MAX} bytes long, not {}", name.len()),
        ));
    }
    Ok(TemplateMessage {
        role: role.to_owned(),
        content: match &message.content {
            None if tool_calls.is_some() => String::new(),
            content => text_of(position, content.as_ref())?,
        },
        name: message.name.clone(),
        tool_calls,
        tool_call_id: message.tool_call_id.clone(),
        reasoning_content: message.reasoning_content.clone(),
    })
}

/// A call as templates expect it: arguments as the object their text holds.
fn call_of(field: &str, call: &Value) -> Result<Value, ApiError> {
    let function = &call["function"];
    let Some(name) = function["name"].as_str().filter(|name| !name.is_empty()) else {
        return Err(ApiError::invalid(field, format!("{field}.function.name is missing")));
    };
    let arguments = match &function["arguments"] {
        Value::Null => json!({}),
        Value::String(text) if text.trim().is_empty() => json!({}),
        Value::String(text) => match serde_json::from_str(text) {
            Ok(object @ Value::Object(_)) => object,
            // What a model wrote and nobody could read goes back as it is.
            _ => Value::from(text.as_str()),
        },
        object @ Value::Object(_) => object.clone(),
        _ => {
            return Err(ApiError::invalid(
                field,
                format!("{field}.function.arguments must be a string of JSON or an object"),
            ));
        }
    };
    let function = json!({"name": name, "arguments": arguments});
    Ok(match &call["id"] {
        Value::String(id) => json!({"id": id, "type": "function", "function": function}),
        _ => json!({"type": "function", "function": function}),
    })
}

fn text_of(position: usize, content: Option<&Content>) -> Result<String, ApiError> {
    let field = format!("messages[{position}].content");
    let parts = match content {
        Some(Content::Text(text)) => return Ok(text.clone()),
        Some(Content::Parts(parts)) if !parts.is_empty() => parts,
        Some(Content::Parts(_)) => {
            return Err(ApiError::invalid(&field, format!("{field} must not be an empty array")));
        }
        None => return Err(ApiError::invalid(&field, format!("{field} is missing"))),
    };
    let mut texts = Vec::with_capacity(parts.len());
    for (index, part) in parts.iter().enumerate() {
        match (part.kind.as_str(), &part.text) {
            ("text", Some(text)) => texts.push(text.as_str()),
            ("text", None) => {
                return Err(ApiError::invalid(&field, format!("{field}[{index}].text is missing")));
            }
            (other, _) => {
                let kind = shorten(other);
                return Err(ApiError::unsupported_value(&field, &format!("{field}[{index}] of type `{kind}`")));
            }
        }
    }
    Ok(texts.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(json: &str, expected: Result<&str, &str>) {
        let messages: Vec<Message> = serde_json::from_str(json).unwrap();
        match (for_template(&messages), expected) {
            (Ok(messages), Ok(expected)) => {
                let shown: Vec<String> =
                    messages.iter().map(|message| format!("{}={}", message.role, message.content)).collect();
                assert_eq!(shown.join("|"), expected);
            }
            (Err(error), Err(part)) => {
                assert!(error.message.contains(part), "{}", error.message);
                assert_eq!(error.status, 400);
            }
            (got, expected) => panic!("{json}: {got:?} instead of {expected:?}"),
        }
    }

    #[test]
    fn messages_are_checked() {
        for (json, expected) in [
            (r#"[{"role":"user","content":"hi"}]"#, Ok("user=hi")),
            (r#"[{"role":"user","content":""}]"#, Ok("user=")),
            (r#"[{"role":"developer","content":"be brief"}]"#, Ok("system=be brief")),
            (
                r#"[{"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]}]"#,
                Ok("user=a\nb"),
            ),
            (r#"[{"role":"assistant","content":"x","tool_calls":[]}]"#, Ok("assistant=x")),
            ("[]", Err("messages must hold 1 to 4096 messages, not 0")),
            (r#"[{"role":"robot","content":"x"}]"#, Err("not `robot`")),
            (r#"[{"role":"user"}]"#, Err("messages[0].content is missing")),
            (r#"[{"role":"user","content":null}]"#, Err("messages[0].content is missing")),
            (r#"[{"role":"user","content":[]}]"#, Err("messages[0].content must not be an empty array")),
            (r#"[{"role":"user","content":[{"type":"text"}]}]"#, Err("messages[0].content[0].text is missing")),
            (
                r#"[{"role":"user","content":[{"type":"image_url","image_url":{"url":"x"}}]}]"#,
                Err("messages[0].content[0] of type `image_url` is not supported by this server yet"),
            ),
            (r#"[{"role":"tool","content":"x","tool_call_id":"a"}]"#, Ok("tool=x")),
            (r#"[{"role":"tool"}]"#, Err("messages[0].content is missing")),
            (r#"[{"role":"function","content":"x"}]"#, Err("messages[0].role `function` is not supported")),
            (
                r#"[{"role":"assistant","content":null,"tool_calls":[{"id":"a","function":{"name":"f","arguments":"{}"}}]}]"#,
                Ok("assistant="),
            ),
            (
                r#"[{"role":"assistant","content":null,"tool_calls":[{}]}]"#,
                Err("messages[0].tool_calls[0].function.name is missing"),
            ),
            (
                r#"[{"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":1}}]}]"#,
                Err("arguments must be a string of JSON or an object"),
            ),
            (
                r#"[{"role":"user","content":"x","tool_calls":[{"function":{"name":"f"}}]}]"#,
                Err("only an assistant calls tools"),
            ),
            (r#"[{"role":"user","content":"x","name":""}]"#, Err("messages[0].name must be 1 to 64 bytes")),
        ] {
            check(json, expected);
        }
    }
}
