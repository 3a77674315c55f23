//! Every format's calls and near misses; and that no cut of the text changes what comes out.

use super::*;
use proptest::prelude::*;

fn tools() -> Arc<[Tool]> {
    let schema =
        serde_json::json!({"properties": {"city": {"type": "string"}, "n": {"type": "array"}, "a": true}});
    let tool = |name: &str| Tool { name: name.to_owned(), parameters: schema.as_object().unwrap().clone() };
    [tool("weather"), tool("time")].into()
}

/// Content, and calls as `name(arguments)`.
fn run(format: ToolFormat, parallel: bool, pieces: &[&str]) -> (String, Vec<String>) {
    let mut parser = ToolParser::new(format, tools(), parallel);
    let mut deltas = Vec::new();
    for piece in pieces {
        parser.push(piece, &mut deltas);
    }
    parser.finish(&mut deltas);
    let (mut text, mut calls) = (String::new(), Vec::<String>::new());
    for delta in deltas {
        match delta {
            ToolDelta::Content(piece) => text.push_str(&piece),
            ToolDelta::Call { name } => calls.push(format!("{name}:")),
            ToolDelta::Arguments(piece) => calls.last_mut().expect("a call comes first").push_str(&piece),
        }
    }
    assert_eq!(parser.calls(), calls.len());
    (text, calls)
}

#[track_caller]
fn check(format: ToolFormat, text: &str, content: &str, calls: &[&str]) {
    let (got_content, got_calls) = run(format, true, &[text]);
    assert_eq!(
        (got_content.as_str(), got_calls),
        (content, calls.iter().map(|c| c.to_string()).collect()),
        "{text}"
    );
}

const W: &str = r#"{"name": "weather", "arguments": {"city": "Rome"}}"#;
const P: &str = r#"{"name": "weather", "parameters": {"city": "Rome"}}"#;
const ROME: &str = r#"weather:{"city": "Rome"}"#;

#[test]
fn hermes() {
    use ToolFormat::Hermes as F;
    check(F, "Hello, world.", "Hello, world.", &[]);
    check(F, &format!("<tool_call>\n{W}\n</tool_call>"), "", &[ROME]);
    check(F, &format!("Let me see.\n\n<tool_call>{W}</tool_call>\n"), "Let me see.", &[ROME]);
    check(F, &format!("<tool_call>\n{W}\n</tool_call>\n<tool_call>\n{W}\n</tool_call>"), "", &[ROME, ROME]);
    check(F, &format!("<tool_call>{W}\n<tool_call>{W}"), "", &[ROME, ROME]);
    check(F, &format!("<tool_call>{W}</tool_call> Done. "), " Done.", &[ROME]);
    check(F, "a < b <tool and <tool_call> c", "a < b <tool and <tool_call> c", &[]);
    check(F, "<tool_call>{\"answer\": 1}</tool_call>", "<tool_call>{\"answer\": 1}</tool_call>", &[]);
    check(F, "<tool_call>{\"name\": \"weather\", \"argu", "", &["weather:"]);
    check(F, "<tool_call>{\"name\": \"wea", "<tool_call>{\"name\": \"wea", &[]);
    check(F, "text with end  \n", "text with end  \n", &[]);
    let two = format!("<tool_call>{W}</tool_call>\n<tool_call>{W}</tool_call>");
    assert_eq!(run(F, false, &[&two]).1, [ROME]);
}

#[test]
fn qwen3_coder() {
    use ToolFormat::Qwen3Coder as F;
    const CALL: &str = "<function=weather>\n<parameter=city>\nRome\n</parameter>\n</function>";
    check(F, "Hello, <world>.", "Hello, <world>.", &[]);
    check(F, &format!("<tool_call>\n{CALL}\n</tool_call>"), "", &[ROME]);
    check(
        F,
        &format!("I look.\n\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{CALL}\n</tool_call>"),
        "I look.",
        &[ROME, ROME],
    );
    // Tags left out, and on one line.
    check(F, CALL, "", &[ROME]);
    check(F, &format!("{CALL}{CALL}"), "", &[ROME, ROME]);
    check(F, "<tool_call><function=weather><parameter=city>Rome</parameter></function></tool_call>", "", &[ROME]);
    check(F, "<tool_call><function=time></function></tool_call> Done.", " Done.", &["time:{}"]);
    check(
        F,
        "<function=weather>\n<parameter=n>\n[1, 2]\n</parameter>\n<parameter=city>\n\"a\n</b>\n\n</parameter>\n</function>",
        "",
        &["weather:{\"n\": [1, 2], \"city\": \"\\\"a\\n</b>\\n\"}"],
    );
    check(
        F,
        "<function=time><parameter=n>[\"</parameter>\"]</parameter></function>",
        "",
        &["time:{\"n\": [\"</parameter>\"]}"],
    );
    check(F, "<function=f><parameter=x>\n1\n</parameter></function>", "", &["f:{\"x\": \"1\"}"]);
    check(F, "<tool_call>\n{\"name\": 1}", "<tool_call>\n{\"name\": 1}", &[]);
    check(F, "<function=>x", "<function=>x", &[]);
    check(F, "<function=weather>\n<parameter=city>\nRo", "", &["weather:{\"city\": \"Ro"]);
    check(F, "<function=wea", "<function=wea", &[]);
    let two = format!("{CALL}\n{CALL}");
    assert_eq!(run(F, false, &[&two]).1, [ROME]);
}

