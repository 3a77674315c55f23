//! Forced calls: the grammar of an answer that is nothing but calls whose arguments match their schemas.

use serde_json::Value;

use super::{Tool, ToolChoice, ToolFormat, Tools};
use crate::protocol::ApiError;
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
    let arguments_key = match format {
        ToolFormat::Llama3 => "parameters",
        ToolFormat::Hermes | ToolFormat::Mistral | ToolFormat::Pythonic | ToolFormat::Json => "arguments",
    };
    let marker = match format.marker() {
        Some(marker) => marker_id.map_or_else(|| literal(marker), |id| format!("<[{id}]>")),
        None => String::new(),
    };
    let (open, between, close) = match format {
        ToolFormat::Hermes => (
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
        text.push_str(&format!("{call}: {head} {arguments} \"}}\"\n"));
    }
    sized("tools", text).map(Some)
}
