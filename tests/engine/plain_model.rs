//! What must come out: the fake model run one request at a time, one token at a time, with no cache, no blocks, no
//! batches, and stop strings looked for in the whole text. Written to be obviously right, not fast.

use rill_engine::sampler::{RuledOut, Sampler, TokenHistory};
use rill_engine::{FinishReason, GenerateRequest, TokenLogprobs, TokenText};

use crate::fake_runner::{Context, FakeText};

/// The whole result of a request.
#[derive(Debug, Default, PartialEq)]
pub struct Expected {
    pub token_ids: Vec<u32>,
    pub text: String,
    pub logprobs: Vec<TokenLogprobs>,
    pub prompt_logprobs: Option<Vec<Option<TokenLogprobs>>>,
    pub reason: Option<FinishReason>,
}

pub fn run(request: &GenerateRequest, context_len: usize, window: Option<usize>) -> Expected {
    let mut sampler = Sampler::default();
    let mut expected = Expected::default();
    let mut entries = Vec::new();
    let mut logits = Vec::new();
    let mut read = |token: u32, position: usize| {
        let seen = position.saturating_sub(window.unwrap_or(usize::MAX));
        let context = entries[seen..].iter().fold(Context::default(), |context, &entry| context.then(entry));
        entries.push(context.entry(token, position));
        let mut row = Vec::new();
        context.then(entries[position]).logits(&mut row);
        row
    };

    let mut scored = vec![None];
    for (position, &token) in request.prompt.iter().enumerate() {
        if position > 0
            && let Some(top) = request.prompt_logprobs
        {
            scored.push(Some(sampler.logprobs(&logits, token, top as usize).expect("finite logits")));
        }
        logits = read(token, position);
    }
    expected.prompt_logprobs = request.prompt_logprobs.map(|_| scored);

    let stop = &request.stop;
    let max = (stop.max_tokens as usize).min(context_len - request.prompt.len());
    let mut history = TokenHistory::new(&request.sampling, &request.prompt);
    let mut bytes = Vec::new();
    let mut settled_before = 0;
    while expected.reason.is_none() {
        let count = expected.token_ids.len();
        if count >= max {
            expected.reason = Some(FinishReason::Length);
            break;
        }
        let too_early = count < stop.min_tokens as usize;
        let ends: Vec<u32> = stop.eos_token_ids.iter().chain(&stop.stop_token_ids).copied().collect();
        let masked = if too_early { &ends[..] } else { &[] };
        let index = count as u64;
        let token = match plain_greedy(request) {
            true => argmax(&logits, masked),
            false => sampler
                .sample(&logits, &request.sampling, &history, RuledOut { tokens: masked, mask: None }, index)
                .expect("finite logits"),
        };
        history.push(token);
        expected.token_ids.push(token);
        if let Some(top) = request.logprobs {
            expected.logprobs.push(sampler.logprobs(&logits, token, top as usize).expect("finite logits"));
        }
        if stop.eos_token_ids.contains(&token) {
            expected.reason = Some(FinishReason::Eos);
        } else if stop.stop_token_ids.contains(&token) {
            expected.reason = Some(FinishReason::StopToken(token));
        } else if count + 1 == max {
            expected.reason = Some(FinishReason::Length);
        }
        let shown = match expected.reason {
            Some(FinishReason::Eos) => false,
            Some(FinishReason::StopToken(_)) => stop.include_stop_str,
            _ => true,
        };
        if shown && !(stop.skip_special_tokens && FakeText.is_special(token)) {
            bytes.extend_from_slice(FakeText.token_bytes(token));
        }
        let last = expected.reason.is_some();
        expected.text = if last { String::from_utf8_lossy(&bytes).into_owned() } else { settled(&bytes) };
        if expected.token_ids.len() >= stop.min_tokens as usize
            && let Some((index, shown)) = first_stop(&expected.text, settled_before, request)
        {
            expected.text.truncate(shown);
            expected.reason = Some(FinishReason::StopString(index));
        }
        settled_before = expected.text.len();
        logits = read(token, request.prompt.len() + count);
    }
    expected
}

fn plain_greedy(request: &GenerateRequest) -> bool {
    let sampling = &request.sampling;
    sampling.temperature == 0.0
        && sampling.logit_bias.is_empty()
        && (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.0, 0.0, 1.0)
}

fn argmax(logits: &[f32], masked: &[u32]) -> u32 {
    let allowed = (0..logits.len()).filter(|id| !masked.contains(&(*id as u32)));
    allowed.reduce(|best, id| if logits[id] > logits[best] { id } else { best }).expect("a token is left") as u32
}

/// The text so far, without a character that is still incomplete.
fn settled(bytes: &[u8]) -> String {
    let mut text = String::new();
    let mut chunks = bytes.utf8_chunks().peekable();
    while let Some(chunk) = chunks.next() {
        text.push_str(chunk.valid());
        let broken = std::str::from_utf8(chunk.invalid()).is_err_and(|error| error.error_len().is_some());
        let followed = !chunk.invalid().is_empty() && chunks.peek().is_some();
        if broken || followed {
            text.push('\u{fffd}');
        }
    }
    text
}

/// The stop string that ends first after byte `from` of `text`, and how much of the text is shown.
fn first_stop(text: &str, from: usize, request: &GenerateRequest) -> Option<(usize, usize)> {
    let stops = &request.stop.stop_strings;
    (from + 1..=text.len()).filter(|&end| text.is_char_boundary(end)).find_map(|end| {
        let here = stops.iter().enumerate().filter(|(_, stop)| text[..end].ends_with(stop.as_str()));
        let (index, stop) = here.max_by_key(|(index, stop)| (stop.len(), usize::MAX - index))?;
        Some((index, if request.stop.include_stop_str { end } else { end - stop.len() }))
    })
}
