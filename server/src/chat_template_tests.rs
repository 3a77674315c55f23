//! Templates of well-known shapes, each against the text Jinja2 in Hugging Face's environment gives.

use serde_json::json;

use super::*;

const SMOLLM2: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ \
                       '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging \
                       Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + \
                       message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ \
                       '<|im_start|>assistant\n' }}{% endif %}";

fn message(role: &str, content: &str) -> TemplateMessage {
    TemplateMessage::new(role, content)
}

fn chat() -> Vec<TemplateMessage> {
    vec![
        message("system", "Be brief."),
        message("user", "  Hi \n"),
        message("assistant", "Hello"),
        message("user", "Bye"),
    ]
}

fn render(source: &str, input: &RenderInput) -> Result<String, String> {
    ChatTemplate::new(source, "<s>", "</s>").and_then(|template| template.render(input)).map_err(|e| e.to_string())
}

#[track_caller]
fn check(source: &str, expected: &str) {
    let messages = chat();
    let input = RenderInput { messages: &messages, add_generation_prompt: true, ..RenderInput::default() };
    assert_eq!(render(source, &input).as_deref(), Ok(expected), "{source}");
}

#[track_caller]
fn check_error(source: &str, part: &str) {
    let messages = chat();
    let error = render(source, &RenderInput { messages: &messages, ..RenderInput::default() }).unwrap_err();
    assert!(error.contains(part), "{source}: {error}");
}

#[test]
fn smollm2() {
    check(
        SMOLLM2,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n  Hi \n<|im_end|>\n<|im_start|>assistant\nHello\
         <|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    );
    let messages = [message("user", "Hi")];
    let input = RenderInput { messages: &messages, ..RenderInput::default() };
    assert_eq!(
        render(SMOLLM2, &input).unwrap(),
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
         <|im_start|>user\nHi<|im_end|>\n"
    );
}

#[test]
fn the_environment_is_hugging_faces() {
    for (source, expected) in [
        // Blocks take their line's indentation and newline with them.
        (
            "{% for m in messages %}\n  {% if m.role == 'user' %}\n{{ m.content | trim }};\n  {% endif %}\n{% endfor %}",
            "Hi;\nBye;\n",
        ),
        ("{{ bos_token }}{{ messages[1]['content'] | trim }}{{ eos_token }}", "<s>Hi</s>"),
        ("{{ messages[0].content.upper() }} {{ messages[1].content.strip() }}!", "BE BRIEF. Hi!"),
        ("{{ messages[-1]['role'] }} {{ messages[1:] | length }}", "user 3"),
        ("{{ 'a</think>b'.split('</think>')[-1].lstrip('b') }}{{ 'xyz'.startswith('xy') }}", "True"),
        (
            "{%- set ns = namespace(n=0) -%}{%- for m in messages -%}{%- set ns.n = ns.n + 1 -%}{%- endfor -%}{{ ns.n }}",
            "4",
        ),
        (
            "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{% if loop.index0 == 3 %}{% break %}{% endif %}{{ loop.index }}{% endfor %}",
            "13",
        ),
        (
            "{{ {'b': [1, 2.5, none, true], 'a': \"<it's>&é\"} | tojson }}",
            "{\"b\": [1, 2.5, null, true], \"a\": \"<it's>&é\"}",
        ),
        ("{{ {'a': [1]} | tojson(indent=2) }}", "{\n  \"a\": [\n    1\n  ]\n}"),
        ("{{ '<' ~ messages[0].content ~ '&>' }}", "<Be brief.&>"),
        ("{% if tools %}tools{% elif tools is none %}none{% endif %}", "none"),
        ("{{ tools is defined }} {{ nothing is defined }}{{ nothing }}", "True False"),
        ("{% if messages[0].tool_calls %}x{% endif %}{{ messages[0].content is string }}", "True"),
        ("{% macro m(x) %}[{{ x }}]{% endmacro %}{{ m('a') }}", "[a]"),
        ("{% generation %}a{%- endgeneration -%} b", "ab"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "2"),
        ("{{ (messages | map(attribute='role') | join(',')) }}", "system,user,assistant,user"),
        ("{% set x = 'u' if messages[1].role == 'user' else 'o' %}{{ x }}{{ add_generation_prompt }}", "uTrue"),
        (
            "{{ messages[0].items() | list | length }}{% for k, v in messages[0].items() %} {{ k }}{% endfor %}",
            "2 role content",
        ),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("a\r\nb\r{{ 'c\r\nd' }}", "a\nb\nc\nd"),
        (
            "{{ {'a': [1, none, true, \"it's\"]} }} {{ [1] | string }} {{ 1 | string }}",
            "{'a': [1, None, True, \"it's\"]} [1] 1",
        ),
    ] {
        check(source, expected);
    }
}