#[test]
fn llama() {
    use ToolFormat::Llama3 as F;
    check(F, P, "", &[ROME]);
    check(F, &format!("<|python_tag|>{P}"), "", &[ROME]);
    check(F, &format!("{P}; {P}"), "", &[ROME, ROME]);
    check(F, &format!("Sure. <|python_tag|>{P}"), "Sure.", &[ROME]);
    check(F, "The weather is fine.", "The weather is fine.", &[]);
    check(F, "{\"answer\": 42}", "{\"answer\": 42}", &[]);
    check(F, "{\"name\": \"Bob\", \"parameters\": {}}", "{\"name\": \"Bob\", \"parameters\": {}}", &[]);
    check(F, "[weather(city=\"Rome\")]", "", &["weather:{\"city\":\"Rome\"}"]);
}

#[test]
fn mistral() {
    use ToolFormat::Mistral as F;
    check(F, &format!("[TOOL_CALLS] [{W}]"), "", &[ROME]);
    check(F, &format!("[TOOL_CALLS][{W}, {W}]"), "", &[ROME, ROME]);
    check(F, "[TOOL_CALLS]weather[ARGS]{\"city\": \"Rome\"}", "", &[ROME]);
    check(
        F,
        "[TOOL_CALLS]weather{\"city\": \"Rome\"}[TOOL_CALLS]time[CALL_ID]abc[ARGS]{}",
        "",
        &[ROME, "time:{}"],
    );
    check(F, "Well [TOOL", "Well [TOOL", &[]);
    check(F, &format!("I will. [TOOL_CALLS][{W}]"), "I will.", &[ROME]);
}

#[test]
fn pythonic_and_json() {
    use ToolFormat::{Json, Pythonic};
    check(Pythonic, "[weather(city=\"Rome\"), time()]", "", &["weather:{\"city\":\"Rome\"}", "time:{}"]);
    check(Pythonic, "```tool_code\nweather(city='Rome')\n```", "", &["weather:{\"city\":\"Rome\"}"]);
    check(Pythonic, "weather is fine", "weather is fine", &[]);
    check(Pythonic, "[1, 2]", "[1, 2]", &[]);
    check(Pythonic, "weather(Rome)", "weather(Rome)", &[]);
    check(Pythonic, &format!("[{P}]"), "", &[ROME]);
    check(Json, W, "", &[ROME]);
    check(Json, &format!("```json\n[{W}, {P}]\n```"), "", &[ROME, ROME]);
    check(Json, "```json\n{\"a\": 1}\n```", "```json\n{\"a\": 1}\n```", &[]);
    check(Json, "[] is empty", "[] is empty", &[]);
    check(Json, " \n", " \n", &[]);
    check(Json, &format!("{W} There."), "There.", &[ROME]);
}

fn format() -> impl Strategy<Value = ToolFormat> {
    use ToolFormat::*;
    prop::sample::select(vec![Hermes, Qwen3Coder, Llama3, Mistral, Pythonic, Json])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]
    #[test]
    fn no_cut_changes_anything(
        format in format(),
        parallel: bool,
        parts in prop::collection::vec(
            prop_oneof![
                Just(W.to_owned()), Just(P.to_owned()),
                Just("<tool_call>".to_owned()), Just("</tool_call>".to_owned()), Just("[TOOL_CALLS]".to_owned()),
                Just("<|python_tag|>".to_owned()), Just("weather[ARGS]{\"a\": \"é\"}".to_owned()),
                Just("[weather(city='R\\'e', n=[1])]".to_owned()), Just("```tool_code\n".to_owned()),
                Just("<function=weather>\n".to_owned()), Just("<parameter=city>\n".to_owned()),
                Just("<parameter=n>".to_owned()), Just("\n</parameter>".to_owned()), Just("</function>".to_owned()),
                Just("```".to_owned()), Just("[".to_owned()), Just("]".to_owned()), Just("; ".to_owned()),
                "[ \n{}\"\\\\a:é]{0,4}",
            ],
            0..6,
        ),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
    ) {
        let text = parts.concat();
        let mut places: Vec<usize> = cuts.iter().map(|cut| cut.index(text.len() + 1)).filter(|&at| text.is_char_boundary(at)).collect();
        places.extend([0, text.len()]);
        places.sort_unstable();
        let pieces: Vec<&str> = places.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect();
        let whole = run(format, parallel, &[&text]);
        prop_assert_eq!(&run(format, parallel, &pieces), &whole);
        if whole.1.is_empty() {
            prop_assert_eq!(whole.0, text, "without a call every character is content");
        }
    }
}
