//! A chat request, whichever API it came through → the prompt's tokens, what the engine is asked, and how the answer is read.

use std::borrow::Cow;
use std::sync::Arc;

use rill_engine::{Grammar, LoadedAdapter};
use serde_json::{Map, Value};

use crate::answer::AnswerFormat;
use crate::app::AppState;
use crate::auth::Caller;
use crate::chat_template::{ChatTemplate, RenderInput, TemplateMessage};
use crate::generation::Generation;
use crate::messages;
use crate::protocol::ApiError;
use crate::protocol::chat::{ChatFields, Message};
use crate::protocol::sampling::SharedFields;
use crate::reasoning::ReasoningFormat;
use crate::routes::{choices_of, over_text, prompt_error};
use crate::serving::{Serving, Target};
use crate::structured::{self, GrammarText};
use crate::tools::Tools;
use crate::tools::grammar::of_forced_calls;
use crate::tools::prompt::{describe, flatten};
use crate::validate::{self, SharedOptions};

/// A request that passed every check.
pub struct ChatRequest {
    /// The name to answer with.
    pub model: String,
    adapter: Option<Arc<LoadedAdapter>>,
    pub ids: Vec<u32>,
    pub options: SharedOptions,
    pub max_tokens: u32,
    /// Alternatives to report a token; `None`: no log-probabilities.
    pub top_logprobs: Option<u32>,
    pub answers: AnswerFormat,
    grammar: Option<Grammar>,
}

impl ChatRequest {
    pub async fn new(
        state: &AppState,
        serving: &Arc<Serving>,
        shared: &SharedFields,
        own: ChatFields,
    ) -> Result<ChatRequest, ApiError> {
        let Target { name: model, adapter } = serving.target(shared.model.as_deref())?;
        let mut options = validate::shared(shared, &serving.limits())?;
        let top_logprobs = top_logprobs(&own)?;
        let tools = Tools::new(own.tools.as_deref(), own.tool_choice.as_ref(), own.parallel_tool_calls)?;
        if own.echo == Some(true) {
            return Err(ApiError::unsupported("echo"));
        }
        let chat = ChatPrompt::new(
            own.messages.as_deref().unwrap_or_default(),
            ChatPromptFields {
                // Without a place for them in the template they are described only where they may be called.
                describe_tools: tools.is_some(),
                tools: own.tools,
                documents: own.documents,
                add_generation_prompt: own.add_generation_prompt,
                continue_final_message: own.continue_final_message,
                chat_template: own.chat_template,
                variables: own.chat_template_kwargs,
            },
            state.trusts_request_chat_template(),
        )?;
        // The template writes the beginning-of-text token itself.
        let ids = chat.encode(serving, own.add_special_tokens.unwrap_or(false)).await?;
        let default = serving.sampling.max_tokens;
        let max_tokens = validate::max_tokens_for("messages", &options, ids.len(), default, &serving.limits())?;

        let reasoning = serving.reasoning.map(|format| (format, ends_with(serving, &ids, format.open())));
        let grammar = match answer_grammar(serving, shared, tools.as_ref(), reasoning)? {
            Some(grammar) => Some(serving.grammars.compile(&grammar).await?),
            None => None,
        };
        // A marker that is a control token must stay in the text to be found.
        let markers = [
            tools.as_ref().and_then(|_| serving.tool_format.marker()),
            reasoning.map(|(format, _)| format.close()),
        ];
        if markers.into_iter().flatten().any(|marker| control_id(serving, marker).is_some()) {
            options.stop.skip_special_tokens = false;
        }
        let answers = AnswerFormat::new(reasoning, tools.as_ref(), serving.tool_format)?;
        Ok(ChatRequest { model, adapter, ids, options, max_tokens, top_logprobs, answers, grammar })
    }

    /// Sets the engine to work on all choices.
    pub fn submit(&self, serving: &Serving, caller: &Caller) -> Result<Generation, ApiError> {
        let requests = choices_of(
            (self.ids.clone(), self.adapter.as_ref()),
            self.max_tokens,
            &self.options,
            self.top_logprobs,
            self.options.prompt_logprobs,
            self.grammar.as_ref(),
        );
        Generation::submit(&serving.engine, requests.collect(), self.options.n, caller)
    }
}

/// The alternatives to report a token; `None`: no log-probabilities.
fn top_logprobs(fields: &ChatFields) -> Result<Option<u32>, ApiError> {
    let top = validate::integer("top_logprobs", fields.top_logprobs, 0, validate::LOGPROBS_MAX)?;
    match (fields.logprobs.unwrap_or(false), top) {
        (true, top) => Ok(Some(top.unwrap_or(0) as u32)),
        (false, None | Some(0)) => Ok(None),
        (false, Some(_)) => Err(ApiError::invalid("top_logprobs", "top_logprobs needs logprobs to be true")),
    }
}

