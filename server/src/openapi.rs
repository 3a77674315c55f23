//! `/openapi.json`: the description of the API, made from the very types that requests are read into and responses
//! written from.

use std::sync::LazyLock;

use bytes::Bytes;
use schemars::generate::{SchemaGenerator, SchemaSettings};
use schemars::{JsonSchema, Schema};
use serde_json::{Map, Value, json};

use crate::protocol::adapters::{LoadAdapterRequest, UnloadAdapterRequest};
use crate::protocol::anthropic::{MessageOut, MessagesErrorBody, MessagesRequest, TokenCount};
use crate::protocol::chat::{ChatFields, ChatResponse};
use crate::protocol::completion::{CompletionFields, CompletionResponse};
use crate::protocol::debug::EngineBody;
use crate::protocol::embeddings::{EmbeddingsRequest, EmbeddingsResponse};
use crate::protocol::error::ErrorBody;
use crate::protocol::models::{ModelCard, ModelList};
use crate::protocol::probes::{StatusBody, VersionBody};
use crate::protocol::render::{RenderedChat, RenderedCompletion};
use crate::protocol::responses::{DeletedResponse, ResponseHead, ResponsesRequest};
use crate::protocol::sampling::SharedFields;
use crate::protocol::tokenize::{
    DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse, TokenizerInfo,
};

const DEFINITIONS: &str = "/components/schemas";
/// The key is asked for only where the server has some.
const SECURITY: &str = "bearer";

/// The document as served.
pub fn bytes() -> Bytes {
    static BYTES: LazyLock<Bytes> = LazyLock::new(|| document().to_string().into());
    BYTES.clone()
}

/// The document: OpenAPI 3.1.
pub fn document() -> Value {
    let mut shapes = Shapes::default();
    let paths = paths(&mut shapes);
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "rill",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Text generation with the APIs of OpenAI, vLLM and Anthropic. Unknown fields are ignored; \
                            known ones that are not implemented are refused by name.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": shapes.definitions(),
            "securitySchemes": {SECURITY: {"type": "http", "scheme": "bearer"}},
        },
    })
}

fn paths(shapes: &mut Shapes) -> Map<String, Value> {
    let error = shapes.response::<ErrorBody>();
    let own_error = shapes.response::<MessagesErrorBody>();
    let mut paths = Paths { paths: Map::new(), error };

    let completion = shapes.request_of::<SharedFields, CompletionFields>();
    let chat = shapes.request_of::<SharedFields, ChatFields>();
    paths.add("post", "/v1/completions", "Text that goes on from a prompt", |operation| {
        operation.takes(completion.clone()).answers(shapes.response::<CompletionResponse>()).streams()
    });
    paths.add(
        "post",
        "/v1/completions/render",
        "The prompts of a completion request, and their token ids",
        |of| of.takes(completion).answers(shapes.response::<RenderedCompletion>()),
    );
    paths.add("post", "/v1/chat/completions", "The next message of a chat", |operation| {
        operation.takes(chat.clone()).answers(shapes.response::<ChatResponse>()).streams()
    });
    paths.add("post", "/v1/chat/completions/render", "The prompt of a chat request, and its token ids", |of| {
        of.takes(chat).answers(shapes.response::<RenderedChat>())
    });
    paths.add("post", "/v1/embeddings", "Texts as vectors", |operation| {
        operation.takes(shapes.request::<EmbeddingsRequest>()).answers(shapes.response::<EmbeddingsResponse>())
    });
    let response = shapes.response::<ResponseHead>();
    paths.add("post", "/v1/responses", "A response of OpenAI's newer API", |operation| {
        operation.takes(shapes.request::<ResponsesRequest>()).answers(response.clone()).streams()
    });
    paths.add("get", "/v1/responses/{id}", "A response that was kept", |of| of.names("id").answers(response));
    paths.add("delete", "/v1/responses/{id}", "Keep a response no longer", |operation| {
        operation.names("id").answers(shapes.response::<DeletedResponse>())
    });
    let messages = shapes.request::<MessagesRequest>();
    paths.add("post", "/v1/messages", "A message of Anthropic's API", |operation| {
        let answered = operation.takes(messages.clone()).answers(shapes.response::<MessageOut>());
        answered.streams().fails(own_error.clone())
    });
    paths.add("post", "/v1/messages/count_tokens", "Tokens of a message request's prompt", |operation| {
        operation.takes(messages).answers(shapes.response::<TokenCount>()).fails(own_error)
    });
    paths.add("post", "/v1/load_lora_adapter", "Offer a LoRA adapter, if --enable-runtime-lora", |operation| {
        operation.takes(shapes.request::<LoadAdapterRequest>()).writes("text/plain")
    });
    paths.add("post", "/v1/unload_lora_adapter", "Offer it no longer", |operation| {
        operation.takes(shapes.request::<UnloadAdapterRequest>()).writes("text/plain")
    });
    paths.add("get", "/v1/models", "The models served", |of| of.answers(shapes.response::<ModelList>()));
    paths.add("get", "/v1/models/{id}", "One of them", |operation| {
        operation.names("id").answers(shapes.response::<ModelCard>())
    });
    paths.add("post", "/tokenize", "Text or a chat as token ids", |operation| {
        operation.takes(shapes.request::<TokenizeRequest>()).answers(shapes.response::<TokenizeResponse>())
    });
    paths.add("post", "/detokenize", "Token ids as text", |operation| {
        operation.takes(shapes.request::<DetokenizeRequest>()).answers(shapes.response::<DetokenizeResponse>())
    });
    paths.add("get", "/tokenizer_info", "What clients need of the tokenizer", |operation| {
        operation.answers(shapes.response::<TokenizerInfo>())
    });
    let status = shapes.response::<StatusBody>();
    paths.add("get", "/health", "Alive", |operation| operation.answers(status.clone()).open());
    paths.add("get", "/ready", "Loaded and not draining", |operation| operation.answers(status).open());
    paths.add("get", "/version", "The server's version", |operation| {
        operation.answers(shapes.response::<VersionBody>())
    });
    paths.add(
        "get",
        "/debug/engine",
        "The engine's queues, blocks and sequences, if --debug-endpoints",
        |operation| operation.answers(shapes.response::<EngineBody>()),
    );
    paths.add("get", "/metrics", "Metrics for Prometheus", |operation| operation.writes("text/plain").open());
    paths
        .add("get", "/openapi.json", "This description", |operation| operation.answers(json!({"type": "object"})));
    paths.add("get", "/docs", "This description to read", |operation| operation.writes("text/html"));
    paths.add("get", "/", "A page to try the model in", |operation| operation.writes("text/html"));
    paths.paths
}

