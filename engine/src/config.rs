//! The engine's sizes and limits, checked once at start.

/// Every bound the engine keeps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineConfig {
    /// Tokens a KV-cache block holds.
    pub block_size: usize,
    /// Blocks in the KV cache.
    pub num_blocks: usize,
    /// Longest sequence, prompt and generated tokens together.
    pub context_len: usize,
    /// Tokens one step computes at most, over all sequences. At least `max_running`.
    pub max_batch_tokens: usize,
    /// Sequences that compute at the same time.
    pub max_running: usize,
    /// Requests that wait for their first step.
    pub max_waiting: usize,
    /// Prompt tokens of waiting requests. A single larger prompt is taken when nothing else waits.
    pub max_waiting_tokens: usize,
    /// A request that has waited longer fails as overloaded. `None`: no limit.
    pub max_queue_wait_ms: Option<u64>,
    /// Keep the blocks of finished sequences for later prompts that begin alike.
    pub prefix_caching: bool,
    /// Tokens proposed to follow a sequence and checked in one step, at most. 0: none.
    pub max_drafts: usize,
}

impl Default for EngineConfig {
    fn default() -> EngineConfig {
        EngineConfig {
            block_size: 16,
            num_blocks: 1024,
            context_len: 2048,
            max_batch_tokens: 256,
            max_running: 64,
            max_waiting: 256,
            max_waiting_tokens: 1 << 20,
            max_queue_wait_ms: None,
            prefix_caching: true,
            max_drafts: 8,
        }
    }
}

/// A configuration value that cannot work.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} is {value}; it must be {must_be}")]
pub struct ConfigError {
    pub field: &'static str,
    pub value: usize,
    pub must_be: String,
}

/// Slots and positions are 32-bit.
const MAX_SLOTS: usize = u32::MAX as usize;

impl EngineConfig {
    /// Tokens the KV cache holds.
    pub fn capacity_tokens(&self) -> usize {
        self.block_size.saturating_mul(self.num_blocks)
    }

    pub fn validate(&self) -> Result<(), ConfigError> {
        let positive = [
            ("block_size", self.block_size),
            ("num_blocks", self.num_blocks),
            ("context_len", self.context_len),
            ("max_batch_tokens", self.max_batch_tokens),
            ("max_running", self.max_running),
            ("max_waiting", self.max_waiting),
            ("max_waiting_tokens", self.max_waiting_tokens),
        ];
        for (field, value) in positive {
            if value == 0 {
                return Err(ConfigError { field, value, must_be: "above 0".into() });
            }
        }
        for (field, value) in
            [("num_blocks * block_size", self.capacity_tokens()), ("context_len", self.context_len)]
        {
            if value > MAX_SLOTS {
                return Err(ConfigError { field, value, must_be: format!("at most {MAX_SLOTS}") });
            }
        }
        if self.max_batch_tokens < self.max_running {
            return Err(ConfigError {
                field: "max_batch_tokens",
                value: self.max_batch_tokens,
                must_be: format!("at least max_running ({}), a token a sequence", self.max_running),
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_bound_is_named_with_its_value() {
        assert_eq!(EngineConfig::default().validate(), Ok(()));
        let check = |config: EngineConfig, message: &str| {
            assert_eq!(config.validate().unwrap_err().to_string(), message);
        };
        let base = EngineConfig::default;
        check(EngineConfig { block_size: 0, ..base() }, "block_size is 0; it must be above 0");
        check(
            EngineConfig { max_batch_tokens: 8, max_running: 9, ..base() },
            "max_batch_tokens is 8; it must be at least max_running (9), a token a sequence",
        );
        check(
            EngineConfig { num_blocks: 1 << 30, ..base() },
            "num_blocks * block_size is 17179869184; it must be at most 4294967295",
        );
    }
}
