//! Anthropic's requests → the fields of a chat request.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::protocol::ApiError;
use crate::protocol::anthropic::{Blocks, MessagesRequest, TurnIn};
use crate::protocol::chat::{ChatFields, Content, Message};
use crate::protocol::error::shorten;
use crate::protocol::sampling::{SharedFields, Stop};
use crate::protocol::structured::{NamedSchema, ResponseFormat};

/// OpenAI's names of fields, and Anthropic's.
pub const NAMES: [(&str, &str); 2] = [("stop", "stop_sequences"), ("response_format", "output_config.format")];

/// The same request in OpenAI's terms. `counting`: only the prompt matters.
pub fn to_chat(request: MessagesRequest, counting: bool) -> Result<(SharedFields, ChatFields), ApiError> {
    for (field, value) in [("mcp_servers", &request.mcp_servers), ("container", &request.container)] {
        let empty = value.as_ref().is_none_or(|value| value.is_null() || *value == json!([]));
        if !empty {
            return Err(ApiError::unsupported(field));
        }
    }
    if request.max_tokens.is_none() && !counting {
        return Err(ApiError::invalid("max_tokens", "max_tokens is missing"));
    }
    let mut messages = Vec::with_capacity(request.messages.len() + 1);
    if let Some(system) = &request.system {
        messages.push(message("system", text_of("system", system)?));
    }
    for (position, turn) in request.messages.iter().enumerate() {
        turn_of(position, turn, &mut messages)?;
    }
    if !messages.iter().any(|message| message.role != "system") {
        return Err(ApiError::invalid("messages", "messages must hold at least one message"));
    }
    let (tool_choice, parallel_tool_calls) = choice_of(request.tool_choice.as_ref())?;
    // An answer that the client has begun is gone on with.
    let continues = request.messages.last().is_some_and(|turn| turn.role == "assistant");
    let thinking = request.thinking.as_ref().and_then(|thinking| thinking["type"].as_str());
    let variables = thinking.map(|kind| {
        let kwargs: BTreeMap<String, Value> = [("enable_thinking".to_owned(), json!(kind != "disabled"))].into();
        kwargs.into_iter().collect()
    });
    let own = ChatFields {
        messages: Some(messages),
        tools: request.tools.map(|tools| tools.iter().enumerate().map(tool_of).collect()).transpose()?,
        tool_choice,
        parallel_tool_calls,
        continue_final_message: continues.then_some(true),
        chat_template_kwargs: variables,
        ..ChatFields::default()
    };
    let output = request.output_config;
    if output.as_ref().is_some_and(|output| output.effort.as_ref().is_some_and(|effort| !effort.is_null())) {
        return Err(ApiError::unsupported("output_config.effort"));
    }
    let response_format = output.and_then(|output| output.format).map(|format| ResponseFormat {
        kind: format.kind,
        json_schema: Some(NamedSchema { name: None, schema: format.schema, strict: None }),
        schema: None,
    });
    let shared = SharedFields {
        response_format,
        model: request.model,
        stream: request.stream,
        max_tokens: request.max_tokens,
        temperature: request.temperature,
        top_p: request.top_p,
        top_k: request.top_k,
        stop: request.stop_sequences.map(Stop),
        ..SharedFields::default()
    };
    Ok((shared, own))
}

fn message(role: &str, content: String) -> Message {
    Message { role: role.to_owned(), content: Some(Content::Text(content)), ..Message::default() }
}

