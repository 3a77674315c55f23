//! `GET /metrics`: Prometheus text, every series under rill's own name and, where vLLM has one, under vLLM's, which
//! gateways and autoscalers read unconfigured. Reads atomics only: never waits for a step.

use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;
use rill_engine::{Health, HistogramSnapshot, Outcome, Stats};

use crate::app::{AppState, unix_seconds};
use crate::auth::ApiKeys;
use crate::auth::account::{Account, Limit};
use crate::serving::Serving;

pub async fn metrics(State(state): State<Arc<AppState>>) -> impl IntoResponse {
    let mut page = Page::default();
    page.family("rill_ready", "gauge", "1 if the server takes work");
    page.sample("rill_ready", "", u64::from(state.ready().is_ok()));
    page.family("rill_http_requests_in_flight", "gauge", "Generation requests being answered");
    page.sample("rill_http_requests_in_flight", "", state.drain().in_flight());
    if state.keys().required() {
        keys(&mut page, state.keys());
    }
    if let Ok(serving) = state.serving() {
        engine(&mut page, serving);
    }
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], page.text)
}

/// One series a name of a key: the operator's own, not what requests bring.
fn keys(page: &mut Page, keys: &ApiKeys) {
    page.family("rill_unauthorized_requests_total", "counter", "Requests without a valid key");
    page.sample("rill_unauthorized_requests_total", "", keys.refused());
    let accounts = keys.accounts();
    let mut each = |name: &str, kind: &str, help: &str, value: &dyn Fn(&Account) -> u64| {
        page.family(name, kind, help);
        for account in &accounts {
            page.sample(name, &format!("key=\"{}\"", escaped(account.name())), value(account));
        }
    };
    let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    each("rill_key_requests_in_flight", "gauge", "Requests under way", &|account| account.in_flight());
    each("rill_key_requests_total", "counter", "Requests taken", &|account| get(&account.counters.requests));
    each("rill_key_prompt_tokens_total", "counter", "Prompt tokens of ended requests", &|account| {
        get(&account.counters.prompt_tokens)
    });
    each("rill_key_generation_tokens_total", "counter", "Tokens generated in ended requests", &|account| {
        get(&account.counters.generation_tokens)
    });
    page.family("rill_key_limited_total", "counter", "Requests refused, by the limit they ran into");
    for account in &accounts {
        for limit in Limit::ALL {
            let labels = format!("key=\"{}\",limit=\"{}\"", escaped(account.name()), limit.label());
            page.sample("rill_key_limited_total", &labels, account.counters.limited(limit));
        }
    }
}

