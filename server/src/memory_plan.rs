//! Whether a model fits this machine, before any of its weights is read: weights, KV cache and workspace against the
//! memory there is, and what would fit where that does not.

use rill_models::{MemoryNeeds, Quantize};

use crate::config::{EngineLimits, KvCacheBytes};

/// The process itself: code, threads, the tokenizer.
const PROCESS_BYTES: u64 = 96 << 20;
/// A cache of fewer tokens (or one context, if that is less) is of no use unless it was asked for.
const TOKENS_MIN: usize = 2048;

/// A model that does not fit, with the numbers and the ways out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct DoesNotFit(String);

/// Bytes of KV cache that fit beside everything else, over the model and the one that drafts for it.
///
/// # Errors
/// If they are fewer than asked for, or than would be of use.
pub fn kv_cache_bytes(
    model: &MemoryNeeds,
    draft: Option<&MemoryNeeds>,
    limits: &EngineLimits,
    quantize: Option<Quantize>,
    available: u64,
) -> Result<u64, DoesNotFit> {
    let needs = &draft.map_or(*model, |draft| model.beside(draft));
    let workspace = PROCESS_BYTES
        + (limits.batch_tokens_max * needs.step_bytes_per_token) as u64
        + 2 * (limits.running_max * needs.logits_bytes) as u64;
    let per_token = needs.kv_bytes_per_token.max(1) as u64;
    let useful = needs.context_len.min(TOKENS_MIN).next_multiple_of(limits.block_size) as u64 * per_token;
    let (asked, least) = match limits.kv_cache_bytes {
        KvCacheBytes::Exactly(bytes) => (bytes, bytes),
        KvCacheBytes::QuarterOf(available) => {
            let context = needs.context_len.next_multiple_of(limits.block_size) as u64;
            let all = context.saturating_mul(limits.running_max as u64).saturating_mul(per_token);
            let asked = (available / 4).min(all);
            (asked, asked.min(useful))
        }
    };
    let left = |quantize| available.saturating_sub(needs.weights(quantize) + workspace);
    if left(quantize) >= least {
        return Ok(asked.min(left(quantize)));
    }
    let mut ways = Vec::new();
    if least > useful && left(quantize) >= useful {
        let mib = left(quantize) >> 20;
        ways.push(format!("--kv-cache-memory {mib}MiB ({} tokens)", (mib << 20) / per_token));
    }
    for (option, bits) in [(Quantize::Q8, "q8"), (Quantize::Q4, "q4")] {
        let smaller = needs.weights(Some(option)) < needs.weights(quantize);
        if smaller && left(Some(option)) >= least.min(useful) {
            let cache = if left(Some(option)) >= least {
                String::new()
            } else {
                format!(" --kv-cache-memory {}MiB", left(Some(option)) >> 20)
            };
            let weights = size(needs.weights(Some(option)));
            ways.push(format!("--quantize {bits}{cache} (weights of {weights})"));
        }
    }
    if let Some(draft) = draft
        && kv_cache_bytes(model, None, limits, quantize, available).is_ok()
    {
        ways.push(format!("no --draft-model (its weights are {})", size(draft.weights(quantize))));
    }
    let ways = match ways.as_slice() {
        [] => "nothing rill offers makes it fit: take a smaller model, or a file of it in fewer bits".to_owned(),
        ways => format!("what would fit: {}", ways.join(", or ")),
    };
    Err(DoesNotFit(format!(
        "the model does not fit: weights {} + KV cache {} ({} tokens) + workspace {} = {}, and {} are available; {ways}. \
         --memory SIZE plans with another figure than what is available now",
        size(needs.weights(quantize)),
        size(least),
        least / per_token,
        size(workspace),
        size(needs.weights(quantize) + least + workspace),
        size(available),
    )))
}

