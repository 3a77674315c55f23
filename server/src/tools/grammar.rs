//! Forced calls: the grammar of an answer that is nothing but calls whose arguments match their schemas.

use serde_json::{Map, Value};

use super::tagged_call::Spelling;
use super::{Tool, ToolChoice, ToolFormat, Tools};
use crate::protocol::ApiError;
use crate::protocol::error::shorten;
use crate::structured::{GrammarText, Spacing, json_term, literal, sized};

/// The grammar for `tools` in `format`, if they are forced. `marker_id` is the format's marker where it is a control
/// token, which no text spells.
pub fn of_forced_calls(
    tools: &Tools,
    format: ToolFormat,
    marker_id: Option<u32>,
) -> Result<Option<GrammarText>, ApiError> {
    let (allowed, several): (Vec<&Tool>, bool) = match &tools.choice {
        ToolChoice::Auto => return Ok(None),
        ToolChoice::Required => (tools.tools.iter().collect(), tools.parallel),
        ToolChoice::Named(name) => (tools.tools.iter().filter(|tool| tool.name == *name).collect(), false),
    };
    let marker = match format.marker() {
        Some(marker) => marker_id.map_or_else(|| literal(marker), |id| format!("<[{id}]>")),
        None => String::new(),
    };
    let (open, between, close) = match format {
        ToolFormat::Hermes | ToolFormat::Qwen3Coder => (
            format!("{marker} \"\\n\""),
            format!("\"\\n</tool_call>\\n\" {marker} \"\\n\""),
            "\"\\n</tool_call>\"",
        ),
        ToolFormat::Mistral => (format!("{marker} \"[\""), "\", \"".to_owned(), "\"]\""),
        ToolFormat::Llama3 => (String::new(), "\"; \"".to_owned(), ""),
        ToolFormat::Pythonic | ToolFormat::Json => ("\"[\"".to_owned(), "\", \"".to_owned(), "\"]\""),
    };
    let mut text = match several {
        true => format!("start: {open} call ({between} call)* {close}\n"),
        false => format!("start: {open} call {close}\n"),
    };
    let calls: Vec<String> = (0..allowed.len()).map(|number| format!("call_{number}")).collect();
    text.push_str(&format!("call: {}\n", calls.join(" | ")));
    for (tool, call) in allowed.iter().zip(&calls) {
        text.push_str(&match format {
            ToolFormat::Qwen3Coder => tagged_call(call, tool)?,
            ToolFormat::Llama3 => json_call(call, tool, "parameters")?,
            ToolFormat::Hermes | ToolFormat::Mistral | ToolFormat::Pythonic | ToolFormat::Json => {
                json_call(call, tool, "arguments")?
            }
        });
    }
    if format == ToolFormat::Qwen3Coder {
        text.push_str("text[lazy]: /(?s:.*)\\n<\\/parameter>\\n/\n");
    }
    sized("tools", text).map(Some)
}

/// The rule `call` of a call to `tool` that is one JSON object.
fn json_call(call: &str, tool: &Tool, arguments_key: &str) -> Result<String, ApiError> {
    let head = literal(&format!("{{\"name\": {}, \"{arguments_key}\": ", Value::from(tool.name.as_str())));
    let mut schema = tool.parameters.clone();
    // Arguments are an object, whatever the schema forgets to say.
    schema.entry("type").or_insert_with(|| "object".into());
    // Nor are they others than those described, where all are described in one place: functions take no others.
    let elsewhere = ["patternProperties", "allOf", "anyOf", "oneOf", "$ref"];
    if schema.contains_key("properties") && !elsewhere.iter().any(|key| schema.contains_key(*key)) {
        schema.entry("additionalProperties").or_insert(Value::Bool(false));
    }
    let arguments = json_term("tools", &Value::Object(schema), Spacing::AfterSeparators)?;
    Ok(format!("{call}: {head} {arguments} \"}}\"\n"))
}

/// Keywords of a tool's schema that say nothing of its arguments together.
const SEPARABLE: [&str; 11] = [
    "type",
    "properties",
    "required",
    "additionalProperties",
    "description",
    "title",
    "$schema",
    "$id",
    "$comment",
    "$defs",
    "definitions",
];

