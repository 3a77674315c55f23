//! `POST /v1/completions`.

use std::sync::Arc;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use rill_engine::GenerateRequest;
use rill_models::FillInTheMiddle;

use super::{choices_of, encode_prompts, grammar_for, new_id, parse_generation};
use crate::app::{AppState, unix_seconds};
use crate::auth::Caller;
use crate::body::JsonBytes;
use crate::event_stream;
use crate::generation::{Generation, Outcome, finish_reason};
use crate::logprob_format::{self, CompletionLogprobsBuilder};
use crate::protocol::ApiError;
use crate::protocol::completion::{CompletionChoice, CompletionFields, CompletionResponse};
use crate::protocol::logprobs::CompletionLogprobs;
use crate::protocol::prompt::Prompt;
use crate::protocol::render::{RenderedCompletion, RenderedPrompt};
use crate::protocol::usage::UsageBody;
use crate::serving::{Serving, Target};
use crate::sse::{Echo, FrameWriter, StreamHead, StreamKind};
use crate::validate;

/// OpenAI's default on this endpoint.
const MAX_TOKENS_DEFAULT: u32 = 16;

pub async fn completions(
    State(state): State<Arc<AppState>>,
    Extension(caller): Extension<Caller>,
    JsonBytes(body): JsonBytes,
) -> Result<Response, ApiError> {
    let (serving, in_flight) = state.enter()?;
    let (shared, own) = parse_generation::<CompletionFields>(&body)?;
    drop(body);
    let Target { name: model, adapter } = serving.target(shared.model.as_deref())?;
    let mut options = validate::shared(&shared, &serving.limits())?;
    let logprobs =
        validate::integer("logprobs", own.logprobs, 0, validate::LOGPROBS_MAX)?.map(|count| count as u32);
    let n = options.n;
    let candidates = best_of(own.best_of, n, options.stream)?;
    options.n = candidates;
    let echo = own.echo.unwrap_or(false);
    let prompts = Prompts::new(&serving, own, candidates)?;
    if prompts.suffix.is_some() {
        if echo {
            return Err(ApiError::invalid("echo", "echo may not go with suffix"));
        }
        if !shared.ignore_eos.unwrap_or(false) {
            options.stop.eos_token_ids.extend(FillInTheMiddle::ends(serving.tokenizer()));
        }
    }
    let grammar = grammar_for(&serving, &shared).await?;
    let encoded = prompts.encode(&serving).await?;
    let prompt_logprobs = if echo { options.prompt_logprobs.max(logprobs) } else { options.prompt_logprobs };
    // Candidates are ranked by their log-probabilities, shown or not.
    let token_logprobs = if candidates > n { Some(logprobs.unwrap_or(0)) } else { logprobs };
    let mut requests: Vec<GenerateRequest> = Vec::with_capacity(encoded.len() * candidates);
    let mut echoes = Vec::new();
    for (text, ids) in encoded {
        let default = Some(MAX_TOKENS_DEFAULT);
        let max_tokens = validate::max_tokens_for("prompt", &options, ids.len(), default, &serving.limits())?;
        if echo {
            let skip_special = options.stop.skip_special_tokens;
            let text = text.unwrap_or_else(|| serving.tokenizer().decode(&ids, skip_special));
            echoes.push(Echo { text, ids: ids.clone() });
        }
        let prompt = (ids, adapter.as_ref());
        requests.extend(choices_of(
            prompt,
            max_tokens,
            &options,
            token_logprobs,
            prompt_logprobs,
            grammar.as_ref(),
        ));
    }

    let count = requests.len() / candidates * n;
    let id = new_id("cmpl")?;
    let created_s = unix_seconds();
    let generation = Generation::submit(&serving.engine, requests, candidates, &caller)?;
    let skip_special = options.stop.skip_special_tokens;
    if options.stream {
        let head = StreamHead { id: &id, created_s, model: &model, fingerprint: &serving.fingerprint };
        let kind = StreamKind::Completion { echoes, logprobs: logprobs.is_some(), skip_special };
        let writer = FrameWriter::new(serving.clone(), &head, kind, n, count, options.include_usage);
        return event_stream::respond(generation, writer, in_flight, state.keep_alive()).await;
    }
    let outcomes =
        generation.collect().await.map_err(|failure| ApiError::failed(failure.kind, failure.message))?;
    let mut usage = UsageBody::default();
    for (index, outcome) in outcomes.iter().enumerate() {
        usage.add(outcome.usage, index.is_multiple_of(candidates));
    }
    let mut choices = Vec::with_capacity(count);
    for (index, outcome) in best(outcomes, candidates, n).into_iter().enumerate() {
        let shape = ChoiceShape {
            echo: echoes.get(index / n),
            logprobs: logprobs.is_some(),
            prompt_logprobs: options.prompt_logprobs.is_some(),
            skip_special,
        };
        choices.push(choice(&serving, index, outcome, &shape));
    }
    let response = CompletionResponse {
        id: &id,
        object: "text_completion",
        created: created_s,
        model: &model,
        system_fingerprint: &serving.fingerprint,
        choices,
        usage,
    };
    Ok(Json(response).into_response())
}

/// How many candidates to generate for each prompt.
fn best_of(asked: Option<i64>, n: usize, stream: bool) -> Result<usize, ApiError> {
    // 1 is the API's default, which some clients send whatever n is.
    let asked = asked.filter(|&asked| asked != 1);
    let candidates =
        validate::integer("best_of", asked, n as i64, validate::N_MAX)?.map_or(n, |asked| asked as usize);
    if candidates > n && stream {
        return Err(ApiError::invalid(
            "best_of",
            "best_of above n may not go with stream: the best is known at the end",
        ));
    }
    Ok(candidates)
}

