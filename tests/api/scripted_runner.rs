//! A runner whose greedy tokens spell a text, with knobs for slowness, stalls, failure and panic.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use rill_engine::kv::BlockId;
use rill_engine::{Runner, RunnerError};
use rill_models::ForwardInput;

use crate::tiny_tokenizer::VOCAB_SIZE;

/// What greedy decoding says, from the position in the sequence on; characters of one to four bytes.
pub const SCRIPT: &str = "Ein Bächlein — 小川 🏞️ says \"hello\\there\"\n\tand goes on; ";

/// How the runner behaves, from outside.
#[derive(Default)]
pub struct Knobs {
    step_delay_ms: AtomicU64,
    fail: AtomicBool,
    fail_batch: AtomicBool,
    stalled: Mutex<bool>,
    resumed: Condvar,
}

impl Knobs {
    /// Each step takes this long.
    pub fn slow(&self, step_delay: Duration) {
        self.step_delay_ms.store(step_delay.as_millis() as u64, Ordering::SeqCst);
    }

    /// No step ends until `resume`.
    pub fn stall(&self) {
        *self.stalled.lock().expect("not poisoned") = true;
    }

    pub fn resume(&self) {
        *self.stalled.lock().expect("not poisoned") = false;
        self.resumed.notify_all();
    }

    /// The next step ends the engine.
    pub fn fail(&self) {
        self.fail.store(true, Ordering::SeqCst);
    }

    /// The next step fails its requests alone.
    pub fn fail_batch(&self) {
        self.fail_batch.store(true, Ordering::SeqCst);
    }
}

pub struct ScriptedRunner {
    pub knobs: Arc<Knobs>,
    /// Tokens and positions of the last step's rows.
    rows: Vec<(u32, u32)>,
}

impl ScriptedRunner {
    pub fn new(knobs: Arc<Knobs>) -> Self {
        ScriptedRunner { knobs, rows: Vec::new() }
    }
}

pub const HIDDEN_SIZE: usize = 4;

/// What stands for a hidden state.
pub fn hidden_state(token: u32, position: u32) -> [f32; HIDDEN_SIZE] {
    let (token, position) = (token as f32, position as f32);
    [token + 1.0, position + 1.0, (token - 100.0) * 0.5, token * position * 0.01]
}

impl Runner for ScriptedRunner {
    fn vocab_size(&self) -> usize {
        VOCAB_SIZE
    }

    fn copy_blocks(&mut self, _: &[(BlockId, BlockId)]) -> Result<(), RunnerError> {
        // Its logits depend on nothing that is kept.
        Ok(())
    }

    fn block_bytes(&self) -> usize {
        0
    }

    fn read_block(&mut self, _: BlockId, _: &mut Vec<u8>) -> Result<(), RunnerError> {
        Ok(())
    }

    fn write_block(&mut self, _: BlockId, _: &[u8]) -> Result<(), RunnerError> {
        Ok(())
    }

    fn forward(&mut self, input: &ForwardInput, logits: &mut Vec<f32>) -> Result<(), RunnerError> {
        let delay = self.knobs.step_delay_ms.load(Ordering::SeqCst);
        if delay > 0 {
            std::thread::sleep(Duration::from_millis(delay));
        }
        let mut stalled = self.knobs.stalled.lock().expect("not poisoned");
        while *stalled {
            stalled = self.knobs.resumed.wait(stalled).expect("not poisoned");
        }
        drop(stalled);
        if self.knobs.fail.load(Ordering::SeqCst) {
            return Err(RunnerError::Fatal("the runner was told to fail".to_owned()));
        }
        if self.knobs.fail_batch.swap(false, Ordering::SeqCst) {
            return Err(RunnerError::Batch("this batch was told to fail".to_owned()));
        }
        self.rows = input.token_ids.iter().copied().zip(input.positions.iter().copied()).collect();
        logits.clear();
        for &row in &input.logit_rows {
            let (token, position) = (input.token_ids[row as usize], input.positions[row as usize]);
            logits.extend((0..VOCAB_SIZE).map(|candidate| logit(token, position, candidate)));
        }
        Ok(())
    }

    fn hidden_size(&self) -> usize {
        HIDDEN_SIZE
    }

    fn hidden_states(&mut self, rows: &[u32], out: &mut Vec<f32>) -> Result<(), RunnerError> {
        for &row in rows {
            let (token, position) = self.rows[row as usize];
            out.extend(hidden_state(token, position));
        }
        Ok(())
    }
}

/// The scripted byte is likeliest; the other printable ones are likely enough to be sampled; control tokens are not.
fn logit(token: u32, position: u32, candidate: usize) -> f32 {
    let script = SCRIPT.as_bytes();
    if candidate == usize::from(script[position as usize % script.len()]) {
        return 5.0;
    }
    if !(32..127).contains(&candidate) {
        return -30.0;
    }
    let mixed = (u64::from(token) << 40 | u64::from(position) << 16 | candidate as u64)
        .wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (mixed >> 40) as f32 / (1 << 24) as f32 * 4.0
}
