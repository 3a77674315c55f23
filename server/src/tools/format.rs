//! How a model writes its calls: known by name, or told by the model's chat template.

/// A way of writing calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum ToolFormat {
    /// `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, once a call: Hermes, Qwen and many others.
    #[value(name = "hermes", alias = "qwen", alias = "qwen3")]
    Hermes,
    /// `<tool_call><function=name><parameter=key>value</parameter></function></tool_call>`, tags and values on lines of
    /// their own: Qwen3-Coder.
    #[value(name = "qwen3_coder", alias = "qwen3_xml")]
    Qwen3Coder,
    /// `{"name": …, "parameters": {…}}`, perhaps after `<|python_tag|>`; `; ` between calls: Llama 3.
    #[value(name = "llama3_json", alias = "llama3", alias = "llama4_json")]
    Llama3,
    /// `[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`, or `[TOOL_CALLS]name[ARGS]{…}` once a call: Mistral.
    #[value(name = "mistral")]
    Mistral,
    /// `[name(key=value), …]` as in Python, perhaps fenced as `tool_code`: Gemma with the usual prompts, Llama 4.
    #[value(name = "pythonic", alias = "gemma", alias = "gemma3")]
    Pythonic,
    /// A JSON object or array of `{"name": …, "arguments": {…}}`, perhaps fenced: models with no format of their own.
    #[value(name = "json", alias = "generic")]
    Json,
}

impl ToolFormat {
    /// What `template` teaches its model.
    pub fn of_template(template: &str) -> ToolFormat {
        let has = |marker: &str| template.contains(marker);
        if has("<function=") && has("<parameter=") {
            ToolFormat::Qwen3Coder
        } else if has("<tool_call>") {
            ToolFormat::Hermes
        } else if has("[TOOL_CALLS]") {
            ToolFormat::Mistral
        } else if has("<|python_tag|>") || (has("<|start_header_id|>") && has("\"parameters\"")) {
            ToolFormat::Llama3
        } else if has("tool_code") || has("pythonic") || has("func_name1(params_name1=") {
            ToolFormat::Pythonic
        } else {
            ToolFormat::Json
        }
    }

    /// The token that begins a call where it may be a control token, which has to stay in the text then.
    pub fn marker(self) -> Option<&'static str> {
        match self {
            ToolFormat::Hermes | ToolFormat::Qwen3Coder => Some("<tool_call>"),
            ToolFormat::Llama3 => Some("<|python_tag|>"),
            ToolFormat::Mistral => Some("[TOOL_CALLS]"),
            ToolFormat::Pythonic | ToolFormat::Json => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_tell_the_format() {
        for (template, expected) in [
            ("{{ '<tool_call>\\n{\"name\": ' }}", ToolFormat::Hermes),
            ("<tool_call>\n<function={{ f }}>\n<parameter={{ p }}>", ToolFormat::Qwen3Coder),
            ("{{ '[TOOL_CALLS] [' }}", ToolFormat::Mistral),
            ("<|start_header_id|> {{ '{\"name\": \"' }} {{ '\"parameters\": ' }}", ToolFormat::Llama3),
            ("<|start_header_id|>", ToolFormat::Json),
            ("```tool_code", ToolFormat::Pythonic),
            ("{{ messages }}", ToolFormat::Json),
        ] {
            assert_eq!(ToolFormat::of_template(template), expected, "{template}");
        }
    }
}
