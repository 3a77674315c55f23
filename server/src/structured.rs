//! What a request says its output must match → one grammar text, and the field that asked for it.

use serde_json::{Map, Value, json};

use crate::protocol::ApiError;
use crate::protocol::error::shorten;
use crate::protocol::sampling::SharedFields;
use crate::protocol::structured::{ResponseFormat, StructuredOutputs};
use crate::reasoning::ReasoningFormat;

pub const GRAMMAR_BYTES_MAX: usize = 256 << 10;
pub const CHOICES_MAX: usize = 4096;
const SCHEMA_NAME_BYTES_MAX: usize = 64;

/// Space allowed between the parts of a JSON document: enough for any indentation, but not without end, where a small
/// model may lose its way.
const WHITESPACE: &str = r"[ \t]{1,4}|\r?\n[ \t]{0,40}";

/// A grammar in llguidance's dialect of Lark and the request field it came from.
#[derive(Debug, Clone, PartialEq)]
pub struct GrammarText {
    pub param: &'static str,
    pub text: String,
}

/// The grammar the request asks for, if any. More than one is refused.
pub fn grammar_of(fields: &SharedFields) -> Result<Option<GrammarText>, ApiError> {
    let mut found: Vec<GrammarText> = Vec::new();
    if let Some(format) = &fields.response_format {
        found.extend(of_response_format(format)?);
    }
    let guided = StructuredOutputs {
        json: fields.guided_json.clone(),
        regex: fields.guided_regex.clone(),
        choice: fields.guided_choice.clone(),
        grammar: fields.guided_grammar.clone(),
        whitespace_pattern: fields.guided_whitespace_pattern.clone(),
        ..StructuredOutputs::default()
    };
    found.extend(of_outputs(&guided, &["guided_json", "guided_regex", "guided_choice", "guided_grammar"])?);
    if let Some(outputs) = &fields.structured_outputs {
        found.extend(of_outputs(outputs, &["structured_outputs"])?);
    }
    match found.len() {
        0 => Ok(None),
        1 => Ok(found.pop()),
        _ => Err(ApiError::invalid(
            found[1].param,
            format!("{} and {} may not both say what the output must match", found[0].param, found[1].param),
        )),
    }
}

fn of_response_format(format: &ResponseFormat) -> Result<Option<GrammarText>, ApiError> {
    const PARAM: &str = "response_format";
    let schema = match format.kind.as_str() {
        "text" => return Ok(None),
        "json_object" => format.schema.clone().unwrap_or_else(|| json!({"type": "object"})),
        "json_schema" => {
            let named = format.json_schema.as_ref().ok_or_else(|| {
                ApiError::invalid("response_format.json_schema", "response_format.json_schema is missing")
            })?;
            if let Some(name) = &named.name
                && !is_name(name)
            {
                return Err(ApiError::invalid(
                    "response_format.json_schema.name",
                    format!(
                        "response_format.json_schema.name must be 1 to {SCHEMA_NAME_BYTES_MAX} letters, digits, _ or -, not `{}`",
                        shorten(name)
                    ),
                ));
            }
            named.schema.clone().ok_or_else(|| {
                ApiError::invalid(
                    "response_format.json_schema.schema",
                    "response_format.json_schema.schema is missing",
                )
            })?
        }
        other => {
            return Err(ApiError::invalid(
                "response_format.type",
                format!("response_format.type must be text, json_object or json_schema, not `{}`", shorten(other)),
            ));
        }
    };
    let text = format!("start: {}", json_term(PARAM, &schema, Spacing::default())?);
    sized(PARAM, text).map(Some)
}

