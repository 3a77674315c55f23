//! `GET /debug/engine`, where `--debug-endpoints` allows it: queues, blocks, caches and every sequence, as the engine sees
//! them between two steps.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use rill_engine::SequenceState;

use crate::app::AppState;
use crate::protocol::ApiError;
use crate::protocol::debug::{
    EngineBlocks, EngineBody, EnginePrefixCache, EngineSequence, EngineSpeculation, EngineSpill,
};

/// A step may be under way.
const PATIENCE: Duration = Duration::from_secs(5);

pub async fn engine(State(state): State<Arc<AppState>>) -> Result<Json<EngineBody>, ApiError> {
    if !state.debug_endpoints() {
        return Err(ApiError::route_not_found("GET", "/debug/engine"));
    }
    let engine = &state.serving()?.engine;
    let inspected = tokio::time::timeout(PATIENCE, engine.inspect()).await.ok().flatten();
    let Some(now) = inspected else { return Err(ApiError::unavailable("the engine does not answer", 1)) };
    let stats = engine.stats();
    Ok(Json(EngineBody {
        steps: stats.steps.get(),
        running: stats.running(),
        waiting: stats.waiting(),
        waiting_tokens: stats.waiting_tokens(),
        tenants: now.tenants,
        preemptions: stats.preemptions.get(),
        forks: stats.forks.get(),
        blocks: EngineBlocks {
            size: engine.config().block_size,
            total: stats.blocks_total(),
            free: stats.blocks_free(),
            cached: stats.blocks_cached(),
            held: stats.blocks_held(),
            copied: stats.block_copies.get(),
        },
        prefix_cache: EnginePrefixCache {
            queried_tokens: stats.prefix_cache_queries.get(),
            hit_tokens: stats.prefix_cache_hits.get(),
        },
        speculation: EngineSpeculation {
            drafted_tokens: stats.drafted_tokens.get(),
            accepted_tokens: stats.accepted_draft_tokens.get(),
        },
        spill: EngineSpill {
            blocks: now.blocks_spilled,
            spilled: stats.blocks_spilled.get(),
            restored: stats.blocks_restored.get(),
            lost: stats.blocks_lost.get(),
        },
        running_sequences: now.running.into_iter().map(sequence).collect(),
        waiting_sequences: now.waiting.into_iter().map(sequence).collect(),
        sequences_not_listed: now.untold,
    }))
}

fn sequence(state: SequenceState) -> EngineSequence {
    EngineSequence {
        arrival: state.arrival,
        priority: state.priority,
        tenant: state.tenant,
        prompt_tokens: state.prompt_tokens,
        generated_tokens: state.generated_tokens,
        computed_tokens: state.computed_tokens,
        cached_prompt_tokens: state.cached_prompt_tokens,
        blocks: state.blocks,
        preempted: state.preempted,
        age_ms: state.age_ms,
    }
}
