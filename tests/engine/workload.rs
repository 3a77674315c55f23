//! Random requests for the fake model: alike enough to share prefixes, different in everything else.

use rill_engine::{EngineConfig, GenerateRequest, SamplingParams, StopParams};

use crate::fake_runner::{EOS, VOCAB};

/// splitmix64 (Steele, Lea, Flood 2014): the whole run follows from its seed.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// From `low` up to and with `high`.
    pub fn between(&mut self, low: usize, high: usize) -> usize {
        low + self.below(high - low + 1)
    }

    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    pub fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len())]
    }
}

/// Texts that prompts begin with.
pub struct Prefixes(Vec<Vec<u32>>);

impl Prefixes {
    pub fn new(random: &mut Random, longest: usize) -> Prefixes {
        let tokens = |random: &mut Random| {
            let len = random.between(1, longest);
            (0..len).map(|_| random.below(VOCAB) as u32).collect()
        };
        Prefixes((0..3).map(|_| tokens(random)).collect())
    }
}

pub fn request(random: &mut Random, prefixes: &Prefixes, config: &EngineConfig) -> GenerateRequest {
    // Now and then one that is refused: longer than the context, or than the pool.
    let longest = if random.one_in(20) { config.context_len + 3 } else { config.context_len / 2 };
    let len = random.between(1, longest.max(1));
    let prefix = random.pick(&prefixes.0).clone();
    let shared = if random.one_in(4) { 0 } else { random.between(0, prefix.len()) };
    let mut prompt: Vec<u32> = prefix.into_iter().take(shared.min(len)).collect();
    while prompt.len() < len {
        prompt.push(random.below(VOCAB) as u32);
    }
    let most = *random.pick(&[8, 24, 24, 80]);
    let max_tokens = if random.one_in(12) { 0 } else { random.between(1, most) as u32 };
    let some_tokens = |random: &mut Random| {
        let count = random.below(3);
        (0..count).map(|_| random.between(2, VOCAB - 1) as u32).collect::<Vec<_>>()
    };
    GenerateRequest {
        prompt,
        sampling: SamplingParams {
            temperature: *random.pick(&[0.0, 0.0, 0.7, 1.0, 2.0]),
            top_p: *random.pick(&[1.0, 1.0, 0.9, 0.3]),
            top_k: *random.pick(&[0, 0, 1, 5, 100]),
            min_p: *random.pick(&[0.0, 0.0, 0.1]),
            seed: random.next(),
            presence_penalty: *random.pick(&[0.0, 0.0, 1.0]),
            frequency_penalty: *random.pick(&[0.0, 0.0, 0.5]),
            repetition_penalty: *random.pick(&[1.0, 1.0, 1.3]),
            logit_bias: if random.one_in(6) { vec![(random.below(VOCAB) as u32, 2.0)] } else { Vec::new() },
        },
        stop: StopParams {
            max_tokens,
            min_tokens: *random.pick(&[0, 0, 0, 3, 10]),
            eos_token_ids: if random.one_in(4) { Vec::new() } else { vec![EOS] },
            stop_token_ids: some_tokens(random),
            stop_strings: match random.below(4) {
                0 => vec!["ab".into(), "bca".into(), "\u{e9}".into()],
                1 => vec!["aab\n".into(), "\u{fffd}\u{fffd}".into()],
                _ => Vec::new(),
            },
            include_stop_str: random.one_in(3),
            skip_special_tokens: !random.one_in(3),
        },
        logprobs: random.one_in(4).then(|| random.below(4) as u32),
        prompt_logprobs: random.one_in(6).then(|| random.below(4) as u32),
        priority: *random.pick(&[0, 0, 0, -1, 1]),
        cache_salt: random.pick(&[None, None, None, Some("tenant a"), Some("tenant b")]).map(String::from),
        tenant: random.pick(&[None, Some("a"), Some("a"), Some("b")]).map(Into::into),
        grammar: None,
    }
}
