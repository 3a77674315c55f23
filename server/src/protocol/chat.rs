//! `/v1/chat/completions`: the request's own fields, messages, and the response.

use std::collections::BTreeMap;
use std::fmt;

use schemars::JsonSchema;
use serde::de::{self, Deserializer, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::logprobs::{ChatLogprobs, PromptLogprob};
use super::usage::UsageBody;
use crate::messages::{MESSAGES_MAX, NAME_BYTES_MAX};
use crate::tools::TOOLS_MAX;
use crate::validate;

/// The fields chat does not share with completions; see `SharedFields` for the others.
#[derive(Debug, Default, Deserialize, JsonSchema)]
pub struct ChatFields {
    #[schemars(required, length(min = 1, max = MESSAGES_MAX))]
    pub messages: Option<Vec<Message>>,
    /// Log-probabilities of each token.
    pub logprobs: Option<bool>,
    /// Alternatives a token; needs `logprobs`.
    #[schemars(range(min = 0, max = validate::LOGPROBS_MAX))]
    pub top_logprobs: Option<i64>,
    /// Functions the model may call.
    #[schemars(with = "Option<Vec<super::tools::ToolSchema>>", length(max = TOOLS_MAX))]
    pub tools: Option<Vec<Value>>,
    /// Whether it calls them.
    #[schemars(with = "Option<super::tools::ToolChoiceSchema>")]
    pub tool_choice: Option<Value>,
    /// More than one call an answer; true if unset.
    pub parallel_tool_calls: Option<bool>,
    /// For templates that show documents.
    pub documents: Option<Vec<Value>>,
    /// End the prompt where the assistant's turn begins; true if unset.
    pub add_generation_prompt: Option<bool>,
    /// Leave the last message open for the model to go on with.
    pub continue_final_message: Option<bool>,
    /// Taken only by servers started with `--trust-request-chat-template`.
    pub chat_template: Option<String>,
    /// Variables for the template.
    pub chat_template_kwargs: Option<Map<String, Value>>,
    /// Add the tokenizer's own beginning before the template's.
    pub add_special_tokens: Option<bool>,
    /// Not supported: refused if true.
    pub echo: Option<bool>,
}

#[derive(Debug, Default, Clone, Deserialize, JsonSchema)]
pub struct Message {
    #[schemars(extend("enum" = ["system", "developer", "user", "assistant", "tool"]))]
    pub role: String,
    pub content: Option<Content>,
    #[schemars(length(min = 1, max = NAME_BYTES_MAX))]
    pub name: Option<String>,
    /// Calls of an earlier answer.
    #[schemars(with = "Option<Vec<super::tools::CallSchema>>")]
    pub tool_calls: Option<Vec<Value>>,
    /// Of the call that a `tool` message answers.
    pub tool_call_id: Option<String>,
    /// Thoughts of an earlier answer.
    pub reasoning_content: Option<String>,
    /// Not supported, but for null.
    pub function_call: Option<Value>,
}

/// A message's text: a string, or an array of parts.
#[derive(Debug, Clone, PartialEq, JsonSchema)]
#[schemars(untagged)]
pub enum Content {
    Text(String),
    Parts(#[schemars(length(min = 1))] Vec<Part>),
}

#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
pub struct Part {
    #[serde(rename = "type")]
    #[schemars(extend("const" = "text"))]
    pub kind: String,
    pub text: Option<String>,
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ContentVisitor;

        impl<'de> Visitor<'de> for ContentVisitor {
            type Value = Content;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a string or an array of content parts")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Content, E> {
                Ok(Content::Text(text.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Content, A::Error> {
                let mut parts = Vec::new();
                while let Some(part) = items.next_element()? {
                    parts.push(part);
                }
                Ok(Content::Parts(parts))
            }
        }

        deserializer.deserialize_any(ContentVisitor)
    }
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct ChatResponse<'a> {
    pub id: &'a str,
    #[schemars(extend("const" = "chat.completion"))]
    pub object: &'static str,
    pub created: u64,
    pub model: &'a str,
    pub system_fingerprint: &'a str,
    #[schemars(extend("const" = "default"))]
    pub service_tier: &'static str,
    pub choices: Vec<ChatChoice>,
    pub usage: UsageBody,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_logprobs: Option<Vec<Option<BTreeMap<u32, PromptLogprob>>>>,
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct ChatChoice {
    pub index: usize,
    pub message: ReplyMessage,
    pub logprobs: Option<ChatLogprobs>,
    #[schemars(extend("enum" = ["stop", "length", "tool_calls"]))]
    pub finish_reason: &'static str,
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct ReplyMessage {
    #[schemars(extend("const" = "assistant"))]
    pub role: &'static str,
    /// Null where there are calls or thoughts and nothing else.
    pub content: Option<String>,
    pub refusal: Option<()>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_calls: Option<Vec<ReplyCall>>,
}

#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct ReplyCall {
    pub id: String,
    #[serde(rename = "type")]
    #[schemars(extend("const" = "function"))]
    pub kind: &'static str,
    pub function: ReplyFunction,
}

#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct ReplyFunction {
    pub name: String,
    /// JSON text, as the model wrote it.
    pub arguments: String,
}
