//! Models every layer of which slides a window, through the engine: blocks that all windows have passed by are given back
//! while the sequence runs, and its tokens and log-probabilities stay the same bits. One layer that sees everything keeps
//! them all.

use rill_engine::kv::BlockId;
use rill_engine::{
    Clock, EngineConfig, EngineCore, Event, GenerateRequest, ModelRunner, Runner, RunnerError, Step, TokenText,
};
use rill_models::{ForwardInput, SourceOptions};
use rill_tests::{default_model, tiny_models};
use std::sync::Arc;

const BLOCK_SIZE: usize = 16;
const PROMPT: usize = 150;
const GENERATED: u32 = 250;

struct NoText;

impl TokenText for NoText {
    fn token_bytes(&self, _: u32) -> &[u8] {
        b""
    }

    fn is_special(&self, _: u32) -> bool {
        false
    }
}

/// The same model, but nobody is told of its windows.
struct Secretive(ModelRunner);

impl Runner for Secretive {
    fn vocab_size(&self) -> usize {
        self.0.vocab_size()
    }

    fn copy_blocks(&mut self, pairs: &[(BlockId, BlockId)]) -> Result<(), RunnerError> {
        self.0.copy_blocks(pairs)
    }

    fn block_bytes(&self) -> usize {
        self.0.block_bytes()
    }

    fn read_block(&mut self, block: BlockId, out: &mut Vec<u8>) -> Result<(), RunnerError> {
        self.0.read_block(block, out)
    }

    fn write_block(&mut self, block: BlockId, bytes: &[u8]) -> Result<(), RunnerError> {
        self.0.write_block(block, bytes)
    }

    fn forward(&mut self, input: &ForwardInput, logits: &mut Vec<f32>) -> Result<(), RunnerError> {
        self.0.forward(input, logits)
    }
}

fn request(seed: u64) -> GenerateRequest {
    let prompt = (0..PROMPT as u64).map(|i| ((i * i * 7 + i * (13 + seed) + 5) % 64) as u32).collect();
    let mut request = GenerateRequest::greedy(prompt, GENERATED);
    request.sampling.temperature = 1.0;
    request.sampling.seed = seed;
    GenerateRequest { logprobs: Some(3), ..request }
}

/// What three requests, two of one prompt, come to: tokens and bits of log-probabilities; and the most blocks they hold at a
/// time.
struct Outcome {
    tokens: Vec<Vec<(u32, u32)>>,
    held_most: usize,
    preemptions: u64,
}

fn run(name: &str, num_blocks: usize, told: bool) -> Outcome {
    let mut models = tiny_models::all();
    let mut model = models.remove(name).expect("a tiny model");
    model.config["max_position_embeddings"] = 512.into();
    let dir = tempfile::tempdir().expect("a temporary directory");
    model.write_directory(dir.path(), false);
    let path = dir.path().display().to_string();
    let files = rill_models::resolve(&path, &SourceOptions::from_env(), &mut rill_models::NoProgress);
    let loaded = rill_models::load(&files.expect("files"), &default_model::CPU).expect("it loads");
    let config = EngineConfig {
        block_size: BLOCK_SIZE,
        num_blocks,
        context_len: 512,
        max_batch_tokens: 48,
        max_running: 4,
        max_drafts: 0,
        ..EngineConfig::default()
    };
    let runner = ModelRunner::new(loaded.model, &config).expect("a small cache");
    let runner: Box<dyn Runner> = if told { Box::new(runner) } else { Box::new(Secretive(runner)) };
    // It stands still: how steps are cut up does not depend on the machine.
    let core = EngineCore::new(runner, Arc::new(NoText), config, Clock::manual(Arc::default()));
    let (mut core, handle) = core.expect("a valid configuration");
    let mut streams: Vec<_> =
        [1, 1, 2].into_iter().map(|seed| handle.submit(request(seed)).expect("accepted")).collect();
    let mut held_most = 0;
    while core.step().expect("the model runs") != Step::Idle {
        core.check_invariants().expect("an invariant");
        held_most = held_most.max(handle.stats().blocks_held());
    }
    let mut tokens = vec![Vec::new(); streams.len()];
    for (stream, tokens) in streams.iter_mut().zip(&mut tokens) {
        while let Some(event) = stream.try_next() {
            match event {
                Event::Delta { logprobs, .. } => {
                    tokens.extend(logprobs.iter().map(|token| (token.token, token.logprob.to_bits())));
                }
                Event::Finished { .. } => {}
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(tokens.len(), GENERATED as usize);
    }
    Outcome { tokens, held_most, preemptions: handle.stats().preemptions.get() }
}

#[test]
fn blocks_that_every_window_has_passed_by_are_given_back() {
    let all = (PROMPT + GENERATED as usize).div_ceil(BLOCK_SIZE);
    let kept = run("mistral", 4 * all, false);
    let given_back = run("mistral", 4 * all, true);
    assert_eq!(given_back.tokens, kept.tokens);
    // A window of 7 tokens, read from the beginning of a span of 64, and the 48 tokens of a step: 8 blocks of 16.
    println!("{} blocks held at most of {}", given_back.held_most, kept.held_most);
    assert!(
        given_back.held_most <= 3 * 9 && kept.held_most > all,
        "{} of {}",
        given_back.held_most,
        kept.held_most
    );
    // In a pool that the three would outgrow nobody is preempted.
    let tight = run("mistral", all + 3, true);
    assert_eq!((tight.tokens, tight.preemptions), (kept.tokens, 0));
    assert!(run("mistral", all + 3, false).preemptions > 0);
}

#[test]
fn one_layer_that_sees_everything_keeps_all_blocks() {
    let all = (PROMPT + GENERATED as usize).div_ceil(BLOCK_SIZE);
    let [told, untold] = [true, false].map(|told| run("gemma3", 4 * all, told));
    assert_eq!((told.held_most, told.tokens), (untold.held_most, untold.tokens));
}