/// `1.5 GiB`, `640 MiB`.
fn size(bytes: u64) -> String {
    const GIB: f64 = (1 << 30) as f64;
    if bytes >= 1 << 30 { format!("{:.1} GiB", bytes as f64 / GIB) } else { format!("{} MiB", bytes >> 20) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A 7B model in bf16: 14 GiB of weights, 128 KiB of cache a token.
    const NEEDS: MemoryNeeds = MemoryNeeds {
        as_stored: 14 << 30,
        in_eight: 8 << 30,
        in_four: 5 << 30,
        kv_bytes_per_token: 128 << 10,
        context_len: 32_768,
        step_bytes_per_token: 256 << 10,
        logits_bytes: 512 << 10,
    };

    fn limits(kv_cache_bytes: KvCacheBytes) -> EngineLimits {
        EngineLimits {
            running_max: 64,
            queue_max: 1,
            queue_tokens_max: 1,
            queue_wait_ms_max: None,
            batch_tokens_max: 256,
            block_size: 16,
            kv_cache_bytes,
            prefix_caching: true,
            drafts_max: 0,
            spill: None,
        }
    }

    fn plan(available: u64, exactly: Option<u64>, quantize: Option<Quantize>) -> Result<u64, String> {
        let kv = exactly.map_or(KvCacheBytes::QuarterOf(available), KvCacheBytes::Exactly);
        kv_cache_bytes(&NEEDS, None, &limits(kv), quantize, available).map_err(|error| error.to_string())
    }

    #[test]
    fn what_fits_gets_its_cache() {
        assert_eq!(plan(32 << 30, None, None), Ok(8 << 30));
        assert_eq!(plan(32 << 30, Some(1 << 30), None), Ok(1 << 30));
        // A quarter is too much here; what is left is enough to be of use.
        let left = plan(16 << 30, None, None).expect("it fits");
        assert!((1 << 30..2 << 30).contains(&left), "{left}");
    }

    #[test]
    fn what_does_not_fit_is_refused_with_numbers_and_ways_out() {
        let check = |plan: Result<u64, String>, parts: &[&str], never: &str| {
            let error = plan.expect_err("it does not fit");
            assert!(parts.iter().all(|part| error.contains(part)) && !error.contains(never), "{error}");
        };
        let too_much = plan(16 << 30, Some(4 << 30), None);
        let cache = ["14.0 GiB", "4.0 GiB", "16.0 GiB are available", "--kv-cache-memory 18", "--quantize q8 "];
        check(too_much, &cache, "nothing");
        check(plan(12 << 30, None, None), &["--quantize q8 (weights of 8.0 GiB)", "q4"], "--kv-cache-memory");
        check(plan(7 << 30, None, None), &["--quantize q4 (weights of 5.0 GiB)"], "q8");
        check(plan(7 << 30, None, Some(Quantize::Q8)), &["--quantize q4"], "q8");
        check(plan(2 << 30, None, None), &["nothing rill offers", "smaller model"], "--quantize");
    }

    /// A draft of 1 GiB whose cache takes a quarter of the model's.
    #[test]
    fn a_draft_model_counts_with_its_weights_and_its_cache() {
        let draft = MemoryNeeds {
            as_stored: 1 << 30,
            in_eight: 1 << 30,
            in_four: 1 << 30,
            kv_bytes_per_token: NEEDS.kv_bytes_per_token / 4,
            ..NEEDS
        };
        let plan = |available, kv| {
            kv_cache_bytes(&NEEDS, Some(&draft), &limits(kv), None, available).map_err(|error| error.to_string())
        };
        let exactly = KvCacheBytes::Exactly(1 << 30);
        assert_eq!(plan(17 << 30, exactly), Ok(1 << 30));
        let error = plan(16 << 30, exactly).expect_err("it does not fit");
        // 1 GiB of 160 KiB a token.
        let parts = ["weights 15.0 GiB", "(6553 tokens)", "no --draft-model (its weights are 1.0 GiB)"];
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        let error = plan(8 << 30, KvCacheBytes::QuarterOf(8 << 30)).expect_err("it does not fit");
        assert!(!error.contains("no --draft-model") && error.contains("--quantize q4"), "{error}");
    }

    /// Each way out that is named is one.
    #[test]
    fn ways_out_lead_out() {
        for available in (1..40).map(|half| half << 29) {
            for exactly in [None, Some(1 << 28), Some(4 << 30)] {
                let Err(error) = plan(available, exactly, None) else { continue };
                let Some((_, ways)) = error.split_once("what would fit: ") else { continue };
                for way in ways.split(". --memory").next().expect("the ways").split(", or ") {
                    let words: Vec<&str> = way.split(' ').collect();
                    let value = |flag| words.iter().position(|w| *w == flag).map(|at| words[at + 1]);
                    let mib = value("--kv-cache-memory").map(|text| text.trim_end_matches("MiB").parse::<u64>());
                    let quantize =
                        value("--quantize").map(|b| if b == "q8" { Quantize::Q8 } else { Quantize::Q4 });
                    let exactly = mib.map(|mib| mib.expect("a number") << 20).or(exactly);
                    assert!(plan(available, exactly, quantize).is_ok(), "{available}: {way} of {error}");
                }
            }
        }
    }
}