fn engine(page: &mut Page, serving: &Serving) {
    let stats = serving.engine.stats();
    let config = serving.engine.config();
    let model = format!("model_name=\"{}\"", escaped(&serving.names[0]));

    page.family("rill_engine_alive", "gauge", "1 unless the engine has died");
    page.sample("rill_engine_alive", &model, u64::from(!matches!(serving.engine.health(), Health::Dead(_))));

    page.both("num_requests_running", "gauge", "Sequences being computed", &model, stats.running());
    page.both("num_requests_waiting", "gauge", "Sequences in the queue", &model, stats.waiting());
    page.both("kv_cache_usage_perc", "gauge", "KV-cache blocks held, 0 to 1", &model, stats.kv_usage());
    page.own("waiting_tokens", "gauge", "Prompt tokens in the queue", &model, stats.waiting_tokens());
    page.own("kv_blocks", "gauge", "KV-cache blocks", &model, stats.blocks_total());
    page.own("kv_blocks_free", "gauge", "Blocks that hold nothing", &model, stats.blocks_free());
    page.own("kv_blocks_cached", "gauge", "Blocks held for reuse alone", &model, stats.blocks_cached());
    page.own("kv_blocks_held", "gauge", "Blocks sequences hold", &model, stats.blocks_held());
    page.own("forks_total", "counter", "Choices that shared another's prompt", &model, stats.forks.get());
    page.own("kv_block_copies_total", "counter", "Shared blocks copied", &model, stats.block_copies.get());
    page.own("kv_blocks_spilled_total", "counter", "Evicted blocks kept", &model, stats.blocks_spilled.get());
    page.own("kv_blocks_restored_total", "counter", "Blocks read back", &model, stats.blocks_restored.get());
    page.own("kv_blocks_lost_total", "counter", "Kept blocks missing or damaged", &model, stats.blocks_lost.get());
    page.own("steps_total", "counter", "Engine steps", &model, stats.steps.get());
    let seconds = |us: u64| us as f64 * 1e-6;
    page.own("step_seconds_total", "counter", "Time of engine steps", &model, seconds(stats.step_us.get()));
    let help = "Time of steps spent waiting for token masks and following grammars";
    page.own("grammar_seconds_total", "counter", help, &model, seconds(stats.grammar_us.get()));
    let help = "Tokens drawn under a grammar";
    page.own("grammar_tokens_total", "counter", help, &model, stats.grammar_tokens.get());

    let cache = format!(
        "{model},block_size=\"{}\",num_gpu_blocks=\"{}\",enable_prefix_caching=\"{}\"",
        config.block_size, config.num_blocks, config.prefix_caching
    );
    page.both("cache_config_info", "gauge", "KV-cache configuration", &cache, 1);
    page.family("vllm:lora_requests_info", "gauge", "LoRA adapters; the value is a Unix time");
    let [running, waiting] = serving.adapters.in_use().map(|names| escaped(&names.join(",")));
    let lora = format!(
        "max_lora=\"{}\",running_lora_adapters=\"{running}\",waiting_lora_adapters=\"{waiting}\"",
        serving.adapters.count_max()
    );
    page.sample("vllm:lora_requests_info", &lora, unix_seconds());

    for (name, help, value) in [
        ("prompt_tokens_total", "Prompt tokens of requests taken up", stats.prompt_tokens.get()),
        ("generation_tokens_total", "Tokens generated", stats.generation_tokens.get()),
        ("num_preemptions_total", "Sequences preempted", stats.preemptions.get()),
        ("prefix_cache_queries_total", "Prompt tokens looked up", stats.prefix_cache_queries.get()),
        ("prefix_cache_hits_total", "Prompt tokens found", stats.prefix_cache_hits.get()),
        ("spec_decode_num_draft_tokens_total", "Drafted tokens checked", stats.drafted_tokens.get()),
        ("spec_decode_num_accepted_tokens_total", "Drafted tokens accepted", stats.accepted_draft_tokens.get()),
    ] {
        page.both(name, "counter", help, &model, value);
    }
    finished(page, stats, &model);

    for (name, help, histogram) in [
        ("time_to_first_token_seconds", "Submission to first token", &stats.time_to_first_token_seconds),
        ("inter_token_latency_seconds", "Between tokens of a sequence", &stats.inter_token_latency_seconds),
        (
            "request_time_per_output_token_seconds",
            "Mean time between a request's tokens",
            &stats.request_time_per_output_token_seconds,
        ),
        ("e2e_request_latency_seconds", "Submission to end", &stats.e2e_request_latency_seconds),
        ("request_queue_time_seconds", "Submission to first step", &stats.request_queue_time_seconds),
        ("request_prefill_time_seconds", "First step to first token", &stats.request_prefill_time_seconds),
        ("request_decode_time_seconds", "First token to last", &stats.request_decode_time_seconds),
        ("request_inference_time_seconds", "First step to last token", &stats.request_inference_time_seconds),
        ("request_prompt_tokens", "Prompt tokens of a request", &stats.request_prompt_tokens),
        ("request_generation_tokens", "Tokens generated for a request", &stats.request_generation_tokens),
        ("iteration_tokens_total", "Tokens computed in a step", &stats.iteration_tokens),
    ] {
        let snapshot = histogram.snapshot();
        for prefix in ["rill_", "vllm:"] {
            page.histogram(&format!("{prefix}{name}"), help, &model, &snapshot);
        }
    }
}

fn finished(page: &mut Page, stats: &Stats, model: &str) {
    for name in ["rill_request_success_total", "vllm:request_success_total"] {
        page.family(name, "counter", "Requests ended, by why");
        for outcome in Outcome::ALL {
            let labels = format!("{model},finished_reason=\"{}\"", outcome.label());
            page.sample(name, &labels, stats.requests_finished(outcome));
        }
    }
}

/// The text under construction. Writing to a String cannot fail, hence the ignored results.
#[derive(Default)]
struct Page {
    text: String,
}

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = write!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    fn sample(&mut self, name: &str, labels: &str, value: impl std::fmt::Display) {
        let _ = if labels.is_empty() {
            writeln!(self.text, "{name} {value}")
        } else {
            writeln!(self.text, "{name}{{{labels}}} {value}")
        };
    }

    fn own(&mut self, name: &str, kind: &str, help: &str, labels: &str, value: impl std::fmt::Display) {
        let name = format!("rill_{name}");
        self.family(&name, kind, help);
        self.sample(&name, labels, value);
    }

    fn both(&mut self, name: &str, kind: &str, help: &str, labels: &str, value: impl std::fmt::Display + Copy) {
        self.own(name, kind, help, labels, value);
        let name = format!("vllm:{name}");
        self.family(&name, kind, help);
        self.sample(&name, labels, value);
    }

    fn histogram(&mut self, name: &str, help: &str, labels: &str, snapshot: &HistogramSnapshot) {
        self.family(name, "histogram", help);
        for (bound, count) in &snapshot.buckets {
            let _ = writeln!(self.text, "{name}_bucket{{{labels},le=\"{bound}\"}} {count}");
        }
        let _ = writeln!(self.text, "{name}_bucket{{{labels},le=\"+Inf\"}} {}", snapshot.count);
        let _ = writeln!(self.text, "{name}_sum{{{labels}}} {}", snapshot.sum);
        let _ = writeln!(self.text, "{name}_count{{{labels}}} {}", snapshot.count);
    }
}

/// A label value as the text format wants it.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}
