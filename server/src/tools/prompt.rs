//! Tools for models whose chat template has no place for them: told in the system message, calls and results as text.

use serde_json::Value;

use crate::chat_template::TemplateMessage;

/// Adds what the model must know to the system message, or one before the others.
pub fn describe(messages: &mut Vec<TemplateMessage>, tools: &[Value]) {
    let mut text = "You can call these functions, each given by its JSON description:\n".to_owned();
    for tool in tools {
        text.push_str(&tool["function"].to_string());
        text.push('\n');
    }
    text.push_str(
        "To call functions, answer with nothing but a JSON array of calls such as \
         [{\"name\": \"function\", \"arguments\": {\"key\": \"value\"}}]. If no call is needed, answer as usual.",
    );
    match messages.first_mut().filter(|message| message.role == "system") {
        Some(system) => {
            system.content.push_str("\n\n");
            system.content.push_str(&text);
        }
        None => messages.insert(0, TemplateMessage::new("system", text)),
    }
}

/// Rewrites calls and results as what such a model would have said and been told.
pub fn flatten(messages: &mut [TemplateMessage]) {
    for message in messages {
        if let Some(calls) = message.tool_calls.take() {
            let calls: Vec<String> = calls
                .iter()
                .map(|call| {
                    let function = &call["function"];
                    format!("{{\"name\": {}, \"arguments\": {}}}", function["name"], function["arguments"])
                })
                .collect();
            if !message.content.is_empty() {
                message.content.push('\n');
            }
            message.content.push_str(&format!("[{}]", calls.join(", ")));
        }
        if message.role == "tool" {
            message.role = "user".to_owned();
            message.content = format!("Result of the function call: {}", message.content);
        }
    }
}