/// The `n` best of every `candidates` outcomes, best first: by log-probability a token, the earlier of equals.
fn best(outcomes: Vec<Outcome>, candidates: usize, n: usize) -> Vec<Outcome> {
    if candidates == n {
        return outcomes;
    }
    let score = |outcome: &Outcome| {
        let sum: f64 = outcome.logprobs.iter().map(|token| f64::from(token.logprob)).sum();
        sum / outcome.logprobs.len().max(1) as f64
    };
    let mut outcomes = outcomes.into_iter();
    let mut chosen = Vec::new();
    loop {
        let mut of_prompt: Vec<Outcome> = outcomes.by_ref().take(candidates).collect();
        if of_prompt.is_empty() {
            return chosen;
        }
        of_prompt.sort_by(|a, b| score(b).total_cmp(&score(a)));
        chosen.extend(of_prompt.into_iter().take(n));
    }
}

/// What of an outcome is shown.
struct ChoiceShape<'a> {
    echo: Option<&'a Echo>,
    logprobs: bool,
    prompt_logprobs: bool,
    skip_special: bool,
}

fn choice(serving: &Serving, index: usize, outcome: Outcome, shape: &ChoiceShape) -> CompletionChoice {
    let tokenizer = serving.tokenizer();
    let of_prompt = outcome.prompt_logprobs.as_deref().unwrap_or_default();
    let logprobs = shape.logprobs.then(|| {
        let mut shown = CompletionLogprobs::default();
        let mut builder = CompletionLogprobsBuilder::new(tokenizer, shape.skip_special, 0);
        if let Some(echo) = shape.echo {
            builder.push_prompt(&mut shown, &echo.ids, of_prompt);
        }
        builder.push_tokens(&mut shown, &outcome.logprobs);
        shown
    });
    let text = match shape.echo {
        Some(echo) => format!("{}{}", echo.text, outcome.text),
        None => outcome.text,
    };
    CompletionChoice {
        index,
        text,
        logprobs,
        finish_reason: finish_reason(outcome.reason),
        prompt_logprobs: shape.prompt_logprobs.then(|| logprob_format::prompt(tokenizer, of_prompt)),
    }
}

/// The prompts of a request, and what is to follow the completion, if anything is.
struct Prompts {
    prompts: Vec<Prompt>,
    suffix: Option<(FillInTheMiddle, String)>,
    add_special: bool,
}

impl Prompts {
    fn new(serving: &Serving, fields: CompletionFields, candidates: usize) -> Result<Prompts, ApiError> {
        let prompts = fields.prompt.map(|prompts| prompts.0).unwrap_or_default();
        if prompts.is_empty() {
            return Err(ApiError::invalid("prompt", "prompt must not be empty"));
        }
        validate::choices(prompts.len(), candidates)?;
        let suffix = match fields.suffix.filter(|suffix| !suffix.is_empty()) {
            None => None,
            Some(suffix) => match serving.fill_in_the_middle {
                Some(tokens) => Some((tokens, suffix)),
                None => {
                    return Err(ApiError::invalid(
                        "suffix",
                        "suffix needs a model with fill-in-the-middle tokens, and this one has none",
                    ));
                }
            },
        };
        Ok(Prompts { prompts, suffix, add_special: fields.add_special_tokens.unwrap_or(true) })
    }

    /// Each prompt's text, if it came as text, and its ids.
    async fn encode(self, serving: &Arc<Serving>) -> Result<Vec<(Option<String>, Vec<u32>)>, ApiError> {
        let Some((tokens, suffix)) = self.suffix else {
            return encode_prompts("prompt", serving, self.prompts, self.add_special).await;
        };
        // The text's beginning comes before the control token, which takes the place of a text's first word.
        let beginning = match self.add_special {
            true => encode_prompts("prompt", serving, vec![Prompt::Text(String::new())], true).await?,
            false => Vec::new(),
        };
        let first = beginning.first().and_then(|(_, ids)| ids.first().copied());
        let begin = first.filter(|&id| serving.tokenizer().bos_token_id() == Some(id));
        let suffix = encode_prompts("suffix", serving, vec![Prompt::Text(suffix)], false).await?;
        let suffix = suffix.first().map_or(&[][..], |(_, ids)| ids);
        let prefixes = encode_prompts("prompt", serving, self.prompts, false).await?;
        let around = |(_, prefix): (Option<String>, Vec<u32>)| {
            let mut ids = Vec::with_capacity(prefix.len() + suffix.len() + 4);
            ids.extend(begin);
            ids.push(tokens.prefix);
            ids.extend(prefix);
            ids.push(tokens.suffix);
            ids.extend_from_slice(suffix);
            ids.push(tokens.middle);
            (None, ids)
        };
        Ok(prefixes.into_iter().map(around).collect())
    }
}

/// What `/v1/completions` would give the model for the same body, prompt by prompt.
pub async fn render(
    State(state): State<Arc<AppState>>,
    JsonBytes(body): JsonBytes,
) -> Result<Json<RenderedCompletion>, ApiError> {
    let serving = state.serving()?.clone();
    let (shared, own) = parse_generation::<CompletionFields>(&body)?;
    let model = serving.target(shared.model.as_deref())?.name;
    let encoded = Prompts::new(&serving, own, 1)?.encode(&serving).await?;
    let prompts = encoded
        .into_iter()
        .map(|(text, ids)| {
            let prompt = text.unwrap_or_else(|| serving.tokenizer().decode(&ids, false));
            RenderedPrompt { prompt, count: ids.len(), token_ids: ids }
        })
        .collect();
    Ok(Json(RenderedCompletion { model, prompts }))
}