fn turn_of(position: usize, turn: &TurnIn, messages: &mut Vec<Message>) -> Result<(), ApiError> {
    let field = format!("messages[{position}]");
    if !["user", "assistant", "system"].contains(&turn.role.as_str()) {
        let role = shorten(&turn.role);
        return Err(ApiError::invalid(
            "messages",
            format!("{field}.role must be user or assistant, not `{role}`"),
        ));
    }
    let blocks = match &turn.content {
        Blocks::Text(text) => {
            messages.push(message(&turn.role, text.clone()));
            return Ok(());
        }
        Blocks::Blocks(blocks) => blocks,
    };
    let (mut texts, mut calls, mut thoughts) = (Vec::new(), Vec::new(), String::new());
    for (index, block) in blocks.iter().enumerate() {
        let field = format!("{field}.content[{index}]");
        let missing = |name: &str| ApiError::invalid("messages", format!("{field}.{name} is missing"));
        match block["type"].as_str() {
            Some("text") => texts.push(block["text"].as_str().ok_or_else(|| missing("text"))?),
            Some("thinking") => thoughts.push_str(block["thinking"].as_str().unwrap_or_default()),
            Some("redacted_thinking") => {}
            Some("tool_use") if turn.role == "assistant" => {
                let name = block["name"].as_str().ok_or_else(|| missing("name"))?;
                calls.push(json!({"id": block["id"], "type": "function",
                                  "function": {"name": name, "arguments": block["input"]}}));
            }
            Some("tool_result") if turn.role == "user" => {
                let text = match &block["content"] {
                    Value::Null => String::new(),
                    Value::String(text) => text.clone(),
                    Value::Array(blocks) => text_of(&field, &Blocks::Blocks(blocks.clone()))?,
                    _ => {
                        return Err(ApiError::invalid(
                            "messages",
                            format!("{field}.content must be text or blocks"),
                        ));
                    }
                };
                // Results come before what is said beside them.
                messages.push(Message {
                    tool_call_id: block["tool_use_id"].as_str().map(str::to_owned),
                    ..message("tool", text)
                });
            }
            kind => {
                let kind = shorten(kind.unwrap_or("(none)"));
                return Err(ApiError::unsupported_value("messages", &format!("{field} of type `{kind}`")));
            }
        }
    }
    let only_results = texts.is_empty() && calls.is_empty() && thoughts.is_empty() && !blocks.is_empty();
    if !only_results {
        messages.push(Message {
            tool_calls: (!calls.is_empty()).then_some(calls),
            reasoning_content: (!thoughts.is_empty()).then_some(thoughts),
            ..message(&turn.role, texts.join("\n"))
        });
    }
    Ok(())
}

/// Blocks that must all be text, one a line.
fn text_of(field: &str, content: &Blocks) -> Result<String, ApiError> {
    let blocks = match content {
        Blocks::Text(text) => return Ok(text.clone()),
        Blocks::Blocks(blocks) => blocks,
    };
    let texts: Vec<&str> = blocks
        .iter()
        .map(|block| match (block["type"].as_str(), block["text"].as_str()) {
            (Some("text"), Some(text)) => Ok(text),
            (kind, _) => {
                let kind = shorten(kind.unwrap_or("(none)"));
                let param = field.split('[').next().unwrap_or(field);
                Err(ApiError::unsupported_value(param, &format!("{field} with a block of type `{kind}`")))
            }
        })
        .collect::<Result<_, _>>()?;
    Ok(texts.join("\n"))
}

fn tool_of((position, tool): (usize, &Value)) -> Result<Value, ApiError> {
    if let Some(kind) = tool["type"].as_str().filter(|kind| *kind != "custom") {
        return Err(ApiError::unsupported_value(
            "tools",
            &format!("tools[{position}] of type `{}`", shorten(kind)),
        ));
    }
    let mut function = json!({"name": tool["name"], "parameters": tool["input_schema"]});
    if let Some(description) = tool["description"].as_str() {
        function["description"] = json!(description);
    }
    Ok(json!({"type": "function", "function": function}))
}

/// OpenAI's `tool_choice` and `parallel_tool_calls`.
fn choice_of(choice: Option<&Value>) -> Result<(Option<Value>, Option<bool>), ApiError> {
    let Some(choice) = choice.filter(|choice| !choice.is_null()) else { return Ok((None, None)) };
    let parallel = choice["disable_parallel_tool_use"].as_bool().map(|disabled| !disabled);
    let word = match choice["type"].as_str() {
        Some("auto") => json!("auto"),
        Some("any") => json!("required"),
        Some("none") => json!("none"),
        Some("tool") => json!({"type": "function", "function": {"name": choice["name"]}}),
        other => {
            return Err(ApiError::invalid(
                "tool_choice",
                format!(
                    "tool_choice.type must be auto, any, tool or none, not `{}`",
                    shorten(other.unwrap_or(""))
                ),
            ));
        }
    };
    Ok((Some(word), parallel))
}