/// The rules of a call to `tool` with a tag for each argument, in the schema's order.
fn tagged_call(call: &str, tool: &Tool) -> Result<String, ApiError> {
    let name = &tool.name;
    let refused = |what: String| {
        let message =
            format!("tools: a call of `{name}` cannot be forced in this model's format: its parameters {what}");
        Err(ApiError::invalid("tools", message))
    };
    if let Some(key) = tool.parameters.keys().find(|key| !SEPARABLE.contains(&key.as_str())) {
        return refused(format!("use `{}`, which is about several at once", shorten(key)));
    }
    let empty = Map::new();
    let properties = tool.parameters.get("properties").and_then(Value::as_object).unwrap_or(&empty);
    let required: Vec<&str> = tool
        .parameters
        .get("required")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    let described = properties.keys().map(String::as_str);
    let others = required.iter().copied().filter(|key| !properties.contains_key(*key));
    let (mut body, mut rules) = (String::new(), String::new());
    for (number, key) in described.chain(others).enumerate() {
        if key.is_empty() || key.contains(['<', '>', '\n']) || key.trim() != key {
            return refused(format!("have the name `{}`, which does not fit in a tag", shorten(key)));
        }
        let schema = properties.get(key);
        let argument = match Spelling::of(schema) {
            Spelling::Text => "text".to_owned(),
            Spelling::OneOf(words) => {
                let words: Vec<String> = words.iter().map(|word| literal(word)).collect();
                format!("({}) \"\\n</parameter>\\n\"", words.join(" | "))
            }
            Spelling::Json => {
                let mut schema = schema.and_then(Value::as_object).cloned().unwrap_or_default();
                if !refers_to_definitions(&schema) {
                    return refused(format!("refer to more than definitions in `{}`", shorten(key)));
                }
                for kept in ["$defs", "definitions"] {
                    if let Some(definitions) = tool.parameters.get(kept) {
                        schema.insert(kept.to_owned(), definitions.clone());
                    }
                }
                let value = json_term("tools", &Value::Object(schema), Spacing::AfterSeparators)?;
                format!("{value} \"\\n</parameter>\\n\"")
            }
        };
        let rule = format!("{call}_{number}");
        rules.push_str(&format!("{rule}: {} {argument}\n", literal(&format!("<parameter={key}>\n"))));
        body.push_str(&if required.contains(&key) { format!("{rule} ") } else { format!("{rule}? ") });
    }
    Ok(format!("{call}: {} {body}\"</function>\"\n{rules}", literal(&format!("<function={name}>\n"))))
}

/// Whether everything that a part of a schema refers to is in the whole's definitions.
fn refers_to_definitions(schema: &Map<String, Value>) -> bool {
    schema.iter().all(|(key, value)| match value {
        Value::String(target) if key == "$ref" => {
            target.starts_with("#/$defs/") || target.starts_with("#/definitions/")
        }
        Value::Object(inner) => refers_to_definitions(inner),
        Value::Array(items) => items.iter().filter_map(Value::as_object).all(refers_to_definitions),
        _ => true,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn forced(parameters: Value) -> Result<String, String> {
        let tool = Tool { name: "f".to_owned(), parameters: parameters.as_object().unwrap().clone() };
        let tools = Tools { tools: vec![tool], choice: ToolChoice::Required, parallel: false };
        let grammar = of_forced_calls(&tools, ToolFormat::Qwen3Coder, None);
        grammar.map(|grammar| grammar.unwrap().text).map_err(|error| error.message)
    }

    #[test]
    fn tags_hold_one_argument_each() {
        let text = forced(json!({"type": "object", "required": ["a", "c"], "properties": {
            "a": {"type": "string"}, "b": {"enum": ["x", "y"]}}}))
        .unwrap();
        for rule in [
            "call_0: \"<function=f>\\n\" call_0_0 call_0_1? call_0_2 \"</function>\"\n",
            "call_0_0: \"<parameter=a>\\n\" text\n",
            "call_0_1: \"<parameter=b>\\n\" (\"x\" | \"y\") \"\\n</parameter>\\n\"\n",
            "call_0_2: \"<parameter=c>\\n\" text\n",
        ] {
            assert!(text.contains(rule), "{rule} in {text}");
        }
        for (parameters, part) in [
            (json!({"anyOf": []}), "use `anyOf`"),
            (json!({"properties": {"a>": {}}}), "`a>`, which does not fit"),
            (json!({"properties": {"a": {"items": {"$ref": "#"}}}}), "more than definitions in `a`"),
        ] {
            assert!(forced(parameters).unwrap_err().contains(part));
        }
    }
}
