//! The templates of well-known families of models against what transformers renders of them: every row of
//! fixtures/chat_templates.json, which fixtures/make_chat_templates.py makes.

use super::*;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::Path;

#[derive(Deserialize)]
struct Fixture {
    cases: BTreeMap<String, Case>,
    rows: Vec<Row>,
}

#[derive(Deserialize)]
struct Case {
    messages: Vec<Message>,
    tools: Option<Vec<Value>>,
    documents: Option<Vec<Value>>,
    add_generation_prompt: bool,
    variables: Map<String, Value>,
}

#[derive(Deserialize)]
struct Message {
    role: String,
    content: String,
    tool_calls: Option<Vec<Value>>,
    tool_call_id: Option<String>,
    reasoning_content: Option<String>,
}

#[derive(Deserialize)]
struct Row {
    template: String,
    case: String,
    text: Option<String>,
    error: Option<String>,
}

/// Rows that differ, and how many there are.
fn differing(fixture: &Path, templates: &Path) -> (Vec<String>, usize) {
    let read = |path: &Path| std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let fixture: Fixture = serde_json::from_str(&read(fixture)).expect("the fixture's own shape");
    let mut compiled = BTreeMap::new();
    let mut wrong = Vec::new();
    for row in &fixture.rows {
        let template = compiled.entry(row.template.as_str()).or_insert_with(|| {
            let source = read(&templates.join(format!("{}.jinja", row.template)));
            ChatTemplate::new(&source, "<s>", "</s>").unwrap_or_else(|error| panic!("{}: {error}", row.template))
        });
        let case = &fixture.cases[&row.case];
        let messages: Vec<TemplateMessage> = case
            .messages
            .iter()
            .map(|message| TemplateMessage {
                tool_calls: message.tool_calls.clone(),
                tool_call_id: message.tool_call_id.clone(),
                reasoning_content: message.reasoning_content.clone(),
                ..TemplateMessage::new(&message.role, message.content.clone())
            })
            .collect();
        let given = template.render(&RenderInput {
            messages: &messages,
            tools: case.tools.as_deref(),
            documents: case.documents.as_deref(),
            add_generation_prompt: case.add_generation_prompt,
            continue_final_message: false,
            variables: Some(&case.variables),
        });
        let same = match (&given, &row.text, &row.error) {
            (Ok(given), Some(text), _) => given == text,
            (Err(given), None, Some(error)) => given.to_string().contains(error.as_str()),
            _ => false,
        };
        if !same {
            let expected = row.text.as_ref().or(row.error.as_ref());
            wrong.push(format!("{} of {}:\n given {given:?}\n not   {expected:?}", row.template, row.case));
        }
    }
    (wrong, fixture.rows.len())
}

#[test]
fn families_render_as_transformers_renders_them() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    let (wrong, rows) = differing(&fixtures.join("chat_templates.json"), &fixtures.join("chat_templates"));
    assert!(wrong.is_empty(), "{} of {rows} rows differ:\n{}", wrong.len(), wrong.join("\n"));
    assert!(rows > 300, "{rows} rows");
}
