//! A runner whose logits are a hash of the whole context it sees, read back through block tables and slots: a wrong,
//! stale or overwritten block anywhere in a sequence's past changes its tokens.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use rill_engine::kv::BlockId;
use rill_engine::{Runner, RunnerError, TokenText};
use rill_models::{ForwardInput, Ranking};

/// Token 0 ends a text; both 0 and 1 are control tokens.
pub const EOS: u32 = 0;

/// What each token stands for: letters that make stop strings likely, whole and split characters, broken bytes.
const PIECES: [&[u8]; 32] = [
    b"<eos>",
    b"<ctl>",
    b"a",
    b"b",
    b"c",
    b"ab",
    b"bc",
    b" a",
    b" ",
    b"\n",
    b"cab",
    b"aa",
    b"\xc3\xa9",
    b"\xc3",
    b"\xa9",
    b"\xf0\x9f",
    b"\x98",
    b"\x80",
    b"\xf0\x9f\x98\x80",
    b"\xff",
    b"\xe2\x82\xac",
    b"\xe2\x82",
    b"\xac",
    b"",
    b"d",
    b"e",
    b"f",
    b"g",
    b"h",
    b"i",
    b"j",
    b"\xed\xa0\x80",
];

pub const VOCAB: usize = PIECES.len();

/// The fake model's tokenizer.
pub struct FakeText;

impl TokenText for FakeText {
    fn token_bytes(&self, id: u32) -> &[u8] {
        PIECES.get(id as usize).copied().unwrap_or_default()
    }

    fn is_special(&self, id: u32) -> bool {
        id < 2
    }
}

