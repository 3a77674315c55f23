//! Every limit, from both sides.

use super::*;
use crate::body::parse;

const LIMITS: ModelLimits =
    ModelLimits { vocab_size: 100, context_len: 50, eos_token_ids: &[2, 3], sampling: &SamplingDefaults::OPENAI };

fn shared_of(json: &str) -> Result<SharedOptions, ApiError> {
    shared(&parse(json.as_bytes()).unwrap(), &LIMITS)
}

#[track_caller]
fn refused(json: &str, message: &str) {
    let error = shared_of(json).unwrap_err();
    assert_eq!(error.status, 400, "{json}");
    assert!(error.message.contains(message), "{json}: {}", error.message);
    let param = error.param.expect("the field is named");
    assert!(json.contains(&format!("\"{param}\"")), "{json}: param {param}");
}

#[test]
fn what_is_out_of_range_is_refused() {
    for (json, message) in [
        (r#"{"temperature":-0.1}"#, "temperature must be between 0 and 2, not -0.1"),
        (r#"{"temperature":2.1}"#, "temperature must be between 0 and 2, not 2.1"),
        (r#"{"temperature":1e300}"#, "temperature must be between 0 and 2"),
        (r#"{"top_p":-0.5}"#, "top_p must be between 0 and 1, not -0.5"),
        (r#"{"top_p":1.01}"#, "top_p must be between 0 and 1, not 1.01"),
        (r#"{"top_k":-2}"#, "top_k must be between -1 and 4294967295, not -2"),
        (r#"{"min_p":-0.1}"#, "min_p must be between 0 and 1"),
        (r#"{"min_p":1.1}"#, "min_p must be between 0 and 1"),
        (r#"{"presence_penalty":2.5}"#, "presence_penalty must be between -2 and 2, not 2.5"),
        (r#"{"frequency_penalty":-2.5}"#, "frequency_penalty must be between -2 and 2, not -2.5"),
        (r#"{"repetition_penalty":0}"#, "repetition_penalty must be above 0"),
        (r#"{"repetition_penalty":1e-60}"#, "repetition_penalty must be above 0"),
        (r#"{"repetition_penalty":-1}"#, "repetition_penalty must be between 0 and 10"),
        (r#"{"repetition_penalty":11}"#, "repetition_penalty must be between 0 and 10"),
        (r#"{"n":0}"#, "n must be between 1 and 64, not 0"),
        (r#"{"n":65}"#, "n must be between 1 and 64, not 65"),
        (r#"{"n":-1}"#, "n must be between 1 and 64, not -1"),
        (r#"{"max_tokens":-1}"#, "max_tokens must be between 0 and 4294967295, not -1"),
        (r#"{"max_completion_tokens":-5}"#, "max_completion_tokens must be between 0"),
        (r#"{"min_tokens":-1}"#, "min_tokens must be between 0"),
        (r#"{"logit_bias":{"5":101}}"#, "logit_bias of token 5 must be between -100 and 100, not 101"),
        (r#"{"logit_bias":{"100":1}}"#, "100 is not a token id; the vocabulary has ids 0 to 99"),
        (r#"{"logit_bias":{"-1":1}}"#, "`-1` is not a token id"),
        (r#"{"logit_bias":{"hello":1}}"#, "`hello` is not a token id"),
        (r#"{"stop":""}"#, "stop[0] must be 1 to 1024 bytes long, not 0"),
        (r#"{"stop":["a",""]}"#, "stop[1] must be 1 to 1024 bytes long, not 0"),
        (r#"{"stop_token_ids":[100]}"#, "100 is not a token id"),
        (r#"{"stop_token_ids":[-1]}"#, "-1 is not a token id"),
        (r#"{"stream_options":{"include_usage":true}}"#, "stream_options needs stream to be true"),
        (r#"{"prompt_logprobs":21}"#, "prompt_logprobs must be between 0 and 20, not 21"),
        (r#"{"prompt_logprobs":1,"stream":true}"#, "prompt_logprobs with stream true is not supported"),
        (r#"{"priority":3000000000}"#, "priority must be between"),
        (r#"{"cache_salt":""}"#, "cache_salt must be 1 to 256 bytes long, not 0"),
    ] {
        refused(json, message);
    }
    let many = format!("[{}]", vec!["\"x\""; 17].join(","));
    refused(&format!(r#"{{"stop":{many}}}"#), "stop may hold at most 16 strings, not 17");
    refused(&format!(r#"{{"stop":"{}"}}"#, "x".repeat(1025)), "stop[0] must be 1 to 1024 bytes long, not 1025");
    refused(&format!(r#"{{"cache_salt":"{}"}}"#, "x".repeat(257)), "cache_salt must be 1 to 256");
    let ids = format!("[{}]", vec!["1"; 257].join(","));
    refused(&format!(r#"{{"stop_token_ids":{ids}}}"#), "stop_token_ids may hold at most 256 ids, not 257");
}

#[test]
fn nothing_asked_is_openais_defaults() {
    let options = shared_of("{}").unwrap();
    assert_eq!((options.n, options.stream, options.include_usage, options.max_tokens), (1, false, false, None));
    let sampling = &options.sampling;
    assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p), (1.0, 1.0, 0, 0.0));
    assert_eq!(
        (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty),
        (0.0, 0.0, 1.0)
    );
    assert_eq!(options.stop.eos_token_ids, [2, 3]);
    assert!(options.stop.skip_special_tokens && !options.stop.include_stop_str);
    assert_ne!(sampling.seed, shared_of("{}").unwrap().sampling.seed, "an unset seed is random");
    let nulls = r#"{"temperature":null,"n":null,"stop":null,"logit_bias":null,"stream_options":null,"seed":null}"#;
    assert_eq!(shared_of(nulls).unwrap().stop, options.stop);
}

#[test]
fn what_is_asked_arrives() {
    let options = shared_of(
        r#"{"temperature":0.5,"top_p":0.9,"top_k":40,"min_p":0.05,"seed":-7,"presence_penalty":1,
            "frequency_penalty":-1,"repetition_penalty":1.2,"logit_bias":{"5":-100,"99":2.5},"stop":["a","bc"],
            "stop_token_ids":[7],"ignore_eos":true,"min_tokens":3,"max_tokens":9,"max_completion_tokens":8,"n":4,
            "include_stop_str_in_output":true,"skip_special_tokens":false,"priority":-2,"cache_salt":"s",
            "stream":true,"stream_options":{"include_usage":true},"user":"u","metadata":{"a":"b"},"model":"m"}"#,
    )
    .unwrap();
    assert_eq!(
        options,
        SharedOptions {
            n: 4,
            stream: true,
            include_usage: true,
            max_tokens: Some(8),
            stop: StopParams {
                max_tokens: 0,
                min_tokens: 3,
                eos_token_ids: vec![],
                stop_token_ids: vec![7],
                stop_strings: vec!["a".to_owned(), "bc".to_owned()],
                include_stop_str: true,
                skip_special_tokens: false,
            },
            sampling: SamplingParams {
                temperature: 0.5,
                top_p: 0.9,
                top_k: 40,
                min_p: 0.05,
                seed: -7i64 as u64,
                presence_penalty: 1.0,
                frequency_penalty: -1.0,
                repetition_penalty: 1.2,
                logit_bias: vec![(5, -100.0), (99, 2.5)],
            },
            prompt_logprobs: None,
            priority: -2,
            cache_salt: Some("s".to_owned()),
        }
    );
}

#[test]
fn edges_are_in_range() {
    for json in [
        r#"{"temperature":0}"#,
        r#"{"temperature":2}"#,
        r#"{"top_p":1}"#,
        r#"{"top_k":-1}"#,
        r#"{"top_k":4294967295}"#,
        r#"{"min_p":1}"#,
        r#"{"repetition_penalty":10}"#,
        r#"{"n":64}"#,
        r#"{"max_tokens":0}"#,
        r#"{"logit_bias":{"0":100,"99":-100}}"#,
        r#"{"seed":-9223372036854775808}"#,
        r#"{"seed":9223372036854775807}"#,
        r#"{"prompt_logprobs":20}"#,
    ] {
        let options = shared_of(json).unwrap_or_else(|error| panic!("{json}: {}", error.message));
        // The engine's own bounds.
        assert!(options.sampling.top_p > 0.0 && options.sampling.top_p <= 1.0);
        assert!(options.sampling.repetition_penalty > 0.0);
    }
    assert_eq!(shared_of(r#"{"temperature":1e-30}"#).unwrap().sampling.temperature, 0.0);
    assert!(shared_of(r#"{"top_p":0}"#).unwrap().sampling.top_p > 0.0);
}

#[test]
fn prompt_and_completion_fit_the_context() {
    #[track_caller]
    fn check(json: &str, prompt_len: usize, default: Option<u32>, expected: Result<u32, &str>) {
        let options = shared_of(json).unwrap();
        match (max_tokens_for("prompt", &options, prompt_len, default, &LIMITS), expected) {
            (Ok(got), Ok(expected)) => assert_eq!(got, expected, "{json}, {prompt_len}"),
            (Err(error), Err(part)) => assert!(error.message.contains(part), "{}", error.message),
            (got, expected) => panic!("{json}, {prompt_len}: {got:?} instead of {expected:?}"),
        }
    }
    check("{}", 10, Some(16), Ok(16));
    check("{}", 40, Some(16), Ok(10));
    check("{}", 10, None, Ok(40));
    check(r#"{"max_tokens":5}"#, 45, None, Ok(5));
    check(
        r#"{"max_tokens":6}"#,
        45,
        None,
        Err("context length is 50 tokens; the prompt is 45 tokens long and max_tokens asks for 6"),
    );
    check("{}", 49, None, Ok(1));
    check("{}", 50, None, Err("context length is 50 tokens; the prompt is 50 tokens long and at least 1"));
    check("{}", 5000, Some(16), Err("the prompt is 5000 tokens long"));
    check(r#"{"max_tokens":0}"#, 50, None, Ok(0));
    check(r#"{"max_tokens":0}"#, 51, None, Err("the prompt is 51 tokens long"));
    check("{}", 0, None, Err("prompt must not be empty"));
    check(r#"{"min_tokens":6,"max_tokens":5}"#, 1, None, Err("min_tokens must be at most max_tokens, 5, not 6"));
    check(r#"{"min_tokens":5,"max_tokens":5}"#, 1, None, Ok(5));
    let error = max_tokens_for("messages", &shared_of("{}").unwrap(), 99, None, &LIMITS).unwrap_err();
    assert_eq!((error.code, error.param.as_deref()), (Some("context_length_exceeded"), Some("messages")));
}

#[test]
fn ids_sent_as_prompts_are_checked() {
    assert!(prompt_ids("prompt", &[0, 99], &LIMITS).is_ok());
    assert!(prompt_ids("prompt", &[0, 100], &LIMITS).unwrap_err().message.contains("100 is not a token id"));
    let error = prompt_ids("prompt", &[1000; 51], &LIMITS).unwrap_err();
    assert_eq!(error.code, Some("context_length_exceeded"));
    assert!(error.message.contains("51") && error.message.contains("50"));
}

#[test]
fn choices_are_bounded() {
    assert!(choices(4, 64).is_ok());
    assert!(choices(5, 64).unwrap_err().message.contains("256 choices"));
    assert!(choices(usize::MAX, 2).is_err());
}

#[test]
fn each_choice_has_a_seed_of_its_own() {
    assert_eq!(seed_of_choice(42, 0), 42);
    let mut seeds: Vec<u64> = (0..4).flat_map(|seed| (0..64).map(move |j| seed_of_choice(seed, j))).collect();
    seeds.sort_unstable();
    seeds.dedup();
    assert_eq!(seeds.len(), 4 * 64);
}

#[test]
fn the_models_defaults_hold_where_the_request_says_nothing() {
    let sampling = SamplingDefaults {
        temperature: 0.5,
        top_p: 0.25,
        top_k: 7,
        min_p: 0.125,
        repetition_penalty: 1.5,
        max_tokens: Some(9),
        suppressed: vec![4, 5],
    };
    let limits = ModelLimits { sampling: &sampling, ..LIMITS };
    let sampled = |json: &str| shared(&parse(json.as_bytes()).unwrap(), &limits).unwrap().sampling;
    let unset = sampled("{}");
    assert_eq!((unset.temperature, unset.top_p, unset.top_k), (0.5, 0.25, 7));
    assert_eq!((unset.min_p, unset.repetition_penalty), (0.125, 1.5));
    assert_eq!(unset.logit_bias, [(4, f32::MIN), (5, f32::MIN)]);
    let set = r#"{"temperature":0,"top_p":1,"top_k":-1,"min_p":0,"repetition_penalty":1,"logit_bias":{"5":2}}"#;
    let set = sampled(set);
    assert_eq!((set.temperature, set.top_p, set.top_k), (0.0, 1.0, 0));
    assert_eq!((set.min_p, set.repetition_penalty), (0.0, 1.0));
    assert_eq!(set.logit_bias, [(5, 2.0), (4, f32::MIN)]);
}
