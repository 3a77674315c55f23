//! Messages → prompt text, through the model's own Jinja template in the environment Hugging Face gives it.

use crate::python_repr;
use minijinja::value::{Kwargs, Value as JinjaValue, ValueKind};
use minijinja::{Environment, Error, ErrorKind, UndefinedBehavior, context};
use serde::Serialize;
use serde_json::{Map, Value};

/// Template instructions one render may execute: some 10,000 messages' worth, well under a second.
const FUEL_PER_RENDER: u64 = 2_000_000;
/// A rendered prompt longer than this is refused; the body limit normally comes first.
const RENDERED_BYTES_MAX: usize = 64 << 20;

/// The template does not compile, or cannot render these messages.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{0}")]
pub struct TemplateError(String);

/// A compiled template and the control tokens it may name.
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: String,
    eos_token: String,
    source: String,
    /// What takes its place where a request has tools.
    tool_use: Option<Box<ChatTemplate>>,
}

/// One message as templates see it; content parts are joined already.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TemplateMessage {
    pub role: String,
    pub content: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// `{id, type, function: {name, arguments}}` each, arguments an object.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_calls: Option<Vec<Value>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_call_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
}

impl TemplateMessage {
    pub fn new(role: &str, content: impl Into<String>) -> TemplateMessage {
        TemplateMessage {
            role: role.to_owned(),
            content: content.into(),
            name: None,
            tool_calls: None,
            tool_call_id: None,
            reasoning_content: None,
        }
    }
}

/// What a render depends on besides the template.
#[derive(Debug, Default, Clone, Copy)]
pub struct RenderInput<'a> {
    pub messages: &'a [TemplateMessage],
    pub tools: Option<&'a [Value]>,
    pub documents: Option<&'a [Value]>,
    /// Ends the prompt with what opens the assistant's turn.
    pub add_generation_prompt: bool,
    /// Ends the prompt inside the last message, for the model to go on with it.
    pub continue_final_message: bool,
    /// Further variables, as `chat_template_kwargs` gives them.
    pub variables: Option<&'a Map<String, Value>>,
}

impl ChatTemplate {
    /// Compiles `source`. The tokens are spelled as in the vocabulary; empty where the model has none.
    pub fn new(source: &str, bos_token: &str, eos_token: &str) -> Result<Self, TemplateError> {
        // Jinja has one kind of line break, whatever a template's file has.
        let source = &source.replace("\r\n", "\n").replace('\r', "\n");
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_fuel(Some(FUEL_PER_RENDER));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", tojson);
        environment.add_filter("string", string);
        environment.set_formatter(|out, state, value| match printed(value)? {
            Some(text) => out.write_str(&text).map_err(Error::from),
            None => minijinja::escape_formatter(out, state, value),
        });
        environment
            .add_template_owned("chat", without_generation_tags(source))
            .map_err(|error| TemplateError(format!("the chat template does not compile: {}", plain(&error))))?;
        Ok(ChatTemplate {
            environment,
            bos_token: bos_token.to_owned(),
            eos_token: eos_token.to_owned(),
            source: source.to_owned(),
            tool_use: None,
        })
    }

    /// The same with another template, of the same tokens, for requests with tools.
    pub fn with_tool_use(mut self, source: &str) -> Result<Self, TemplateError> {
        self.tool_use = Some(Box::new(self.with_source(source)?));
        Ok(self)
    }

    /// The template for a request with tools, or without.
    pub fn of_request(&self, has_tools: bool) -> &ChatTemplate {
        self.tool_use.as_deref().filter(|_| has_tools).unwrap_or(self)
    }

    pub fn source(&self) -> &str {
        &self.source
    }

    /// Whether it shows tools to the model.
    pub fn shows_tools(&self) -> bool {
        self.source.contains("tools")
    }

    /// Whether it writes earlier calls and their results.
    pub fn writes_calls(&self) -> bool {
        self.source.contains("tool_calls") || self.source.contains("tool_call_id")
    }

    /// Another template with the same control tokens.
    pub fn with_source(&self, source: &str) -> Result<Self, TemplateError> {
        Self::new(source, &self.bos_token, &self.eos_token)
    }

    /// The prompt text.
    pub fn render(&self, input: &RenderInput) -> Result<String, TemplateError> {
        let template = self.environment.get_template("chat").map_err(|error| TemplateError(plain(&error)))?;
        let standard = context! {
            messages => input.messages,
            tools => input.tools,
            documents => input.documents,
            add_generation_prompt => input.add_generation_prompt,
            bos_token => self.bos_token,
            eos_token => self.eos_token,
        };
        // Later maps only fill in what earlier ones lack, so a request cannot replace its own messages.
        let variables = match input.variables {
            Some(extra) => context! { ..standard, ..JinjaValue::from_serialize(extra) },
            None => standard,
        };
        let text = match template.render(variables.clone()) {
            Ok(text) => text,
            // Some templates write arguments as they come and expect JSON text.
            Err(error) => with_arguments_as_text(input.messages)
                .and_then(|messages| {
                    template.render(context! { ..context! { messages => messages }, ..variables }).ok()
                })
                .ok_or_else(|| {
                    TemplateError(format!("the chat template cannot render these messages: {}", plain(&error)))
                })?,
        };
        if text.len() > RENDERED_BYTES_MAX {
            return Err(TemplateError(format!(
                "the chat template rendered {} bytes; the limit is {RENDERED_BYTES_MAX}",
                text.len()
            )));
        }
        if input.continue_final_message { cut_after_final_message(text, input.messages) } else { Ok(text) }
    }
}

