//! Grammar texts → compiled grammars: bounded in time, size and number at work, the latest ones kept.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rill_engine::{Grammar, GrammarCompiler, GrammarError};
use rill_models::Tokenizer;
use tokio::sync::{OnceCell, Semaphore, oneshot};

use crate::protocol::ApiError;
use crate::structured::GrammarText;

/// A request waits this long for its grammar.
const COMPILE_TIME_MAX: Duration = Duration::from_millis(900);
/// Grammars compiled at once. One that takes longer than its request waits still counts until it ends.
const COMPILING_MAX: usize = 2;
/// Compiled grammars kept.
const KEPT_MAX: usize = 64;
/// Compiling recurses as deep as a schema's references; pages never touched cost nothing.
const STACK_BYTES: usize = 256 << 20;

/// The grammars of one model.
pub struct Grammars {
    tokenizer: Arc<Tokenizer>,
    vocab_size: usize,
    end_token_ids: Vec<u32>,
    /// Built with the first grammar: it walks the whole vocabulary.
    compiler: OnceCell<Result<Arc<GrammarCompiler>, GrammarError>>,
    kept: Mutex<Kept>,
    compiling: Arc<Semaphore>,
}

/// What was compiled, or why not, by text; the one unused for longest gives way.
#[derive(Default)]
struct Kept {
    entries: HashMap<String, (u64, Result<Grammar, GrammarError>)>,
    uses: u64,
}

impl Kept {
    fn get(&mut self, text: &str) -> Option<Result<Grammar, GrammarError>> {
        self.uses += 1;
        let (last_use, result) = self.entries.get_mut(text)?;
        *last_use = self.uses;
        Some(result.clone())
    }

    fn insert(&mut self, text: String, result: Result<Grammar, GrammarError>) {
        if self.entries.len() >= KEPT_MAX
            && let Some(oldest) =
                self.entries.iter().min_by_key(|(_, (last_use, _))| *last_use).map(|(text, _)| text.clone())
        {
            self.entries.remove(&oldest);
        }
        self.uses += 1;
        self.entries.insert(text, (self.uses, result));
    }
}

impl Grammars {
    pub fn new(tokenizer: Arc<Tokenizer>, vocab_size: usize, end_token_ids: Vec<u32>) -> Grammars {
        Grammars {
            tokenizer,
            vocab_size,
            end_token_ids,
            compiler: OnceCell::new(),
            kept: Mutex::default(),
            compiling: Arc::new(Semaphore::new(COMPILING_MAX)),
        }
    }

    /// The compiled grammar, within a second or not at all.
    pub async fn compile(self: &Arc<Self>, grammar: &GrammarText) -> Result<Grammar, ApiError> {
        let refused =
            |error: GrammarError| ApiError::invalid(grammar.param, format!("{}: {error}", grammar.param));
        let kept = self.kept().get(&grammar.text);
        if let Some(result) = kept {
            return result.map_err(refused);
        }
        let compiler = self.compiler().await.map_err(refused)?;
        let deadline = tokio::time::Instant::now() + COMPILE_TIME_MAX;
        let permit = match tokio::time::timeout_at(deadline, self.compiling.clone().acquire_owned()).await {
            Ok(Ok(permit)) => permit,
            _ => return Err(ApiError::overloaded("other grammars are being compiled; try again later")),
        };
        let (done, compiled) = oneshot::channel();
        let (grammars, text) = (self.clone(), grammar.text.clone());
        std::thread::Builder::new()
            .name("rill-grammar".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                let result = compiler.compile(&text);
                grammars.kept().insert(text, result.clone());
                drop(permit);
                // The request may have given up.
                let _ = done.send(result);
            })
            .map_err(|error| ApiError::internal(format!("no thread to compile a grammar on: {error}")))?;
        match tokio::time::timeout_at(deadline, compiled).await {
            Ok(Ok(result)) => result.map_err(refused),
            Ok(Err(_)) => Err(refused(GrammarError("a defect was caught while compiling it".to_owned()))),
            Err(_) => Err(refused(GrammarError(format!(
                "it is too complex: compiling it takes more than {} ms",
                COMPILE_TIME_MAX.as_millis()
            )))),
        }
    }

    async fn compiler(self: &Arc<Self>) -> Result<Arc<GrammarCompiler>, GrammarError> {
        let this = self.clone();
        self.compiler
            .get_or_init(|| async move {
                tokio::task::spawn_blocking(move || {
                    GrammarCompiler::new(&*this.tokenizer, this.vocab_size, &this.end_token_ids).map(Arc::new)
                })
                .await
                .unwrap_or_else(|error| Err(GrammarError(format!("the vocabulary cannot be used: {error}"))))
            })
            .await
            .clone()
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, Kept> {
        // Nothing that holds the lock can leave the entries half changed.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_recently_used_gives_way() {
        let mut kept = Kept::default();
        let failed = || Err(GrammarError("no".to_owned()));
        for number in 0..KEPT_MAX {
            kept.insert(number.to_string(), failed());
        }
        assert!(kept.get("0").is_some());
        kept.insert("new".to_owned(), failed());
        assert!(kept.get("0").is_some() && kept.get("new").is_some());
        assert!(kept.get("1").is_none());
        assert_eq!(kept.entries.len(), KEPT_MAX);
    }
}