/// Schemas of types, named once and referred to.
struct Shapes {
    requests: SchemaGenerator,
    responses: SchemaGenerator,
}

impl Default for Shapes {
    fn default() -> Self {
        let settings = SchemaSettings::draft2020_12().with(|settings| {
            settings.definitions_path = DEFINITIONS.into();
            settings.meta_schema = None;
        });
        Shapes {
            requests: settings.clone().for_deserialize().into_generator(),
            responses: settings.for_serialize().into_generator(),
        }
    }
}

impl Shapes {
    fn request<T: JsonSchema>(&mut self) -> Value {
        self.requests.subschema_for::<T>().to_value()
    }

    /// A body that two types are read from.
    fn request_of<A: JsonSchema, B: JsonSchema>(&mut self) -> Value {
        let both: [Schema; 2] = [self.requests.subschema_for::<A>(), self.requests.subschema_for::<B>()];
        json!({"allOf": both})
    }

    fn response<T: JsonSchema>(&mut self) -> Value {
        self.responses.subschema_for::<T>().to_value()
    }

    fn definitions(mut self) -> Map<String, Value> {
        let mut all = self.requests.take_definitions(true);
        for (name, schema) in self.responses.take_definitions(true) {
            let earlier = all.insert(name.clone(), schema.clone());
            debug_assert!(earlier.is_none_or(|earlier| earlier == schema), "two shapes are called {name}");
        }
        all
    }
}

struct Paths {
    paths: Map<String, Value>,
    error: Value,
}

impl Paths {
    fn add(&mut self, method: &str, path: &str, summary: &str, fill: impl FnOnce(Operation) -> Operation) {
        let operation = fill(Operation {
            fields: Map::from_iter([("summary".to_owned(), json!(summary))]),
            content: Map::new(),
            error: self.error.clone(),
            open: false,
        });
        let methods = self.paths.entry(path).or_insert_with(|| json!({}));
        methods[method] = operation.finish();
    }
}

/// What is done with one method of one path.
struct Operation {
    fields: Map<String, Value>,
    /// Of the answer, by media type.
    content: Map<String, Value>,
    error: Value,
    /// No key is ever asked for.
    open: bool,
}

impl Operation {
    fn takes(mut self, schema: Value) -> Self {
        let content = json!({"application/json": {"schema": schema}});
        self.fields.insert("requestBody".to_owned(), json!({"required": true, "content": content}));
        self
    }

    /// A parameter in the path.
    fn names(mut self, name: &str) -> Self {
        let parameter = json!({"name": name, "in": "path", "required": true, "schema": {"type": "string"}});
        self.fields.insert("parameters".to_owned(), json!([parameter]));
        self
    }

    fn answers(mut self, schema: Value) -> Self {
        self.content.insert("application/json".to_owned(), json!({"schema": schema}));
        self
    }

    /// Text that is not JSON.
    fn writes(mut self, media: &str) -> Self {
        self.content.insert(media.to_owned(), json!({"schema": {"type": "string"}}));
        self
    }

    /// With `stream` the answer is server-sent events. They have no schema: OpenAPI 3.1 describes a body as a whole, and who
    /// checks event by event takes a schema there for an event's.
    fn streams(mut self) -> Self {
        self.content.insert("text/event-stream".to_owned(), json!({}));
        self
    }

    fn fails(mut self, error: Value) -> Self {
        self.error = error;
        self
    }

    fn open(mut self) -> Self {
        self.open = true;
        self
    }

    fn finish(mut self) -> Value {
        let error = json!({"description": "An error", "content": {"application/json": {"schema": self.error}}});
        let answer = json!({"description": "The answer", "content": self.content});
        self.fields.insert("responses".to_owned(), json!({"200": answer, "default": error}));
        if !self.open {
            self.fields.insert("security".to_owned(), json!([{}, {SECURITY: []}]));
        }
        Value::Object(self.fields)
    }
}