#[test]
fn templates_can_refuse() {
    check_error("{{ raise_exception('Roles must alternate') }}", "Roles must alternate");
    check_error("{{ strftime_now('%Q') }}", "strftime_now");
    check_error("{{ messages[0].content.nonsense() }}", "cannot render");
    check_error("{% for m in messages %}", "does not compile");
}

#[test]
fn a_render_is_bounded() {
    check_error(
        "{% for a in range(100000) %}{% for b in range(100000) %}{% set x = a * b %}{% endfor %}{% endfor %}",
        "too many steps",
    );
}

#[test]
fn requests_add_variables_but_replace_none() {
    let messages = chat();
    let variables = json!({"enable_thinking": false, "messages": [], "bos_token": "x"});
    let input = RenderInput { messages: &messages, variables: variables.as_object(), ..RenderInput::default() };
    let source = "{{ enable_thinking }} {{ messages | length }} {{ bos_token }}";
    assert_eq!(render(source, &input).as_deref(), Ok("False 4 <s>"));
}

#[test]
fn tools_keep_their_order() {
    let messages = chat();
    let tools = [json!({"type": "function", "function": {"name": "f", "parameters": {"z": 1, "a": 2}}})];
    let input = RenderInput { messages: &messages, tools: Some(&tools), ..RenderInput::default() };
    assert_eq!(
        render("{% for tool in tools %}{{ tool | tojson }}{% endfor %}", &input).as_deref(),
        Ok(r#"{"type": "function", "function": {"name": "f", "parameters": {"z": 1, "a": 2}}}"#)
    );
}

#[test]
fn a_request_with_tools_takes_the_template_made_for_it() {
    let template =
        ChatTemplate::new("plain", "", "").and_then(|own| own.with_tool_use("{{ tools | length }} tools"));
    let template = template.expect("both compile");
    let tools = [json!({}), json!({})];
    let input = RenderInput { tools: Some(&tools), ..RenderInput::default() };
    assert_eq!(template.of_request(true).render(&input).as_deref(), Ok("2 tools"));
    assert_eq!(template.of_request(false).render(&input).as_deref(), Ok("plain"));
    let error = ChatTemplate::new("plain", "", "").and_then(|own| own.with_tool_use("{% if %}")).err();
    assert!(error.is_some_and(|error| error.to_string().contains("does not compile")));
}

#[test]
fn the_final_message_can_be_continued() {
    for (source, content, expected) in [
        ("{% for m in messages %}<{{ m.content }}>{% endfor %}", "The answer is ", Ok("<The answer is ")),
        ("{% for m in messages %}<{{ m.content | trim }}>{% endfor %}", " The answer is ", Ok("<The answer is")),
        (
            "{% for m in messages %}<{{ m.role }}>{% endfor %}",
            "gone",
            Err("does not show the last message's content"),
        ),
    ] {
        let messages = [message("assistant", content)];
        let input = RenderInput { messages: &messages, continue_final_message: true, ..RenderInput::default() };
        match (render(source, &input), expected) {
            (Ok(text), Ok(expected)) => assert_eq!(text, expected),
            (Err(error), Err(part)) => assert!(error.contains(part), "{error}"),
            (got, _) => panic!("{source}: {got:?}"),
        }
    }
}

#[test]
fn generation_tags_keep_their_whitespace_control() {
    for (source, expected) in [
        ("a{%- generation -%}b{% endgeneration %}c", "a{%- if true -%}b{% endif %}c"),
        ("{% generation_x %}{{ generation }}", "{% generation_x %}{{ generation }}"),
        ("{% open", "{% open"),
    ] {
        assert_eq!(without_generation_tags(source), expected);
    }
}
