//! `/v1/completions`, not streamed: what each parameter does to the answer.

use serde_json::{Value, json};

use crate::scripted_runner::SCRIPT;
use crate::test_server::{self, MODEL, Setup};
use crate::tiny_tokenizer::IM_END;

const PATH: &str = "/v1/completions";

/// `count` bytes of the script as a sequence of `prompt_len` tokens continues it.
fn script(prompt_len: usize, count: usize) -> String {
    let bytes: Vec<u8> = SCRIPT.bytes().cycle().skip(prompt_len - 1).take(count).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

#[test]
fn the_answer_has_openais_shape() {
    let server = test_server::start();
    let answer = server.ok(PATH, json!({"model": MODEL, "prompt": "hello", "temperature": 0, "max_tokens": 4}));
    assert!(answer["id"].as_str().unwrap().starts_with("cmpl-"));
    assert_eq!(answer["object"], "text_completion");
    assert!(answer["created"].as_u64().unwrap() > 1_600_000_000);
    assert_eq!(answer["model"], MODEL);
    assert_eq!(answer["system_fingerprint"], "rill_test");
    // `hello` is one token.
    assert_eq!(
        answer["choices"],
        json!([{"index": 0, "text": script(1, 4), "logprobs": null, "finish_reason": "length"}])
    );
    assert_eq!(
        answer["usage"],
        json!({"prompt_tokens": 1, "completion_tokens": 4, "total_tokens": 5,
               "prompt_tokens_details": {"cached_tokens": 0}})
    );
    server.assert_idle_soon();
}

#[test]
fn prompts_of_all_kinds_and_n_are_choices_in_order() {
    let server = test_server::start();
    let texts = |prompt: Value, n: u32| -> Vec<String> {
        let answer = server.ok(PATH, json!({"prompt": prompt, "n": n, "temperature": 0, "max_tokens": 3}));
        let choices = answer["choices"].as_array().unwrap();
        for (index, choice) in choices.iter().enumerate() {
            assert_eq!(choice["index"], index);
        }
        choices.iter().map(|choice| choice["text"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(texts(json!("abc"), 1), [script(3, 3)]);
    assert_eq!(texts(json!([97, 98, 99]), 1), [script(3, 3)]);
    assert_eq!(texts(json!(["a", "abc"]), 2), [script(1, 3), script(1, 3), script(3, 3), script(3, 3)]);
    assert_eq!(texts(json!([[97], [97, 98]]), 1), [script(1, 3), script(2, 3)]);
    let usage = &server.ok(PATH, json!({"prompt": ["a", "abc"], "n": 2, "max_tokens": 3}))["usage"];
    assert_eq!((usage["prompt_tokens"].as_u64(), usage["completion_tokens"].as_u64()), (Some(4), Some(12)));
}

#[test]
fn the_default_is_sixteen_tokens_and_any_name_we_serve() {
    let server = test_server::start();
    for model in [json!(null), json!("default"), json!(MODEL), json!("alias")] {
        let answer = server.ok(PATH, json!({"model": model, "prompt": "a"}));
        assert_eq!(answer["usage"]["completion_tokens"], 16);
        assert_eq!(answer["model"], if model == "alias" { "alias" } else { MODEL });
    }
}

#[test]
fn stopping() {
    let server = test_server::start();
    let check = |extra: Value, text: &str, reason: &str| {
        let mut body = json!({"prompt": "a", "temperature": 0, "max_tokens": 40});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let choice = &server.ok(PATH, body)["choices"][0];
        assert_eq!(
            (choice["text"].as_str(), choice["finish_reason"].as_str()),
            (Some(text), Some(reason)),
            "{extra}"
        );
    };
    check(json!({"stop": "lein"}), "Ein Bäch", "stop");
    check(json!({"stop": ["nothing", "—", "lein"]}), "Ein Bäch", "stop");
    check(json!({"stop": "lein", "include_stop_str_in_output": true}), "Ein Bächlein", "stop");
    check(json!({"stop_token_ids": [b' ']}), "Ein", "stop");
    check(json!({"stop": "n", "min_tokens": 6}), "Ein Bächlei", "stop");
    check(json!({"max_completion_tokens": 3, "max_tokens": 9}), "Ein", "length");
    check(json!({"max_tokens": 0}), "", "length");
    // The end token is certain: nothing is generated, unless it is ignored.
    check(json!({"logit_bias": {IM_END.to_string(): 100}}), "", "stop");
    check(json!({"logit_bias": {IM_END.to_string(): 100}, "ignore_eos": true, "max_tokens": 2}), "", "length");
    check(
        json!({"logit_bias": {IM_END.to_string(): 100}, "ignore_eos": true, "max_tokens": 2,
               "skip_special_tokens": false}),
        "<|im_end|><|im_end|>",
        "length",
    );
    for spaces in [false, true] {
        check(
            json!({"logit_bias": {IM_END.to_string(): 100}, "ignore_eos": true, "max_tokens": 2,
                   "skip_special_tokens": false, "spaces_between_special_tokens": spaces}),
            "<|im_end|><|im_end|>",
            "length",
        );
    }
}

#[test]
fn sampling_parameters_change_what_is_sampled() {
    let server = test_server::start();
    let text = |extra: Value| {
        let mut body = json!({"prompt": "abc", "max_tokens": 60, "seed": 7});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        server.ok(PATH, body)["choices"][0]["text"].as_str().unwrap().to_owned()
    };
    let greedy = text(json!({"temperature": 0}));
    assert_eq!(greedy, script(3, 60));
    let sampled = text(json!({}));
    assert_ne!(sampled, greedy);
    assert_eq!(sampled, text(json!({})), "a seed decides");
    assert_ne!(sampled, text(json!({"seed": 8})));
    for nearly_greedy in
        [json!({"top_k": 1}), json!({"top_p": 0}), json!({"top_p": 0.0001}), json!({"min_p": 1.0})]
    {
        assert_eq!(text(nearly_greedy.clone()), greedy, "{nearly_greedy}");
    }
    for off in [
        json!({"top_k": -1}),
        json!({"top_k": 0}),
        json!({"top_p": 1}),
        json!({"min_p": 0}),
        json!({"presence_penalty": 0}),
    ] {
        assert_eq!(text(off.clone()), sampled, "{off}");
    }
    for penalty in
        [json!({"presence_penalty": 2}), json!({"frequency_penalty": 2}), json!({"repetition_penalty": 5})]
    {
        let mut body = penalty.clone();
        body["temperature"] = json!(0);
        assert_ne!(text(body), greedy, "{penalty}");
    }
    let only_z = text(json!({"logit_bias": {"122": 100}}));
    assert_eq!(only_z, "z".repeat(60));
    let two = server.ok(PATH, json!({"prompt": "abc", "max_tokens": 60, "seed": 7, "n": 2}));
    assert_eq!(two["choices"][0]["text"], sampled, "n changes nothing for the first choice");
    assert_ne!(two["choices"][1]["text"], sampled);
}

#[test]
fn echo_and_logprobs_are_what_lm_eval_reads() {
    let server = test_server::start();
    for max_tokens in [0, 1] {
        let answer = server.ok(
            PATH,
            json!({"prompt": "hello äb", "echo": true, "logprobs": 1, "max_tokens": max_tokens, "temperature": 0}),
        );
        let choice = &answer["choices"][0];
        let logprobs = &choice["logprobs"];
        let mut tokens = vec!["hello", " ", "bytes:\\xc3", "bytes:\\xa4", "b"];
        let mut offsets = vec![0, 5, 6, 7, 7];
        let mut text = "hello äb".to_owned();
        if max_tokens == 1 {
            let next = script(5, 1);
            text.push_str(&next);
            offsets.push(8);
            assert_eq!(logprobs["tokens"][5], next);
            tokens.push("B");
        }
        assert_eq!(choice["text"], text);
        assert_eq!(logprobs["tokens"], json!(tokens));
        assert_eq!(logprobs["text_offset"], json!(offsets));
        let chosen = logprobs["token_logprobs"].as_array().unwrap();
        let top = logprobs["top_logprobs"].as_array().unwrap();
        assert_eq!((chosen.len(), top.len()), (tokens.len(), tokens.len()));
        assert!(chosen[0].is_null() && top[0].is_null());
        for position in 1..tokens.len() {
            assert_eq!(top[position][tokens[position]], chosen[position], "the chosen token's own number");
            assert!(chosen[position].as_f64().unwrap() < 0.0);
        }
        if max_tokens == 1 {
            let best = top[5].as_object().unwrap();
            assert_eq!(best.len(), 1, "greedy: the chosen token is the most likely one");
        }
    }
}

#[test]
fn logprobs_count_alternatives() {
    let server = test_server::start();
    let answer = server.ok(PATH, json!({"prompt": "a", "logprobs": 3, "max_tokens": 5, "temperature": 0}));
    let logprobs = &answer["choices"][0]["logprobs"];
    assert_eq!(logprobs["tokens"].as_array().unwrap().len(), 5);
    for alternatives in logprobs["top_logprobs"].as_array().unwrap() {
        assert_eq!(alternatives.as_object().unwrap().len(), 3);
    }
    let none = server.ok(PATH, json!({"prompt": "a", "logprobs": 0, "max_tokens": 2, "temperature": 0}));
    let top = &none["choices"][0]["logprobs"]["top_logprobs"];
    assert_eq!(top[0].as_object().unwrap().len(), 1, "the chosen token is always there");
}

#[test]
fn echo_without_logprobs_is_the_prompt_as_sent() {
    let server = test_server::start();
    let answer =
        server.ok(PATH, json!({"prompt": ["hello ", "x"], "echo": true, "max_tokens": 2, "temperature": 0}));
    // `hello` and the space.
    assert_eq!(answer["choices"][0]["text"], format!("hello {}", script(2, 2)));
    assert_eq!(answer["choices"][1]["text"], format!("x{}", script(1, 2)));
    let ids = server.ok(PATH, json!({"prompt": [259, 33], "echo": true, "max_tokens": 0}));
    assert_eq!(ids["choices"][0]["text"], "hello!");
}

#[test]
fn prompt_logprobs_are_vllms() {
    let server = test_server::start();
    let answer = server.ok(PATH, json!({"prompt": "abc", "prompt_logprobs": 2, "max_tokens": 1}));
    let entries = answer["choices"][0]["prompt_logprobs"].as_array().unwrap();
    assert_eq!(entries.len(), 3);
    assert!(entries[0].is_null());
    for (entry, own) in entries[1..].iter().zip(["98", "99"]) {
        let entry = entry.as_object().unwrap();
        assert!(entry.len() == 2 || entry.len() == 3);
        assert!(entry[own]["logprob"].is_f64() && entry[own]["decoded_token"].is_string());
        assert!(entry.values().any(|token| token["rank"] == 1));
    }
    assert!(answer["choices"][0]["logprobs"].is_null());
}

#[test]
fn cached_tokens_are_reported_and_salts_keep_apart() {
    let server = test_server::start();
    let prompt = "The same long beginning, again and again.".repeat(2);
    let cached = |salt: Value| {
        let answer =
            server.ok(PATH, json!({"prompt": prompt, "max_tokens": 2, "temperature": 0, "cache_salt": salt}));
        answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
    };
    assert_eq!(cached(json!(null)), 0);
    let hit = cached(json!(null));
    assert!(hit >= 64, "{hit}");
    assert_eq!(cached(json!("tenant")), 0);
    assert_eq!(cached(json!("tenant")), hit);
}

#[test]
fn best_of_shows_the_likeliest() {
    let server = test_server::start();
    for (n, best_of, status) in
        [(1, 1, 200), (2, 1, 200), (2, 2, 200), (1, 2, 200), (2, 3, 200), (3, 2, 400), (1, 0, 400), (1, 65, 400)]
    {
        let body = json!({"prompt": "a", "max_tokens": 1, "n": n, "best_of": best_of});
        let answer = server.post(PATH, &body.to_string());
        assert_eq!(answer.status, status, "{body}");
        match status {
            200 => assert_eq!(answer.json()["choices"].as_array().unwrap().len(), n),
            _ => assert_eq!(answer.json()["error"]["param"], "best_of"),
        }
    }
    let ask = |extra: Value| {
        let mut body = json!({"prompt": ["abc", "xyz"], "max_tokens": 12, "seed": 7, "temperature": 1.5});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        server.ok(PATH, body)
    };
    let mean = |choice: &Value| {
        let logprobs = choice["logprobs"]["token_logprobs"].as_array().unwrap();
        logprobs.iter().map(|value| value.as_f64().unwrap()).sum::<f64>() / logprobs.len() as f64
    };
    // All of the candidates are those that n alone would give.
    let all = ask(json!({"n": 6, "logprobs": 0}));
    let best = ask(json!({"n": 2, "best_of": 6, "logprobs": 0}));
    for prompt in 0..2 {
        let mut ranked: Vec<&Value> = all["choices"].as_array().unwrap()[prompt * 6..][..6].iter().collect();
        assert!(ranked.windows(2).any(|pair| mean(pair[0]) < mean(pair[1])), "sorted by accident");
        ranked.sort_by(|a, b| mean(b).total_cmp(&mean(a)));
        for (rank, expected) in ranked[..2].iter().enumerate() {
            let got = &best["choices"][prompt * 2 + rank];
            assert_eq!(got["index"], prompt * 2 + rank);
            assert_eq!((&got["text"], &got["logprobs"]), (&expected["text"], &expected["logprobs"]));
        }
    }
    assert_eq!(best["usage"], all["usage"], "every candidate's tokens count");
    // Log-probabilities rank the candidates even where nobody asked for them.
    let plain = ask(json!({"n": 2, "best_of": 6}));
    assert_eq!(plain["choices"][3]["text"], best["choices"][3]["text"]);
    assert_eq!(plain["choices"][3]["logprobs"], Value::Null);
    let streamed = server.post(PATH, r#"{"prompt":"a","best_of":2,"stream":true}"#);
    assert_eq!((streamed.status, streamed.json()["error"]["param"].clone()), (400, json!("best_of")));
}

/// The model fills in what is between two texts, if it has the tokens for it.
#[test]
fn suffix_puts_the_prompt_around_the_gap() {
    let tokens = rill_models::FillInTheMiddle { prefix: 260, suffix: 261, middle: 262 };
    let server = test_server::start_with(Setup { fill_in_the_middle: Some(tokens), ..Setup::default() });
    let rendered = server.ok("/v1/completions/render", json!({"prompt": ["ab", "c"], "suffix": "de"}));
    assert_eq!(rendered["prompts"][0]["token_ids"], json!([260, 97, 98, 261, 100, 101, 262]));
    assert_eq!(rendered["prompts"][1]["token_ids"], json!([260, 99, 261, 100, 101, 262]));
    let given = server.ok("/v1/completions/render", json!({"prompt": [97], "suffix": "e"}));
    assert_eq!(given["prompts"][0]["token_ids"], json!([260, 97, 261, 101, 262]));
    let ask = |extra: Value| {
        let mut body = json!({"max_tokens": 9, "temperature": 0});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        server.ok(PATH, body)
    };
    let filled = ask(json!({"prompt": "ab", "suffix": "de"}));
    let by_hand = ask(json!({"prompt": [260, 97, 98, 261, 100, 101, 262]}));
    assert_eq!(filled["choices"], by_hand["choices"]);
    assert_eq!(filled["usage"]["prompt_tokens"], 7);
    // An empty one asks for nothing.
    assert_eq!(ask(json!({"prompt": "ab", "suffix": ""}))["choices"], ask(json!({"prompt": "ab"}))["choices"]);
    let echoed = server.post(PATH, r#"{"prompt":"ab","suffix":"c","echo":true}"#);
    assert_eq!((echoed.status, echoed.json()["error"]["param"].clone()), (400, json!("echo")));
}
