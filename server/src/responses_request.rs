//! Requests of `/v1/responses` → the fields of a chat request.

use serde_json::{Value, json};

use crate::protocol::ApiError;
use crate::protocol::chat::{ChatFields, Content, Message};
use crate::protocol::error::shorten;
use crate::protocol::responses::{Input, ResponsesRequest};
use crate::protocol::sampling::SharedFields;
use crate::protocol::structured::ResponseFormat;

/// The same request in chat's terms, after the turns of the response it goes on from; and the turns to keep for one
/// that goes on from it: all but the instructions.
pub fn to_chat(
    request: &ResponsesRequest,
    earlier: Vec<Message>,
) -> Result<(SharedFields, ChatFields, Vec<Message>), ApiError> {
    refuse_unsupported(request)?;
    let mut turns = earlier;
    match &request.input {
        None => return Err(ApiError::invalid("input", "input is missing")),
        Some(Input::Text(text)) => turns.push(message("user", text.clone())),
        Some(Input::Items(items)) => {
            for (position, item) in items.iter().enumerate() {
                add_item(position, item, &mut turns)?;
            }
        }
    }
    let mut messages = Vec::with_capacity(turns.len() + 1);
    if let Some(instructions) = &request.instructions {
        messages.push(message("system", instructions.clone()));
    }
    messages.extend(turns.iter().cloned());
    let response_format =
        request.text.as_ref().and_then(|text| text.format.clone()).map(|format| ResponseFormat {
            json_schema: (format.kind == "json_schema").then_some(format.schema),
            kind: format.kind,
            schema: None,
        });
    let own = ChatFields {
        messages: Some(messages),
        tools: request.tools.as_ref().map(|tools| tools.iter().enumerate().map(tool_of).collect()).transpose()?,
        tool_choice: request.tool_choice.clone(),
        parallel_tool_calls: request.parallel_tool_calls,
        ..ChatFields::default()
    };
    let shared = SharedFields {
        model: request.model.clone(),
        stream: request.stream,
        max_tokens: request.max_output_tokens,
        temperature: request.temperature,
        top_p: request.top_p,
        response_format,
        metadata: request.metadata.clone(),
        ..SharedFields::default()
    };
    Ok((shared, own, turns))
}

/// Chat's names of fields, and those of this API.
pub const NAMES: [(&str, &str); 3] =
    [("max_tokens", "max_output_tokens"), ("messages", "input"), ("response_format", "text.format")];

fn refuse_unsupported(request: &ResponsesRequest) -> Result<(), ApiError> {
    let set = |value: &Option<Value>| value.as_ref().is_some_and(|value| !value.is_null());
    let effort = request.reasoning.iter().flatten().any(|(_, value)| !value.is_null());
    for (field, asked) in [
        ("background", request.background == Some(true)),
        ("conversation", set(&request.conversation)),
        ("context_management", set(&request.context_management)),
        ("moderation", set(&request.moderation)),
        ("include", request.include.as_ref().is_some_and(|include| !include.is_empty())),
        ("prompt", set(&request.prompt)),
        ("max_tool_calls", request.max_tool_calls.is_some()),
        ("top_logprobs", request.top_logprobs.is_some_and(|top| top > 0)),
        ("reasoning", effort),
        ("truncation", request.truncation.as_ref().is_some_and(|truncation| truncation != "disabled")),
        ("text.verbosity", request.text.as_ref().is_some_and(|text| set(&text.verbosity))),
    ] {
        if asked {
            return Err(ApiError::unsupported(field));
        }
    }
    Ok(())
}

/// Whose messages there may be.
const ROLES: [&str; 4] = ["user", "assistant", "system", "developer"];

fn message(role: &str, content: String) -> Message {
    Message { role: role.to_owned(), content: Some(Content::Text(content)), ..Message::default() }
}

fn add_item(position: usize, item: &Value, turns: &mut Vec<Message>) -> Result<(), ApiError> {
    let field = format!("input[{position}]");
    let missing = |name: &str| ApiError::invalid("input", format!("{field}.{name} is missing"));
    match item["type"].as_str() {
        None | Some("message") => {
            let role = item["role"].as_str().ok_or_else(|| missing("role"))?;
            if !ROLES.contains(&role) {
                let message = format!("{field}.role must be one of {}, not `{}`", ROLES.join(", "), shorten(role));
                return Err(ApiError::invalid("input", message));
            }
            turns.push(message(role, text_of(&field, &item["content"])?));
        }
        Some("function_call") => {
            let name = item["name"].as_str().ok_or_else(|| missing("name"))?;
            let call = json!({"id": item["call_id"], "type": "function",
                              "function": {"name": name, "arguments": item["arguments"]}});
            add_call(call, turns);
        }
        Some("function_call_output") => {
            let call_id = item["call_id"].as_str().ok_or_else(|| missing("call_id"))?;
            let text = text_of(&field, &item["output"])?;
            turns.push(Message { tool_call_id: Some(call_id.to_owned()), ..message("tool", text) });
        }
        // Thoughts of earlier answers are not shown again.
        Some("reasoning") => {}
        Some(other) => {
            let kind = shorten(other);
            return Err(ApiError::unsupported_value("input", &format!("{field} of type `{kind}`")));
        }
    }
    Ok(())
}

/// Adds a call to the assistant's turn it belongs to.
pub fn add_call(call: Value, turns: &mut Vec<Message>) {
    match turns.last_mut().filter(|last| last.role == "assistant") {
        Some(last) => last.tool_calls.get_or_insert_default().push(call),
        None => turns.push(Message { tool_calls: Some(vec![call]), ..message("assistant", String::new()) }),
    }
}

fn text_of(field: &str, content: &Value) -> Result<String, ApiError> {
    match content {
        Value::String(text) => Ok(text.clone()),
        Value::Array(parts) => {
            let texts: Vec<&str> = parts
                .iter()
                .map(|part| match (part["type"].as_str(), part["text"].as_str()) {
                    (Some("input_text" | "output_text" | "text"), Some(text)) => Ok(text),
                    (kind, _) => {
                        let kind = shorten(kind.unwrap_or("(none)"));
                        Err(ApiError::unsupported_value("input", &format!("{field} with a part of type `{kind}`")))
                    }
                })
                .collect::<Result<_, _>>()?;
            Ok(texts.join("\n"))
        }
        _ => Err(ApiError::invalid("input", format!("{field} must hold text or an array of parts"))),
    }
}

/// Chat's shape of a tool: one object deeper.
fn tool_of((position, tool): (usize, &Value)) -> Result<Value, ApiError> {
    if tool["type"] != "function" {
        let kind = shorten(tool["type"].as_str().unwrap_or("(none)"));
        return Err(ApiError::unsupported_value("tools", &format!("tools[{position}] of type `{kind}`")));
    }
    let mut function = json!({"name": tool["name"], "parameters": tool["parameters"]});
    if let Some(description) = tool["description"].as_str() {
        function["description"] = json!(description);
    }
    Ok(json!({"type": "function", "function": function}))
}