/// `params` names the fields of the four kinds, or the one object they are all in.
fn of_outputs(outputs: &StructuredOutputs, params: &[&'static str]) -> Result<Option<GrammarText>, ApiError> {
    let param = |kind: usize| params.get(kind).copied().unwrap_or(params[0]);
    let kinds = [
        outputs.json.is_some(),
        outputs.regex.is_some(),
        outputs.choice.is_some(),
        outputs.grammar.is_some(),
        outputs.json_object == Some(true),
        outputs.structural_tag.is_some(),
    ];
    if kinds.iter().filter(|&&asked| asked).count() > 1 {
        let second = (0..kinds.len()).filter(|&kind| kinds[kind]).nth(1).unwrap_or(0);
        return Err(ApiError::invalid(
            param(second),
            "only one of json, regex, choice, grammar and json_object may say what the output must match",
        ));
    }
    if outputs.structural_tag.is_some() {
        return Err(ApiError::unsupported("structured_outputs.structural_tag"));
    }
    if outputs.disable_additional_properties == Some(true) {
        return Err(ApiError::unsupported("structured_outputs.disable_additional_properties"));
    }
    let spacing = match (outputs.disable_any_whitespace, &outputs.whitespace_pattern) {
        (Some(true), _) => Spacing::None,
        (_, Some(pattern)) => Spacing::Pattern(pattern),
        _ => Spacing::Free,
    };
    if let Some(schema) = &outputs.json {
        let text = format!("start: {}", json_term(param(0), schema, spacing)?);
        return sized(param(0), text).map(Some);
    }
    if let Some(regex) = &outputs.regex {
        return sized(param(1), format!("start: {}", regex_term(param(1), regex)?)).map(Some);
    }
    if let Some(choices) = &outputs.choice {
        return sized(param(2), of_choices(param(2), choices)?).map(Some);
    }
    if let Some(grammar) = &outputs.grammar {
        return sized(param(3), crate::gbnf::to_lark(grammar)).map(Some);
    }
    if outputs.json_object == Some(true) {
        let text = format!("start: {}", json_term(params[0], &json!({"type": "object"}), spacing)?);
        return sized(params[0], text).map(Some);
    }
    Ok(None)
}

/// How a JSON document may be spaced.
#[derive(Debug, Default, Clone, Copy)]
pub enum Spacing<'a> {
    /// As people indent.
    #[default]
    Free,
    /// Not at all.
    None,
    /// One space after each comma and colon, as most models learnt to write calls.
    AfterSeparators,
    /// A regular expression for the space between parts.
    Pattern(&'a str),
}

/// The grammar term for documents that match `schema`: an object, a boolean, or JSON text of one.
pub fn json_term(param: &str, schema: &Value, spacing: Spacing) -> Result<String, ApiError> {
    let mut schema = match schema {
        Value::Object(fields) => fields.clone(),
        Value::Bool(true) => Map::new(),
        Value::String(text) => match serde_json::from_str(text) {
            Ok(parsed @ (Value::Object(_) | Value::Bool(_))) => return json_term(param, &parsed, spacing),
            Ok(_) => return Err(not_a_schema(param)),
            Err(error) => {
                return Err(ApiError::invalid(param, format!("{param}: the schema is not valid JSON: {error}")));
            }
        },
        _ => return Err(not_a_schema(param)),
    };
    let options = match spacing {
        Spacing::Free => json!({"whitespace_pattern": WHITESPACE}),
        Spacing::None => json!({"whitespace_flexible": false}),
        Spacing::AfterSeparators => {
            json!({"whitespace_flexible": false, "item_separator": ", ", "key_separator": ": "})
        }
        Spacing::Pattern(pattern) => json!({"whitespace_pattern": pattern}),
    };
    schema.insert("x-guidance".to_owned(), options);
    Ok(format!("%json {}", Value::Object(schema)))
}

fn not_a_schema(param: &str) -> ApiError {
    ApiError::invalid(param, format!("{param}: a JSON schema is an object or true"))
}

/// The grammar term for texts a regular expression matches in full.
pub fn regex_term(param: &str, regex: &str) -> Result<String, ApiError> {
    // Anchors say what holds anyway; the lexer has none.
    let inner = regex.strip_prefix('^').unwrap_or(regex);
    let inner = match inner.strip_suffix('$') {
        Some(rest) if !ends_in_escape(rest) => rest,
        _ => inner,
    };
    if inner.is_empty() {
        return Err(ApiError::invalid(param, format!("{param}: the regular expression is empty")));
    }
    Ok(format!("/{}/", rill_engine::regex_in_grammar(inner)))
}

fn ends_in_escape(text: &str) -> bool {
    text.bytes().rev().take_while(|&byte| byte == b'\\').count() % 2 == 1
}

fn of_choices(param: &str, choices: &[String]) -> Result<String, ApiError> {
    if !(1..=CHOICES_MAX).contains(&choices.len()) {
        return Err(ApiError::invalid(
            param,
            format!("{param} must hold 1 to {CHOICES_MAX} choices, not {}", choices.len()),
        ));
    }
    if let Some(position) = choices.iter().position(String::is_empty) {
        return Err(ApiError::invalid(param, format!("{param}[{position}] must not be empty")));
    }
    let terms: Vec<String> = choices.iter().map(|choice| literal(choice)).collect();
    Ok(format!("start: {}", terms.join(" | ")))
}

/// The grammar term for exactly this text.
pub fn literal(text: &str) -> String {
    Value::from(text).to_string()
}

fn is_name(name: &str) -> bool {
    (1..=SCHEMA_NAME_BYTES_MAX).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-')
}

/// The same after thoughts: compulsory where the prompt has `opened` them, as the model likes otherwise.
pub fn after_thoughts(grammar: GrammarText, format: ReasoningFormat, opened: bool) -> GrammarText {
    let (open, close) = (literal(format.open()), regex_escaped(format.close()));
    let start = if opened { "thoughts answer".to_owned() } else { format!("({open} thoughts)? answer") };
    let text = format!(
        "start: {start}\nthoughts[lazy]: /(?s:.*){close}[ \\n]{{0,4}}/\nanswer: %lark {{\n{}\n}}\n",
        grammar.text
    );
    GrammarText { text, ..grammar }
}

/// `text` as a regular expression between slashes.
fn regex_escaped(text: &str) -> String {
    text.chars().flat_map(|c| r"\/.+*?()|[]{}^$".contains(c).then_some('\\').into_iter().chain([c])).collect()
}

/// A grammar within the limit.
pub fn sized(param: &'static str, text: String) -> Result<GrammarText, ApiError> {
    if text.len() > GRAMMAR_BYTES_MAX {
        return Err(ApiError::invalid(
            param,
            format!("{param} may be at most {GRAMMAR_BYTES_MAX} bytes long, not {}", text.len()),
        ));
    }
    Ok(GrammarText { param, text })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::body::parse;

    fn of(json: &str) -> Result<Option<GrammarText>, ApiError> {
        grammar_of(&parse::<SharedFields>(json.as_bytes()).unwrap())
    }

    #[test]
    fn what_asks_for_a_grammar() {
        for (json, part) in [
            ("{}", None),
            (r#"{"response_format":{"type":"text"}}"#, None),
            (r#"{"response_format":null}"#, None),
            (r#"{"structured_outputs":{}}"#, None),
            (r#"{"response_format":{"type":"json_object"}}"#, Some(r#"%json {"type":"object""#)),
            (
                r#"{"response_format":{"type":"json_schema","json_schema":{"name":"a","schema":{"type":"null"},"strict":true}}}"#,
                Some(r#"%json {"type":"null""#),
            ),
            (r#"{"guided_json":"{\"type\":\"integer\"}"}"#, Some(r#"%json {"type":"integer""#)),
            (r#"{"guided_json":true}"#, Some("%json {\"x-guidance\"")),
            (r#"{"guided_regex":"^a/b$"}"#, Some(r"start: /a\/b/")),
            (r#"{"guided_regex":"a\\$"}"#, Some(r"start: /a\$/")),
            (r#"{"guided_choice":["a","b\"c"]}"#, Some(r#"start: "a" | "b\"c""#)),
            (r#"{"structured_outputs":{"grammar":"start: \"x\""}}"#, Some("start: \"x\"")),
            (
                r#"{"structured_outputs":{"json":{},"disable_any_whitespace":true}}"#,
                Some("whitespace_flexible\":false"),
            ),
        ] {
            match (of(json).unwrap(), part) {
                (None, None) => {}
                (Some(grammar), Some(part)) => assert!(grammar.text.contains(part), "{json}: {}", grammar.text),
                (got, _) => panic!("{json}: {got:?}"),
            }
        }
    }

    #[test]
    fn what_makes_no_sense_names_its_field() {
        for (json, param, part) in [
            (r#"{"response_format":{"type":"xml"}}"#, "response_format.type", "not `xml`"),
            (r#"{"response_format":{"type":"json_schema"}}"#, "response_format.json_schema", "missing"),
            (
                r#"{"response_format":{"type":"json_schema","json_schema":{"name":"a b","schema":{}}}}"#,
                "response_format.json_schema.name",
                "`a b`",
            ),
            (
                r#"{"response_format":{"type":"json_schema","json_schema":{"name":"a"}}}"#,
                "response_format.json_schema.schema",
                "missing",
            ),
            (r#"{"guided_json":false}"#, "guided_json", "an object or true"),
            (r#"{"guided_json":"{"}"#, "guided_json", "not valid JSON"),
            (r#"{"guided_choice":[]}"#, "guided_choice", "1 to 4096 choices, not 0"),
            (r#"{"guided_choice":["a",""]}"#, "guided_choice", "[1] must not be empty"),
            (r#"{"guided_regex":"^$"}"#, "guided_regex", "empty"),
            (r#"{"guided_regex":"a","guided_choice":["b"]}"#, "guided_choice", "only one"),
            (
                r#"{"guided_regex":"a","response_format":{"type":"json_object"}}"#,
                "guided_regex",
                "response_format and guided_regex",
            ),
            (
                r#"{"structured_outputs":{"structural_tag":{}}}"#,
                "structured_outputs.structural_tag",
                "not supported",
            ),
        ] {
            let error = of(json).unwrap_err();
            assert_eq!((error.status.as_u16(), error.param.as_deref()), (400, Some(param)), "{json}");
            assert!(error.message.contains(part), "{json}: {}", error.message);
        }
        let long = format!(r#"{{"guided_regex":"{}"}}"#, "a".repeat(GRAMMAR_BYTES_MAX));
        assert!(of(&long).unwrap_err().message.contains("at most 262144 bytes"));
    }
}