fn mix(state: u64, word: u64) -> u64 {
    let z = (state ^ word).wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// All the model knows after some tokens.
#[derive(Clone, Copy, Default)]
pub struct Context {
    seen: u64,
    last: u64,
}

/// Low bits of an entry, where its token is.
const TOKEN_BITS: u64 = 0xff;

impl Context {
    /// What a token adds to the KV cache, given all before it.
    pub fn entry(self, token: u32, position: usize) -> u64 {
        mix(mix(self.seen, u64::from(token)), position as u64) & !TOKEN_BITS | u64::from(token)
    }

    pub fn then(self, entry: u64) -> Context {
        Context { seen: mix(self.seen.rotate_left(7), entry), last: entry & TOKEN_BITS }
    }

    /// Next-token logits, in [-4, 4), but for a token that often follows the last one: texts repeat themselves. The end
    /// token is likely enough to be met.
    pub fn logits(self, out: &mut Vec<f32>) {
        let habit = (self.last * 3 + 2) % VOCAB as u64;
        let strong = !self.seen.is_multiple_of(4);
        out.extend((0..VOCAB as u64).map(|id| {
            let hashed = (mix(self.seen, id) >> 40) as f32 / (1 << 24) as f32 * 8.0 - 4.0;
            if strong && id == habit { hashed + 8.0 } else { hashed }
        }));
    }
}

/// What the next forward passes are to do; shared with the test.
#[derive(Default)]
pub struct Faults {
    /// So many passes from now one fails; 0 is never.
    pub fail_batch_in: AtomicU32,
    /// So many passes from now one returns what is no number.
    pub spoil_in: AtomicU32,
    pub die_in: AtomicU32,
    pub panic_in: AtomicU32,
    /// A clock that each pass moves, by what is read once and by what each row costs.
    pub now_us: Arc<AtomicU64>,
}

impl Faults {
    fn due(counter: &AtomicU32) -> bool {
        let left = counter.load(Ordering::Relaxed);
        if left > 0 {
            counter.store(left - 1, Ordering::Relaxed);
        }
        left == 1
    }
}

pub struct FakeRunner {
    block_size: usize,
    /// One entry a slot.
    kv: Vec<u64>,
    /// Entries before its own that a token sees.
    pub window: Option<usize>,
    faults: Arc<Faults>,
    /// Whether it pretends to compute while the engine does something else.
    aside: bool,
    started: Option<Started>,
    starts: u64,
}

/// A step under way.
struct Started {
    input: ForwardInput,
    /// Every other step is computed when it is asked for, the others when they are started: a device may do either.
    computed: Option<Result<Vec<f32>, RunnerError>>,
}

impl FakeRunner {
    pub fn new(num_blocks: usize, block_size: usize, faults: Arc<Faults>) -> FakeRunner {
        let kv = vec![u64::MAX; num_blocks * block_size];
        FakeRunner { block_size, kv, window: None, faults, aside: false, started: None, starts: 0 }
    }

    /// The same, computing while the engine does something else.
    pub fn aside(self, aside: bool) -> FakeRunner {
        FakeRunner { aside, ..self }
    }
}

impl Runner for FakeRunner {
    fn vocab_size(&self) -> usize {
        VOCAB
    }

    fn window_tokens(&self) -> Option<usize> {
        self.window
    }

    fn copy_blocks(&mut self, pairs: &[(BlockId, BlockId)]) -> Result<(), RunnerError> {
        assert!(self.started.is_none(), "a step is under way");
        for &(from, to) in pairs {
            let from = from as usize * self.block_size;
            self.kv.copy_within(from..from + self.block_size, to as usize * self.block_size);
        }
        Ok(())
    }

    fn block_bytes(&self) -> usize {
        8 * self.block_size
    }

    fn read_block(&mut self, block: BlockId, out: &mut Vec<u8>) -> Result<(), RunnerError> {
        assert!(self.started.is_none(), "a step is under way");
        out.clear();
        let entries = &self.kv[block as usize * self.block_size..][..self.block_size];
        out.extend(entries.iter().flat_map(|entry| entry.to_le_bytes()));
        Ok(())
    }

    fn write_block(&mut self, block: BlockId, bytes: &[u8]) -> Result<(), RunnerError> {
        assert!(self.started.is_none(), "a step is under way");
        let entries = &mut self.kv[block as usize * self.block_size..][..self.block_size];
        for (entry, bytes) in entries.iter_mut().zip(bytes.chunks_exact(8)) {
            *entry = u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
        }
        Ok(())
    }

    fn start(&mut self, input: &ForwardInput, ranking: Option<&Ranking>) -> Result<bool, RunnerError> {
        assert!(self.started.is_none() && ranking.is_none(), "one step at a time, of whole rows");
        if self.aside {
            self.starts += 1;
            let computed = self.starts.is_multiple_of(2).then(|| {
                let mut logits = Vec::new();
                self.compute(input, &mut logits).map(|()| logits)
            });
            // A step may fail before it is waited for.
            if let Some(Err(error)) = &computed
                && self.starts.is_multiple_of(4)
            {
                return Err(error.clone());
            }
            self.started = Some(Started { input: input.clone(), computed });
        }
        Ok(self.aside)
    }

    fn forward(&mut self, input: &ForwardInput, logits: &mut Vec<f32>) -> Result<(), RunnerError> {
        let Some(started) = self.started.take() else { return self.compute(input, logits) };
        let same = |of: fn(&ForwardInput) -> &Vec<u32>| of(&started.input) == of(input);
        assert!(same(|i| &i.token_ids) && same(|i| &i.slot_mapping) && same(|i| &i.logit_rows), "another step");
        match started.computed {
            Some(computed) => *logits = computed?,
            None => self.compute(input, logits)?,
        }
        Ok(())
    }
}

impl FakeRunner {
    fn compute(&mut self, input: &ForwardInput, logits: &mut Vec<f32>) -> Result<(), RunnerError> {
        self.faults.now_us.fetch_add(1000 + 50 * input.rows() as u64, Ordering::Relaxed);
        assert!(!Faults::due(&self.faults.panic_in), "an injected panic");
        if Faults::due(&self.faults.die_in) {
            return Err(RunnerError::Fatal("an injected death".into()));
        }
        if Faults::due(&self.faults.fail_batch_in) {
            // What a failed pass leaves behind must never be read.
            for &slot in &input.slot_mapping {
                self.kv[slot as usize] = 0xbad;
            }
            return Err(RunnerError::Batch("an injected failure".into()));
        }
        logits.clear();
        let mut wanted = input.logit_rows.iter().copied().peekable();
        for sequence in 0..input.sequences() {
            let range = |starts: &[u32]| starts[sequence] as usize..starts[sequence + 1] as usize;
            let table = &input.block_tables[range(&input.block_table_starts)];
            let rows = range(&input.query_starts);
            let slot = |position: usize| {
                table[position / self.block_size] as usize * self.block_size + position % self.block_size
            };
            let first = input.context_lens[sequence] as usize - rows.len();
            let mut context = Context::default();
            for (position, row) in (first..).zip(rows) {
                let seen = position.saturating_sub(self.window.unwrap_or(usize::MAX));
                if position == first || seen > 0 {
                    context =
                        (seen..position).fold(Context::default(), |seen, past| seen.then(self.kv[slot(past)]));
                }
                assert_eq!(input.positions[row] as usize, position);
                assert_eq!(input.slot_mapping[row] as usize, slot(position));
                let entry = context.entry(input.token_ids[row], position);
                self.kv[slot(position)] = entry;
                context = context.then(entry);
                if wanted.next_if_eq(&(row as u32)).is_some() {
                    context.logits(logits);
                }
            }
        }
        assert_eq!(wanted.next(), None, "logit rows ascend and exist");
        if Faults::due(&self.faults.spoil_in) {
            logits.fill(f32::NAN);
        }
        Ok(())
    }
}
