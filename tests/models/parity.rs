//! Parity on the real model: rill's logits, tokens and text against three independent implementations of the same file:
//! a plain f32 forward pass (the ground truth), candle-transformers' quantised llama, and llama.cpp (a fixture).
//!
//! Run with `--nocapture` for the figures.

mod divergence;
mod float_llama;

use candle_core::quantized::gguf_file;
use candle_core::{Device, Tensor};
use candle_transformers::models::quantized_llama::ModelWeights;
use divergence::{Divergence, Rows, argmax, logprob, measure, perplexity};
use float_llama::FloatLlama;
use rill_tests::default_model;
use rill_tests::reference::{Reference, english};
use rill_tests::single_sequence::SingleSequence;
use std::path::Path;

const BLOCK_SIZE: usize = 16;
/// Candle computes one position's logits a call; this many keep the test short.
const CANDLE_POSITIONS: usize = 512;
const CANDLE_CONTINUATION: usize = 16;

/// candle-transformers' own llama on the same quantised weights.
struct Candle(ModelWeights);

impl Candle {
    fn open(path: &Path) -> Candle {
        let mut file = std::fs::File::open(path).expect("the model file opens");
        let content = gguf_file::Content::read(&mut file).expect("candle reads the file");
        Candle(ModelWeights::from_gguf(content, &mut file, &Device::Cpu).expect("candle loads the model"))
    }

    fn last_logits(&mut self, tokens: &[u32], position: usize) -> Vec<f32> {
        let tokens = Tensor::new(tokens, &Device::Cpu).and_then(|t| t.unsqueeze(0)).expect("a tensor of ids");
        let logits = self.0.forward(&tokens, position).expect("candle runs");
        logits.flatten_all().and_then(|t| t.to_vec1()).expect("logits are f32")
    }

    fn logits(&mut self, tokens: &[u32]) -> Vec<f32> {
        self.0.clear_kv_cache();
        (0..tokens.len()).flat_map(|i| self.last_logits(&tokens[i..=i], i)).collect()
    }

    fn greedy(&mut self, prompt: &[u32], count: usize) -> Vec<u32> {
        self.0.clear_kv_cache();
        let mut out = vec![argmax(&self.last_logits(prompt, 0))];
        while out.len() < count {
            let position = prompt.len() + out.len() - 1;
            let next = argmax(&self.last_logits(&out[out.len() - 1..], position));
            out.push(next);
        }
        out
    }
}

fn rill() -> SingleSequence {
    SingleSequence::new(default_model::load().model, BLOCK_SIZE, 2048).expect("a small KV cache fits")
}

fn greedy(model: &mut SingleSequence, prompt: &[u32], count: usize) -> Vec<u32> {
    model.restart();
    let mut out = vec![argmax(&model.step(prompt, false).expect("rill runs"))];
    while out.len() < count {
        let next = argmax(&model.step(&out[out.len() - 1..], false).expect("rill runs"));
        out.push(next);
    }
    out
}

/// How long two continuations are the same.
fn agreement(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(x, y)| x == y).count()
}

/// Top-1 agreement with llama.cpp's fixture, and the mean absolute difference of the log-probabilities of its ten
/// most likely tokens.
fn against_llama_cpp(reference: &Reference, rows: &Rows) -> (f64, f64) {
    let (mut agreed, mut error) = (0, 0.0);
    let positions = rows.count().min(reference.positions.len());
    for (index, position) in reference.positions[..positions].iter().enumerate() {
        let row = rows.row(index);
        agreed += usize::from(argmax(row) == position.ids[0]);
        for (id, theirs) in position.ids.iter().zip(&position.logprobs) {
            error += (logprob(row, *id) - f64::from(*theirs)).abs() / position.ids.len() as f64;
        }
    }
    (agreed as f64 / positions as f64, error / positions as f64)
}

#[test]
fn logits_agree_with_every_independent_implementation() {
    let path = default_model::gguf_path();
    let reference = Reference::read();
    default_model::check_sha256(&path, &reference.model_sha256);
    let tokens = &reference.tokens[..reference.positions.len()];
    let next = &reference.tokens[1..];

    let mut model = rill();
    let vocab_size = model.vocab_size();
    let ours = model.logits(tokens, 128).expect("rill runs");
    let truth = FloatLlama::open(&path).and_then(|llama| llama.logits(tokens)).expect("the f32 pass runs");
    let candle = Candle::open(&path).logits(&tokens[..CANDLE_POSITIONS]);
    let rows = |logits| Rows { logits, vocab_size };
    let (ours, truth, candle) = (rows(&ours), rows(&truth), rows(&candle));

    let all = measure(&truth, &ours);
    let first = CANDLE_POSITIONS * vocab_size;
    let ours_first = measure(&truth, &rows(&ours.logits[..first]));
    let candle_first = measure(&truth, &candle);
    let direct = measure(&candle, &ours);
    println!("rill   vs f32   : {all}");
    println!("rill   vs f32   : {ours_first}");
    println!("candle vs f32   : {candle_first}");
    println!("rill   vs candle: {direct}");
    let (agreed, error) = against_llama_cpp(&reference, &ours);
    println!("rill   vs llama.cpp: top-1 {:.2} %, mean |Δ logprob| of its top ten {error:.5}", agreed * 100.0);
    let (truth_agreed, truth_error) = against_llama_cpp(&reference, &truth);
    println!(
        "f32    vs llama.cpp: top-1 {:.2} %, mean |Δ logprob| of its top ten {truth_error:.5}",
        truth_agreed * 100.0
    );
    let ours_perplexity = perplexity(&ours, next);
    let truth_perplexity = perplexity(&truth, next);
    println!(
        "perplexity of {} positions: rill {ours_perplexity:.4}, f32 {truth_perplexity:.4}, llama.cpp {:.4}",
        tokens.len(),
        reference.perplexity
    );
    println!(
        "perplexity of {CANDLE_POSITIONS} positions: rill {:.4}, candle {:.4}",
        perplexity(&rows(&ours.logits[..first]), next),
        perplexity(&candle, next)
    );

    let within =
        |what: &str, value: f64, limit: f64| assert!(value <= limit, "{what} is {value}, the limit is {limit}");
    let at_least =
        |what: &str, value: f64, limit: f64| assert!(value >= limit, "{what} is {value}, at least {limit}");
    // Quantising activations costs both the same; rill may not lose more than candle does.
    let no_worse = |what: &str, of: fn(&Divergence) -> f64, slack: f64| {
        within(what, of(&ours_first), of(&candle_first) * slack);
    };
    no_worse("mean logit error", |d| d.error_mean, 1.05);
    no_worse("mean KL divergence", |d| d.kl_mean, 1.05);
    within("mean logit error against f32", all.error_mean, 0.25);
    within("mean KL divergence against f32", all.kl_mean, 0.006);
    at_least("top-1 agreement with f32", all.top1_agreement, 0.95);
    at_least("top-1 agreement with candle", direct.top1_agreement, 0.94);
    at_least("top-1 agreement with llama.cpp", agreed, 0.94);
    within("mean log-probability error against llama.cpp", error, 0.12);
    within("perplexity over f32's", (ours_perplexity / truth_perplexity - 1.0).abs(), 0.01);
}