/// The messages with calls' arguments as JSON text; `None` if there are no calls.
fn with_arguments_as_text(messages: &[TemplateMessage]) -> Option<Vec<TemplateMessage>> {
    messages.iter().find(|message| message.tool_calls.is_some())?;
    let mut messages = messages.to_vec();
    for call in messages.iter_mut().filter_map(|message| message.tool_calls.as_mut()).flatten() {
        let arguments = &mut call["function"]["arguments"];
        if !arguments.is_string() {
            *arguments = Value::String(arguments.to_string());
        }
    }
    Some(messages)
}

/// The message of an error and of what caused it, on one line.
fn plain(error: &Error) -> String {
    let text = match error.kind() {
        ErrorKind::OutOfFuel => "it takes too many steps".to_owned(),
        kind => error.detail().map_or_else(|| kind.to_string(), str::to_owned),
    };
    match error.line() {
        Some(line) => format!("{text} (template line {line})"),
        None => text,
    }
}

fn raise_exception(message: String) -> Result<JinjaValue, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// Python's `datetime.now().strftime(format)`, in UTC.
fn strftime_now(format: &str) -> Result<String, Error> {
    use std::fmt::Write;

    let mut text = String::new();
    let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    let now = chrono::DateTime::from_timestamp(i64::try_from(now.as_secs()).unwrap_or(0), 0).unwrap_or_default();
    write!(text, "{}", now.format(format))
        .map_err(|_| Error::new(ErrorKind::InvalidOperation, format!("strftime_now cannot format {format:?}")))?;
    Ok(text)
}

/// Python's `str(value)`.
fn string(value: &JinjaValue) -> Result<JinjaValue, Error> {
    Ok(printed(value)?.unwrap_or_else(|| value.to_string()).into())
}

/// None, lists and mappings as Python prints them; nothing where minijinja prints the value alike.
fn printed(value: &JinjaValue) -> Result<Option<String>, Error> {
    if !matches!(value.kind(), ValueKind::None | ValueKind::Map | ValueKind::Seq) {
        return Ok(None);
    }
    let tree = serde_json::to_value(value).map_err(|error| {
        Error::new(ErrorKind::BadSerialization, "a value cannot be printed").with_source(error)
    })?;
    Ok(Some(python_repr::repr(&tree)))
}

/// Python's `json.dumps(value, ensure_ascii=False)`: a space after each comma and colon, nothing escaped for HTML.
fn tojson(value: &JinjaValue, kwargs: Kwargs) -> Result<JinjaValue, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let sort_keys: Option<bool> = kwargs.get("sort_keys")?;
    let _ensure_ascii: Option<bool> = kwargs.get("ensure_ascii")?;
    let _separators: Option<JinjaValue> = kwargs.get("separators")?;
    kwargs.assert_all_used()?;
    let failed = |error: serde_json::Error| {
        Error::new(ErrorKind::BadSerialization, "a value is not serialisable to JSON").with_source(error)
    };
    let mut tree = serde_json::to_value(value).map_err(failed)?;
    if sort_keys == Some(true) {
        tree.sort_all_objects();
    }
    let mut bytes = Vec::new();
    match indent {
        Some(width) => {
            let spaces = " ".repeat(width.min(16));
            let formatter = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            tree.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, formatter)).map_err(failed)?;
        }
        None => {
            let mut serializer = serde_json::Serializer::with_formatter(&mut bytes, PythonFormatter);
            tree.serialize(&mut serializer).map_err(failed)?;
        }
    }
    Ok(JinjaValue::from_safe_string(String::from_utf8_lossy(&bytes).into_owned()))
}

/// Separators `", "` and `": "`.
struct PythonFormatter;

impl serde_json::ser::Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, w: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, w: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, w: &mut W) -> std::io::Result<()> {
        w.write_all(b": ")
    }
}

/// `{% generation %}` marks what to train on and renders as its content: an always-true `if` does the same and
/// keeps the tags' whitespace control.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        // What opens a tag does not close it: `{%}`.
        let Some(end) = tag[2..].find("%}").map(|end| end + 2) else {
            rest = tag;
            break;
        };
        let (tag, after) = tag.split_at(end + 2);
        let inner = tag[2..end].trim_start_matches(['-', '+']).trim_end_matches(['-', '+']).trim();
        match inner {
            "generation" => out.push_str(&tag.replacen("generation", "if true", 1)),
            "endgeneration" => out.push_str(&tag.replacen("endgeneration", "endif", 1)),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

/// Cuts the rendered prompt right after the last message's content.
fn cut_after_final_message(mut text: String, messages: &[TemplateMessage]) -> Result<String, TemplateError> {
    let content = messages.last().map_or("", |message| message.content.as_str());
    let trimmed = content.trim();
    let Some(start) = text.rfind(trimmed) else {
        return Err(TemplateError(
            "continue_final_message: the chat template does not show the last message's content".to_owned(),
        ));
    };
    // A template that trims contents leaves no trailing whitespace to keep.
    let kept = content.trim_start();
    let end = if text[start..].starts_with(kept) { start + kept.len() } else { start + trimmed.len() };
    text.truncate(end);
    Ok(text)
}

#[cfg(test)]
#[path = "chat_template_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "chat_template_families.rs"]
mod families;