/// What the answer must match: a forced call, or what the request says, thoughts before it aside.
fn answer_grammar(
    serving: &Serving,
    fields: &SharedFields,
    tools: Option<&Tools>,
    reasoning: Option<(ReasoningFormat, bool)>,
) -> Result<Option<GrammarText>, ApiError> {
    let asked = structured::grammar_of(fields)?;
    let marker_id = serving.tool_format.marker().and_then(|marker| control_id(serving, marker));
    let forced = match tools {
        Some(tools) => of_forced_calls(tools, serving.tool_format, marker_id)?,
        None => None,
    };
    if let (Some(asked), Some(_)) = (&asked, &forced) {
        return Err(ApiError::invalid(
            asked.param,
            format!("{} may not go with a tool_choice that forces calls", asked.param),
        ));
    }
    Ok(forced.or(asked).map(|grammar| match reasoning {
        Some((format, opened)) => structured::after_thoughts(grammar, format, opened),
        None => grammar,
    }))
}

/// The id of a control token spelled so.
fn control_id(serving: &Serving, spelling: &str) -> Option<u32> {
    let tokenizer = serving.tokenizer();
    tokenizer.token_id(spelling).filter(|&id| tokenizer.is_special(id))
}

/// Whether a prompt ends with `text`, white space aside.
fn ends_with(serving: &Serving, ids: &[u32], text: &str) -> bool {
    let tail = ids.len().saturating_sub(text.len() + 8);
    serving.tokenizer().decode(&ids[tail..], false).trim_end().ends_with(text)
}

/// The fields that shape a chat's prompt, as sent.
#[derive(Default)]
pub struct ChatPromptFields {
    pub tools: Option<Vec<Value>>,
    /// Describe the tools in the system message if the template does not show them.
    pub describe_tools: bool,
    pub documents: Option<Vec<Value>>,
    pub add_generation_prompt: Option<bool>,
    pub continue_final_message: Option<bool>,
    pub chat_template: Option<String>,
    pub variables: Option<Map<String, Value>>,
}

/// A chat, checked and ready to be turned into tokens.
pub struct ChatPrompt {
    messages: Vec<TemplateMessage>,
    fields: ChatPromptFields,
    add_generation_prompt: bool,
    continue_final_message: bool,
}

impl ChatPrompt {
    pub fn new(messages: &[Message], fields: ChatPromptFields, trust_template: bool) -> Result<Self, ApiError> {
        let messages = messages::for_template(messages)?;
        if fields.chat_template.is_some() && !trust_template {
            return Err(ApiError::invalid(
                "chat_template",
                "chat_template in requests is not taken unless the server runs with --trust-request-chat-template",
            ));
        }
        let continue_final_message = fields.continue_final_message.unwrap_or(false);
        let add_generation_prompt = fields.add_generation_prompt.unwrap_or(!continue_final_message);
        if continue_final_message && add_generation_prompt {
            return Err(ApiError::invalid(
                "continue_final_message",
                "continue_final_message and add_generation_prompt may not both be true",
            ));
        }
        Ok(ChatPrompt { messages, fields, add_generation_prompt, continue_final_message })
    }

    pub async fn encode(self, serving: &Arc<Serving>, add_special: bool) -> Result<Vec<u32>, ApiError> {
        let bytes = self.messages.iter().map(|message| message.content.len()).sum();
        let serving = serving.clone();
        over_text(bytes, move || self.encode_here(&serving, add_special)).await?
    }

    fn encode_here(&self, serving: &Serving, add_special: bool) -> Result<Vec<u32>, ApiError> {
        let own = self.fields.chat_template.as_deref();
        let requested = own
            .map(|source| match &serving.template {
                Some(template) => template.with_source(source),
                None => ChatTemplate::new(source, "", ""),
            })
            .transpose()
            .map_err(|error| ApiError::invalid("chat_template", error.to_string()))?;
        let Some(template) = requested.as_ref().or(serving.template.as_ref()) else {
            return Err(ApiError::invalid(
                "messages",
                "the model has no chat template: use /v1/completions, or start the server with --chat-template FILE",
            ));
        };
        let tools = self.fields.tools.as_deref().filter(|tools| !tools.is_empty());
        let template = template.of_request(tools.is_some());
        let mut messages = Cow::Borrowed(&self.messages);
        if !template.writes_calls() {
            flatten(messages.to_mut());
        }
        if let (Some(tools), true) = (tools, self.fields.describe_tools && !template.shows_tools()) {
            describe(messages.to_mut(), tools);
        }
        let input = RenderInput {
            messages: &messages,
            tools,
            documents: self.fields.documents.as_deref(),
            add_generation_prompt: self.add_generation_prompt,
            continue_final_message: self.continue_final_message,
            variables: self.fields.variables.as_ref(),
        };
        serving.prompts.encode_chat(template, &input, add_special).map_err(|error| prompt_error("messages", error))
    }
}
