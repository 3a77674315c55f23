//! `tools`, `tool_choice` and `parallel_tool_calls`, checked.

use serde_json::{Map, Value, json};

use crate::protocol::ApiError;
use crate::protocol::error::shorten;

pub const TOOLS_MAX: usize = 128;
const NAME_BYTES_MAX: usize = 128;

/// A function the model may call.
#[derive(Debug, Clone, PartialEq)]
pub struct Tool {
    pub name: String,
    /// JSON schema of its arguments.
    pub parameters: Map<String, Value>,
}

/// Whether and what the model must call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToolChoice {
    /// As it likes.
    Auto,
    /// One tool or more.
    Required,
    /// This one, once.
    Named(String),
}

/// The tools of a request that may be answered with calls.
#[derive(Debug, Clone, PartialEq)]
pub struct Tools {
    pub tools: Vec<Tool>,
    pub choice: ToolChoice,
    /// More than one call an answer.
    pub parallel: bool,
}

impl Tools {
    /// `None` where the answer is to be text alone.
    pub fn new(
        tools: Option<&[Value]>,
        choice: Option<&Value>,
        parallel: Option<bool>,
    ) -> Result<Option<Tools>, ApiError> {
        let tools = check(tools.unwrap_or_default())?;
        let choice = match choice {
            None | Some(Value::Null) => ToolChoice::Auto,
            Some(Value::String(word)) => match word.as_str() {
                "none" => return Ok(None),
                "auto" => ToolChoice::Auto,
                "required" | "any" => ToolChoice::Required,
                other => {
                    return Err(ApiError::invalid(
                        "tool_choice",
                        format!(
                            "tool_choice must be none, auto, required or name a function, not `{}`",
                            shorten(other)
                        ),
                    ));
                }
            },
            Some(Value::Object(fields)) => named(fields)?,
            Some(_) => return Err(ApiError::invalid("tool_choice", "tool_choice must be a string or an object")),
        };
        if tools.is_empty() {
            return match choice {
                ToolChoice::Auto => Ok(None),
                _ => Err(ApiError::invalid("tool_choice", "tool_choice needs tools to choose from")),
            };
        }
        if let ToolChoice::Named(name) = &choice
            && !tools.iter().any(|tool| tool.name == *name)
        {
            return Err(ApiError::invalid(
                "tool_choice",
                format!("tool_choice names `{}`, which is not among the tools", shorten(name)),
            ));
        }
        Ok(Some(Tools { tools, choice, parallel: parallel.unwrap_or(true) }))
    }
}

fn check(tools: &[Value]) -> Result<Vec<Tool>, ApiError> {
    if tools.len() > TOOLS_MAX {
        return Err(ApiError::invalid(
            "tools",
            format!("tools may hold at most {TOOLS_MAX} tools, not {}", tools.len()),
        ));
    }
    tools.iter().enumerate().map(|(position, tool)| one(position, tool)).collect()
}

fn one(position: usize, tool: &Value) -> Result<Tool, ApiError> {
    let field = format!("tools[{position}]");
    match tool["type"].as_str() {
        Some("function") => {}
        Some(other) => {
            let kind = shorten(other);
            return Err(ApiError::unsupported_value("tools", &format!("{field} of type `{kind}`")));
        }
        None => return Err(ApiError::invalid("tools", format!("{field}.type must be `function`"))),
    }
    let function = &tool["function"];
    let Some(name) = function["name"].as_str() else {
        return Err(ApiError::invalid("tools", format!("{field}.function.name is missing")));
    };
    let fine = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.:/".contains(&byte);
    if !(1..=NAME_BYTES_MAX).contains(&name.len()) || !name.bytes().all(fine) {
        return Err(ApiError::invalid(
            "tools",
            format!(
                "{field}.function.name must be 1 to {NAME_BYTES_MAX} letters, digits or any of _-.:/, not `{}`",
                shorten(name)
            ),
        ));
    }
    let parameters = match &function["parameters"] {
        Value::Null => {
            Map::from_iter([("type".to_owned(), json!("object")), ("properties".to_owned(), json!({}))])
        }
        Value::Object(schema) => schema.clone(),
        _ => {
            return Err(ApiError::invalid("tools", format!("{field}.function.parameters must be a JSON schema")));
        }
    };
    Ok(Tool { name: name.to_owned(), parameters })
}

fn named(fields: &Map<String, Value>) -> Result<ToolChoice, ApiError> {
    match fields.get("type").and_then(Value::as_str) {
        Some("function") | None => {}
        Some(other) => {
            let kind = shorten(other);
            return Err(ApiError::unsupported_value("tool_choice", &format!("tool_choice of type `{kind}`")));
        }
    }
    // OpenAI's chat nests the name, its responses do not.
    let name = fields.get("function").and_then(|function| function["name"].as_str());
    match name.or_else(|| fields.get("name").and_then(Value::as_str)) {
        Some(name) => Ok(ToolChoice::Named(name.to_owned())),
        None => Err(ApiError::invalid("tool_choice", "tool_choice.function.name is missing")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tools_and_choices_are_checked() {
        let weather =
            json!([{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]);
        let many = Value::Array(vec![weather[0].clone(); 129]);
        for (tools, choice, expected) in [
            (json!([]), Value::Null, Ok(None)),
            (json!([]), json!("none"), Ok(None)),
            (weather.clone(), json!("none"), Ok(None)),
            (weather.clone(), Value::Null, Ok(Some(ToolChoice::Auto))),
            (weather.clone(), json!("auto"), Ok(Some(ToolChoice::Auto))),
            (weather.clone(), json!("required"), Ok(Some(ToolChoice::Required))),
            (
                weather.clone(),
                json!({"type": "function", "function": {"name": "weather"}}),
                Ok(Some(ToolChoice::Named("weather".to_owned()))),
            ),
            (weather.clone(), json!("perhaps"), Err("not `perhaps`")),
            (weather.clone(), json!(1), Err("a string or an object")),
            (weather.clone(), json!({"type": "function"}), Err("name is missing")),
            (weather.clone(), json!({"type": "allowed_tools"}), Err("`allowed_tools` is not supported")),
            (weather, json!({"type": "function", "function": {"name": "time"}}), Err("names `time`")),
            (json!([]), json!("required"), Err("needs tools")),
            (many, Value::Null, Err("at most 128 tools, not 129")),
            (json!([{"type": "retrieval"}]), Value::Null, Err("tools[0] of type `retrieval` is not supported")),
            (json!([{}]), Value::Null, Err("tools[0].type")),
            (json!([{"type": "function", "function": {}}]), Value::Null, Err("name is missing")),
            (json!([{"type": "function", "function": {"name": "a b"}}]), Value::Null, Err("not `a b`")),
            (
                json!([{"type": "function", "function": {"name": "a", "parameters": 1}}]),
                Value::Null,
                Err("must be a JSON schema"),
            ),
        ] {
            match (Tools::new(tools.as_array().map(Vec::as_slice), Some(&choice), None), expected) {
                (Ok(got), Ok(expected)) => assert_eq!(got.map(|tools| tools.choice), expected, "{choice}"),
                (Err(error), Err(part)) => assert!(error.message.contains(part), "{}", error.message),
                (got, expected) => panic!("{tools} {choice}: {got:?} instead of {expected:?}"),
            }
        }
    }
}
