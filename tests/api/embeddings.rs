//! `/v1/embeddings`: what goes in, what comes out, and that a text's vector is its own whatever else runs.

use rill_models::Pooling;
use serde_json::{Value, json};

use crate::scripted_runner::{HIDDEN_SIZE, hidden_state};
use crate::test_server::{self, MODEL, Setup, TestServer};

fn server(pooling: Pooling) -> TestServer {
    test_server::start_with(Setup { pooling, ..Setup::default() })
}

fn vectors(answer: &Value) -> Vec<Vec<f32>> {
    let data = answer["data"].as_array().unwrap().iter().enumerate();
    data.map(|(index, item)| {
        assert_eq!((&item["object"], &item["index"]), (&json!("embedding"), &json!(index)));
        item["embedding"].as_array().unwrap().iter().map(|value| value.as_f64().unwrap() as f32).collect()
    })
    .collect()
}

fn scaled(values: &[f64]) -> Vec<f32> {
    let length = values.iter().map(|value| value * value).sum::<f64>().sqrt();
    values.iter().map(|value| (value / length) as f32).collect()
}

fn expected(pooling: Pooling, ids: &[u32], dimensions: usize) -> Vec<f32> {
    let from = if pooling == Pooling::Mean { 0 } else { ids.len() - 1 };
    let mut sum = vec![0.0; HIDDEN_SIZE];
    for (position, &id) in ids.iter().enumerate().skip(from) {
        hidden_state(id, position as u32).iter().zip(&mut sum).for_each(|(&value, sum)| *sum += f64::from(value));
    }
    let count = (ids.len() - from) as f64;
    scaled(&sum[..dimensions].iter().map(|sum| sum / count).collect::<Vec<_>>())
}

#[track_caller]
fn assert_close(got: &[f32], wanted: &[f32]) {
    assert_eq!(got.len(), wanted.len());
    assert!(got.iter().zip(wanted).all(|(a, b)| (a - b).abs() < 1e-6), "{got:?} instead of {wanted:?}");
}

#[test]
fn every_form_of_input() {
    let ids: Vec<u32> = b"abc".iter().map(|&byte| byte.into()).collect();
    for pooling in [Pooling::Mean, Pooling::Last] {
        let server = server(pooling);
        for (input, wanted) in [
            (json!("abc"), vec![&ids[..]]),
            (json!(["abc", "a"]), vec![&ids, &ids[..1]]),
            (json!([97, 98, 99]), vec![&ids]),
            (json!([[97, 98], [97]]), vec![&ids[..2], &ids[..1]]),
        ] {
            let answer = server.ok("/v1/embeddings", json!({"input": input, "model": MODEL}));
            assert_eq!((&answer["object"], &answer["model"]), (&json!("list"), &json!(MODEL)));
            let tokens: usize = wanted.iter().map(|ids| ids.len()).sum();
            assert_eq!(answer["usage"], json!({"prompt_tokens": tokens, "total_tokens": tokens}));
            let got = vectors(&answer);
            assert_eq!(got.len(), wanted.len());
            for (got, ids) in got.iter().zip(wanted) {
                assert_close(got, &expected(pooling, ids, HIDDEN_SIZE));
            }
        }
        server.assert_idle_soon();
    }
}

#[test]
fn fewer_dimensions_are_scaled_again_and_base64_holds_the_same() {
    use base64::Engine as _;

    let server = server(Pooling::Mean);
    let of = |body: Value| server.ok("/v1/embeddings", body);
    let two = of(json!({"input": "hey", "dimensions": 2, "encoding_format": "float", "user": "u"}));
    assert_close(&vectors(&two)[0], &expected(Pooling::Mean, &[104, 101, 121][..], 2));
    let text = of(json!({"input": "hey", "dimensions": 2, "encoding_format": "base64"}));
    let bytes =
        base64::engine::general_purpose::STANDARD.decode(text["data"][0]["embedding"].as_str().unwrap()).unwrap();
    let values: Vec<f32> = bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    assert_eq!(values, vectors(&two)[0]);
}

/// Longer than a step's budget, twice (so that the second finds the first in the prefix cache), among others.
#[test]
fn chunks_caches_and_neighbours_change_nothing() {
    for pooling in [Pooling::Mean, Pooling::Last] {
        let server = server(pooling);
        let long: Vec<u32> = (0..300).map(|i| 32 + i * 7 % 90).collect();
        let alone = server.ok("/v1/embeddings", json!({"input": long}))["data"][0]["embedding"].clone();
        assert_close(
            &alone.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect::<Vec<_>>(),
            &expected(pooling, &long, HIDDEN_SIZE),
        );
        std::thread::scope(|scope| {
            for i in 0..4 {
                let server = &server;
                scope.spawn(move || {
                    let body = json!({"prompt": "x".repeat(20 + i), "max_tokens": 40, "ignore_eos": true});
                    server.ok("/v1/completions", body);
                });
            }
            let many: Vec<Value> =
                (0..40).map(|i| json!(if i % 2 == 0 { &long[..] } else { &long[..50 + i] })).collect();
            let answer = server.ok("/v1/embeddings", json!({"input": many}));
            for (index, item) in answer["data"].as_array().unwrap().iter().enumerate() {
                if index % 2 == 0 {
                    assert_eq!(item["embedding"], alone, "{index}");
                } else {
                    let values: Vec<f32> = vectors(&answer)[index].clone();
                    assert_close(&values, &expected(pooling, &long[..50 + index], HIDDEN_SIZE));
                }
            }
        });
        server.assert_idle_soon();
    }
}

#[test]
fn refusals_name_the_field() {
    let server = server(Pooling::Last);
    for (body, param, part) in [
        (json!({}), "input", "1 to 2048 texts, not 0"),
        (json!({"input": []}), "input", "not 0"),
        (json!({"input": ""}), "input", "must not be empty"),
        (json!({"input": ["a", ""]}), "input", "must not be empty"),
        (json!({"input": [[]]}), "input", "must not be empty"),
        (json!({"input": vec!["a"; 2049]}), "input", "not 2049"),
        (json!({"input": [9999]}), "input", "9999 is not a token id"),
        (json!({"input": 1}), "input", "expected a string"),
        (json!({"input": "a", "dimensions": 0}), "dimensions", "between 1 and 4, not 0"),
        (json!({"input": "a", "dimensions": 5}), "dimensions", "between 1 and 4, not 5"),
        (json!({"input": "a", "encoding_format": "int8"}), "encoding_format", "float or base64, not `int8`"),
        (json!({"input": "a".repeat(513)}), "input", "513 tokens"),
        (json!({"input": "a", "truncate_prompt_tokens": 3}), "truncate_prompt_tokens", "not supported"),
    ] {
        let refused = server.post("/v1/embeddings", &body.to_string());
        assert_eq!(refused.status, 400, "{body}: {}", refused.text());
        let error = refused.json()["error"].clone();
        assert_eq!(error["param"], param, "{error}");
        assert!(error["message"].as_str().unwrap().contains(part), "{error}");
    }
    assert_eq!(server.post("/v1/embeddings", r#"{"input":"a","model":"other"}"#).status, 404);
    let none = self::server(Pooling::Other);
    assert_eq!(none.post("/v1/embeddings", r#"{"input":"a"}"#).status, 400);
}
