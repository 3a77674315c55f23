//! `/debug/engine`'s answer.

use schemars::JsonSchema;
use serde::Serialize;

#[derive(Debug, Serialize, JsonSchema)]
pub struct EngineBody {
    pub steps: u64,
    pub running: usize,
    pub waiting: usize,
    pub waiting_tokens: usize,
    /// Keys with requests under way; requests without a name are one.
    pub tenants: usize,
    pub preemptions: u64,
    /// Choices that started from another one's prompt.
    pub forks: u64,
    pub blocks: EngineBlocks,
    pub prefix_cache: EnginePrefixCache,
    pub speculation: EngineSpeculation,
    pub spill: EngineSpill,
    pub running_sequences: Vec<EngineSequence>,
    pub waiting_sequences: Vec<EngineSequence>,
    pub sequences_not_listed: usize,
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct EngineBlocks {
    /// Tokens a block holds.
    pub size: usize,
    pub total: usize,
    pub free: usize,
    pub cached: usize,
    pub held: usize,
    pub copied: u64,
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct EnginePrefixCache {
    pub queried_tokens: u64,
    pub hit_tokens: u64,
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct EngineSpeculation {
    pub drafted_tokens: u64,
    pub accepted_tokens: u64,
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct EngineSpill {
    /// What can be read back now.
    pub blocks: usize,
    pub spilled: u64,
    pub restored: u64,
    pub lost: u64,
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct EngineSequence {
    pub arrival: u64,
    pub priority: i32,
    pub tenant: Option<String>,
    pub prompt_tokens: usize,
    pub generated_tokens: usize,
    pub computed_tokens: usize,
    pub cached_prompt_tokens: usize,
    pub blocks: usize,
    pub preempted: bool,
    pub age_ms: u64,
}
