//! The request fields that completions and chat have in common.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::Deserialize as DeriveDeserialize;
use serde::de::{self, Deserialize, Deserializer, SeqAccess, Visitor};
use serde_json::Value;

use super::structured::{ResponseFormat, StructuredOutputs};
use crate::validate;

/// Parsed from the same body as the endpoint's own fields; numbers are as wide as JSON's here, so that a value out
/// of range is told apart from one of the wrong type.
#[derive(Debug, Default, DeriveDeserialize, JsonSchema)]
pub struct SharedFields {
    /// A served model; its first name if unset.
    pub model: Option<String>,
    /// Answer with server-sent events.
    pub stream: Option<bool>,
    /// Needs `stream`.
    pub stream_options: Option<StreamOptions>,
    /// Choices for each prompt.
    #[schemars(range(min = 1, max = validate::N_MAX))]
    pub n: Option<i64>,
    /// Tokens to generate at most.
    #[schemars(range(min = 0, max = u32::MAX))]
    pub max_tokens: Option<i64>,
    /// Comes before `max_tokens`.
    #[schemars(range(min = 0, max = u32::MAX))]
    pub max_completion_tokens: Option<i64>,
    /// No end and no stop counts before so many tokens.
    #[schemars(range(min = 0, max = u32::MAX))]
    pub min_tokens: Option<i64>,
    /// 0 takes the likeliest token always.
    #[schemars(range(min = 0.0, max = 2.0))]
    pub temperature: Option<f64>,
    #[schemars(range(min = 0.0, max = 1.0))]
    pub top_p: Option<f64>,
    /// 0 and -1 are off.
    #[schemars(range(min = -1, max = u32::MAX))]
    pub top_k: Option<i64>,
    #[schemars(range(min = 0.0, max = 1.0))]
    pub min_p: Option<f64>,
    /// The same seed and request give the same tokens, bit for bit.
    #[schemars(range(min = i64::MIN, max = i64::MAX))]
    pub seed: Option<i64>,
    #[schemars(range(min = -2.0, max = 2.0))]
    pub presence_penalty: Option<f64>,
    #[schemars(range(min = -2.0, max = 2.0))]
    pub frequency_penalty: Option<f64>,
    /// 1 is off.
    #[schemars(range(max = 10.0), extend("exclusiveMinimum" = 0.0))]
    pub repetition_penalty: Option<f64>,
    /// Added to the logits of these token ids.
    #[schemars(with = "Option<LogitBias>")]
    pub logit_bias: Option<BTreeMap<String, f64>>,
    /// Text that ends the output; it is not shown.
    pub stop: Option<Stop>,
    /// Tokens that end the output.
    #[schemars(length(max = validate::STOP_TOKEN_IDS_MAX), inner(range(min = 0, max = u32::MAX)))]
    pub stop_token_ids: Option<Vec<i64>>,
    /// Go on past the end that the model writes.
    pub ignore_eos: Option<bool>,
    /// Show the stop string or token that ended the output.
    pub include_stop_str_in_output: Option<bool>,
    /// Leave control tokens out of the text.
    pub skip_special_tokens: Option<bool>,
    /// Either is the same here, as with vLLM's fast tokenizers: special tokens are shown as the vocabulary spells them.
    pub spaces_between_special_tokens: Option<bool>,
    /// Log-probabilities of the prompt's tokens, with so many alternatives.
    #[schemars(range(min = 0, max = validate::LOGPROBS_MAX))]
    pub prompt_logprobs: Option<i64>,
    /// Smaller runs earlier.
    #[schemars(range(min = i32::MIN, max = i32::MAX))]
    pub priority: Option<i64>,
    /// Cached prefixes are shared among requests of the same salt only.
    #[schemars(length(min = 1, max = validate::CACHE_SALT_BYTES_MAX))]
    pub cache_salt: Option<String>,
    /// What the output must match.
    pub response_format: Option<ResponseFormat>,
    /// What the output must match, in vLLM's spelling.
    pub structured_outputs: Option<StructuredOutputs>,
    /// A JSON schema that the output must match.
    pub guided_json: Option<Value>,
    /// A regular expression that the whole output must match.
    #[schemars(length(min = 1))]
    pub guided_regex: Option<String>,
    /// The output is one of these.
    #[schemars(length(min = 1, max = crate::structured::CHOICES_MAX), inner(length(min = 1)))]
    pub guided_choice: Option<Vec<String>>,
    /// A grammar, as Lark or GBNF, that the output must match.
    #[schemars(length(min = 1))]
    pub guided_grammar: Option<String>,
    /// What may stand between the parts of a JSON document.
    pub guided_whitespace_pattern: Option<String>,
    /// Accepted and not used, as is `metadata`: they change nothing in what is generated.
    pub user: Option<String>,
    #[schemars(with = "Option<Metadata>")]
    pub metadata: Option<BTreeMap<String, Value>>,
}

/// `metadata`: a client's own words on a request.
pub struct Metadata;

impl JsonSchema for Metadata {
    fn schema_name() -> Cow<'static, str> {
        "Metadata".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "object",
            "maxProperties": validate::METADATA_MAX,
            "propertyNames": {"maxLength": validate::METADATA_KEY_MAX},
            "additionalProperties": {"type": "string", "maxLength": validate::METADATA_VALUE_MAX},
        })
    }
}

/// `logit_bias`: from token ids, in decimal, to what is added to their logits.
struct LogitBias;

impl JsonSchema for LogitBias {
    fn schema_name() -> Cow<'static, str> {
        "LogitBias".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "object",
            "maxProperties": validate::LOGIT_BIAS_MAX,
            "propertyNames": {"pattern": "^[0-9]{1,10}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        })
    }
}

#[derive(Debug, Default, Clone, Copy, DeriveDeserialize, JsonSchema)]
pub struct StreamOptions {
    pub include_usage: Option<bool>,
}

/// `stop`: one string or several.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Stop(pub Vec<String>);

impl JsonSchema for Stop {
    fn schema_name() -> Cow<'static, str> {
        "Stop".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let string =
            json_schema!({"type": "string", "minLength": 1, "maxLength": validate::STOP_STRING_BYTES_MAX});
        json_schema!({"anyOf": [
            string,
            {"type": "array", "maxItems": validate::STOP_STRINGS_MAX, "items": string},
        ]})
    }
}

impl<'de> Deserialize<'de> for Stop {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct StopVisitor;

        impl<'de> Visitor<'de> for StopVisitor {
            type Value = Stop;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a string or an array of strings")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Stop, E> {
                Ok(Stop(vec![text.to_owned()]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Stop, A::Error> {
                let mut strings = Vec::new();
                while let Some(string) = items.next_element()? {
                    strings.push(string);
                }
                Ok(Stop(strings))
            }
        }

        deserializer.deserialize_any(StopVisitor)
    }
}