#[test]
fn greedy_continuations_agree_up_to_near_ties() {
    let reference = Reference::read();
    let path = default_model::gguf_path();
    let mut model = rill();
    let mut candle = Candle::open(&path);
    let truth = FloatLlama::open(&path).expect("the weights dequantise");
    let vocab_size = model.vocab_size();
    let (mut steps, mut as_llama_cpp, mut as_truth, mut llama_cpp_as_truth, mut whole) = (0, 0, 0, 0, 0);
    let (mut candle_agreement, mut candle_steps) = (0, 0);
    let (mut lead_max, mut llama_cpp_lead_max) = (0f64, 0f64);
    for continuation in &reference.continuations {
        let (prompt, expected) = (&continuation.prompt, &continuation.tokens);
        let ours = greedy(&mut model, prompt, expected.len());
        let same = agreement(&ours, expected);
        whole += usize::from(same == expected.len());
        let count = expected.len().min(CANDLE_CONTINUATION);
        let candles = agreement(&ours, &candle.greedy(prompt, count));
        candle_agreement += candles;
        candle_steps += count;
        let end: String = continuation.text.chars().skip(continuation.text.chars().count().max(40) - 40).collect();
        println!(
            "{same:>2} of {:>2} tokens as llama.cpp, {candles:>2} of {count:>2} as candle: {end:?}",
            expected.len()
        );
        // After a near-tie goes the other way two texts are different texts. So that every step counts, follow
        // llama.cpp's tokens and look at each choice beside what the f32 pass thinks of it.
        let mut followed = prompt.clone();
        followed.extend(&expected[..expected.len() - 1]);
        let logits = model.logits(&followed, 256).expect("rill runs");
        let truth = truth.logits(&followed).expect("the f32 pass runs");
        let (rows, truth) = (Rows { logits: &logits, vocab_size }, Rows { logits: &truth, vocab_size });
        for (index, token) in expected.iter().enumerate() {
            let at = prompt.len() - 1 + index;
            let (choice, best, row) = (argmax(rows.row(at)), argmax(truth.row(at)), truth.row(at));
            steps += 1;
            as_llama_cpp += usize::from(choice == *token);
            as_truth += usize::from(choice == best);
            llama_cpp_as_truth += usize::from(*token == best);
            lead_max = lead_max.max(logprob(row, best) - logprob(row, choice));
            llama_cpp_lead_max = llama_cpp_lead_max.max(logprob(row, best) - logprob(row, *token));
        }
    }
    println!("{whole} of 20 continuations the same as llama.cpp's to their end");
    println!(
        "free-running beside candle: {candle_agreement} of {candle_steps} tokens before the first difference"
    );
    println!(
        "of {steps} choices: rill as llama.cpp {as_llama_cpp}, rill as f32 {as_truth}, llama.cpp as f32 {llama_cpp_as_truth}"
    );
    println!(
        "f32's best leads their choice by at most: rill {lead_max:.3}, llama.cpp {llama_cpp_lead_max:.3} nats"
    );
    assert_eq!(reference.continuations.len(), 20);
    assert!(as_llama_cpp * 100 >= steps * 95, "{as_llama_cpp} of {steps} choices as llama.cpp");
    assert!(as_truth * 100 >= steps * 96, "{as_truth} of {steps} choices as f32");
    assert!(lead_max < NEAR_TIE, "f32's best leads rill's choice by {lead_max} nats: no near-tie");
}

/// Nats by which the f32 pass's best token may lead the one that rill takes.
const NEAR_TIE: f64 = 0.6;

#[test]
fn tokens_are_llama_cpps_tokens() {
    let reference = Reference::read();
    let tokenizer = default_model::load().tokenizer;
    assert_eq!(tokenizer.encode(&english(), false, false).expect("encodes"), reference.tokens);
    assert_eq!(tokenizer.decode(&reference.tokens, false), english());
    for continuation in &reference.continuations {
        let parse_special = continuation.messages.is_some();
        let ids = tokenizer.encode(&continuation.text, false, parse_special).expect("encodes");
        assert_eq!(ids, continuation.prompt, "{:?}", continuation.text);
        assert_eq!(tokenizer.decode(&ids, false), continuation.text);
    }
}
